"""The page in a browser: every tab makes its thing with the tiny models.

Set WEB_SCREENSHOTS to a folder, and the pictures of docs/web.md are taken.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogvideox_sat.configuration.video_records import read_record
from cogvideox_sat.web.page import build_page

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
SECONDS = 90_000  # milliseconds, for what takes a second on a machine that is not busy
EVIL = "<img src=x onerror=alert(1)>"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs a browser, such as Debian's chromium"),
]


class Served:
    """A page in a process of its own, with two videos to train on."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("data", "runs", "adapters"):
            (folder / name).mkdir(exist_ok=True)
        self.start()

    def start(self) -> None:
        words = ["tools/web.py", "--port", "0", "--device", "cpu", "--output_dir", str(self.folder / "videos")]
        words += ["--data", str(self.folder / "data"), "--runs", str(self.folder / "runs")]
        words += ["--adapters", str(self.folder / "runs")]
        self.begin = time.monotonic()
        self.process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        said = []
        for line in self.process.stderr:
            said.append(line)
            if match := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            raise AssertionError("".join(said))
        self.address = match[0]
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("served"))
    yield served
    served.stop()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """Somebody who looks at the page, and what their browser had to do with others."""

    def __init__(self, browser, served: Served, language: str = "en"):
        self.context = browser.new_context(viewport={"width": 1100, "height": 760})
        self.page = self.context.new_page()
        self.page.set_default_timeout(SECONDS)
        self.elsewhere: list[str] = []
        self.dialogs: list[str] = []
        own = (served.address, "data:", "blob:")
        self.page.on("request", lambda request: request.url.startswith(own) or self.elsewhere.append(request.url))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.page.goto(f"{served.address}/{language}/")
        self.page.wait_for_selector("button.make")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def fill(self, box: str, value: str) -> None:
        self.page.locator(f".{box} textarea:visible, .{box} input:visible").first.fill(value)

    def make(self) -> None:
        self.page.locator("button.make:visible").click()

    def status(self, words: str) -> str:
        """Return what is told of the video once that has some words in it."""
        found = self.page.locator(".status:visible", has_text=words).first
        found.wait_for()
        return found.inner_text()

    def choose(self, box: str, value: str) -> None:
        """Choose from a list, which may be filled only once the page is complete."""
        from playwright.sync_api import TimeoutError as TooLate

        end = time.monotonic() + SECONDS / 1000
        while True:
            self.page.locator(f".{box} input:visible").click()
            try:
                self.page.get_by_role("option", name=value).first.click(timeout=2000)
            except TooLate:
                assert time.monotonic() < end, f"{value} is not offered"
                self.page.keyboard.press("Escape")
                self.page.locator("header.top").first.click()
            else:
                return

    def choose_model(self, name: str) -> None:
        self.page.locator(".model input:visible").click()
        self.page.get_by_role("option", name=name, exact=True).first.click()

    def shot(self, name: str, top: str = "header.top") -> None:
        """Take a picture for the guide, from an element downwards."""
        if folder := os.environ.get("WEB_SCREENSHOTS"):
            file = Path(folder) / f"web_{name}.png"
            self.page.locator(top).first.evaluate("element => element.scrollIntoView()")
            self.page.wait_for_timeout(1000)  # for videos to show themselves
            self.page.screenshot(path=file)
            Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(file, optimize=True)

    def close(self) -> None:
        self.context.close()
        assert not self.elsewhere, "nothing is loaded from other machines"
        assert not self.dialogs, "nothing that people write is run"


@pytest.fixture
def visit(browser, served):
    visit = Visit(browser, served)
    yield visit
    visit.close()


