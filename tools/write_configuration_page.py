"""Writes docs/configuration.md from the classes that declare the arguments.

python tools/write_configuration_page.py            writes the page
python tools/write_configuration_page.py --check    writes nothing, and exits with 1 if the page differs
"""

import ast
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.commands.generated_page import run_page_tool  # noqa: E402
from cogvideox_sat.configuration.argument_fields import argument_fields, item_type, value_type  # noqa: E402
from cogvideox_sat.configuration.argument_lists import (  # noqa: E402
    SamplingArguments,
    TrainingArguments,
    VaeTrainingArguments,
)
from cogvideox_sat.latent_geometry import TIME_FACTOR  # noqa: E402
from cogvideox_sat.media.video_reading import DEFAULT_BACKEND  # noqa: E402

logger = logging.getLogger("write_configuration_page")

PAGE = ROOT / "docs" / "configuration.md"
HEAD = """# Configuration

`python tools/write_configuration_page.py` writes this page from the classes that declare the arguments. Do not edit it.

## Files

A configuration is a YAML file with up to five sections:

| section | holds |
|---|---|
| `args` | the arguments below, by name |
| `model` | classes of network, VAE, text encoder, denoiser, loss, sampler: `target:` is a path, `params:` arguments |
| `data` | the data set of training: `target: data_video.SFTDataset`, and the `params` below |
| `deepspeed` | DeepSpeed's own configuration, for fine-tuning |
| `lightning` | `trainer:`, the arguments of Lightning's `Trainer`, for training the VAE |

`--base A.yaml B.yaml` merges files; keys of later files override keys of earlier ones. A flag `--name value` overrides
`args.name`. `--set KEY=VALUE` overrides any key of all files:

```bash
python sat/sample_video.py --base configs/cogvideox_5b.yaml configs/inference.yaml --steps 20 \\
    --set model.scale_factor=0.7
```

* `include: other.yaml`, or a list of files, stands at the top of a file. Keys of the file override included keys.
* A key without a value means "not set".
* `${a.b.c}` stands for the value of another key, `${args.output_dir}` for that of the flag if it is given.
* An unknown key in `args` is an error that names the nearest known key.
* Flags have two spellings, `--output_dir` and `--output-dir`; `--no-name` turns a switch off.
* Configurations of the original load unchanged, in both dialects: `patch_size: 2` and `patch_size: [2, 2, 2]`;
  `height_interpolation` and `width_interpolation` under `pos_embed_config.params` and under `network_config.params`.

A file given as `--base` is trusted, see [security](../SECURITY.md).
"""
COMMANDS = (
    ("Sampling", "`python sat/sample_video.py`, `cogvideox sample`, `bash inference.sh`", SamplingArguments),
    ("Fine-tuning", "`python sat/train_video.py`, `cogvideox train`, `bash finetune_single_gpu.sh`", TrainingArguments),
    ("Training the VAE", "`python sat/train_vae.py`, `cogvideox train-vae`", VaeTrainingArguments),
)
KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
NAMED_DEFAULTS = {"TIME_FACTOR": TIME_FACTOR, "DEFAULT_BACKEND": DEFAULT_BACKEND}
FROM_ARGUMENTS = ("data_dir", "missing_label", "max_unreadable_share", "clip_timeout")  # set by `args`
LISTS = {int: "whole numbers", float: "numbers", str: "texts"}


def page() -> str:
    """Return the page."""
    parts = [HEAD]
    for title, commands, declared in COMMANDS:
        parts.append(f"## {title}\n\n{commands}\n")
        parts.append("| argument | value | default | meaning |\n|---|---|---|---|")
        parts += [argument_row(name, field) for name, field in argument_fields(declared).items()]
        parts.append("")
    return "\n".join([*parts, *data_section()]).rstrip() + "\n"


def argument_row(name: str, field: Field[Any]) -> str:
    """Return the row of an argument."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    kind = value_type(field)
    if choices := field.metadata["choices"]:
        value = ", ".join(f"`{choice}`" for choice in choices)
    elif kind is list:
        value = LISTS[item_type(field)]
    else:
        value = KINDS.get(kind, "see the meaning")
    return f"| `{name}` | {value} | {shown_default(default)} | {cell(field.metadata['help'])} |"


def shown_default(value: Any) -> str:
    """Return a default as a configuration has it; nothing for one that is not set."""
    if value is None or value == "" or value == []:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def cell(text: str) -> str:
    """Return text as a cell of a table."""
    return text.replace("|", "\\|")


def data_section() -> Iterator[str]:
    """Yield the part about `data.params`, from the data set's signature and docstring.

    The file is parsed rather than imported, since it imports PyTorch.
    """
    tree = ast.parse((ROOT / "sat" / "data_video.py").read_text(encoding="utf-8"))
    dataset = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "SFTDataset")
    start = next(node for node in dataset.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    yield "## Clips: `data.params`\n"
    yield "The arguments of `data_video.SFTDataset`; [data](data.md) explains them.\n"
    yield "| key | default | meaning |\n|---|---|---|"
    meanings = described_arguments(ast.get_docstring(dataset) or "")
    for name, default in defaults(start.args):
        if name in meanings and name not in FROM_ARGUMENTS:
            yield f"| `{name}` | {shown_default(default)} | {cell(meanings[name])} |"
    yield ""


def defaults(arguments: ast.arguments) -> Iterator[tuple[str, Any]]:
    """Yield the arguments of a function in order, each with its default.

    None for an argument without a default.
    """
    positional = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    values = [*missing, *arguments.defaults, *arguments.kw_defaults]
    for argument, value in zip([*positional, *arguments.kwonlyargs], values, strict=True):
        if isinstance(value, ast.Name):
            yield argument.arg, NAMED_DEFAULTS.get(value.id)
        else:
            yield argument.arg, None if value is None else ast.literal_eval(value)


def described_arguments(doc: str) -> dict[str, str]:
    """Return the texts of a docstring's sections "Attributes" and "Args" by name."""
    found = {}
    for section in re.findall(r"^(?:Attributes|Args):\n((?:    .*\n|\n)*)", doc + "\n", re.MULTILINE):
        for part in re.split(r"\n(?=    \S)", section):
            name, colon, words = " ".join(part.split()).partition(": ")
            if colon:
                found[name] = words
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    return run_page_tool(arguments, __doc__, PAGE, page, logger)


if __name__ == "__main__":
    sys.exit(main())
