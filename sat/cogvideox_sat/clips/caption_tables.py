"""Read tables of clips and captions.

These are JSON Lines, JSON and CSV records, and two lists with one video or caption per line. Nothing here imports
PyTorch.
"""

import csv
import difflib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from sgm.errors import UserError
from sgm.plain_json import parse_json

TABLE_SUFFIXES = (".jsonl", ".csv", ".json", ".tsv")
# The first of each is our own name and takes precedence; all others in one record must agree.
VIDEO_COLUMNS = (
    *("video", "file_name", "filename", "video_path", "file_path", "filepath", "path"),
    *("video_file", "video_name", "clip", "clip_path", "media", "media_path"),
)
PICTURE_COLUMNS = ("image", "image_path", "image_file", "img", "img_path")
CAPTION_COLUMNS = ("caption", "prompt", "text", "captions", "prompts", "cap", "txt")
LOOKS_LIKE_CAPTION = re.compile(r"caption|prompt|text|descri|annotation|sentence|title|label|(^|_)(cap|desc|txt)(_|$)")
SURROGATE = re.compile(r"[\ud800-\udfff]")  # JSON may hold half of a surrogate pair, for example if a text was cut off
TXT_KEY = "caption"
DELIMITERS = ",;\t"

Entry = tuple[str, str | None]  # a path as written, and the caption


def decoded(content: bytes, name: str) -> str:
    """Return the text of a file.

    Raises:
        UserError: the file is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text; save it as UTF-8") from error


def entries_of_table(content: bytes, name: str, txt_key: str | None = TXT_KEY) -> list[Entry]:
    """Return the clips in a manifest, with their captions.

    Args:
        name: the name of the manifest, whose suffix determines the format.
        txt_key: the column of the captions; if a record lacks it, synonyms are tried. None: no captions.

    Raises:
        UserError: the manifest cannot be parsed; the message names the line.
    """
    text, suffix = decoded(content, f"the manifest {name}"), PurePath(name).suffix.lower()
    read = {".jsonl": _json_lines, ".json": _json_list}.get(suffix, _csv_lines)
    return [
        (
            video_of(record, f"{name}, {place}"),
            caption_of(record, f"{name}, {place}", txt_key) if txt_key is not None else None,
        )
        for place, record in read(text, name)
    ]


def names_clips(content: bytes, name: str) -> bool:
    """Return whether a table has a column of clips, and is therefore a manifest.

    Raises:
        UserError: the first line cannot be parsed.
    """
    text = decoded(content, name)
    if name.endswith(".jsonl"):
        _, record = next(_json_lines(text, name), ("", {"video": ""}))
        columns = list(record)
    else:
        first = text.strip("\r\n").partition("\n")[0]
        columns = [column.strip(' \r"') for column in first.split(max(DELIMITERS, key=first.count))]
    return any(_normal(column) in (*VIDEO_COLUMNS, *PICTURE_COLUMNS) for column in columns)


# ---------------------------------------------------------------- columns


def video_of(record: Mapping[str, Any], where: str) -> str:
    """Return the path of a record's clip.

    Raises:
        UserError: the record has no path, or two different ones.
    """
    columns = _normalized(record)
    for known in (VIDEO_COLUMNS[:1], VIDEO_COLUMNS[1:], PICTURE_COLUMNS):
        if value := _the_only(columns, known, where, "path"):
            return _checked(value, where)
    wrong = next((columns[name] for name in (*VIDEO_COLUMNS, *PICTURE_COLUMNS) if name in columns), None)
    raise UserError(f"{where}: 'video' must be the path of a clip (or 'file_name', 'path'), got {wrong!r}")


def _is_encodable(path: str) -> bool:
    """Return whether the system can look for a file of this name; half a character cannot be."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _checked(path: str, where: str) -> str:
    """Return the path, after checking that a file can have it."""
    if "\0" in path or not _is_encodable(path):
        raise UserError(f"{where}: no file can have the name {path!r}; write a valid path")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise UserError(f"{where}: {path} is a URL; download the clip, and write the path of its file")
    return path


def caption_of(record: Mapping[str, Any], where: str, txt_key: str = TXT_KEY) -> str | None:
    """Return the caption of a record; None if it is absent or empty.

    Raises:
        UserError: the caption is not text; two columns differ; or an unknown column looks like a caption.
    """
    if caption := _text(record.get(txt_key), txt_key, where):
        return caption
    columns = _normalized(record)
    for known in (CAPTION_COLUMNS[:1], CAPTION_COLUMNS[1:]):
        if caption := _the_only(columns, known, where, "caption"):
            return caption
    for name, value in record.items():
        if isinstance(value, str) and value.strip() and _looks_like_caption(_normal(name)):
            raise UserError(
                f"{where}: '{name}' looks like a caption, but captions are read from {', '.join(CAPTION_COLUMNS)}; "
                f"rename it, or set data.params.txt_key: {name}"
            )
    return None


def _normal(name: Any) -> str:
    return re.sub(r"[\s-]+", "_", str(name).strip().lower())


def _normalized(record: Mapping[str, Any]) -> dict[str, Any]:
    return {_normal(name): value for name, value in record.items()}


