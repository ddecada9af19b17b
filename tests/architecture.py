"""Check the layers of the code, and that modules which plan a request import no PyTorch.

    python tests/architecture.py        prints violations, and exits with 1 if there are any

A module imports only from layers below its own; packages of one layer do not import each other. Imports inside
functions count for the layers, but not for PyTorch: commands answer before it is loaded.
"""

import ast
import sys
from collections import deque
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UMBRELLA = "cogvideox_sat"

# From the top: names of packages below `cogvideox_sat`, or of modules and packages beside it.
LAYERS = (
    ("benchmarks",),
    ("tools",),
    ("command_line",),
    ("web",),
    ("python_api",),
    ("train_video", "sample_video", "train_vae"),
    ("tool_commands",),
    ("training", "vae_training", "evaluation", "shapes"),
    ("sampling",),
    ("conversion", "runs"),
    ("memory",),
    ("engine_choice",),
    ("diffusion_video",),
    ("engine",),
    ("arguments", "data_video", "dit_video_concat"),
    ("clips", "weights", "network"),
    ("parallel",),
    ("configuration", "media"),
    ("commands",),
    ("files", "latent_geometry", "version"),
    ("vae_modules",),
    ("sgm",),
)

# Packages and modules that plan and check a request, and are imported before PyTorch.
LIGHT = (
    "command_line",
    "tool_commands",
    "commands",
    "configuration",
    "arguments",
    "sample_video",
    "train_video",
    "train_vae",
    "sampling.plan",
    "sampling.planned_videos",
    "sampling.model_arguments",
    "sampling.request_checks",
    "sampling.prompt_files",
    "sampling.prompt_lines",
    "sampling.prompt_requests",
    "sampling.typed_prompts",
    "sampling.prompt_refinement",
    "training.plan",
    "vae_training.plan",
    "runs.folders",
    "files",
    "python_api.loading",
    "python_api.model_places",
    "python_api.calls",
    "python_api.training",
    "python_api.converting",
    "web",
)
NEEDS_TORCH = {
    "configuration.meta_device": "builds modules",
    "configuration.model_checks": "builds modules",
}
HEAVY = frozenset({"torch", "deepspeed", "sat", "transformers", "pytorch_lightning", "diffusers", "av", "decord"})


def places(root: Path) -> dict[str, Path]:
    """Return the source files by module name.

    Modules below `cogvideox_sat` are named without it.
    """
    found = {}
    bases = {"": root / "sat", "sgm": root / "sgm", "vae_modules": root / "vae_modules"}
    bases |= {folder: root / folder for folder in ("tools", "benchmarks")}
    for package, folder in bases.items():
        for path in folder.rglob("*.py"):
            parts = [*([package] if package else []), *path.relative_to(folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            name = ".".join(parts).removeprefix(f"{UMBRELLA}.")
            if name and name != UMBRELLA:
                found[name] = path
    return found


def imports(path: Path, everywhere: bool) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of each import.

    Args:
        everywhere: include imports inside functions.
    """
    waiting = deque[ast.AST]([ast.parse(path.read_text())])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)


def module_of(name: str, modules: dict[str, Path]) -> str | None:
    """Return the module of `modules` that an import of `name` loads.

    None for a module of another project.
    """
    name = name.removeprefix(f"{UMBRELLA}.")
    while name:
        if name in modules:
            return name
        name = name.rpartition(".")[0]
    return None


def layer_of(module: str) -> int | None:
    """Return the number of a module's layer, 0 for the highest.

    None for a module without a layer.
    """
    rooms = {room: number for number, layer in enumerate(LAYERS) for room in layer}
    return rooms.get(module.partition(".")[0])


def broken_layers(root: Path) -> list[str]:
    """Return a line for each import upwards or sideways, and each module without a layer."""
    modules = places(root)
    lines = []
    for module, path in sorted(modules.items()):
        own = layer_of(module)
        if own is None:
            lines.append(f"{path.relative_to(root)}: no layer of tests/architecture.py has it; put it into a package")
            continue
        for line, name in imports(path, everywhere=True):
            other = module_of(name, modules)
            if other is None or other.partition(".")[0] == module.partition(".")[0]:
                continue
            if (theirs := layer_of(other)) is not None and theirs <= own:
                direction = "up" if theirs < own else "sideways"
                lines.append(f"{path.relative_to(root)}:{line}: imports {direction}, {other}")
    return lines


def broken_promises(root: Path) -> list[str]:
    """Return a line for each planning module that imports PyTorch, directly or not."""
    modules = places(root)

    @cache
    def heavy(module: str) -> str | None:
        for _, name in imports(modules[module], everywhere=False):
            if name.partition(".")[0] in HEAVY:
                return name.partition(".")[0]
        for _, name in imports(modules[module], everywhere=False):
            other = module_of(name, modules)
            if other and other != module and (found := heavy(other)):
                return f"{other}, {found}"
        return None

    light = [module for module in modules for room in LIGHT if module == room or module.startswith(f"{room}.")]
    lines = [
        f"{modules[module].relative_to(root)}: imports {found}, before the request is checked"
        for module in sorted(light)
        if module not in NEEDS_TORCH and (found := heavy(module))
    ]
    return lines + [f"NEEDS_TORCH: {module} does not exist" for module in NEEDS_TORCH if module not in modules]


def main() -> int:
    lines = broken_layers(ROOT) + broken_promises(ROOT)
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
