"""The page of the Python interface is what its docstrings say now."""

import cogvideox_sat
from tools.write_api_page import PAGE, described, main, page


def test_the_page_is_current():
    assert main(["--check"]) == 0, "run: python tools/write_api_page.py"


def test_all_that_is_offered_is_on_it():
    text = page()
    for name in cogvideox_sat._NAMES.keys() - {"__version__"}:
        assert f"## cv.{name}\n" in text
    assert "### pipe(…)" in text and "### Video.save" in text and "misspelt" not in text
    assert text == PAGE.read_text()


def test_sections_of_a_docstring_become_lists():
    doc = (
        "Return it.\n\nArgs:\n    one: what\n        it is.\n    two, three: others.\n\nRaises:\n    UserError: never."
    )
    expected = ["Return it.\n", "**Args**\n", "* `one`: what it is.", "* `two, three`: others.", ""]
    assert list(described(doc)) == [*expected, "**Raises**\n", "* `UserError`: never.", ""]
