"""The attention kernel of each name on a device is the one that runs.

A missing kernel is reported.
"""

from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from cogvideox_sat.network import attention_choice
from cogvideox_sat.network.attention_choice import BACKENDS, AttentionChoice, choose_attention
from seeded import seed_module_, seeded_input
from sgm import flash_attention3
from sgm.attention_kernels import KERNELS
from sgm.errors import UserError
from sgm.util import instantiate_from_config
from support import Reference, assert_close

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
FLASH_BACKWARD = f"{FLASH}_backward"
SMALL = ["--sampling_num_frames", "3", "--sampling_image_size", "64", "96", "--sampling_num_steps", "2"]
MATH = "aten::_scaled_dot_product_attention_math"


def network(checkpointed: bool = False) -> torch.nn.Module:
    case = Reference("dit/t2v_5b").case
    built = seed_module_(instantiate_from_config(case["network_config"]))
    built.transformer.checkpoint_activations = checkpointed
    return built


def inputs(built: torch.nn.Module) -> dict[str, torch.Tensor]:
    case = Reference("dit/t2v_5b").case
    b, t, _, h, w = case["latent"]
    return {
        "x": seeded_input("x", (b, t, built.in_channels, h, w)),
        "timesteps": torch.tensor(case["timesteps"]),
        "context": seeded_input("context", case["context"]),
    }


def kernels_of(run) -> Counter:
    """Return how often each kernel of attention runs within a function."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return Counter({event.key: event.count for event in profiler.key_averages() if "scaled_dot_product" in event.key})


def chosen(asked: str, gradients: bool = False) -> AttentionChoice:
    return choose_attention(asked, CPU, torch.float32, 64, gradients)


@torch.no_grad()
def test_auto_on_a_cpu_changes_no_bit():
    built = network()
    before = built(**inputs(built))
    choice = chosen("auto")
    assert (str(choice), choice.backends, choice.function) == ("flash (auto)", (), None)
    built.use_attention(choice)
    assert torch.equal(built(**inputs(built)), before)


@torch.no_grad()
def test_the_kernel_that_is_named_runs_in_every_layer():
    built = network()
    given = inputs(built)
    before = built(**given)
    built.use_attention(chosen("math"))
    outputs = []
    calls = kernels_of(lambda: outputs.append(built(**given)))
    assert calls[MATH] == built.num_layers and not calls[FLASH]
    assert_close(outputs[0], before, 1e-5)
    built.use_attention(chosen("flash"))
    calls = kernels_of(lambda: outputs.append(built(**given)))
    assert calls[FLASH] == built.num_layers and not calls[MATH]
    assert torch.equal(outputs[1], before)
    built.use_attention(None)
    assert torch.equal(built(**given), before)
    assert len(built.layer_runner.around) == 1


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_and_recomputation_take_it_too(checkpointed):
    """Activations that are computed again in the backward pass are so by the same kernel."""
    built = network(checkpointed).train()
    given = inputs(built)

    def step() -> dict[str, torch.Tensor]:
        built.zero_grad()
        built(**given).square().mean().backward()
        return {name: p.grad.clone() for name, p in built.named_parameters() if p.grad is not None}

    expected = step()
    built.use_attention(chosen("math", gradients=True))
    found = []
    calls = kernels_of(lambda: found.append(step()))
    assert calls[MATH] == built.num_layers * (2 if checkpointed else 1)
    assert not calls[FLASH] and not calls[FLASH_BACKWARD]
    for name, gradient in found[0].items():
        assert_close(gradient, expected[name], 1e-4)


@pytest.mark.parametrize("asked", ["cudnn", "efficient"])
def test_a_kernel_that_the_device_does_not_have(asked):
    with pytest.raises(
        UserError, match=rf"attention: {asked} does not compute float32 with 64 channels per head on a cpu"
    ):
        chosen(asked)
    with pytest.raises(UserError, match=r"choose auto, or flash or math$"):
        chosen(asked)


@pytest.mark.parametrize(
    ("capability", "refused", "kernel"),
    [
        ((9, 0), (), "cudnn"),
        ((10, 0), (), "cudnn"),
        ((9, 0), ("cudnn",), "flash"),
        ((8, 0), (), "flash"),
        ((7, 5), ("flash", "cudnn"), "efficient"),
        ((6, 1), ("flash", "cudnn", "efficient"), "math"),
    ],
)
def test_the_order_on_a_gpu_is_ours(monkeypatch, capability, refused, kernel):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    refuses = {BACKENDS[name] for name in refused}
    monkeypatch.setattr(attention_choice, "failure", lambda backend, *_: "no" if backend in refuses else None)
    choice = choose_attention("auto", CUDA, torch.bfloat16, 64, False)
    assert (choice.kernel, set(choice.backends), choice.function) == (kernel, set(BACKENDS.values()), None)
    with choice.applied():
        tried = torch._C._get_sdp_priority_order()
    assert tried[: len(BACKENDS)] == [int(backend) for backend in choice.backends]
    assert choice.backends[-1] == SDPBackend.MATH  # it supports what no other kernel supports


# FlashAttention 3


def hopper(monkeypatch, *packages: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(flash_attention3, "installed", lambda package: package in packages)
    zeros = torch.zeros(1, 2, 128, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(attention_choice, "_example", lambda *_: zeros)


def test_flash3_where_there_is_no_hopper():
    with pytest.raises(UserError, match=r"attention: flash3 needs a Hopper GPU \(H100, H200\), not a cpu; choose auto"):
        chosen("flash3")


def test_flash3_that_is_not_installed(monkeypatch):
    hopper(monkeypatch)
    with pytest.raises(
        UserError, match=r"attention: flash3: the package is not installed; install flash_attn_interface .*auto"
    ):
        choose_attention("flash3", CUDA, torch.bfloat16, 64, False)
    hopper(monkeypatch, flash_attention3.FORWARD)
    with pytest.raises(UserError, match="fa3-fwd computes no gradients, which training needs"):
        choose_attention("flash3", CUDA, torch.bfloat16, 64, True)


def test_flash3_without_gradients(monkeypatch):
    """The package's layout is (b, n, heads, d), and it may return more than the output."""
    hopper(monkeypatch, flash_attention3.FORWARD)
    shapes = []

    def package(q, k, v):
        shapes.append(q.shape)
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2), None

    monkeypatch.setattr(flash_attention3, "_forward", lambda: package)
    kernel = KERNELS["flash3"]
    monkeypatch.setattr(type(kernel), "supports", lambda *_: True)  # it requires a GPU
    choice = choose_attention("flash3", CUDA, torch.bfloat16, 64, False)
    assert (str(choice), choice.backends, choice.function) == ("flash3", (), kernel)
    q, k, v = torch.randn(3, 1, 4, 20, 64, generator=torch.Generator().manual_seed(0)).unbind()
    assert_close(kernel(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v), 1e-6)
    assert shapes[-1] == (1, 20, 4, 64)


