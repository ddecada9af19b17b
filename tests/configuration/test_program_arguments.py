"""Test arguments in objects of programs, and misspelt names."""

from argparse import Namespace

import pytest

from cogvideox_sat.configuration.argument_lists import SamplingArguments, TrainingArguments
from cogvideox_sat.configuration.program_arguments import arguments_from, check_spelling
from sample_video import sampling_main
from sgm.errors import UserError
from train_video import training_main

MODEL = {"network_config": {"target": "a.B", "params": {}}}


@pytest.mark.parametrize("wrap", [dict, lambda values: Namespace(**values)])
def test_attributes_that_are_arguments_are_taken(wrap):
    args = arguments_from(SamplingArguments, wrap({"model_config": MODEL, "seed": 7, "mine": 1, "batch_size": [2]}))
    assert (args.seed, args.batch_size, args.bf16) == (7, 2, False)


def test_a_value_of_a_wrong_type_is_named():
    with pytest.raises(UserError, match="seed: got 'seven'; expected a whole number"):
        arguments_from(TrainingArguments, {"model_config": MODEL, "seed": "seven"})


@pytest.mark.parametrize("main", [sampling_main, training_main])
def test_a_misspelt_argument_of_a_program_is_an_error(main):
    with pytest.raises(UserError, match=r"lora_laod: unknown argument; did you mean lora_load\?"):
        main(Namespace(model_config=MODEL, lora_laod="adapter"))


def test_spelling():
    check_spelling(["load", "save_args", "wandb_project_name", "train_iters", "mine"], {"load", "wandb_project"})
    check_spelling(["loads", "load"], {"load"})  # `load` exists too, so that `loads` is the program's own
    with pytest.raises(UserError, match=r"save_intervals: .* did you mean save_interval\?"):
        check_spelling(["save_intervals"], {"save_interval"})
