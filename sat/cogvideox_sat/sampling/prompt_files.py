"""Read the prompts of a file, and write files with other prompts."""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from cogvideox_sat.commands.input_paths import places
from cogvideox_sat.sampling.prompt_lines import (
    IMAGE_SEPARATOR,
    check_image_use,
    parse_json_line,
    parse_text,
    split_text,
)
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from sgm.errors import UserError
from sgm.plain_json import parse_json

logger = logging.getLogger(__name__)


def read_prompts(path: str | Path, image_to_video: bool | None = None) -> list[PromptRequest]:
    """Return the prompts of a file, in its order, numbered from 0.

    A `.jsonl` file has one JSON object per line, with the key `prompt` and, optionally, the other fields of
    `PromptRequest`. A file of any other suffix has one prompt per line; `prompt@@image` gives a first frame,
    `prompt@@first@@last` also a last frame. Both kinds of file are UTF-8.

    Empty lines and empty prompts are skipped. In a text file they still count, as in the original; in `.jsonl` they do
    not. The path of a picture or clip is resolved against the current working directory and,
    if no such file exists, against the folder of the prompt file.

    Args:
        image_to_video: True requires an image for every prompt, False refuses images, None accepts both.

    Raises:
        UserError: the file cannot be read or holds no prompt, or a line is malformed.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        raise UserError(
            f"prompt file {path}: use .txt with one prompt per line or .jsonl with one JSON object per line"
        )
    parse = parse_json_line if path.suffix.lower() == ".jsonl" else parse_text
    is_text = parse is parse_text
    requests: list[PromptRequest] = []
    for number, line in enumerate(_read_lines(path), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            logger.warning("%s: skipped, it is empty", where)
            continue
        request = parse(line.strip(), number - 1 if is_text else len(requests), path.parent, where)
        if not request.text.strip():
            logger.warning("%s: skipped, its prompt is empty", where)
            continue
        check_image_use(request, image_to_video, where)
        requests.append(request)
    if not requests:
        raise UserError(f"prompt file {path}: it holds no prompt; write one prompt per line")
    return requests


def replace_prompts(path: Path, texts: Sequence[str | None], folder: Path) -> str:
    """Return the content of a prompt file with other texts and everything else unchanged.

    Args:
        texts: one text for each request that `read_prompts` returns; None keeps the prompt.
        folder: folder of the file to which the content will be written.
    """
    is_json = path.suffix.lower() == ".jsonl"
    pieces, remaining = re.split(r"(\r\n|\r|\n)", _read_text(path)), iter(texts)
    for i, line in enumerate(pieces):
        if not line.strip():
            continue
        request = (parse_json_line if is_json else parse_text)(line.strip(), 0, path.parent, str(path))
        if not request.text.strip():
            continue
        text = next(remaining)
        moved = folder.resolve() != path.parent.resolve()
        replaced = _replaced_json(line, text, request, moved) if is_json else _replaced_text(line, text, request, moved)
        pieces[i] = line if replaced is None else replaced
    return "".join(pieces)


def _replaced_text(line: str, text: str | None, request: PromptRequest, moved: bool) -> str | None:
    """Return a line with another prompt, or None if the line stays as it is.

    Relative paths become absolute if they would not be found from the new folder.
    """
    _, *names = split_text(line)
    files = [file for file in (request.image, *(key_frame.path for key_frame in request.keyframes)) if file is not None]
    placed = [_placed(name, file, moved) for name, file in zip(names, files, strict=True)]
    if text is None and placed == names:
        return None
    return IMAGE_SEPARATOR.join((text or request.text, *placed))


def _replaced_json(line: str, text: str | None, request: PromptRequest, moved: bool) -> str | None:
    """Return a JSON object with another prompt, or None; see `_replaced_text`."""
    record = parse_json(line)
    placed = dict(record)
    for name, file in (("image", request.image), ("video", request.video)):
        if file is not None:
            placed[name] = _placed(record[name], file, moved)
    if request.keyframes:
        placed["keyframes"] = [
            {**entry, "image": _placed(entry["image"], key_frame.path, moved)}
            for entry, key_frame in zip(record["keyframes"], request.keyframes, strict=True)
        ]
    if text is None and placed == record:
        return None
    return json.dumps({**placed, "prompt": text or request.text}, ensure_ascii=line.isascii())


def _placed(name: str, file: Path, moved: bool) -> str:
    """Return the name under which a new prompt file finds a picture or clip.

    A file that was found beside the old prompt file needs its absolute path if the folder changes.
    """
    return str(file.resolve()) if moved and file != Path(name) else name


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a file without their ends; see `_read_text`."""
    # Not str.splitlines, which also breaks at characters such as U+2028 that a prompt may contain.
    lines = re.split(r"\r\n|\r|\n", _read_text(path))
    return lines[:-1] if lines[-1] == "" else lines


def _read_text(path: Path) -> str:
    """Return the content of a UTF-8 file, without a byte order mark.

    Raises:
        UserError: the file cannot be read or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        where = places(path) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"cannot read the prompt file {path}: {error.strerror or error}{where}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"prompt file {path} is not UTF-8 text (line {line}); save it as UTF-8") from error
    if "\0" in text:  # UTF-16 without a byte order mark decodes to this
        raise UserError(f"prompt file {path} is not UTF-8 text, it holds NUL characters; save it as UTF-8")
    return text