def test_a_compiler_takes_flash3_as_one_operator():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(1, 20, 4, 64, dtype=torch.bfloat16, device="cuda")
        out = flash_attention3.flash_attention3(q, q, q)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "cuda")


def test_flash3_of_another_version_than_pytorch_knows(monkeypatch):
    hopper(monkeypatch, flash_attention3.WHOLE)

    def activate(_):
        raise RuntimeError("Module 'flash_attn_interface' does not expose FA3 kernels")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    with pytest.raises(UserError, match=r"flash3 does not compute bfloat16 .* not expose FA3 kernels\); choose"):
        choose_attention("flash3", CUDA, torch.bfloat16, 64, True)


# The commands


def test_the_commands_say_so_before_they_read_weights(tiny, tmp_path, caplog):
    from sample_video import main

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox")
    videos = tmp_path / "videos"
    given = [*SMALL, "--input_file", str(prompts), "--output_dir", str(videos), "--attention", "cudnn"]
    assert main(["--base", str(tiny.config("5b")), *given]) == 2
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "attention: cudnn does not compute float32" in error and not videos.exists()


@pytest.mark.slow
def test_training_says_so_too(tiny, tmp_path, caplog):
    from train_video import main
    from training_clips import write_dataset
    from training_runs import runs_of, train, write_config

    data = write_dataset(tmp_path / "data", clips=2, frames=12, sizes=[(64, 96)])
    config = write_config(tmp_path / "c.yaml", tiny, "5b", data, train_iters=1)
    assert main(["--base", str(config), "--attention", "efficient"]) == 2
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "attention: efficient does not compute float32 with 64 channels per head and gradients" in error
    assert not runs_of(config)
    caplog.set_level("INFO")
    train(config, "--attention", "math")
    assert "attention: math" in caplog.text


@pytest.mark.slow
def test_the_record_names_the_kernel_and_repeats_it(tiny, tmp_path, caplog):
    import json

    from sample_video import main

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox")
    base = ["--base", str(tiny.config("5b")), *SMALL, "--input_file", str(prompts), "--output_dir"]
    assert main([*base, str(tmp_path / "a"), "--attention", "math"]) == 0
    (record,) = (tmp_path / "a").rglob("*.json")
    content = json.loads(record.read_text())
    assert (content["attention"], content["arguments"]["attention"]) == ("math", "math")
    caplog.set_level("INFO")
    assert main(["--input_file", str(record), "--output_dir", str(tmp_path / "b")]) == 0
    assert "attention: math" in caplog.text and "to the bit" in caplog.text
