"""Prompts are read from files; errors name their place."""

import json
import logging
from dataclasses import fields
from pathlib import Path

import pytest

from cogvideox_sat.configuration.request_fields import FIELDS
from cogvideox_sat.configuration.sampler_knobs import SamplerKnobs
from cogvideox_sat.sampling.prompt_files import read_prompts
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from sgm.errors import UserError


@pytest.fixture
def prompt_file(tmp_path):
    """Write a prompt file of the given name and content, beside an image `cat.png`."""
    (tmp_path / "cat.png").touch()

    def write(content: str | bytes | list, name: str = "prompts.txt") -> Path:
        path = tmp_path / name
        if isinstance(content, list):
            content, path = "\n".join(json.dumps(record) for record in content), tmp_path / "prompts.jsonl"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_text_file_gives_one_prompt_a_line(prompt_file):
    requests = read_prompts(prompt_file("a cat\n  two dogs, “running” \n森 🌲\n"))
    assert requests == [PromptRequest(0, "a cat"), PromptRequest(1, "two dogs, “running”"), PromptRequest(2, "森 🌲")]


@pytest.mark.parametrize("content", ["\ufeffa\r\nb\r\n", "a\rb", "\ufeffa\nb"])
def test_byte_order_marks_and_foreign_line_ends(prompt_file, content):
    assert [request.text for request in read_prompts(prompt_file(content))] == ["a", "b"]


def test_a_unicode_line_separator_does_not_end_a_prompt(prompt_file):
    assert [request.text for request in read_prompts(prompt_file("a\u2028b\nc"))] == ["a\u2028b", "c"]


def test_empty_lines_are_skipped_with_a_warning_and_count_as_in_the_original(prompt_file, caplog):
    path = prompt_file("a\n \nb\n")
    with caplog.at_level(logging.WARNING):
        assert [(request.index, request.text) for request in read_prompts(path)] == [(0, "a"), (2, "b")]
    assert [record.getMessage() for record in caplog.records] == [f"{path}, line 2: skipped, it is empty"]


def test_a_line_with_an_image_and_no_prompt_counts_too(prompt_file):
    requests = read_prompts(prompt_file("\n@@cat.png\na@@cat.png\n\n"))
    assert [(request.index, request.text) for request in requests] == [(2, "a")]


def test_empty_lines_of_json_take_no_index(prompt_file):
    path = prompt_file('{"prompt": "a"}\n\n{"prompt": "b"}\n', "prompts.jsonl")
    assert [(request.index, request.text) for request in read_prompts(path)] == [(0, "a"), (1, "b")]


def test_image_paths_are_taken_from_the_repository_last(prompt_file, tmp_path, monkeypatch):
    from cogvideox_sat.commands import input_paths

    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "dog.png").touch()
    monkeypatch.setattr(input_paths, "ROOT", tmp_path / "root")
    assert read_prompts(prompt_file("a dog@@dog.png"))[0].image == tmp_path / "root" / "dog.png"


def test_image_paths_are_taken_from_the_folder_of_the_prompt_file(prompt_file, tmp_path):
    assert read_prompts(prompt_file("a cat @@ cat.png")) == [PromptRequest(0, "a cat", image=tmp_path / "cat.png")]


