"""Read and write the record beside each video, `000000.json`.

A record says what made the video, and holds the arguments that make it again. It is read as a file that came from
somewhere else: its targets may lead only to classes of this project. Nothing here imports PyTorch.
"""

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox_sat.configuration.files import PATH_KEYS, MergedConfig
from cogvideox_sat.configuration.merging import first_difference
from cogvideox_sat.configuration.sampler_knobs import KNOBS
from cogvideox_sat.configuration.targets import iterate_targets, why_target_fails
from cogvideox_sat.files.atomic import write_atomically
from sgm.config_places import Sources
from sgm.errors import UserError, shown
from sgm.plain_json import has_half_characters

logger = logging.getLogger(__name__)

FORMAT = 1
PRECISION_NAMES = ("fp16", "bf16", "float32")
SUFFIX = ".json"
LARGEST = 4 * 2**20  # bytes of a record
DEEPEST = 60  # levels of mappings and lists in a record
KEPT_SUFFIX = ".latents.safetensors"  # latents that are kept until their video is complete

# key: (types of its value, what is expected)
_TEXT, _NUMBER, _OBJECT = ((str,), "text"), ((int, float), "a number"), ((dict,), "an object")
_TEXT_OR_NONE, _OBJECT_OR_NONE = ((str, type(None)), "text or null"), ((dict, type(None)), "an object or null")
_WHOLE, _LIST = ((int,), "a whole number"), ((list,), "a list")
FIELDS = {
    "prompt": _TEXT,
    "original_prompt": _TEXT_OR_NONE,  # missing: null
    "negative_prompt": _TEXT,
    "image": _OBJECT_OR_NONE,
    "keyframes": _LIST,
    "video_from": _OBJECT_OR_NONE,
    "strength": ((int, float, type(None)), "a number or null"),
    "extend": _LIST,
    "seed": _WHOLE,
    "index": _WHOLE,
    "steps": _WHOLE,
    "size": _LIST,
    "latent_frames": _WHOLE,
    "fps": _WHOLE,
    "precision": _TEXT,
    "checkpoint": _OBJECT_OR_NONE,
    "adapters": _LIST,
    "model": _OBJECT,
    "arguments": _OBJECT,
    "versions": _OBJECT,
    "device": _TEXT,
    "threads": _WHOLE,
}
UNMERGED = "lora"  # argument of a record: true if its adapters are those of `lora`, not the one of `lora_load`
# Keys that a record holds only if the request gave them, and their values if it did not.
LEFT_OUT: dict[str, Any] = {"keyframes": [], "video_from": None, "strength": None, "extend": []}
# Other arguments that change the numbers of a video.
# A record also has those of `KNOBS` that the video was made with.
REPEATED_ARGUMENTS = (
    *("image2video", "latent_channels", "vae_tile_size", "model_parallel_size", "force_inference"),
    "vae_frames_at_once",  # in half precision
    *("attention", "guidance_batch"),
)


