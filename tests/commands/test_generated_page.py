"""Tools that write pages of the guides."""

import logging

from cogvideox_sat.commands.generated_page import run_page_tool

logger = logging.getLogger(__name__)


def run(path, text, *arguments):
    return run_page_tool(arguments, "Writes a page.", path, lambda: text, logger)


def test_a_page_is_written_once_and_then_current(tmp_path):
    path = tmp_path / "docs" / "page.md"
    assert run(path, "one", "--check") == 1
    assert not path.parent.exists()
    assert run(path, "one") == 0
    assert path.read_text() == "one"
    assert run(path, "one", "--check") == 0
    assert run(path, "two", "--check") == 1
    assert path.read_text() == "one"


def test_a_wrong_flag_is_one_line(tmp_path, caplog):
    assert run(tmp_path / "page.md", "one", "--chek") == 2
    assert "did you mean --check?" in caplog.text
