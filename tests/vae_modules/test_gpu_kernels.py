"""The VAE's GPU kernels equal PyTorch in Triton's interpreter, and compile."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from support import assert_close
from vae_modules import gpu_kernels
from vae_modules.channel_sums import channel_sums

triton_kernels = pytest.importorskip("vae_modules.triton_kernels")

ROOT = Path(__file__).resolve().parents[2]


def cases(dtype: torch.dtype, channels: int) -> None:
    """Compare with float64, in the interpreting process of `test_in_the_interpreter`."""
    torch.manual_seed(0)

    def clip(batch, frames, height, width):
        return torch.randn(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3).to(dtype)

    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    for frames, lead, steps in ((5, True, 3), (4, False, 2), (1, True, 1)):
        x, other = clip(2, frames, 6, 40), clip(2, frames, 6, 40)
        room = clip(2, frames + 2, 6, 40)
        maps = [torch.randn(2, channels, steps, 3, 10) for _ in range(2)]
        norm = [torch.randn(2, channels, 1, 1, 1) for _ in range(2)]
        alone = int(lead)
        repeats = torch.tensor([1] * alone + [2] * (steps - alone))
        full = [m.double().repeat_interleave(repeats, 2).repeat_interleave(2, 3).repeat_interleave(4, 4) for m in maps]
        tail = clip(2, 2, 6, 40) if frames > 1 else None
        gpu_kernels.write_modulated_silu(room[:, :, 2:], x, *maps, lead, (norm[0], norm[1]), tail)
        assert tail is None or torch.equal(tail, room[:, :, -2:])
        normed = x.double() * norm[0] + norm[1]
        assert_close(room[:, :, 2:], F.silu(normed * full[0] + full[1]), tolerance)
        out = torch.empty_like(x)
        gpu_kernels.write_modulated_silu(out, x, *norm, False)
        assert_close(out, F.silu(normed), tolerance)
        for offset in (None, torch.randn(channels).to(dtype)):
            total = x.double() + other + (0 if offset is None else offset[:, None, None, None])
            sums = gpu_kernels.add_and_sum(x, other, offset)
            assert_close(x, total, tolerance)  # the interpreter cuts off where a GPU rounds
            assert_close(sums, channel_sums(x), 1e-6)  # sums of the stored values
        assert_close(gpu_kernels.channel_sums(room), channel_sums(room), 1e-6)


@pytest.mark.slow
def test_in_the_interpreter():
    code = (
        "import torch, test_gpu_kernels as test\n"
        "test.gpu_kernels._try_out('cpu')\n"
        "for dtype, channels in ((torch.float32, 48), (torch.bfloat16, 128)): test.cases(dtype, channels)\n"
    )
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "sat", ROOT / "tests", Path(__file__).parent)))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile(capability):
    """With the compiler that Triton brings along, for an A100 and an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    sizes = {"CHANNELS": 128, "ROWS": 32, "ROWS_EACH": 2048, "PLACES": 32}
    flags = dict.fromkeys(("ADD", "OUTER", "OFFSET", "OTHER", "TAIL"), True)
    pointers = {"partial": "*fp32", "outer_scale": "*fp32", "outer_shift": "*fp32"}
    pointers |= dict.fromkeys(("x", "other", "offset", "out", "tail", "scale", "shift"), "*bf16")
    kernels = triton_kernels.sums_kernel, triton_kernels.modulated_silu_kernel, triton_kernels.resized_sum_kernel
    for kernel, double in itertools.product(kernels, (False, True)):
        known = {**sizes, **flags, "DOUBLE": double}
        constants = {name: known[name] for name in kernel.arg_names if name in known}
        types = {name: "constexpr" if name in constants else pointers.get(name, "i64") for name in kernel.arg_names}
        target = GPUTarget("cuda", capability, 32)
        assert compile(ASTSource(fn=kernel, signature=types, constexprs=constants), target=target).asm["cubin"]


def test_without_a_gpu_pytorch_serves(monkeypatch, caplog):
    x = torch.randn(1, 2, 3, 4, 8).permute(0, 4, 1, 2, 3)
    assert not gpu_kernels.serve(x)

    def broken(device="cuda"):
        raise RuntimeError("no kernel image\nfor this device")

    gpu_kernels.works.cache_clear()
    monkeypatch.setattr(gpu_kernels, "_try_out", broken)
    try:
        assert not gpu_kernels.works() and not gpu_kernels.works()
    finally:
        gpu_kernels.works.cache_clear()
    assert caplog.text.count("without its own GPU kernels, which fail on this machine: no kernel image") == 1
