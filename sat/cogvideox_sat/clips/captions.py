"""Find the clips in a tree of files, and their captions.

The caption of a clip is the first of these that exists:
  * `labels/a/b.txt` for `videos/a/b.mp4` (also `captions`, `prompts`, `texts`), or `b.txt` beside the clip (also
    `b.mp4.txt`); `.caption` and `.json` (with the caption under a key) likewise;
  * `metadata.jsonl` (`.csv`, `.tsv`) in a folder above: records with `file_name` and `caption`;
  * `videos.txt` in a folder above, one path per line, and beside it `prompts.txt`, `prompt.txt` or `captions.txt`.

Lists and `metadata` files are read if some clip has no caption of its own. In a folder with a list, clips that have no
caption and are not listed are left out. Nothing here imports PyTorch.
"""

import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from cogvideox_sat.clips.caption_tables import (
    TXT_KEY,
    Entry,
    caption_of,
    decoded,
    entries_of_lists,
    entries_of_table,
    names_clips,
    parsed,
)
from cogvideox_sat.clips.files import CLIP_SUFFIXES, ClipSource, other_forms, unread_kind
from cogvideox_sat.clips.trees import Tree
from sgm.errors import UserError

READERS = 16  # threads; reading small files from a network file system is mostly waiting
LABEL_SUFFIXES = (".txt", ".TXT", ".caption", ".json")
CLIP_FOLDERS = ("videos", "video", "clips", "images", "image")
LABEL_FOLDERS = ("labels", "captions", "prompts", "texts", "txt", "label", "caption", "prompt", "text")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
VIDEO_LISTS = ("videos.txt", "video.txt", "images.txt")  # the first that exists
CAPTION_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt", "texts.txt", "text.txt")
TABLES = (".jsonl", ".csv", ".tsv", ".json", ".parquet")
LABEL_LINES = ("first", "all")
LOOKED_FOR = (
    "labels/NAME.txt for videos/NAME.mp4, NAME.txt (.caption, .json) beside it, metadata.jsonl or .csv with file_name "
    "and caption (prompt, text), and videos.txt with prompts.txt, prompt.txt or captions.txt"
)


@dataclass(frozen=True)
class LabelRules:
    """Rules for reading captions.

    Attributes:
        txt_key: the key of the caption in records; if a record lacks it, synonyms are tried.
        lines: the caption in a label file of several lines: the "first" line, or "all" lines joined by a space.
        used: False: captions are not needed, and files with captions are not read.
    """

    txt_key: str = TXT_KEY
    lines: str = "first"
    used: bool = True


@dataclass
class Found:
    """Clips of a place, and observations about its files.

    Attributes:
        clips: in an order that is the same on every machine.
        looked_for: places where captions would have been found.
        hints: files that look like captions and were not used, each with the reason.
        long_labels: number of label files with several lines.
        unlisted: clips that a list or `metadata` file leaves out, and that have no caption of their own.
        unread: number of files that look like media and are not read, by suffix.
        beside: clips in a folder of tar files, where only tar files are read.
    """

    clips: list[ClipSource] = field(default_factory=list)
    looked_for: str = LOOKED_FOR
    hints: list[str] = field(default_factory=list)
    long_labels: int = 0
    unlisted: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    beside: list[str] = field(default_factory=list)

    def add(self, other: "Found") -> None:
        """Add the results of another place."""
        self.clips += other.clips
        self.hints += other.hints
        self.long_labels += other.long_labels
        self.unlisted += other.unlisted
        self.unread.update(other.unread)


