"""The gate admits only same-origin requests for the page's routes without paths."""

import asyncio
import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cogvideox_sat.web import gate
from cogvideox_sat.web.gate import Gate, Rules, is_loopback, names_only_uploads

USERS = {"ann": "long password"}


class Asked:
    """Answer of a gate to a request.

    `passed` is true if the application behind the gate has seen the request.
    """

    def __init__(self, uploads: Path, users: dict[str, str] | None = None, limit: int = 1000):
        self.rules = Rules(frozenset({"localhost", "127.0.0.1", "::1"}), 7860, users or {}, uploads, limit)

    def __call__(self, path, method="GET", body=b"", host="127.0.0.1:7860", chunks=1, declared=True, **headers):
        self.passed, self.body, sent = False, b"", []
        heads = [(b"host", host.encode())] if host is not None else []
        heads += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        if method == "POST" and declared:
            heads.append((b"content-length", str(len(body)).encode()))
        size = -(-len(body) // chunks) or 1
        pieces = [body[start : start + size] for start in range(0, len(body), size)]
        messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        messages.append({"type": "http.request", "body": b"", "more_body": False})

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        async def app(scope, receive, send):
            self.passed = True
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                self.body += message["body"]
                if not message.get("more_body"):
                    break
            leave = [(b"Access-Control-Allow-Origin", b"*"), (b"x-own", b"1")]
            await send({"type": "http.response.start", "status": 200, "headers": leave})
            await send({"type": "http.response.body", "body": b""})

        scope = {"type": "http", "method": method, "path": path, "headers": heads}
        asyncio.run(Gate(app, self.rules)(scope, receive, send))
        self.headers = dict(sent[0]["headers"]) if sent else {}
        return sent[0]["status"] if sent else None


@pytest.fixture
def asked(tmp_path) -> Asked:
    return Asked(tmp_path)


@pytest.mark.parametrize(
    "path", ["/", "/en/", "/zh", "/ja/config", "/en/theme.css", "/en/assets/a-1.b_c.js", "/en/gradio_api/queue/data"]
)
def test_what_the_page_needs_passes(asked, path):
    assert asked(path) == 200


@pytest.mark.parametrize(
    "path",
    [
        "/en/gradio_api/file=/etc/passwd",
        "/en/gradio_api/file/etc/passwd",
        "/en/gradio_api/file=http://127.0.0.1/",
        "/en/gradio_api/proxy=http://127.0.0.1/",
        "/en/assets/../../etc/passwd",
        "/en/static//etc/passwd",
        "/en/assets/..\\x",
        "/en/gradio_api/component_server",
        "/en/gradio_api/stream/a/b/c/playlist.m3u8",
        "/en/gradio_api/dev/reload",
        "/en/gradio_api/runs",
        "/en/gradio_api/deep_link",
        "/en/gradio_api/token",
        "/en/custom_component/a/b/c/d.py",
        "/en/monitoring",
        "/en/login",
        "/docs",
        "/openapi.json",
        "/xx/",
    ],
)
def test_what_the_page_does_not_need_is_closed(asked, path):
    for method in ("GET", "HEAD", "POST"):
        assert asked(path, method) == 404
        assert not asked.passed


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_closed(asked, method):
    assert asked("/en/", method) == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1:1", "127.0.0.1.evil.example", "", None]
)
def test_another_host_is_refused(asked, host):
    assert asked("/", host=host) == 421
    assert not asked.passed


@pytest.mark.parametrize("host", ["localhost:7860", "LOCALHOST:7860", "[::1]:7860", "127.0.0.1"])
def test_own_names_are_known(asked, host):
    assert asked("/", host=host) == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "127.0.0.1:7860", "file://"])
def test_another_origin_is_refused(asked, origin):
    assert asked("/en/gradio_api/queue/join", "POST", b"{}", origin=origin) == 403
    assert asked("/en/gradio_api/upload", "POST", b"", origin=origin) == 403


def test_other_sites_may_only_link_to_the_page(asked):
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert asked("/en/", **link) == 200
    assert asked("/media/video/a.mp4", **link) == 403
    assert asked("/en/", **{**link, "sec_fetch_dest": "iframe"}) == 403
    assert asked("/en/config", sec_fetch_site="same-site", sec_fetch_mode="cors") == 403
    assert asked("/en/gradio_api/queue/join", "POST", b"{}", sec_fetch_site="cross-site") == 403
    own = {"origin": "http://127.0.0.1:7860", "sec_fetch_site": "same-origin"}
    assert asked("/en/gradio_api/queue/join", "POST", b"{}", **own) == 200