def test_a_text_becomes_a_video(visit, served):
    visit.fill("prompt", "a large orange square moving right on a red background")
    visit.fill("seed", "42")
    begin = time.monotonic()
    visit.make()
    visit.page.locator(".status .progress").first.wait_for()
    assert time.monotonic() - begin < 10, "2 s, on a machine that is not busy"
    visit.status("Done in")
    visit.page.locator(".made video").first.wait_for()
    visit.page.locator(".videos figure").first.wait_for()
    (video,) = (served.folder / "videos").glob("*.mp4")
    assert b"moov" in video.read_bytes(), "a whole file"
    assert video.with_suffix(".json").is_file()
    visit.shot("text")


def test_a_preview_is_shown_and_a_video_is_cancelled(visit, served):
    before = len(list((served.folder / "videos").iterdir()))
    visit.fill("prompt", "a small green circle moving in a circle on a blue background")
    visit.page.get_by_label("Steps", exact=True).first.fill("1000")
    visit.make()
    visit.page.locator(".status img.preview").first.wait_for()
    visit.page.locator(".status .progress", has_text=re.compile("Step [1-9][0-9]+ of")).first.wait_for()
    visit.shot("preview")
    visit.page.locator("button.cancel:visible").click()
    visit.status("Cancelled. Nothing was written.")
    assert len(list((served.folder / "videos").iterdir())) == before


def test_mistakes_are_one_line(visit):
    visit.fill("prompt", "")
    visit.make()
    assert visit.status("prompt") == "prompt: it is empty; say what the video shows"
    visit.fill("prompt", "p")
    visit.fill("seed", EVIL)
    visit.make()
    assert EVIL in visit.status("seed: got")
    visit.tab("Picture and clip to video")
    visit.fill("prompt", "p")
    visit.make()
    assert "give a first frame, a key frame or a clip" in visit.status("image: tiny_i2v is an image-to-video model")


def test_settings_are_used_again_after_a_restart(browser, served):
    served.stop()
    served.start()
    visit = Visit(browser, served)
    visit.choose("chosen", "a large orange square")
    visit.page.locator(".details table").first.wait_for()
    visit.page.locator("button.again").click()
    visit.page.locator(".said", has_text="are filled in").first.wait_for()
    assert visit.page.locator(".seed input:visible, .seed textarea:visible").first.input_value() == "42"
    assert "a large orange square" in visit.page.locator(".prompt textarea:visible").input_value()
    visit.shot("gallery", ".waiting")
    visit.close()


def test_markup_in_a_prompt_stays_text(visit):
    prompt = f"{EVIL} ${{1+1}} {{{{x}}}} <b>bold</b>"
    visit.fill("prompt", prompt)
    visit.page.get_by_label("Steps", exact=True).first.fill("1")
    visit.make()
    visit.status("Done in")
    visit.page.locator(".videos figcaption", has_text="<b>bold</b>").first.wait_for()
    assert visit.page.locator(".videos figcaption").first.inner_text() == prompt
    visit.choose("chosen", "<b>bold</b>")
    visit.page.locator(".details td", has_text=prompt).first.wait_for()


def test_a_picture_becomes_a_video(visit, served, tmp_path):
    picture, last = tmp_path / f"{EVIL.replace('/', '')}.png", tmp_path / "last.png"
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(picture)
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(last)
    visit.tab("Picture and clip to video")
    visit.fill("prompt", "a large white square growing")
    visit.page.get_by_label("Steps", exact=True).last.fill("3")
    visit.page.locator(".image input[type=file]").set_input_files(str(picture))
    visit.page.locator(".keyframes input[type=file]").set_input_files(str(last))
    visit.page.locator(".keyframes .file-preview").first.wait_for()
    visit.fill("keyframes_at", "-1")
    visit.make()
    visit.status("Done in")
    visit.shot("picture")
    assert len(list((served.folder / "videos" / "inputs").iterdir())) == 2


