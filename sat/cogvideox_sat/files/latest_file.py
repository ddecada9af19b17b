"""Read the file `latest` of a run, which holds the name of its newest checkpoint."""

from pathlib import Path

from cogvideox_sat.files.refusals import refusal
from sgm.errors import UserError, shown

MOST_BYTES = 255  # longest name of a file on common file systems


def newest(folder: Path, argument: str) -> str | None:
    """Return the name that the file `latest` in a folder holds; None if that does not exist.

    Args:
        argument: the argument that names the folder, for the message.

    Raises:
        UserError: the file cannot be read, or does not hold the name of a file or folder beside it.
    """
    file = folder / "latest"
    if not file.is_file():
        return None
    advice = "write the name of a checkpoint beside it into it, or name the checkpoint itself"
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 2)
        name = content.decode("utf-8").strip()
    except OSError as error:
        raise UserError(f"{argument}: cannot read {file}: {refusal(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{argument}: {file} is not text; {advice}") from error
    is_name = name == Path(name).name and name not in ("", "..") and name.isprintable()
    if not is_name or len(name.encode()) > MOST_BYTES:
        raise UserError(f"{argument}: {file} holds {shown(name)}, which is not the name of a checkpoint; {advice}")
    return name
