"""Sample a video with diffusers and a LoRA file of tools/export_sat_lora_weight.py.

  python tools/load_cogvideox_lora.py --model_path THUDM/CogVideoX-5b --lora_path exported --prompt "a fox in the snow"
  python tools/load_cogvideox_lora.py --model_path PIPELINE --lora_path LORA --prompt "it jumps" --image_path fox.png

`--model_path` is a pipeline of diffusers, in a folder or on the hub; an image-to-video pipeline needs `--image_path`.
The strength of the LoRA is in its file; `--lora_scale` multiplies it. The tool needs diffusers and peft.
Exit codes: 0 the video is written, 2 the arguments or files are wrong.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.commands.hub_inputs import local_file  # noqa: E402
from cogvideox_sat.commands.input_paths import find_input, tell_places  # noqa: E402
from cogvideox_sat.commands.tool_parser import ToolParser, check_output, locate_image, positive, run_tool  # noqa: E402
from cogvideox_sat.conversion.lora_names import LORA_FILE  # noqa: E402
from sgm.errors import UserError, shown  # noqa: E402

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("load_cogvideox_lora")

PIPELINES = {"CogVideoXPipeline": False, "CogVideoXImageToVideoPipeline": True}  # and whether it needs an image
SIDE_STEP = 16  # pixels of a patch


@dataclass(frozen=True)
class Model:
    """The content of a pipeline's configuration files, read before the pipeline is loaded."""

    pipeline: str
    scheduler: str
    transformer: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    return run_tool(sample, arguments, logger.name)


def sample(arguments: Sequence[str] | None) -> None:
    options = build_parser().parse_args(arguments)
    if options.output_dir is not None:
        options.output_path = options.output_dir / options.output_path.name
    if (options.height is None) != (options.width is None):
        raise UserError("--height, --width: only one of them is given; give both")
    if options.height is not None:
        options.size = options.size or [options.height, options.width]
    check(options)
    options.model_path = str(find_input(options.model_path, "--model_path") or options.model_path)
    model = read_model(options.model_path)
    if PIPELINES[model.pipeline] != bool(options.image_path):
        raise UserError(
            f"--model_path: {options.model_path} is a {model.pipeline}; "
            + ("give --image_path" if PIPELINES[model.pipeline] else "leave --image_path out")
        )
    lora = local_file(options.lora_path, LORA_FILE, "--lora_path")
    tell_places()
    check_lora(lora, model.transformer, options.dry_run)
    strength = options.lora_scale * strength_of_flags(options, lora)
    if options.dry_run:
        return
    videos = sampled_videos(options, model, lora, strength)
    for path, frames in zip(output_paths(options), videos, strict=True):  # each is written before the next is sampled
        write(options, model, frames, path)
        logger.info("wrote %s", path)


def output_paths(options: argparse.Namespace) -> list[Path]:
    """Return the files to write: `output.mp4`, `output-1.mp4`, ..."""
    path = options.output_path
    further = [
        path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, options.num_videos_per_prompt)
    ]
    return [path, *further]


