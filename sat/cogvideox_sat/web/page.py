"""The page in one language: tabs, queue and gallery."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import gradio as gr

from cogvideox_sat.web import markup, views
from cogvideox_sat.web.data_tab import DataTab
from cogvideox_sat.web.gallery_section import GallerySection, stamp
from cogvideox_sat.web.making_tab import MakingTab, follow
from cogvideox_sat.web.refining import is_configured
from cogvideox_sat.web.studio import Studio
from cogvideox_sat.web.texts import Texts
from cogvideox_sat.web.training_tab import TrainingTab

REFRESH = 2.0  # seconds between two looks at the queue and the gallery
JOB_KEY = "cogvideox-job"


def build_page(studio: Studio, texts: Texts) -> gr.Blocks:
    """Return the page."""
    refines = is_configured()
    with gr.Blocks(title=texts["title"], analytics_enabled=False, fill_width=True) as page:
        gr.HTML(views.header(texts))
        own_job = gr.BrowserState("", storage_key=JOB_KEY)
        making: dict[str, MakingTab] = {}
        with gr.Tabs() as tabs:
            if any(not model.image_to_video for model in studio.models.values()):
                with gr.Tab(texts["tab_text"], id="text"):
                    making["text"] = MakingTab.build(studio, texts, own_job, pictures=False, refines=refines)
            with gr.Tab(texts["tab_picture"], id="picture"):
                making["picture"] = MakingTab.build(studio, texts, own_job, pictures=True, refines=refines)
            with gr.Tab(texts["tab_training"], id="training"):
                training = TrainingTab(studio.training, texts)
            with gr.Tab(texts["tab_data"], id="data"):
                data = DataTab(studio.data, texts)
        gr.HTML(f"<h2>{markup.escaped(texts['queue'])}</h2>")
        queue = gr.HTML(elem_classes=["waiting"])
        gallery = GallerySection(studio, texts, making, tabs)
        connect(page, studio, texts, own_job, making, queue, gallery)
        offer_lists(page, [*making.values(), training, data])
    return page


def connect(
    page: gr.Blocks,
    studio: Studio,
    texts: Texts,
    own_job: gr.BrowserState,
    making: dict[str, MakingTab],
    queue: gr.HTML,
    gallery: GallerySection,
) -> None:
    """Let the page keep itself up to date, and go on with a video after it was loaded anew."""

    def refresh(known: str) -> list[Any]:
        jobs = views.overview(studio.queue, studio.sampler.look(), list(studio.models), texts)
        now = stamp(studio.gallery.names())
        if now == known:
            return [jobs, gr.skip(), gr.skip(), gr.skip()]
        return [jobs, gallery.shown(), gr.update(choices=gallery.choices()), now]

    async def go_on(job_id: str) -> AsyncIterator[tuple[Any, Any]]:
        async for status, result, _ in follow(studio, texts, job_id):
            yield status, result
        await asyncio.sleep(0)

    known = gr.State("")
    outputs = [queue, gallery.grid, gallery.chosen, known]
    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    gr.Timer(REFRESH).tick(refresh, known, outputs, **quiet)
    page.load(refresh, known, outputs, **quiet)
    first = next(iter(making.values()))
    page.load(go_on, own_job, [first.status, first.result], **quiet)


class HasLists(Protocol):
    """A tab with lists of what may be there only since the program was started."""

    @property
    def lists(self) -> list[Any]: ...

    def offer_lists(self) -> list[Any]: ...


def offer_lists(page: gr.Blocks, tabs: Sequence[HasLists]) -> None:
    """Let the page offer, each time it is loaded, what is there then."""

    def offered() -> Any:
        updates = [update for tab in tabs for update in tab.offer_lists()]
        return updates if len(updates) > 1 else updates[0]  # a list for a single output would be its value

    lists = [each for tab in tabs for each in tab.lists]
    if lists:
        page.load(offered, None, lists, show_progress="hidden", concurrency_limit=None, api_visibility="private")
