"""Find the clips of a dataset and their captions in folders, manifests and tar shards.

* A folder: every video and image below it, with captions as `clips.captions` finds them.
* A manifest: `.jsonl` or `.json` with objects, `.csv` or `.tsv` with a header. `video` is a path relative to the
  manifest's folder, `caption` may be missing. Both have synonyms, see `clips.caption_tables`.
* Tar shards in the layout of webdataset, with members `name.mp4` and `name.txt` (or `name.json` with the caption under
  a key), or in any layout of folders: a tar file, a folder of them, a pattern with `*`, or `{000..010}`. A clip is read
  directly from the tar file when it is needed.

Images that are not animated count as videos of one frame. Nothing here imports PyTorch.
"""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path, PurePosixPath

from cogvideox_sat.clips.caption_tables import TABLE_SUFFIXES, caption_of, decoded, entries_of_table
from cogvideox_sat.clips.captions import CLIP_FOLDERS, METADATA, READERS, VIDEO_LISTS, Found, LabelRules, clips_of
from cogvideox_sat.clips.files import CLIP_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES, ClipSource, other_forms
from cogvideox_sat.clips.trees import Folder, TarFile
from cogvideox_sat.commands.input_paths import missing, places
from cogvideox_sat.files.refusals import refusal, why_unreadable
from sgm.errors import UserError
from sgm.plain_json import parse_json

__all__ = ["IMAGE_SUFFIXES", "READERS", "VIDEO_SUFFIXES", "ClipSource", "Found", "LabelRules", "search"]


PACKED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|zip|7z|rar)$", re.IGNORECASE)


def search(location: str, rules: LabelRules | None = None) -> Found:
    """Return the clips of a folder, a manifest or tar shards, and observations on files.

    The order of the clips is the same on every machine.

    Args:
        rules: rules for reading captions; None: the default ones.

    Raises:
        UserError: the place has no clips, or a file cannot be parsed.
    """
    rules = rules or LabelRules()
    if not location:
        raise UserError("a path is empty; write . for the current working directory")
    is_pattern = any(char in location for char in "{*?[")  # as a whole it may be too long for a name
    if not is_pattern and (reason := why_unreadable(location)):
        raise UserError(f"{location} cannot be read: {reason}")
    exists = os.path.exists(location)  # noqa: PTH110, `Path.exists` may raise
    if re.match(r"[a-z][a-z0-9+.-]*:", location) and not exists:
        raise UserError(
            f"{location}: clips are read from files; download them, or mount their file system, and give that path"
        )
    if re.search(r"\.(tar\.\w+|tgz|tbz2?|txz)$", location):
        raise UserError(
            f"{location}: compressed tar files cannot be read in any order; unpack the file to a plain .tar"
        )
    path = Path(location)
    if exists and path.is_dir():
        shards = sorted(str(file) for file in path.glob("[!.]*.tar"))
        return _with_files_beside(_tar_clips(shards, rules), path) if shards else _folder_clips(path, rules)
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        return _manifest_clips(path, rules)
    if suffix == ".tar":
        return _tar_clips(_expand(location), rules)
    what = "is not a folder or a .jsonl, .csv or .tar file" if exists else missing(path)
    if exists and suffix in (".txt", *CLIP_SUFFIXES):
        what += f"; give its folder, {path.parent}"
    raise UserError(f"{location} {what}")


def _with_files_beside(found: Found, root: Path) -> Found:
    """Add the clips beside a folder's shards, which are not read, to the result."""
    tree = Folder(root)
    found.beside = [tree.shown(name) for name in tree.names if PurePosixPath(name).suffix.lower() in CLIP_SUFFIXES]
    return found


def _folder_clips(root: Path, rules: LabelRules) -> Found:
    tree = Folder(root)
    found = clips_of(tree, rules)
    if root.name in CLIP_FOLDERS:
        above = [file for file in (*METADATA, *VIDEO_LISTS) if (root.parent / file).is_file()]
        found.hints += [
            f"{root.parent / file} is in the folder above (give that folder as train_data)" for file in above
        ]
    if not found.clips and (shards := [str(root / name) for name in tree.names if name.endswith(".tar")]):
        return _tar_clips(shards, rules)
    if not found.clips:
        if packed := [name for name in tree.names if PACKED.search(name)]:
            raise UserError(f"{root}: no videos found; unpack {tree.shown(packed[0])} first")
        kinds = ", ".join(sorted(CLIP_SUFFIXES))
        raise UserError(
            f"{root}: no videos found; expected files such as videos/name.mp4 and labels/name.txt ({kinds})"
        )
    return found


def _manifest_clips(path: Path, rules: LabelRules) -> Found:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the manifest {path}: {refusal(error)}") from error
    entries = entries_of_table(content, str(path), rules.txt_key if rules.used else None)
    with ThreadPoolExecutor(READERS) as threads:
        files = threads.map(lambda entry: _file_of(path.parent, entry[0]), entries)
        clips = [ClipSource(file, caption) for file, (_, caption) in zip(files, entries, strict=True)]
    if not clips:
        raise UserError(f"{path}: no videos found; write one per line, with 'video' and 'caption'")
    return Found(clips, looked_for="a column 'caption' (or 'prompt', 'text')")


def _file_of(folder: Path, written: str) -> str:
    """Return the file that an entry names: as written, in another spelling, or in `videos`."""
    first = os.path.normpath(folder / written)
    if os.path.exists(first):  # noqa: PTH110
        return first
    spellings = (written, written.replace("\\", "/"), *other_forms(written))
    others = (os.path.normpath(folder / place / name) for name in spellings for place in ("", *CLIP_FOLDERS))
    return next((other for other in others if os.path.isfile(other)), first)  # noqa: PTH113


def _expand(pattern: str) -> list[str]:
    """Return the files that match a pattern with braces and wildcards."""
    from braceexpand import braceexpand

    shards = []
    for part in braceexpand(pattern):
        if os.path.exists(part):  # noqa: PTH110, `Path.exists` may raise
            shards.append(part)
        elif any(char in part for char in "*?["):
            shards += sorted(glob(part))  # noqa: PTH207
        else:
            raise UserError(f"{part} {missing(part)}")
    if not shards:
        raise UserError(f"no file matches {pattern}{places(pattern)}")
    return shards


def _tar_clips(shards: Sequence[str], rules: LabelRules) -> Found:
    found = Found()
    found.looked_for = f"members NAME.txt and NAME.json beside NAME.mp4, SHARD.meta.jsonl, and {found.looked_for}"
    with ThreadPoolExecutor(READERS) as threads:
        for each in threads.map(
            lambda shard: clips_of(TarFile(shard), rules, dict(_meta_captions(shard, rules))), shards
        ):
            found.add(each)
    if not found.clips:
        raise UserError(f"{', '.join(shards[:3])}: no videos found; expected members such as name.mp4 and name.txt")
    return found


def _meta_captions(shard: str, rules: LabelRules) -> Iterator[tuple[str, str]]:
    """Yield keys and captions in `SHARD.meta.jsonl`, SwissArmyTransformer's own layout."""
    path = Path(shard).with_name(Path(shard).name.partition(".")[0] + ".meta.jsonl")
    if not (rules.used and path.is_file()):
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {refusal(error)}") from error
    for number, line in enumerate(decoded(content, str(path)).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            key = record["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: expected an object with 'key' and a caption") from error
        if caption := caption_of(record, f"{path}, line {number}", rules.txt_key):
            yield str(key), caption
