"""Print the device memory of sampling: --fit's estimate, and a count on fake tensors.

    python benchmarks/sampling_memory.py [--models cogvideox_5b cogvideox1.5_5b] [--all] [--write]

The counted figures are those of a whole run: the command's code with every layer, on tensors without content. Any
machine can print them, without weights. CUDA itself takes about 1 GiB in addition.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "sat"), str(ROOT / "benchmarks")]

from harness import config_name, counted_with, markdown_table, tell  # noqa: E402

from cogvideox_sat.commands.flag_spellings import EitherSpellingParser  # noqa: E402
from cogvideox_sat.commands.startup import quiet_libraries  # noqa: E402
from cogvideox_sat.configuration.files import load_configs  # noqa: E402
from cogvideox_sat.configuration.shared_arguments import PRECISIONS  # noqa: E402

if TYPE_CHECKING:
    from cogvideox_sat.configuration.settings import EngineSettings
    from cogvideox_sat.memory.sampling_peaks import VideoSize

MODELS = ("cogvideox_2b", "cogvideox_5b", "cogvideox1.5_5b", "cogvideox1.5_5b_i2v")
I2V_SIZE = (768, 1360)  # for 1.5 image-to-video, whose configuration has no size
SECTION = "Memory of sampling, counted on fake tensors"


class Request(NamedTuple):
    """A sampling request: a model's settings and the size of a video."""

    settings: "EngineSettings"
    video: "VideoSize"


def main() -> None:
    parser = EitherSpellingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=config_name, default=list(MODELS), metavar="NAME")
    parser.add_argument("--layers", type=int, help="layers of the network, for a quick test (default: all)")
    parser.add_argument("--all", action="store_true", help="every policy, not only the default and the least")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    options = parser.parse_args()
    quiet_libraries()
    rows = [row for name in options.models for row in rows_of(name, options.layers, options.all)]
    header = ["", "text encoder", "network", "VAE", "largest", "estimate", "estimate / counted"]
    text = f"GiB beside about 1 of CUDA itself. {counted_with()}\n\n{markdown_table(header, rows)}"
    tell(SECTION, text, options.write)


def rows_of(model: str, layers: int | None, all_policies: bool) -> list[list[str]]:
    """Return a row for each policy of sampling with a model."""
    from measuring.fake_memory import stage_peaks

    from cogvideox_sat.files.sizes import GIB
    from cogvideox_sat.memory.sampling_peaks import LIBRARIES, NETWORK, TEXT, VIDEO, MemoryPolicy, SamplingMemory

    request = read(model, layers)
    memory = SamplingMemory(request.settings, [request.video])
    policies = [MemoryPolicy("stage", 2), MemoryPolicy("sequential", 1, 4)]
    if all_policies:
        policies = [
            MemoryPolicy(*each)
            for each in (("none", 2), ("stage", 2), ("stage", 1, 8), ("sequential", 2), ("sequential", 1, 4))
        ]
    rows = []
    for policy in policies:
        counted = stage_peaks(request.settings, request.video, policy, steps=2)
        largest, told = max(counted.values()), memory.peak(policy) - LIBRARIES
        cells = [f"{counted[stage] / GIB:.2f}" for stage in (TEXT, NETWORK, VIDEO)]
        figures = [f"{largest / GIB:.2f}", f"{told / GIB:.2f}", f"{told / largest:.2f}"]
        rows.append([f"{model}, {described(request.video)}, {policy}", *cells, *figures])
    return rows


def described(video: "VideoSize") -> str:
    return f"{video.latent_frames} latent frames of {video.height}×{video.width}"


def read(model: str, layers: int | None) -> Request:
    """Return the request of a configuration."""
    from cogvideox_sat.configuration.settings import EngineSettings
    from cogvideox_sat.memory.sampling_peaks import VideoSize

    config = load_configs([ROOT / "configs" / f"{model}.yaml"])
    args = config["args"]
    if layers is not None:
        config["model"]["network_config"]["params"]["num_layers"] = layers
    precision = {name: bool(args.get(name)) for name in PRECISIONS}
    height, width = args.get("sampling_image_size") or I2V_SIZE
    return Request(EngineSettings(config["model"], **precision), VideoSize(args["sampling_num_frames"], height, width))


if __name__ == "__main__":
    main()
