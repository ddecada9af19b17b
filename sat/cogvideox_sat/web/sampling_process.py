"""Process that holds the models and makes videos while the page stays responsive.

Importing this imports PyTorch only once a model is loaded.
"""

import io
import logging
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from cogvideox_sat.commands.startup import quiet_libraries
from cogvideox_sat.web.jobs import Cancelled
from cogvideox_sat.web.models import OfferedModel
from cogvideox_sat.web.uploads import kept_copy, shown_files, with_files
from sgm.errors import UserError, one_line

if TYPE_CHECKING:
    from cogvideox_sat.python_api.call_progress import Update
    from cogvideox_sat.python_api.pipeline import Pipeline

logger = logging.getLogger(__name__)

PREVIEW_SECONDS = 0.5  # between two previews, at least
PREVIEW_SHARE = 0.2  # of the time that previews may take


@dataclass(frozen=True)
class VideoTask:
    """A video to make.

    Args:
        model: its name.
        fields: of the request, as a call from Python has them; files by their paths.
        target: the file of the video.
        adapters: paths of adapters with their strengths.
        inputs: folder in which the files of the request are kept.
    """

    model: str
    fields: Mapping[str, Any]
    target: Path
    adapters: Mapping[str, float]
    inputs: Path


def make_video(
    pipe: "Pipeline",
    task: VideoTask,
    own_adapters: Mapping[str, float],
    update: Callable[..., None],
    is_cancelled: Callable[[], bool],
) -> str:
    """Make a video, write it and its record, and return the name of its file.

    The network is evaluated as often as by the command; a preview is a decoded frame of what the sampler has anyway.

    Args:
        own_adapters: those that the model was loaded with.
        update: see `jobs.Runner.run`.

    Raises:
        UserError: the request cannot be done. Nothing is written then.
        Cancelled: `is_cancelled` was true. Nothing is written then.
    """
    previews = Previews(pipe)

    def progress(made: "Update") -> None:
        if is_cancelled():
            raise Cancelled
        update(stage=made.stage, step=made.step, steps=made.steps, preview=previews.next(made))
        if is_cancelled():
            raise Cancelled

    if is_cancelled():
        raise Cancelled
    wanted: dict[Any, float] = {**own_adapters, **task.adapters}
    if wanted != pipe.lora:
        pipe.set_lora(wanted)
    uploads = shown_files(task.fields)
    with named_briefly({str(path): path.name for path in uploads}), kept_inputs(task) as fields:
        copies = zip(shown_files(fields), uploads, strict=True)
        with named_briefly({str(copy): path.name for copy, path in copies}):
            video = pipe(**fields, progress=progress)
        if is_cancelled():
            raise Cancelled
        task.target.parent.mkdir(parents=True, exist_ok=True)
        video.save(task.target)
    return task.target.name


@contextmanager
def kept_inputs(task: VideoTask) -> Iterator[dict[str, Any]]:
    """Yield the fields of a task with the paths of lasting copies of its files.

    Copies that this call has made are removed if the block fails.
    """
    made: list[Path] = []

    def kept(path: Path) -> Path:
        copy, is_new = kept_copy(path, task.inputs)
        if is_new:
            made.append(copy)
        return copy

    try:
        yield with_files(task.fields, kept)
    except BaseException:
        for copy in made:
            copy.unlink(missing_ok=True)
        if made:
            with suppress(OSError):  # it holds others
                task.inputs.rmdir()
        raise


@contextmanager
def named_briefly(names: Mapping[str, str]) -> Iterator[None]:
    """Let the messages of errors name uploads as their user does, instead of where they lie."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for path, name in names.items():
            text = text.replace(path, name)
        raise UserError(text) from error


class Previews:
    """Makes previews of a video, seldom enough that sampling hardly takes longer."""

    def __init__(self, pipe: "Pipeline"):
        self.pipe, self.due = pipe, monotonic()

    def next(self, update: "Update") -> bytes | None:
        """Return a preview as JPEG; None: none is due, or there is no estimate."""
        begin = monotonic()
        if update.denoised is None or begin < self.due or update.step == update.steps:
            return None
        pixels = self.pipe.preview(update)
        if pixels is None:
            return None
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
        end = monotonic()
        self.due = end + max(PREVIEW_SECONDS, (end - begin) / PREVIEW_SHARE)
        return buffer.getvalue()


class Workshop:
    """Loads models, and makes what the other end of a connection asks for.

    It gets ("make", number, VideoTask) and ("cancel", number). It sends ("model", name, "" or why it cannot be loaded),
    ("update", number, changes), and for each task in the end ("done", number, name of the file), ("cancelled", number)
    or ("failed", number, line).
    """

    def __init__(self, connection: Connection, models: Sequence[OfferedModel]):
        self.connection = connection
        self.waiting = {model.name: model for model in models}  # to be loaded
        self.pipes: dict[str, tuple[Pipeline, dict[str, float]]] = {}
        self.broken: dict[str, str] = {}
        self.tasks: queue.SimpleQueue[tuple[int, VideoTask] | None] = queue.SimpleQueue()
        self.cancelled: set[int] = set()

    def listen(self) -> None:
        """Take what the other end sends, until it is closed."""
        with suppress(EOFError, OSError):
            while True:
                kind, number, *rest = self.connection.recv()
                if kind == "make":
                    self.tasks.put((number, rest[0]))
                else:
                    self.cancelled.add(number)
        self.tasks.put(None)

    def work(self) -> None:
        """Make what is asked for, and load models meanwhile, until the other end is closed."""
        while True:
            try:
                asked = self.tasks.get(block=not self.waiting)
            except queue.Empty:
                self.load(next(iter(self.waiting)))
                continue
            if asked is None:
                return
            self.answer(*asked)

    def load(self, name: str) -> None:
        """Load a model that waits, and tell how that went."""
        model = self.waiting.pop(name)
        try:
            from cogvideox_sat.python_api.loading import load

            pipe = load(model.source, **model.settings)
            self.pipes[name] = pipe, pipe.lora
        except UserError as error:
            self.broken[name] = f"{name}: {one_line(str(error))}"
        except Exception as error:
            logger.exception("%s cannot be loaded", name)
            self.broken[name] = f"{name}: it cannot be loaded ({type(error).__name__}); the log says why"
        self.connection.send(("model", name, self.broken.get(name, "")))

    def answer(self, number: int, task: VideoTask) -> None:
        """Make a video, and tell how that went."""

        def update(**changes: Any) -> None:
            self.connection.send(("update", number, changes))

        try:
            if task.model in self.waiting:
                update(stage="loading", step=0, steps=0)
                self.load(task.model)
            if task.model in self.broken:
                raise UserError(self.broken[task.model])
            pipe, own = self.pipes[task.model]
            name = make_video(pipe, task, own, update, lambda: number in self.cancelled)
            self.connection.send(("done", number, name))
        except Cancelled:
            self.connection.send(("cancelled", number))
        except UserError as error:
            self.connection.send(("failed", number, one_line(str(error))))
        except OSError:
            raise  # the connection is closed
        except Exception as error:
            logger.exception("a video failed by an error of the program")
            self.connection.send(("failed", number, f"an error of the program, {type(error).__name__}; see its log"))


def run(connection: Connection, models: Sequence[OfferedModel]) -> None:
    """Run the tasks that arrive on a connection until it is closed.

    The process belongs to this program alone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the page's own process ends this one
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    quiet_libraries()
    workshop = Workshop(connection, models)
    threading.Thread(target=workshop.listen, name="listen", daemon=True).start()
    with suppress(BrokenPipeError, ConnectionResetError):
        workshop.work()
