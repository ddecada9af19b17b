"""Measure how a video matches its request's pictures and clip, and how its windows join."""

from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from torch import Tensor

from cogvideox_sat.clips.input_video import read_input_video
from cogvideox_sat.latent_geometry import CONTEXT_FRAMES
from cogvideox_sat.media.image_inputs import load_condition_image
from cogvideox_sat.media.pixel_error import psnr
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from sgm.errors import UserError

LEAST_DIFFERENCE = 1e-3  # of pixels in [-1, 1]; if the frames of a video differ less, its seams are not visible

# The names of the measures in the report; each is followed by a mean over videos.
TITLES = {
    "first_frame_psnr": "First frame against its image, dB PSNR",
    "last_frame_psnr": "Last frame against its image, dB PSNR",
    "key_frame_psnr": "Other frames against their images, dB PSNR",
    "change_of_clip": "Mean difference from the clip, of 1",
    "seam_ratio": "Frame difference at seams, of the median",
}


class InputFidelity:
    """The measures of all videos, by name: one value for each video with the input."""

    def __init__(self) -> None:
        self.values: defaultdict[str, list[float]] = defaultdict(list)

    def measure(self, request: PromptRequest, frames: Tensor, fps: float) -> None:
        """Add the measures of one video.

        Args:
            frames: (t, 3, height, width) in [-1, 1].
            fps: frames per second.

        Raises:
            UserError: a picture or the clip of the request cannot be read, or the video is shorter than the request.
        """
        size = (frames.shape[-2], frames.shape[-1])
        if request.image:
            image = load_condition_image(request.image, size)
            self.values["first_frame_psnr"].append(psnr(frames[:1], image[None]).item())
        for key_frame in request.keyframes:
            if key_frame.at >= len(frames):
                raise too_short(request, len(frames), f"key frame {key_frame.at}")
            is_last = key_frame.at in (-1, len(frames) - 1)
            image = load_condition_image(key_frame.path, size)
            value = psnr(frames[key_frame.at][None], image[None]).item()
            self.values["last_frame_psnr" if is_last else "key_frame_psnr"].append(value)
        if request.video and not request.goes_on:
            clip = read_input_video(request.video, size, len(frames), fps)
            self.values["change_of_clip"].append((frames - clip).abs().mean().item() / 2)
        window = window_frames(request, len(frames))
        if window is not None:
            self.values["seam_ratio"].append(seam_ratio(frames, window))

    def means(self) -> dict[str, float]:
        """Return the mean of each measure."""
        return {name: fmean(values) for name, values in self.values.items()}


def window_frames(request: PromptRequest, frames: int) -> int | None:
    """Return the frames per window of a video, or None if its request has no further windows.

    A clip that the video continues counts as the first window.

    Args:
        frames: number of frames of the video.

    Raises:
        UserError: the video has too few frames for its windows.
    """
    windows = len(request.windows)
    if not windows:
        return None
    window = (frames + CONTEXT_FRAMES * windows) // (windows + 1)
    if window <= CONTEXT_FRAMES:
        raise too_short(request, frames, f"{windows + 1} windows")
    return window


def too_short(request: PromptRequest, frames: int, wanted: str) -> UserError:
    """Return the error about a video that was not made for this request."""
    return UserError(
        f"--videos: the video of prompt {request.index} has {frames} frames, too few for {wanted}; give the "
        "--input_file that the videos were made with"
    )


def seam_ratio(frames: Tensor, window: int) -> float:
    """Return the frame difference where windows join, relative to the median difference.

    Args:
        frames: (t, 3, height, width) in [-1, 1].
        window: frames of a window; each but the first repeats `CONTEXT_FRAMES` frames.
    """
    differences = (frames[1:] - frames[:-1]).abs().mean(dim=(1, 2, 3))
    seams = differences[window - 1 :: window - CONTEXT_FRAMES]
    return (seams.mean() / differences.median().clamp(min=LEAST_DIFFERENCE)).item()


def lines(numbers: Mapping[str, Any]) -> list[str]:
    """Return the lines of the report for the measures among `numbers`."""
    return [f"{title}: {numbers[name]:.3g}" for name, title in TITLES.items() if name in numbers]
