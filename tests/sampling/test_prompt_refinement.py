"""Refinement with a real server: requests, retries, and no lost prompts."""

import base64
import io
import json
import logging
import socket
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from chat_server import Reply, chat_server
from cogvideox_sat.sampling.prompt_refinement import Endpoint, Prompt, refine
from sgm.errors import UserError

IDEA = Prompt("a cat")


def endpoint(server, **settings) -> Endpoint:
    base = Endpoint(model="m", api_key="secret-key", base_url=server.url, timeout=5, tries=3)
    return replace(base, **settings)


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "large.png"
    Image.new("RGBA", (2000, 1000), (255, 0, 0, 255)).save(path)
    return path


@pytest.mark.slow
def test_a_text_is_refined():
    with chat_server(lambda request, number: Reply(' "A cat\n\nwalks  slowly." ')) as server:
        assert refine([IDEA], endpoint(server)) == ["A cat walks slowly."]
    (request,) = server.requests
    assert request["model"] == "m"
    assert [message["role"] for message in request["messages"]] == ["system", "user", "assistant", "user"]
    assert server.idea(0) == "a cat"
    assert server.keys == ["Bearer secret-key"]


def test_an_image_is_sent_small_and_asks_what_moves(image):
    with chat_server() as server:
        assert refine([Prompt("it jumps", image)], endpoint(server)) == ["A long description."]
    text, picture = server.idea(0)
    assert "it jumps" in text["text"]
    head, _, data = picture["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (sent.format, sent.size) == ("JPEG", (1024, 512))
    assert sent.getpixel((5, 5))[0] > 250
    assert "moves" in server.requests[0]["messages"][0]["content"]


def test_order_is_kept_and_few_are_sent_at_once():
    def reply(request, number):
        idea = request["messages"][-1]["content"]
        return Reply(f"refined {idea}", delay=0.06 if idea.endswith("0") else 0.02)

    ideas = [f"idea {i}" for i in range(12)]
    seen = []
    with chat_server(reply) as server:
        texts = refine(list(map(Prompt, ideas)), endpoint(server, workers=3), done=lambda: seen.append(1))
    assert texts == [f"refined {idea}" for idea in ideas]
    assert 1 < server.most_busy <= 3
    assert len(seen) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "failure",
    [
        Reply(status=500, body="{}"),
        Reply(status=429, body="{}"),
        Reply(body="{not json"),
        Reply(body="[]"),
        Reply(body="null"),
        Reply(body="<html>", headers={"Content-Type": "text/html"}),
        Reply(body='{"choices": []}'),
        Reply(body='{"choices": null}'),
        Reply(body='{"choices": [{"message": null}]}'),
        Reply(text=None),
        Reply(text=["a", "list"]),
        Reply(text="  \n "),
        Reply(text="a" * 5000),
        Reply(text="A cat walks and", finish="length"),
    ],
    ids=lambda reply: f"{reply.status} {str(reply.body or reply.text)[:24]} {reply.finish}",
)
def test_failures_are_tried_again_and_in_the_end_the_prompt_stays(failure, caplog):
    with chat_server(lambda request, number: failure if number < 2 else Reply("fine")) as server:
        assert refine([IDEA], endpoint(server)) == ["fine"]
        assert len(server.requests) == 3
        server.reply = lambda request, number: failure
        assert refine([IDEA], endpoint(server)) == [None]
        assert len(server.requests) == 6
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.startswith("prompt kept as it is ('a cat'): ")
    assert "\n" not in warning


@pytest.mark.slow
def test_waits_grow():
    """They are the client's: half a second, then one, less a quarter at most by chance."""
    times = []
    busy = Reply(status=503, body="{}")
    with chat_server(lambda request, number: (times.append(time.monotonic()), busy)[1]) as server:
        assert refine([IDEA], endpoint(server)) == [None]
    first, second = (later - sooner for sooner, later in pairwise(times))
    assert 0.37 < first < second < 5
    assert second > 0.74


