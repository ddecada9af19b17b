"""Fill a cache of latents: the part of `tools/precompute_latents.py` with PyTorch.

Every process encodes the samples rank, rank + world size, ... into its own shards, and skips those that are already in
a shard. An interrupted run therefore continues where it was, on any number of processes.
"""

import copy
import errno
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cogvideox_sat.clips.batch_order import SampleKey
from cogvideox_sat.clips.latent_cache import (
    DESCRIPTION,
    FORMAT,
    SHARDS,
    CachedSample,
    is_cache,
    read_description,
    read_shards,
)
from cogvideox_sat.clips.latent_identity import describe_model
from cogvideox_sat.clips.loader import ClipLoader
from cogvideox_sat.clips.reader_record import KEY, warn_of_other_reader
from cogvideox_sat.clips.transforms import Framing
from cogvideox_sat.configuration.data_mixing import repeated
from cogvideox_sat.configuration.memory_advice import precompute_advice
from cogvideox_sat.configuration.merging import first_difference
from cogvideox_sat.configuration.model_checks import check_model
from cogvideox_sat.configuration.model_section import tells_key_frames
from cogvideox_sat.configuration.settings import DataSettings, EngineSettings
from cogvideox_sat.configuration.training_arguments import TrainingArguments
from cogvideox_sat.engine.parts import PARTS
from cogvideox_sat.engine_choice import build_engine, is_overridden
from cogvideox_sat.files.atomic import replaced_when_complete
from cogvideox_sat.files.sizes import free_bytes
from cogvideox_sat.latent_geometry import SPACE_FACTOR, TIME_FACTOR, Bucket
from cogvideox_sat.parallel import process_watch
from cogvideox_sat.parallel.agreement import limited_collectives, meet
from cogvideox_sat.parallel.devices import choose_device, settle_precision
from cogvideox_sat.parallel.process_failures import failing_together
from cogvideox_sat.parallel.process_groups import destroy_process_groups, initialize_process_groups
from cogvideox_sat.runs.clips import same_dataset
from cogvideox_sat.runs.datasets import make_dataset
from diffusion_video import SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.memory_errors import memory_guard
from sgm.modules.autoencoding.distributions import DiagonalGaussianDistribution
from sgm.modules.diffusionmodules.key_frames import noise_pictures
from sgm.randomness import per_sample
from sgm.seeds import sample_seed

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20  # a shard holds at least one sample, however large
SHARD_SAMPLES = 64  # largest number of samples that an interrupted run loses, per process
UNREADABLE = "unreadable.txt"


def run(
    args: TrainingArguments, output: Path, store: str = "moments", dtype: str | None = None, image_variants: int = 0
) -> int:
    """Encode the missing samples of `args.train_data` into a cache; return the exit code.

    Args:
        output: folder of the cache.
        store: one of `clips.latent_cache.STORES`.
        dtype: stored dtype, "float32", "bfloat16" or "float16"; None: that of the computation.
        image_variants: number of first frames to encode per clip, each with the noise of another epoch.

    Raises:
        UserError: the data or the model cannot be read, or `output` holds something else, or cannot be written.
    """
    initialize_process_groups(limit=args.collective_timeout)
    try:
        with limited_collectives(args.collective_timeout):
            fill_cache(args, output, store, dtype, image_variants)
        return 0
    finally:
        destroy_process_groups()


