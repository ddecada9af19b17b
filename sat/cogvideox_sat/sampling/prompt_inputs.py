"""The prompts to sample: read from a file or typed in, each with its own seed."""

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
    """One video to sample; None means "as the arguments of the whole run say".

    Args:
        index: number of the line in a text file, or of the prompt in a .jsonl file or on the terminal, from 0; it names
            the output folder and enters the seed.
        image: the first frame, for image-to-video models.
        seed: overrides the seed derived from the run's, see `request_seed`.
        num_frames: length in latent frames, the unit of `sampling_num_frames`.
        size: (height, width) of the video in pixels, the order of `sampling_image_size`.
        frames: length in frames, in place of `num_frames`.
        fps: frames a second of the file.
        steps: sampling steps.
        sampler, guidance_scale, guidance_interval, guidance_schedule: see `SamplerKnobs`.
        keyframes: pictures that other frames show, for image-to-video models.
        video: the clip that the video starts from; without `strength` and with `extend` the clip that is continued.
        strength: share of the steps that is taken from the clip.
        extend: further windows, or their prompts.
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
        """Return the prompts of further windows."""
        return (self.text,) * self.extend if isinstance(self.extend, int) else self.extend or ()

    @property
    def goes_on(self) -> bool:
        """Return whether the clip stays as it is and is continued."""
        return bool(self.extend) and self.video is not None and self.strength is None

    def latent_frames(self, limits: ModelLimits) -> int | None:
        """Return the length in latent frames; None: as the arguments of the whole run say.

        Raises:
            UserError: the model makes no video of so many `frames`.
        """
        return self.num_frames if self.frames is None else limits.latent_frames(self.frames)

    @property
    def knobs(self) -> SamplerKnobs:
        """Return what the request changes of the sampler."""
        return SamplerKnobs.of(self)


# ---------------------------------------------------------------------------------------------------------------------
# From a file
# ---------------------------------------------------------------------------------------------------------------------


def read_prompts(path: str | Path, image_to_video: bool | None = None) -> list[PromptRequest]:
    """Return the prompts of a file, in its order, numbered from 0.

    Empty lines and empty prompts are left out. They count in a text file, as in the original, and not in `.jsonl`.

    `.jsonl`: one JSON object a line with the key `prompt` and, as wanted, the other fields of `PromptRequest`.
    Any other suffix: one prompt a line, `prompt@@image` where there is a first frame, `prompt@@first@@last` where there
    is a last one too. Text is UTF-8 in both, and the path of a picture or clip that does not exist from the current
    directory is taken from the folder of the prompt file.

    Args:
        image_to_video: True demands an image for every prompt, False refuses images, None takes both.

    Raises:
        UserError: the file cannot be read or holds no prompt, or a line does not say what it must.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        raise UserError(f"prompt file {path}: use .txt with one prompt a line or .jsonl with one JSON object a line")
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
        raise UserError(f"prompt file {path} holds no prompt: write one a line")
    return requests


def replace_prompts(path: Path, texts: Sequence[str | None], folder: Path) -> str:
    """The content of a prompt file with other texts, all else as it is; to be written to a file in `folder`.

    Args:
        texts: one for each request that `read_prompts` returns, None to keep the prompt.
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
    """Return a line with another prompt, and with whole paths where these would not be found; None: it stays."""
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
    """Return what names a file: one that was found beside the prompt file would not be found beside another."""
    return str(file.resolve()) if moved and file != Path(name) else name


def _read_lines(path: Path) -> list[str]:
    # Not str.splitlines, which also breaks at characters such as U+2028 that may stand inside a prompt.
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
        raise UserError(f"prompt file {path} is not UTF-8 text (line {line}): save it as UTF-8") from error
    if "\0" in text:  # what UTF-16 without a byte order mark decodes to
        raise UserError(f"prompt file {path} is not UTF-8 text, it holds NUL characters: save it as UTF-8")
    return text


def _parse_text(line: str, index: int, folder: Path, where: str) -> PromptRequest:
    text, *names = _split_text(line)
    for name in names:
        if not name:
            raise UserError(f"{where}: there is no image path after '{IMAGE_SEPARATOR}'")
    images = [found_image(name, folder, where) for name in names]
    last = tuple(KeyFrameFile(image, -1) for image in images[1:])
    return PromptRequest(index, text, image=images[0] if images else None, keyframes=last)


def _split_text(line: str) -> list[str]:
    """Return the prompt, and the names of its first and its last picture where it has such.

    What stands between two separators is a part of the prompt, as in the original, unless it is named like a picture.
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
    """Return fields with the files that they name in place of their names.

    Raises:
        UserError: one does not exist; `where` begins the message.
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
    """Return the picture or clip that a request names, from the current directory, `folder`, or the program's root.

    Raises:
        UserError: it is in none of them; `where` begins the message.
    """
    for candidate in (Path(name), folder / name):
        with suppress(OSError, ValueError):  # a name too long for the file system is no file either
            if candidate.is_file():
                return candidate
    found = find_input(name, where)
    if found is not None and found.is_file():
        return found
    raise UserError(
        f"{where}: {kind} {name} does not exist, neither in the current working directory nor in {folder} nor in {ROOT}"
    )


def check_image_use(request: PromptRequest, image_to_video: bool | None, where: str) -> None:
    """Check that a request names pictures if the model takes such (True), and none if it does not (False).

    A clip has a first frame, which may be the picture.

    Raises:
        UserError: it does not; `where` begins the message.
    """
    if image_to_video is True and request.image is None and not request.keyframes and request.video is None:
        raise UserError(f"{where}: an image-to-video model needs an image: prompt{IMAGE_SEPARATOR}image_path")
    if image_to_video is False and (request.image is not None or request.keyframes):
        raise UserError(f"{where}: it names an image, but this is a text-to-video model")


def _shorten(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Typed in
# ---------------------------------------------------------------------------------------------------------------------


def typed_prompts(image_to_video: bool = False) -> Iterator[PromptRequest]:
    """Ask for prompts on the terminal until an empty line, `q` or the end of the input.

    For an image-to-video model the image follows the prompt on the same line, `prompt@@image_path`, or is asked for.
    A line that will not do is reported and asked for again.
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
    """Ask for prompts on the terminal until an empty line, `q` or the end of the input; yield what is typed."""
    while (line := _ask(f"Prompt (empty line or {QUIT} to quit): ")) is not None:
        yield line


def _ask(question: str) -> str | None:
    """The stripped answer, None when the user wants to stop."""
    try:
        answer = input(question).strip()
    except EOFError:
        return None
    return None if answer in ("", QUIT) else answer


# ---------------------------------------------------------------------------------------------------------------------
# A seed each
# ---------------------------------------------------------------------------------------------------------------------


def request_seed(base_seed: int, request: PromptRequest) -> int:
    """The seed of a request's noise: its own, else one derived from the run's seed and its index."""
    return derive_seed(base_seed, request.index) if request.seed is None else request.seed
