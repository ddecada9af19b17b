"""The page answers in each language, by its own routes alone, and to a client."""

import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from cogvideox_sat.web import server
from cogvideox_sat.web.models import offered_models
from cogvideox_sat.web.server import Options
from cogvideox_sat.web.uploads import Uploads
from sgm.errors import UserError

pytestmark = pytest.mark.slow  # imports gradio, and builds three pages

USERS = {"ann": "long password"}
SLOW = "slowly"


class Pretended:
    """Sampler that writes empty files.

    A prompt `SLOW` takes steps until it is cancelled.
    """

    def __init__(self, models):
        self.tasks = []

    def start(self):
        pass

    def look(self):
        return {"tiny": "", "tiny_i2v": ""}

    def run(self, task, update, is_cancelled):
        from cogvideox_sat.web.jobs import Cancelled

        self.tasks.append(task)
        for step in range(1000 if task.fields["prompt"] == SLOW else 2):
            update(stage="sampling", step=step, steps=1000)
            if is_cancelled():
                raise Cancelled
            time.sleep(0.01)
        if task.fields["prompt"] == "fails":
            raise UserError("sampling: memory is full")
        task.target.parent.mkdir(parents=True, exist_ok=True)
        task.target.write_bytes(b"video")
        return task.target.name

    def close(self):
        pass


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Return the address of a page whose sampler pretends, and what it works with."""
    folder = tmp_path_factory.mktemp("page")
    for name in ("adapters/style", "data/clips", "runs"):
        (folder / name).mkdir(parents=True)
    options = Options(
        offered_models([["tiny"], ["tiny_i2v"]], {}), folder / "videos", port=0, users=USERS, upload_limit=2**20,
        adapters=folder / "adapters", data=folder / "data", runs=folder / "runs", recipes={"tiny": ["tiny.yaml"]},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, server.listening("127.0.0.1", 0) as connection:
        patch.setattr(server, "Sampler", Pretended)
        patch.setenv("OPENAI_API_KEY", "sk-very-secret")
        studio = server.open_studio(options)
        port = connection.getsockname()[1]
        app = server.build_app(studio, options, port)
        import uvicorn

        running = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [connection]}, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", studio
        running.should_exit = True
        thread.join(10)
        studio.close()


@pytest.fixture
def browser(page):
    with httpx.Client(base_url=page[0], auth=tuple(*USERS.items()), timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def client(page):
    from gradio_client import Client

    authorization = httpx.BasicAuth(*next(iter(USERS.items())))
    headers = {"Authorization": authorization._auth_header}
    return Client(f"{page[0]}/en/", headers=headers, verbose=False)


@pytest.fixture(scope="module")
def usual(client):
    """Return what the inputs of a tab are before anything is filled in."""
    return lambda tab: {
        each["parameter_name"]: each.get("parameter_default")
        for each in client.view_api(return_format="dict", print_info=False)["named_endpoints"][tab]["parameters"]
    }


def asked(client, tab: str, prompt: str, **others):
    """Return what a tab answers to a prompt; `others` are by the number of the input."""
    info = client.view_api(return_format="dict", print_info=False)["named_endpoints"][tab]["parameters"]
    values = [each.get("parameter_default") for each in info]
    values[1] = prompt
    for name, value in others.items():
        values[int(name[1:])] = value
    return client.predict(*values, api_name=tab)


def test_the_language_is_that_of_the_browser(browser):
    for accepted, place, word in (
        ("ja", "/ja/", "動画を作る"),
        ("zh-CN", "/zh/", "生成视频"),
        ("de", "/en/", "Make the video"),
    ):
        answer = browser.get("/", headers={"accept-language": accepted}, follow_redirects=True)
        assert answer.status_code == 200
        assert answer.url.path == place
        assert word in answer.text


def test_nothing_of_the_page_is_there_without_the_password(page):
    for path in ("/", "/en/", "/en/config", "/media/video/a.mp4", "/en/gradio_api/info"):
        assert httpx.get(page[0] + path).status_code == 401


def test_keys_and_passwords_do_not_reach_the_browser(browser):
    for path in ("/en/", "/en/config", "/en/gradio_api/info"):
        text = browser.get(path).text
        assert "sk-very-secret" not in text
        assert USERS["ann"] not in text


def test_a_video_is_made_and_shown(client, browser, page):
    status, made, *_ = asked(client, "/text", "a <b>kite</b>")
    assert "Done in" in status
    assert "<b>" not in made
    (task,) = page[1].sampler.tasks[-1:]
    assert (task.model, task.fields["prompt"], task.fields["size"]) == ("tiny", "a <b>kite</b>", (64, 64))
    answer = browser.get(f"/media/video/{task.target.name}")
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"video", "video/mp4")


def test_mistakes_are_one_line(client):
    assert "prompt: it is empty; say what the video shows" in asked(client, "/text", "")[0]
    assert "steps: got 0; expected a whole number from 1 to 1000" in asked(client, "/text", "p", _7=0)[0]
    assert "image: tiny_i2v is an image-to-video model" in asked(client, "/picture", "p")[0]
    assert "sampling: memory is full" in asked(client, "/text", "fails")[0]


def test_a_picture_is_uploaded_and_used(client, page, tmp_path):
    from gradio_client import handle_file

    picture = tmp_path / "a picture.png"
    picture.write_bytes(b"picture")
    status, *_ = asked(client, "/picture", "p", _16=handle_file(str(picture)))
    assert "Done in" in status
    used = Path(page[1].sampler.tasks[-1].fields["image"])
    assert used.is_relative_to(page[1].uploads.folder)
    assert used.read_bytes() == b"picture"
    large = tmp_path / "large.png"
    large.write_bytes(b"x" * (2**20 + 2**17))
    with pytest.raises(Exception, match=r"413|large|upload"):
        asked(client, "/picture", "p", _16=handle_file(str(large)))


def test_a_prompt_is_written_out_and_failures_tell_nothing(client, monkeypatch):
    from cogvideox_sat.web import making_tab

    monkeypatch.setattr(making_tab, "refined", lambda prompt, image: f"a long text of {prompt}")
    assert client.predict("a kite", api_name="/refine")[0] == "a long text of a kite"

    def fails(prompt, image):
        raise UserError("http://ann:sk-very-secret@service.example refuses OPENAI_API_KEY")

    monkeypatch.setattr(making_tab, "refined", fails)
    _, said = client.predict("a kite", api_name="/refine")
    assert "prompt: the service gave no answer that can be used" in said
    assert "secret" not in said


def join(browser, client, values, api="text"):
    """Return the status of a request that a browser would send."""
    number = next(each["id"] for each in client.config["dependencies"] if each["api_name"] == api)
    content = {"data": values, "fn_index": number, "session_hash": "abc"}
    return browser.post("/en/gradio_api/queue/join", json=content).status_code


def test_files_elsewhere_are_neither_read_nor_fetched(browser, client, page, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    (page[1].uploads.folder / "link.png").symlink_to(secret)
    paths = [
        secret,
        f"{page[1].uploads.folder}/../{secret}",
        page[1].uploads.folder / "link.png",
        "http://127.0.0.1:9/x",
    ]
    for path in paths:
        file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        assert join(browser, client, [None] * 16 + [file] + [None] * 5, "picture") == 403
    for path in (*paths, "/etc/passwd", page[1].uploads.folder / "a"):
        for route in ("/en/gradio_api/file=", "/en/file=", "/en/gradio_api/file/", "/en/gradio_api/proxy="):
            assert browser.get(f"{route}{path}").status_code == 404


@pytest.mark.parametrize(
    "name", ["../../outside.png", "/tmp/outside.png", "..\\outside.png", ".htaccess", "a\x00b.png"]
)
def test_an_upload_writes_nothing_outside(browser, page, name):
    answer = browser.post("/en/gradio_api/upload", files={"files": (name, b"outside", "image/png")})
    folder = page[1].uploads.folder
    if answer.status_code == 200:
        assert all(Path(path).resolve().is_relative_to(folder) for path in answer.json())
    places = (folder.parent, folder.parent.parent, Path("/"), Path("/tmp"), Path.cwd())
    assert not any((place / "outside.png").exists() for place in places)


def test_a_video_is_cancelled_by_who_asked_for_it(page):
    studio = page[1]
    job = studio.make({"model": "tiny", "prompt": SLOW})
    before = set(studio.gallery.names())
    while job.step < 2:
        time.sleep(0.01)
    assert studio.queue.cancel(job.id)
    while not job.is_over:
        time.sleep(0.01)
    assert job.state == "cancelled"
    assert set(studio.gallery.names()) == before


def test_videos_of_two_are_made_one_after_the_other(client, page):
    from concurrent.futures import ThreadPoolExecutor

    before = len(page[1].gallery.names())
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda prompt: asked(client, "/text", prompt), ["one", "two"]))
    assert all("Done in" in status for status, *_ in answers)
    assert len(page[1].gallery.names()) == before + 2


def test_a_port_that_is_in_use_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port: 127\.0\.0\.1:{port} cannot be used \(.*\); give another --port"):
            server.listening("127.0.0.1", port)


def test_the_page_answers_to_its_own_names():
    options = Options({}, Path("videos"), host="0.0.0.0", users=USERS, names=("GPU.example",))
    uploads = Uploads(1)
    hosts = server.rules_of(options, 1, uploads).hosts
    uploads.close()
    assert {"localhost", "127.0.0.1", "gpu.example", socket.gethostname().lower()} <= hosts
    assert "0.0.0.0" not in hosts
