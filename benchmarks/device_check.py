"""Measure speed and memory of everything on one device, within 8 minutes on an H100.

    python benchmarks/device_check.py                              on a GPU, at the released sizes
    python benchmarks/device_check.py --parts networks,training    only these
    python benchmarks/device_check.py --resume                     the units that an earlier run did not finish
    python benchmarks/device_check.py --tables --write             into RESULTS.md, also on another machine
    python benchmarks/device_check.py --device cpu --size toy      a test of the check itself

Weights are random and made on the device. Each unit runs in its own process; if it crashes, hangs or fills the memory,
its row says so. Results are written at once, tables are printed last: measurements, and in parentheses expectations for
one H100 [M measured before, C counted, P published, E estimated].
Exit codes: 0 everything that ran was measured, 1 something failed, 2 the arguments are wrong.
"""

import argparse
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Container, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "sat"), str(ROOT / "benchmarks")]

from device_parts.results import Record, Results  # noqa: E402
from device_parts.running import LOG, UnitRunner, deadlines  # noqa: E402
from device_parts.tables import failures, report  # noqa: E402
from device_parts.units import FULL_BUDGET, PARTS, Unit, units_of  # noqa: E402
from harness import write_results  # noqa: E402

from cogvideox_sat.commands.flag_spellings import StrictParser  # noqa: E402
from sgm.errors import UserError  # noqa: E402
from sgm.exit_codes import exit_code  # noqa: E402

logger = logging.getLogger("device_check")

TABLES = "tables.md"
MACHINE = "machine"
PROBE_SECONDS = 240
EXPECTATIONS = "In parentheses: expected on one H100, [M] measured before, [C] counted, [P] published, [E] estimated."


def main(command_line: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return exit_code(lambda: run(arguments(command_line)), logger, "interrupted: --resume goes on", command_line)


def run(args: argparse.Namespace) -> int:
    """Run the check that the arguments describe; return the exit code.

    Raises:
        UserError: the arguments do not fit the machine or the output folder.
    """
    failed = tell_again(args) if args.tables else check(args)
    return 1 if failed else 0


def arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of a command line.

    Raises:
        UserError: a value is wrong.
    """
    parser = StrictParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=["full", "toy"], default="full", help="of networks and clips")
    parser.add_argument(
        "--budget", type=float, default=FULL_BUDGET, metavar="SECONDS", help="for all (default: %(default)s)"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="separated by commas (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(os.environ.get("OUT") or "device_check"),
        metavar="FOLDER",
        help="folder for results and profiles, replaced if they exist (default: $OUT, else device_check)",
    )
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run measured, go on with the rest")
    parser.add_argument(
        "--tables", action="store_true", help="measure nothing: print an earlier run's tables, on any machine"
    )
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    args = parser.parse_args(command_line)
    args.parts = list(dict.fromkeys(part.strip() for part in args.parts.split(",") if part.strip()))
    if unknown := [part for part in args.parts if part not in PARTS]:
        raise UserError(f"--parts: {unknown[0]!r} is unknown; choose from {', '.join(PARTS)}")
    if not args.parts:
        raise UserError(f"--parts: no part is given; choose from {', '.join(PARTS)}")
    if not 0 < args.budget < math.inf:
        raise UserError(f"--budget: {args.budget} is not a number of seconds; give one above 0")
    if args.size == "full" and args.device == "cpu" and not args.tables:
        raise UserError("--size: full needs a GPU; give --size toy")
    return args


def check(args: argparse.Namespace) -> list[str]:
    """Run the units and report the results; return the names of failures.

    Raises:
        UserError: the folder has results of another device or size, or the device does not exist.
    """
    start = time.monotonic()
    settings = {"device": args.device, "size": args.size}
    chosen = [unit for unit in units_of(args.size) if unit.part in args.parts]
    results = open_results(args, settings, chosen)
    work = Path(tempfile.mkdtemp(prefix="device_check-"))
    told = {**settings, "work": str(work)}
    runner = UnitRunner(results, told, {}, args.output / LOG)
    ended_by = signal.signal(signal.SIGTERM, interrupt)
    try:
        find_device(runner, results)
        now = time.monotonic()
        runner.deadline_of = deadlines(args.parts, args.budget - (now - start), now)
        try:
            run_units(runner, chosen, results.done())
        finally:
            text = tell(results, settings)
    finally:
        signal.signal(signal.SIGTERM, ended_by)
        shutil.rmtree(work, ignore_errors=True)
    names = {unit.name for unit in chosen}
    failed = failures([record for record in results.read() if record.get("unit") in names])
    logger.info("%.0f s; %s", time.monotonic() - start, f"failed: {', '.join(failed)}" if failed else "nothing failed")
    if args.write:
        write_results(section(settings), text)
    return failed


def tell_again(args: argparse.Namespace) -> list[str]:
    """Report the results in the output folder; return the names of failures.

    Raises:
        UserError: the folder has no results.
    """
    results = Results(args.output)
    settings = results.settings()
    if settings is None:
        raise UserError(f"--tables: {args.output} holds no results; name the --output of an earlier run")
    text = tell(results, settings)
    if args.write:
        write_results(section(settings), text)
    return failures(results.read())


def section(settings: Record) -> str:
    """Return the heading in RESULTS.md."""
    return f"One device run, {settings['device']}, {settings['size']}"


def run_units(runner: UnitRunner, units: Sequence[Unit], done: Container[str]) -> None:
    for unit in units:
        if unit.name in done:
            logger.info("%s: measured before", unit.name)
        else:
            runner.run(unit)


def open_results(args: argparse.Namespace, settings: Record, chosen: Sequence[Unit]) -> Results:
    """Return the results in the output folder; without `--resume` there are none.

    Raises:
        UserError: they are of another device or size, or the folder cannot be written.
    """
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        results = Results(args.output)
        kept: list[Record] = []
        if args.resume and (earlier := results.settings()):
            if earlier != settings:
                described = ", ".join(f"--{name} {value}" for name, value in earlier.items())
                raise UserError(f"--resume: {args.output} holds results of {described}; choose another --output")
            again = {unit.name for unit in chosen} - results.done()
            kept = [each for each in results.read() if "unit" in each and each["unit"] not in again]
        results.replace([{"settings": settings}, *kept])
        if not args.resume:
            (args.output / LOG).write_text("")
    except OSError as error:
        raise UserError(f"--output: {args.output} cannot be written to: {error.strerror or error}") from error
    return results


def find_device(runner: UnitRunner, results: Results) -> None:
    """Run the unit that describes the device.

    Raises:
        UserError: the device does not exist.
    """
    unit = Unit(MACHINE, "", "machine.describe", 0)
    if (code := runner.start_and_wait(unit, PROBE_SECONDS)) != 0:
        raise UserError(runner.reason(unit, code, PROBE_SECONDS).removeprefix("sgm.errors.UserError: "))
    logger.info("%s", machine_line(results))


def machine_line(results: Results) -> str:
    return next((record["machine"] for record in results.read() if "machine" in record), "")


def tell(results: Results, settings: Record) -> str:
    """Print the tables and write them to the output folder; return them."""
    records = results.read()
    device, size = settings["device"], settings["size"]
    seconds = sum(record.get("seconds", 0) for record in records)
    precision = "float32" if device == "cpu" else "bfloat16"
    setting = f"{size} size, {precision}; {machine_line(results)}; units took {seconds:.0f} s in all"
    if device == "cpu":
        setting += "; memory is that of the whole process"
    text = f"{setting}\n\n{EXPECTATIONS}\n\n{report(records, units_of(size))}"
    results.file.with_name(TABLES).write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return text


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