def build_parser() -> argparse.ArgumentParser:
    parser = ToolParser(__doc__)
    add = parser.add_argument
    add(
        "--model_path",
        "--model_dir",
        required=True,
        metavar="PATH",
        help="pipeline: a folder, or a repository on the hub",
    )
    add(
        "--lora_path",
        "--lora_weights_path",
        required=True,
        metavar="PATH",
        help="LoRA: a file, a folder, or a repository on the hub",
    )
    add("--lora_scale", type=float, default=1.0, help="factor of the strength in the file (default: 1)")
    add("--lora_name", metavar="NAME", help="name of the adapter in diffusers (default: chosen by diffusers)")
    add("--lora_alpha", type=positive, help="alpha, if the file has none; otherwise checked against the file")
    add("--lora_r", "--lora_rank", type=int, metavar="RANK", help="rank, checked against the file")
    add("--prompt", required=True, help="description of the video")
    add("--negative_prompt", help="description of what the video should not show")
    add("--image_path", "--image_or_video_path", type=Path, metavar="FILE", help="the first frame, for image-to-video")
    add("--output_path", type=Path, default=Path("output.mp4"), metavar="FILE", help="video (default: output.mp4)")
    add("--output_dir", type=Path, metavar="FOLDER", help="folder of the video, instead of that of --output_path")
    add("--generate_type", choices=("t2v", "i2v"), help="kind of the pipeline, checked against its files")
    add("--num_videos_per_prompt", type=int, default=1, help="videos: output.mp4, output-1.mp4, ... (default: 1)")
    add("--num_inference_steps", type=int, default=50, help="number of sampling steps (default: 50)")
    add("--guidance_scale", type=float, default=6.0, help="scale of guidance (default: 6)")
    add(
        "--dynamic_cfg",
        action=argparse.BooleanOptionalAction,
        help="increase guidance over the steps (default: on with the DPM scheduler)",
    )
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="in pixels (default: the model's)")
    add("--height", type=int, help="in pixels, the first value of --size")
    add("--width", type=int, help="in pixels, the second value of --size")
    add("--num_frames", type=int, help="frames of the video, 4k+1 (default: the model's)")
    add("--fps", type=int, help="frames per second of the file (default: 8; 16 for 1.5)")
    add("--seed", type=int, default=42, help="seed of the noise (default: 42)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="dtype (default: bfloat16; float32 on a CPU)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add(
        "--offload",
        choices=("none", "model", "sequential"),
        default="none",
        help="keep in host memory: nothing, the idle submodels, or also the network's idle layers",
    )
    add("--vae_tiling", action="store_true", help="decode in tiles: less memory, a slightly different picture")
    parser.add_writing_arguments()
    return parser


def check(options: argparse.Namespace) -> None:
    """Resolve the image's path and check the arguments, before the model is read.

    Raises:
        UserError: an argument is wrong, or a package is missing.
    """
    for package in ("diffusers", "peft"):
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed; run pip install diffusers peft")
    for name in ("num_videos_per_prompt", "lora_r"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name}: got {getattr(options, name)}; it must be at least 1")
    if options.generate_type is not None and (options.generate_type == "i2v") != bool(options.image_path):
        wanted = "needs --image_path" if options.generate_type == "i2v" else "takes no --image_path"
        raise UserError(f"--generate_type {options.generate_type} {wanted}")
    for path in output_paths(options):
        check_output(path, options)
    if options.image_path:
        locate_image(options, "image_path")
    if options.size and any(side < SIDE_STEP or side % SIDE_STEP for side in options.size):
        raise UserError(f"--size: got {options.size[0]} {options.size[1]}; it must be multiples of {SIDE_STEP}")
    if options.num_frames is not None and (options.num_frames < 1 or options.num_frames % 4 != 1):
        raise UserError(f"--num_frames: got {options.num_frames}; it must be 4k+1, for example 49")
    for name in ("num_inference_steps", "fps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name}: got {getattr(options, name)}; it must be at least 1")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed: got {options.seed}; it must be between 0 and 2^63 - 1")


def read_model(path: str) -> Model:
    """Return the content of a pipeline's configuration files, from a folder or the hub.

    Raises:
        UserError: the pipeline is not one of CogVideoX.
    """
    from cogvideox_sat.conversion.diffusers_folders import read_json

    index = local_file(path, "model_index.json", "--model_path")
    if index.is_dir():
        index = index / "model_index.json"
        if not index.is_file():
            raise UserError(f"--model_path: {path} is not a pipeline of diffusers; model_index.json does not exist")
    content = read_json(index)
    name = content.get("_class_name")
    if name not in PIPELINES:
        raise UserError(f"--model_path: {path} is a {name}; use a {' or '.join(PIPELINES)}")
    scheduler = content.get("scheduler")
    if Path(path).exists():
        config = index.parent / "transformer" / "config.json"
    else:
        config = local_file(path, "transformer/config.json", "--model_path")
    return Model(name, str(scheduler[-1] if isinstance(scheduler, list) else ""), read_json(config))


def check_lora(path: Path, transformer: dict[str, Any], show: bool) -> None:
    """Check that the matrices of a LoRA file have the sizes of the network.

    Args:
        show: log each matrix and its module.

    Raises:
        UserError: a matrix does not fit, or the file has none.
    """
    from cogvideox_sat.conversion.diffusers_lora_files import adapter_metadata, diffusers_file, lora_tensors
    from cogvideox_sat.conversion.lora_names import diffusers_module, parse_diffusers_name

    file = diffusers_file(path)
    weights = lora_tensors(file)
    try:
        layers, width = (
            transformer["num_layers"],
            transformer["num_attention_heads"] * transformer["attention_head_dim"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"transformer/config.json: the size of the network is missing: {error}") from error
    keys = {name: key for name in weights if (key := parse_diffusers_name(name))}
    if not keys:
        raise UserError(f"--lora_path: {file} has no LoRA of a CogVideoX attention; name a LoRA of this model")
    for name, key in keys.items():
        if weights[name].ndim != 2:
            raise UserError(f"--lora_path: {file}: {name} has shape {list(weights[name].shape)}; expected a matrix")
        side = weights[name].shape[1 if key.matrix == "A" else 0]
        if key.projection.layer >= layers or side != width:
            raise UserError(
                f"{file} does not fit: {key.projection} has width {side}; the network has {layers} layers of {width}"
            )
        if show:
            logger.info("%s %s -> %s", name, list(weights[name].shape), diffusers_module(key.projection))
    if not adapter_metadata(file):
        logger.warning("%s: alpha is missing, and diffusers uses the rank instead; see --lora_scale", file)


def strength_of_flags(options: argparse.Namespace, lora: Path) -> float:
    """Return the factor that `--lora_alpha` and `--lora_r` give to diffusers' strength.

    If the file has an alpha, diffusers applies it, and the flags must agree with it.

    Raises:
        UserError: the flags do not agree with the file.
    """
    from cogvideox_sat.conversion.diffusers_lora_files import adapter_metadata, diffusers_file, lora_tensors
    from cogvideox_sat.conversion.lora_names import parse_diffusers_name

    if options.lora_alpha is None and options.lora_r is None:
        return 1.0
    file = diffusers_file(lora)
    ranks = {
        tensor.shape[0]
        for name, tensor in lora_tensors(file).items()
        if (key := parse_diffusers_name(name)) and key.matrix == "A"
    }
    if options.lora_r is not None and ranks != {options.lora_r}:
        found = ", ".join(map(str, sorted(ranks)))
        raise UserError(f"--lora_r is {options.lora_r}, but {file} has rank {found}; leave --lora_r out")
    if options.lora_alpha is None:
        return 1.0
    said = (adapter_metadata(file) or {}).get("lora_alpha")
    if said is None:
        return options.lora_alpha / min(ranks)
    if said != options.lora_alpha:
        raise UserError(
            f"--lora_alpha is {options.lora_alpha:g}, but {file} has {shown(said)}; use --lora_scale to change its "
            "strength"
        )
    return 1.0


def sampled_videos(options: argparse.Namespace, model: Model, lora: Path, strength: float) -> "Iterator[np.ndarray]":
    """Yield the frames of each video, (frames, height, width, 3) in [0, 1].

    Raises:
        UserError: diffusers cannot load the files.
    """
    import diffusers
    import torch
    from PIL import Image, ImageOps

    from cogvideox_sat.parallel.devices import choose_device, fast_dtype

    device = choose_device(options.device)
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    dtype = fast_dtype(dtype, device)
    inputs: dict[str, Any] = {}
    if options.image_path:
        try:
            with Image.open(options.image_path) as file:
                inputs["image"] = ImageOps.exif_transpose(file).convert("RGB")
        except Exception as error:  # Pillow's decoders raise many kinds
            raise UserError(
                f"cannot read the image {options.image_path}: {error}; save it again, as PNG or JPEG"
            ) from error
    if options.size:
        inputs |= {"height": options.size[0], "width": options.size[1]}
    if options.num_frames:
        inputs["num_frames"] = options.num_frames
    try:
        # Safetensors only, since pickles could run code.
        pipe = getattr(diffusers, model.pipeline).from_pretrained(
            options.model_path, torch_dtype=dtype, use_safetensors=True
        )
        named = {"adapter_name": options.lora_name} if options.lora_name else {}
        pipe.load_lora_weights(str(lora if lora.is_dir() else lora.parent), weight_name=_file_name(lora), **named)
        pipe.set_adapters(pipe.get_active_adapters(), [strength])
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"diffusers cannot load {options.model_path} with {lora}: {reason:.300}") from error
    if options.vae_tiling:
        pipe.vae.enable_tiling()
    if options.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif options.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    dynamic = "DPM" in model.scheduler if options.dynamic_cfg is None else options.dynamic_cfg
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.num_videos_per_prompt):  # one call for each, since pipelines return one video per prompt
        yield pipe(
            prompt=options.prompt,
            negative_prompt=options.negative_prompt,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            use_dynamic_cfg=dynamic,
            generator=generator,
            max_sequence_length=model.transformer.get("max_text_seq_length", 226),
            output_type="np",
            **inputs,
        ).frames[0]


def _file_name(lora: Path) -> str:
    from cogvideox_sat.conversion.diffusers_lora_files import diffusers_file

    return diffusers_file(lora).name


def write(options: argparse.Namespace, model: Model, frames: "np.ndarray", path: Path) -> None:
    import torch

    from cogvideox_sat.media.video_output import VideoWriter

    fps = options.fps or (16 if model.transformer.get("patch_size_t") else 8)
    with VideoWriter(path, fps, *frames.shape[1:3]) as video:
        video.write(torch.from_numpy(frames).permute(0, 3, 1, 2) * 2 - 1)


if __name__ == "__main__":
    sys.exit(main())
