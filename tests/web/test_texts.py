"""The page says the same in all its languages."""

import re

import pytest

from cogvideox_sat.web.texts import LANGUAGES, preferred
from cogvideox_sat.web.texts.chinese import CHINESE
from cogvideox_sat.web.texts.english import ENGLISH
from cogvideox_sat.web.texts.japanese import JAPANESE


@pytest.mark.parametrize("texts", [CHINESE, JAPANESE])
def test_each_language_has_all_texts_with_their_gaps(texts):
    assert texts.keys() == ENGLISH.keys()
    for name, text in texts.items():
        assert text.strip()
        assert sorted(re.findall(r"{\w+}", text)) == sorted(re.findall(r"{\w+}", ENGLISH[name])), name


@pytest.mark.parametrize("texts", [CHINESE, JAPANESE])
def test_texts_are_translated(texts):
    same = {name for name, text in texts.items() if text == ENGLISH[name]}
    assert same == {"title"}


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("", "en"),
        ("de", "en"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en;q=0.5, ja", "ja"),
        ("de, ja;q=0.3, en;q=0.2", "ja"),
        ("ja;q=0, zh;q=nonsense", "en"),
    ],
)
def test_the_language_is_that_of_the_browser(accepted, language):
    assert preferred(accepted) == language
    assert language in LANGUAGES
