"""The file of results: one JSON object per line, written at once to survive a killed run.

Kinds of record: `settings` (first), `machine`, and for a unit `row` with values or `failed`, `note`, and last `state`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cogvideox_sat.files.atomic import replaced_when_complete

Record = dict[str, Any]
FILE = "results.jsonl"
DONE, FAILED, SKIPPED = "done", "failed", "skipped"


class Results:
    """The results in a folder.

    Args:
        folder: an existing folder.
    """

    def __init__(self, folder: Path):
        self.file = folder / FILE

    def read(self) -> list[Record]:
        """Return all records, except an incomplete last line."""
        if not self.file.exists():
            return []
        records = []
        for line in self.file.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def append(self, record: Record) -> None:
        """Append one record to the file, flushed to the disk."""
        with self.file.open("a") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def replace(self, records: Iterable[Record]) -> None:
        """Replace all records by these."""
        with replaced_when_complete(self.file) as part:
            Path(part).write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def settings(self) -> Record | None:
        """Return the settings of the run, None for an empty folder."""
        return next((record["settings"] for record in self.read() if "settings" in record), None)

    def done(self) -> set[str]:
        """Return the names of the units that succeeded."""
        return {record["unit"] for record in self.read() if record.get("state") == DONE}

    def of_unit(self, unit: str) -> list[Record]:
        return [record for record in self.read() if record.get("unit") == unit]
