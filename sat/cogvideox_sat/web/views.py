"""HTML of jobs and videos on the page.

Text that people have written is escaped.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cogvideox_sat.web import jobs, markup
from cogvideox_sat.web.gallery import Entry
from cogvideox_sat.web.jobs import Job, JobQueue
from cogvideox_sat.web.texts import LANGUAGES, Texts

LONGEST_TITLE = 80  # characters of a prompt in a list


def header(texts: Texts) -> str:
    """Return the top of the page: its name, and the languages."""
    links = " ".join(f'<a href="/{name}/">{markup.escaped(each["language"])}</a>' for name, each in LANGUAGES.items())
    return f'<header class="top"><h1>{markup.escaped(texts["title"])}</h1><nav>{links}</nav></header>'


def shortened(text: str, most: int = LONGEST_TITLE) -> str:
    """Return the begin of a text."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def stage(job: Job, texts: Texts) -> str:
    """Return what a job that runs does."""
    return texts[f"stage_{job.stage or 'starting'}"].format(step=job.step, steps=job.steps)


def card(job: Job, queue: JobQueue, texts: Texts) -> str:
    """Return how far a job is."""
    if job.state == jobs.WAITING:
        return markup.bar(0, texts["waiting"].format(count=queue.position(job)))
    if job.state == jobs.FAILED:
        return markup.problem(job.message)
    if job.state == jobs.CANCELLED:
        return markup.note(texts["state_cancelled"])
    if job.state == jobs.DONE:
        return markup.note(texts["state_done"].format(seconds=f"{job.seconds:.1f}"))
    share = job.step / job.steps if job.steps else 0.0
    preview = markup.picture(job.preview) if job.preview else ""
    return markup.bar(share, stage(job, texts)) + preview


def result(job: Job) -> str:
    """Return the player of what a job has made; nothing before."""
    if job.state != jobs.DONE:
        return ""
    return f'<div class="result">{markup.video(markup.address("media", "video", job.result), job.title, True)}</div>'


def overview(queue: JobQueue, loaded: Mapping[str, str], models: Sequence[str], texts: Texts) -> str:
    """Return the jobs that run or wait, and models that are being loaded or cannot be."""
    lines = [markup.problem(reason) for reason in loaded.values() if reason]
    lines += [markup.note(texts["model_loading"].format(model=name)) for name in models if name not in loaded]
    live = queue.live()
    titles = "".join(
        f"<li><span>{markup.escaped(shortened(job.title))}</span> "
        f"<em>{markup.escaped(stage(job, texts) if job.state == jobs.RUNNING else '…')}</em></li>"
        for job in live
    )
    lines.append(f'<ol class="queue">{titles}</ol>' if live else markup.note(texts["queue_empty"]))
    return "".join(lines)


def grid(entries: Sequence[Entry], count: int, texts: Texts) -> str:
    """Return the newest videos."""
    if not entries:
        return markup.note(texts["gallery_empty"])
    cells = "".join(
        f"<figure>{markup.video(markup.address('media', 'video', entry.name), entry.prompt)}"
        f"<figcaption>{markup.escaped(shortened(entry.prompt or entry.name))}</figcaption></figure>"
        for entry in entries
    )
    more = texts["gallery_more"].format(shown=len(entries), count=count) if count > len(entries) else ""
    return f'<div class="gallery">{cells}</div>' + (markup.note(more) if more else "")


def details(entry: Entry, texts: Texts) -> str:
    """Return a video and what made it."""
    player = markup.video(markup.address("media", "video", entry.name), entry.prompt)
    if not entry.fields:
        return player + markup.note(texts["no_settings"].format(name=entry.name))
    rows = {name: shown_value(name, value) for name, value in entry.fields.items()}
    return player + markup.table(rows | adapters(entry))


def adapters(entry: Entry) -> dict[str, Any]:
    """Return the adapters of a video, named without their folders."""
    if not entry.adapters:
        return {}
    return {"adapters": ", ".join(f"{Path(path).name}: {strength:g}" for path, strength in entry.adapters.items())}


def shown_value(name: str, value: Any) -> str:
    """Return a field of a request as the page shows it: files without their folders."""
    if name in ("image", "video"):
        return Path(value).name
    if name == "keyframes":
        return ", ".join(f"{Path(entry['image']).name}: {entry['at']}" for entry in value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def label(entry: Entry) -> str:
    """Return how a list calls a video."""
    return shortened(f"{entry.name}: {entry.prompt}" if entry.prompt else entry.name, 100)
