"""Turn the arguments of a call into requests: one prompt or several, each field once or once for each prompt.

Nothing here imports PyTorch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogvideox_sat.configuration.request_fields import FIELDS, checked_fields, nearest_field
from cogvideox_sat.sampling.prompt_inputs import PromptRequest, found_image
from sgm.errors import UserError, shown

IN_MEMORY = "the image"  # stands for one that is no file while fields are checked
PAIRS = ("size", "guidance_interval")


def requests_of(
    prompt: Any, given: Mapping[str, Any], image_to_video: bool
) -> tuple[list[tuple[PromptRequest, Any]], bool]:
    """Return the requests of a call, each with its first frame where that is no file, and whether it asks for a list.

    Args:
        prompt: one, or a list; each a text, or a mapping with the fields of a line of a `.jsonl` file.
        given: the other fields, for all prompts, or as a list with one value for each of them.
        image_to_video: whether the model takes images.

    Raises:
        UserError: a field does not exist or is none of what it takes, or a list has another length.
    """
    several = isinstance(prompt, list | tuple)
    prompts = list(prompt) if several else [prompt]
    if not prompts:
        raise UserError("prompt: the list is empty; give at least one prompt")
    for name in given:
        if name not in FIELDS:
            raise UserError(f"unknown key '{name}', {nearest_field(name)}")
    fields = {name: spread(name, value, len(prompts) if several else None) for name, value in given.items()}
    found = []
    for index, each in enumerate(prompts):
        where = f"prompt {index + 1}: " if several else ""
        own = dict(each) if isinstance(each, Mapping) else {"prompt": each}
        others = {name: values[index] for name, values in fields.items() if values[index] is not None}
        found.append(request_of({**others, **own}, index, where, image_to_video))
    return found, several


def spread(name: str, value: Any, count: int | None) -> list[Any]:
    """Return the value of a field for each prompt.

    Args:
        count: the prompts of a list; None: there is one, which is no list.

    Raises:
        UserError: it is a list of another length.
    """
    is_list = isinstance(value, list | tuple)
    if name in PAIRS:
        is_list = is_list and (not value or isinstance(value[0], list | tuple | None.__class__))
    if count is None or not is_list:
        return [value] * (count or 1)
    if len(value) != count:
        raise UserError(f"{name}: there are {len(value)} values for {count} prompts; give one, or one for each")
    return list(value)


def plain(value: Any) -> Any:
    """Return a value with the numbers of NumPy and PyTorch in it as Python's own."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def request_of(fields: dict[str, Any], index: int, where: str, image_to_video: bool) -> tuple[PromptRequest, Any]:
    """Return a request, and its first frame where that is no file.

    Raises:
        UserError: a field does not exist or is none of what it takes, or the model takes no image or needs one.
    """
    fields = {name: value if name == "image" else plain(value) for name, value in fields.items()}
    image = fields.get("image")
    if isinstance(image, Path):
        fields["image"] = image = str(image)
    if in_memory := image is not None and not isinstance(image, str):
        fields["image"] = IN_MEMORY
    values = checked_fields(fields, where)
    if not values["prompt"].strip():
        raise UserError(f"{where}prompt is {shown(values['prompt'])}; say what the video shows")
    if image_to_video != ("image" in values):
        kind, advice = ("an image", "give its first frame as") if image_to_video else ("a text", "leave out")
        raise UserError(f"{where}image: this is {kind}-to-video model; {advice} `image`")
    if in_memory:
        del values["image"]
    elif "image" in values:
        values["image"] = found_image(values["image"], Path.cwd(), f"{where}image")
    return PromptRequest(index, values.pop("prompt"), **values), image if in_memory else None
