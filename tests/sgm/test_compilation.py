"""Networks that cannot be compiled: an error, or a run without the compiler."""

import logging
import shutil

import pytest
import torch
from torch import nn

from sgm.compilation import compiler_reason, go_on_without_compiler, why_not_compilable
from sgm.errors import UserError
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper


@pytest.mark.slow
def test_compiling_without_a_compiler_is_an_error(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"on a CPU, and .* does not exist; install one, name another"):
        OpenAIWrapper(nn.Linear(2, 2), compile_model=True)
    OpenAIWrapper(nn.Linear(2, 2).to("meta"), compile_model=True)  # other devices have their own
    why_not_compilable.cache_clear()
    assert why_not_compilable(torch.device("cpu")).startswith("it needs a C++ compiler on a CPU, and ")
    why_not_compilable.cache_clear()


def test_the_reason_of_a_failure_is_one_short_line(caplog):
    caplog.set_level(logging.WARNING)
    error = RuntimeError("no Python.h\nin /usr/include\n\n Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace")
    assert compiler_reason(error) == "no Python.h in /usr/include"
    assert compiler_reason(RuntimeError()) == "RuntimeError"
    told = []
    network = nn.Linear(2, 2)
    network.compiler_failed = lambda: told.append("failed")
    go_on_without_compiler(network, error)
    assert told == ["failed"]
    assert caplog.messages == [
        "compile_model: the network goes on without torch.compile, which failed: no Python.h in /usr/include"
    ]
