"""Test repeats and weights of training data, in configurations, arguments and batches."""

import itertools
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest

from cogvideox_sat.clips.batch_order import BatchOrder
from cogvideox_sat.clips.options import check_options
from cogvideox_sat.configuration.data_mixing import check_mixing, draws_of, repeated, split_entries
from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.settings import DataSettings
from cogvideox_sat.runs.datasets import make_dataset
from sgm.errors import UserError
from training_clips import write_dataset

ROOT = Path(__file__).parents[2]
DATA = {
    "target": "data_video.SFTDataset",
    "params": {"video_size": [64, 96], "fps": 8, "max_num_frames": 9, "skip_frms_num": 0},
}


def test_entries_become_arguments():
    section = {"train_data": [{"path": "a", "repeat": 3}, "b", {"path": "c"}], "valid_data": {"path": "d"}, "seed": 1}
    assert split_entries(section, {}) == {
        **{"train_data": ["a", "b", "c"], "train_data_repeats": [3, 1, 1]},
        **{"valid_data": ["d"], "seed": 1},
    }
    section = {"train_data": [{"path": "a", "weight": 3}, {"path": "b", "weight": 0.5}]}
    assert split_entries(section, {}) == {"train_data": ["a", "b"], "train_data_weights": [3, 0.5]}
    assert split_entries(section, {"train_data": ["c"]}) == {"train_data": ["a", "b"]}
    assert split_entries({"train_data": ["a"]}, {}) == {"train_data": ["a"]}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"train_data": [{"path": "a", "weigth": 3}]}, "an entry with 'weigth'; expected path, repeat, weight"),
        ({"train_data": [{"repeat": 3}]}, "an entry without a path"),
        ({"train_data": [{"path": "a", "repeat": 2, "weight": 1}]}, "a has a repeat and a weight"),
        ({"train_data": [{"path": "a", "weight": 1}, "b"]}, "a weight to all entries or to none"),
        ({"train_data": [{"path": "a", "weight": 1}], "train_data_weights": [1]}, "weights is given, and so is weight"),
        ({"valid_data": [{"path": "a", "weight": 1}]}, "valid_data has an entry with 'weight'; expected path"),
    ],
)
def test_wrong_entries_are_named(section, message):
    with pytest.raises(UserError, match=message):
        split_entries(section, {})


@pytest.mark.parametrize(
    ("repeats", "weights", "message"),
    [
        ([1], [], "train_data_repeats: 1 numbers for 2 entries in train_data"),
        ([], [1.0, 2.0, 3.0], "train_data_weights: 3 numbers"),
        ([1, 0], [], "train_data_repeats: 0 does not fit"),
        ([], [1.0, 0.0], "train_data_weights: 0.0 is not above 0"),
        ([], [1.0, float("nan")], "train_data_weights: nan"),
        ([1, 2], [1.0, 2.0], "are both given"),
    ],
)
def test_wrong_numbers_are_named(repeats, weights, message):
    with pytest.raises(UserError, match=message):
        check_mixing(Namespace(train_data=["a", "b"], train_data_repeats=repeats, train_data_weights=weights))


def test_the_tiny_recipe_is_that_of_twelve_equal_lines():
    args = split_entries(load_configs([ROOT / "configs/tiny/sft.yaml"])["args"], {})
    paths = repeated(args["train_data"], args["train_data_repeats"])
    assert paths == ["data/spirals_latents"] * 12 + ["data/known_shapes_latents"]


def test_rates_add_up_to_an_epoch():
    draws = draws_of([2, 8], [3, 1])
    assert draws == [3.75, 3.75, *[0.3125] * 8]
    assert sum(draws) == 10


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("places")
    return [str(write_dataset(folder / name, clips, frames=9)) for name, clips in (("few", 2), ("many", 6))]


@pytest.mark.slow
def test_a_repeat_is_the_order_of_equal_lines(places):
    args = Namespace(model_config=None)
    equal = make_dataset([places[0]] * 3 + [places[1]], DataSettings.from_args(args, data_config=DATA))
    repeat = make_dataset(places, DataSettings.from_args(args, data_config=DATA), repeats=[3, 1])
    assert repeat.sources == equal.sources and repeat.buckets == equal.buckets and len(repeat) == 12
    assert repeat.counts == [2, 2, 2, 6] and repeat.draws is None


def test_weights_are_shares_of_the_samples(places):
    dataset = make_dataset(places, DataSettings(DATA), weights=[3, 1])
    buckets = [dataset.bucket(index) for index in range(len(dataset))]
    order = BatchOrder(buckets, 1, 0, 1, seed=0, draws=dataset.draws)
    drawn = Counter(dataset.sources[batch[0].index].path.split("/")[-3] for batch in itertools.islice(order, 800))
    assert drawn["few"] == pytest.approx(600, abs=5) and drawn["many"] == pytest.approx(200, abs=5)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("min_frames", 0), ("min_frames", "many"), ("clips_per_video", 1.5), ("clips_per_video", True)),
        *(("clip_stride", 0), ("clip_stride", float("nan")), ("caption_prefix", ["a"]), ("label_lines", "last")),
        *(("reshape_mode", "middle"), ("horizontal_flip", 1.5), ("horizontal_flip", "yes"), ("random_start", "no")),
        *(("txt_key", 3), ("missing_label", "drop"), ("shuffle_buffer", -1)),
    ],
)
def test_wrong_options_are_named(option, value):
    with pytest.raises(UserError, match=f"data.params.{option}: got .*; expected "):
        check_options({option: value})
