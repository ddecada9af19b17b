"""Addresses of videos and pictures on the page.

An address consists of names that are looked up and never contains a path.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from sgm.errors import UserError

KINDS = {".mp4": "video/mp4", ".png": "image/png"}
Finder = Callable[..., Path]


def routes(finders: dict[str, Finder]) -> list[Route]:
    """Return the routes of files that the page shows.

    Args:
        finders: by the first part of an address below /media, a function that takes the other parts and returns the
            file; it raises UserError for one that is not to be shown.
    """

    def shows(finder: Finder) -> Callable[[Request], Any]:
        async def show(request: Request) -> Response:
            names = request.path_params["names"].split("/")
            try:
                path = finder(*names)
                kind = KINDS[path.suffix]
            except (UserError, KeyError, TypeError):
                return PlainTextResponse("not found", status_code=404)
            return FileResponse(path, media_type=kind, headers={"cache-control": "private, max-age=60"})

        return show

    return [Route(f"/media/{name}/{{names:path}}", shows(finder)) for name, finder in finders.items()]
