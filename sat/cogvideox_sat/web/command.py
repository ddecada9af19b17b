"""Show a page in the browser: videos, a gallery, live training and data sets.

  python tools/web.py                                                  the tiny models, on this machine alone
  python tools/web.py --model cogvideox_5b --model cogvideox_5b_i2v --offload stage
  python tools/web.py --model configs/cogvideox_2b.yaml configs/inference.yaml --adapters ckpts
  python tools/web.py --host 0.0.0.0 --auth users.txt                  for others too, who need a name and a password

The page is at http://127.0.0.1:7860 until the program is interrupted. Videos go to --output_dir, each with the .json
that makes it again; training runs go to --runs. What the page offers lies in the folders that are named here: it takes
no path and no key of a configuration. Exit codes: 0 the page was closed, 2 a mistake stands in the way.
"""

import argparse
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox_sat.commands.input_paths import required_input
from cogvideox_sat.commands.tool_parser import ToolParser, run_tool
from cogvideox_sat.files.output_paths import check_folder
from cogvideox_sat.web.auth import VARIABLE, users_of
from cogvideox_sat.web.gate import is_loopback
from cogvideox_sat.web.models import offered_models
from sgm.errors import UserError

if TYPE_CHECKING:
    from cogvideox_sat.web.server import Options

logger = logging.getLogger(__name__)

TINY = (("tiny",), ("tiny_i2v",), ("tiny_continue",))
TINY_RECIPES = tuple(
    (f"configs/tiny/{name}_lora.yaml", "configs/tiny/sft.yaml") for name in ("cogvideox_tiny", "cogvideox_tiny_i2v")
)
PACKAGE = "gradio"
LARGEST_UPLOAD = 4096  # MiB
LARGEST_PORT = 65535


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page; return the exit code."""
    return run_tool(show, arguments, "web")


def show(arguments: Sequence[str] | None) -> None:
    """Serve the page until the program is interrupted.

    Raises:
        UserError: an argument is wrong, or the page cannot be served.
    """
    options = checked(build_parser().parse_args(arguments))
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from cogvideox_sat.web.server import serve

    serve(options)


def build_parser() -> ToolParser:
    parser = ToolParser(__doc__ or "")
    add = parser.add_argument
    add("--model", nargs="+", action="append", metavar="MODEL", help=(
        "a model: tiny, tiny_i2v, tiny_continue, the name of a released one, the folder of a run or of a pipeline of "
        "diffusers, or configuration files; several times for several models (default: the tiny ones)"
    ))  # fmt: skip
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--dtype", help="float16, bfloat16 or float32 (default: as the model's configuration says)")
    add(
        "--offload", choices=("none", "stage", "sequential"), help="what leaves the device to make room (default: none)"
    )
    add("--fit", metavar="SIZE", help="memory of the device to stay within, such as 12GB, or auto")
    add("--output_dir", type=Path, default=Path("outputs/web"), metavar="DIR", help="videos (default: outputs/web)")
    add("--adapters", type=Path, metavar="DIR", help="folder whose adapters the page offers")
    add("--data", type=Path, metavar="DIR", help="folder whose data sets the page offers")
    add("--runs", type=Path, metavar="DIR", help="folder of training runs, which the page shows and to which it adds")
    add("--training", nargs="+", action="append", metavar="FILE", help=(
        "configuration files that make up a recipe to train with; several times for several recipes (default: those of "
        "the tiny models, where the page has these)"
    ))  # fmt: skip
    add("--processes", type=int, default=1, help="processes that train together, one a GPU (default: 1)")
    add("--host", default="127.0.0.1", help="address to listen on; another than 127.0.0.1 needs --auth")
    add("--port", type=int, default=7860, help="port to listen on, 0 for a free one (default: 7860)")
    add("--auth", nargs="?", const="", metavar="FILE", help=(
        f"ask for a name and a password: a file with name:password, one user a line; without a file {VARIABLE} has one"
    ))  # fmt: skip
    add("--names", nargs="+", default=[], metavar="NAME", help="further names by which browsers call this machine")
    add("--upload_limit", type=int, default=200, metavar="MIB", help="largest upload in MiB (default: 200)")
    return parser


def checked(given: argparse.Namespace) -> "Options":
    """Return what the command is told, once it is known to make sense.

    Raises:
        UserError: it does not.
    """
    users = users_of(given.auth)
    if not users and not is_loopback(given.host):
        raise UserError(f"host: {given.host} can be reached by others; give --auth too, or leave --host out")
    if not 0 <= given.port <= LARGEST_PORT:
        raise UserError(f"port: got {given.port}; expected a number from 0 to {LARGEST_PORT}")
    if not 1 <= given.upload_limit <= LARGEST_UPLOAD:
        raise UserError(f"upload_limit: got {given.upload_limit}; expected MiB from 1 to {LARGEST_UPLOAD}")
    check_folder(given.output_dir)
    for name in ("adapters", "data", "runs"):
        offered_folder(getattr(given, name), name)
    if given.processes < 1:
        raise UserError(f"processes: got {given.processes}; expected a whole number of at least 1")
    settings: dict[str, Any] = {
        name: value for name in ("device", "dtype", "offload", "fit") if (value := getattr(given, name)) is not None
    }
    models = offered_models(given.model or TINY, settings)
    if find_spec(PACKAGE) is None:
        raise UserError("the page needs gradio; install it: pip install 'gradio>=6.31'")
    from cogvideox_sat.web.server import Options

    return Options(
        models=models,
        output_dir=given.output_dir.absolute(),
        host=given.host,
        port=given.port,
        users=users,
        names=tuple(given.names),
        upload_limit=given.upload_limit * 2**20,
        adapters=given.adapters and given.adapters.absolute(),
        data=given.data and given.data.absolute(),
        runs=given.runs and given.runs.absolute(),
        recipes=recipes_of(given.training if given.training or given.model else TINY_RECIPES),
        processes=given.processes,
    )


def recipes_of(words: Sequence[Sequence[str]] | None) -> dict[str, list[str]]:
    """Return recipes to train with: configuration files by the name of the first one.

    Raises:
        UserError: a file does not exist, or two recipes have the same name.
    """
    found: dict[str, list[str]] = {}
    for files in words or ():
        name = Path(files[0]).stem
        if name in found:
            raise UserError(f"training: two recipes begin with {name}; name each once")
        found[name] = [str(required_input(file, "training")) for file in files]
    return found


def offered_folder(path: Path | None, argument: str) -> None:
    """Check that a folder exists if one is named, else raise UserError."""
    if path is not None and not path.is_dir():
        raise UserError(f"{argument}: the folder {path} does not exist; make it, or name another")
