"""The VAE's GPU kernels equal PyTorch in Triton's interpreter, and compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from support import assert_close
from vae_modules.passes import gpu_support
from vae_modules.passes.channel_sums import channel_sums
from vae_modules.passes.latent_maps import LatentMaps

gpu_kernels, gpu_trial, triton_kernels = (
    pytest.importorskip(f"vae_modules.passes.{name}") for name in ("gpu_kernels", "gpu_trial", "triton_kernels")
)

KERNELS = [getattr(triton_kernels, f"{name}_kernel") for name in ("sums", "modulated_silu", "resized_sum", "product")]
ROOT = Path(__file__).resolve().parents[2]


PRODUCTS = ((1, 1, 1), 72), ((3, 3, 3), 4)  # windows and input channels


def cases(dtype: torch.dtype, channels: int) -> None:
    """Compare with float64, in the interpreting process of `test_in_the_interpreter`."""
    torch.manual_seed(0)

    def clip(batch, frames, height, width):
        return torch.randn(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3).to(dtype)

    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    multiplies = dtype != torch.bfloat16  # the interpreter has no products of it
    for frames, lead, steps in ((5, True, 3), (4, False, 2), (1, True, 1)):
        x, other = clip(2, frames, 6, 40), clip(2, frames, 6, 40)
        room = clip(2, frames + 2, 6, 40)
        latent = torch.randn(2, 6, steps, 3, 10)
        maps = LatentMaps(*(each.to(dtype) for each in (latent, *weights(channels, 6), *weights(channels, 6))))
        maps = maps if multiplies else None
        norm = [torch.randn(2, channels, steps, 1, 1) for _ in range(2)]
        alone = int(lead)
        repeats = torch.tensor([1] * alone + [2] * (steps - alone))

        def repeated(m, repeats=repeats):
            return m.double().repeat_interleave(repeats, 2)

        full = [torch.ones(1), torch.zeros(1)]
        if maps is not None:
            full = [repeated(m).repeat_interleave(2, 3).repeat_interleave(4, 4) for m in wide(maps).scale_and_shift()]
        tail = clip(2, 2, 6, 40) if frames > 1 else None
        gpu_kernels.write_modulated_silu(room[:, :, 2:], x[:, :, :steps], *norm, lead, maps, tail)
        assert tail is None or torch.equal(tail, room[:, :, -2:])
        normed = repeated(x[:, :, :steps]) * repeated(norm[0]) + repeated(norm[1])
        assert_close(room[:, :, 2:], F.silu(normed * full[0] + full[1]), tolerance)
        out, norm = torch.empty_like(x), [each[:, :, :1] for each in norm]
        gpu_kernels.write_modulated_silu(out, x, *norm, False)
        assert_close(out, F.silu(x.double() * norm[0] + norm[1]), tolerance)
        for offset in (None, torch.randn(channels).to(dtype)):
            added = 0 if offset is None else offset[:, None, None, None]
            expected = x.double() + other + added
            halved, doubled = clip(2, steps, 7, 41), clip(2, frames, 12, 80)
            gpu_kernels.write_halved_sum(halved, x, other, offset, True, lead)
            pairs = [(expected[:, :, at] + expected[:, :, at + 1]) / 2 for at in range(alone, frames, 2)]
            pairs = torch.stack([*expected[:, :, :alone].unbind(2), *pairs], dim=2)
            assert_close(halved, F.pad(pairs, (0, 1, 0, 1)), tolerance)
            gpu_kernels.write_doubled_sum(doubled, x, other, offset)
            assert_close(doubled, expected.repeat_interleave(2, 3).repeat_interleave(2, 4), tolerance)
            sums = gpu_kernels.add_and_sum(x, other, offset)
            assert_close(x, expected, tolerance)  # the interpreter cuts off where a GPU rounds
            assert_close(sums, channel_sums(x), 1e-6)  # sums of the stored values
            expected = x.double() + repeated(other[:, :, :steps]) + added
            gpu_kernels.add_and_sum(x, other[:, :, :steps], offset, lead)
            assert_close(x, expected, tolerance)
        assert_close(gpu_kernels.channel_sums(room), channel_sums(room), 1e-6)
        for window, in_channels in PRODUCTS if multiplies and frames == 5 else ():
            sizes = [size + more - 1 for size, more in zip(x.shape[2:], window, strict=True)]
            source = torch.randn(2, *sizes, in_channels).permute(0, 4, 1, 2, 3).to(dtype)
            weight = torch.randn(channels, in_channels, *window).to(dtype)
            exact = F.conv3d(source.double(), weight.double())
            sums = torch.stack([exact.sum((2, 3, 4)), exact.square().sum((2, 3, 4))])
            assert_close(gpu_kernels.product_sums(source, weight), sums, 1e-5)
            gpu_kernels.write_product_silu(room[:, :, 2:], source, weight, *norm)
            assert_close(room[:, :, 2:], F.silu(exact * norm[0] + norm[1]), tolerance)
            expected = x.double() + exact
            sums = gpu_kernels.add_product_and_sum(x, source, weight, None)
            assert_close(x, expected, tolerance)
            assert_close(sums, channel_sums(x), 1e-5)


def weights(channels: int, latent_channels: int) -> list[torch.Tensor]:
    return [torch.randn(channels, latent_channels), torch.randn(channels)]


def wide(maps: LatentMaps) -> LatentMaps:
    return LatentMaps(*(each.double() for each in maps))


@pytest.mark.slow
def test_in_the_interpreter():
    code = (
        "import torch, test_gpu_kernels as test\n"
        "test.gpu_kernels.PLACES_EACH = 128  # fewer steps of a program, and several programs\n"
        "for dtype in (torch.float32, torch.float16): test.gpu_trial.try_out(dtype, 'cpu')\n"
        "for dtype, channels in ((torch.float32, 48), (torch.float16, 160), (torch.bfloat16, 128)):\n"
        "    test.cases(dtype, channels)\n"
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

    sizes = {"CHANNELS": 128, "PLACES": 32, "LATENT_CHANNELS": 16, "ROWS": gpu_kernels.PRODUCT_ROWS}
    sizes |= {"INNER": gpu_kernels.PRODUCT_INNER, "ROWS_EACH": gpu_kernels.PLACES_EACH}
    sizes |= {"IN_CHANNELS": 4, "WINDOW_HEIGHT": 3, "WINDOW_WIDTH": 3, "PRECISION": "tf32"}
    flags = dict.fromkeys(("OFFSET", "OTHER", "TAIL", "LATENT", "SUMS"), True)
    pointers = dict.fromkeys(("partial", "scale", "shift"), "*fp32")
    pointers |= dict.fromkeys(("x", "other", "offset", "out", "tail", "latent", "weight", "bias", "source"), "*bf16")
    for kernel in KERNELS:
        for one in (False, True):
            known = {**sizes, **flags, "DOUBLE": one, "ADD": one, "SILU": not one}
            constants = {name: known[name] for name in kernel.arg_names if name in known}
            types = {name: "constexpr" if name in constants else pointers.get(name, "i64") for name in kernel.arg_names}
            target = GPUTarget("cuda", capability, 32)
            assert compile(ASTSource(fn=kernel, signature=types, constexprs=constants), target=target).asm["cubin"]


def test_a_kernel_that_computes_something_else_is_noticed(monkeypatch):
    def skewed(dtype, device):
        yield torch.ones(3), torch.ones(3).double()
        yield torch.tensor([1.0, 1.0, torch.nan]), torch.ones(3).double()

    monkeypatch.setattr(gpu_trial, "_results", skewed)
    with pytest.raises(ArithmeticError, match="they give other numbers than PyTorch"):
        gpu_trial.try_out(torch.float32)


def test_without_a_gpu_pytorch_serves(monkeypatch, caplog):
    assert gpu_support.kernels_for(torch.randn(1, 2, 3, 4, 8).permute(0, 4, 1, 2, 3)) is None

    def broken(dtype):
        raise RuntimeError("no kernel image\nfor this device")

    gpu_support.work_in.cache_clear()
    monkeypatch.setattr(gpu_trial, "try_out", broken)
    try:
        assert not gpu_support.work_in(torch.bfloat16) and not gpu_support.work_in(torch.bfloat16)
    finally:
        gpu_support.work_in.cache_clear()
    assert caplog.text.count("without its own GPU kernels, which fail on this machine: no kernel image") == 1
