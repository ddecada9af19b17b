"""Check the `model:` section before PyTorch is imported.

The checks are of the section's shape, the values that the engine itself uses, and sizes, so that no object is built
that no machine could hold. Parameters of classes are checked when the classes are imported: see `sgm.config_values` and
`configuration.model_checks`.
"""

import math
import os
from collections.abc import Mapping
from typing import Any, NoReturn

from cogvideox_sat.configuration.recomputation import check_layers, recomputation_mode
from cogvideox_sat.configuration.static_signatures import problem_of_section
from sgm.config_places import ConfigError, Key, Sources, walk
from sgm.config_slots import SLOTS
from sgm.errors import UserError, shown

FLAGS = ("latent_input", "noised_image_input", "noised_image_all_concat")
TEXTS = ("input_key", "network_wrapper", "target")
LISTS = ("log_keys", "not_trainable_prefixes")
# Objects that may be left empty: they are then not built, or have a default.
OPTIONAL = {"sampler_config", "loss_fn_config", "guider_config", "loss_config", "discriminator_config", "ckpt_engine"}
OPTIONAL |= {"optimizer_config", "scheduler_config", "network_wrapper", "lora_config"}
EMBEDDER_KEYS = {"target", "params", "is_trainable", "ucg_rate", "input_key", "input_keys", "legacy_ucg_value"}
EMBEDDER_KEYS |= {"output_key"}

# Limits of whole numbers by the name of the parameter, in any object. The upper limits are far beyond all machines, but
# low enough that a module can be built without memory to compute its size.
SIZES = {
    **dict.fromkeys(("num_layers", "n_layers", "layer_num"), (1, 1000)),
    **dict.fromkeys(("hidden_size", "time_embed_dim", "ofs_embed_dim", "text_hidden_size"), (1, 2**17)),
    **dict.fromkeys(("num_attention_heads", "hidden_size_head", "time_compressed_rate"), (1, 2**12)),
    **dict.fromkeys(("text_length", "max_length", "max_sequence_length"), (1, 2**16)),
    **dict.fromkeys(("vocab_size", "num_frames", "num_idx", "num_steps", "resolution"), (1, 2**20)),
    **dict.fromkeys(("latent_width", "latent_height"), (1, 2**13)),
    **dict.fromkeys(("in_channels", "out_channels", "out_ch", "z_channels", "ch", "ndf", "r"), (1, 2**16)),
    **dict.fromkeys(("num_res_blocks", "order"), (0, 64)),
    **dict.fromkeys(("norm_groups", "temporal_compress_times"), (1, 2**12)),
    **dict.fromkeys(("cp_size", "context_parallel_size", "model_parallel_size"), (0, 2**16)),
    **dict.fromkeys(("n_e", "n_embed", "num_embeddings", "embed_dim", "e_dim", "dim", "dims"), (1, 2**22)),
}
POSITIVE = {"shift_scale", "sigma_data", "theta"}  # divisors, or arguments of a logarithm
# SwissArmyTransformer's arguments, which it does not check itself.
TRANSFORMER_FLAGS = {"skip_init", "is_decoder"}
TRANSFORMER_SIZES = {"vocab_size", "max_sequence_length", "model_parallel_size", "inner_hidden_size"}
TRANSFORMER_COUNTS = {"checkpoint_num_layers": 1, "checkpoint_skip_layers": 0}  # the minimum of each
TRANSFORMER_CHOICES = {"layernorm_order": ("pre", "post", "sandwich")}
MOST_LEVELS = 16  # of `ch_mult`
LONGEST_LIST = 10_000
LARGEST_TABLE = 2**34  # bytes of a table of positions, which is made in host memory
ROTARY_WIDTH = 256  # largest width of a table of rotary positions
BYTES = 8  # of a number in a table of positions


def check_model_values(model: Mapping[str, Any], sources: Sources) -> None:
    """Check the values of the `model:` section that can be checked without its classes.

    Raises:
        UserError: a part is not described by `target` and `params`, a value that the engine itself reads is of the
            wrong type or out of range, or a size is beyond all machines. The message names the file and the key.
    """
    Check(sources).run(model)


