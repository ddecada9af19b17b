"""The tab of data sets: what the network would see of one."""

from typing import Any

import gradio as gr

from cogvideox_sat.web import markup
from cogvideox_sat.web.data_desk import DataDesk, shown_report
from cogvideox_sat.web.texts import Texts
from sgm.errors import UserError, one_line


class DataTab:
    """The tab, drawn in the surrounding block."""

    def __init__(self, desk: DataDesk, texts: Texts):
        self.desk, self.texts = desk, texts
        self.lists: list[Any] = []  # of data sets
        if not desk.recipes or desk.data.root is None:
            gr.HTML(markup.note(texts["data_off"]))
            return
        recipes = list(desk.recipes)
        with gr.Row():
            label = texts["training_recipe"]
            recipe = gr.Dropdown(recipes, value=recipes[0], label=label, elem_classes=["data_recipe"])
            label = texts["training_train_data"]
            data = gr.Dropdown(desk.data.names(), value=None, label=label, elem_classes=["data_set"])
        self.lists.append(data)
        look = gr.Button(texts["data_look"], variant="primary", elem_classes=["look"])
        view = gr.HTML(elem_classes=["data_view"])
        look.click(self.look, [recipe, data], view, api_name="data", concurrency_limit=1, show_progress="hidden")

    def offer_lists(self) -> list[Any]:
        """Return the data sets that are there now, for each list of them."""
        return [gr.update(choices=self.desk.data.names()) for _ in self.lists]

    def look(self, recipe: str, name: str | None) -> Any:
        """Yield that it goes on, and then what the network would see."""
        yield markup.note(self.texts["data_looking"])
        try:
            yield shown_report(self.desk.look(recipe, name), self.texts)
        except UserError as error:
            yield markup.problem(one_line(str(error)))
