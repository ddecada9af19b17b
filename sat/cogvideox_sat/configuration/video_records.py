"""The record beside each video, `000000.json`: what made it, and the same again as arguments that repeat it.

A record is read as a file that came from somewhere else: its targets may lead only to classes of our own. Nothing here
imports PyTorch.
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
from cogvideox_sat.files.atomic import replaced_when_complete, reported_as_user_error
from sgm.config_places import Sources
from sgm.errors import UserError, shown
from sgm.plain_json import has_half_characters

logger = logging.getLogger(__name__)

FORMAT = 1
PRECISION_NAMES = ("fp16", "bf16", "float32")
SUFFIX = ".json"
LARGEST = 4 * 2**20  # bytes of a record that is read
DEEPEST = 60  # levels of mappings and lists in it
KEPT_SUFFIX = ".latents.safetensors"  # of latents that are kept until their video is complete

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
UNMERGED = "lora"  # among the arguments of a record: its adapters are those of `lora`, not that of `lora_load`
# What a record has only where a request shows it, and what it is elsewhere.
LEFT_OUT: dict[str, Any] = {"keyframes": [], "video_from": None, "strength": None, "extend": []}
# What else changes a video's numbers, by the name of the argument.
REPEATED_ARGUMENTS = (
    *("image2video", "latent_channels", "vae_tile_size", "model_parallel_size", "force_inference"),
    "vae_frames_at_once",  # in half precision
    *("attention", "guidance_batch"),
)  # and `KNOBS`, where a video has some


@dataclass(frozen=True)
class VideoRecord:
    """A record that was read from a file, with all of its `FIELDS`."""

    path: Path
    content: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.content[key] if key in self.content else LEFT_OUT[key]

    def arguments(self) -> dict[str, Any]:
        """Return the sampling arguments that make the video again, by their names in a configuration."""
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
        """Return the fields of a request for the video, see `configuration.request_fields`: those of a call from
        Python, or of a line of a `.jsonl` file, to a model that is loaded already."""
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
        """Return the model section of the configuration that made the video, as load_configs returns one.

        Raises:
            UserError: the section names what only a configuration of the user's own may name.
        """
        section = self.content["model"].get("config")
        if not isinstance(section, dict):
            raise UserError(f"{self.path}: model.config is missing; give the model's configuration as --base")
        check_foreign_model(section, self.path, "model.config")
        config = MergedConfig({"model": copy.deepcopy(section)})
        config.sources = Sources([self.path])
        return config


def is_record(path: str | Path | None) -> bool:
    """Return whether an `input_file` is a video's record by its name."""
    return path is not None and Path(path).suffix.lower() == SUFFIX


def record_path(video: Path) -> Path:
    """Return where the record of a video lies."""
    return video.with_suffix(SUFFIX)


def kept_path(video: Path) -> Path:
    """Return where the latents of a video are kept until it is complete."""
    return video.with_suffix(KEPT_SUFFIX)


def read_record(path: Path) -> VideoRecord:
    """Return the record of a video.

    Raises:
        UserError: the file cannot be read, or is no record.
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

    Raises:
        UserError: the text, which `where` names, is no record.
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
            f"{where} is of format {shown(content['format'])}, this program reads {FORMAT}; sample it again"
        )
    content.setdefault("original_prompt", None)
    for key, (kinds, expected) in FIELDS.items():
        value = content.get(key, LEFT_OUT.get(key))
        if key not in content.keys() | LEFT_OUT.keys() or not isinstance(value, kinds) or isinstance(value, bool):
            raise UserError(f"{where}: {key} is {shown(value)}; expected {expected}")
        if isinstance(value, str) and has_half_characters(value):
            raise UserError(f"{where}: {key} is {value!r:.60}, which has half a character; write the character itself")
    if content["precision"] not in PRECISION_NAMES:
        raise UserError(f"{where}: precision is {shown(content['precision'])}; it can be {', '.join(PRECISION_NAMES)}")
    if not 0 <= content["index"] < 2**63:
        raise UserError(f"{where}: index is {content['index']}; it can be from 0 to 2^63 - 1")
    for key in ("checkpoint", "image", "video_from"):
        if content.get(key) is not None and not isinstance(content[key].get("path"), str):
            raise UserError(f"{where}: {key}.path is {shown(content[key].get('path'))}; expected text")
    for entry in content.get("keyframes", []):
        if not (isinstance(entry, dict) and isinstance(entry.get("path"), str) and type(entry.get("at")) is int):
            raise UserError(f"{where}: keyframes holds {shown(entry)}; expected objects with path and at")
    for text in content.get("extend", []):
        if not isinstance(text, str) or has_half_characters(text):
            raise UserError(f"{where}: extend holds {shown(text)}; expected texts")
    for adapter in content["adapters"]:
        fits = isinstance(adapter, dict) and isinstance(adapter.get("path"), str)
        if not fits or isinstance(adapter.get("scale"), bool) or not isinstance(adapter.get("scale"), int | float):
            raise UserError(f"{where}: adapters holds {shown(adapter)}; expected objects with path and scale")
    return content


def depth(node: Any) -> int:
    """Return how deeply mappings and lists are nested."""
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
    """Check that a model section from a file names only our own code and no model on a hub, else raise UserError."""
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
    """Return a configuration whose files and folders are named in full, so that it can be used from anywhere."""
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
    path = record_path(video)
    with replaced_when_complete(path) as part, reported_as_user_error(path):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        part.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")  # half of a pair, as JSON escapes it


def differences(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Return a line for each fact of a record that is another one now: versions, device, threads and contents.

    What either of them does not know is left out.
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