class Check:
    """Checks of a section whose keys are from `sources`."""

    def __init__(self, sources: Sources):
        self.sources = sources

    def refuse(self, key: Key, problem: str) -> NoReturn:
        """Raise UserError about the value of a key."""
        raise ConfigError(f"{self.sources.place(key)}: {problem}")

    def run(self, model: Mapping[str, Any]) -> None:
        """Check all values of the section; see `check_model_values`."""
        for key, node in walk(model, ("model",)):
            if isinstance(node, Mapping):
                for name, value in node.items():
                    self.value((*key, name), value)
            elif len(node) > LONGEST_LIST:
                self.refuse(key, f"a list of {len(node)} items; at most {LONGEST_LIST} are taken")
        self.engine_values(model)
        self.tables(model)
        self.recomputed_layers(model)

    def value(self, key: Key, value: Any) -> None:
        """Check the value of a key, by the key's name."""
        name = key[-1]
        if type(value) is int and abs(value) >= 2**63:
            self.refuse(key, f"got {shown(value)}; expected a number of at most 2^63")
        if name == "emb_models":
            self.embedders(key, value)
        elif (name in SLOTS and name.endswith("_config")) or name == "ckpt_engine":
            self.slot(key, value)
        elif name == "params" and value is not None and not isinstance(value, Mapping):
            self.refuse(key, f"got {shown(value)}; expected keys and values")
        elif name in SIZES and type(value) is int:
            least, most = SIZES[name]
            if not least <= value <= most:
                self.refuse(key, f"got {shown(value)}; expected a whole number from {least} to {most}")
        elif name in POSITIVE and value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
            self.refuse(key, f"got {shown(value)}; expected a positive number")
        elif name == "transformer_args" and isinstance(value, Mapping):
            self.transformer_arguments(key, value)
        elif name == "ch_mult" and isinstance(value, list):
            if not 1 <= len(value) <= MOST_LEVELS:
                self.refuse(key, f"has {len(value)} levels; expected 1 to {MOST_LEVELS}")
            for index, multiple in enumerate(value):
                if type(multiple) is not int or not 1 <= multiple <= 2**12:
                    self.refuse((*key, index), f"got {shown(multiple)}; expected a whole number from 1 to {2**12}")

    def transformer_arguments(self, key: Key, values: Mapping[str, Any]) -> None:
        """Check the arguments of SwissArmyTransformer that configurations hold."""
        for name, value in values.items():
            if value is None:  # an empty value means not set
                continue
            if name in TRANSFORMER_FLAGS:
                self.flag((*key, name), value)
            elif name == "checkpoint_activations":
                self.recomputation((*key, name), value)
            elif name in TRANSFORMER_COUNTS and (type(value) is not int or value < TRANSFORMER_COUNTS[name]):
                self.refuse(
                    (*key, name), f"got {shown(value)}; expected a whole number from {TRANSFORMER_COUNTS[name]}"
                )
            elif name in TRANSFORMER_SIZES and type(value) is not int:
                self.refuse((*key, name), f"got {shown(value)}; expected a whole number")
            elif name in TRANSFORMER_CHOICES and value not in TRANSFORMER_CHOICES[name]:
                choices = ", ".join(TRANSFORMER_CHOICES[name])
                self.refuse((*key, name), f"is {shown(value)}; it can be {choices}")

    def recomputed_layers(self, model: Mapping[str, Any]) -> None:
        """Check that the layers exist whose activations are recomputed, or are not."""
        params = (model.get("network_config") or {}).get("params")
        values = params.get("transformer_args") if isinstance(params, Mapping) else None
        layers = _size(params.get("num_layers")) if isinstance(params, Mapping) else None
        if not layers or not isinstance(values, Mapping):
            return
        key = ("model", "network_config", "params", "transformer_args")
        mode = values.get("checkpoint_activations")
        if mode is not None:
            self.recomputation((*key, "checkpoint_activations"), mode, layers)
        for name, least in TRANSFORMER_COUNTS.items():
            if (values.get(name) or least) > layers:
                self.refuse((*key, name), f"got {values[name]}; the network has {layers} layers")

    def recomputation(self, key: Key, value: Any, layers: int | None = None) -> None:
        """Check the value of `checkpoint_activations`, and with `layers` that these layers exist."""
        place = self.sources.place(key)
        try:
            mode = recomputation_mode(place, value)
            if layers is not None:
                check_layers(place, mode, layers)
        except UserError as error:
            raise ConfigError(str(error)) from error  # the message already names the file

    def head_width(self, params: Mapping[str, Any]) -> None:
        """Check that rotary positions are as wide as an attention head, if both are numbers."""
        modules = params.get("modules")
        position = modules.get("pos_embed_config") if isinstance(modules, Mapping) else None
        position = position.get("params") if isinstance(position, Mapping) else None
        given = _size(position.get("hidden_size_head")) if isinstance(position, Mapping) else None
        hidden, heads = _size(params.get("hidden_size")), _size(params.get("num_attention_heads"))
        if given and hidden and heads and given * heads != hidden:
            self.refuse(
                ("model", "network_config", "params", "modules", "pos_embed_config", "params", "hidden_size_head"),
                f"is {given}; hidden_size {hidden} and num_attention_heads {heads} make {hidden / heads:g}",
            )

    def slot(self, key: Key, value: Any) -> None:
        """Check that an object is described by `target` and `params`."""
        if value is None and key[-1] in OPTIONAL:
            return
        if isinstance(value, str) and key[-1] == "ckpt_engine":
            return
        if not isinstance(value, Mapping):
            self.refuse(key, f"got {shown(value)}; expected a mapping with the keys target and params")
        target = value.get("target")
        if not isinstance(target, str):
            there = f"is {shown(target)}" if "target" in value else "is missing"
            self.refuse((*key, "target"), f"{there}; expected an import path of the form package.module.Class")
        own = target.split(".")[0] in ("sgm", "vae_modules", "dit_video_concat")
        if own and (unknown := [name for name in value if name not in ("target", "params")]):
            self.refuse((*key, unknown[0]), "unknown; an object is described by target and params")

    def embedders(self, key: Key, value: Any) -> None:
        """Check the list of embedders: text encoders and other conditions of the network."""
        if not isinstance(value, list):
            self.refuse(key, f"got {shown(value)}; expected a list of embedders")
        for index, entry in enumerate(value):
            at = (*key, index)
            if not isinstance(entry, Mapping):
                self.refuse(at, f"got {shown(entry)}; expected a mapping with the keys target and params")
            if not isinstance(entry.get("target"), str):
                self.refuse(
                    (*at, "target"),
                    f"got {shown(entry.get('target'))}; expected an import path of the form package.module.Class",
                )
            for name in entry:
                if name not in EMBEDDER_KEYS:
                    self.refuse((*at, name), f"unknown; it can be {', '.join(sorted(EMBEDDER_KEYS))}")
            self.share((*at, "ucg_rate"), entry.get("ucg_rate"))
            self.flag((*at, "is_trainable"), entry.get("is_trainable"))
            self.text((*at, "input_key"), entry.get("input_key"))
            self.text((*at, "output_key"), entry.get("output_key"))
            self.texts((*at, "input_keys"), entry.get("input_keys"))

    def engine_values(self, model: Mapping[str, Any]) -> None:
        """Check the values that the engine itself reads, some of them only when they are used."""
        scale = model.get("scale_factor", 1)
        if type(scale) not in (int, float) or not 0 < scale < math.inf:
            self.refuse(("model", "scale_factor"), f"got {shown(scale)}; expected a positive number")
        for name in FLAGS:
            self.flag(("model", name), model.get(name))
        compiles = model.get("compile_model")
        if not (compiles is None or type(compiles) is bool or compiles == "auto"):
            self.refuse(("model", "compile_model"), f"got {shown(compiles)}; expected true, false or auto")
        for name in TEXTS:
            self.text(("model", name), model.get(name))
        for name in LISTS:
            self.texts(("model", name), model.get(name))
        self.share(("model", "noised_image_dropout"), model.get("noised_image_dropout"))
        samples = model.get("en_and_decode_n_samples_a_time")
        if samples is not None and (type(samples) is not int or samples < 1):
            self.refuse(
                ("model", "en_and_decode_n_samples_a_time"), f"got {shown(samples)}; expected a whole number from 1"
            )

    def tables(self, model: Mapping[str, Any]) -> None:
        """Check that the table of positions, which depends on several sizes, fits into memory."""
        params = (model.get("network_config") or {}).get("params")
        if not isinstance(params, Mapping):
            return
        self.head_width(params)
        names = ("latent_height", "latent_width", "num_frames", "time_compressed_rate", "hidden_size", "patch_size")
        height, width, frames, rate, hidden = (_size(params.get(name)) for name in names[:-1])
        if not (height and width and frames and rate and hidden):
            return  # `ModelLimits` reports a missing number by name
        sides = params.get("patch_size")
        patch = _size(sides[-1] if isinstance(sides, list) and sides else sides) or 1
        modules = params.get("modules")
        positions = modules.get("pos_embed_config") if isinstance(modules, Mapping) else None
        target = positions.get("target") if isinstance(positions, Mapping) else None
        if not str(target).startswith("dit_video_concat.Basic"):  # rotary tables are as wide as a head
            hidden = ROTARY_WIDTH
        count = ((frames - 1) // rate + 1) * (height // patch) * (width // patch) * hidden * BYTES
        if count > min(LARGEST_TABLE, host_memory()):
            self.refuse(
                ("model", "network_config", "params"),
                f"{', '.join(names)} make a table of positions of {count / 2**30:.0f} GiB; lower them",
            )

    def flag(self, key: Key, value: Any) -> None:
        """Check that a value is missing, true or false."""
        if value is not None and type(value) is not bool and value not in (0, 1):
            self.refuse(key, f"got {shown(value)}; expected true or false")

    def text(self, key: Key, value: Any) -> None:
        """Check that a value is missing, or a text that is not empty."""
        if value is not None and (not isinstance(value, str) or not value):
            self.refuse(key, f"got {shown(value)}; expected a text")

    def texts(self, key: Key, value: Any) -> None:
        """Check that a value is missing, a text, or a list of texts."""
        value = [value] if isinstance(value, str) else value
        fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if value is not None and not fits:
            self.refuse(key, f"got {shown(value)}; expected a list of texts")

    def share(self, key: Key, value: Any) -> None:
        """Check that a value is missing, or a number from 0 to 1."""
        if value is not None and (type(value) not in (int, float) or not 0 <= value <= 1):
            self.refuse(key, f"got {shown(value)}; expected a share, from 0 to 1")


def _size(value: Any) -> int | None:
    """Return the value if it is a positive whole number, else None."""
    return value if type(value) is int and value > 0 else None


def check_data_section(data: Mapping[str, Any], sources: Sources) -> None:
    """Check the parts of the `data:` section that can be checked without its class.

    Raises:
        UserError: `target` or `params` are missing or of the wrong type, or there are other keys.
    """
    check = Check(sources)
    if not isinstance(data.get("target"), str):
        check.refuse(("data", "target"), f"is {shown(data.get('target'))}; name a class, data_video.SFTDataset")
    if not isinstance(data.get("params") or {}, Mapping):
        check.refuse(("data", "params"), f"got {shown(data['params'])}; expected keys and values")
    for name in data:
        if name not in ("target", "params"):
            check.refuse(("data", name), "unknown; a dataset is described by target and params")


def check_parameters(sections: Mapping[str, Mapping[str, Any]], sources: Sources) -> None:
    """Check the parameters of this project's classes in sections, by reading their source.

    Raises:
        UserError: a parameter is unknown to the class, or of the wrong type. The message names the file and the key.
    """
    for name, section in sections.items():
        if problem := problem_of_section(section, name):
            Check(sources).refuse(*problem)


def host_memory() -> int:
    """Return the machine's memory in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # the system does not report its memory
        return 2**40
