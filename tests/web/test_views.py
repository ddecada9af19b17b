"""HTML of jobs and videos is complete, and text that people have written is escaped."""

import pytest

from cogvideox_sat.web import jobs, views
from cogvideox_sat.web.gallery import Entry
from cogvideox_sat.web.jobs import Job
from cogvideox_sat.web.texts import LANGUAGES

EVIL = "<img src=x onerror=alert(1)>"
ENGLISH = LANGUAGES["en"]


class NoQueue:
    """A queue in which nobody waits."""

    def __init__(self, *live: Job):
        self._live = list(live)

    def live(self) -> list[Job]:
        return self._live

    def position(self, job: Job) -> int:
        return 2


@pytest.mark.parametrize("texts", LANGUAGES.values())
def test_each_state_of_a_job_is_shown(texts):
    stages = ("starting", "loading", "text", "image", "video", "sampling", "decoding", "done", "")
    for stage in stages:
        card = views.card(Job("p", None, state=jobs.RUNNING, stage=stage, step=3, steps=4), NoQueue(), texts)
        assert 'style="width: 75.0%"' in card
    assert "2" in views.card(Job("p", None), NoQueue(), texts)
    for state in (jobs.DONE, jobs.CANCELLED, jobs.FAILED):
        assert views.card(Job("p", None, state=state, message="steps is 0"), NoQueue(), texts)


def test_a_preview_is_part_of_the_page():
    card = views.card(Job("p", None, state=jobs.RUNNING, preview=b"jpeg"), NoQueue(), ENGLISH)
    assert 'src="data:image/jpeg;base64,anBlZw=="' in card


def test_markup_stays_text():
    job = Job(EVIL, None, state=jobs.FAILED, message=EVIL, result="a.mp4")
    done = Job(EVIL, None, state=jobs.DONE, result='"><script>')
    entry = Entry("a.mp4", EVIL, {"prompt": EVIL, "image": f"/inputs/{EVIL}"}, {f"/adapters/{EVIL}": 1.0})
    shown = [
        views.card(job, NoQueue(), ENGLISH),
        views.result(done),
        views.overview(NoQueue(Job(EVIL, None, state=jobs.RUNNING)), {"m": EVIL}, ["m", EVIL], ENGLISH),
        views.grid([entry], 3, ENGLISH),
        views.details(entry, ENGLISH),
        views.details(Entry(EVIL, "", {}, {}), ENGLISH),
    ]
    for text in shown:
        assert "<img src=x" not in text
        assert "<script" not in text


def test_details_name_no_folders():
    fields = {"prompt": "/p", "image": "/secret/a.png", "keyframes": [{"image": "/secret/k.png", "at": -1}]}
    entry = Entry("a.mp4", "p", fields, {"/secret/style": 0.5})
    text = views.details(entry, ENGLISH)
    assert "secret" not in text
    assert all(part in text for part in ("a.png", "k.png: -1", "style: 0.5", "<td>/p</td>"))


def test_the_gallery_tells_that_there_are_more():
    assert "The newest 1 of 30 videos" in views.grid([Entry("a.mp4", "p", {}, {})], 30, ENGLISH)
    assert "No videos yet." in views.grid([], 0, ENGLISH)


def test_languages_are_offered():
    header = views.header(ENGLISH)
    assert all(f'href="/{name}/"' in header for name in LANGUAGES)
