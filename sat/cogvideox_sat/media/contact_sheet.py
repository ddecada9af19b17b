"""Write one image of many videos: a line of text and a row of frames for each."""

import io
import logging
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cogvideox_sat.files.atomic import write_atomically
from cogvideox_sat.media.video_facts import UnreadableClip
from cogvideox_sat.media.video_reading import open_video
from sgm.errors import UserError

logger = logging.getLogger(__name__)

FRAMES = 9  # most frames of a video, evenly spread, including the first and the last
FRAME_HEIGHT = 128  # pixels
GAP = 6
FONT_SIZE = 16


def write_contact_sheet(path: Path, videos: Sequence[tuple[str, Path]]) -> None:
    """Write a PNG that shows videos below each other, each with its text.

    Args:
        videos: texts and existing video files.

    Raises:
        UserError: there are no videos, a video cannot be read, or the image cannot be written.
    """
    if not videos:
        raise UserError(f"{path}: no videos to show; sample some first")
    write_frames(path, [(text, _frames(file)) for text, file in videos])
    logger.info("wrote %s", path)


def write_frames(path: Path, videos: Sequence[tuple[str, Sequence[Image.Image]]]) -> None:
    """Write a PNG that shows frames of videos, one row for each video with its text.

    Raises:
        UserError: the image cannot be written.
    """
    font = ImageFont.load_default(FONT_SIZE)
    rows = [(text, [_scaled_to_row(frame) for frame in frames]) for text, frames in videos]
    line_height = FONT_SIZE + GAP
    width = max(sum(frame.width + GAP for frame in frames) for _, frames in rows) + GAP
    sheet = Image.new("RGB", (width, GAP + len(rows) * (line_height + FRAME_HEIGHT + GAP)), "white")
    drawing = ImageDraw.Draw(sheet)
    top = GAP
    for text, frames in rows:
        drawing.text((GAP, top), _fitted(text, font, width - 2 * GAP), "black", font)
        left, top = GAP, top + line_height
        for frame in frames:
            sheet.paste(frame, (left, top))
            left += frame.width + GAP
        top += FRAME_HEIGHT + GAP
    content = io.BytesIO()
    sheet.save(content, "PNG", optimize=True)
    write_atomically(path, content.getvalue())


def spread(total: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced numbers below `total`, including the first and last."""
    count = min(total, most)
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def _frames(file: Path) -> list[Image.Image]:
    try:
        with open_video(file) as video:
            times = [index * video.facts.frame_duration for index in spread(video.facts.frames, FRAMES)]
            return [Image.fromarray(frame) for frame in video.frames_at(times)]
    except UnreadableClip as error:
        raise UserError(f"contact_sheet: {file} cannot be read: {error}; make it again") from error


def _scaled_to_row(frame: Image.Image) -> Image.Image:
    size = (max(round(frame.width * FRAME_HEIGHT / frame.height), 1), FRAME_HEIGHT)
    return frame.resize(size, Image.Resampling.LANCZOS)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return the text, shortened if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
