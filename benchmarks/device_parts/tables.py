"""Format results as Markdown: one table per part, with expectations beside measurements."""

from collections.abc import Sequence
from typing import Any

from device_parts.predictions import predicted
from device_parts.results import DONE, FAILED, Record
from device_parts.units import PARTS, Unit
from harness import markdown_table

# For each part the columns of its table, by their names in rows, which are also the headings.
COLUMNS: dict[str, Sequence[str]] = {
    "attention": ("forward ms", "forward TFLOP/s", "forward+backward ms, b=1", "TFLOP/s of both", "kernel"),
    "layer": ("ms", "launches", "elementwise U", "first call s"),
    "kernels": ("calls", "µs", "GB/s"),
    "networks": ("s a step", "floor s", "TFLOP/s", "peak GiB", "first call s"),
    "vae": ("s", "peak GiB"),
    "training": ("s a step", "peak GiB", "first step s"),
    "commands": ("s", "peak GiB", "reserved GiB"),
}
TITLES = {
    "attention": "Attention alone",
    "layer": "One layer",
    "kernels": "Operations and kernels of one layer",
    "networks": "Networks, one step with guidance",
    "vae": "VAE",
    "training": "Training, LoRA, one clip a step",
    "commands": "The commands",
}
NOT_MEASURED = "-"


def report(records: Sequence[Record], units: Sequence[Unit]) -> str:
    """Return all tables, in the order of the parts, each followed by failed and skipped units.

    Rows with the name of an expectation are of the released sizes.
    """
    blocks = []
    for part in PARTS:
        names = {unit.name for unit in units if unit.part == part}
        own = [record for record in records if record.get("unit") in names]
        if not own:
            continue
        blocks += [table(part, own), *lines_below(own)]
        if any(record.get("table") for record in own):
            blocks.append(table("kernels", own))
    return "\n\n".join(blocks)


def table(kind: str, records: Sequence[Record]) -> str:
    """Return one table with its title, from the rows of `records` that belong to it."""
    columns = COLUMNS[kind]
    rows = []
    for record in records:
        if "row" not in record or record.get("table", kind if kind != "kernels" else None) != kind:
            continue
        if "failed" in record:
            rows.append([_cell(record["row"]), f"failed: {_cell(record['failed'])}", *[""] * (len(columns) - 1)])
        else:
            cells = [_measurement(kind, record, column) for column in columns]
            rows.append([_cell(record["row"]), *cells])
    text = markdown_table(["", *columns], rows) if rows else "Nothing was measured."
    return f"### {TITLES[kind]}\n\n{text}"


def lines_below(records: Sequence[Record]) -> list[str]:
    """Return the notes and the units that did not succeed, as a block or nothing."""
    notes = dict.fromkeys(record["note"] for record in records if "note" in record)
    ends = [f"{each['unit']}: {each['state']}: {each['why']}" for each in records if each.get("state", DONE) != DONE]
    lines = [f"* {_cell(line)}" for line in (*notes, *ends)]
    return ["\n".join(lines)] if lines else []


def failures(records: Sequence[Record]) -> list[str]:
    """Return the names of failed rows and units, except rows that may not fit into memory."""
    rows = [record["row"] for record in records if "failed" in record and not record.get("may_not_fit")]
    return rows + [record["unit"] for record in records if record.get("state") == FAILED]


def _measurement(kind: str, record: Record, column: str) -> str:
    """Return a value, and in parentheses the expectation with its mark."""
    value = record["values"].get(column)
    expected = record.get("expected", {}).get(column) or predicted(kind, record["row"], column)
    shown = NOT_MEASURED if value is None else _number(value)
    return f"{shown} ({_number(expected[0])} [{expected[1]}])" if expected else shown


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return _cell(str(value))
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
