"""Pieces of HTML for the page.

Text from people and files goes through `escaped`.
"""

import base64
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any
from urllib.parse import quote


def escaped(text: object) -> str:
    """Return a text such that a browser shows it, and takes nothing in it for markup."""
    return escape(str(text), quote=True)


def problem(text: str) -> str:
    """Return the line that tells a user what went wrong."""
    return f'<p class="problem" role="alert">{escaped(text)}</p>'


def note(text: str) -> str:
    """Return a line that tells a user how things are."""
    return f'<p class="note" role="status">{escaped(text)}</p>'


def bar(share: float, label: str) -> str:
    """Return a bar of progress with its label; `share` is from 0 to 1."""
    width = 100 * min(max(share, 0.0), 1.0)
    return (
        f'<div class="progress" role="progressbar" aria-valuenow="{width:.0f}" aria-valuemin="0" aria-valuemax="100">'
        f'<div class="done" style="width: {width:.1f}%"></div><span>{escaped(label)}</span></div>'
    )


def video(address: str, title: str = "", autoplay: bool = False) -> str:
    """Return a player of a video at an address of this page."""
    plays = "autoplay muted" if autoplay else 'muted preload="metadata"'
    return f'<video controls loop playsinline {plays} title="{escaped(title)}" src="{escaped(address)}"></video>'


def picture(content: bytes, kind: str = "jpeg", title: str = "") -> str:
    """Return a small picture, which is part of the page."""
    data = base64.b64encode(content).decode()
    return f'<img class="preview" alt="{escaped(title)}" src="data:image/{kind};base64,{data}">'


def table(rows: Mapping[str, Any]) -> str:
    """Return a table of names and values."""
    lines = "".join(f"<tr><th>{escaped(name)}</th><td>{escaped(value)}</td></tr>" for name, value in rows.items())
    return f'<table class="facts">{lines}</table>'


def items(lines: Iterable[str]) -> str:
    """Return a list of texts."""
    return f"<ul>{''.join(f'<li>{escaped(line)}</li>' for line in lines)}</ul>"


def address(*names: str) -> str:
    """Return the address of something on this page, from the names that lead to it."""
    return "/" + "/".join(quote(name, safe="") for name in names)
