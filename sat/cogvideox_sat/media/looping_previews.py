"""Write a video as an animated image, for pages that show only images."""

import io
from pathlib import Path

from PIL import Image

from cogvideox_sat.files.atomic import write_atomically
from cogvideox_sat.media.video_facts import UnreadableClip
from cogvideox_sat.media.video_reading import open_video
from sgm.errors import UserError

LARGEST_HEIGHT = 256  # pixels; higher videos are scaled down
QUALITY = 80
SINGLE = 1000  # milliseconds for which the only frame of a video is shown


def write_looping_preview(video: Path) -> Path:
    """Write an animated WebP of the same name beside `video`, and return its path.

    Raises:
        UserError: the video cannot be read, or the image cannot be written.
    """
    path = video.with_suffix(".webp")
    try:
        with open_video(video) as opened:
            facts = opened.facts
            first, *others = (_reduced(Image.fromarray(frame)) for frame in opened.all_frames())
    except UnreadableClip as error:
        raise UserError(f"looping_previews: {video} cannot be read: {error}; make it again") from error
    milliseconds = round(1000 * facts.frame_duration) if facts.frames > 1 else SINGLE
    content = io.BytesIO()
    first.save(
        content, "WEBP", save_all=True, append_images=others, duration=milliseconds, loop=0, quality=QUALITY, method=6
    )
    write_atomically(path, content.getvalue())
    return path


def _reduced(frame: Image.Image) -> Image.Image:
    if frame.height <= LARGEST_HEIGHT:
        return frame
    width = max(round(frame.width * LARGEST_HEIGHT / frame.height), 1)
    return frame.resize((width, LARGEST_HEIGHT), Image.Resampling.LANCZOS)
