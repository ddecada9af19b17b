"""Gate of the page, which checks each request's user, origin, route and content.

The library that draws the page has routes that read files, fetch addresses and show how the page is used. None of them
is reachable but those of `READ` and `SENT`, which the page needs.
"""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox_sat.web.uploads import is_inside

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

LANGUAGE = r"/(?:en|zh|ja)"
API = LANGUAGE + "/gradio_api"
READ = re.compile(
    rf"/|/favicon\.ico|{LANGUAGE}/?|{LANGUAGE}/(?:config/?|theme\.css|favicon\.ico|manifest\.json|(?:assets|static|svelte)/[\w./-]+)"
    rf"|{API}/(?:info/?|startup-events|app_id/?|queue/(?:data|status)|heartbeat/[\w-]+|upload_progress|call/\w+/\w+)"
    r"|/media/.+"
)
UPLOAD = re.compile(rf"{API}/upload")
SENT = re.compile(rf"{API}/(?:queue/join|upload|cancel|reset|(?:run|call|api)/\w+/?)")
GUESS = 0.2  # seconds that a wrong password takes
BODY = 256 * 1024  # bytes of a request that is no upload
ENVELOPE = 64 * 1024  # bytes around the files of an upload
HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self'; "
        b"worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


@dataclass(frozen=True)
class Rules:
    """Who may ask for what.

    Args:
        hosts: names and addresses by which browsers call this machine, without ports.
        port: that it listens on.
        users: names with passwords; empty: nobody is asked.
        uploads: the folder of uploads, where alone a file of a request may lie.
        upload_limit: bytes of a file.
        make_room: called before an upload.
    """

    hosts: frozenset[str]
    port: int
    users: Mapping[str, str]
    uploads: Path
    upload_limit: int
    make_room: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Refusal:
    """Why a request is refused."""

    status: int
    text: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Gate:
    """Lets the requests through to `app` that the rules allow."""

    def __init__(self, app: App, rules: Rules):
        self.app, self.rules = app, rules

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # the page uses no other protocol
        refusal = refused(scope, self.rules)
        if refusal is not None:
            if refusal.status == 401 and "authorization" in headers_of(scope):
                await asyncio.sleep(GUESS)
            await answer(send, refusal)
            return
        if scope["method"] == "POST":
            is_upload = UPLOAD.fullmatch(scope["path"]) is not None
            limit = self.rules.upload_limit + ENVELOPE if is_upload else BODY
            if content_length(scope) > limit:
                await answer(send, Refusal(413, f"upload: more than {limit // 2**20} MiB; choose a smaller file"))
                return
            if is_upload:
                self.rules.make_room()
            receive = limited(receive, limit) if is_upload else await self.checked_body(receive, send, limit)
            if receive is None:
                return
        await self.app(scope, receive, with_headers(send))

    async def checked_body(self, receive: Receive, send: Send, limit: int) -> Any:
        """Return a `receive` of the same body after checking that it names no other files.

        The result is None if the body was refused.
        """
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > limit:
                await answer(send, Refusal(413, "the request is too large"))
                return None
            if not message.get("more_body"):
                break
        if not names_only_uploads(body, self.rules.uploads):
            await answer(send, Refusal(403, "upload: the file is not there, or no longer; choose it again"))
            return None
        return replayed(body, receive)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def refused(scope: Message, rules: Rules) -> Refusal | None:
    """Return why a request is refused, from its head alone; None: it is not."""
    heads = headers_of(scope)
    if len(heads.get("host", [])) != 1 or not is_own(heads["host"][0], rules):
        return Refusal(421, "this page does not answer to that name; see --names")
    if rules.users and not is_known(heads.get("authorization", []), rules.users):
        return Refusal(
            401, "name and password, please", ((b"www-authenticate", b'Basic realm="page", charset="UTF-8"'),)
        )
    if not is_from_here(heads, heads["host"][0], scope):
        return Refusal(403, "the request comes from another site")
    path, method = scope["path"], scope["method"]
    if ".." in path or "\\" in path or "\0" in path or "//" in path:
        return Refusal(404, "not found")
    allowed = READ if method in ("GET", "HEAD") else SENT if method == "POST" else None
    if allowed is None or not allowed.fullmatch(path):
        return Refusal(404, "not found")
    return None