@pytest.mark.slow
def test_tries_are_counted_whatever_fails():
    """The client's retries and useless answers count together."""
    replies = [Reply(status=503, body="{}"), Reply(text=""), Reply(body="{not json"), Reply("fine")]
    with chat_server(lambda request, number: replies[number]) as server:
        assert refine([IDEA], endpoint(server, tries=4)) == ["fine"]
        server.requests.clear()
        assert refine([IDEA], endpoint(server, tries=3)) == [None]
        assert len(server.requests) == 3


@pytest.mark.slow
def test_the_server_may_ask_for_a_longer_wait():
    busy = Reply(status=429, body="{}", headers={"Retry-After": "0.4"})
    with chat_server(lambda request, number: busy if number == 0 else Reply("fine")) as server:
        start = time.monotonic()
        assert refine([IDEA], endpoint(server)) == ["fine"]
        assert 0.4 <= time.monotonic() - start < 3
        server.reply = lambda request, number: Reply(status=429, headers={"Retry-After": "Thu, 01 Jan 1970"})
        assert refine([IDEA], endpoint(server)) == [None]


@pytest.mark.slow
def test_a_timeout_is_tried_again(caplog):
    with chat_server(lambda request, number: Reply("fine", delay=4.0 if number == 0 else 0)) as server:
        assert refine([IDEA], endpoint(server, timeout=1.5)) == ["fine"]
        assert len(server.requests) == 2
        server.reply = lambda request, number: Reply(delay=4.0)
        assert refine([IDEA], endpoint(server, timeout=0.2, tries=2)) == [None]
    assert "no answer within 0.2 seconds" in caplog.text


