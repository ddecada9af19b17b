"""Videos are shown by name, and no path, `..` or link leads out of their folder."""

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from cogvideox_sat.web.media import routes
from cogvideox_sat.web.shelves import Shelf


@pytest.fixture
def client(tmp_path) -> TestClient:
    root = tmp_path / "videos"
    (root / "inputs").mkdir(parents=True)
    (root / "a.mp4").write_bytes(b"0123456789")
    (root / "a.json").write_text("{}")
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "inputs" / "b.mp4").write_bytes(b"b")
    return TestClient(Starlette(routes=routes({"video": Shelf(root, "video").file})))


def test_a_video_is_shown_and_sought(client):
    answer = client.get("/media/video/a.mp4")
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"0123456789", "video/mp4")
    part = client.get("/media/video/a.mp4", headers={"range": "bytes=2-4"})
    assert (part.status_code, part.content) == (206, b"234")


@pytest.mark.parametrize(
    "path",
    [
        *("link.mp4", "../secret.mp4", "..%2fsecret.mp4", "%2e%2e/secret.mp4", "..%5csecret.mp4", "%00", "", "a.json"),
        *("missing.mp4", "/etc/passwd", "%2fetc%2fpasswd", "inputs", "inputs/../../secret.mp4", "a.mp4/b"),
    ],
)
def test_nothing_else_is_shown(client, path):
    assert client.get(f"/media/video/{path}").status_code == 404
