"""Hooks of MkDocs, named in mkdocs.yml: links to documents outside of docs/ work.

On GitHub a page in docs/ links to `../benchmarks/RESULTS.md`. A site only has the files of docs/, so that the others
are added to it under their own paths.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OTHERS = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/RESULTS.md", "assets/tiny/README.md")
PICTURES = (".png", ".webp")
HOME = "index.md"  # takes the place of the README
LINK = re.compile(r"(\]\()([^)\s:#]+)((?:#[^)\s]*)?\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the documents that lie beside docs/, and the pictures of the tiny model."""
    from mkdocs.structure.files import File

    pictures = (path for path in (ROOT / "assets" / "tiny").rglob("*") if path.suffix in PICTURES)
    for path in (*(ROOT / name for name in OTHERS), *pictures):
        uri = str(path.relative_to(ROOT))
        files.append(File.generated(config, site_path(uri), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the text of a page with the links to other documents as the site has them."""
    return with_site_links(markdown, page.file.src_uri)


def site_path(document: str) -> str:
    """Return the path in the site of a document, from its path in the repository."""
    return str(PurePosixPath(document).with_name("card.md")) if document == "assets/tiny/README.md" else document


def with_site_links(markdown: str, page: str) -> str:
    """Return the text of a page with links to files outside of docs/ as links in the site.

    Args:
        page: the path of the page in the site.
    """
    outside = {site_path(name): name for name in OTHERS}
    here = PurePosixPath(outside.get(page, f"docs/{page}"))

    def replaced(match: re.Match[str]) -> str:
        target = PurePosixPath(os.path.normpath(here.parent / match[2]))
        if target == PurePosixPath("README.md"):
            place = HOME
        elif target.parts[0] == "docs":
            place = str(target.relative_to("docs"))
        else:
            place = site_path(str(target))
        return f"{match[1]}{os.path.relpath(place, PurePosixPath(page).parent)}{match[3]}"

    return LINK.sub(replaced, markdown)
