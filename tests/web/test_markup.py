"""Whatever people write is shown, and never taken for markup."""

from html.parser import HTMLParser

import pytest

from cogvideox_sat.web import markup

EVIL = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script>&"


class Tags(HTMLParser):
    """The tags and attributes of a text."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.shown += data


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        (markup.problem(EVIL), {"p"}),
        (markup.note(EVIL), {"p"}),
        (markup.bar(0.5, EVIL), {"div", "span"}),
        (markup.table({EVIL: EVIL}), {"table", "tr", "th", "td"}),
        (markup.items([EVIL]), {"ul", "li"}),
    ],
)
def test_texts_are_shown_as_they_are(text, tags):
    found = Tags(text)
    assert set(found.found) == tags
    assert EVIL in found.shown


def test_texts_in_attributes_end_none_of_them():
    assert set(Tags(markup.video(markup.address("media", EVIL), EVIL)).found) == {"video"}
    assert set(Tags(markup.picture(b"jpeg", title=EVIL)).found) == {"img"}


def test_an_address_is_made_of_names():
    assert markup.address("media", "video", "../../etc/passwd") == "/media/video/..%2F..%2Fetc%2Fpasswd"


def test_a_bar_stays_within_its_frame():
    assert 'style="width: 100.0%"' in markup.bar(7, "")
    assert 'style="width: 0.0%"' in markup.bar(-1, "")