@dataclass(frozen=True)
class VideoRecord:
    """A record that was read from a file, with all of its `FIELDS`."""

    path: Path
    content: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.content[key] if key in self.content else LEFT_OUT[key]

    def arguments(self) -> dict[str, Any]:
        """Return the sampling arguments that make the video again, by their names in `args:`."""
        content, adapters = self.content, self.content["adapters"]
        unmerged = content["arguments"].get(UNMERGED) is True
        return {
            **{name: content["arguments"].get(name) for name in (*REPEATED_ARGUMENTS, *KNOBS)},
            "load": (content["checkpoint"] or {}).get("path"),
            "lora_load": adapters[0].get("path") if adapters and not unmerged else None,
            "lora_scale": adapters[0].get("scale") if adapters and not unmerged else None,
            "lora": [f"{each['path']}:{each['scale']!r}" for each in adapters] if unmerged else None,
            "fp16": content["precision"] == "fp16",
            "bf16": content["precision"] == "bf16",
            "negative_prompt": content["negative_prompt"],
            "seed": content["seed"],
            "sampling_num_steps": content["steps"],
            "sampling_image_size": content["size"],
            "sampling_num_frames": content["latent_frames"],
            "sampling_fps": content["fps"],
            "input_type": "txt",
            "batch_size": 1,
            "refine_prompts": False,
        }

    def request(self) -> dict[str, Any]:
        """Return the fields of a request for the video to a model that is loaded already.

        See `configuration.request_fields`: the fields of a call from Python, or of a line of a `.jsonl` file.
        """
        content, image = self.content, self.content["image"]
        fields = {
            "prompt": content["prompt"],
            "negative_prompt": content["negative_prompt"],
            "image": image and image["path"],
            "keyframes": [{"image": entry["path"], "at": entry["at"]} for entry in self["keyframes"]] or None,
            "video": self["video_from"] and self["video_from"]["path"],
            "strength": self["strength"],
            "extend": self["extend"] or None,
            "seed": content["seed"],
            "size": tuple(content["size"]),
            "num_frames": content["latent_frames"],
            "fps": content["fps"],
            "steps": content["steps"],
            **{name: content["arguments"].get(name) for name in KNOBS},
        }
        return {name: value for name, value in fields.items() if value is not None}

    def model(self) -> MergedConfig:
        """Return the model section of the configuration that made the video, like `load_configs`.

        Raises:
            UserError: the section names something that only a configuration of the user's own may name.
        """
        section = self.content["model"].get("config")
        if not isinstance(section, dict):
            raise UserError(f"{self.path}: model.config: missing; give the model's configuration as --base")
        check_foreign_model(section, self.path, "model.config")
        config = MergedConfig({"model": copy.deepcopy(section)})
        config.sources = Sources([self.path])
        return config


def is_record(path: str | Path | None) -> bool:
    """Return whether an `input_file` is a video's record, by its name."""
    return path is not None and Path(path).suffix.lower() == SUFFIX


def record_path(video: Path) -> Path:
    """Return the path of the record of a video."""
    return video.with_suffix(SUFFIX)


def kept_path(video: Path) -> Path:
    """Return the path where the latents of a video are kept until the video is complete."""
    return video.with_suffix(KEPT_SUFFIX)


