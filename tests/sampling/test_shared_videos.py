"""Processes that make a video together make the one that a process makes alone."""

import os
import signal
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import processes
from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.sampler_knobs import NO_KNOBS, SamplerKnobs
from cogvideox_sat.sampling.requests import Frames, Latents, SampleRequest, SessionSettings
from cogvideox_sat.sampling.session import SamplingSession
from distributed import check_marked, run_distributed
from faulty_processes import ends_of_ranks
from long_cases import others_long
from seeded import seeded_input
from sgm.errors import UserError

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SPLIT, SEQUENCE = {"processes_per_video": 4}, {"sequence_parallel": 4}
CASES = [
    ("2b", SEQUENCE),
    ("5b", SPLIT),
    ("5b", {"processes_per_video": 2}),  # two videos at a time
    ("5b", {"processes_per_video": 2, "knobs": SamplerKnobs("ddim", 3.0, (0.0, 0.5), "step")}),
    ("2b", {**SEQUENCE, "knobs": SamplerKnobs(guidance_interval=(0.3, 1.0))}),
    ("5b_i2v", {**SPLIT, "offload": "sequential"}),
    ("1.5", {**SPLIT, "vae_frames_at_once": 4}),
    ("1.5_i2v", SEQUENCE),
]


def settings(config: str, **changes: Any) -> SessionSettings:
    loaded = load_configs([config])
    return SessionSettings(loaded["model"], load=loaded["args"]["load"], sources=loaded.sources, **changes)


def request(family: str, image: Any = None, seed: int = 7, knobs: SamplerKnobs = NO_KNOBS) -> SampleRequest:
    if family.endswith("i2v"):
        image = image or seeded_input("image", (3, 32, 48)).clamp(-1, 1)
    frames = 4 if family.startswith("1.5") else 3
    return SampleRequest("a boat", seed, (32, 48), frames, negative_prompt="blurred", image=image, steps=3, knobs=knobs)


def made(session: SamplingSession, asked: SampleRequest) -> tuple[Tensor, Tensor]:
    """Return the latents of a request, and its frames as bytes."""
    events = list(session.sample(asked))
    (latents,) = (event.latents for event in events if isinstance(event, Latents))
    frames = torch.cat([event.frames for event in events if isinstance(event, Frames)])
    return latents, ((frames.clamp(-1, 1) + 1) * 127.5).round()


def without_knobs(changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if name != "knobs"}


def videos_of_a_rank(cases: list[tuple[str, str, dict[str, Any]]]) -> list[tuple[Tensor, Tensor, bool]]:
    results = []
    for family, config, changes in cases:
        knobs = changes.get("knobs", NO_KNOBS)
        with SamplingSession(settings(config, **without_knobs(changes))) as session:
            latents, frames = made(session, request(family, seed=7 + session.groups.video, knobs=knobs))
            results.append((latents, frames, session.engine.conditioner is not None))
    return results


