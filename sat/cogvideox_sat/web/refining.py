"""Refinement of prompts by the service that the environment names.

See `sampling.prompt_refinement`.

Of what the service says, and of how it is reached, nothing reaches a browser but the text of a prompt.
"""

from pathlib import Path

from cogvideox_sat.sampling.prompt_refinement import Endpoint, Prompt, refine
from sgm.errors import UserError

SECONDS = 30.0  # for an answer


def is_configured() -> bool:
    """Return whether the environment names a service."""
    try:
        Endpoint.from_environment()
    except UserError:
        return False
    return True


def refined(prompt: str, image: Path | None) -> str:
    """Return a prompt written out.

    Raises:
        UserError: the service gives no answer that can be used; the message is for the log alone.
    """
    endpoint = Endpoint.from_environment(timeout=SECONDS, tries=2)
    (text,) = refine([Prompt(prompt, image)], endpoint)
    if text is None:
        raise UserError("prompt: the service gave no answer that can be used")
    return text
