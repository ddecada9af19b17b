"""Training tab, which starts, stops and follows a run with its curves and videos."""

from collections.abc import Mapping
from typing import Any

import gradio as gr

from cogvideox_sat.web import markup, run_views
from cogvideox_sat.web.texts import Texts
from cogvideox_sat.web.training_desk import INPUTS, TrainingDesk
from sgm.errors import UserError, one_line

REFRESH = 2.0  # seconds between two looks at a run
CHOICES = ("recipe", "train_data", "valid_data")
USUAL: Mapping[str, Any] = {"name": "page", "train_iters": 200, "save_interval": 100, "eval_interval": 50}


class TrainingTab:
    """The tab, drawn in the surrounding block."""

    def __init__(self, desk: TrainingDesk, texts: Texts):
        self.desk, self.texts = desk, texts
        self.inputs: dict[str, Any] = {}
        if not desk.recipes or desk.runs.root is None or desk.data.root is None:
            gr.HTML(markup.note(texts["training_off"]))
            return
        with gr.Row():
            with gr.Column(scale=2):
                self.draw_inputs()
                with gr.Row():
                    start = gr.Button(texts["training_start"], variant="primary", elem_classes=["train"])
                    stop = gr.Button(texts["training_stop"], elem_classes=["stop"])
                said = gr.HTML(elem_classes=["training_said"])
            with gr.Column(scale=3):
                runs = desk.runs.names()
                run = gr.Dropdown(runs, value=None, label=texts["training_run"], elem_classes=["run"])
                view = gr.HTML(elem_classes=["training_view"])
        quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
        inputs = [self.inputs[name] for name in INPUTS]
        start.click(self.start, inputs, said, api_name="train", **quiet)
        stop.click(self.stop, None, said, api_name="stop_training", **quiet)
        quiet["api_visibility"] = "private"
        known = gr.State(("", ""))
        run.change(self.look, run, view, **quiet)
        gr.Timer(REFRESH).tick(self.refresh, [run, known], [run, view, said, known], **quiet)

    def draw_inputs(self) -> None:
        texts, desk, add = self.texts, self.desk, self.inputs
        recipes, data = list(desk.recipes), desk.data.names()
        for name in INPUTS:
            label, box = texts[f"training_{name}"], [f"training_{name}"]
            if name == "recipe":
                add[name] = gr.Dropdown(recipes, value=recipes[0], label=label, elem_classes=box)
            elif name in CHOICES:
                add[name] = gr.Dropdown(data, value=None, label=label, elem_classes=box)
            else:
                hint = texts.get(f"training_{name}_hint")
                value, lines = str(USUAL.get(name, "")), 3 if name == "prompts" else 1
                add[name] = gr.Textbox(value, label=label, info=hint, elem_classes=box, lines=lines)

    def start(self, *values: Any) -> str:
        """Start a run; return what is said about that."""
        try:
            self.desk.start(dict(zip(INPUTS, values, strict=True)))
        except UserError as error:
            return markup.problem(one_line(str(error)))
        return markup.note(self.texts["training_started"])

    def stop(self) -> str:
        """Ask the run to end; return what is said about that."""
        return markup.note(self.texts["training_stopping" if self.desk.stop() else "training_none"])

    def state(self) -> str:
        """Return how the run is that was started here, and the end of what it says."""
        desk, texts = self.desk, self.texts
        program = desk.program
        if program is None:
            return ""
        if program.code is None:
            said = markup.note(texts["training_running"].format(name=desk.title))
        elif program.code == 0:
            said = markup.note(texts["training_ended"].format(name=desk.title))
        else:
            reason = program.error or texts["training_failed"].format(code=program.code)
            said = markup.problem(reason.replace(f"{desk.data.root}/", "").replace(f"{desk.runs.root}/", ""))
        return said + run_views.log(program.log())

    def look(self, name: str | None) -> str:
        """Return the curves and the videos of a run."""
        if not name:
            return markup.note(self.texts["training_choose"])
        try:
            metrics = run_views.read_metrics(self.desk.runs.path(name) / run_views.METRICS)
            shown = run_views.curves(metrics) + run_views.videos(self.desk.runs, name, self.texts)
        except UserError as error:
            return markup.problem(one_line(str(error)))
        return shown or markup.note(self.texts["training_no_numbers"])

    def refresh(self, chosen: str | None, known: tuple[str, str]) -> list[Any]:
        """Return updates of the run list, the shown run and the state, and the new `known`.

        What has not changed is left alone: a list that is open stays open, and videos play on.
        """
        runs, own = self.desk.runs.names(), self.desk.own_run()
        name = chosen or own
        view, listed = self.look(name), f"{name} {runs}"
        return [
            gr.skip() if listed == known[0] else gr.update(choices=runs, value=name),
            gr.skip() if view == known[1] else view,
            self.state() or gr.skip(),
            (listed, view),
        ]

    def offer_lists(self) -> list[Any]:
        """Return the data sets that are there now, for each list of them."""
        return [gr.update(choices=self.desk.data.names()) for _ in self.lists]

    @property
    def lists(self) -> list[Any]:
        """Return the lists of data sets."""
        return [self.inputs[name] for name in ("train_data", "valid_data") if name in self.inputs]
