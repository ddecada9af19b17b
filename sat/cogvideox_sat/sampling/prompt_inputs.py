"""The prompts to sample, read from a file or typed in, each with its own seed."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from cogvideox_sat.clips.files import IMAGE_SUFFIXES
from cogvideox_sat.commands.input_paths import ROOT, find_input, places, tell_places
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.request_fields import checked_fields
from cogvideox_sat.configuration.sampler_knobs import SamplerKnobs
from cogvideox_sat.sampling.shown_files import KeyFrameFile, key_frame_files
from sgm.errors import UserError
from sgm.plain_json import parse_json
from sgm.seeds import derive_seed

logger = logging.getLogger(__name__)

IMAGE_SEPARATOR = "@@"  # between prompt and image path on one line of text
QUIT = "q"


@dataclass(frozen=True)
class PromptRequest:
    """One video to sample; a field that is None takes the value of the run's arguments.

    Args:
        index: line number in a text file, or number of the prompt in a .jsonl file or on the terminal, counted from 0.
            The output folder is named after it, and the seed is derived from it.
        image: the first frame, for image-to-video models.
        seed: overrides the seed that `request_seed` derives from the run's seed.
        num_frames: length in latent frames, as in `sampling_num_frames`.
        size: (height, width) of the video in pixels, as in `sampling_image_size`.
        frames: length in frames, in place of `num_frames`.
        fps: frames per second of the file.
        steps: sampling steps.
        sampler, guidance_scale, guidance_interval, guidance_schedule: see `SamplerKnobs`.
        keyframes: pictures for other frames, for image-to-video models.
        video: the clip that sampling starts from. With `extend` and without `strength`: the clip that is continued.
        strength: share of the steps that is sampled from the noised clip.
        extend: number of further windows, or their prompts.
    """

    index: int
    text: str
    negative_prompt: str = ""
    image: Path | None = None
    seed: int | None = None
    num_frames: int | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    sampler: str | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_schedule: str | None = None
    keyframes: tuple[KeyFrameFile, ...] = ()
    video: Path | None = None
    strength: float | None = None
    extend: int | tuple[str, ...] | None = None

    @property
    def windows(self) -> tuple[str, ...]:
        """Return the prompts of the further windows."""
        return (self.text,) * self.extend if isinstance(self.extend, int) else self.extend or ()

    @property
    def goes_on(self) -> bool:
        """Return whether the clip is kept unchanged and continued."""
        return bool(self.extend) and self.video is not None and self.strength is None

    def latent_frames(self, limits: ModelLimits) -> int | None:
        """Return the length in latent frames, or None for the length of the whole run.

        Raises:
            UserError: the model cannot make a video of `frames` frames.
        """
        return self.num_frames if self.frames is None else limits.latent_frames(self.frames)

    @property
    def knobs(self) -> SamplerKnobs:
        """Return the request's changes to the sampler."""
        return SamplerKnobs.of(self)


# ---------------------------------------------------------------------------------------------------------------------
# From a file
# ---------------------------------------------------------------------------------------------------------------------


def read_prompts(path: str | Path, image_to_video: bool | None = None) -> list[PromptRequest]:
    """Return the prompts of a file, in its order, numbered from 0.

    Empty lines and empty prompts are skipped. In a text file they still count, as in the original; in `.jsonl` they do
    not.
    `.jsonl`: one JSON object per line, with the key `prompt` and, optionally, the other fields of `PromptRequest`. Any
    other suffix: one prompt per line; `prompt@@image` gives a first frame, `prompt@@first@@last` also a last frame.
    Both kinds of file are UTF-8. The path of a picture or clip is resolved against the current working directory and,
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
    parse = _parse_json if path.suffix.lower() == ".jsonl" else _parse_text
    is_text = parse is _parse_text
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
        request = (_parse_json if is_json else _parse_text)(line.strip(), 0, path.parent, str(path))
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
    _, *names = _split_text(line)
    files = [file for file in (request.image, *(key_frame.path for key_frame in request.keyframes)) if file is not None]
    placed = [_placed(name, file, moved) for name, file in zip(names, files, strict=True)]
    if text is None and placed == names:
        return None
    return IMAGE_SEPARATOR.join((text or request.text, *placed))


def _replaced_json(line: str, text: str | None, request: PromptRequest, moved: bool) -> str | None:
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
    # Not str.splitlines, which also breaks at characters such as U+2028 that a prompt may contain.
    lines = re.split(r"\r\n|\r|\n", _read_text(path))
    return lines[:-1] if lines[-1] == "" else lines


def _read_text(path: Path) -> str:
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


def _parse_text(line: str, index: int, folder: Path, where: str) -> PromptRequest:
    text, *names = _split_text(line)
    for name in names:
        if not name:
            raise UserError(
                f"{where}: an image path is missing after '{IMAGE_SEPARATOR}'; write it, or remove the separator"
            )
    images = [found_image(name, folder, where) for name in names]
    last = tuple(KeyFrameFile(image, -1) for image in images[1:])
    return PromptRequest(index, text, image=images[0] if images else None, keyframes=last)


def _split_text(line: str) -> list[str]:
    """Return the prompt, and the names of its first and its last picture if it has them.

    Text between two separators is part of the prompt, as in the original, unless it has the suffix of a picture.
    """
    text, *names = (part.strip() for part in line.rsplit(IMAGE_SEPARATOR, 2))
    if len(names) == 2 and PurePath(names[0]).suffix.lower() not in IMAGE_SUFFIXES:
        head, _, name = line.rpartition(IMAGE_SEPARATOR)
        return [head.strip(), name.strip()]
    return [text, *names] if names else [line]


def _parse_json(line: str, index: int, folder: Path, where: str) -> PromptRequest:
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
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# From the terminal
# ---------------------------------------------------------------------------------------------------------------------


def typed_prompts(image_to_video: bool = False) -> Iterator[PromptRequest]:
    """Ask for prompts on the terminal until an empty line, `q` or the end of the input.

    For an image-to-video model, the image follows the prompt on the same line, `prompt@@image_path`; if it is missing,
    it is asked for. After an invalid line, the error is logged and the next line is asked for.
    """
    index, where = 0, "typed prompt"
    for line in typed_lines():
        try:
            request = _parse_text(line, index, Path.cwd(), where)
            if image_to_video and request.image is None:
                if (image := _ask("Image: ")) is None:
                    return
                request = _parse_text(f"{line}{IMAGE_SEPARATOR}{image}", index, Path.cwd(), where)
            check_image_use(request, image_to_video, where)
        except UserError as error:
            logger.error("%s", error)
            continue
        tell_places()
        yield request
        index += 1


def typed_lines() -> Iterator[str]:
    """Yield lines from the terminal until an empty line, `q` or the end of the input."""
    while (line := _ask(f"Prompt (empty line or {QUIT} to quit): ")) is not None:
        yield line


def _ask(question: str) -> str | None:
    """Return the stripped answer, or None if the user wants to stop."""
    try:
        answer = input(question).strip()
    except EOFError:
        return None
    return None if answer in ("", QUIT) else answer


# ---------------------------------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------------------------------


def request_seed(base_seed: int, request: PromptRequest) -> int:
    """Return the seed of a request: its own, or one derived from the run's seed."""
    return derive_seed(base_seed, request.index) if request.seed is None else request.seed
