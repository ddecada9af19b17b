"""The original's path of small functions goes on working."""

import pytest

from sgm import util
from vae_modules import utils


def test_names_are_those_of_sgm_util():
    assert utils.instantiate_from_config is util.instantiate_from_config
    assert all(getattr(utils, name) is getattr(util, name) for name in dir(util) if not name.startswith("_"))


@pytest.mark.parametrize("name", ["no_such_function", "__path__"])
def test_other_names_are_missing(name):
    with pytest.raises(AttributeError, match=name):
        getattr(utils, name)
