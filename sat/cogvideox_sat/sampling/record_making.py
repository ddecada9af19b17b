"""Collect what made a video, for its record and for the metadata of its latents."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from sat import mpu

from cogvideox_sat.configuration.argument_lists import SamplingArguments
from cogvideox_sat.configuration.video_records import (
    FORMAT,
    REPEATED_ARGUMENTS,
    UNMERGED,
    VideoRecord,
    differences,
    with_absolute_paths,
)
from cogvideox_sat.files.content_hashes import BackgroundHashes, hash_of_file
from cogvideox_sat.latent_geometry import CONTEXT_FRAMES, TIME_FACTOR
from cogvideox_sat.sampling.input_files import all_frames_of_video
from cogvideox_sat.sampling.planned_videos import PlannedVideo
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from cogvideox_sat.sampling.recorded_files import (
    adapters_of,
    described,
    described_file,
    described_input,
    text_encoder_path,
    vae_path,
    weight_files,
)
from cogvideox_sat.sampling.recorded_software import device_name, processors, versions
from diffusion_video import SATVideoDiffusionEngine

logger = logging.getLogger(__name__)

METADATA_FORMAT = "cogvideox-latents-1"


class Recorder:
    """Makes the records of a run's videos.

    The files of weights are hashed in the background, once per run.

    Args:
        asked: the arguments as the user gave them, including the precision that was asked for.
        repeats: the record that the run repeats, if any; each difference from it is logged as a warning.
    """

    def __init__(self, engine: SATVideoDiffusionEngine, asked: SamplingArguments, repeats: VideoRecord | None = None):
        self.engine, self.args, self.repeats = engine, asked, repeats
        self.hashes = BackgroundHashes(weight_files(asked) if mpu.get_model_parallel_rank() == 0 else {})
        self.model = {
            "name": model_name(asked),
            "scale_factor": engine.scale_factor,
            "config": with_absolute_paths(asked.model_config),
        }
        self.versions = versions(engine.device)
        self.logged: set[str] = set()

    def record(self, video: PlannedVideo, wait: bool = True) -> dict[str, Any]:
        """Return the record of a video, with the types that reading its file returns.

        Args:
            wait: wait for the hashes of the weights; otherwise unfinished hashes are null.
        """
        hashes, args = self.hashes.all() if wait else self.hashes.so_far(), self.args
        decoded = video.frames - int(self.engine.is_15)
        sampler, knobs = self.engine.sampler, video.knobs.given()
        scale = getattr(getattr(sampler, "guider", None), "scale", None)
        content: dict[str, Any] = {
            "format": FORMAT,
            "prompt": video.request.text,
            "original_prompt": video.original_prompt,
            "negative_prompt": video.request.negative_prompt or args.negative_prompt,
            "image": described_input(video.request.image),
            **entries_of_inputs(video.request),
            "seed": video.seed,
            "index": video.request.index,
            "steps": video.steps or getattr(sampler, "num_steps", None),
            "guidance": knobs.get("guidance_scale", scale),
            "size": list(video.size),
            "frames": frames_of(video, (decoded - 1) * TIME_FACTOR + 1),
            "latent_frames": video.frames,
            "fps": video.fps,
            "precision": "fp16" if args.fp16 else "bf16" if args.bf16 else "float32",
            "computed_in": str(self.engine.dtype).removeprefix("torch."),
            "attention": self.engine.attention.kernel if self.engine.attention else None,
            "compiled": self.engine.compiled,
            "checkpoint": described(args.load, hashes.get("checkpoint")),
            "adapters": [
                {**described_file(path, hashes.get(name)), "scale": scale} for name, path, scale in adapters_of(args)
            ],
            "vae": described(vae_path(args.model_config), hashes.get("vae")),
            "text_encoder": described(text_encoder_path(args.model_config), hashes.get("text_encoder")),
            "model": self.model,
            "arguments": {
                **{name: getattr(args, name) for name in REPEATED_ARGUMENTS},
                **knobs,
                **({UNMERGED: True} if args.lora else {}),
            },
            "versions": self.versions,
            "device": device_name(self.engine.device),
            "threads": torch.get_num_threads(),
            "processors": processors(),
        }
        return json.loads(json.dumps(content, default=str))  # with the types that reading the file returns

    def metadata(self, video: PlannedVideo, wait: bool = True) -> dict[str, str]:
        """Return the metadata of a video's latents: for `tools/decode_latents.py`, and the record.

        Latents depend on the refined prompt only. The metadata of latents that are an output (`wait`) leaves out the
        user's original prompt, so that equal latents give equal files.
        """
        record = self.record(video, wait)
        if wait:
            del record["original_prompt"]
        return {
            **latents_metadata(self.engine, record["model"]["name"], video.request.text, video.fps),
            "negative_prompt": readable(record["negative_prompt"]),
            "record": json.dumps(record),
        }

    def log_differences(self, video: PlannedVideo, wait: bool = False) -> None:
        """Warn of each difference from the repeated record, once per run.

        Args:
            wait: wait for the hashes of the weights; otherwise unfinished hashes are not compared.
        """
        if self.repeats is None:
            return
        for line in differences(self.repeats.content, self.record(video, wait)):
            if line not in self.logged:
                self.logged.add(line)
                logger.warning("repeating %s: %s", self.repeats.path, line)

    def close(self) -> None:
        """Stop computing hashes."""
        self.hashes.close()

    def with_content(self, video: PlannedVideo, path: Path) -> dict[str, Any]:
        """Return the record of a written video, including the hash of its file.

        The hashes of the weights are waited for. If the run repeats a record, the log tells whether the video is the
        same.
        """
        digest = f"sha256:{hash_of_file(path)}"
        if self.repeats is not None:
            expected = (self.repeats.content.get("video") or {}).get("hash")
            if expected == digest:
                logger.info("%s equals the video that %s describes, to the bit", path, self.repeats.path)
            elif expected is not None:
                logger.warning("%s differs from the video that %s describes", path, self.repeats.path)
        return {**self.record(video), "video": {"hash": digest}}


def latents_metadata(engine: SATVideoDiffusionEngine, name: str, prompt: str, fps: float) -> dict[str, str]:
    """Return the metadata with which latents can be decoded: names and texts, for safetensors.

    Args:
        name: name of the model; see `model_name`.
        fps: frames per second of the video.
    """
    first_stage = with_absolute_paths(engine.config["first_stage_config"])
    return {
        "format": METADATA_FORMAT,
        "prompt": readable(prompt),
        "scale_factor": repr(engine.scale_factor),
        "model": name,
        "fps": f"{fps:g}",
        "computed_in": str(engine.dtype).removeprefix("torch."),
        "first_stage_config": json.dumps(first_stage, default=str),
    }


def readable(text: str) -> str:
    """Return a text with the characters that UTF-8 cannot encode escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def model_name(args: Any) -> str:
    """Return the name of the first configuration file, such as cogvideox_2b.

    For a run that repeats a record, it is the name in the record.

    Args:
        args: arguments with the sources of their configuration, of sampling or of training.
    """
    names, record = args.sources.names, getattr(args, "record", None)
    if record is not None and names == [str(record.path)]:
        return str(record["model"].get("name"))
    return Path(names[0]).stem if names else "unnamed"


def entries_of_inputs(request: PromptRequest) -> dict[str, Any]:
    """Return the record's entries for key frames, a clip and further windows."""
    entries: dict[str, Any] = {}
    if request.keyframes:
        key_frames = ((described_input(key_frame.path), key_frame.at) for key_frame in request.keyframes)
        entries["keyframes"] = [{**(file or {}), "at": at} for file, at in key_frames]
    if request.video is not None:
        entries |= {"video_from": described_input(request.video), "strength": request.strength}
    if request.extend:
        entries["extend"] = list(request.windows)
    return entries


def frames_of(video: PlannedVideo, window: int) -> int:
    """Return the number of frames of a video whose windows have `window` frames each.

    Raises:
        UserError: the clip that the video continues cannot be read.
    """
    request = video.request
    first = window
    if request.goes_on and request.video is not None:
        first = all_frames_of_video(request.video, video.fps)
    return first + len(request.windows) * (window - CONTEXT_FRAMES)