def clips_of(tree: Tree, rules: LabelRules, extra: Mapping[str, str] | None = None) -> Found:
    """Return the clips of a tree with their captions.

    Args:
        extra: captions for clips that have none of their own, by a clip's name up to the first dot.

    Raises:
        UserError: a file with captions cannot be parsed.
    """
    found = Found(unread=Counter(kind for name in tree.names if (kind := unread_kind(name))))
    names = [name for name in tree.names if PurePosixPath(name).suffix.lower() in CLIP_SUFFIXES]
    with ThreadPoolExecutor(READERS) as threads:
        sources = list(threads.map(lambda name: tree.source(name, None), names))
        if not rules.used:
            return replace(found, clips=list(tree.without_doubles(sources)))
        labels = _labels_of(tree, names, sources)
        read = list(threads.map(lambda label: _caption_in(tree, label, rules) if label else (None, False), labels))
    found.long_labels = sum(several for _, several in read)
    own = [caption or (extra or {}).get(_key(name)) for name, (caption, _) in zip(names, read, strict=True)]
    if not all(own):
        listed = _Listed(tree, {label for label in labels if label}, rules, found)
        for name, source, caption in zip(names, sources, own, strict=True):
            captions = [caption] if caption else listed.captions.get(name, [None])
            if captions == [None] and name not in listed.captions and listed.covers(name):
                found.unlisted.append(tree.shown(name))
                continue
            found.clips += [replace(source, caption=caption) for caption in captions]
        found.clips += listed.others
    else:
        found.clips = [replace(source, caption=caption) for source, caption in zip(sources, own, strict=True)]
    found.clips = list(tree.without_doubles(found.clips))
    return found


def _key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return posixpath.join(folder, file.partition(".")[0])


# ---------------------------------------------------------------------------------------------------------------------
# A label for each clip
# ---------------------------------------------------------------------------------------------------------------------


def _labels_of(tree: Tree, names: Sequence[str], sources: Sequence[ClipSource]) -> list[str | None]:
    """Return for each clip the file with its caption.

    A file that may belong to a video is not used for an image of the same name.
    """
    labels: list[str | None] = [None] * len(names)
    of_videos: set[str] = set()
    folders: dict[str, list[str]] = {}
    for pictures in (False, True):
        for i, (name, source) in enumerate(zip(names, sources, strict=True)):
            if source.is_image != pictures:
                continue
            folder, _, file = name.rpartition("/")
            if folder not in folders:
                folders[folder] = [place for place in _label_folders(tree, folder) if tree.has_folder(place)]
            candidates = [label for label in _label_names(tree, folders[folder], file) if tree.has(label)]
            if pictures:
                candidates = [label for label in candidates if label not in of_videos]
            of_videos.update(candidates if not pictures else ())
            labels[i] = candidates[0] if candidates else None
    return labels


def _label_folders(tree: Tree, folder: str) -> Iterator[str]:
    """Yield the folders that may hold labels of the clips in `folder`.

    These are replacements of the innermost `videos` in its path, and `folder` itself.
    """
    parts = tree.parts_of(folder)
    innermost = max((i for i, part in enumerate(parts) if part.lower() in CLIP_FOLDERS), default=None)
    if innermost is not None:
        for name in LABEL_FOLDERS:
            for spelled in (name, name.capitalize(), name.upper()):
                yield tree.relative((*parts[:innermost], spelled, *parts[innermost + 1 :]))
    yield folder


def _label_names(tree: Tree, folders: Sequence[str], file: str) -> Iterator[str]:
    stem = file.rpartition(".")[0]
    for base in (stem, file, *tree.other_stems(stem), *other_forms(stem)):
        for suffix in LABEL_SUFFIXES:
            for folder in folders:
                yield f"{folder}/{base}{suffix}" if folder else base + suffix


def _caption_in(tree: Tree, label: str, rules: LabelRules) -> tuple[str | None, bool]:
    """Return the caption of a label file, None if it has none; and whether it has more lines."""
    content, name = tree.read(label), tree.shown(label)
    if label.endswith(".json"):
        record = parsed(decoded(content, name), name)
        return (caption_of(record, name, rules.txt_key) if isinstance(record, dict) else None), False
    lines = [line for line in map(str.strip, decoded(content, f"the label {name}").split("\n")) if line]
    caption = " ".join(lines if rules.lines == "all" else lines[:1])
    return caption or None, len(lines) > 1