def read_record(path: Path) -> VideoRecord:
    """Return the record of a video.

    Raises:
        UserError: the file cannot be read, or is not a record.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"input_file: {path} cannot be read: {error.strerror or error}") from error
    content = parse_record(raw.decode("utf-8-sig", errors="replace"), f"input_file: {path}")
    return VideoRecord(path, content)


def parse_record(text: str, where: str) -> dict[str, Any]:
    """Return the content of a record, with all of its `FIELDS`.

    Args:
        where: the name of the text in messages.

    Raises:
        UserError: the text is not a record.
    """
    no_record = f"{where} is not the record of a video; prompts are given as .txt, one a line, or as .jsonl"
    if len(text) > LARGEST:
        raise UserError(no_record)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{no_record} ({type(error).__name__})") from error
    if not isinstance(content, dict) or "format" not in content or depth(content) > DEEPEST:
        raise UserError(no_record)
    if content["format"] != FORMAT:
        raise UserError(
            f"{where} has format {shown(content['format'])}, but this program reads {FORMAT}; sample the video again"
        )
    content.setdefault("original_prompt", None)
    for key, (kinds, expected) in FIELDS.items():
        value = content.get(key, LEFT_OUT.get(key))
        if key not in content.keys() | LEFT_OUT.keys() or not isinstance(value, kinds) or isinstance(value, bool):
            raise UserError(f"{where}: {key}: got {shown(value)}; expected {expected}")
        if isinstance(value, str) and has_half_characters(value):
            raise UserError(f"{where}: {key} is {value!r:.60}, which has half a character; write the character itself")
    if content["precision"] not in PRECISION_NAMES:
        raise UserError(
            f"{where}: precision: got {shown(content['precision'])}; it can be {', '.join(PRECISION_NAMES)}"
        )
    if not 0 <= content["index"] < 2**63:
        raise UserError(f"{where}: index: got {content['index']}; expected a whole number from 0 to 2^63 - 1")
    for key in ("checkpoint", "image", "video_from"):
        if content.get(key) is not None and not isinstance(content[key].get("path"), str):
            raise UserError(f"{where}: {key}.path: got {shown(content[key].get('path'))}; expected text")
    for entry in content.get("keyframes", []):
        if not (isinstance(entry, dict) and isinstance(entry.get("path"), str) and type(entry.get("at")) is int):
            raise UserError(f"{where}: keyframes: got {shown(entry)}; expected objects with path and at")
    for text in content.get("extend", []):
        if not isinstance(text, str) or has_half_characters(text):
            raise UserError(f"{where}: extend: got {shown(text)}; expected texts")
    for adapter in content["adapters"]:
        fits = isinstance(adapter, dict) and isinstance(adapter.get("path"), str)
        if not fits or isinstance(adapter.get("scale"), bool) or not isinstance(adapter.get("scale"), int | float):
            raise UserError(f"{where}: adapters: got {shown(adapter)}; expected objects with path and scale")
    return content


def depth(node: Any) -> int:
    """Return how deeply mappings and lists are nested; it stops counting above `DEEPEST`."""
    level, nodes = 0, [node]
    while nodes := [child for each in nodes for child in _children(each)]:
        level += 1
        if level > DEEPEST:
            break
    return level


def _children(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        yield from node.values()
    elif isinstance(node, list):
        yield from node


def check_foreign_model(section: Mapping[str, Any], where: str | Path, key: str) -> None:
    """Check that a model section of a file names only code of this project, and no hub.

    Raises:
        UserError: the section names something else.
    """
    remedy = "give the model's configuration as --base"
    for name, target in iterate_targets(dict(section), key):
        if problem := why_target_fails(target, trusted=False):
            raise UserError(f"{where}: {name}: {shown(target)[1:-1]}: {problem}; {remedy}")
    for name, value in _named(section, key, ("network_wrapper", "cache_dir", "target")):
        if name.endswith(".target") and isinstance(value, str):
            continue  # checked above
        if value is not None:
            raise UserError(
                f"{where}: {name} is {shown(value)}, which a file that came from elsewhere may not set; {remedy}"
            )


def _named(node: Any, key: str, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for name, child in node.items():
            if name in names:
                yield f"{key}.{name}", child
            yield from _named(child, f"{key}.{name}", names)
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _named(child, f"{key}[{index}]", names)


def with_absolute_paths(node: Any) -> Any:
    """Return a configuration with absolute paths, so that it can be used from any folder."""
    if isinstance(node, Mapping):
        return {
            name: _absolute(child) if name in PATH_KEYS and isinstance(child, str) else with_absolute_paths(child)
            for name, child in node.items()
        }
    if isinstance(node, list | tuple):
        return [with_absolute_paths(child) for child in node]
    return str(node) if isinstance(node, Path) else node


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).exists() else path


def write_record(video: Path, content: Mapping[str, Any]) -> None:
    """Write the record of a video beside it.

    Raises:
        UserError: the record cannot be written.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # Half a surrogate pair is written as JSON's escape.
    write_atomically(record_path(video), text.encode("utf-8", "backslashreplace"))


def differences(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Return a line for each fact that differs between a record and the present machine.

    Facts are versions, device, threads and contents. A fact that one of the two does not have is left out.
    """
    lines = []
    theirs, ours = (dict(_facts(content)) for content in (recorded, present))
    for name, value in theirs.items():
        if value is not None and ours.get(name) is not None and ours[name] != value:
            lines.append(f"{name}: the video was made with {shown(value)}, this is {shown(ours[name])}")
    models = [json.loads(json.dumps(content["model"].get("config") or {})) for content in (recorded, present)]
    if difference := first_difference(*models):
        name, there, here = difference
        lines.append(f"model.{name}: the video was made with {shown(there)}, this is {shown(here)}")
    return lines


def _facts(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, version in content["versions"].items():
        yield f"version of {name}", version
    for name in ("device", "attention", "threads", "processors"):
        yield name, content.get(name)
    for name in ("checkpoint", "vae", "text_encoder", "image", "video_from"):
        yield f"content of the {name.replace('_', ' ')}", (content.get(name) or {}).get("hash")
    for number, adapter in enumerate(content["adapters"]):
        yield f"content of adapter {number + 1}", adapter.get("hash")
