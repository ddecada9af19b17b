"""Test that references are replaced within limits, and the file of every key is known."""

import time

import pytest
import yaml

from cogvideox_sat.configuration.files import load_configs
from sgm.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: dict):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_each_key_knows_the_file_that_set_it_last(write):
    first = write("a.yaml", {"model": {"x": {"p": 1, "q": [1, {"r": 2}]}, "y": {"z": 1}}})
    second = write("b.yaml", {"include": "a.yaml", "model": {"x": {"p": 2}, "y": None}})
    sources = load_configs([second]).sources
    assert sources.file_of(("model", "x", "p")) == str(second)
    assert sources.file_of(("model", "x", "q", 1, "r")) == str(first)
    assert sources.file_of(("model", "x", "new")) == str(second)  # the last file that sets x
    assert sources.file_of(("model", "y", "z")) == str(second)
    assert sources.file_of(("data",)) == str(second)
    assert sources.place(("model", "x", "q", 1)) == f"{first}: model.x.q[1]"


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ({"a": "${args.b}", "b": 7}, 7),
        ({"a": "${.b}", "b": [1, 2]}, [1, 2]),
        ({"a": "x${args.b}y${.c}", "b": 7, "c": True}, "x7yTrue"),
        ({"a": "${args.b.c}", "b": "${args.d}", "d": {"c": 5}}, 5),
        ({"a": "${args.l[1]}", "l": [3, 4]}, 4),
        ({"a": "${args.l.0}", "l": [3, 4]}, 3),
        ({"a": "${args.${args.b}}", "b": "c", "c": 9}, 9),
        ({"a": "\\${args.b}"}, "${args.b}"),
        ({"a": "${oc.env:COGVIDEOX_TEST}"}, "from outside"),
        ({"a": "${..args.b}", "b": 1}, 1),
    ],
)
def test_references(write, content, value, monkeypatch):
    monkeypatch.setenv("COGVIDEOX_TEST", "from outside")
    assert load_configs([write("a.yaml", {"args": content})])["args"]["a"] == value


def test_settings_on_top_of_a_reference(write):
    first = write("a.yaml", {"model": {"one": {"p": 1, "q": 2}, "two": "${model.one}"}})
    second = write("b.yaml", {"model": {"two": {"q": 3}}})
    assert load_configs([first, second])["model"] == {"one": {"p": 1, "q": 2}, "two": {"p": 1, "q": 3}}


def test_what_is_referred_to_is_copied(write):
    model = load_configs([write("a.yaml", {"model": {"one": {"p": [1]}, "two": "${model.one}"}})])["model"]
    model["two"]["p"].append(2)
    assert model["one"] == {"p": [1]}


def chain(text: str, length: int) -> dict:
    return {"a0": "x" * 10, **{f"a{i + 1}": text.replace("REF", f"${{args.a{i}}}") for i in range(length)}}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"a": "${args.gone}"}, r"a\.yaml: args\.a: cannot merge: '\$\{args\.gone\}': 'gone' does not exist"),
        ({"a": "${args.b}", "b": "${args.a}"}, "refers to itself"),
        ({"a": {"b": "${args.a}"}}, "refers to itself"),
        ({"a": "${args}"}, "refers to itself"),
        ({"a": "${.....b}"}, "leads above the top"),
        ({"a": "${}"}, "refers to itself"),
        ({"a": "${args.b"}, "not closed"),
        ({"a": "x${args.b}", "b": [1]}, "cannot be part of a text"),
        ({"a": "${oc.env:NOT_SET_ANYWHERE}"}, "NOT_SET_ANYWHERE"),
        ({"a": "${nosuch:thing}"}, "nosuch"),
        (chain("REFREF", 60), "write out more than 4 MiB of text"),
        ({"a500": "x", **{f"a{i}": f"${{args.a{i + 1}}}" for i in range(100, 500)}}, "nested too deep"),
    ],
)
def test_references_that_lead_nowhere(write, content, says):
    started = time.monotonic()
    with pytest.raises(UserError, match=says):
        load_configs([write("a.yaml", {"args": content})])
    assert time.monotonic() - started < 5


@pytest.mark.slow
def test_references_that_write_out_to_billions_of_values(write):
    model = {"m0": {"v": 1}}
    for level in range(12):
        model[f"m{level + 1}"] = {f"k{i}": f"${{model.m{level}}}" for i in range(10)}
    with pytest.raises(UserError, match="write out more than 200000 values"):
        load_configs([write("a.yaml", {"model": model})])


def test_lists_and_mappings_do_not_merge(write):
    first = write("a.yaml", {"model": {"a": [1], "b": {"c": 1}}})
    with pytest.raises(UserError, match=r"b\.yaml: model\.a: cannot merge: keys and values in the place of a list"):
        load_configs([first, write("b.yaml", {"model": {"a": {"x": 1}}})])
    with pytest.raises(UserError, match=r"c\.yaml: model\.b: cannot merge: a list in the place of keys and values"):
        load_configs([first, write("c.yaml", {"model": {"b": [1]}})])


def test_includes_are_bounded(write):
    for level in range(30):
        write(f"{level}.yaml", {"include": [f"{level + 1}.yaml"] * 2})
    write("30.yaml", {})
    with pytest.raises(UserError, match="include: more files than"):
        load_configs([write("all.yaml", {"include": "0.yaml"})])


def test_a_file_that_came_with_something_else_reads_nothing_around_it(write, tmp_path):
    for content in (
        {"include": "b.yaml"},
        {"args": {"load": "${oc.env:HOME}"}},
        {"model": {"a": {"target": "subprocess.Popen"}}},
        {"model": {"a": {"target": "sgm.util.importlib"}}},
        {"model": {"a": {"target": "sgm.util.os.system"}}},
        {"model": {"a": {"target": "os.system"}}},
        {"model": {"a": {"target": "vae_modules.autoencoder.Path"}}},
        {"model": {"a": {"target": "torch.nn.modules.module.OrderedDict"}}},
        {"model": {"a": {"target": "sat.helpers.print_rank0"}}},
    ):
        path = write("training_config.yaml", content)
        with pytest.raises(UserError, match=r"training_config\.yaml"):
            load_configs([path], trusted=False)
    path = write("training_config.yaml", {"model": {"a": {"target": "dit_video_concat.DiffusionTransformer"}}})
    load_configs([path], trusted=False)