@pytest.mark.slow
def test_nobody_there(caplog):
    """Every prompt stays, and only the first ones wait for the server to come up."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    nowhere = Endpoint(model="m", api_key="k", base_url=address, tries=3, workers=1)
    start = time.monotonic()
    assert refine([IDEA] * 20, nowhere) == [None] * 20
    assert time.monotonic() - start < 10  # 20 × 1.1 seconds of waiting if all waited
    assert f"cannot reach {address}" in caplog.text


@pytest.mark.slow
def test_somebody_comes_up_late():
    """A prompt sent once without a server has all its tries when a busy server appears."""
    replies = [Reply(delay=0.5)] * 3 + [Reply(status=503, body="{}")] * 2 + [Reply("fine")]
    with chat_server(lambda request, number: replies[number]) as server:
        assert refine([IDEA, IDEA], endpoint(server, timeout=0.2, workers=1)) == [None, "fine"]


@pytest.mark.slow
def test_prompts_that_wait_are_given_up_when_none_can_succeed():
    refused, busy = Reply(status=401, body="{}", delay=0.3), Reply(status=503, body="{}", headers={"Retry-After": "1"})
    with chat_server(lambda request, number: busy if number else refused) as server:
        with pytest.raises(UserError):
            refine([IDEA] * 3, endpoint(server))
        time.sleep(1.5)
        assert len(server.requests) == 3


@pytest.mark.parametrize(("status", "reason"), [(401, "OPENAI_API_KEY"), (403, "access"), (404, "model")])
def test_what_no_prompt_can_survive_stops_at_once(status, reason):
    body = json.dumps({"error": {"message": "Incorrect API key provided: secret-key"}})
    with chat_server(lambda request, number: Reply(status=status, body=body)) as server:
        with pytest.raises(UserError, match=reason) as error:
            refine([IDEA] * 10, endpoint(server, workers=1))
        assert "secret-key" not in str(error.value)
        assert len(server.requests) <= 2  # no second try; the next prompt may have been on its way


def test_a_refused_prompt_is_not_sent_again(caplog):
    with chat_server(lambda request, number: Reply(status=400, body="{}")) as server:
        assert refine([IDEA], endpoint(server)) == [None]
        assert len(server.requests) == 1
        server.reply = lambda request, number: Reply("I will not", finish="content_filter")
        assert refine([IDEA], endpoint(server)) == [None]
    assert "status 400" in caplog.text
    assert "content_filter" in caplog.text


def test_a_damaged_image_costs_no_request(tmp_path, caplog, monkeypatch):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    Image.new("RGB", (60, 40)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses images of twice as many pixels
    prompts = [Prompt("a", tmp_path / f"{name}.png") for name in ("broken", "missing", "huge")]
    with chat_server() as server:
        assert refine([*prompts, IDEA], endpoint(server)) == [None, None, None, "A long description."]
        assert len(server.requests) == 1
    assert all(f"cannot read {prompt.image}" in caplog.text for prompt in prompts)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("<think>a cat,\nhm</think>\nA cat.", "A cat."),
        ("A cat @@@ home", "A cat @ home"),
        ("A \ud800cat\0.", "A cat."),
        ("“A cat.”", "A cat."),
        ('A "cat".', 'A "cat".'),
        ("A\u2028cat.", "A cat."),
    ],
)
def test_answers_fit_on_a_line_of_a_prompt_file(answer, text):
    with chat_server(lambda request, number: Reply(answer)) as server:
        assert refine([IDEA], endpoint(server)) == [text]


def test_the_environment_names_the_endpoint(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        Endpoint.from_environment()
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost:8000")
    with pytest.raises(UserError, match="expected an address"):
        Endpoint.from_environment()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    assert Endpoint.from_environment(timeout=None).timeout == 60  # a server of one's own may take no key
    monkeypatch.setenv("OPENAI_MODEL", "mine")
    assert Endpoint.from_environment().model == "mine"
    assert Endpoint.from_environment(model="other", tries=1).model == "other"
    monkeypatch.setattr("cogvideox_sat.sampling.prompt_refinement.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install openai"):
        Endpoint.from_environment()


# ---------------------------------------------------------------------------------------------------------------------
# On the way to a video
# ---------------------------------------------------------------------------------------------------------------------


def sample(
    tiny, folder: Path, prompts: list[str], *flags: str, name: str = "videos", code: int = 0
) -> dict[str, bytes]:
    """Return the files of a run of the sampling command, by their names."""
    from sample_video import main

    (folder / f"{name}.txt").write_text("\n".join(prompts))
    given = ("--base", tiny.config("5b"), "--input_file", folder / f"{name}.txt", "--output_dir", folder / name)
    size = ("--sampling_num_steps", "1", "--sampling_image_size", "32", "48", "--sampling_num_frames", "1")
    assert main([*map(str, given), *size, "--only_save_latents", *flags]) == code
    return {str(path.relative_to(folder / name)): path.read_bytes() for path in (folder / name).rglob("*.safetensors")}


@pytest.mark.slow
def test_sampling_refined_prompts(tiny, tmp_path, monkeypatch):
    """Videos have refined prompts, and the names and seeds of the original ones.

    Prompts of existing videos are not refined.
    """
    answers = {"a cat": Reply("A grey cat walks."), "a dog": Reply(status=400, body="{}")}
    with chat_server(lambda request, number: answers[request["messages"][-1]["content"]]) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        videos = sample(tiny, tmp_path, ["a cat", "a dog"], "--refine_prompts")
        assert sample(tiny, tmp_path, ["a cat", "a dog"], "--refine_prompts", "--skip_existing") == videos
        assert len(server.requests) == 2
        server.reply = lambda request, number: Reply(status=401, body="{}")
        sample(tiny, tmp_path, ["a cat"], "--refine_prompts", name="refused", code=2)
        assert not (tmp_path / "refused").exists()
    plain = sample(tiny, tmp_path, ["A grey cat walks.", "a dog"], name="plain")
    assert [name.split("/")[0] for name in sorted(videos)] == ["0_a_cat", "1_a_dog"]
    assert [videos[name] for name in sorted(videos)] == [plain[name] for name in sorted(plain)]


@pytest.mark.slow
def test_sampling_typed_prompts_refined(tiny, tmp_path, monkeypatch):
    with chat_server(lambda request, number: Reply("A grey cat walks.")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setattr("sys.stdin", io.StringIO("a cat\nq\n"))
        typed = sample(tiny, tmp_path, ["-"], "--refine_prompts", "--input_type", "cli")
        assert len(server.requests) == 1
    assert list(typed.values()) == list(sample(tiny, tmp_path, ["A grey cat walks."], name="plain").values())


def test_sampling_without_a_key_stops_before_anything_is_loaded(tiny, tmp_path, monkeypatch, caplog):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    sample(tiny, tmp_path, ["a cat"], "--refine_prompts", code=2)
    assert "refining prompts needs OPENAI_API_KEY" in caplog.text
