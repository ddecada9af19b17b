"""Collect what made a video, for its record and for the metadata of its latents."""

import hashlib
import json
import logging
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from sat import mpu

from cogvideox_sat.configuration.adapter_lists import path_and_weight
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
from cogvideox_sat.parallel.devices import processor_name
from cogvideox_sat.sampling.plan import PlannedVideo
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from cogvideox_sat.sampling.shown_files import all_frames_of_video
from cogvideox_sat.weights.checkpoint_files import checkpoint_shares
from diffusion_video import SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.weights import INDEX_SUFFIX, PIPELINE_FILE, read_weight_map, safetensors_in

logger = logging.getLogger(__name__)

PACKAGES = (
    *("torch", "numpy", "SwissArmyTransformer", "deepspeed", "transformers", "tokenizers", "sentencepiece"),
    *("safetensors", "einops", "pillow", "imageio-ffmpeg"),
)
OWN = ("cogvideox_sat", "sgm", "vae_modules", "data_video", "diffusion_video", "dit_video_concat")
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
        self.told: set[str] = set()

    def record(self, video: PlannedVideo, wait: bool = True) -> dict[str, Any]:
        """Return the record of a video.

        Args:
            wait: wait for the hashes of the weights; otherwise unfinished hashes are null.
        """
        hashes, args = self.hashes.all() if wait else self.hashes.so_far(), self.args
        params = args.model_config
        vae = (params["first_stage_config"].get("params") or {}).get("ckpt_path")
        embedders = (params["conditioner_config"].get("params") or {}).get("emb_models") or [{}]
        text_encoder = (embedders[0].get("params") or {}).get("model_dir")
        decoded = video.frames - int(self.engine.is_15)
        sampler, knobs = self.engine.sampler, video.knobs.given()
        scale = getattr(getattr(sampler, "guider", None), "scale", None)
        content: dict[str, Any] = {
            "format": FORMAT,
            "prompt": video.request.text,
            "original_prompt": video.original_prompt,
            "negative_prompt": video.request.negative_prompt or args.negative_prompt,
            "image": described_input(video.request.image),
            **shown(video.request),
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
            "vae": described(vae, hashes.get("vae")),
            "text_encoder": described(text_encoder, hashes.get("text_encoder")),
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

    def tell_differences(self, video: PlannedVideo, wait: bool = False) -> None:
        """Warn of each difference from the repeated record, once per run.

        Args:
            wait: wait for the hashes of the weights; otherwise unfinished hashes are not compared.
        """
        if self.repeats is None:
            return
        for line in differences(self.repeats.content, self.record(video, wait)):
            if line not in self.told:
                self.told.add(line)
                logger.warning("repeating %s: %s", self.repeats.path, line)

    def close(self) -> None:
        """Stop computing hashes."""
        self.hashes.close()

    def with_content(self, video: PlannedVideo, path: Path) -> dict[str, Any]:
        """Return the record of a written video, including the hash of its file.

        If the run repeats a record, the log tells whether the video is the same.
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
    """Return the metadata with which latents can be decoded: names and texts, for safetensors."""
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

    For a run that repeats a record: the name in the record.
    """
    names, record = args.sources.names, getattr(args, "record", None)
    if record is not None and names == [str(record.path)]:
        return str(record["model"].get("name"))
    return Path(names[0]).stem if names else "unnamed"


# ---------------------------------------------------------------- files


def weight_files(args: SamplingArguments) -> dict[str, list[Path]]:
    """Return the weight files of a sampling run, by role.

    The list of a missing file is empty.
    """
    model = args.model_config
    embedders = (model["conditioner_config"].get("params") or {}).get("emb_models") or [{}]
    text_encoder = (embedders[0].get("params") or {}).get("model_dir")
    vae = (model["first_stage_config"].get("params") or {}).get("ckpt_path")
    further = {name: adapter_files(path) for name, path, _ in adapters_of(args) if name != "adapter"}
    return {
        "vae": vae_files(Path(vae)) if vae else [],
        "adapter": network_files(args.lora_load) if args.lora_load else [],
        "checkpoint": network_files(args.load) if args.load else [],
        "text_encoder": text_encoder_files(Path(text_encoder)) if text_encoder else [],
        **further,
    }


def adapters_of(args: SamplingArguments) -> list[tuple[str, str, float]]:
    """Return the adapters of a run: name of the hash, path, strength."""
    if args.lora_load:
        return [("adapter", args.lora_load, args.lora_scale)]
    return [(f"adapter {n + 1}", str(path), weight) for n, (path, weight) in enumerate(map(path_and_weight, args.lora))]


def adapter_files(path: str) -> list[Path]:
    """Return the files of an adapter in any supported format."""
    return network_files(path) or ([Path(path)] if Path(path).is_file() else sorted(Path(path).glob("*.safetensors")))


def network_files(path: str) -> list[Path]:
    """Return the files of a network's checkpoint in any supported format."""
    try:
        found = checkpoint_shares(path)
    except UserError:  # loading the checkpoint reports the error
        return []
    return sorted({file for first in found for file in with_shards(first)})


def vae_files(path: Path) -> list[Path]:
    """Return the files of a VAE: one file, or the safetensors files of a folder."""
    if not path.is_dir():
        return with_shards(path) if path.is_file() else []
    with suppress(UserError):
        return with_shards(safetensors_in(path / "vae" if (path / PIPELINE_FILE).is_file() else path))
    return []


def text_encoder_files(folder: Path) -> list[Path]:
    """Return the files of a text encoder that are read: weights, vocabulary and settings."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return [*weights, *sorted(folder.glob("*.json")), *sorted(folder.glob("*.model"))]


def with_shards(file: Path) -> list[Path]:
    """Return a weight file, or an index and the files that it lists."""
    if not file.name.endswith(INDEX_SUFFIX):
        return [file]
    with suppress(UserError):
        return [file, *sorted({file.parent / name for name in read_weight_map(file).values()})]
    return [file]


def described(path: str | None, digest: str | None) -> dict[str, Any] | None:
    """Return the entry of a file or folder in a record, None if the path is empty."""
    return described_file(path, digest) if path else None


def described_file(path: str, digest: str | None) -> dict[str, Any]:
    """Return the entry of a file or folder in a record."""
    return {"path": str(Path(path).resolve()) if Path(path).exists() else str(path), "hash": digest}


def shown(request: PromptRequest) -> dict[str, Any]:
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
    """Return the number of frames of a video whose windows have `window` frames each."""
    request = video.request
    first = window
    if request.goes_on and request.video is not None:
        first = all_frames_of_video(request.video, video.fps)
    return first + len(request.windows) * (window - CONTEXT_FRAMES)


def described_input(path: Path | None) -> dict[str, Any] | None:
    """Return the entry of a picture or clip in a record."""
    if path is None:
        return None
    digest = None
    with suppress(OSError):
        digest = f"sha256:{hash_of_file(path)}"
    return described(str(path), digest)


# ---------------------------------------------------------------- machine and software


def device_name(device: torch.device) -> str:
    """Return the kind and name of a device; equal names compute the same values."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({processor_name()})"


def processors() -> int:
    """Return how many processors this process may use.

    The video encoder uses that many threads, which changes its output.
    """
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def versions(device: torch.device) -> dict[str, str]:
    """Return the versions of everything that computes a video, by name.

    The version of this program is a hash of its modules.
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if device.type == "cuda":
        found |= {"CUDA": str(torch.version.cuda or torch.version.hip), "cuDNN": str(torch.backends.cudnn.version())}
    with suppress(Exception):  # no ffmpeg is an error only when a video is written
        from imageio_ffmpeg import get_ffmpeg_version

        found["ffmpeg"] = get_ffmpeg_version()
    found["program"] = source_hash()
    return found


def source_files(module: str) -> tuple[Path, list[Path]]:
    """Return the folder of a module, and its files there, sorted.

    Raises:
        ModuleNotFoundError: the module does not exist.
    """
    spec = find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0])
        return folder, sorted(folder.rglob("*.py"))
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return Path(spec.origin).parent, [Path(spec.origin)]


def source_hash() -> str:
    """Return a hash of the program's own modules."""
    digest = hashlib.sha256()
    for name in OWN:
        folder, files = source_files(name)
        for file in files:
            digest.update(f"{name}:{file.relative_to(folder)}".encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
