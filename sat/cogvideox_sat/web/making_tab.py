"""Tabs in which videos are made: inputs, buttons and progress."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from cogvideox_sat.configuration.request_fields import OfferedField
from cogvideox_sat.web import markup, views
from cogvideox_sat.web.making import PICTURE_INPUTS, TEXT_INPUTS, text_of
from cogvideox_sat.web.models import OfferedModel
from cogvideox_sat.web.refining import refined
from cogvideox_sat.web.studio import Studio
from cogvideox_sat.web.texts import Texts
from sgm.errors import UserError, one_line

logger = logging.getLogger(__name__)

LOOK = 0.2  # seconds between two looks at a job
PICTURES = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"]
CLIPS = [".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".webp", ".mpg", ".ts"]


@dataclass
class MakingTab:
    """A tab in which videos are made.

    Args:
        names: of its inputs, see `making.TEXT_INPUTS`.
        inputs: by name.
    """

    studio: Studio
    texts: Texts
    models: Mapping[str, OfferedModel]
    names: Sequence[str]
    inputs: dict[str, Any]

    @classmethod
    def build(
        cls, studio: Studio, texts: Texts, own_job: gr.BrowserState, pictures: bool, refines: bool
    ) -> "MakingTab":
        """Return the tab, drawn in the surrounding block.

        Args:
            own_job: the id of the last job of whoever looks at the page.
            pictures: with pictures and clips.
            refines: with the button that writes prompts out.
        """
        usual = [model for model in studio.models.values() if model.image_to_video == pictures]
        models = dict(studio.models) if pictures else {model.name: model for model in usual}
        tab = cls(studio, texts, models, PICTURE_INPUTS if pictures else TEXT_INPUTS, {})
        first = (usual or list(models.values()))[0]
        with gr.Row():
            with gr.Column(scale=3):
                refine = tab.draw_inputs(first, pictures, refines)
                with gr.Row():
                    make = gr.Button(texts["make"], variant="primary", elem_classes=["make"])
                    cancel = gr.Button(texts["cancel"], elem_classes=["cancel"])
            with gr.Column(scale=2):
                status = gr.HTML(elem_classes=["status"])
                result = gr.HTML(elem_classes=["made"])
        outputs = [status, result, own_job]
        make.click(
            tab.make,
            [tab.inputs[name] for name in tab.names],
            outputs,
            api_name="picture" if pictures else "text",
            show_progress="hidden",
            concurrency_limit=None,
            trigger_mode="multiple",
        )
        cancel.click(
            tab.cancel, own_job, status, show_progress="hidden", concurrency_limit=None, api_visibility="private"
        )
        tab.inputs["model"].input(  # not `change`: settings that are used again choose a model too
            tab.offer, tab.inputs["model"], [tab.inputs[name] for name in tab.offered_names()], api_visibility="private"
        )
        if refine is not None:
            image = [tab.inputs["image"]] if pictures else []
            refine.click(
                tab.refine,
                [tab.inputs["prompt"], *image],
                [tab.inputs["prompt"], status],
                api_name="refine_picture" if pictures else "refine",
                concurrency_limit=4,
            )
        tab.status, tab.result = status, result
        return tab

    status: Any = None
    result: Any = None

    # Drawing

    def draw_inputs(self, model: OfferedModel, pictures: bool, refines: bool) -> Any:
        """Draw the inputs; return the button that writes the prompt out, or None."""
        texts, add = self.texts, self.inputs
        add["model"] = gr.Dropdown(
            list(self.models),
            value=model.name,
            label=texts["model"],
            visible=len(self.models) > 1,
            elem_classes=["model"],
        )
        add["prompt"] = gr.Textbox(label=texts["prompt"], info=texts["prompt_hint"], lines=3, elem_classes=["prompt"])
        refine = gr.Button(texts["refine"], size="sm") if refines else None
        if refines:
            gr.HTML(markup.note(texts["refine_hint"]))
        if pictures:
            self.draw_pictures()
        with gr.Row():
            for name in ("height", "width"):
                add[name] = gr.Slider(label=texts[name], **self.offer_of(name, model))
            add["frames"] = gr.Dropdown(label=texts["frames"], **self.offer_of("frames", model))
            add["steps"] = gr.Number(label=texts["steps"], precision=0, **self.offer_of("steps", model))
            add["seed"] = gr.Textbox(label=texts["seed"], info=texts["seed_hint"], elem_classes=["seed"])
        with gr.Accordion(texts["more"], open=False):
            self.draw_more(model)
        return refine

    def draw_pictures(self) -> None:
        texts, add = self.texts, self.inputs
        with gr.Row():
            add["image"] = gr.File(label=texts["image"], file_types=PICTURES, elem_classes=["image"], height=120)
            add["keyframes"] = gr.File(
                label=texts["keyframes"],
                file_types=PICTURES,
                file_count="multiple",
                elem_classes=["keyframes"],
                height=120,
            )
            add["video"] = gr.File(label=texts["video"], file_types=CLIPS, elem_classes=["clip"], height=120)
        with gr.Row():
            add["keyframes_at"] = gr.Textbox(
                label=texts["keyframes_at"], info=texts["keyframes_at_hint"], elem_classes=["keyframes_at"]
            )
            add["strength"] = gr.Textbox(
                label=texts["strength"], info=texts["strength_hint"], elem_classes=["strength"]
            )
            add["extend"] = gr.Textbox(
                label=texts["extend"], info=texts["extend_hint"], lines=1, elem_classes=["extend"]
            )

    def draw_more(self, model: OfferedModel) -> None:
        texts, add = self.texts, self.inputs
        add["negative_prompt"] = gr.Textbox(
            label=texts["negative_prompt"],
            info=texts["negative_prompt_hint"],
            **self.offer_of("negative_prompt", model),
        )
        with gr.Row():
            add["fps"] = gr.Number(label=texts["fps"], precision=0, **self.offer_of("fps", model))
            add["sampler"] = gr.Dropdown(label=texts["sampler"], **self.offer_of("sampler", model))
            add["guidance_scale"] = gr.Number(label=texts["guidance_scale"], **self.offer_of("guidance_scale", model))
        with gr.Row():
            for name in ("interval_from", "interval_to"):
                add[name] = gr.Number(label=texts[name], info=texts["interval_hint"], **self.offer_of(name, model))
            add["guidance_schedule"] = gr.Dropdown(
                label=texts["guidance_schedule"], **self.offer_of("guidance_schedule", model)
            )
        names = self.studio.adapters.names()
        with gr.Row(visible=self.studio.adapters.root is not None):
            add["adapters"] = gr.Dropdown(
                names, value=[], label=texts["adapters"], multiselect=True, elem_classes=["adapters"]
            )
            add["strengths"] = gr.Textbox(
                label=texts["strengths"], info=texts["strengths_hint"], elem_classes=["strengths"]
            )

    def offered_names(self) -> list[str]:
        """Return the inputs that depend on the model."""
        fixed = ("model", "prompt", "seed", "adapters", "strengths", "keyframes_at", "strength", "extend")
        return [name for name in self.names if name not in (*fixed, "image", "keyframes", "video")]

    def offer_of(self, name: str, model: OfferedModel) -> dict[str, Any]:
        """Return what an input shows for a model: its value, choices and bounds."""
        if name in ("height", "width"):
            size = model.fields["size"]
            which = 0 if name == "height" else 1
            limits: Any = size.most
            usual = size.usual[which] if size.usual else None  # None: that of the picture
            return {"value": usual, "minimum": size.least, "maximum": limits[which], "step": size.step}
        if name in ("interval_from", "interval_to"):
            interval = model.fields.get("guidance_interval")
            which = 0 if name == "interval_from" else 1
            return {"value": interval.usual[which] if interval else None, "visible": interval is not None}
        offered = model.fields.get(name)
        if offered is None:
            return {"value": None, "visible": False}
        if offered.kind == "choice":
            return {"choices": list(offered.choices), "value": offered.usual, "visible": True}
        return {"value": offered.usual, "visible": True, **self.bounds_of(offered)}

    def bounds_of(self, offered: OfferedField) -> dict[str, Any]:
        if offered.least is None or offered.most is None:
            return {}
        return {"info": f"{offered.least:g} – {offered.most:g}"}

    @property
    def lists(self) -> list[Any]:
        """Return the lists of what may be there only since the program was started."""
        return [self.inputs["adapters"]]

    def offer_lists(self) -> list[Any]:
        """Return the adapters that are there now, for each list of them."""
        return [gr.update(choices=self.studio.adapters.names()) for _ in self.lists]

    # Answering

    def offer(self, name: str) -> list[Any]:
        """Return what the inputs show once another model is chosen."""
        model = self.models[name]
        return [gr.update(**self.offer_of(each, model)) for each in self.offered_names()]

    async def make(self, *values: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
        """Yield how far the video is that was asked for, until it is there."""
        try:
            job = self.studio.make(dict(zip(self.names, values, strict=True)))
        except UserError as error:
            yield markup.problem(one_line(str(error))), gr.skip(), gr.skip()
            return
        async for shown in follow(self.studio, self.texts, job.id):
            yield shown

    def cancel(self, job_id: str) -> Any:
        """End the last video that was asked for."""
        if self.studio.queue.cancel(job_id):
            return gr.skip()  # whoever follows it tells
        return markup.note(self.texts["nothing_to_cancel"])

    def refine(self, prompt: str, image: str | None = None) -> tuple[Any, str]:
        """Return the prompt written out, and why it is not."""
        try:
            text = text_of(prompt, "prompt")
            return refined(text, None if image is None else self.studio.uploads.file(image)), ""
        except UserError as error:
            logger.warning("%s", one_line(str(error)))
            return gr.skip(), markup.problem(self.texts["refine_failed"])


async def follow(studio: Studio, texts: Texts, job_id: str) -> AsyncIterator[tuple[Any, Any, Any]]:
    """Yield the progress, the result and the id of a job until the job has ended.

    The job continues when nobody follows it.
    """
    job, version = studio.queue.get(job_id), -1
    while job is not None:
        if job.version != version or not version:
            version = job.version
            yield views.card(job, studio.queue, texts), views.result(job), job_id
        if job.is_over and job.version == version:
            return
        await asyncio.sleep(LOOK)