def fill_cache(args: TrainingArguments, output: Path, store: str, dtype: str | None, image_variants: int) -> None:
    """Encode the missing samples of the cache; see `run`."""
    device = choose_device(args.device)
    args = settle_precision(args, device)
    check_model(EngineSettings.from_args(args), PARTS[:2])  # before weights and clips are read
    engine = build_engine(EngineSettings.from_args(without_context_parallel(args)), (), device)
    if is_overridden(engine, "encode_first_stage") and not is_overridden(engine, "encode_moments"):
        raise UserError(
            f"model.target: {type(engine).__name__} encodes clips in its own way (encode_first_stage), which a "
            "cache does not use; give it encode_moments too, or train on the clips themselves"
        )
    dataset = same_dataset(
        lambda: make_dataset(args.train_data, DataSettings.from_args(args), repeats=args.train_data_repeats),
        "the clips of train_data",
    )
    if getattr(dataset, "framing", Framing()) != Framing():
        logger.info("crops and mirrored clips in the cache are those of the first epoch, also in later ones")
    encoding = {
        "store": store,
        "dtype": dtype or str(engine.dtype).removeprefix("torch."),
        "computed_in": str(engine.dtype).removeprefix("torch."),
        "tile_size": args.vae_tile_size or args.model_config["first_stage_config"]["params"].get("tile_size"),
        "image_variants": image_variants,
        "seed": args.seed,
    }
    if tells_key_frames(args.model_config):
        encoding["key_frames"] = True
    description = describe(args, dataset, encoding)
    done = check_folder(output, description, dataset)
    wait_for_all()  # the next step changes the folder that the other processes check
    if dist.get_rank() == 0:
        prepare_folder(output, description)
    wait_for_all()
    todo = [index for index in range(dist.get_rank(), len(dataset), dist.get_world_size()) if index not in done]
    with failing_together(), process_watch.phase("encoding clips"), memory_guard("encoding", precompute_advice(args)):
        encode_samples(Encoder(engine, encoding), dataset, todo, output, args)
    wait_for_all()
    if dist.get_rank() == 0:
        finish(output, dataset)


def without_context_parallel(args: TrainingArguments) -> TrainingArguments:
    """Return the arguments with a VAE that each process uses for its own clips."""
    model_config = copy.deepcopy(args.model_config)
    model_config["first_stage_config"]["params"]["cp_size"] = 1
    return replace(args, model_config=model_config)


def wait_for_all() -> None:
    """Wait until all processes have called this.

    Raises:
        UserError: another process has failed.
    """
    try:
        meet("the other processes")
    except RuntimeError as error:
        raise UserError("another process has failed; see its message") from error


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------


