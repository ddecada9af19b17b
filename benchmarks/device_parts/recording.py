"""Write the results of units."""

import gc
import gzip
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from device_parts.results import Results

from sgm.errors import one_line
from sgm.memory_errors import describe_shortage, memory_cause

logger = logging.getLogger("device_check")

MOST_OF_AN_ERROR = 200  # characters in a table


class Recorder:
    """Takes the results of one unit.

    Attributes:
        device: the device to measure.
        toy: use small sizes.
        dtype: dtype of the computation.
        work: a folder for large temporary files.
    """

    def __init__(self, task: Mapping[str, Any]):
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        self.unit = task["unit"]
        self.device = torch.device(task["device"])
        if self.device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.init()  # required before reading memory statistics
        self.toy = task["size"] == "toy"
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.work = Path(task["work"])
        self.results = Results(Path(task["results"]).parent)

    def row(
        self,
        name: str,
        values: Mapping[str, Any],
        table: str | None = None,
        expected: Mapping[str, tuple[float, str]] | None = None,
    ) -> None:
        """Write a row.

        Args:
            values: by column, see `tables.COLUMNS`.
            table: the row's table; None: that of the unit's part.
            expected: by column, a number and its mark, see `predictions`.
        """
        record = {"unit": self.unit, "row": name, "values": dict(values)}
        extras = {"table": table, "expected": expected}
        self.results.append(record | {key: extra for key, extra in extras.items() if extra})

    def note(self, text: str) -> None:
        """Write a line for the notes below the table."""
        self.results.append({"unit": self.unit, "note": text})

    @contextmanager
    def attempt(self, row: str, may_not_fit: bool = False) -> Iterator[None]:
        """Turn an exception of the block into a failed row, and free the block's memory.

        Args:
            may_not_fit: full memory is a result, not a failure of the check.
        """
        self.free()  # memory that the last exception referred to
        try:
            yield
        except Exception as error:
            logger.exception("%s", row)
            cause = memory_cause(error)
            text = describe_shortage(cause) if cause else f"{type(error).__name__}: {error}"
            record = {"unit": self.unit, "row": row, "failed": one_line(text.strip(), MOST_OF_AN_ERROR)}
            self.results.append(record | ({"may_not_fit": True} if cause and may_not_fit else {}))
            del error, cause
        self.free()

    def free(self) -> None:
        """Free memory without references."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def keep_trace(self, profiler: torch.profiler.profile, name: str) -> None:
        """Write a profile beside the results, for chrome://tracing."""
        trace = self.work / f"{name}.json"
        profiler.export_chrome_trace(str(trace))
        with gzip.open(self.results.file.with_name(f"{name}.json.gz"), "wb") as file:
            file.write(trace.read_bytes())
