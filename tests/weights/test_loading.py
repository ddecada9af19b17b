"""Checkpoints of every layout load, adapters combine, and a misfit is one line."""

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cogvideox_sat.configuration.meta_device import import_compiler, instantiate_on_meta
from cogvideox_sat.engine.parts import set_lora_scale
from cogvideox_sat.weights.checkpoint_files import (
    NETWORK_PREFIX,
    checkpoint_file,
    checkpoint_shares,
    is_adapter,
    network_values,
)
from cogvideox_sat.weights.diffusers_names import assemble, to_diffusers
from cogvideox_sat.weights.loading import load_network
from cogvideox_sat.weights.rank_shares import cuts_of, recut
from seeded import seed_module_, seeded_input
from sgm.errors import UserError
from sgm.util import instantiate_from_config
from sgm.weights import DIFFUSERS_FILES
from support import Reference, anonymous_growth, assert_close


def build(name: str, on_meta: bool = True) -> torch.nn.Module:
    config = Reference(f"dit/{name}").case["network_config"]
    if not on_meta:
        return seed_module_(instantiate_from_config(config))
    return instantiate_on_meta(config)


def save(weights: dict[str, torch.Tensor], path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"module": {NETWORK_PREFIX + name: tensor for name, tensor in weights.items()}}, path)


@torch.no_grad()
def output(network: torch.nn.Module) -> torch.Tensor:
    x = seeded_input("x", (1, 3, network.in_channels, 8, 12))
    return network(x, torch.tensor([37]), seeded_input("context", (1, 16, 64)))


@pytest.fixture(scope="module")
def seeded_base():
    return build("t2v_2b", on_meta=False)


@pytest.fixture(scope="module")
def seeded_lora():
    return build("t2v_2b_lora", on_meta=False)


def test_a_folder_with_latest(seeded_base, tmp_path):
    save(seeded_base.state_dict(), tmp_path / "1000" / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("1000\n")
    for load in (tmp_path, tmp_path / "1000", tmp_path / "1000" / "mp_rank_00_model_states.pt"):
        network = build("t2v_2b")
        load_network(network, load)
        assert not any(parameter.is_meta for parameter in network.parameters())
        assert torch.equal(output(network), output(seeded_base))


def test_safetensors(seeded_base, tmp_path):
    save_file(
        {name: tensor.contiguous() for name, tensor in seeded_base.state_dict().items()}, tmp_path / "a.safetensors"
    )
    for load in (tmp_path, tmp_path / "a.safetensors"):
        network = build("t2v_2b")
        load_network(network, load)
        for ours, theirs in zip(network.state_dict().values(), seeded_base.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)
        # Mapped tensors lie at other addresses, where some processors sum in another order.
        assert_close(output(network), output(seeded_base), 1e-6)


def test_weights_are_mapped_from_the_file_not_copied(seeded_base, tmp_path):
    save(seeded_base.state_dict(), tmp_path / "a.pt")
    network = build("t2v_2b")
    load_network(network, tmp_path / "a.pt")
    maps = [
        line.split()
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(tmp_path / "a.pt"))
    ]
    ranges = [[int(address, 16) for address in fields[0].split("-")] for fields in maps]
    assert all(any(start <= p.data_ptr() < end for start, end in ranges) for p in network.parameters())


def wide_network() -> torch.nn.Module:
    """Return a network on the meta device, whose weights take 60 MB in 16 bit."""
    config = Reference("dit/t2v_2b").case["network_config"]
    wide = {"hidden_size": 1024, "num_attention_heads": 16, "time_embed_dim": 512}
    return instantiate_on_meta({**config, "params": {**config["params"], **wide}}).to(torch.bfloat16)


