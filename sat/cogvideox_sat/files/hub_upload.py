"""Upload a folder to the Hugging Face hub, as the user who is logged in to its client."""

import logging
from pathlib import Path

from sgm.errors import UserError

logger = logging.getLogger(__name__)

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def check_logged_in() -> str:
    """Return the user name under which the hub's client uploads.

    Check this before spending hours on the files to upload.

    Raises:
        UserError: the client has no valid token, or the hub is out of reach.
    """
    from huggingface_hub import HfApi

    try:
        return HfApi().whoami()["name"]
    except Exception as error:  # each version has other errors for a missing or refused token
        raise UserError(f"--push_to_hub: {_reason(error)}; {LOG_IN}") from error


def upload(folder: Path, repository: str) -> str:
    """Upload a folder to a repository, which is made if it does not exist; return its address.

    Args:
        repository: `user/name`, or only `name` for the user who is logged in.

    Raises:
        UserError: the hub refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder)
    except Exception as error:
        raise UserError(
            f"--push_to_hub: {folder} is written, but not uploaded: {_reason(error)}; upload it with `hf upload "
            f"{repository} {folder}`"
        ) from error
    return str(address)


def _reason(error: Exception) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"
