"""Turn a line with a prompt into a request, and find the files that it names."""

import json
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from cogvideox_sat.clips.files import IMAGE_SUFFIXES
from cogvideox_sat.commands.input_paths import ROOT, find_input
from cogvideox_sat.configuration.request_fields import checked_fields
from cogvideox_sat.sampling.input_files import KeyFrameFile, key_frame_files
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from sgm.errors import UserError
from sgm.plain_json import parse_json

IMAGE_SEPARATOR = "@@"  # between prompt and image path on one line of text


def parse_text(line: str, index: int, folder: Path, where: str) -> PromptRequest:
    """Return the request of a line of text.

    The line is `prompt`, `prompt@@first` or `prompt@@first@@last`, with names of pictures.

    Args:
        index: number of the prompt; see `PromptRequest`.
        folder: folder in which pictures are searched, after the current working directory.
        where: beginning of the message of an error.

    Raises:
        UserError: the name of a picture is empty, or its file does not exist.
    """
    text, *names = split_text(line)
    for name in names:
        if not name:
            raise UserError(
                f"{where}: an image path is missing after '{IMAGE_SEPARATOR}'; write it, or remove the separator"
            )
    images = [found_image(name, folder, where) for name in names]
    last = tuple(KeyFrameFile(image, -1) for image in images[1:])
    return PromptRequest(index, text, image=images[0] if images else None, keyframes=last)


def split_text(line: str) -> list[str]:
    """Return the prompt, and the names of its first and its last picture if it has them.

    Text between two separators is part of the prompt, as in the original, unless it has the suffix of a picture.
    """
    text, *names = (part.strip() for part in line.rsplit(IMAGE_SEPARATOR, 2))
    if len(names) == 2 and PurePath(names[0]).suffix.lower() not in IMAGE_SUFFIXES:
        head, _, name = line.rpartition(IMAGE_SEPARATOR)
        return [head.strip(), name.strip()]
    return [text, *names] if names else [line]


def parse_json_line(line: str, index: int, folder: Path, where: str) -> PromptRequest:
    """Return the request of a line of a `.jsonl` file.

    Args:
        index, folder, where: see `parse_text`.

    Raises:
        UserError: the line is not a JSON object, or a field does not exist or has an invalid value.
    """
    try:
        record = parse_json(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f'{where}: expected a JSON object such as {{"prompt": "a cat"}}, got {_shorten(record)}')
    values = checked_fields(record, f"{where}: ")
    return PromptRequest(index, values.pop("prompt"), **found_files(values, folder, where))


def found_files(values: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Return fields in which the names of files are replaced by their paths.

    Args:
        values: checked fields of a request, by name.
        folder: see `found_image`.

    Raises:
        UserError: a file does not exist; the message begins with `where`.
    """
    found = dict(values)
    if "image" in values:
        found["image"] = found_image(values["image"], folder, where)
    if "video" in values:
        found["video"] = found_image(values["video"], folder, where, "video")
    if "keyframes" in values:
        found["keyframes"] = key_frame_files(values["keyframes"], lambda name: found_image(name, folder, where))
    return found


def found_image(name: str, folder: Path, where: str, kind: str = "image") -> Path:
    """Return the path of the picture or clip that a request names.

    It is searched in the current working directory, in `folder`, and in the program's root.

    Args:
        kind: `image` or `video`, for the message.

    Raises:
        UserError: no such file exists in these places; the message begins with `where`.
    """
    for candidate in (Path(name), folder / name):
        with suppress(OSError, ValueError):  # a name that is too long for the file system
            if candidate.is_file():
                return candidate
    found = find_input(name, where)
    if found is not None and found.is_file():
        return found
    raise UserError(
        f"{where}: {kind} {name} does not exist, neither in the current working directory nor in {folder} nor in {ROOT}"
    )


def check_image_use(request: PromptRequest, image_to_video: bool | None, where: str) -> None:
    """Check that a request names pictures exactly when the model takes pictures.

    A clip counts as a picture for an image-to-video model, since its first frame can be used.

    Args:
        image_to_video: True: pictures are required; False: pictures are refused; None: both are accepted.

    Raises:
        UserError: the request does not fit; the message begins with `where`.
    """
    if image_to_video is True and request.image is None and not request.keyframes and request.video is None:
        raise UserError(f"{where}: an image-to-video model needs an image: prompt{IMAGE_SEPARATOR}image_path")
    if image_to_video is False and (request.image is not None or request.keyframes):
        raise UserError(f"{where}: the prompt names an image, but this is a text-to-video model; remove the image")


def _shorten(value: object) -> str:
    """Return the beginning of a value as JSON, at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
