"""Expected memory of fine-tuning the released models: the estimate that a run logs before its first step, as a table.

    python benchmarks/training_memory.py [--models cogvideox_2b cogvideox1.5_5b]

One process at batch 1, with the settings of configs/sft.yaml (ZeRO 2, `sat.ops.FusedEmaAdam`), latents encoded before
the run, and activations recomputed. Networks have no weights here, so that any machine can print the table.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "sat"), str(ROOT / "benchmarks")]

from harness import markdown_table  # noqa: E402

from cogvideox_sat.commands.flag_spellings import EitherSpellingParser  # noqa: E402
from cogvideox_sat.commands.startup import quiet_libraries  # noqa: E402
from cogvideox_sat.configuration.argument_schema import PRECISIONS  # noqa: E402
from cogvideox_sat.configuration.files import load_configs  # noqa: E402
from cogvideox_sat.latent_geometry import Bucket  # noqa: E402

CLIPS = {  # frames, height, width
    "cogvideox_2b": Bucket(49, 480, 720),
    "cogvideox_5b": Bucket(49, 480, 720),
    "cogvideox1.5_5b": Bucket(81, 768, 1360),
}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
COLUMNS = {  # with an adapter, processes, changes of ZeRO's section
    "LoRA, 1 GPU": (True, 1, {}),
    "all weights, 1 GPU, optimizer offloaded": (False, 1, OFFLOAD),
    "all weights, 8 GPUs": (False, 8, {}),
}


def main() -> None:
    parser = EitherSpellingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CLIPS), default=list(CLIPS))
    models = parser.parse_args().models
    quiet_libraries()
    rows = [[described(name), *(cell(name, *column) for column in COLUMNS.values())] for name in models]
    print(markdown_table(["GiB", *COLUMNS], rows))  # noqa: T201


def described(model: str) -> str:
    clip = CLIPS[model]
    return f"{model}, {clip.frames}×{clip.height}×{clip.width}"


def cell(model: str, lora: bool, processes: int, zero: dict[str, Any]) -> str:
    """Return the memory of one process, and of the host where something is offloaded to it."""
    files = [f"{model}_lora.yaml" if lora else f"{model}.yaml", "sft.yaml"]
    from cogvideox_sat.configuration.settings import EngineSettings
    from cogvideox_sat.memory.weightless import GIB, WeightlessEngine  # imports PyTorch
    from cogvideox_sat.training.memory_estimate import Layout, estimate_memory

    config = load_configs([ROOT / "configs" / name for name in files])
    section = config["deepspeed"]
    section["zero_optimization"] |= zero
    config["model"]["network_config"]["params"]["transformer_args"]["checkpoint_activations"] = True
    precision = {name: bool(config["args"].get(name)) for name in PRECISIONS}
    settings = EngineSettings(config["model"], **precision)
    engine = WeightlessEngine(settings, parts=("model",), device="cuda")  # of which only the name counts
    engine.disable_untrainable_params()
    layout = Layout.from_config(section, engine.dtype, processes)
    memory = estimate_memory(engine, layout, CLIPS[model], 1)
    host = f" + {memory.host / GIB:.3g} on the host" if memory.host else ""
    return f"{memory.total / GIB:.1f}{host}"


if __name__ == "__main__":
    main()
