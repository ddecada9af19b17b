"""Report and contact sheet of a data set for the page, made by `--inspect_data`."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from cogvideox_sat.web import markup
from cogvideox_sat.web.program import Program, training_words
from cogvideox_sat.web.shelves import Shelf
from cogvideox_sat.web.texts import Texts
from sgm.errors import UserError, one_line, shown

SECONDS = 300.0  # to look at a data set
KEPT = 20  # sheets
SHAPES = 12  # that are listed


@dataclass(frozen=True)
class Report:
    """Result of inspecting a data set as training would read it.

    Args:
        content: as `--inspect_data --json` prints it.
        sheet: name of the contact sheet; None: there is none.
        problem: why training would refuse the data set; empty: it would not.
    """

    content: Mapping[str, Any]
    sheet: str | None
    problem: str


class DataDesk:
    """Looks at data sets.

    Args:
        recipes: configuration files by name.
        data: what may be looked at.
    """

    def __init__(self, recipes: Mapping[str, Sequence[str]], data: Shelf):
        self.recipes, self.data = recipes, data
        self.folder = Path(tempfile.mkdtemp(prefix="cogvideox-web-sheets-"))
        self.sheets = Shelf(self.folder, "sheet", lambda path: path.suffix == ".png" and path.is_file())

    def look(self, recipe: object, name: object) -> Report:
        """Return what a network that is trained by a recipe would see of a data set.

        Raises:
            UserError: the recipe or the data set is not offered, or it cannot be looked at.
        """
        if not isinstance(recipe, str) or recipe not in self.recipes:
            raise UserError(f"recipe: got {shown(recipe)}; it can be {', '.join(self.recipes)}")
        if not name:
            raise UserError("train_data: nothing is chosen; choose a data set")
        place = self.data.path(name)
        for old in sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)[:-KEPT]:
            old.unlink(missing_ok=True)
        sheet = self.folder / f"{token_hex(8)}.png"
        words = ["--base", *self.recipes[recipe], "--train_data", str(place), "--inspect_data", "--json"]
        words += ["--contact_sheet", str(sheet), "--num_workers", "0"]
        program = Program([*training_words(1), *words], capture=True)
        if program.wait(SECONDS) is None:
            program.stop(9)
            raise UserError(f"train_data: looking at it took more than {SECONDS:g} s; choose a part of it")
        problem = one_line(self.brief(program.error))
        try:
            content = json.loads(program.output)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise UserError(problem or f"train_data: it cannot be looked at (exit code {program.code})")
        return Report(self.brief_content(content), sheet.name if sheet.is_file() else None, problem)

    def brief(self, text: str) -> str:
        """Return a text with paths in the data folder replaced by the names on the page."""
        return text.replace(f"{self.data.root}/", "").replace(str(self.folder), "")

    def brief_content(self, content: Any) -> Any:
        """Return a report in which nothing is named by a path."""
        if isinstance(content, dict):
            return {self.brief(str(name)): self.brief_content(value) for name, value in content.items()}
        if isinstance(content, list):
            return [self.brief_content(value) for value in content]
        return self.brief(content) if isinstance(content, str) else content

    def close(self) -> None:
        """Remove the sheets."""
        shutil.rmtree(self.folder, ignore_errors=True)


def shown_report(report: Report, texts: Texts) -> str:
    """Return a report as HTML."""
    parts = [markup.problem(report.problem)] if report.problem else []
    data = report.content.get("train_data") or {}
    shapes = list((data.get("shapes") or {}).items())
    rows = {
        texts["data_clips"]: data.get("samples"),
        texts["data_captions_missing"]: data.get("captions_missing"),
        texts["data_shapes"]: ", ".join(f"{count} × {shape}" for shape, count in shapes[:SHAPES]),
        texts["data_unreadable"]: len(data.get("unreadable") or ()),
    }
    parts.append(markup.table({name: "–" if value in (None, "") else value for name, value in rows.items()}))
    lines = [f"{texts['data_unreadable']}: {line}" for line in data.get("unreadable") or ()]
    for place in data.get("places") or ():
        for reason, left in (place.get("left_out") or {}).items():
            lines.append(f"{texts['data_left_out']}: {left['count']} {reason}: {', '.join(left['examples'])}")
        lines += [f"{texts['data_hint']}: {hint}" for hint in place.get("hints") or ()]
    if lines:
        parts.append(markup.items(lines[:50]))
    if report.sheet is None:
        parts.append(markup.note(texts["data_no_sheet"]))
    else:
        source = markup.address("media", "sheet", report.sheet)
        parts.append(f'<img class="sheet" alt="{markup.escaped(texts["data_sheet"])}" src="{source}">')
    return "".join(parts)
