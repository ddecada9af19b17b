"""The process of one unit of the device check; `running` starts it with a task as JSON."""

import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT / "benchmarks")
sys.path[1:1] = [str(ROOT), *(str(ROOT / folder) for folder in ("sat", "tests", "tests/sat"))]


def main() -> None:
    task: dict[str, Any] = json.loads(sys.argv[1])
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if task["device"] == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses its device on import
    from device_parts.recording import Recorder

    module, _, function = task["target"].rpartition(".")
    own = Path(__file__).with_name(f"{module}.py").exists()
    measure = getattr(importlib.import_module(f"device_parts.{module}" if own else module), function)
    measure(Recorder(task), **task["options"])


def end_with_parent(parent: int) -> None:
    """End this process when its parent has ended, so that the device is free again."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()
