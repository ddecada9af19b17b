"""Test the values of `checkpoint_activations`, and their meaning for the layers."""

import pytest

from cogvideox_sat.configuration.model_values import check_model_values
from cogvideox_sat.configuration.recomputation import Recomputation, recomputation_mode
from cogvideox_sat.configuration.training_arguments import build_parser, check_args_section, check_recomputation
from sgm.config_places import Sources
from sgm.errors import UserError

FLAG = "--checkpoint_activations"


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ([FLAG], True),
        ([FLAG.replace("_", "-")], True),
        (["--no-checkpoint_activations"], False),
        (["--no-checkpoint-activations"], False),
        ([FLAG, "true"], True),
        ([f"{FLAG}=False"], False),
        ([FLAG, "attention"], "attention"),
        ([FLAG, "auto"], "auto"),
        ([FLAG, "12"], 12),
        ([FLAG, "0"], 0),
        ([FLAG, "--seed", "3"], True),
    ],
)
def test_on_the_command_line(given, mode):
    found = build_parser().parse_args(given).checkpoint_activations
    assert found == mode and type(found) is type(mode)


@pytest.mark.parametrize("mode", [True, False, 0, 7, "attention", "auto"])
def test_in_a_configuration(mode):
    found = check_args_section({"checkpoint_activations": mode})["checkpoint_activations"]
    assert found == mode and type(found) is type(mode)


@pytest.mark.parametrize("value", [-1, 1.5, "all", "-2", "1e3", [3], {"n": 1}, "9" * 30, ""])
def test_what_it_cannot_be_is_one_line(value):
    expected = r"can be true, false, attention, auto or a number of layers$"
    with pytest.raises(UserError, match=f"^args: checkpoint_activations: got .*{expected}"):
        check_args_section({"checkpoint_activations": value})
    with pytest.raises(UserError, match=f"^checkpoint_activations: got .*{expected}"):
        build_parser().parse_args([f"{FLAG}={value}"])
    with pytest.raises(UserError, match=f"transformer_args.checkpoint_activations: got .*{expected}"):
        check_model_values(model_of(checkpoint_activations=value), Sources())


@pytest.mark.parametrize("value", ["all", 7])
def test_the_file_is_named_once(value):
    """The check names the file itself, and the block around the check does not name it again."""
    sources = Sources(["config.yaml"])
    with pytest.raises(UserError, match=r"^config\.yaml: model\.network_config\.params") as error, sources.naming():
        check_model_values(model_of(checkpoint_activations=value), sources)
    assert str(error.value).count("config.yaml") == 1


def test_an_empty_value_is_not_set():
    names = "checkpoint_activations", "checkpoint_skip_layers", "checkpoint_num_layers", "layernorm_order", "skip_init"
    check_model_values(model_of(**dict.fromkeys(names)), Sources())


def model_of(**transformer_args) -> dict:
    params = {"num_layers": 6, "transformer_args": transformer_args}
    return {"network_config": {"target": "dit_video_concat.DiffusionTransformer", "params": params}}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"checkpoint_activations": 7}, "checkpoint_activations: got 7, but the network has 6 layers"),
        ({"checkpoint_skip_layers": 7}, "checkpoint_skip_layers: got 7; the network has 6 layers"),
        ({"checkpoint_skip_layers": -1}, "checkpoint_skip_layers: got -1"),
        ({"checkpoint_skip_layers": "two"}, "checkpoint_skip_layers: got 'two'"),
        ({"checkpoint_num_layers": 0}, "checkpoint_num_layers: got 0"),
    ],
)
def test_layers_that_do_not_exist(values, problem):
    with pytest.raises(UserError, match=problem):
        check_model_values(model_of(**values), Sources())


def test_arguments_are_compared_with_the_model():
    class Arguments:
        model_config = model_of()
        checkpoint_activations, checkpoint_skip_layers = 6, 6

    check_recomputation(Arguments)
    Arguments.checkpoint_skip_layers = 7
    with pytest.raises(UserError, match="checkpoint_skip_layers: got 7"):
        check_recomputation(Arguments)
    Arguments.checkpoint_activations = 7
    with pytest.raises(UserError, match="checkpoint_activations: got 7"):
        check_recomputation(Arguments)


@pytest.mark.parametrize(
    ("mode", "skipped", "whole", "attention", "words"),
    [
        (False, 0, 0, 0, ""),
        (True, 0, 6, 0, "recomputed"),
        (True, 2, 4, 0, "4 layers recomputed"),
        (4, 0, 4, 0, "4 layers recomputed"),
        (4, 3, 3, 0, "3 layers recomputed"),
        (0, 0, 0, 0, ""),
        ("attention", 0, 0, 6, "recomputed but for their attention"),
        ("attention", 1, 0, 5, "5 layers recomputed but for their attention"),
        ("auto", 0, 6, 0, "recomputed"),
        (Recomputation(2, 3), 4, 2, 3, "2 layers recomputed, 3 layers recomputed but for their attention"),
    ],
)
def test_what_the_layers_do(mode, skipped, whole, attention, words):
    chosen = Recomputation.of(mode, 6, skipped)
    assert (chosen.whole, chosen.attention, chosen.in_words(6)) == (whole, attention, words)
    assert bool(chosen) == bool(words)


def test_a_mode_stays_what_it_is():
    for mode in (True, False, 3, "attention", "auto"):
        assert recomputation_mode("x", mode) is mode
