"""Training runs of the page: the choices and the run in a process of its own.

Nothing here imports PyTorch.
"""

import json
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from cogvideox_sat.configuration.training_arguments import training_arguments_from_names
from cogvideox_sat.web.making import number, text_of, whole
from cogvideox_sat.web.program import Program, training_words
from cogvideox_sat.web.shelves import Shelf
from sgm.errors import UserError, shown

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
# What the page asks for, in its order.
INPUTS = (
    *("recipe", "train_data", "valid_data", "name", "train_iters", "batch_size", "learning_rate"),
    *("save_interval", "eval_interval", "seed", "prompts"),
)
LIMITS = {
    "train_iters": (1, 10_000_000),
    "batch_size": (1, 4096),
    "save_interval": (1, 10_000_000),
    "eval_interval": (1, 10_000_000),
    "seed": (0, 2**63 - 1),
}
BATCH_SIZE = "deepspeed.train_micro_batch_size_per_gpu"
LEARNING_RATE = "deepspeed.optimizer.params.lr"
LOGS = 50  # lines of metrics of a run, about
MOST_PROMPTS = 8  # whose videos are made at each evaluation
PATIENCE = 20.0  # seconds to save when the page ends


@dataclass(frozen=True)
class Plan:
    """A run to start: arguments of the command, and keys of its configuration."""

    recipe: Sequence[str]
    arguments: Mapping[str, Any]
    settings: Mapping[str, Any]

    def words(self) -> list[str]:
        """Return the flags of the command."""
        words = ["--base", *self.recipe]
        for name, value in self.arguments.items():
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        if self.settings:
            words += ["--set", *(f"{name}={value}" for name, value in self.settings.items())]
        return words


class TrainingDesk:
    """Starts and stops training runs, one at a time.

    Args:
        recipes: configuration files by name.
        data, runs: what may be trained on, and the folder of the runs.
        processes: how many train together.
    """

    def __init__(self, recipes: Mapping[str, Sequence[str]], data: Shelf, runs: Shelf, processes: int = 1):
        self.recipes, self.data, self.runs, self.processes = recipes, data, runs, processes
        self.program: Program | None = None
        self.title = ""
        self._known: set[str] = set()  # runs that were there before
        self._starts = threading.Lock()
        self.folder = Path(tempfile.mkdtemp(prefix="cogvideox-web-prompts-"))

    def start(self, values: Mapping[str, Any]) -> None:
        """Start a run.

        Args:
            values: what was filled in, by the names of `INPUTS`; None or "" for nothing.

        Raises:
            UserError: a value is wrong, or another run is going on.
        """
        plan = self.plan(values)
        # What the command would say of it, at once.
        training_arguments_from_names(list(plan.recipe), plan.arguments, plan.settings)
        with self._starts:
            if self.is_running():
                raise UserError(f"training: {self.title} is running; stop it, or wait until it has ended")
            self._known = set(self.runs.names())
            self.title = plan.arguments["experiment_name"]
            self.program = Program([*training_words(self.processes), *plan.words()])

    def plan(self, values: Mapping[str, Any]) -> Plan:
        """Return what was filled in as arguments of the command.

        Raises:
            UserError: a value is wrong.
        """
        if self.runs.root is None:
            raise UserError("runs: the page has no folder for runs; start it with --runs DIR")
        recipe = self.recipe(values.get("recipe"))
        given = {name: value for name, value in values.items() if value not in (None, "", [])}
        if "train_data" not in given:
            raise UserError("train_data: nothing is chosen; choose a data set")
        name = given.get("name", "page")
        if not isinstance(name, str) or not RUN_NAME.fullmatch(name):
            raise UserError(f"name: got {shown(name)}; expected up to 40 letters, digits, - and _")
        numbers = {key: whole(given[key], key, *LIMITS[key]) for key in LIMITS if key in given}
        settings: dict[str, Any] = {}
        if "batch_size" in numbers:
            settings[BATCH_SIZE] = numbers.pop("batch_size")
        if "learning_rate" in given:
            rate = number(given["learning_rate"], "learning_rate", 0, 1)
            settings[LEARNING_RATE] = rate
        arguments: dict[str, Any] = {
            "train_data": [str(self.data.path(given["train_data"]))],
            "save": str(self.runs.root),
            "experiment_name": name,
            "log_interval": max(1, numbers.get("train_iters", 1000) // (4 * LOGS)),
            "only_log_video_latents": False,
            **numbers,
        }
        if "valid_data" in given:
            arguments["valid_data"] = [str(self.data.path(given["valid_data"]))]
        if lines := prompts_of(given.get("prompts", "")):
            arguments["valid_prompts"] = str(self.written(lines))
        if not {"valid_data", "valid_prompts"} & arguments.keys():
            arguments.pop("eval_interval", None)
        return Plan(recipe, arguments, settings)

    def written(self, prompts: Sequence[str]) -> Path:
        """Write a prompt file of these prompts and return its path.

        The prompts cannot name files, because each line is an object with only a text.
        """
        lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
        path = self.folder / f"{token_hex(8)}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def recipe(self, name: object) -> Sequence[str]:
        """Return the configuration files of a recipe, or raise UserError for an unknown one."""
        if not isinstance(name, str) or name not in self.recipes:
            raise UserError(f"recipe: got {shown(name)}; it can be {', '.join(self.recipes)}")
        return self.recipes[name]

    def is_running(self) -> bool:
        """Return whether a run is going on."""
        return self.program is not None and self.program.code is None

    def own_run(self) -> str | None:
        """Return the name of the run that was started last, once its folder is there."""
        new = [name for name in self.runs.names() if name not in self._known and name.startswith(f"{self.title}-")]
        return new[-1] if self.program is not None and new else None

    def stop(self) -> bool:
        """Ask the run to save and end; return whether one was running."""
        if not self.is_running() or self.program is None:
            return False
        self.program.stop()
        return True

    def close(self) -> None:
        """End the run that is going on, which saves first."""
        if self.stop() and self.program is not None and self.program.wait(PATIENCE) is None:
            self.program.stop(signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def prompts_of(text: object) -> list[str]:
    """Return prompts, one a line.

    Raises:
        UserError: there are too many, or one is too long.
    """
    lines = str(text).splitlines()
    found = [text_of(line, "prompts") for line in lines if line.strip()]
    if len(found) > MOST_PROMPTS:
        raise UserError(f"prompts: {len(found)} prompts; {MOST_PROMPTS} are the most")
    return found


def is_data(path: Path) -> bool:
    """Return whether a file or folder may be a data set: a folder, a manifest, or tar shards."""
    return path.is_dir() or path.suffix.lower() in (".jsonl", ".csv", ".tar")