def describe(args: TrainingArguments, dataset: Any, encoding: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `cache.json`; runs with equal content fill the same cache."""
    buckets = [tuple(dataset.bucket(index)) for index in range(len(dataset))]
    data = {
        "sources": [str(Path(path).resolve()) for path in repeated(args.train_data, args.train_data_repeats)],
        "config": args.data_config,
        "samples": len(dataset),
        "buckets": hashlib.blake2b(repr(buckets).encode(), digest_size=16).hexdigest(),
    }
    content = {"format": FORMAT, "model": describe_model(args.model_config), "data": data, "encoding": dict(encoding)}
    if reader := getattr(dataset, "reader", None):
        content[KEY] = reader
    return json.loads(json.dumps(content))  # with the types that reading the file returns


def without_reader(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description without the decoder of the videos.

    With another decoder, a cache is continued after a warning.
    """
    content = {name: value for name, value in description.items() if name != KEY}
    config = content["data"]["config"]
    params = {name: value for name, value in (config.get("params") or {}).items() if name != "video_backend"}
    content["data"] = {**content["data"], "config": {**config, "params": params}}
    return content


def check_folder(folder: Path, description: Mapping[str, Any], dataset: Any) -> set[int]:
    """Return the samples that are already in the cache.

    Raises:
        UserError: the folder has other content, or a cache of other data or settings; or the disk is too small.
    """
    if is_cache(folder):
        before = read_description(folder)
        warn_of_other_reader(str(folder), before, description.get(KEY))
        if difference := first_difference(without_reader(before), without_reader(description)):
            name, there, here = difference
            raise UserError(
                f"{folder} was begun with other settings: {name} is {json.dumps(there)} there and {json.dumps(here)} "
                "now; give --output another folder"
            )
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and not a cache of latents; give --output a new folder")
    done = set().union(*(shard.indices for shard in read_shards(folder)))
    needed = sum(sample_bytes(dataset.bucket(i), description) for i in range(len(dataset)) if i not in done)
    free = free_bytes(folder / DESCRIPTION)
    logger.info("%s: %d of %d samples to encode, %s", folder, len(dataset) - len(done), len(dataset), in_units(needed))
    if needed > free:
        raise UserError(f"the cache needs up to {in_units(needed)} more in {folder}, but {in_units(free)} are free")
    return done


def prepare_folder(folder: Path, description: Mapping[str, Any]) -> None:
    """Create the folder with its `cache.json`, and remove what a killed run left.

    Raises:
        UserError: the folder cannot be written.
    """
    if not is_cache(folder):
        with replaced_when_complete(folder / DESCRIPTION) as part:
            part.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    for path in folder.glob(f".{SHARDS}.*.part"):
        path.unlink(missing_ok=True)


def sample_bytes(bucket: Bucket, description: Mapping[str, Any]) -> int:
    """Return the size of a sample in a cache, if no other sample has its caption."""
    encoding, model = description["encoding"], description["model"]
    channels = model["VAE"]["z_channels"] * (2 if encoding["store"] == "moments" else 1)
    frames = (bucket.frames - 1) // TIME_FACTOR + 1
    frames += encoding["image_variants"] * (frames if encoding.get("key_frames") else 1)
    latents = channels * frames * (bucket.height // SPACE_FACTOR) * (bucket.width // SPACE_FACTOR)
    text = model["text encoder"]["tokens"] * model["text encoder"]["features"]
    return (latents + text) * getattr(torch, encoding["dtype"]).itemsize


def in_units(size: float) -> str:
    """Return a size in words, such as 1.5 GiB for 1610612736."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def finish(folder: Path, dataset: Any) -> None:
    """Write the list of unreadable files, and log a summary."""
    shards = read_shards(folder)
    skipped = {path for shard in shards for paths in shard.skipped.values() for path in paths}
    unreadable = sorted({*skipped, *dataset.unreadable})
    encoded, left_out = sum(len(shard.samples) for shard in shards), sum(len(shard.skipped) for shard in shards)
    if unreadable:
        with replaced_when_complete(folder / UNREADABLE) as part:
            part.write_text("".join(f"{path}\n" for path in unreadable), encoding="utf-8")
        logger.warning("%d unreadable files, listed in %s", len(unreadable), folder / UNREADABLE)
    size = sum(shard.path.stat().st_size for shard in shards)
    logger.info("%s is complete: %d samples, %d left out, %s", folder, encoded, left_out, in_units(size))


# ---------------------------------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------------------------------


class Encoder:
    """Encodes clips and captions as a cache's tensors, on the CPU and in its dtype.

    The VAE stays on the engine's device. The text encoder, which is far larger, is there only while it is used.
    """

    def __init__(self, engine: SATVideoDiffusionEngine, encoding: Mapping[str, Any]):
        self.engine = engine
        self.encoding = encoding
        self.dtype = getattr(torch, encoding["dtype"])

    def build(self) -> None:
        """Load the weights of both."""
        self.engine.build("first_stage_model")
        self.engine.build("conditioner", device="cpu")

    def clip(self, frames: Tensor, index: int) -> dict[str, Tensor]:
        """Return the tensors of the clip of sample `index`, by their names in a cache.

        The random numbers of the first frame and of latents are the same as training draws for the sample.

        Args:
            frames: (1, frames, 3, height, width).

        Raises:
            UserError: a tensor is not finite.
        """
        clip = self.engine.load_clip(frames)
        store, variants = self.encoding["store"], self.encoding["image_variants"]
        encoded = {}
        for epoch in range(max(variants, 1)):
            with per_sample([sample_seed(self.encoding["seed"], epoch, index)]):
                if variants:
                    encoded[f"{index}.image_{store}.{epoch}"] = self._encode(noise_pictures(clip[:, :, :1]))
                if self.encoding.get("key_frames"):
                    encoded[f"{index}.key_{store}.{epoch}"] = self._kept(self.engine.encode_key_frames(clip))
                if epoch == 0:
                    encoded[f"{index}.{store}"] = self._encode(clip)
        return {name: self._stored(tensor, f"sample {index}") for name, tensor in encoded.items()}

    def _encode(self, clip: Tensor) -> Tensor:
        with memory_guard("encoding clips"):
            return self._kept(self.engine.encode_moments(clip))

    def _kept(self, moments: Tensor) -> Tensor:
        """Return the stored form: the moments, or one draw of latents."""
        return moments if self.encoding["store"] == "moments" else DiagonalGaussianDistribution(moments).sample()

    @torch.no_grad()
    def captions(self, captions: Mapping[int, str]) -> dict[str, Tensor]:
        """Return the embedding of each caption, named `{index}.text`."""
        conditioner = self.engine.conditioner
        with memory_guard("the text encoder"), on_device(conditioner, self.engine.device):
            return {
                f"{index}.text": self._stored(conditioner({"txt": [text]}, drop=False)["crossattn"], f"'{text[:60]}'")
                for index, text in captions.items()
            }

    def _stored(self, tensor: Tensor, what: str) -> Tensor:
        stored = tensor[0].to("cpu", self.dtype).contiguous()
        if not torch.isfinite(stored).all():
            computed_in, dtype = self.encoding["computed_in"], self.encoding["dtype"]
            raise UserError(f"{what} is not finite, computed in {computed_in} and stored in {dtype}; use bfloat16")
        return stored


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep a frozen module on `device` within the block.

    Its tensors on the CPU are kept, and used again afterwards.
    """
    home = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]
    try:
        for tensor, data in home:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in home:
            tensor.data = data


class OpenShard:
    """A shard that is being filled in memory; `write` writes it to the disk."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, Tensor] = {}
        self.samples: list[CachedSample] = []
        self.skipped: dict[int, list[str]] = {}
        self.first_with: dict[str, int] = {}  # caption: index

    def add(self, index: int, frames: Tensor, caption: str, fps: float, encoder: Encoder) -> None:
        """Encode the clip (1, frames, 3, height, width), and add it."""
        self.tensors |= encoder.clip(frames, index)
        text = self.first_with.setdefault(caption, index)
        count, _, height, width = frames.shape[1:]
        self.samples.append(CachedSample(index, (count, height, width), caption, text, fps))

    @property
    def is_full(self) -> bool:
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        return size >= SHARD_BYTES or len(self.samples) + len(self.skipped) >= SHARD_SAMPLES

    def write(self, encoder: Encoder) -> None:
        """Encode the captions, and write the file.

        Raises:
            UserError: the file cannot be written.
        """
        texts = encoder.captions({index: caption for caption, index in self.first_with.items()})
        content = {"samples": [asdict(sample) for sample in self.samples], "skipped": self.skipped}
        with replaced_when_complete(self.path) as part:
            try:
                part.write_bytes(save(self.tensors | texts, {"content": json.dumps(content)}))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise UserError(
                    f"{self.path.parent}: the disk is full; earlier shards are kept: make room (this shard alone takes "
                    f"{in_units(sum(t.nbytes for t in (*self.tensors.values(), *texts.values())))}), and run again"
                ) from error


def encode_samples(encoder: Encoder, dataset: Any, todo: list[int], folder: Path, args: TrainingArguments) -> None:
    """Encode the samples of this process into new shards.

    Raises:
        UserError: more than `max_unreadable_share` of them cannot be read, or a shard cannot be written.
    """
    if not todo:
        return
    encoder.build()
    keys = [[SampleKey(index, sample_seed(args.seed, 0, index))] for index in todo]
    batches = ClipLoader(ReadableSamples(dataset), keys, args.num_workers, args.clip_timeout)
    paths = new_shards(folder)
    shard, left_out = OpenShard(next(paths)), 0
    bar = tqdm(batches, desc="encoding", unit="clip", total=len(todo), disable=dist.get_rank() != 0)
    with bar, logging_redirect_tqdm():
        for index, batch in zip(todo, bar, strict=True):
            if unreadable := batch["unreadable"][0]:
                left_out += 1
                shard.skipped[index] = unreadable
                logger.warning("left out, unreadable: %s", "; ".join(unreadable))
                if left_out > args.max_unreadable_share * len(todo):
                    raise UserError(
                        f"{left_out} of {len(todo)} clips are unreadable, more than max_unreadable_share "
                        f"{args.max_unreadable_share:g} allows; the last one: {unreadable[0]}"
                    )
            else:
                shard.add(index, batch["mp4"], batch["txt"][0], float(batch["fps"][0]), encoder)
            if shard.is_full:
                shard.write(encoder)
                shard = OpenShard(next(paths))
    if shard.samples or shard.skipped:
        shard.write(encoder)


class ReadableSamples:
    """The samples of a data set, without replacements for unreadable ones.

    For an unreadable sample, only the unreadable files are returned.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        try:
            sample = self.dataset[key]
        except UserError as error:  # no other sample has its shape
            return {"unreadable": [str(error)]}
        return {"unreadable": sample["unreadable"]} if sample["unreadable"] else sample


def new_shards(folder: Path) -> Iterator[Path]:
    """Yield the names of this process's shards that do not exist yet."""
    number = 0
    while True:
        path = folder / f"rank{dist.get_rank():04d}-{number:05d}.safetensors"
        if not path.exists():
            yield path
        number += 1