def write_wide(form: str, folder: Path) -> Path:
    """Write the weights of `wide_network` in a form, and return what to load."""
    state = {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in wide_network().state_dict().items()
    }
    if form == "pt":
        save(state, folder / "a.pt")
        return folder / "a.pt"
    if form == "diffusers":
        state = {name: assemble(pieces, state) for name, pieces in to_diffusers(state).items()}
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / DIFFUSERS_FILES[1])
        return folder
    halves = {0: {}, 1: {}} if form == "shards" else {0: {}}
    for number, (name, tensor) in enumerate(state.items()):
        halves[number % len(halves)][name] = tensor
    for half, tensors in halves.items():
        save_file(tensors, folder / f"model-{half}.safetensors")
    if form == "shards":
        places = {name: f"model-{half}.safetensors" for half, tensors in halves.items() for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


# Shares of the weights: none is copied, or those that are not cut as in the file, or all for another dtype.
@pytest.mark.parametrize(
    ("form", "dtype", "most"),
    [
        ("pt", torch.bfloat16, 0.1),
        ("safetensors", torch.bfloat16, 0.1),
        ("shards", torch.bfloat16, 0.1),
        ("diffusers", torch.bfloat16, 0.6),
        ("pt", torch.float16, 1.1),
        ("pt", torch.float32, 2.1),
    ],
)
def test_anonymous_memory_of_loading(tmp_path, form, dtype, most):
    path = write_wide(form, tmp_path)
    networks = [wide_network().to(dtype)]

    def load() -> None:
        load_network(networks[0], path, device="cpu")
        assert all(parameter.sum().isfinite() for parameter in networks[0].parameters())  # read to the last byte

    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size > 5e7
    grown = anonymous_growth(load)
    assert grown < most * size, f"{grown / size:.2f} of the files"


def test_other_parts_of_an_engine_checkpoint_are_left_out(seeded_base, tmp_path):
    weights = {NETWORK_PREFIX + name: tensor for name, tensor in seeded_base.state_dict().items()}
    others = {"first_stage_model.encoder.x": torch.ones(1), "conditioner.embedders.0.y": torch.ones(1)}
    torch.save({"module": weights | others}, tmp_path / "a.pt")
    network = build("t2v_2b")
    load_network(network, tmp_path / "a.pt")
    assert torch.equal(output(network), output(seeded_base))


def test_weights_take_the_dtype_of_the_network(seeded_base, tmp_path):
    save(seeded_base.state_dict(), tmp_path / "a.pt")
    network = build("t2v_2b").to(torch.bfloat16)
    load_network(network, tmp_path / "a.pt")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


def test_full_checkpoint_with_adapter(seeded_lora, tmp_path):
    save(seeded_lora.state_dict(), tmp_path / "a.pt")
    network = build("t2v_2b_lora")
    load_network(network, tmp_path / "a.pt")
    assert torch.equal(output(network), output(seeded_lora))


def test_adapter_on_top_of_a_base(seeded_lora, tmp_path):
    weights = seeded_lora.state_dict()
    base = {k.replace(".original.", "."): v for k, v in weights.items() if not is_adapter(k)}
    save(base, tmp_path / "base.pt")
    save({k: v for k, v in weights.items() if is_adapter(k)}, tmp_path / "adapter.pt")
    network = build("t2v_2b_lora")
    load_network(network, tmp_path / "base.pt", lora_load=tmp_path / "adapter.pt")
    assert torch.equal(output(network), output(seeded_lora))

    plain = build("t2v_2b")
    load_network(plain, tmp_path / "base.pt")
    set_lora_scale(network, 0.0)
    assert torch.equal(output(network), output(plain))
    assert not torch.equal(output(seeded_lora), output(plain))


def test_a_new_adapter_starts_as_the_base_model(seeded_base, tmp_path, caplog):
    save(seeded_base.state_dict(), tmp_path / "base.pt")
    network = build("t2v_2b_lora")
    load_network(network, tmp_path / "base.pt", allow_missing=True)
    assert torch.equal(output(network), output(seeded_base))
    assert "keep their initial values" in caplog.text
    attention = network.transformer.layers[0].attention
    assert attention.dense.matrix_A[0].abs().sum() > 0


def refused(*parts: str, **arguments) -> None:
    network = arguments.pop("network")
    with pytest.raises(UserError) as error:
        load_network(network, **arguments)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_misfits_are_named(seeded_base, seeded_lora, tmp_path):
    base, lora = tmp_path / "base.pt", tmp_path / "lora.pt"
    save(seeded_base.state_dict(), base)
    save(seeded_lora.state_dict(), lora)
    refused("load: ", "nowhere does not exist", network=build("t2v_2b"), load=tmp_path / "nowhere")
    refused("(64, 16, 2, 2) instead of (96, 16, 2, 2)", "more", network=build("t2v_2b_wide"), load=base)
    refused("pos_embedding", network=build("t2v_5b"), load=base)
    refused("holds no adapter", network=build("t2v_2b_lora"), load=base)
    refused("lora_load: missing; name the adapter", network=build("t2v_2b_lora"), load=None)
    refused("_lora", network=build("t2v_2b"), load=lora)
    refused("lora_load", "_lora", network=build("t2v_2b"), load=base, lora_load=lora)
    refused("holds no adapter", network=build("t2v_2b_lora"), load=base, lora_load=base)


def test_missing_weights_need_permission(seeded_base, tmp_path):
    weights = seeded_base.state_dict()
    del weights["transformer.layers.1.mlp.dense_h_to_4h.weight"]
    save(weights, tmp_path / "a.pt")
    refused("transformer.layers.1.mlp.dense_h_to_4h.weight", network=build("t2v_2b"), load=tmp_path / "a.pt")
    network = build("t2v_2b")
    load_network(network, tmp_path / "a.pt", allow_missing=True)
    assert torch.isfinite(output(network)).all()


@pytest.mark.parametrize("base", ["t2v_5b", "t2v_15"])
def test_image_to_video_starts_as_text_to_video(tmp_path, base, caplog):
    """Whatever the image is: its channels, which the checkpoint lacks, count for nothing yet."""
    config = Reference(f"dit/{base}").case["network_config"]
    config["params"]["in_channels"] = 16
    given = seed_module_(instantiate_from_config(config))
    save(given.state_dict(), tmp_path / "a.pt")
    wide = {**config, "params": {**config["params"], "in_channels": 32}}
    shape = str(tuple(given.mixins["patch_embed"].proj.weight.shape))
    refused("patch_embed.proj.weight", shape, network=instantiate_on_meta(wide), load=tmp_path / "a.pt")
    network = instantiate_on_meta(wide)
    load_network(network, tmp_path / "a.pt", allow_missing=True)
    assert "input channels that the checkpoint lacks start at zero" in caplog.text
    t = 4 if base == "t2v_15" else 3
    x, context = seeded_input("x", (1, t, 16, 8, 12)), seeded_input("context", (1, 16, 64))
    image = seeded_input("image", (1, t, 16, 8, 12))
    with torch.no_grad():
        expected = given(x, torch.tensor([37]), context)
        assert_close(network(torch.cat((x, image), dim=2), torch.tensor([37]), context), expected, 1e-6)


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"norm1.linear": (5, 2), "norm2.linear": (6, 2)}, r"norm1.linear.weight has shape \[5, 2\], which does not"),
        ({"attn1.to_q": (2, 3), "attn1.to_k": (2, 4), "attn1.to_v": (2, 3)}, "do not fit together as"),
        ({"attn1.to_q": (), "attn1.to_k": (), "attn1.to_v": ()}, r"has shape \[\], which does not divide"),
        ({"attn1.to_q": (2, 3)}, "attn1.to_k.weight' is missing, but"),
        ({"attn9.to_q": (2, 3)}, "is not a tensor of a CogVideoX network of diffusers"),
    ],
)
def test_files_of_diffusers_that_do_not_fit_together_are_named(tmp_path, shapes, says):
    file = tmp_path / DIFFUSERS_FILES[1]
    save_file({f"transformer_blocks.0.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}, file)
    with pytest.raises(UserError, match=f"{file}: .*{says}"):
        network_values(file)


def test_layouts_that_are_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint_file(tmp_path)
    (tmp_path / "latest").write_text("7")
    with pytest.raises(UserError, match="names the iteration '7'"):
        checkpoint_file(tmp_path)
    for rank in range(2):
        (tmp_path / "7").mkdir(exist_ok=True)
        (tmp_path / "7" / f"mp_rank_0{rank}_model_states.pt").touch()
    with pytest.raises(UserError, match="split over 2 model-parallel ranks"):
        checkpoint_file(tmp_path)
    assert checkpoint_shares(tmp_path) == [tmp_path / "7" / f"mp_rank_0{rank}_model_states.pt" for rank in range(2)]
    (tmp_path / "7" / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(
        UserError, match=r"holds 1 files of model-parallel ranks, but mp_rank_00_model_states\.pt is missing"
    ):
        checkpoint_shares(tmp_path)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["t2v_2b", "t2v_2b_lora"])
def test_a_checkpoint_of_several_ranks_is_joined(tmp_path, seeded_base, size, name):
    (tmp_path / "1").mkdir()
    (tmp_path / "latest").write_text("1")
    for rank in range(size):
        share = recut([seeded_base.state_dict()], cuts_of(seeded_base), rank, size, "it")
        assert share["transformer.layers.0.attention.dense.weight"].shape[1] * size == seeded_base.hidden_size
        save(share, tmp_path / "1" / f"mp_rank_0{rank}_model_states.pt")
    network = build(name)
    load_network(network, tmp_path, new_adapter=True)
    loaded = {key.replace(".original.", "."): value for key, value in network.state_dict().items()}
    assert all(torch.equal(loaded[key], value) for key, value in seeded_base.state_dict().items())


def test_shares_that_are_not_of_one_checkpoint(tmp_path, seeded_base):
    for rank in range(2):
        share = recut([seeded_base.state_dict()], cuts_of(seeded_base), rank, 2, "it")
        if rank:
            del share["time_embed.0.bias"]
        save(share, tmp_path / f"mp_rank_0{rank}_model_states.pt")
    with pytest.raises(UserError, match="do not hold the same tensors"):
        load_network(build("t2v_2b"), tmp_path)


LOAD_AND_READ = """
import re, sys
import torch
from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.weights.diffusers_names import assemble, to_diffusers
from cogvideox_sat.weights.loading import load_network
from sgm.util import instantiate_from_config
from support import Reference

config = Reference("dit/t2v_2b").case["network_config"]
config["params"].update(num_layers=6, hidden_size=1024, num_attention_heads=16)
network = instantiate_on_meta(config).to(torch.bfloat16)
if sys.argv[2] == "save":
    torch.save({"module": {k: torch.zeros_like(v, device="cpu") for k, v in network.state_dict().items()}}, sys.argv[1])
else:
    def peak():  # not getrusage, whose peak a process inherits from the one that started it
        return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])

    before = peak()
    load_network(network, sys.argv[1])
    for parameter in network.parameters():
        parameter.data.view(torch.int16).max()  # touch every page, as running the network does
    print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.long
def test_memory_peaks_under_the_size_of_the_file(tmp_path):
    """A checkpoint in the network's dtype is used in place, without any copy."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def run(what: str) -> str:
        command = [sys.executable, "-c", LOAD_AND_READ, str(tmp_path / "a.pt"), what]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    run("save")
    size = (tmp_path / "a.pt").stat().st_size
    assert size > 150e6
    assert 0.5 * size < int(run("load").split()[-1]) < 1.2 * size


def test_a_folder_that_the_compiler_cannot_make_is_one_line(monkeypatch):
    """PyTorch makes it when that part of it is imported, whether or not anything is compiled."""
    real = builtins.__import__

    def without_folder(name, *args):
        if name == "torch._dynamo":
            raise FileNotFoundError(2, "No such file or directory", "/proc/x")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_folder)
    with pytest.raises(UserError, match=r"^TORCHINDUCTOR_CACHE_DIR: .*'/proc/x'\); name another folder"):
        import_compiler()
