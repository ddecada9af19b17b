"""The conditioner and its embedders."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgm import randomness
from sgm.errors import UserError
from sgm.modules.diffusionmodules.util import append_dims
from sgm.modules.encoders.t5_loading import load_t5
from sgm.util import instantiate_from_config

logger = logging.getLogger(__name__)

KIND_OF_RANK = {2: "vector", 3: "crossattn", 4: "concat", 5: "concat"}


class AbstractEmbModel(nn.Module):
    """One part of a conditioner: turns one or several entries of a batch into an embedding.

    `GeneralConditioner` sets the attributes from its configuration.

    Attributes:
        input_keys: entries of the batch that `forward` takes, in order.
        input_key: the entry, if the configuration names a single one; else None.
        output_key: kind of the embedding; None: chosen by its rank, see `KIND_OF_RANK`.
        is_trainable: whether gradients flow into the embedder.
        ucg_rate: probability of dropping this embedding of a sample in training (classifier-free guidance).
        legacy_ucg_value: value that replaces the input of such a sample; None: its embedding becomes zeros.
    """

    input_keys: tuple[str, ...]
    input_key: str | None = None
    output_key: str | None = None
    is_trainable = False
    ucg_rate = 0.0
    legacy_ucg_value: Any = None


class GeneralConditioner(nn.Module):
    """The conditioner: turns a batch into the network's conditioning by several embedders.

    Args:
        emb_models: for each embedder its `target` and `params`, `input_key` (or `input_keys`), and optionally
            `is_trainable` (False), `ucg_rate` (0), `legacy_ucg_value` and `output_key`; see `AbstractEmbModel`.
        cor_embs: indices of the embedders that are dropped together, instead of each at its own rate.
        cor_p: 2^len(cor_embs) probabilities. With probability cor_p[r] a sample keeps the embedding of cor_embs[j] if
            bit j of r is 1 (bit 0 is the lowest), and loses the others.

    Raises:
        UserError: an embedder is not an `AbstractEmbModel` or names no input, or the probabilities are not as above.
    """

    def __init__(
        self, emb_models: Sequence[Mapping[str, Any]], cor_embs: Sequence[int] = (), cor_p: Sequence[float] = ()
    ):
        super().__init__()
        self.cor_embs, self.cor_p = list(cor_embs), list(cor_p)
        _check_correlation(self.cor_embs, self.cor_p, len(emb_models))
        self.embedders = nn.ModuleList(self._build(config) for config in emb_models)

    @staticmethod
    def _build(config: Mapping[str, Any]) -> AbstractEmbModel:
        embedder = instantiate_from_config(config)
        if not isinstance(embedder, AbstractEmbModel):
            raise UserError(f"conditioner_config: {config['target']} is not an AbstractEmbModel")
        if "input_key" in config:
            embedder.input_key = config["input_key"]
            embedder.input_keys = (config["input_key"],)
        elif "input_keys" in config:
            embedder.input_keys = tuple(config["input_keys"])
        else:
            raise UserError(f"conditioner_config: {config['target']} has neither 'input_key' nor 'input_keys'")
        embedder.output_key = config.get("output_key")
        embedder.is_trainable = config.get("is_trainable", False)
        embedder.ucg_rate = config.get("ucg_rate", 0.0)
        embedder.legacy_ucg_value = config.get("legacy_ucg_value")
        if not embedder.is_trainable:
            embedder.requires_grad_(False).eval()
        return embedder

    def train(self, mode: bool = True) -> "GeneralConditioner":
        """Set the mode; embedders that are not trained stay in evaluation mode."""
        super().train(mode)
        for embedder in self.embedders:
            if not embedder.is_trainable:
                embedder.eval()
        return self

    def forward(
        self, batch: Mapping[str, Any], force_zero_embeddings: Iterable[str] | None = None, drop: bool = True
    ) -> dict[str, Tensor]:
        """Return the conditioning of a batch.

        Args:
            batch: the entries that the embedders name.
            force_zero_embeddings: input keys whose embeddings become zeros.
            drop: drop embeddings at the embedders' `ucg_rate`, in any mode of the module.

        Returns:
            "vector" (batch, features), "crossattn" (batch, tokens, features) and "concat" (batch, [time,] channels,
            height, width), as far as embedders give them; embeddings of one kind are concatenated on features or
            channels.

        Raises:
            UserError: the batch lacks an entry that an embedder takes.
        """
        zeroed = set(force_zero_embeddings or ())
        embeddings: dict[str, list[Tensor]] = {}
        together: Tensor | None = None  # for each sample, the correlated embeddings to keep
        for index, embedder in enumerate(self.embedders):
            inputs = [self._entry(batch, key) for key in embedder.input_keys]
            rate = embedder.ucg_rate if drop and index not in self.cor_embs else 0.0
            if rate > 0 and embedder.legacy_ucg_value is not None:
                inputs[0] = _replace_some(inputs[0], embedder.legacy_ucg_value, rate)
            with torch.set_grad_enabled(torch.is_grad_enabled() and embedder.is_trainable):
                embedded = embedder(*inputs)
            for embedding in [embedded] if isinstance(embedded, Tensor) else embedded:
                if rate > 0 and embedder.legacy_ucg_value is None:
                    kept = randomness.keep_mask(
                        len(embedding), rate, purpose="caption dropout", device=embedding.device
                    )
                    embedding = append_dims(kept.to(embedding.dtype), embedding.ndim) * embedding
                if drop and index in self.cor_embs:
                    if together is None:
                        together = self._draw_together(len(embedding))
                    kept = (together >> self.cor_embs.index(index)) & 1
                    embedding = append_dims(kept.to(embedding), embedding.ndim) * embedding
                if not zeroed.isdisjoint(embedder.input_keys):
                    embedding = torch.zeros_like(embedding)
                kind = embedder.output_key or KIND_OF_RANK[embedding.ndim]
                embeddings.setdefault(kind, []).append(embedding)
        return {kind: torch.cat(parts, dim=_features_dim(parts[0])) for kind, parts in embeddings.items()}

    def _draw_together(self, count: int) -> Tensor:
        """Draw an index of `cor_p` for each sample by these probabilities: int64 (count,)."""
        return randomness.chosen(randomness.uniform(count, purpose="correlated caption dropout"), self.cor_p)

    @staticmethod
    def _entry(batch: Mapping[str, Any], key: str) -> Any:
        if key not in batch:
            raise UserError(f"conditioner: the batch has no entry '{key}', only {sorted(batch)}")
        return batch[key]

    def get_unconditional_conditioning(
        self,
        batch_c: Mapping[str, Any],
        batch_uc: Mapping[str, Any] | None = None,
        force_uc_zero_embeddings: Iterable[str] | None = None,
        force_cond_zero_embeddings: Iterable[str] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the conditional and the unconditional conditioning, without dropping anything.

        Args:
            batch_c: as for `forward`.
            batch_uc: the unconditional batch; None: `batch_c`.
            force_uc_zero_embeddings, force_cond_zero_embeddings: input keys whose embeddings become zeros.
        """
        cond = self(batch_c, force_cond_zero_embeddings, drop=False)
        uncond = self(batch_c if batch_uc is None else batch_uc, force_uc_zero_embeddings, drop=False)
        return cond, uncond