def test_latents_and_frames_are_those_of_one_process(tiny):
    cases = [(family, str(tiny.config(family)), changes) for family, changes in CASES]
    outcomes = run_distributed(videos_of_a_rank, 4, cases)
    for number, (family, config, changes) in enumerate(cases):
        size = sum(changes.get(name, 0) for name in ("processes_per_video", "sequence_parallel"))
        knobs = changes.get("knobs", NO_KNOBS)
        with SamplingSession(settings(config, guidance_batch=1)) as session:
            videos = [made(session, request(family, seed=7 + video, knobs=knobs)) for video in range(4 // size)]
            for rank, results in enumerate(outcomes):
                latents, frames, encodes = results[number]
                expected, pixels = videos[rank // size]
                assert torch.equal(latents, outcomes[rank - rank % size][number][0])
                assert (latents - expected).norm() <= 1e-4 * expected.norm()
                assert (frames - pixels).abs().max() <= 1
                assert not encodes or rank % size == 0  # the others hold no text encoder
                if size == 2:  # guidance alone
                    assert torch.equal(latents, expected)


def faults_of_a_rank(family: str, config: str) -> list[str]:
    """Return the errors of each rank for a missing picture and for a damaged network.

    Later requests work.
    """
    told = []

    def absent() -> Tensor:
        assert dist.get_rank() == 0, "only one process reads it"
        raise UserError("no such picture")

    with SamplingSession(settings(config, **SPLIT)) as session:
        plain = request(family)
        for asked in (request(family, absent), plain):
            try:
                made(session, asked)
                told.append("made")
            except UserError as error:
                told.append(str(error))
        if dist.get_rank() == 2:  # the other half of the first process
            session.engine.network.register_forward_hook(lambda *args: args[2] * torch.nan)
        try:
            made(session, plain)
        except UserError as error:
            told.append(str(error))
    return told


def test_what_is_wrong_with_one_request_all_processes_hear(tiny):
    for told in run_distributed(faults_of_a_rank, 4, "5b_i2v", str(tiny.config("5b_i2v"))):
        assert told[:2] == ["no such picture", "made"]
        assert told[2].startswith("the network's output is not finite")


# Runs the command; process 2 fails within the network, at its second step.
FAILING = """
import os, sys
import dit_video_concat
forward, calls = dit_video_concat.DiffusionTransformer.forward, []
def failing(self, *args, **kwargs):
    calls.append(1)
    if os.environ["RANK"] == "2" and len(calls) == 2:
        raise RuntimeError("a fault of rank 2")
    return forward(self, *args, **kwargs)
if sys.argv.pop(1) == "fails":
    dit_video_concat.DiffusionTransformer.forward = failing
from sample_video import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("fails", ["fails", "works"])
def test_the_command(tiny, tmp_path, fails):
    check_marked()
    (tmp_path / "program.py").write_text(FAILING)
    (tmp_path / "prompts.txt").write_text("a boat\na kite\na pond\n")
    arguments = ["--base", tiny.config("5b"), "--input_file", tmp_path / "prompts.txt", "--sampling_num_steps", "2"]
    arguments += ["--sampling_image_size", "32", "48", "--sampling_num_frames", "3", "--output_dir", tmp_path / "out"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    memory = ["--fit", "2GB", "--vae_frames_at_once", "4"]
    command = [*launcher, tmp_path / "program.py", fails, *arguments, "--processes_per_video", "4", *memory]
    result = processes.run(command, env=environment, timeout=60)
    videos = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    if fails == "fails":
        assert result.returncode != 0 and "a fault of rank 2" in result.stderr
        assert not videos
    else:
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("fit: 2GB for each process: --offload none --guidance_batch 2 --vae_frames_at_") == 1
        assert result.stderr.count("wrote") == 3 and videos == ["000000.json"] * 3 + ["000000.mp4"] * 3


@pytest.mark.parametrize("fault", others_long("killed", "terminated", "full", "full in the text encoder"))
def test_a_process_that_is_lost_ends_the_others(tiny, tmp_path, fault):
    (tmp_path / "prompts.txt").write_text("a boat\na kite\n")
    arguments = ["--base", tiny.config("5b"), "--input_file", tmp_path / "prompts.txt", "--sampling_num_steps", "2"]
    arguments += ["--sampling_image_size", "32", "48", "--sampling_num_frames", "3", "--output_dir", tmp_path / "out"]
    (first, said), (second, other) = ends_of_ranks(tmp_path, fault, [*arguments, "--sequence_parallel", "2"])
    assert second == {"killed": -signal.SIGKILL, "terminated": -signal.SIGTERM}.get(fault, 2), other
    assert first == 2 and "Traceback" not in said + other
    if fault.startswith("full"):
        assert "the memory of the GPU is full (" in other
    if "text" in fault:
        assert "the text encoder: the memory of the GPU is full (" in said
    else:
        assert "another process has failed" in said
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