def _text(value: Any, column: str, where: str) -> str | None:
    if not isinstance(value, str | None):
        raise UserError(f"{where}: '{column}' must be text, got {value!r}")
    if value and not value.isascii() and (half := SURROGATE.search(value)):
        raise UserError(f"{where}: '{column}' has half of a character, {half[0]!r}; repair or remove it")
    return (value or "").strip() or None


def _the_only(columns: Mapping[str, Any], known: Sequence[str], where: str, what: str) -> str | None:
    """Return the value of the `known` columns, which must agree if several have one."""
    if what == "caption":
        found = {name: _text(columns[name], name, where) for name in known if name in columns}
    else:
        found = {name: columns[name] for name in known if isinstance(columns.get(name), str)}
    found = {name: value for name, value in found.items() if value}
    if len(set(found.values())) > 1:
        (one, _), (other, _), *_ = found.items()
        remedy = f"or set data.params.txt_key: {one}" if what == "caption" else "or rename the right one to 'video'"
        raise UserError(f"{where}: '{one}' and '{other}' differ, and both may be the {what}; leave one out, {remedy}")
    return next(iter(found.values()), None)


def _looks_like_caption(name: str) -> bool:
    if name in (*VIDEO_COLUMNS, *PICTURE_COLUMNS) or name.startswith("negative"):
        return False
    return bool(LOOKS_LIKE_CAPTION.search(name) or difflib.get_close_matches(name, CAPTION_COLUMNS[:3], 1, 0.75))


# ---------------------------------------------------------------- records


def _json_lines(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not str.splitlines, which also breaks at characters such as U+2028 that may stand inside a caption.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _object(parsed(line, f"{name}, line {number}"), f"{name}, line {number}")


def _json_list(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    content = parsed(text, name)
    if isinstance(content, dict) and content and all(isinstance(caption, str) for caption in content.values()):
        content = [{"video": video, "caption": caption} for video, caption in content.items()]
    if not isinstance(content, list):
        raise UserError(f'{name}: expected a list of objects such as {{"video": "a.mp4", "caption": "a cat"}}')
    for number, record in enumerate(content, start=1):
        yield f"entry {number}", _object(record, f"{name}, entry {number}")


def parsed(text: str, where: str) -> Any:
    """Return the content of a JSON text.

    Raises:
        UserError: it is not JSON; `where` begins the message.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f'{where}: expected an object such as {{"video": "a.mp4", "caption": "a cat"}}')
    return record


def _csv_lines(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    first = text.lstrip("\r\n").partition("\n")[0]
    delimiter = max(DELIMITERS, key=first.count)
    text = re.sub(r'" +(?=[,;\t\r\n]|$)', '"', text)  # allow spaces after a quote
    # strict: an unclosed quote would otherwise include the lines after it.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    header, line = None, 1
    try:
        for row in reader:
            place, line = f"line {line}", reader.line_num + 1
            if not any(value.strip() for value in row):
                continue
            if header is None:
                header = _header(row, name)
                continue
            while len(row) > len(header) and not row[-1].strip():
                row.pop()
            if len(row) > len(header):
                raise UserError(
                    f"{name}, {place}: {len(row)} values for {len(header)} columns; put the caption in double quotes"
                )
            yield place, dict(zip(header, row, strict=False))
    except csv.Error as error:
        raise UserError(f"{name}, line {line}: not valid CSV ({error})") from error


def _header(row: Sequence[str], name: str) -> list[str]:
    header = [column.strip() for column in row]
    while header and not header[-1]:
        header.pop()
    if not {_normal(column) for column in header} & {*VIDEO_COLUMNS, *PICTURE_COLUMNS}:
        raise UserError(f"{name}: the first line must name the columns, 'video' and 'caption' among them")
    if twice := [column for column in header if header.count(column) > 1]:
        raise UserError(f"{name}: two columns are called '{twice[0]}'; rename one of them")
    return header


# ---------------------------------------------------------------- lists


def entries_of_lists(videos: bytes, captions: bytes | None, videos_name: str, captions_name: str) -> list[Entry]:
    """Return the clips in a list, one per line, with the captions on another list's lines.

    Args:
        captions: None: the clips have no captions here.

    Raises:
        UserError: a list is not UTF-8, or the lists have different numbers of lines.
    """
    paths = [
        _checked(path, f"{videos_name}, line {number}") for number, path in enumerate(_lines(videos, videos_name), 1)
    ]
    if captions is None:
        return [(path, None) for path in paths if path]
    texts = _lines(captions, captions_name)
    while len(texts) > len(paths) and not texts[-1]:
        texts.pop()
    while len(paths) > len(texts) and not paths[-1]:
        paths.pop()
    if len(paths) != len(texts):
        raise UserError(
            f"{captions_name} has {len(texts)} lines and {videos_name} {len(paths)}, but line i of one belongs to line "
            "i of the other; write equal numbers (a caption of several lines must become one line)"
        )
    for number, (path, text) in enumerate(zip(paths, texts, strict=True), start=1):
        if text and not path:
            raise UserError(
                f"{videos_name}, line {number} is empty, but {captions_name} has a caption there; name its clip"
            )
    return [(path, text or None) for path, text in zip(paths, texts, strict=True) if path]


def _lines(content: bytes, name: str) -> list[str]:
    lines = [line.strip() for line in decoded(content, name).split("\n")]
    return lines if lines[-1] else lines[:-1]
