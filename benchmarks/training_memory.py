"""Print the expected memory of fine-tuning the released models, as a run logs it.

    python benchmarks/training_memory.py [--models cogvideox_2b cogvideox1.5_5b] [--write]
    python benchmarks/training_memory.py --counted [--layers 4] [--write]

One process at batch 1, with the settings of configs/sft.yaml (ZeRO 2, `sat.ops.FusedEmaAdam`), and latents encoded
before the run. The first table is for networks with recomputed activations. `--counted` compares each mode of
`checkpoint_activations` with a count of a whole step, from which the estimate must not differ much. Networks have no
weights here, so that any machine can print the tables.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "sat"), str(ROOT / "benchmarks")]

from harness import counted_with, markdown_table, tell  # noqa: E402

from cogvideox_sat.commands.flag_spellings import EitherSpellingParser  # noqa: E402
from cogvideox_sat.commands.startup import quiet_libraries  # noqa: E402
from cogvideox_sat.configuration.files import load_configs  # noqa: E402
from cogvideox_sat.configuration.shared_arguments import PRECISIONS  # noqa: E402
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


MODES = (True, "attention", False)  # of `checkpoint_activations`
AGREEMENT = 0.15  # largest relative difference of estimate and count


def main() -> None:
    parser = EitherSpellingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CLIPS), default=list(CLIPS))
    parser.add_argument("--counted", action="store_true", help="also count a whole step, for each mode of recomputing")
    parser.add_argument("--layers", type=int, help="layers of the counted networks (default: all)")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    args = parser.parse_args()
    quiet_libraries()
    if args.counted:
        rows = [row for name in args.models for lora in (True, False) for row in counted_rows(name, lora, args.layers)]
        header = ["", "trained", "checkpoint_activations", "estimate, GiB", "counted, GiB", "estimate / counted"]
        title = "Memory of training, counted"
    else:
        rows = [[described(name), *(cell(name, *column) for column in COLUMNS.values())] for name in args.models]
        header, title = ["GiB", *COLUMNS], "Memory of training"
    text = f"{counted_with()}\n\n{markdown_table(header, rows)}"
    far = [row for row in rows if abs(float(row[-1]) - 1) > AGREEMENT] if args.counted else []
    tell(title, text, args.write and not far)
    if far:
        raise SystemExit(f"{len(far)} estimates are further than {AGREEMENT:.0%} from what is counted")


def described(model: str) -> str:
    clip = CLIPS[model]
    return f"{model}, {clip.frames}×{clip.height}×{clip.width}"


def cell(model: str, lora: bool, processes: int, zero: dict[str, Any]) -> str:
    """Return the memory of one process, and of the host if something is offloaded to it."""
    engine, layout = planned(model, lora, processes, zero)
    from cogvideox_sat.files.sizes import GIB
    from cogvideox_sat.training.memory_estimate import estimate_memory

    memory = estimate_memory(engine, layout, CLIPS[model], 1)
    host = f" + {memory.host / GIB:.3g} on the host" if memory.host else ""
    return f"{memory.total / GIB:.1f}{host}"


def counted_rows(model: str, lora: bool, layers: int | None) -> list[list[str]]:
    """Return a row for each of `MODES`."""
    engine, layout = planned(model, lora, 1, {}, layers)
    from measuring.training_peak import counted_peak

    from cogvideox_sat.files.sizes import GIB
    from cogvideox_sat.training.memory_estimate import estimate_memory

    network, estimates = engine.network, {}
    for mode in MODES:
        network.transformer.checkpoint_activations = mode
        without_buffers = replace(layout, bucket_bytes=0)
        estimates[mode] = estimate_memory(engine, without_buffers, CLIPS[model], 1).total
    width = engine.config["network_config"]["params"]["modules"]["patch_embed_config"]["params"]["text_hidden_size"]
    counted = counted_peak(network, CLIPS[model], list(MODES), width)
    kind = "LoRA" if lora else "all weights"
    name = described(model) + (f", {layers} layers" if layers else "")
    return [
        [
            name,
            kind,
            str(mode).lower(),
            f"{estimates[mode] / GIB:.2f}",
            f"{peak / GIB:.2f}",
            f"{estimates[mode] / peak:.3f}",
        ]
        for mode, peak in counted.items()
    ]


def planned(model: str, lora: bool, processes: int, zero: dict[str, Any], layers: int | None = None) -> tuple[Any, Any]:
    """Return the engine of a run, without weights, and the run's `Layout`.

    Activations are recomputed.
    """
    files = [f"{model}_lora.yaml" if lora else f"{model}.yaml", "sft.yaml"]
    from cogvideox_sat.configuration.settings import EngineSettings
    from cogvideox_sat.memory.weightless import WeightlessEngine  # imports PyTorch
    from cogvideox_sat.training.memory_estimate import Layout

    config = load_configs([ROOT / "configs" / name for name in files])
    section = config["deepspeed"]
    section["zero_optimization"] |= zero
    params = config["model"]["network_config"]["params"]
    params["transformer_args"]["checkpoint_activations"] = True
    params["num_layers"] = layers or params["num_layers"]
    precision = {name: bool(config["args"].get(name)) for name in PRECISIONS}
    settings = EngineSettings(config["model"], **precision)
    engine = WeightlessEngine(settings, parts=("model",), device="cuda")  # only the device's name is used
    engine.disable_untrainable_params()
    return engine, Layout.from_config(section, engine.dtype, processes)


if __name__ == "__main__":
    main()
