"""Configurations with one random change, as careless or malicious people might write them.

`mutated(config, random)` returns the text of a file and the changed key.
"""

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]
CANARY = "canary"

ODD_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.5, 1e30, 1e-30, 10**20, 10**9, 2**31, 2**63, -(10**20)),
    *(float("inf"), float("-inf"), float("nan"), "", " ", "x", "30", "1e5", "null", "true", "é\u200b", "a" * 5000),
    *(
        "../..",
        "/",
        "/dev/null",
        "/proc/self/mem",
        "data_video",
        "torch.nn.Identity",
        "os.system",
        "-1",
        "${",
        "${args}",
    ),
    *("${model}", "${oc.env:HOME}", "\x1b[31mred"),
    *(
        [],
        [[]],
        [None],
        [1],
        [1, 2, 3],
        ["torch.nn.Identity"],
        [1e30],
        list(range(100)),
        {},
        {"a": 1},
        {"target": None},
    ),
    *({"target": 5}, {"target": "torch.nn.Identity"}, {"target": "torch.nn.Linear", "params": {}}, {"params": {}}),
    *({1: 2}, {"params": None}, {"target": "subprocess"}),
]
COMMAND = f"touch {CANARY}"
EXECUTED: list[dict[str, Any]] = [
    {"target": "subprocess.getoutput", "params": {"cmd": COMMAND}},
    {"target": "subprocess.Popen", "params": {"args": ["touch", CANARY]}},
    {"target": "os.system", "params": {"command": COMMAND}},
    {"target": "builtins.exec", "params": {"source": f"open({CANARY!r}, 'w')"}},
    {"target": "builtins.open", "params": {"file": CANARY, "mode": "w"}},
    {"target": "logging.FileHandler", "params": {"filename": CANARY}},
    {"target": "sgm.util.importlib.os.system", "params": {"command": COMMAND}},
    {"target": "zipfile.ZipFile", "params": {"file": CANARY, "mode": "w"}},
    {"target": "timeit.timeit", "params": {"stmt": f"open({CANARY!r}, 'w')"}},
    {"target": "torch.utils.data.DataLoader", "params": {"dataset": [1]}},
    {"target": "runpy.run_path", "params": {"path_name": "evil.py"}},
    {"target": "shelve.open", "params": {"filename": CANARY}},
]
BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + chr(ord(name) - 1)] * 9)}]\n" for name in "bcdefghi"
)
TEXTS: list[Callable[[str, str], str]] = [
    lambda text, key: text + "\nargs: {seed: 1}\n",  # a section twice
    lambda text, key: text + "\nyes: 1\n",
    lambda text, key: text + "\nmodel.x: 1\n",
    lambda text, key: text.replace(f"{key}:", f"{key}: !!python/object/apply:os.system ['{COMMAND}'] #", 1),
    lambda text, key: text.replace(f"{key}:", f"{key}: !!binary aGVsbG8= #", 1),
    lambda text, key: text.replace(f"{key}:", f"{key}: " + "[" * 5000 + "]" * 5000 + " #", 1),
    lambda text, key: text.replace(f"{key}:", f"{key}: &a [*a] #", 1),
    lambda text, key: text.replace(f"{key}:", f"? [{key}]\n:", 1),
    lambda text, key: text.replace(f"{key}:", f"{key}: 2024-01-31 #", 1),
    lambda text, key: text.replace(f"{key}:", f"{key}: 'open", 1),
    lambda text, key: text[: len(text) // 2],
    lambda text, key: text.replace(":", "", 1),
    lambda text, key: "\t" + text,
    lambda text, key: text + "\n\x00",
    lambda text, key: text + "\nmodel: 5\n",
    lambda text, key: BOMB + text,
]  # fmt: skip


def mutated(config: dict[str, Any], source: random.Random) -> tuple[str, str]:
    """Return the text of a configuration file with one change, and its dotted key."""
    config = copy.deepcopy(config)
    key = choose_key(config, source)
    kind = source.choices(
        ("odd", "rename", "remove", "wrap", "swap", "execute", "add", "text"), (40, 8, 10, 8, 10, 8, 6, 10)
    )[0]
    if kind == "text":
        name = next((str(part) for part in reversed(key) if isinstance(part, str)), "model")
        return source.choice(TEXTS)(yaml.safe_dump(config), name), ".".join(map(str, key))
    parent, last = at(config, key[:-1]), key[-1]
    if kind == "odd":
        parent[last] = copy.deepcopy(source.choice(ODD_VALUES))
    elif kind == "rename" and isinstance(parent, dict):
        parent[source.choice([f"{last}s", f"{last}_", str(last).upper(), "params", "target"])] = parent.pop(last)
    elif kind == "remove":
        del parent[last]
    elif kind == "wrap":
        parent[last] = source.choice([[parent[last]], {"params": parent[last]}, {str(last): parent[last]}])
    elif kind == "swap":
        parent[last] = copy.deepcopy(at(config, choose_key(config, source)))
    elif kind == "execute":
        targets = [path for path in keys(config) if path[-1] == "target"]
        key = source.choice(targets)[:-1]
        place = at(config, key)
        evil = copy.deepcopy(source.choice(EXECUTED))
        if source.random() < 0.5:
            evil = {**place, "target": evil["target"]}
        place.clear()
        place.update(evil)
    elif isinstance(parent, dict):
        parent[source.choice(["extra", "include", "_target_", "params", "target", "config"])] = source.choice(
            ODD_VALUES
        )
    return yaml.safe_dump(config, allow_unicode=True), ".".join(map(str, key))


def choose_key(config: dict[str, Any], source: random.Random) -> Key:
    """Return a random key of the configuration.

    Sections are equally likely, and so are deep and shallow keys.
    """
    section = source.choice(sorted(config))
    below = [key for key in keys(config) if key[0] == section]
    depth = source.choice(sorted({len(key) for key in below}))
    return source.choice([key for key in below if len(key) == depth])


def keys(node: Any, key: Key = ()) -> Iterator[Key]:
    """Yield every key of a nested configuration."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in items:
        yield (*key, name)
        yield from keys(child, (*key, name))


def at(node: Any, key: Key) -> Any:
    """Return the value at a key."""
    for part in key:
        node = node[part]
    return node


def evil_module(folder: Path) -> None:
    """Write a module that must never run."""
    (folder / "evil.py").write_text(f"open({CANARY!r}, 'w').close()\n")
