"""`--fit` picks the fastest policy within the memory, keeps given options, and reports."""

import json
import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from arguments import SamplingArguments, get_args
from cogvideox_sat.memory.sampling_peaks import NETWORK, TEXT, VIDEO, MemoryPolicy
from cogvideox_sat.parallel.process_groups import initialize_process_groups
from cogvideox_sat.sampling import fitting
from cogvideox_sat.sampling.fitting import choose, device_budget, fitted, policies
from cogvideox_sat.sampling.plan import SamplingPlan
from distributed import run_distributed
from sample_video import main
from sgm.errors import UserError
from videos import read_video

GIB = 2**30


class Memory:
    """Tells made-up sizes: less by each means, of the stage that the means is for."""

    takes_pieces, longest_side = True, 720

    def stages(self, policy: MemoryPolicy) -> dict[str, int]:
        resident = {"none": 30, "stage": 10, "sequential": 2}[policy.offload]
        decoding = {None: 12, 48: 40, 8: 6, 4: 4}[policy.vae_frames_at_once] - 2 * (policy.vae_tile_size is not None)
        sizes = {TEXT: resident, NETWORK: resident + 3 * policy.guidance_batch, VIDEO: decoding}
        return {stage: size * GIB for stage, size in sizes.items()}

    def peak(self, policy: MemoryPolicy) -> int:
        return max(self.stages(policy).values())


@pytest.mark.parametrize(
    ("budget", "given", "policy"),
    [
        (40, {}, MemoryPolicy("none", 2)),
        (34, {}, MemoryPolicy("none", 1)),
        (16, {}, MemoryPolicy("stage", 2)),
        (13, {}, MemoryPolicy("stage", 1)),
        (12, {}, MemoryPolicy("sequential", 2)),
        (11, {}, MemoryPolicy("sequential", 2, 8)),
        (5, {}, MemoryPolicy("sequential", 1, 4)),
        (40, {"offload": "sequential"}, MemoryPolicy("sequential", 2)),
        (15, {"guidance_batch": 1}, MemoryPolicy("stage", 1)),
        (16, {"guidance_batch": 1, "vae_frames_at_once": 8}, MemoryPolicy("stage", 1, 8)),
        (14, {"vae_tile_size": 256}, MemoryPolicy("stage", 1, None, 256)),
    ],
)
def test_the_fastest_that_fits(budget, given, policy):
    args = SamplingArguments(**given, given=frozenset(given))
    picked, reason = choose(Memory(), policies(args), budget * GIB, f"{budget}GB")
    assert picked == policy
    assert reason.startswith(f"{policy}, which takes up to ") and "\n" not in reason
    fastest = next(policies(args))
    assert reason.endswith(f"; {fastest} would take {Memory().peak(fastest) / GIB} GiB") == (policy != fastest)


def test_too_small_says_the_least():
    with pytest.raises(UserError) as error:
        choose(Memory(), policies(SamplingArguments()), 4 * GIB, "4GB")
    assert str(error.value) == (
        "fit: 4GB is too small for this model and size, which take at least 5.0 GiB with --offload sequential "
        "--guidance_batch 1 --vae_frames_at_once 4 (the network takes most); give --fit 5.0GB, fewer frames or "
        "a smaller size"
    )
    with pytest.raises(UserError, match=r"\(the VAE takes most\); give --fit 12.0GB, --vae_tile_size 256 \(tiles: "):
        choose(Memory(), policies(SamplingArguments(), takes_pieces=False), 4 * GIB, "4GB")
    many = SamplingArguments(vae_frames_at_once=48, given=frozenset({"vae_frames_at_once"}))
    with pytest.raises(UserError, match=r"give --fit 40.0GB, --vae_frames_at_once 4 \(each .*, --vae_tile_size 256 \("):
        choose(Memory(), policies(many), 4 * GIB, "4GB")
    small = Memory()
    small.longest_side = 256  # a single tile
    with pytest.raises(UserError, match=r"give --fit 12.0GB, fewer frames"):
        choose(small, policies(SamplingArguments(), takes_pieces=False), 4 * GIB, "4GB")
    with pytest.raises(UserError, match=r"at least 36\.0 GiB with --offload none --guidance_batch 2 \(the network"):
        given = {"offload": "none", "guidance_batch": 2}
        choose(Memory(), policies(SamplingArguments(**given, given=frozenset(given))), 20 * GIB, "20GB")


