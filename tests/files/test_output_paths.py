"""Test that names are legal for all prompts, and no file is replaced unasked."""

import sys
from pathlib import Path

import pytest

from cogvideox_sat.files.output_paths import check_folder, check_sheet, decide_existing, output_path, safe_name
from sgm.errors import UserError


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a red circle moving left", "a_red_circle_moving_left"),
        ("cat/dog\\fox", "catdogfox"),
        ("“quoted” 'and' \"more\" `", "quoted_and_more"),
        ("tab\tline\nend\x00\x1b\x7f", "tab_line_end"),
        ("...hidden. ", "hidden"),
        ("Ein Café im Wald 🌲", "Ein_Café_im_Wald_🌲"),
        ("日本の桜", "日本の桜"),
        ("lone \udc80 surrogate", "lone__surrogate"),
        ("cafe\u0301", "café"),
        ("right\u202eleft", "rightleft"),
        ("", "unnamed"),
        ("..", "unnamed"),
        (" / . ", "unnamed"),
    ],
)
def test_safe_name(text, name):
    assert safe_name(text) == name


@pytest.mark.parametrize("unit", ["a", "é", "桜", "🌲", "a🌲"])
def test_names_are_cut_at_whole_characters_and_the_file_system_takes_them(tmp_path, unit):
    name = safe_name(unit * 500)
    assert 117 <= len(name.encode()) <= 120
    assert (unit * 500).startswith(name)
    (tmp_path / name).mkdir()


@pytest.mark.slow
def test_every_single_character_gives_a_legal_name(tmp_path):
    for code in range(sys.maxunicode + 1):
        name = safe_name(f"{chr(code)}")
        assert name not in (".", "..", "")
        assert not set(name) & set("/\0\\\n")
        name.encode()


def test_output_path():
    assert output_path("outputs", 3, "a cat/dog", 1).as_posix() == "outputs/3_a_catdog/1/000000.mp4"


def test_existing_files_are_never_replaced_unasked(tmp_path):
    path = tmp_path / "a.mp4"
    assert decide_existing(path, overwrite=False, skip_existing=False)
    path.touch()
    assert decide_existing(path, overwrite=True, skip_existing=False)
    assert not decide_existing(path, overwrite=False, skip_existing=True)
    with pytest.raises(UserError, match=r"a.mp4 exists.*--overwrite.*--skip_existing"):
        decide_existing(path, overwrite=False, skip_existing=False)


def test_folders_that_cannot_take_files_are_named_before_anything_is_made(tmp_path):
    check_folder(tmp_path / "new" / "newer")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir: .*file is not a folder; name another path"):
        check_folder(tmp_path / "file" / "videos")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_names_that_no_folder_can_have_are_refused_before_anything_is_made(tmp_path):
    (tmp_path / "broken").symlink_to("gone")
    with pytest.raises(UserError, match=r"^save: .*/a+: File name too long; shorten it$"):
        check_folder(tmp_path / ("a" * 300), "save")
    with pytest.raises(UserError, match=r"^output_dir: .*broken/videos: .*broken is not a folder; name another path$"):
        check_folder(tmp_path / "broken" / "videos")
    (tmp_path / "sheet.png").mkdir()
    with pytest.raises(UserError, match=r"^contact_sheet: .*sheet.png is a folder; name a file$"):
        check_sheet(str(tmp_path / "sheet.png"))
    with pytest.raises(UserError, match=r"^contact_sheet: .*/a+\.png: File name too long; shorten it$"):
        check_sheet(f"{tmp_path}/{'a' * 300}.png")


def test_a_folder_above_that_may_not_be_searched_is_one_line(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "lstat", refuse)
    with pytest.raises(UserError, match=r"^output_dir: .*videos: Permission denied; change the permissions or "):
        check_folder(tmp_path / "videos")
