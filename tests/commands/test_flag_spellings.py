"""Test that every flag of every command can be spelled with `-` and `_`."""

import ast
from pathlib import Path

import pytest

import arguments
from cogvideox_sat.commands.flag_spellings import EitherSpellingParser, StrictParser
from cogvideox_sat.configuration import training_arguments, vae_training_arguments
from cogvideox_sat.configuration.argument_fields import argument_fields
from sgm.errors import UserError

ROOT = Path(__file__).parents[2]
# It may run without packages, and is copied as a single file; its flags are single words.
ALONE = {ROOT / "tools" / "setup_environment.py"}
COMMANDS = [arguments, training_arguments, vae_training_arguments]


def values(parser, *words: str) -> dict:
    return vars(parser.parse_args(words))


@pytest.mark.parametrize("module", COMMANDS)
def test_all_flags_of_the_commands(module):
    parser = module.build_parser()
    for action in list(parser._actions):
        for option in action.option_strings:
            if "_" not in option[2:]:
                continue
            dashed = "--" + option[2:].replace("_", "-")
            value = [] if action.nargs == 0 or "Boolean" in type(action).__name__ else ["7"]
            if action.choices:
                value = [next(iter(action.choices))]
            assert values(parser, dashed, *value) == values(parser, option, *value), option


def test_what_the_original_calls_them(tmp_path):
    given = values(
        arguments.build_parser(),
        *("--model-parallel-size", "2", "--input-type=txt", "--input-file", "a-b_c.txt", "--output-dir", "o-o"),
        *("--force-inference", "--sampling-num-frames", "13", "--no-only-save-latents", "--no_skip-existing"),
    )
    assert given == {
        **{"model_parallel_size": 2, "input_type": "txt", "input_file": "a-b_c.txt", "output_dir": "o-o"},
        **{"force_inference": True, "sampling_num_frames": 13, "only_save_latents": False, "skip_existing": False},
    }
    given = values(training_arguments.build_parser(), "--train-iters", "5", "--num-workers=0", "--train-data", "a-b")
    assert given == {"train_iters": 5, "num_workers": 0, "train_data": ["a-b"]}
    assert {"train_iters", "num_workers"} <= argument_fields(training_arguments.TrainingArguments).keys()


def test_values_and_what_follows_two_dashes_stay_as_they_are():
    parser = EitherSpellingParser()
    parser.add_argument("--a_b")
    parser.add_argument("rest", nargs="*")
    assert values(parser, "--a-b=--a-b", "--", "--a-b") == {"a_b": "--a-b", "rest": ["--a-b"]}
    assert parser.parse_known_args(["--c-d=1"])[1] == ["--c-d=1"]


def test_a_mistake_is_a_user_error():
    parser = StrictParser()
    parser.add_argument("--count", type=int)
    for wrong in (["--count", "many"], ["--count"], ["--amount", "1"]):
        with pytest.raises(UserError, match=r"--(count|amount)"):
            parser.parse_args(wrong)


def test_all_parsers_are_of_this_kind():
    for path in (path for folder in ("sat", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)]
        plain = [node for node in calls if ast.unparse(node.func) in ("argparse.ArgumentParser", "ArgumentParser")]
        assert not plain or path in ALONE, path


def test_a_tool_with_dashes(caplog):
    from tools.merge_lora import main

    assert main(["--load", "/nowhere", "--lora", "/nowhere", "--output", "x", "--lora-scaleee", "1"]) == 2
    assert "--lora-scaleee" in caplog.text
    caplog.clear()
    assert main(["--load", "/nowhere", "--lora", "/nowhere", "--output", "x", "--dry-run"]) == 2
    assert "unrecognized" not in caplog.text and "/nowhere" in caplog.text