def test_a_clip_is_changed_and_used_again(visit, served):
    clip = next((served.folder / "videos").glob("*.mp4"))
    visit.tab("Picture and clip to video")
    visit.choose_model("tiny")
    visit.fill("prompt", "a small green circle")
    visit.page.get_by_label("Steps", exact=True).last.fill("4")
    visit.page.locator(".clip input[type=file]").set_input_files(str(clip))
    visit.page.locator(".clip .file-preview").first.wait_for()
    visit.fill("strength", "0.5")
    visit.make()
    visit.status("Done in")
    newest = max((served.folder / "videos").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    fields = read_record(newest).request()
    assert fields["strength"] == 0.5
    assert Path(fields["video"]).read_bytes() == clip.read_bytes()
    visit.choose("chosen", newest.stem)
    visit.page.locator("button.again").click()
    visit.page.locator(".said", has_text="are filled in").first.wait_for()
    visit.page.locator(".clip .file-preview:visible").first.wait_for()
    visit.make()
    visit.page.locator(".videos figure").nth(len(list((served.folder / "videos").glob("*.mp4")))).wait_for()


def test_two_people_make_videos_and_one_closes_the_browser(browser, served):
    first, second = Visit(browser, served), Visit(browser, served, "ja")
    before = len(list((served.folder / "videos").glob("*.mp4")))
    first.fill("prompt", "one")
    first.page.get_by_label("Steps", exact=True).first.fill("30")
    first.make()
    first.page.locator(".status .progress").first.wait_for()
    first.close()
    second.fill("prompt", "two")
    second.make()
    second.status("秒で完了")
    second.shot("japanese")
    second.close()
    assert len(list((served.folder / "videos").glob("*.mp4"))) == before + 2, "closing a browser loses no video"


@pytest.fixture(scope="module")
def clips(served):
    """Make a data set of four clips."""
    folder = served.folder / "data" / "clips"
    words = ["tools/make_shapes_dataset.py", "--output", str(folder), "--frames", "9", "--size", "64", "64"]
    words += ["--fps", "8", "--clips", "4", "--seed", "0"]
    assert subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True).returncode == 0
    return folder


def test_a_data_set_is_shown(clips, visit):
    visit.tab("Data")
    visit.page.locator("button.look").click()
    visit.page.locator(".data_view .problem", has_text="train_data: nothing is chosen").first.wait_for()
    visit.choose("data_set", "clips")
    visit.page.locator("button.look").click()
    visit.page.locator(".data_view img.sheet").first.wait_for()
    assert "9 frames of 64x64" in visit.page.locator(".data_view").first.inner_text()
    visit.shot("data")


def test_a_run_is_trained_and_followed(clips, visit, served):
    visit.tab("Training")
    visit.page.locator("button.train").click()
    said = visit.page.locator(".training_said")
    said.filter(has_text="train_data: nothing is chosen; choose a data set").first.wait_for()
    visit.choose("training_train_data", "clips")
    visit.choose("training_valid_data", "clips")
    for name, value in (("train_iters", "3"), ("eval_interval", "2"), ("save_interval", "3"), ("batch_size", "1")):
        visit.fill(f"training_{name}", value)
    visit.page.locator("button.train").click()
    visit.page.locator(".training_view svg.curve").first.wait_for()
    visit.page.locator(".training_view video").first.wait_for()
    said.filter(has_text="page has ended.").first.wait_for()
    visit.shot("training")
    (run,) = (served.folder / "runs").iterdir()
    assert (run / "3").is_dir()


def test_an_adapter_is_used(visit, served):
    (run,) = (served.folder / "runs").iterdir()
    visit.page.get_by_text("More settings").first.click()
    visit.choose("adapters", run.name)
    visit.fill("strengths", "0.5")
    visit.fill("prompt", "a kite")
    visit.page.get_by_label("Steps", exact=True).first.fill("1")
    visit.make()
    visit.status("Done in")
    newest = max((served.folder / "videos").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    (adapter,) = read_record(newest)["adapters"]
    assert Path(adapter["path"]) == run
    assert adapter["scale"] == 0.5


def test_pages_are_built_in_python():
    assert callable(build_page)
