"""Test that folders of a real DeepSpeed engine under ZeRO are read without DeepSpeed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cogvideox_sat.conversion.network_sources import open_network
from cogvideox_sat.conversion.sat_lora_files import read_sat_adapter
from cogvideox_sat.conversion.zero_checkpoints import read_zero, zero_folder
from distributed import run_distributed
from pipelines import assert_identical
from sgm.errors import UserError
from sgm.weights import read_state_dict

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]


class Engine(nn.Module):
    """Network in the place that it has in checkpoints of the whole engine."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = network

    def forward(self, *inputs):
        return self.model.diffusion_model(*inputs)


def train_and_save(folder: str, config: str, cases: list[tuple[str, int, bool, bool]]) -> None:
    """For each case, take two steps, save, and write the weights to `{name}.pt`.

    A case is (name, ZeRO stage, LoRA, bfloat16).
    """
    import os

    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_fp32_param

    from cogvideox_sat.configuration.files import load_configs
    from sgm.util import instantiate_from_config

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # otherwise DeepSpeed would compile it
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    for name, stage, lora, bf16 in cases:
        model = load_configs([config])["model"]["network_config"]
        model["params"]["num_layers"] = 1
        if lora:
            target = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 3, "lora_alpha": 2}}
            model["params"]["modules"]["lora_config"] = target
        torch.manual_seed(0)
        network = instantiate_from_config(model)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.05)
        network.disable_untrainable_params()
        trained = [p for p in network.parameters() if p.requires_grad]
        # Two groups whose lengths are not divisible by the number of processes.
        groups = [{"params": trained[:3], "weight_decay": 0.1}, {"params": trained[3:]}]
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            **({"bf16": {"enabled": True}} if bf16 else {}),
        }
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        engine, *_ = deepspeed.initialize(
            model=Engine(network), optimizer=optimizer, config=settings, dist_init_required=False
        )
        dtype = torch.bfloat16 if bf16 else torch.float32
        for step in range(2):
            torch.manual_seed(step)
            x, context = torch.randn(1, 2, 16, 4, 4).to(dtype), torch.randn(1, 64, 64).to(dtype)
            engine.backward(engine(x, torch.tensor([step]), context).float().pow(2).mean())
            engine.step()
        weights = dict(network.named_buffers())
        for key, parameter in network.named_parameters():
            if parameter.requires_grad:
                value = safe_get_full_fp32_param(parameter).view(getattr(parameter, "ds_shape", parameter.shape))
            else:
                with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                    value = parameter.detach().clone()
            weights[key] = value.clone()
        weights = {key: weights[key] for key in network.state_dict()}
        engine.save_checkpoint(str(Path(folder, name)))
        if dist.get_rank() == 0:
            torch.save(weights, Path(folder, f"{name}.pt"))
        dist.barrier()


CASES = {
    1: [("one_2", 2, False, False), ("one_3", 3, True, False)],
    2: [
        ("two_1_lora", 1, True, True),
        ("two_2", 2, False, True),
        ("two_3", 3, False, False),
        ("two_3_lora", 3, True, True),
    ],
}


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    for processes, cases in CASES.items():
        run_distributed(train_and_save, processes, str(folder), str(tiny.config("5b")), cases)
    return folder


@pytest.mark.parametrize("name", [name for cases in CASES.values() for name, *_ in cases])
def test_the_weights_are_those_that_the_engine_held(saved, name):
    found = zero_folder(saved / name)
    assert found == zero_folder(found)
    weights = read_zero(found).renamed(lambda key: key.removeprefix("model.diffusion_model."))
    assert_identical(dict(weights), torch.load(saved / f"{name}.pt"))