def _check_correlation(embedders: list[int], probabilities: list[float], count: int) -> None:
    if not embedders and not probabilities:
        return
    if len(set(embedders)) < len(embedders) or not all(type(i) is int and 0 <= i < count for i in embedders):
        raise UserError(
            f"cor_embs: {embedders} are not places of different embedders; give each of 0 to {count - 1} at most once"
        )
    fits = all(not isinstance(p, bool) and isinstance(p, int | float) and p >= 0 for p in probabilities)
    if len(probabilities) != 2 ** len(embedders) or not fits or abs(sum(probabilities) - 1) > 1e-6:
        raise UserError(
            f"cor_p: {probabilities} do not fit; {len(embedders)} embedders need {2 ** len(embedders)} probabilities "
            "that add up to 1"
        )


def _replace_some(values: Any, replacement: Any, rate: float) -> list[Any]:
    """Return the samples of a batch, each replaced with probability `rate`."""
    dropped = (randomness.uniform(len(values), purpose="caption dropout") < rate).tolist()
    return [replacement if drop else value for value, drop in zip(values, dropped, strict=True)]


def _features_dim(embedding: Tensor) -> int:
    """Return the axis of features (vector, crossattn) or of channels (concat)."""
    return embedding.ndim - 3 if embedding.ndim >= 4 else embedding.ndim - 1


class PrecomputedEmbedder(AbstractEmbModel):
    """An embedder that returns precomputed embeddings (batch, tokens, features)."""

    def forward(self, embedding: Tensor) -> Tensor:
        return embedding


class IdentityEncoder(PrecomputedEmbedder):
    """An embedder that returns entries of a batch unchanged."""

    def encode(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x


class FrozenT5Embedder(AbstractEmbModel):
    """A T5 encoder (Raffel et al. 2020): text -> last hidden states.

    Every text takes `max_length` tokens. Shorter texts are padded, and the network attends to the padding, as in the
    training of the released models. Longer texts are cut.

    Args:
        model_dir: a folder with `config.json`, the weights and `spiece.model` (or `tokenizer.json`).
        device: initial device; `.to()` moves the model. None: the CPU.
        max_length: tokens per text.
        freeze: evaluation mode, without gradients.
        cache_dir: if given, `model_dir` is a name on the Hugging Face hub, and this folder keeps the downloads.
        dtype: dtype to compute in, such as torch.bfloat16 or "bfloat16"; None: that of the stored weights. Weights
            stored in this dtype are mapped from their file, which the processes of a machine share.
        blocks_as_stored: leave the weights of `blocks` mapped from the file in any dtype; the caller converts each
            block to `block_dtypes` before it runs.

    Attributes:
        block_dtypes: the dtype to compute in, for each parameter of each of `blocks`.

    Raises:
        UserError: the folder or one of its files is missing or cannot be read.
    """

    def __init__(
        self,
        model_dir: str,
        device: str | torch.device | None = None,
        max_length: int = 77,
        freeze: bool = True,
        cache_dir: str | None = None,
        dtype: torch.dtype | str | None = None,
        blocks_as_stored: bool = False,
    ):
        super().__init__()
        loaded = load_t5(model_dir, cache_dir, dtype, device, blocks_as_stored)
        self.tokenizer, self.transformer, self.block_dtypes = loaded
        self.max_length = max_length
        if freeze:
            self.requires_grad_(False).eval()

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Return the embedding of one or several texts; the unconditional text is the empty one.

        Returns:
            (batch, max_length, hidden), on the device and in the dtype of the weights.
        """
        texts = [text] if isinstance(text, str) else list(text)
        encoding = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        for one, mask in zip(texts, encoding["attention_mask"], strict=True):
            if mask.all():
                self._warn_of_cut(one)
        tokens = encoding["input_ids"].to(self.transformer.device)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.transformer(input_ids=tokens).last_hidden_state

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the layers of the encoder, in the order of execution."""
        return self.transformer.encoder.block

    def _warn_of_cut(self, text: str) -> None:
        excess = len(self.tokenizer(text, verbose=False)["input_ids"]) - self.max_length
        if excess > 0:
            start = text[:60].replace("\n", " ")
            logger.warning("text cut to %d tokens, the last %d are lost: '%s...'", self.max_length, excess, start)
