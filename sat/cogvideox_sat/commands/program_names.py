"""Name programs as the user starts them: as scripts, or as the command `cogvideox`.

Nothing here imports PyTorch.
"""

import re
import shlex
import sys
from pathlib import Path

from cogvideox_sat.files.shipped import INSTALLED, ROOT

COMMAND = "cogvideox"
MODULE = "cogvideox_sat.command_line"  # the module that torchrun starts
SCRIPTS = {
    "inference.sh": "sample",
    "sat/sample_video.py": "sample",
    "sat/train_video.py": "train",
    "sat/train_vae.py": "train-vae",
    "tools/estimate_memory.py": "memory",
    "tools/web.py": "web",
}
# Subcommands of `cogvideox convert`: tools/NAME.py.
TOOLS = {
    "convert_weight_hf2sat": "a pipeline of diffusers to checkpoints and configurations",
    "convert_weight_sat2hf": "a checkpoint to a pipeline of diffusers",
    "export_sat_lora_weight": "a trained adapter to a LoRA file of diffusers",
    "import_hf_lora": "a LoRA file of diffusers to an adapter",
    "merge_lora": "a checkpoint and adapters to one checkpoint",
    "export_weights": "a checkpoint to one safetensors file",
    "precompute_latents": "clips and captions to latents and embeddings to train on",
    "decode_latents": "latents to videos",
}
_START = re.compile(
    r"(?P<launcher>torchrun (?:--\S+ )*)?(?:(?:python|bash) )?(?P<script>(?:sat|tools)/\w+\.py|inference\.sh)\b"
)


def by_command() -> bool:
    """Return whether this program was started as `cogvideox`, or is installed without scripts."""
    return INSTALLED or sys.argv[0].partition(" ")[0] == COMMAND


def as_started(text: str, runnable: bool = False) -> str:
    """Return a text that names the commands of `cogvideox` instead of scripts, if that runs.

    Scripts without a command of their own are not replaced.

    Args:
        runnable: the text is a command to copy: outside of the repository's root it names scripts by their absolute
            paths.
    """
    if by_command():
        return _START.sub(_command, text)
    return _START.sub(_placed, text) if runnable and Path.cwd() != ROOT else text


def _placed(match: re.Match[str]) -> str:
    script = match["script"]
    return match[0].removesuffix(script) + shlex.quote(str(ROOT / script))


def _command(match: re.Match[str]) -> str:
    script = match["script"]
    name = script.removeprefix("tools/").removesuffix(".py")
    command = SCRIPTS.get(script) or (f"convert {name}" if name in TOOLS else None)
    if command is None:
        return match[0]
    launcher = match["launcher"]
    return f"{launcher}-m {MODULE} {command}" if launcher else f"{COMMAND} {command}"
