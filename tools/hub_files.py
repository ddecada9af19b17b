"""Files that are named by a path, or by the name of a repository on the Hugging Face hub."""

import re
from pathlib import Path

from sgm.errors import UserError


def local_file(path: str, name: str, what: str) -> Path:
    """The path itself if it exists; else the file `name` of the hub's repository `path`, downloaded.

    Args:
        what: names the argument in messages.

    Raises:
        UserError: there is neither.
    """
    if Path(path).exists():
        return Path(path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        raise UserError(f"{what}: there is no {path}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, name))
    # Every version has other classes for a repository that is missing, private, or out of reach.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{what}: there is no {path} here, nor could {name} be had from the hub: {reason}") from error