# ---------------------------------------------------------------------------------------------------------------------
# Files that list clips
# ---------------------------------------------------------------------------------------------------------------------


class _Listed:
    """Captions in lists and metadata files.

    Args:
        labels: files that are labels of clips, and therefore not lists.

    Attributes:
        captions: captions of the tree's files that are listed; a file may be listed with several.
        others: clips that are listed but not in the tree.
    """

    def __init__(self, tree: Tree, labels: set[str], rules: LabelRules, found: Found):
        self.tree, self.labels, self.rules, self.found = tree, labels, rules, found
        self.captions: dict[str, list[str | None]] = {}
        self.others: list[ClipSource] = []
        self.folders: list[str] = []
        for folder, files in self._files_by_folder().items():
            for entries in self._tables(f"{folder}/" if folder else "", files):
                self.folders.append(folder)
                for path, caption in entries:
                    self._add(folder, path, caption)

    def covers(self, name: str) -> bool:
        """Return whether a folder above the file has a list."""
        return any(not folder or name.startswith(f"{folder}/") for folder in self.folders)

    def _add(self, folder: str, path: str, caption: str | None) -> None:
        name = self._name_of(folder, path)
        if name is not None:
            captions = self.captions.setdefault(name, [])
            if caption not in captions:
                captions.append(caption)
        elif other := self.tree.elsewhere(posixpath.join(folder, path), caption):
            self.others.append(other)
        else:
            raise UserError(
                f"{self.tree.shown(folder or '.')}: a list names {path}, which the tar file does not hold; remove that "
                "line"
            )

    def _name_of(self, folder: str, path: str) -> str | None:
        for written in (path, path.replace("\\", "/"), *other_forms(path)):
            for place in (folder, *(posixpath.join(folder, name) for name in CLIP_FOLDERS)):
                name = self.tree.within(posixpath.normpath(posixpath.join(place, written)))
                if not name.startswith("..") and self.tree.has(name):
                    return name
        return None

    def _files_by_folder(self) -> dict[str, list[str]]:
        folders: dict[str, list[str]] = {}
        for name in self.tree.names:
            folder, _, file = name.rpartition("/")
            if name not in self.labels and (file in (*VIDEO_LISTS, *CAPTION_LISTS) or file.endswith(TABLES)):
                folders.setdefault(folder, []).append(file)
        return folders

    def _tables(self, place: str, files: Sequence[str]) -> Iterator[list[Entry]]:
        """Yield the entries of each list in one folder; other possible lists become hints."""
        tree, hints = self.tree, self.found.hints
        for file in files:
            name = tree.shown(place + file)
            if file in METADATA:
                content = tree.read(place + file)
                if names_clips(content, name):
                    yield entries_of_table(content, name, self.rules.txt_key)
                else:
                    hints.append(f"{name} has no column file_name")
            elif file.endswith(".parquet"):
                hints.append(f"{name} is not read (save it as metadata.jsonl)")
            elif file.endswith(TABLES):
                hints.append(f"{name} may be a manifest (give it as train_data, or name it metadata)")
        videos = next((file for file in VIDEO_LISTS if file in files), None)
        captions = [file for file in CAPTION_LISTS if file in files]
        if videos is None:
            hints += [f"{tree.shown(place + file)} needs a videos.txt beside it, line for line" for file in captions]
            return
        if len({tree.read(place + file) for file in captions}) > 1:
            raise UserError(
                f"{tree.shown(place + captions[0])} and {captions[1]} differ, and both may be the captions of "
                f"{videos}; keep one of them"
            )
        texts = place + captions[0] if captions else ""
        lines = tree.read(texts) if captions else None
        yield entries_of_lists(tree.read(place + videos), lines, tree.shown(place + videos), tree.shown(texts))
