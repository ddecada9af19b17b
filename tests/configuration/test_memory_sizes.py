"""Test amounts of memory as users write them."""

import pytest

from arguments import get_args
from cogvideox_sat.configuration.memory_sizes import parse_fit
from sgm.errors import UserError

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("12GB", 12 * GIB), ("12 gib", 12 * GIB), ("5.5GB", 11 * GIB // 2), (".5 GB", GIB // 2)),
        *(
            ("12288MiB", 12 * GIB),
            ("1TB", 2**40),
            ("12G", 12 * GIB),
            ("12288m", 12 * GIB),
            ("auto", None),
            (" Auto ", None),
        ),
    ],
)
def test_amounts(text, size):
    assert parse_fit(text) == size


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("12", "12 has no unit"),
        ("0GB", "is not an amount of memory that a device has"),
        ("0.0000000001MB", "is not an amount of memory that a device has"),
        ("9999999999999999GB", "is not an amount of memory that a device has"),
        (f"{'9' * 400}GB", "is not an amount of memory that a device has"),
        *(
            (text, "is not an amount of memory; give an amount such as 12GB")
            for text in ("banana", "", "-3GB", "1e3GB")
        ),
        *(
            (text, "is not an amount of memory; give an amount such as 12GB")
            for text in ("nan GB", "12GB!", "1,5GB", "٣GB")
        ),
        ("12QB", "has an unknown unit, 'QB'"),
        ("12K", "has an unknown unit, 'K'; use GB"),
    ],
)
def test_others_are_one_line(text, problem):
    with pytest.raises(UserError) as error:
        parse_fit(text)
    message = str(error.value)
    assert message.startswith("fit: ") and problem in message and "\n" not in message and len(message) < 250


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--fit", "12"), "fit: 12 has no unit"),
        (("--fit", "auto", "--device", "cpu"), "fit: auto needs a GPU, but device is cpu"),
        (("--fit", "12GB", "--model_parallel_size", "2"), "fit: model_parallel_size is 2"),
    ],
)
def test_the_command_refuses_them_at_once(tiny, arguments, problem):
    with pytest.raises(UserError, match=problem):
        get_args(["--base", str(tiny.config("5b")), "--input_file", "prompts.txt", *arguments])


def test_what_is_given_is_known(tiny):
    args = get_args(["--base", str(tiny.config("5b")), "--input_file", "prompts.txt", "--offload", "stage"])
    assert {"offload", "load", "input_file"} <= args.given and "guidance_batch" not in args.given
