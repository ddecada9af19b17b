"""Test that manifests of all styles are read, and ambiguous lines are errors."""

import pytest

from cogvideox_sat.clips.caption_tables import entries_of_table
from sgm.errors import UserError


def csv(text: str) -> list:
    return entries_of_table(text.encode(), "set.csv")


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ('video,caption\na.mp4, "a red ball, rolling left"\n', "a red ball, rolling left"),
        ('video,caption\na.mp4,"a red ball, rolling left" \n', "a red ball, rolling left"),
        ('video, caption \r\n"a.mp4" ,"a ""red"" ball"\r\n', 'a "red" ball'),
        ('video,caption,\na.mp4,"two\nlines",\n', "two\nlines"),
        ("video;caption\na.mp4;a ball, rolling\n", "a ball, rolling"),
        ("video\tprompt\na.mp4\ta ball, rolling\n", "a ball, rolling"),
        ('caption,video\na 12" screen,a.mp4\n', 'a 12" screen'),
        ("\n\nFile Name,TEXT\n\na.mp4,a ball\n \n", "a ball"),
        ("video,caption,text\na.mp4,ours wins,other\n", "ours wins"),
        ("video,caption,prompt\na.mp4,,the other one\n", "the other one"),
        ("video,caption\na.mp4\n", None),
    ],
)
def test_what_a_line_says(text, caption):
    assert csv(text) == [("a.mp4", caption)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,caption\nb.mp4,b\na.mp4,a red ball, rolling left\n", "set.csv, line 3: 3 values for 2 columns"),
        ('video,caption\n"b\nb.mp4",b\na.mp4,a, b\n', "set.csv, line 4: 3 values for 2 columns"),
        ('video,caption\na.mp4,"never closed\nb.mp4,b\n', "set.csv, line 2: not valid CSV"),
        ("a.mp4,a ball\n", "set.csv: the first line must name the columns"),
        ("video,caption,caption\na.mp4,x,y\n", "set.csv: two columns are called 'caption'"),
        ("video,long_caption\na.mp4,x\n", "set.csv, line 2: 'long_caption' looks like a caption"),
    ],
)
def test_mistakes_name_their_line(text, message):
    with pytest.raises(UserError, match=message):
        csv(text)


@pytest.mark.parametrize("name", ["\\ud800.mp4", "a\\u0000b.mp4"])
def test_a_name_that_no_file_can_have(name):
    with pytest.raises(UserError, match="no file can have the name"):
        entries_of_table(f'[{{"video": "{name}", "caption": "a ball"}}]'.encode(), "set.json")
    assert entries_of_table(b'[{"video": "\\udcff.mp4"}]', "set.json") == [("\udcff.mp4", None)]  # not UTF-8


def test_json_lists_and_mappings():
    expected = [("a.mp4", "an a"), ("b.mp4", None)]
    assert entries_of_table(b'[{"path": "a.mp4", "cap": "an a"}, {"path": "b.mp4"}]', "set.json") == expected
    assert entries_of_table(b'{"a.mp4": "an a", "b.mp4": " "}', "set.json") == expected
    for content in (b'"text"', b"[3]", b'{"version": 1}'):
        with pytest.raises(UserError, match="expected a"):
            entries_of_table(content, "set.json")
