"""Write the metrics of a training run to files and services."""

import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from cogvideox_sat.files.atomic import reported_as_user_error, write_atomically
from cogvideox_sat.runs.videos import VIDEOS_FILE, video_entry
from sgm.plain_json import parse_json

logger = logging.getLogger(__name__)

MAX_SIDE = 320  # pixels, of a moving image in TensorBoard


class Target(Protocol):
    """A destination of metrics.

    Exceptions of its methods are logged, and do not stop the run.
    """

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def write_video(self, step: int, name: str, path: Path, details: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Writes the metrics of a run to `metrics.jsonl`, TensorBoard and Weights & Biases.

    The last two are optional. Videos are listed in `videos.jsonl`, see `runs.videos`. A resumed run continues where its
    checkpoint was: entries that a killed run wrote after this point are removed from both files and hidden in
    TensorBoard. A target that fails later is reported once, and does not stop the run. Create the writer on one process
    only.

    Args:
        folder: folder of the run, for `metrics.jsonl`, `videos.jsonl`, TensorBoard's event files, `wandb/` and
            `wandb_id`.
        tensorboard: write event files.
        wandb: report to Weights & Biases; see `WandbRun`.
        wandb_project, name, config: project and name of the run there, and the settings shown with it.
        start_step: steps done before.

    Raises:
        UserError: `metrics.jsonl` or `videos.jsonl` cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tensorboard: bool = True,
        wandb: bool = False,
        wandb_project: str | None = None,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        start_step: int = 0,
    ):
        folder = Path(folder)
        self.held: IO[bytes] | None = None  # a file that the run keeps open as long as it writes
        self._targets: list[Target] = [JsonLines(folder / "metrics.jsonl", start_step), VideoList(folder, start_step)]
        self._failed: set[Target] = set()
        optional: list[tuple[str, Callable[[], Target]]] = []
        if tensorboard:
            optional.append(("TensorBoard", lambda: TensorBoard(folder, start_step)))
        if wandb:
            optional.append(("wandb", lambda: WandbRun(folder, wandb_project, name, config)))
        for kind, make in optional:
            try:
                self._targets.append(make())
            except Exception as error:
                logger.warning("no metrics to %s: %s", kind, _one_line(error))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step.

        Values that are not finite are null in `metrics.jsonl`.
        """
        self._each("write", step, values)

    def write_video(self, step: int, name: str, path: str | Path, details: Mapping[str, Any] | None = None) -> None:
        """Show the video file `path` under `name`; in TensorBoard as a moving image.

        Args:
            details: `prompt` and `shows` of `RunVideo`, as far as they differ from its defaults.
        """
        self._each("write_video", step, name, Path(path), details or {})

    def close(self) -> None:
        self._each("close")

    def _each(self, method: str, *args: Any) -> None:
        for target in self._targets:
            try:
                getattr(target, method)(*args)
            except Exception as error:  # of any kind: metrics must not end a run of days
                if target not in self._failed:
                    self._failed.add(target)
                    logger.warning("metrics to %s are incomplete: %s", type(target).__name__, _one_line(error))


class LineFile:
    """A file of JSON objects, one per line, each with `step`.

    Args:
        start_step: lines of later steps, and incomplete lines, are removed.

    Raises:
        UserError: the file cannot be read or written.
    """

    def __init__(self, path: Path, start_step: int):
        self.path = path
        with reported_as_user_error(path):
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= start_step]
        if kept != lines:
            write_atomically(path, b"".join(kept))
        self._torn = False

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line."""
        line = json.dumps({"step": step, **values}) + "\n"
        # Opened anew each time, so that writing works again after a file system was full or unavailable.
        torn, self._torn = self._torn, True
        with self.path.open("a") as file:
            file.write("\n" + line if torn else line)
        self._torn = False