def test_image_paths_are_taken_from_the_current_directory_first(prompt_file, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    (here / "cat.png").touch()
    monkeypatch.chdir(here)
    assert read_prompts(prompt_file("a@@cat.png"))[0].image == Path("cat.png")


def test_the_last_separator_splits(prompt_file, tmp_path):
    assert read_prompts(prompt_file("mail@@home@@cat.png"))[0].text == "mail@@home"


def test_json_lines_take_every_field(prompt_file, tmp_path):
    record = {"prompt": "a@@b", "negative_prompt": "blur", "image": "cat.png", "seed": 3, "num_frames": 5}
    requests = read_prompts(prompt_file([{**record, "size": [64, 96]}, {"prompt": "b", "seed": None}]))
    assert requests[0] == PromptRequest(0, "a@@b", "blur", tmp_path / "cat.png", 3, 5, (64, 96))
    assert requests[1] == PromptRequest(1, "b")
    further = {"frames": 9, "fps": 16, "steps": 20, "guidance_scale": 4, "guidance_schedule": "diffusers"}
    record = {"prompt": "a", "sampler": "ddim", "guidance_interval": [0.2, 0.8], **further}
    (request,) = read_prompts(prompt_file([record]))
    expected = PromptRequest(0, "a", sampler="VideoDDIMSampler", guidance_interval=(0.2, 0.8), **further)
    assert request == expected and request.knobs == SamplerKnobs("ddim", 4, (0.2, 0.8), "diffusers")


def test_empty_prompts_are_skipped_with_a_warning(prompt_file, caplog):
    requests = read_prompts(prompt_file([{"prompt": "a"}, {"prompt": ""}, {"prompt": "  "}, {"prompt": "b"}]))
    assert [(request.index, request.text) for request in requests] == [(0, "a"), (1, "b")]
    assert caplog.text.count("skipped, its prompt is empty") == 2


def test_every_field_of_a_request_can_be_given_in_json():
    assert set(FIELDS) == {field.name for field in fields(PromptRequest)} - {"index", "text"} | {"prompt"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "sede": 1}, "line 2: unknown key 'sede'; did you mean 'seed'?"),
        ({"prompt": "a", "xyz": 1}, "line 2: unknown key 'xyz'; known are prompt, negative_prompt"),
        ({"text": "a"}, "line 2: unknown key 'text'"),
        ({"seed": 1}, "line 2: the key 'prompt' is missing"),
        ({"prompt": None}, "line 2: 'prompt' must be a string, got null"),
        ({"prompt": "a", "seed": True}, "line 2: 'seed' must be a whole number"),
        ({"prompt": "a", "seed": -1}, "line 2: 'seed' must be"),
        ({"prompt": "a \ud83d fox"}, "line 2: 'prompt' has half a character"),
        ({"prompt": "a", "negative_prompt": "\udc00"}, "line 2: 'negative_prompt' has half a character"),
        ({"prompt": "a", "num_frames": 4.0}, "line 2: 'num_frames' must be"),
        ({"prompt": "a", "size": [480]}, r"line 2: 'size' must be \[height, width\]"),
        ({"prompt": "a", "size": "480x720"}, "line 2: 'size' must be"),
        ({"prompt": "a", "image": "dog.png"}, "line 2: image dog.png does not exist"),
        ({"prompt": "a", "frames": 9, "num_frames": 3}, "line 2: 'frames' and 'num_frames' are both given"),
        ({"prompt": "a", "guidance_scale": "6"}, "line 2: 'guidance_scale' must be a number from 0 to 1000"),
        ({"prompt": "a", "guidance_scal": 6}, "line 2: unknown key 'guidance_scal'; did you mean 'guidance_scale'?"),
        ({"prompt": "a", "guidance_interval": [0.8, 0.2]}, "line 2: 'guidance_interval' must be two shares"),
        ({"prompt": "a", "guidance_schedule": "cosine"}, "line 2: 'guidance_schedule' must be one of timestep, "),
        ({"prompt": "a", "sampler": "dimm"}, "line 2: sampler: got 'dimm'; did you mean ddim?"),
        ({"prompt": "a", "steps": 0}, "line 2: 'steps' must be a positive whole number"),
        ({"prompt": "a", "fps": 8.0}, "line 2: 'fps' must be a whole number"),
        (["a"], "line 2: expected a JSON object"),
    ],
)
def test_mistakes_in_json_name_line_and_key(prompt_file, record, message):
    with pytest.raises(UserError, match=message):
        read_prompts(prompt_file([{"prompt": "fine"}, record]))


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "prompts.txt", "holds no prompt"),
        ("\n\n", "prompts.txt", "holds no prompt"),
        ("a\ncaf\u00e9".encode("latin-1"), "prompts.txt", r"not UTF-8 text \(line 2\)"),
        ("a cat".encode("utf-16"), "prompts.txt", "not UTF-8"),
        ("a cat".encode("utf-16-le"), "prompts.txt", "not UTF-8"),
        ("{'prompt': 1}", "prompts.jsonl", "line 1: not valid JSON"),
        ('["a"]', "prompts.json", "use .txt"),
        ("a@@", "prompts.txt", "line 1: an image path is missing"),
        ("a@@" + "x" * 5000, "prompts.txt", "line 1: image xxx"),
    ],
)
def test_files_that_will_not_do(prompt_file, content, name, message):
    with pytest.raises(UserError, match=message):
        read_prompts(prompt_file(content, name))


def test_missing_file_and_folder_are_named(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match=f"cannot read the prompt file {path}"):
            read_prompts(path)


def test_images_must_fit_the_kind_of_model(prompt_file):
    with pytest.raises(UserError, match="line 2: an image-to-video model needs an image"):
        read_prompts(prompt_file("a@@cat.png\nb"), image_to_video=True)
    with pytest.raises(UserError, match="line 1: the prompt names an image"):
        read_prompts(prompt_file("a@@cat.png\nb"), image_to_video=False)