def test_there_is_room_before_an_upload(asked):
    made = []
    asked.rules = replace(asked.rules, make_room=lambda: made.append(1))
    asked("/en/gradio_api/queue/join", "POST", b"{}")
    assert not made
    asked("/en/gradio_api/upload", "POST", b"x")
    assert made


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_everything_asks_for_the_password(tmp_path, monkeypatch):
    asked = Asked(tmp_path, USERS)
    for path in ("/", "/en/", "/media/video/a.mp4", "/en/assets/a.js", "/nothing"):
        assert asked(path) == 401
        assert asked.headers[b"www-authenticate"].startswith(b"Basic")
    monkeypatch.setattr(gate, "GUESS", 0.0)
    wrong = ["ann:wrong password", "ann:", "bo:long password", "ann", ":", ""]
    for given in [*map(basic, wrong), "Bearer x", "Basic", "Basic ÿ", "Basic ===", basic("ann:long password") + "x"]:
        assert asked("/", authorization=given) == 401, given
    assert asked("/en/", authorization=basic("ann:long password")) == 200


def test_requests_that_are_too_large_are_refused(asked):
    for declared in (True, False):
        assert asked("/en/gradio_api/queue/join", "POST", b"x" * 300_000, chunks=3, declared=declared) == 413
        assert not asked.passed
    assert asked("/en/gradio_api/upload", "POST", b"x" * 70_000) == 413


def test_an_upload_that_does_not_tell_its_size_is_cut_off(asked):
    assert asked("/en/gradio_api/upload", "POST", b"x" * 70_000, chunks=7, declared=False) is None
    assert len(asked.body) <= 1000 + 64 * 1024
    assert asked("/en/gradio_api/upload", "POST", b"x" * 900, chunks=3) == 200
    assert len(asked.body) == 900


def data(**file) -> bytes:
    return json.dumps({"data": ["text", [{"meta": {"_type": "gradio.FileData"}, **file}]], "fn_index": 1}).encode()


def test_a_request_names_uploads_alone(asked, tmp_path):
    (tmp_path / "a.png").touch()
    assert asked("/en/gradio_api/queue/join", "POST", data(path=str(tmp_path / "a.png"), url=None), chunks=2) == 200
    assert json.loads(asked.body)["fn_index"] == 1
    (tmp_path / "link.png").symlink_to("/etc/passwd")
    wrong = [
        "/etc/passwd",
        "a.png",
        f"{tmp_path}/../x",
        str(tmp_path / "link.png"),
        "http://127.0.0.1/x",
        "a\0",
        7,
        [],
        {},
    ]
    for path in wrong:
        for route in ("queue/join", "run/text", "call/text", "api/text/"):
            assert asked(f"/en/gradio_api/{route}", "POST", data(path=path)) == 403, path
            assert not asked.passed
    proxied = data(path=str(tmp_path / "a.png"), url="http://127.0.0.1:7860/gradio_api/proxy=http://127.0.0.1/")
    assert asked("/en/gradio_api/queue/join", "POST", proxied) == 403
    assert asked("/en/gradio_api/queue/join", "POST", b"{") == 403


def test_nested_mappings_are_looked_at(tmp_path):
    deep = b'{"a":' * 500 + b'{"path": "/etc/passwd"}' + b"}" * 500
    assert not names_only_uploads(deep, tmp_path)
    assert not names_only_uploads(b"[" * 100_000, tmp_path)
    assert names_only_uploads(b'{"data": ["/etc/passwd is a text"]}', tmp_path)


def test_answers_load_nothing_from_elsewhere(asked):
    asked("/en/")
    policy = asked.headers[b"content-security-policy"].decode()
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "http:" not in policy
    assert "https:" not in policy
    assert asked.headers[b"x-content-type-options"] == b"nosniff"
    assert b"Access-Control-Allow-Origin" not in asked.headers
    assert asked.headers[b"x-own"] == b"1"


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("192.168.1.1", False), ("x", False)],
)
def test_loopback_addresses(host, expected):
    assert is_loopback(host) is expected