class JsonLines:
    """`metrics.jsonl`, with one line for the metrics of a step."""

    def __init__(self, path: Path, start_step: int):
        self._file = LineFile(path, start_step)
        if not path.exists():
            write_atomically(path, b"")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.add(step, {name: value if math.isfinite(value) else None for name, value in values.items()})

    def write_video(self, step: int, name: str, path: Path, details: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class VideoList:
    """`videos.jsonl`, with one line for each video; see `runs.videos`.

    The file does not exist before the first video.
    """

    def __init__(self, folder: Path, start_step: int):
        self._folder, self._file = folder, LineFile(folder / VIDEOS_FILE, start_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def write_video(self, step: int, name: str, path: Path, details: Mapping[str, Any]) -> None:
        self._file.add(step, video_entry(self._folder, name, path, dict(details)))

    def close(self) -> None:
        pass


def _step_of(line: bytes) -> float:
    """Return the step of a complete line of a `LineFile`; infinity for anything else."""
    with suppress(ValueError, KeyError, TypeError, OverflowError):
        if line.endswith(b"\n"):
            return float(parse_json(line)["step"])
    return math.inf


class TensorBoard:
    """Event files for TensorBoard.

    They are written directly, and not with tensorboardX's `SummaryWriter`: after its thread has ended because of a full
    disk, later calls would wait for it for ever.
    """

    def __init__(self, folder: Path, start_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        # The name contains the process id, so that a run resumed within a second does not overwrite the earlier file.
        self._events = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
        if start_step:  # TensorBoard then hides what earlier files hold from this step on
            self._write(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(step=step, wall_time=time.time(), **content))
        self._events.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step, summary=Summary(value=scalars))

    def write_video(self, step: int, name: str, path: Path, details: Mapping[str, Any]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        several = len(details.get("shows", ())) > 1  # panels, side by side
        gif, width, height = video_as_gif(path, 2 * MAX_SIDE if several else MAX_SIDE)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        self._write(step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def close(self) -> None:
        self._events.close()


class WandbRun:
    """A run on Weights & Biases, which a resumed run continues.

    Its id is stored in the folder, in `wandb_id`. `WANDB_MODE=offline` works without a network. Without a login, or if
    the server cannot be reached, the run is also kept offline, with a warning; `wandb sync` uploads it later.
    """

    def __init__(self, folder: Path, project: str | None, name: str | None, config: Mapping[str, Any] | None):
        import wandb

        id_file = folder / "wandb_id"
        if not id_file.exists():
            write_atomically(id_file, uuid.uuid4().hex[:8])
        identity = id_file.read_text().strip()
        settings = wandb.Settings(login_timeout=60)  # with a terminal, wandb asks for a key

        def start(mode: Literal["offline"] | None) -> Any:
            return wandb.init(
                project=project,
                name=name,
                config=dict(config or {}),
                dir=folder,
                id=identity,
                resume="allow",
                mode=mode,
                settings=settings,
            )

        try:
            self._run = start(None)
        except wandb.Error as error:
            logger.warning("wandb: %s; the run is kept offline, upload it with `wandb sync`", _one_line(error))
            self._run = start("offline")
        self._run.define_metric("*", step_metric="step")  # wandb's own step counter cannot go back to a checkpoint

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def write_video(self, step: int, name: str, path: Path, details: Mapping[str, Any]) -> None:
        import wandb

        self._run.log({"step": step, name: wandb.Video(str(path), caption=details.get("prompt"), format="mp4")})

    def close(self) -> None:
        self._run.finish()


def video_as_gif(path: Path, max_side: int = MAX_SIDE) -> tuple[bytes, int, int]:
    """Return a video file as an endless GIF: its bytes, width and height.

    Args:
        max_side: largest width or height in pixels.
    """
    from io import BytesIO

    from imageio_ffmpeg import read_frames
    from PIL import Image

    images = []
    with closing(read_frames(path)) as reader:  # closing it ends its process
        meta = next(reader)
        for frame in reader:
            image = Image.frombuffer("RGB", meta["size"], bytes(frame))
            image.thumbnail((max_side, max_side))
            images.append(image)
    file = BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=1000 / meta["fps"], loop=0)
    return file.getvalue(), *images[0].size


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
