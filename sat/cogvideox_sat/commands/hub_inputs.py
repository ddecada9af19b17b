"""Find files and folders by path, or by the name of a repository on the Hugging Face hub."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from cogvideox_sat.commands.input_paths import find_input, not_found, places
from sgm.errors import UserError


def local_file(path: str | Path, name: str, argument: str) -> Path:
    """Return the file or folder at a path, or the downloaded file `name` of a hub repository.

    Args:
        path: a path, looked for as `find_input` does; if it does not exist, the name of a repository.
        name: the file in the repository.
        argument: the argument that gives the path, for messages.

    Raises:
        UserError: neither the path nor the file in the repository exists.
    """

    def download() -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(str(path), name)

    return find_input(path, argument) or _from_hub(str(path), name, argument, download)


def local_folder(
    path: str | Path, patterns: Sequence[str], argument: str, revision: str | None, cache_dir: Path | None
) -> Path:
    """Return the folder at a path, or downloaded files of a hub repository by `patterns`.

    Args:
        path: a path or the name of a repository, as in `local_file`.
        revision: of the repository; None: its main branch.
        cache_dir: folder for downloads; None: the hub's cache.

    Raises:
        UserError: the path is a file, or neither the path nor the repository exists.
    """

    def download() -> str:
        from huggingface_hub import snapshot_download

        return snapshot_download(str(path), revision=revision, cache_dir=cache_dir, allow_patterns=list(patterns))

    found = find_input(path, argument)
    if found is not None and not found.is_dir():
        raise UserError(f"{argument}: {path} is a file; name a folder or a repository on the hub")
    return found or _from_hub(str(path), "it", argument, download)


def _from_hub(repository: str, wanted: str, argument: str, download: Callable[[], str]) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repository):
        raise UserError(not_found(argument, repository))
    try:
        return Path(download())
    # Each version of huggingface_hub has other errors for a repository that is missing, private or out of reach.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{argument}: {repository} does not exist here{places(repository)}, and the hub did not give {wanted}: "
            f"{reason:.300}"
        ) from error
