"""The refining command with a real server: only the prompts of files change."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from chat_server import Reply, chat_server
from cogvideox_sat.sampling.prompt_files import read_prompts
from tool_runs import error_of
from tools.convert_demo import main

TOOL = Path(__file__).parents[2] / "tools" / "convert_demo.py"
FAST = ("--retry_times", "0")


def idea_of(request: dict) -> str:
    content = request["messages"][-1]["content"]
    return content if isinstance(content, str) else content[0]["text"].removeprefix("The idea: ")


def refined(request: dict, number: int) -> Reply:
    """Refine a prompt, or fail for ideas with `fail`."""
    idea = idea_of(request)
    return Reply(status=500, body="{}") if "fail" in idea else Reply(f"long {idea}")


@pytest.fixture
def server(monkeypatch):
    with chat_server(refined) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "key")
        monkeypatch.setenv("OPENAI_MODEL", "small")
        yield server


@pytest.fixture
def image(tmp_path) -> Path:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a b.png")
    return tmp_path / "a b.png"


def convert(source: Path, target: Path, *flags: str) -> bytes:
    assert main(["--input_file", str(source), "--output_file", str(target), *FAST, *flags]) == 0
    return target.read_bytes()


def test_one_prompt_goes_to_standard_output(server, capsys, image):
    assert main(["--prompt", "a cat"]) == 0
    assert main(["--prompt", "fail", *FAST]) == 0
    assert main(["--prompt", "", "--image_path", str(image), "--type", "i2v", "--model", "large"]) == 0
    assert capsys.readouterr().out == "long a cat\nfail\nlong There is no idea: choose the motion.\n"
    assert [request["model"] for request in server.requests] == ["small", "small", "large"]


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_a_text_file(server, tmp_path, end, caplog):
    lines = ["a cat", "", "it will fail", "  ein Hund, groß 🐕 \u2028 ", "a cat"]
    source = tmp_path / "prompts.txt"
    source.write_bytes(((end or "\n").join(lines) + end).encode())
    expected = ["long a cat", "", "it will fail", "long ein Hund, groß 🐕", "long a cat"]
    assert convert(source, tmp_path / "new" / "out.txt") == ((end or "\n").join(expected) + end).encode()
    assert "prompt kept as it is ('it will fail'): the endpoint answers with status 500" in caplog.text


def test_images_stay_and_are_found_from_elsewhere(server, tmp_path, image):
    source = tmp_path / "prompts.txt"
    source.write_text(f"it jumps@@ a b.png \nit will fail@@a b.png\nno image\nodd@@but@@{image}\n")
    beside = convert(source, tmp_path / "out.txt").decode()
    assert beside == f"long it jumps@@a b.png\nit will fail@@a b.png\nlong no image\nlong odd@but@@{image}\n"
    elsewhere = convert(source, tmp_path / "new" / "out.txt").decode()
    assert elsewhere == beside.replace("@@a b.png", f"@@{image}")
    assert [request.image for request in read_prompts(tmp_path / "new" / "out.txt")] == [image, image, None, image]


def test_json_lines(server, tmp_path, image):
    records = [
        {"seed": 7, "prompt": "a cat", "size": [32, 48], "negative_prompt": "blür"},
        {"prompt": "it will fail", "num_frames": 3},
        {"prompt": "it jumps", "image": image.name, "seed": None},
    ]
    source = tmp_path / "prompts.jsonl"
    source.write_text("\n".join(json.dumps(record) for record in records))
    lines = convert(source, tmp_path / "out.jsonl").decode().split("\n")
    assert [json.loads(line) for line in lines] == [
        {**records[0], "prompt": "long a cat"},
        records[1],
        {**records[2], "prompt": "long it jumps"},
    ]
    assert [list(json.loads(line)) for line in lines] == [list(record) for record in records]
    elsewhere = convert(source, tmp_path / "new" / "out.jsonl").decode()
    assert json.loads(elsewhere.split("\n")[2])["image"] == str(image)


def test_a_file_may_replace_itself(server, tmp_path, caplog):
    source = tmp_path / "prompts.txt"
    source.write_text("a cat\n")
    text = error_of(main, caplog, "--input_file", source, "--output_file", source)
    assert "exists; give --overwrite" in text
    assert convert(source, source, "--overwrite") == b"long a cat\n"
    assert list(tmp_path.iterdir()) == [source]


def test_a_dry_run_asks_nobody(server, tmp_path, image, caplog):
    caplog.set_level("INFO")
    (tmp_path / "prompts.txt").write_text(f"it jumps@@{image}\n")
    arguments = ["--input_file", tmp_path / "prompts.txt", "--output_file", tmp_path / "out.txt", "--dry_run"]
    assert main(list(map(str, arguments))) == 0
    assert f"would ask small to refine with {image}: it jumps" in caplog.text
    assert not server.requests
    assert not (tmp_path / "out.txt").exists()


def test_a_wrong_key_is_one_line_and_writes_nothing(server, tmp_path, caplog):
    server.reply = lambda request, number: Reply(status=401, body='{"error": {"message": "wrong: key"}}')
    (tmp_path / "prompts.txt").write_text("a cat\n")
    arguments = ("--input_file", tmp_path / "prompts.txt", "--output_file", tmp_path / "new" / "out.txt")
    assert f"{server.url} refuses OPENAI_API_KEY (status 401" in error_of(main, caplog, *arguments)
    assert len(server.requests) == 1
    assert not (tmp_path / "new").exists()


def test_mistakes(server, tmp_path, image, caplog, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    file = ("--input_file", tmp_path / "prompts.txt")
    out = ("--output_file", tmp_path / "out.txt")

    def message(*arguments: str | Path) -> str:
        return error_of(main, caplog, *arguments)

    assert "--prompt: missing; give it or --input_file" in message()
    assert "--output_file: missing" in message(*file)
    assert "cannot be used with --input_file" in message(*file, *out, "--prompt", "a")
    assert "name it '….txt'" in message(*file, "--output_file", tmp_path / "out.jsonl")
    assert "an image-to-video model needs an image" in message(*file, *out, "--type", "i2v")
    assert "--type i2v needs --image_path" in message("--prompt", "a", "--type", "i2v")
    assert "no.png does not exist" in message("--prompt", "a", "--image_path", tmp_path / "no.png")
    assert "--workers: got 0; it must be between 1 and 16" in message("--prompt", "a", "--workers", "0")
    assert "--retry_times: got -1; it must be at least 0" in message("--prompt", "a", "--retry_times", "-1")
    assert "unrecognized arguments" in message("--promt", "a")
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert "needs OPENAI_API_KEY" in message("--prompt", "a")
    assert not server.requests


@pytest.mark.slow
def test_it_needs_no_pytorch(server):
    code = f"import sys, runpy; sys.argv = ['x', '--prompt', 'a cat']; sys.path.insert(0, {str(TOOL.parents[1])!r})\n"
    code += "from tools.convert_demo import main\nassert main() == 0\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "long a cat\n"), result.stderr
