"""Files and folders that are named by a path, or by the name of a repository on the Hugging Face hub."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from sgm.errors import UserError


def local_file(path: str, name: str, what: str) -> Path:
    """The path itself if it exists; else the file `name` of the hub's repository `path`, downloaded.

    Args:
        what: names the argument in messages.

    Raises:
        UserError: there is neither.
    """

    def download() -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(path, name)

    return Path(path) if Path(path).exists() else _from_hub(path, name, what, download)


def local_folder(path: str, patterns: Sequence[str], what: str, revision: str | None, cache_dir: Path | None) -> Path:
    """As `local_file`: the path itself if it is a folder, else the files of a repository that match `patterns`.

    Args:
        revision: of the repository; None: its main branch.
        cache_dir: where downloads are kept; None: the hub's cache.
    """

    def download() -> str:
        from huggingface_hub import snapshot_download

        return snapshot_download(path, revision=revision, cache_dir=cache_dir, allow_patterns=list(patterns))

    return Path(path) if Path(path).is_dir() else _from_hub(path, "it", what, download)


def _from_hub(repository: str, wanted: str, what: str, download: Callable[[], str]) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repository):
        raise UserError(f"{what}: there is no {repository}")
    try:
        return Path(download())
    # Every version has other classes for a repository that is missing, private, or out of reach.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{what}: there is no {repository} here, nor could {wanted} be had from the hub: {reason:.300}"
        ) from error
