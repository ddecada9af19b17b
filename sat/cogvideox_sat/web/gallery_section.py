"""Gallery below the tabs: the newest videos, a longer list of them, and "use again"."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from cogvideox_sat.web import markup, views
from cogvideox_sat.web.gallery import Entry
from cogvideox_sat.web.making import filled_in, model_for
from cogvideox_sat.web.making_tab import MakingTab
from cogvideox_sat.web.studio import Studio
from cogvideox_sat.web.texts import Texts
from cogvideox_sat.web.uploads import INPUTS, shown_files, with_files
from sgm.errors import UserError, one_line

LISTED = 500  # videos, the newest ones; their records are read once
FILES = ("image", "keyframes", "video")


class GallerySection:
    """The gallery of the page, drawn in the surrounding block.

    Args:
        tabs: those in which videos are made, by their names.
        all_tabs: what has them, to show the right one.
    """

    def __init__(self, studio: Studio, texts: Texts, tabs: dict[str, MakingTab], all_tabs: gr.Tabs):
        self.studio, self.texts, self.tabs = studio, texts, tabs
        gr.HTML(f"<h2>{markup.escaped(texts['gallery'])}</h2>")
        self.grid = gr.HTML(self.shown(), elem_classes=["videos"])
        with gr.Row():
            with gr.Column(scale=2):
                self.chosen = gr.Dropdown(
                    self.choices(), value=None, label=texts["chosen_video"], elem_classes=["chosen"]
                )
                again = gr.Button(texts["use_again"], elem_classes=["again"])
                self.said = gr.HTML(elem_classes=["said"])
            with gr.Column(scale=3):
                self.details = gr.HTML(elem_classes=["details"])
        self.chosen.change(self.look, self.chosen, self.details, api_visibility="private", show_progress="hidden")
        inputs = [tab.inputs[name] for tab in tabs.values() for name in tab.names]
        again.click(
            self.use_again, self.chosen, [all_tabs, self.said, *inputs], api_name="use_again", show_progress="hidden"
        )

    def shown(self) -> str:
        """Return the newest videos."""
        gallery = self.studio.gallery
        return views.grid(gallery.entries(), len(gallery.names()), self.texts)

    def choices(self) -> list[tuple[str, str]]:
        """Return the newest videos as the list has them."""
        return [(views.label(entry), entry.name) for entry in self.studio.gallery.entries(LISTED)]

    def look(self, name: str | None) -> str:
        """Return a video and what made it."""
        if not name:
            return ""
        try:
            return views.details(self.studio.gallery.entry(name), self.texts)
        except UserError as error:
            return markup.problem(one_line(str(error)))

    def use_again(self, name: str | None) -> list[Any]:
        """Return the tab to show, what is said, and what to fill in."""
        nothing = [gr.skip() for tab in self.tabs.values() for _ in tab.names]
        try:
            entry = self.studio.gallery.entry(name)
        except UserError as error:
            return [gr.skip(), markup.problem(one_line(str(error))), *nothing]
        if not entry.fields:
            return [gr.skip(), markup.problem(self.texts["no_settings"].format(name=entry.name)), *nothing]
        target = "picture" if shown_files(entry.fields) or "extend" in entry.fields else "text"
        if target not in self.tabs:
            target = next(iter(self.tabs))
        fields, is_complete = self.with_uploads(entry)
        text = self.texts["settings_filled_in" if is_complete else "files_gone"].format(name=entry.name)
        said = markup.note(text) if is_complete else markup.problem(text)
        updates: list[Any] = []
        for tab_name, tab in self.tabs.items():
            updates += self.filled(tab, entry, fields) if tab_name == target else [gr.skip() for _ in tab.names]
        return [gr.Tabs(selected=target), said, *updates]

    def filled(self, tab: MakingTab, entry: Entry, fields: dict[str, Any]) -> list[Any]:
        model = model_for(fields, tab.models, next(iter(tab.models)))
        values = filled_in(fields, entry.adapters, model, self.studio.adapters, tab.names)
        offered = tab.offered_names()
        updates = []
        for name in tab.names:
            offer = tab.offer_of(name, model) if name in offered else {}
            value = values[name] if values[name] is not None or name in FILES else offer.get("value", "")
            updates.append(gr.update(**{**offer, "value": value}))
        return updates

    def with_uploads(self, entry: Entry) -> tuple[dict[str, Any], bool]:
        """Return the fields of a video with their files as uploads, and if all files exist.

        Files are taken only from the folder in which the page keeps them.
        """
        kept = self.studio.gallery.folder / INPUTS
        try:
            return with_files(entry.fields, lambda path: self.studio.uploads.adopted(path, kept)), True
        except UserError:
            return {name: value for name, value in entry.fields.items() if name not in FILES}, False


def stamp(names: Sequence[str]) -> str:
    """Return what tells whether a gallery has changed."""
    return f"{len(names)} {names[0] if names else ''}"