def test_an_adapter_is_merged(saved):
    """All tensors are read in one dtype, the widest."""
    truth = torch.load(saved / "two_3_lora.pt")
    merged = open_network(saved / "two_3_lora", lora_alpha=2.0).weights
    name = "transformer.layers.0.attention.query_key_value"
    parts = [truth[f"{name}.matrix_B.{i}"] @ truth[f"{name}.matrix_A.{i}"] for i in range(3)]
    expected = truth[f"{name}.original.weight"].float() + 2 / 3 * torch.cat(parts)
    assert torch.allclose(merged[f"{name}.weight"].float(), expected, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(merged[f"{name}.weight"].float(), truth[f"{name}.original.weight"].float(), atol=1e-3)
    assert not any("matrix" in key or "original" in key for key in merged)
    assert len({entry.dtype for entry in merged.entries.values()}) == 1


def test_an_adapter_alone_is_read(saved):
    """Exporting and merging adapters start from it."""
    truth = torch.load(saved / "two_3_lora.pt")
    adapter = read_sat_adapter(saved / "two_3_lora", alpha=2.0)
    assert (adapter.rank, len(adapter.matrices)) == (3, 8)
    for slot, tensor in adapter.matrices.items():
        assert torch.equal(tensor, truth[slot.sat_name])


@pytest.mark.slow
def test_deepspeed_is_not_imported_to_read(saved):
    code = "import sys; from pathlib import Path\n"
    code += "from cogvideox_sat.conversion.zero_checkpoints import read_zero, zero_folder\n"
    code += f"w = read_zero(zero_folder(Path({str(saved / 'two_2')!r})))\n"
    code += "assert all(t.isfinite().all() for t in w.values()) and 'deepspeed' not in sys.modules"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'sat'}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_incomplete_and_foreign_folders_are_refused(saved, tmp_path):
    import shutil

    def damaged(name: str, file: str) -> Path:
        target = tmp_path / f"{name}-{file}"
        shutil.copytree(zero_folder(saved / name), target)
        return target

    file = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    folder = damaged("two_2", file)
    (folder / file).unlink()
    with pytest.raises(UserError, match="pieces of 1 of 2 processes"):
        read_zero(folder)
    (folder / file).write_bytes((zero_folder(saved / "two_2") / file).read_bytes()[:3000])
    with pytest.raises(UserError, match=f"cannot read weights from .*{file}"):
        read_zero(folder)
    shutil.copy(zero_folder(saved / "two_1_lora") / file, folder / file)
    with pytest.raises(UserError, match="numbers, but its parameters take"):
        read_zero(folder)
    (folder / file).unlink()
    (folder / file.replace("rank_1", "rank_2")).touch()
    with pytest.raises(UserError, match="lacks the file of process 1"):
        read_zero(folder)

    folder = damaged("two_3", "x")
    (folder / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(UserError, match=r"zero_pp_rank_1_mp_rank_00_model_states.pt, which .* does not exist"):
        read_zero(folder)
    assert zero_folder(tmp_path) is None and zero_folder(tmp_path / "nothing") is None


def test_bookkeeping_is_read_as_plain_values(saved):
    """DeepSpeed's own objects beside the weights are not built."""
    file = next(zero_folder(saved / "two_2").glob("*rank_0*optim_states.pt"))
    state = read_state_dict(file)["optimizer_state_dict"]
    assert state["zero_stage"] == 2 and type(state["zero_stage"]) is int
    assert type(state["loss_scaler"]).__module__ == "sgm.weights"


def folder_of_two(folder: Path, stage: int, **changes: object) -> Path:
    """Write the files of two processes of a tiny model.

    Args:
        changes: values that replace those of both processes, by their keys.
    """
    pieces = {"single_partition_of_fp32_groups" if stage < 3 else "fp32_flat_groups": [torch.ones(5)]}
    optimizer = {"zero_stage": stage, "partition_count": 2, "param_alignment_paddings": None, **pieces}
    frozen = {"frozen_param_shapes": {"f": torch.Size((3,))}, "frozen_param_fragments": {"f": torch.ones(2)}}
    model = {"module": {}, "param_shapes": [{"a": torch.Size((2, 3)), "b": torch.Size((3,))}], "shared_params": {}}
    model |= frozen if stage == 3 else {}
    folder.mkdir()
    for rank in range(2):
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        state = {"optimizer_state_dict": {key: changes.get(key, value) for key, value in optimizer.items()}}
        torch.save(state, folder / f"{name}_optim_states.pt")
        described = {key: changes.get(key, value) for key, value in model.items()}
        torch.save(described, folder / (f"{name}_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"))
    return folder


@pytest.mark.parametrize("stage", [2, 3])
def test_values_of_a_wrong_kind_are_damage(tmp_path, stage):
    weights = read_zero(folder_of_two(tmp_path / "good", stage))
    assert {name: tuple(weights[name].shape) for name in ("a", "b")} == {"a": (2, 3), "b": (3,)}
    changes = [("partition_count", []), ("param_shapes", [{"a": 3}]), ("shared_params", 5), ("module", [1])]
    if stage == 3:
        changes += [("frozen_param_shapes", 1.5), ("frozen_param_fragments", {"f": None})]
        changes += [("frozen_param_shapes", {"f": torch.Size((100,))})]  # found when the tensor is read
    for number, (key, value) in enumerate(changes):
        with pytest.raises(UserError):
            dict(read_zero(folder_of_two(tmp_path / f"{stage}-{number}", stage, **{key: value})))
