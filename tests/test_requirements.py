"""The requirement files name every imported package, and others only with a reason."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PROGRAM = ("sat", "sgm", "vae_modules", "tools")  # folders that a user runs
CHECKS = ("tests", "benchmarks")
FILES = ("requirements.txt", "requirements-web.txt", "tests/requirements.txt")
FINDERS = ("import_module", "find_spec", "importorskip", "__import__")
# It runs before an environment exists, and works without these packages.
SET_UP = ROOT / "tools" / "setup_environment.py"
# Imported if a user has installed them; the tools report missing ones.
OPTIONAL = {
    "diffusers": "tools/load_cogvideox_lora.py",
    "mkdocs": "tools/site_links.py, which MkDocs calls; docs/requirements.txt names it",
    "xformers": "an attention kernel",
}
# Distributions whose name differs from the import; packages that are not installed have no record.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sat": "swissarmytransformer"}
NOT_IMPORTED = {
    "datasets": "SwissArmyTransformer imports it",
    "triton": "SwissArmyTransformer imports it, and does not require it",
    "codespell": "tests/run.sh runs it",
    "mypy": "tests/type_checks.py runs it",
    "ruff": "tests/run.sh runs it",
    "pytest-timeout": "pyproject.toml sets its limit",
    "pytest-xdist": "tests/run.sh runs several processes",
    "setuptools": "tests/test_package.py builds the package",
}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(file: str) -> set[str]:
    """Return the distributions that a requirement file names."""
    lines = (line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    return {normalized(Requirement(line).name) for line in lines if line}


def imports(source: str) -> Iterator[str]:
    """Yield the modules that a file imports anywhere, also by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in FINDERS:
                yield str(node.args[0].value)


def imported(folders: tuple[str, ...]) -> dict[str, str]:
    """Return the distributions that files of some folders import, each with such a file."""
    files = {folder: sorted((ROOT / folder).rglob("*.py")) for folder in (*PROGRAM, *CHECKS)}
    packages = {"cogvideox_sat", "sgm", "vae_modules", "device_parts"}
    alone = {file.stem for each in files.values() for file in each if not packages & set(file.relative_to(ROOT).parts)}
    beside = {path.parent.name for folder in CHECKS for path in (ROOT / folder).glob("*/__init__.py")}
    own = {*files, *packages, *alone, *beside} - {"sat"}  # `sat` is SwissArmyTransformer
    installed, found = packages_distributions(), {}
    for file in (file for folder in folders for file in files[folder]):
        for module in imports(file.read_text()) if file != SET_UP else ():
            package = module.partition(".")[0]
            if package not in own and package not in sys.stdlib_module_names:
                names = installed.get(package) or [DISTRIBUTIONS.get(package, package)]
                found[normalized(names[0])] = str(file.relative_to(ROOT))
    return found


def test_imports_are_seen():
    source = "import a.b as c\ndef f():\n    from d import e\n    find_spec('g')\n    importlib.import_module('h.i')\n"
    assert set(imports(source)) == {"a.b", "d", "g", "h.i"}
    assert imported(("sat",))["swissarmytransformer"].startswith("sat/")


@pytest.mark.parametrize("folder", PROGRAM)
def test_what_the_program_imports_is_required(folder):
    found = {name: file for name, file in imported((folder,)).items() if name not in OPTIONAL}
    assert found
    required = requirements("requirements.txt") | requirements("requirements-web.txt")
    assert not {name: file for name, file in found.items() if name not in required}


@pytest.mark.parametrize("folder", CHECKS)
def test_what_tests_and_benchmarks_import_is_required_for_them(folder):
    required = {name for file in FILES for name in requirements(file)} | {"xformers"}
    assert not {name: file for name, file in imported((folder,)).items() if name not in required}


def pinned() -> dict[str, str]:
    """Return the versions of `constraints.txt` by distribution."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {normalized(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def test_constraints_name_a_version_that_fits_of_all_that_is_required():
    versions = pinned()
    assert all(versions.values()), "only `name==version`: no paths, no addresses"
    for file in FILES:
        lines = (line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
        for requirement in (Requirement(line) for line in lines if line):
            assert requirement.specifier.contains(versions[normalized(requirement.name)]), requirement


def needed(lines: list[Requirement]) -> dict[str, str]:
    """Return the installed distributions that requirements need, each with its parent."""
    found, waiting = {}, [(line, "the requirement files") for line in lines]
    while waiting:
        line, by = waiting.pop()
        for name, extra in ((normalized(line.name), extra) for extra in ("", *line.extras)):
            if (name, extra) in found:
                continue
            found[name, extra] = by
            try:
                further = [Requirement(text) for text in requires(name) or []]
            except PackageNotFoundError:
                continue
            waiting += [(each, name) for each in further if not each.marker or each.marker.evaluate({"extra": extra})]
    return {name: by for (name, _), by in found.items()}


def test_constraints_name_a_version_of_all_that_comes_with_it():
    lines = [line.split("#")[0].strip() for file in FILES for line in (ROOT / file).read_text().splitlines()]
    found = needed([Requirement(line) for line in lines if line])
    assert found["tokenizers"] == "transformers"
    assert not {name: by for name, by in found.items() if name not in pinned()}


def test_hooks_before_a_commit_have_the_versions_of_the_tests():
    hooks = re.findall(r"\b([a-z]+)==([\w.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert {name for name, _ in hooks} == {"ruff", "codespell"}
    assert {*hooks} <= pinned().items()


def test_what_is_required_is_imported():
    program, checks = requirements("requirements.txt"), requirements("tests/requirements.txt")
    page = requirements("requirements-web.txt")
    assert not page & (program | checks)
    assert not page - imported(PROGRAM).keys()
    assert not program & checks
    assert program - imported(PROGRAM).keys() <= NOT_IMPORTED.keys()
    assert checks - imported((*PROGRAM, *CHECKS)).keys() <= NOT_IMPORTED.keys()
    assert not {*NOT_IMPORTED} - (program | checks), "no longer required"
