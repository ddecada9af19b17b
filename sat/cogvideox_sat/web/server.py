"""The server of the page: the library that draws it, behind `gate.Gate`."""

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogvideox_sat.web.data_desk import DataDesk
from cogvideox_sat.web.gallery import Gallery
from cogvideox_sat.web.gate import Gate, Rules
from cogvideox_sat.web.jobs import JobQueue
from cogvideox_sat.web.models import OfferedModel
from cogvideox_sat.web.run_views import is_run
from cogvideox_sat.web.sampler import Sampler
from cogvideox_sat.web.shelves import Shelf
from cogvideox_sat.web.studio import Studio, is_adapter
from cogvideox_sat.web.texts import LANGUAGES, preferred
from cogvideox_sat.web.training_desk import TrainingDesk, is_data
from cogvideox_sat.web.uploads import Uploads
from sgm.errors import UserError

logger = logging.getLogger(__name__)

# What the library that draws the page reads from the environment: nothing is told to others, nothing is opened to them.
SETTINGS = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
UNSET = ("GRADIO_ALLOWED_PATHS", "GRADIO_ROOT_PATH", "GRADIO_DEBUG", "GRADIO_EXAMPLES_CACHE", "GRADIO_WATCH_DIRS")
SECONDS_TO_END = 2  # for requests that are open when the server ends
STYLE = Path(__file__).with_name("style.css")


@dataclass(frozen=True)
class Options:
    """Options of the command.

    Args:
        users: names with passwords; empty: nobody is asked.
        names: further names by which browsers call this machine.
        upload_limit: bytes of a file.
        adapters, runs, data: folders that the page offers from; None: it offers none.
        recipes: configuration files to train with, by name.
        processes: how many train together.
    """

    models: Mapping[str, OfferedModel]
    output_dir: Path
    host: str = "127.0.0.1"
    port: int = 7860
    users: Mapping[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    upload_limit: int = 200 * 2**20
    adapters: Path | None = None
    runs: Path | None = None
    data: Path | None = None
    recipes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    processes: int = 1


def serve(options: Options) -> int:
    """Serve the page until the program is interrupted; return the exit code.

    Raises:
        UserError: the port is not free.
    """
    with listening(options.host, options.port) as connection:
        port = connection.getsockname()[1]
        studio = open_studio(options)
        try:
            app = build_app(studio, options, port)
            host = f"[{options.host}]" if ":" in options.host else options.host
            logger.info("the page is at http://%s:%d", host, port)
            run_app(app, connection)
        finally:
            studio.close()
    return 0


def open_studio(options: Options) -> Studio:
    """Return what the page works with; models are being loaded then."""
    uploads = Uploads(options.upload_limit)
    set_environment(uploads.folder)
    sampler = Sampler(list(options.models.values()))
    sampler.start()
    data = Shelf(options.data, "train_data", is_data)
    return Studio(
        options.models,
        sampler,
        JobQueue(sampler),
        Gallery(options.output_dir),
        uploads,
        Shelf(options.adapters, "adapters", is_adapter),
        TrainingDesk(options.recipes, data, Shelf(options.runs, "run", is_run), options.processes),
        DataDesk(options.recipes, data),
    )


def set_environment(uploads: Path) -> None:
    """Set the environment of the library that draws the page, before it is imported.

    The settings place its uploads in the folder and turn off its connections to other services.
    """
    os.environ.update(SETTINGS, GRADIO_TEMP_DIR=str(uploads))
    for name in UNSET:
        os.environ.pop(name, None)


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        UserError: the port is in use, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    connection = socket.socket(family)
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        connection.bind((host, port))
        connection.listen(128)
    except OSError as error:
        connection.close()
        reason = error.strerror or str(error)
        raise UserError(f"port: {host}:{port} cannot be used ({reason}); give another --port or --host") from error
    return connection


def build_app(studio: Studio, options: Options, port: int) -> Gate:
    """Return the application: the page below /en, /zh and /ja, behind the gate."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import RedirectResponse, Response

    from cogvideox_sat.web.media import routes
    from cogvideox_sat.web.page import build_page

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/")
    def choose(request: Request) -> RedirectResponse:
        return RedirectResponse(f"/{preferred(request.headers.get('accept-language', ''))}/")

    @app.get("/favicon.ico")
    def no_icon() -> Response:
        return Response(status_code=204)

    finders = {
        "video": studio.gallery.shelf.file,
        "run": studio.training.runs.file,
        "sheet": studio.data.sheets.file,
    }
    app.router.routes += routes(finders)
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])  # the usual ones are fetched
    for language, texts in LANGUAGES.items():
        gr.mount_gradio_app(
            app,
            build_page(studio, texts),
            path=f"/{language}",
            server_name=options.host,
            server_port=port,
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size=options.upload_limit,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=theme,
            css=STYLE.read_text(),
        )
    return Gate(app, rules_of(options, port, studio.uploads))


def rules_of(options: Options, port: int, uploads: Uploads) -> Rules:
    """Return whom the page answers to."""
    names = {"localhost", "127.0.0.1", "::1", options.host.lower(), *(name.lower() for name in options.names)}
    if options.users:
        names.add(socket.gethostname().lower())
    hosts = frozenset(names - {"0.0.0.0", "::"})
    return Rules(hosts, port, options.users, uploads.folder, options.upload_limit, uploads.prune)


def run_app(app: Any, connection: socket.socket) -> None:
    """Answer requests until the program is told to end."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", lifespan="on", server_header=False, timeout_graceful_shutdown=SECONDS_TO_END
    )
    with suppress(KeyboardInterrupt):  # which it raises again once it has ended
        uvicorn.Server(config).run(sockets=[connection])
