"""Keep the latents of videos in files until the videos are complete."""

import logging
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cogvideox_sat.commands.program_names import as_started
from cogvideox_sat.configuration.video_records import KEPT_SUFFIX, kept_path
from cogvideox_sat.media.video_output import save_latents
from cogvideox_sat.sampling.record_making import Recorder
from cogvideox_sat.sampling.video_in_progress import VideoInProgress
from sgm.errors import UserError

logger = logging.getLogger(__name__)


@contextmanager
def keeping_latents(videos: Sequence[VideoInProgress], recorder: Recorder) -> Iterator[None]:
    """Keep the latents of sampled videos in files while the block decodes them.

    The latents then survive full memory, a full disk and the end of the process. The files of completed videos are
    removed.
    """
    # For a video with further windows, the latents are only those of its first window.
    sampled = [video for video in videos if video.failure is None and not video.planned.request.extend]
    for video in sampled:
        keep(video, kept_path(video.planned.path), recorder)
    try:
        yield
    except BaseException:
        for video in sampled:
            if video.failure is None and (video.kept is None or video.kept.exists()):
                logger.error("not decoded: %s%s", video.name, where_latents_are(video, recorder))
        raise


def keep(video: VideoInProgress, path: Path, recorder: Recorder) -> str | None:
    """Write the video's latents to `path`; return None, or the reason if that fails."""
    try:
        save_latents(path, video.latents, recorder.metadata(video.planned, wait=False))
    except UserError as error:
        return str(error)
    video.kept = path
    return None


def where_latents_are(video: VideoInProgress, recorder: Recorder) -> str:
    """Return the end of a failure report, with the command that decodes the video later."""
    if video.planned.request.extend:
        return "; its latents are not kept, since it has several windows"
    if video.kept is None:  # could not be written beside the video; the folder of temporary files may have space
        name = f"{video.planned.request.index}_{video.planned.seed}{KEPT_SUFFIX}"
        if problem := keep(video, Path(tempfile.mkdtemp(prefix="cogvideox-")) / name, recorder):
            return f"; its latents are lost: {problem}"
    command = as_started("python tools/decode_latents.py", runnable=True)
    flags = " --vae_tile_size 256" if video.full else ""
    # The existing video is an older one, or one without its record.
    if video.kept == kept_path(video.planned.path) and video.planned.path.exists():
        flags += " --overwrite"
    return f"; its latents are kept, decode them with: {command} {shlex.quote(str(video.kept))}{flags}"
