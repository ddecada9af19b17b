"""Measure how well a VAE reconstructs clips: PSNR, SSIM, LPIPS and, with I3D, rFVD.

  python tools/evaluate_vae.py --base configs/vae_3d.yaml --data data/held_out --ckpt ckpts/vae-01-31-12-00/3d-vae.pt
  python tools/evaluate_vae.py --base configs/cogvideox_2b.yaml configs/sft.yaml --data data/held_out

The configuration is one for VAE training, or of a diffusion model with its first stage; its `data:` section tells how
clips are read and cut. Latents are means, not samples. Clips of 8k+1 frames are decoded in chunks, as in sampling,
others at once. PSNR, SSIM and LPIPS are means over clips; rFVD, the Fréchet video distance, needs the weights of I3D.
Videos show the input, the reconstruction and four times their difference. Exit codes: 0 done, 2 the arguments or files
are wrong.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.clips.latent_cache import is_cache  # noqa: E402
from cogvideox_sat.commands.input_paths import located, not_found, tell_places  # noqa: E402
from cogvideox_sat.commands.launchers import check_alone  # noqa: E402
from cogvideox_sat.commands.startup import quiet_libraries  # noqa: E402
from cogvideox_sat.commands.tool_parser import ToolParser, locate_inputs  # noqa: E402
from cogvideox_sat.configuration.argument_limits import check_device  # noqa: E402
from cogvideox_sat.configuration.files import MergedConfig, load_configs, with_located_paths  # noqa: E402
from cogvideox_sat.configuration.model_values import check_data_section, check_model_values, check_parameters  # noqa: E402
from cogvideox_sat.files.output_paths import check_file, check_folder  # noqa: E402
from cogvideox_sat.vae_training.plan import check_clips, compression  # noqa: E402
from sgm.config_places import section  # noqa: E402
from sgm.errors import UserError, shown  # noqa: E402
from sgm.exit_codes import exit_code  # noqa: E402

logger = logging.getLogger("evaluate_vae")

INFERENCE = "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper"
INFERENCE_PARAMS = ("encoder_config", "decoder_config", "regularizer_config", "ckpt_path", "ignore_keys", "tile_size")


def main(command_line: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_code(lambda: evaluate(command_line), logger, command_line=command_line)


def evaluate(command_line: Sequence[str] | None) -> int:
    check_alone(logger.name)
    options = build_parser().parse_args(command_line)
    check_options(options)
    config = load_configs(options.base, used=("model", "data"))
    with config.sources.naming():
        return evaluate_with(config, options)


def evaluate_with(config: MergedConfig, options: argparse.Namespace) -> int:
    model = with_located_paths(config.get("model") or {}, "model")
    vae_config, data_config = find_parts(model, config, options.ckpt)
    tell_places()
    quiet_libraries()
    # Imported here, since PyTorch takes seconds to load: only after the arguments are checked
    from cogvideox_sat.evaluation.vae_report import run

    with section("model", model, config.sources):
        report = run(options, vae_config, data_config)
    sys.stdout.write(f"{report}\n")
    return 0


# ---------------------------------------------------------------- arguments


def build_parser() -> argparse.ArgumentParser:
    parser = ToolParser(__doc__)
    add = parser.add_argument
    add("--base", nargs="+", metavar="FILE", help="configuration files; later files override earlier ones")
    add("--data", nargs="+", metavar="DATA", help="clips, as for train_video.py; use clips that were not trained on")
    add("--ckpt", type=Path, metavar="FILE", help="weights of the VAE (default: from the configuration)")
    add("--num_clips", type=int, default=64, help="number of clips, spread over the data (default: 64)")
    add("--num_videos", type=int, default=4, help="number of first clips to write videos of (default: 4)")
    add("--output", type=Path, default=Path("outputs/vae"), help="folder of the videos (default: outputs/vae)")
    add("--json", type=Path, metavar="FILE", help="write all numbers; null is the infinite PSNR of equal clips")
    add("--lpips_net", choices=("alex", "vgg", "squeeze", "none"), default="alex", help="network (default: alex)")
    add("--lpips_weights", type=Path, metavar="FILE", help="torchvision's weights of it (default: downloaded once)")
    add("--i3d_weights", type=Path, metavar="FILE", help="rgb_imagenet.pt or i3d_pretrained_400.pt, for rFVD")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the VAE (default: float32)")
    add("--whole", action="store_true", help="decode every clip at once, as in training, rather than in chunks")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Resolve the input paths and check the arguments.

    Raises:
        UserError: an argument is missing or wrong.
    """
    if not options.base:
        raise UserError("--base: missing; name the configuration of the VAE, for example configs/vae_3d.yaml")
    if not options.data:
        raise UserError("--data: missing; name a folder of clips, a .jsonl or .csv manifest, or .tar shards")
    options.data = clip_sources(options.data)
    locate_inputs(options, "ckpt", "lpips_weights", "i3d_weights")
    for name, least in (("num_clips", 2 if options.i3d_weights else 1), ("num_videos", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name}: got {getattr(options, name)}; it must be at least {least}")
    if options.lpips_weights and options.lpips_net == "none":
        raise UserError("--lpips_weights is given, but --lpips_net is none; leave one of them out")
    check_device(options.device, "--device")
    check_folder(options.output, "--output")
    if options.json:
        check_file(options.json, "--json")


def clip_sources(given: Sequence[str]) -> list[str]:
    """Return the sources of clips in `--data`, as resolved paths.

    Raises:
        UserError: a source does not exist, or is a cache of latents.
    """
    sources = located(list(given), "--data")
    for path in sources:
        is_pattern = path.endswith(".tar") and any(char in path for char in "{*?[")
        if not (is_pattern or "://" in path or Path(path).exists()):
            raise UserError(not_found("--data", path))
        if is_cache(path):
            raise UserError(f"--data: {path} has latents; name the clips that it was made from")
    return sources


# ---------------------------------------------------------------- configuration


def find_parts(
    model: Mapping[str, Any], config: MergedConfig, ckpt: Path | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the VAE and the data set that a configuration describes, checked without classes.

    Args:
        model: the `model:` section, with resolved paths.

    Raises:
        UserError: a value is wrong, or a part is missing.
    """
    check_model_values(model, config.sources)
    vae_config = find_vae(model, ckpt)
    data = config.get("data") or {}
    data_config = find_data(data, vae_config["params"])
    check_data_section(data, config.sources)
    check_parameters({"model": model, "data": data}, config.sources)
    return vae_config, data_config


def find_vae(model: Mapping[str, Any], ckpt: Path | None) -> dict[str, Any]:
    """Return the `target` and `params` of the VAE, without parts that only training needs.

    Raises:
        UserError: the section does not describe a VAE, or the weights do not exist.
    """
    section = "model" if "target" in model else "model.first_stage_config"
    described = model if "target" in model else model.get("first_stage_config") or {}
    params = described.get("params") or {}
    for part in ("encoder_config", "decoder_config", "regularizer_config"):
        if not isinstance(params.get(part), dict):
            raise UserError(f"{section}.params.{part}: missing; name the configuration of a video autoencoder")
    params = {name: params[name] for name in INFERENCE_PARAMS if params.get(name) is not None}
    if ckpt is not None:
        params["ckpt_path"] = str(ckpt)
    if "ckpt_path" not in params:
        raise UserError(f"--ckpt and {section}.params.ckpt_path are missing; give the VAE's weights as one of them")
    if not Path(params["ckpt_path"]).exists():
        raise UserError(f"{not_found(f'{section}.params.ckpt_path', params['ckpt_path'])}; or give --ckpt")
    return {"target": INFERENCE, "params": params}


def find_data(data: Mapping[str, Any], vae_params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `data:` section, with clip lengths that the VAE supports.

    Raises:
        UserError: the section is missing, or the VAE does not support its sizes.
    """
    if not isinstance(data.get("target"), str):
        raise UserError("data.target: missing; also name configs/sft.yaml, after the model's file")
    params = data.get("params") or {}
    if not isinstance(params, dict):
        raise UserError(f"data.params: got {shown(params)}; expected keys and values")
    time_factor, space_factor = compression(vae_params)
    check_clips(params, time_factor, space_factor)
    return {"target": data["target"], "params": {"frame_multiple": time_factor, **params}}


if __name__ == "__main__":
    sys.exit(main())