def headers_of(scope: Message) -> dict[str, list[str]]:
    """Return the headers of a request by their names in small letters."""
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def is_own(host: str, rules: Rules) -> bool:
    """Return whether a Host header names this page."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]/@]+)(?::(\d{1,5}))?", host)
    if match is None:
        return False
    name, port = match[1].strip("[]").lower().rstrip("."), match[2]
    return name in rules.hosts and (port is None or int(port) == rules.port)


def is_from_here(heads: Mapping[str, list[str]], host: str, scope: Message) -> bool:
    """Return whether no other site has made a browser send a request."""
    origins = heads.get("origin", [])
    if any(re.sub(r"^https?://", "", origin) != host or "://" not in origin for origin in origins):
        return False
    site = heads.get("sec-fetch-site", ["none"])[0]
    if site in ("same-origin", "none"):
        return True
    # A link on another site may lead to the page itself, and to nothing else.
    return (
        scope["method"] == "GET"
        and heads.get("sec-fetch-mode", [""])[0] == "navigate"
        and heads.get("sec-fetch-dest", [""])[0] == "document"
        and re.fullmatch(rf"/|{LANGUAGE}/?", scope["path"]) is not None
    )


def is_known(given: Iterable[str], users: Mapping[str, str]) -> bool:
    """Return whether an Authorization header has the name and the password of a user."""
    words = "".join(given).split(" ", 1)
    if len(words) != 2 or words[0].lower() != "basic":
        return False
    try:
        name, separator, password = base64.b64decode(words[1], validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return False
    expected = users.get(name)
    is_same = hmac.compare_digest(password.encode(), (expected if expected is not None else "").encode())
    return bool(separator) and expected is not None and is_same


def content_length(scope: Message) -> int:
    """Return the bytes that a request says to have; 0 if it does not say."""
    given = headers_of(scope).get("content-length", ["0"])[0]
    return int(given) if given.isdecimal() and len(given) < 19 else 0


def names_only_uploads(body: bytes, uploads: Path) -> bool:
    """Return whether all files that a request names are uploads.

    The library that draws the page would also fetch an address that stands in the place of a path.
    """
    if not body:
        return True
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return False
    for node in mappings_in(content):
        if "path" in node and node["path"] is not None:
            path = node["path"]
            if not isinstance(path, str) or "\0" in path or not is_inside(Path(path), uploads):
                return False
            url = node.get("url")
            if url is not None and not (isinstance(url, str) and "/proxy=" not in url):
                return False
    return True


def mappings_in(node: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all mappings in what a JSON text says."""
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield each
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


# ---------------------------------------------------------------------------------------------------------------------
# Passing on
# ---------------------------------------------------------------------------------------------------------------------


def limited(receive: Receive, limit: int) -> Receive:
    """Return a `receive` that ends the request where its body is longer than it may be."""
    taken = 0

    async def counted() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        return {"type": "http.disconnect"} if taken > limit else message

    return counted


def replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that first gives a body that was read already."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


def with_headers(send: Send) -> Send:
    """Return a `send` that adds `HEADERS`, and no leave for other sites."""

    async def changed(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = {name for name, _ in HEADERS}
            kept = [
                (name, value)
                for name, value in message.get("headers", [])
                if name.lower() not in own and not name.lower().startswith(b"access-control-")
            ]
            message = {**message, "headers": [*kept, *HEADERS]}
        await send(message)

    return changed


async def answer(send: Send, refusal: Refusal) -> None:
    """Send why a request is refused."""
    body = refusal.text.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        *refusal.headers,
        *HEADERS,
    ]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def is_loopback(host: str) -> bool:
    """Return whether only programs of this machine reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
