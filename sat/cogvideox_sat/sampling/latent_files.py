"""Read what decoding needs to know from files of latents, without PyTorch.

A file holds `latents` (1, t, c, h, w) or (t, c, h, w), scaled as the network takes them, and optional metadata, which
`sampling.record_making.latents_metadata` describes. Files are treated as untrusted.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cogvideox_sat.commands.input_paths import find_input, named_place, not_found
from cogvideox_sat.configuration.model_values import check_model_values, check_parameters
from cogvideox_sat.configuration.video_records import KEPT_SUFFIX, LARGEST, check_foreign_model, parse_record
from cogvideox_sat.files.output_paths import check_folder
from sgm.config_places import Sources
from sgm.errors import UserError, shown

SUFFIX = ".safetensors"
DEFAULT_FPS = 8.0


@dataclass(frozen=True)
class LatentFile:
    """A file of latents that can be decoded.

    Args:
        first_stage_config: the VAE, as in a model's configuration.
        scale_factor: number by which the latents are divided before decoding.
        dtype: name of the dtype in which sampling would have decoded them, such as "bfloat16"; None: not known.
        record: record of the video, without the hash of its file; None: not known.
        video: path of the video to write.
        sources: the file that describes the VAE.
    """

    path: Path
    first_stage_config: dict[str, Any]
    scale_factor: float
    fps: float
    dtype: str | None
    record: dict[str, Any] | None
    video: Path
    sources: Sources = field(default_factory=Sources, compare=False)


def find_files(paths: Iterable[Path]) -> dict[Path, Path]:
    """Return the files of latents under the given paths, each with the folder for its video.

    The files of a folder are sorted by name. The video is written to the folder of its file. For a file that was found
    in the program's root instead of the current working directory, it is written to the folder of the same name in the
    current working directory.

    Raises:
        UserError: a path exists in neither place, or a folder has no such file.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        found = find_input(path, "PATH")
        if found is None:
            raise UserError(f"{not_found('PATH', path)}; name a file of latents or a folder of such files")
        inside = [found]
        if found.is_dir():
            inside = sorted(file for file in found.rglob(f"*{SUFFIX}") if not file.name.startswith("."))
            if not inside:
                raise UserError(f"{path} holds no {SUFFIX} file; name a file of latents or a folder of such files")
        for file in inside:
            files[file] = (named_place(path, found) / file.relative_to(found)).parent
    return files


def read_header(path: Path, config: Mapping[str, Any] | None, fps: float | None, folder: Path) -> LatentFile:
    """Return the description of a latent file, without reading the latents.

    Args:
        config: the user's configuration of the model; it overrides the one in the file.
        fps: frames per second; overrides the value in the file.
        folder: folder for the video.

    Raises:
        UserError: the path is not a file of latents, or required information is missing.
    """
    metadata = check_latents(path)
    if config is None:
        first_stage, scale_factor = own_model(path, metadata)
    else:
        first_stage, scale_factor = configured_model(config)
    sources = getattr(config, "sources", None) or Sources([path])
    model = {"first_stage_config": first_stage}
    check_model_values(model, sources)
    check_parameters({"model": model}, sources)
    if fps is None:
        fps = number(metadata.get("fps", DEFAULT_FPS), f"{path}: fps")
    record = None
    if "record" in metadata:
        record = parse_record(metadata["record"], f"{path}: record")
    check_folder(folder, "output_dir")
    stem = path.name.removesuffix(SUFFIX).removesuffix(KEPT_SUFFIX.removesuffix(SUFFIX))
    dtype = metadata.get("computed_in")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"{path}: computed_in: got {shown(dtype)}; expected float32, bfloat16 or float16")
    return LatentFile(path, first_stage, scale_factor, fps, dtype, record, folder / f"{stem}.mp4", sources)


def check_latents(path: Path) -> dict[str, str]:
    """Return the metadata of a file of latents.

    Raises:
        UserError: the file is not a file of latents, or is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            if "latents" not in file.keys():  # noqa: SIM118
                raise UserError(f"{path} holds no 'latents'; it was not written by sampling or by an evaluation")
            shape = file.get_slice("latents").get_shape()
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from error
    frames = shape[-4] if len(shape) > 3 else 0
    if len(shape) not in (4, 5) or (len(shape) == 5 and shape[0] != 1) or 0 in shape:
        raise UserError(f"{path}: got latents of shape {shape}; expected (1, t, c, h, w) or (t, c, h, w)")
    if frames % 2 == 0:
        raise UserError(f"{path}: the file has {frames} latent frames; expected an odd number")
    return metadata


def own_model(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], float]:
    """Return the VAE and the scale of the latents that the file itself names.

    Raises:
        UserError: the file does not name them, or names something that only the user's own configuration may name.
    """
    missing = [name for name in ("first_stage_config", "scale_factor") if name not in metadata]
    if missing:
        raise UserError(f"{path}: {missing[0]}: missing; give the model's configuration as --base")
    where = f"{path}: first_stage_config"
    try:
        if len(metadata["first_stage_config"]) > LARGEST:
            raise ValueError("too long")
        first_stage = json.loads(metadata["first_stage_config"])
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not valid JSON ({type(error).__name__}); give the configuration as --base"
        ) from error
    check_first_stage(first_stage, where)
    check_foreign_model(first_stage, path, "first_stage_config")
    return first_stage, number(metadata["scale_factor"], f"{path}: scale_factor")


def configured_model(config: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Return the VAE and the scale of the latents from a model's configuration.

    Raises:
        UserError: the configuration has no VAE.
    """
    model = config.get("model") or {}
    first_stage: Any = model.get("first_stage_config")
    check_first_stage(first_stage, "model.first_stage_config")
    return dict(first_stage), number(model.get("scale_factor", 1.0), "model.scale_factor")


def check_first_stage(first_stage: Any, where: str) -> None:
    """Check that a configuration describes a VAE with existing weights, else raise UserError."""
    params = first_stage.get("params") if isinstance(first_stage, Mapping) else None
    if not isinstance(params, Mapping) or not isinstance(first_stage.get("target"), str):
        raise UserError(f"{where} describes no VAE: it needs target and params")
    weights = params.get("ckpt_path")
    if not isinstance(weights, str):
        raise UserError(f"{where}.params.ckpt_path: got {shown(weights)}; expected the weights of the VAE")
    if not Path(weights).exists():
        problem = not_found(f"{where}.params.ckpt_path", weights)
        raise UserError(f"{problem}; give the model's configuration as --base")


def number(value: Any, where: str) -> float:
    """Return a positive number, given as a number or as text.

    Raises:
        UserError: the value is not a positive number.
    """
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not (0 < result < math.inf):
        raise UserError(f"{where}: got {shown(value)}; expected a positive number")
    return result
