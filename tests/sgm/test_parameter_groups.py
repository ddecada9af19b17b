"""Parameters are divided into groups by patterns, each into one."""

import pytest
from torch import nn, ones

from sgm.errors import UserError
from sgm.models.parameter_groups import match_groups, pair_arguments

PARAMETERS = {name: nn.Parameter(ones(1)) for name in ("encoder.0.weight", "encoder.0.bias", "decoder.weight")}


def names(patterns) -> list[list[str]]:
    return [list(group) for group in match_groups(PARAMETERS, patterns, what="groups")]


def test_patterns_match_from_the_beginning_of_a_name():
    assert names([["encoder", r".*coder\.weight"], []]) == [[*PARAMETERS], []]
    assert names([[r".*\.bias"], ["decoder"]]) == [["encoder.0.bias"], ["decoder.weight"]]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("encoder", "a list of groups"),
        (["encoder"], "a list of groups"),
        ([["("]], "not a regular expression"),
        ([["weight"]], "matches no parameter; the nearest names are decoder.weight"),
        ([["encoder"], [r".*\.bias"]], r"encoder\.0\.bias is in the groups 0 and 1"),
    ],
)
def test_mistakes(patterns, message):
    with pytest.raises(UserError, match=f"groups: .*{message}"):
        names(patterns)


def test_each_group_has_its_arguments():
    groups = match_groups(PARAMETERS, [["encoder"], ["decoder"]], what="groups")
    assert pair_arguments(groups, None, what="lr")[1] == (["decoder.weight"], {})
    assert [own for _, own in pair_arguments(groups, [{"lr": 1}, {"lr": 2}], what="lr")] == [{"lr": 1}, {"lr": 2}]
    with pytest.raises(UserError, match="lr: 1 sets of arguments for 2 groups"):
        pair_arguments(groups, [{}], what="lr")
