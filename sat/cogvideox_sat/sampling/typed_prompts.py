"""Ask for prompts on the terminal."""

import logging
from collections.abc import Iterator
from pathlib import Path

from cogvideox_sat.commands.input_paths import tell_places
from cogvideox_sat.sampling.prompt_lines import IMAGE_SEPARATOR, check_image_use, parse_text
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from sgm.errors import UserError

logger = logging.getLogger(__name__)

QUIT = "q"


def typed_prompts(image_to_video: bool = False) -> Iterator[PromptRequest]:
    """Ask for prompts on the terminal until an empty line, `q` or the end of the input.

    For an image-to-video model, the image follows the prompt on the same line, `prompt@@image_path`; if it is missing,
    it is asked for. After an invalid line, the error is logged and the next line is asked for.
    """
    index, where = 0, "typed prompt"
    for line in typed_lines():
        try:
            request = parse_text(line, index, Path.cwd(), where)
            if image_to_video and request.image is None:
                if (image := _ask("Image: ")) is None:
                    return
                request = parse_text(f"{line}{IMAGE_SEPARATOR}{image}", index, Path.cwd(), where)
            check_image_use(request, image_to_video, where)
        except UserError as error:
            logger.error("%s", error)
            continue
        tell_places()
        yield request
        index += 1


def typed_lines() -> Iterator[str]:
    """Yield lines from the terminal until an empty line, `q` or the end of the input."""
    while (line := _ask(f"Prompt (empty line or {QUIT} to quit): ")) is not None:
        yield line


def _ask(question: str) -> str | None:
    """Return the stripped answer, or None if the user wants to stop."""
    try:
        answer = input(question).strip()
    except EOFError:
        return None
    return None if answer in ("", QUIT) else answer