def test_a_vae_without_pieces_is_left_whole():
    assert {policy.vae_frames_at_once for policy in policies(SamplingArguments(), takes_pieces=False)} == {None}


def test_auto_is_what_the_device_has_free(monkeypatch):
    monkeypatch.setattr(fitting, "find_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7 * GIB, 8 * GIB))
    assert device_budget("auto", None) == 7 * GIB
    monkeypatch.setattr(fitting, "find_device", lambda _: torch.device("cpu"))
    with pytest.raises(UserError, match="fit: auto needs a GPU, and this machine has none"):
        device_budget("auto", None)


def test_a_model_that_needs_content_is_one_line(monkeypatch):
    def fail(*_):
        raise NotImplementedError("Cannot copy out\nof meta tensor")

    monkeypatch.setattr(fitting, "memory_of", fail)
    initialize_process_groups()
    with pytest.raises(
        UserError, match=r"^fit: the memory of this model is not known \(Not.* out of meta tensor\); give"
    ):
        fitted(SamplingArguments(fit="12GB"), None)


def test_nothing_is_done_without_it_or_without_videos():
    args = SamplingArguments(fit="1MB")
    assert fitted(args, SamplingPlan([], [])) == replace(args, fit=None)
    assert fitted(SamplingArguments(), None) == SamplingArguments()


def picked(rank_budgets: dict[int, int]) -> str:
    """Return the offload that a process picks whose device has so much free."""
    import torch.distributed as dist

    fitting.memory_of = lambda *_: Memory()
    fitting.device_budget = lambda *_: rank_budgets[dist.get_rank()]
    plan = SimpleNamespace(videos=[SimpleNamespace(frames=3, size=(32, 48))])
    return fitted(SamplingArguments(fit="auto"), plan).offload


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_pick_the_same():
    assert run_distributed(picked, 2, {0: 60 * GIB, 1: 16 * GIB}) == ["stage", "stage"]


@pytest.mark.slow
def test_the_command_samples_as_it_picks(tiny, tmp_path, caplog, one_thread):
    """The video equals that of the same options; the record and the log name them."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    base = ["--base", str(tiny.config("5b")), "--input_file", str(tmp_path / "prompts.txt"), "--output_dir"]
    small = ["--sampling_num_frames", "3", "--sampling_num_steps", "2", "--sampling_image_size", "32", "48"]
    with caplog.at_level(logging.INFO):
        assert main([*base, str(tmp_path / "fit"), *small, "--fit", "1.1GB", "--offload", "sequential"]) == 0
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("fit:")]
    assert re.match(r"fit: 1\.1GB: --offload sequential --guidance_batch 2, which takes up to 1\.1 GiB \(the ", line)
    assert main([*base, str(tmp_path / "plain"), *small, "--offload", "sequential"]) == 0
    videos = [next((tmp_path / name).rglob("*.mp4")) for name in ("fit", "plain")]
    assert torch.equal(*(read_video(video)[1] for video in videos))
    records = [json.loads(video.with_suffix(".json").read_text())["arguments"] for video in videos]
    assert records[0] == records[1] and "fit" not in records[0]
    assert main([*base, str(tmp_path / "small"), *small, "--fit", "1000MB"]) == 2
    assert "fit: 1000MB is too small for this model and size, which take at least 1.1 GiB with" in caplog.text
    assert not (tmp_path / "small").exists()


def test_arguments_of_a_program(tiny, monkeypatch):
    """Values in a program's object of arguments count as given."""
    import sample_video

    seen = []
    monkeypatch.setattr(sample_video, "sample_with", seen.append)
    args = get_args(["--base", str(tiny.config("5b")), "--input_file", "prompts.txt", "--guidance_batch", "1"])
    sample_video.sampling_main(args)
    sample_video.sampling_main(
        SimpleNamespace(load=args.load, input_file="p", model_config=args.model_config, offload="none")
    )
    assert seen[0].given == args.given and "offload" not in seen[0].given
    assert {"offload", "input_file"} <= seen[1].given and "guidance_batch" not in seen[1].given
