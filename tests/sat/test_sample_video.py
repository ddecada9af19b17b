"""The sampling command, from prompts to files: every family, option and mistake."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import processes
from arguments import SamplingArguments
from cogvideox_sat.media.contact_sheet import FRAME_HEIGHT
from cogvideox_sat.media.video_output import VideoWriter
from sample_video import main
from sgm.errors import UserError
from support import assert_close, needs_compiler
from videos import read_video

SCRIPT = Path(__file__).parents[2] / "sat" / "sample_video.py"
FAST = ("--sampling_num_steps", "2", "--sampling_image_size", "32", "48")
LATENT_FRAMES = {"2b": 3, "5b": 3, "5b_i2v": 3, "1.5": 4, "1.5_i2v": 4}  # each of 9 frames of video
ONE_PROMPT = ["a paper boat on a pond"]
TWO_PROMPTS = ["a paper boat on a pond", "a red kite over the hills"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "first.png"
    Image.fromarray(np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def base_videos(tiny, tmp_path_factory) -> Path:
    """Return the 5B model's output folder for TWO_PROMPTS, for comparison with variants."""
    folder = tmp_path_factory.mktemp("base")
    assert main(command(tiny.config("5b"), folder, TWO_PROMPTS)) == 0
    return folder / "videos"


def command(config: Path, folder: Path, prompts: list[str | dict], *arguments: str, name: str = "videos") -> list[str]:
    """Return the arguments that sample `prompts` into `folder / name`.

    Args:
        prompts: texts, or objects for .jsonl.
    """
    as_json = isinstance(prompts[0], dict)
    file = folder / f"{name}.{'jsonl' if as_json else 'txt'}"
    file.write_text("\n".join(map(json.dumps, prompts) if as_json else prompts) + "\n")
    frames = next((str(LATENT_FRAMES[family]) for family in LATENT_FRAMES if config.stem == family), "3")
    given = ("--base", config, "--input_file", file, "--output_dir", folder / name, "--sampling_num_frames", frames)
    return [*map(str, given), *FAST, *arguments]


def run_process(*command: str) -> subprocess.CompletedProcess:
    """Run in a process of its own, with one thread and from a foreign folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)  # tools that other tests ran in this process show such bars
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=180)


def files(folder: Path) -> list[Path]:
    """Return all files except records, which configuration/test_video_records.py tests."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in files(folder)}


# ---------------------------------------------------------------------------------------------------------------------
# Outputs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", LATENT_FRAMES)
def test_every_family_writes_a_playable_video(tiny, tmp_path, image, family):
    prompt = f"a boat@@{image}" if family.endswith("i2v") else "a boat"
    assert main(command(tiny.config(family), tmp_path, [prompt], "--sampling_fps", "16")) == 0
    assert files(tmp_path / "videos") == [tmp_path / "videos" / "0_a_boat" / "0" / "000000.mp4"]
    meta, frames = read_video(files(tmp_path / "videos")[0])
    assert (meta["codec"], meta["fps"], meta["size"]) == ("h264", 16, (48, 32))
    assert len(frames) == 9
    assert frames.std() > 0.05


def test_another_decoder_plays_it_too(base_videos):
    decord = pytest.importorskip("decord")
    video = decord.VideoReader(str(files(base_videos)[0]))
    assert (len(video), video[0].shape[:2], video.get_avg_fps()) == (9, (32, 48), 8)


@pytest.mark.slow
def test_the_image_matters_to_image_to_video(tiny, tmp_path, image):
    other = tmp_path / "other.png"
    Image.new("RGB", (60, 40), "red").save(other)
    for family in ("5b_i2v", "1.5_i2v"):
        for name, path in (("first", image), ("second", other)):
            output = f"{family}_{name}"
            assert main(command(tiny.config(family), tmp_path, [f"a boat@@{path}"], name=output)) == 0
        assert contents(tmp_path / f"{family}_first") != contents(tmp_path / f"{family}_second")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "decoded"), [("5b", 3), ("1.5", 3)])
def test_only_latents(tiny, tmp_path, family, decoded):
    assert main(command(tiny.config(family), tmp_path, ONE_PROMPT, "--only_save_latents")) == 0
    (path,) = files(tmp_path / "videos")
    assert path.name == "000000.safetensors"
    assert load_file(path)["latents"].shape == (1, decoded, 16, 4, 6)


# ---------------------------------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_video_depends_on_seed_prompt_and_index_alone(tiny, tmp_path, base_videos):
    base = list(contents(base_videos).values())
    assert base[0] != base[1]
    assert main(command(tiny.config("5b"), tmp_path, ["another", TWO_PROMPTS[1]], name="same")) == 0
    same = list(contents(tmp_path / "same").values())
    assert (same[0] == base[0], same[1] == base[1]) == (False, True)
    assert main(command(tiny.config("5b"), tmp_path, ONE_PROMPT, "--seed", str(2**63 - 1), name="seed")) == 0
    assert next(iter(contents(tmp_path / "seed").values())) not in base


@pytest.mark.slow
def test_samples_of_a_prompt_differ_and_the_first_is_what_one_alone_would_be(tiny, tmp_path, base_videos):
    assert main(command(tiny.config("5b"), tmp_path, ONE_PROMPT, "--batch_size", "2")) == 0
    names, videos = zip(*contents(tmp_path / "videos").items(), strict=True)
    assert [name.split("/")[1] for name in names] == ["0", "1"]
    assert videos[0] == next(iter(contents(base_videos).values()))
    assert videos[0] != videos[1]


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_share_the_prompts_and_make_the_same_videos(tiny, tmp_path, base_videos):
    """The third prompt fails in its process, which both report by their exit code."""
    arguments = command(tiny.config("5b"), tmp_path, [*TWO_PROMPTS, "blocked"])
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "2_blocked").touch()  # where its folder belongs
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = processes.run([*launcher, SCRIPT, *arguments], cwd="/", timeout=180)
    assert result.returncode == 1
    assert result.stderr.count("failed: prompt 3 ('blocked'): cannot write") == 1
    (tmp_path / "videos" / "2_blocked").unlink()
    assert contents(tmp_path / "videos") == contents(base_videos)
    assert result.stdout == ""


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_share_one_network_and_one_vae(tiny, tmp_path, base_videos):
    """Two processes have half of the network each and decode half of each clip.

    Sums run in another order there.
    """
    sharing = {"first_stage_config": {"params": {"cp_size": 2}}}
    config = tiny.variant("5b", tmp_path / "5b.yaml", model=sharing)
    arguments = command(config, tmp_path, TWO_PROMPTS, "--model_parallel_size", "2")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = processes.run([*launcher, SCRIPT, *arguments], cwd="/", timeout=180)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("wrote") == len(TWO_PROMPTS)
    for shared, alone in zip(files(tmp_path / "videos"), files(base_videos), strict=True):
        assert_close(read_video(shared)[1], read_video(alone)[1], 0.02)  # lossy compression of nearly equal frames


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_json_lines_set_each_video(tiny, tmp_path, base_videos):
    text = ONE_PROMPT[0]
    records = [
        {"prompt": text},
        {"prompt": text, "seed": 1234},
        {"prompt": text, "seed": 1234, "negative_prompt": "blurred"},
        {"prompt": text, "size": [48, 32], "num_frames": 1},
    ]
    assert main(command(tiny.config("5b"), tmp_path, records)) == 0
    plain, seeded, negative, sized = files(tmp_path / "videos")
    first = files(base_videos)[0].read_bytes()
    assert plain.read_bytes() == first
    assert seeded.read_bytes() == first  # the seed of the run, which the first prompt takes as it is
    assert negative.read_bytes() != first
    meta, frames = read_video(sized)
    assert (meta["size"], len(frames)) == ((32, 48), 1)


@pytest.mark.slow
def test_json_lines_name_images(tiny, tmp_path, image):
    records = [{"prompt": "a boat", "image": image.name}]
    assert main(command(tiny.config("5b_i2v"), tmp_path, records, name="json")) == 0
    assert main(command(tiny.config("5b_i2v"), tmp_path, [f"a boat@@{image}"], name="text")) == 0
    assert contents(tmp_path / "json") == contents(tmp_path / "text")


@pytest.mark.slow
def test_typed_prompts(tiny, tmp_path, base_videos, monkeypatch):
    arguments = command(tiny.config("5b"), tmp_path, TWO_PROMPTS, "--input_type", "cli")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TWO_PROMPTS) + "\nq\n"))
    assert main(arguments) == 0
    assert contents(tmp_path / "videos") == contents(base_videos)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TWO_PROMPTS[0]}\na third\n"))
    assert main(arguments) == 1  # the first exists, and that does not end the session
    assert len(files(tmp_path / "videos")) == 3


@pytest.mark.slow
def test_awkward_prompts_give_safe_names_and_warnings(tiny, tmp_path, caplog):
    """Slashes, quotes, emoji, an empty line, and more tokens than the encoder takes."""
    prompts = ['../a "cat"/dog 🐈', "", "over and over " * 30]
    assert main(command(tiny.config("5b"), tmp_path, prompts, "--only_save_latents")) == 0
    names = [path.parts[-3] for path in files(tmp_path / "videos")]
    assert names == ["0_a_catdog_🐈", f"2_{('over_and_over_' * 9)[:120]}"]
    assert "line 2: skipped, it is empty" in caplog.text
    assert "text cut to 64 tokens" in caplog.text


@pytest.mark.slow
def test_pictures_show_all_videos_old_and_new(tiny, tmp_path, caplog):
    """The sheet has a row and the folder a preview for an existing video too.

    The prompt file is read once, so that its warnings appear once.
    """
    size = ["--sampling_image_size", "64", "96"]  # the reader of videos takes no narrower ones
    assert main(command(tiny.config("5b"), tmp_path, TWO_PROMPTS[:1], *size)) == 0
    caplog.clear()
    pictures = ["--contact_sheet", str(tmp_path / "sheet.png"), "--looping_previews", "--skip_existing"]
    assert main(command(tiny.config("5b"), tmp_path, [*TWO_PROMPTS, ""], *size, *pictures)) == 0
    videos = list((tmp_path / "videos").rglob("*.mp4"))
    assert len(videos) == 2 and all(Image.open(video.with_suffix(".webp")).n_frames == 9 for video in videos)
    assert 2 * FRAME_HEIGHT < Image.open(tmp_path / "sheet.png").height < 3 * FRAME_HEIGHT
    assert caplog.text.count("skipped, it is empty") == 1

    damaged, whole = sorted(videos)
    damaged.write_bytes(b"no video")
    whole.with_suffix(".webp").unlink()
    assert main(command(tiny.config("5b"), tmp_path, TWO_PROMPTS, *size, *pictures)) == 1
    assert caplog.text.count(f"{damaged} cannot be read") == 2, "once for the sheet, once for its preview"
    assert whole.with_suffix(".webp").exists(), "other videos get their previews"


# ---------------------------------------------------------------------------------------------------------------------
# Ways of computing the same
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["stage", "sequential"])
def test_offloading_changes_no_bit(tiny, tmp_path, base_videos, offload):
    assert main(command(tiny.config("5b"), tmp_path, TWO_PROMPTS, "--offload", offload)) == 0
    assert contents(tmp_path / "videos") == contents(base_videos)


@pytest.mark.slow
def test_lora_scale(tiny, tmp_path, base_videos):
    lora = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 4}}
    config = tiny.variant(
        "5b", tmp_path / "lora.yaml", model={"network_config": {"params": {"modules": {"lora_config": lora}}}}
    )
    weights = {}
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        for name, parts in (("query_key_value", 3), ("dense", 1)):
            for part in range(parts):
                stem = f"transformer.layers.{layer}.attention.{name}"
                weights[f"{stem}.matrix_A.{part}"] = torch.randn(4, 256, generator=generator)
                weights[f"{stem}.matrix_B.{part}"] = torch.randn(256, 4, generator=generator)
    save_file(weights, tmp_path / "adapter.safetensors")
    for scale in ("0", "1"):
        arguments = ("--lora_load", str(tmp_path / "adapter.safetensors"), "--lora_scale", scale)
        assert main(command(config, tmp_path, TWO_PROMPTS, *arguments, name=scale)) == 0
    assert contents(tmp_path / "0") == contents(base_videos)
    assert not set(contents(tmp_path / "1").values()) & set(contents(base_videos).values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_close(tiny, tmp_path, base_videos, dtype):
    assert main(command(tiny.config("5b"), tmp_path, ONE_PROMPT, f"--{dtype}")) == 0
    half, full = (read_video(files(folder)[0])[1] for folder in (tmp_path / "videos", base_videos))
    assert 0 < (half - full).abs().mean() < 0.1


@pytest.mark.slow
def test_tiles_and_few_frames_at_once(tiny, tmp_path, monkeypatch):
    """Compare the frames before compression, which makes large differences of small ones."""
    written, write = [], VideoWriter.write

    def note(self, frames):
        written[-1].append(frames.clone())
        write(self, frames)

    monkeypatch.setattr(VideoWriter, "write", note)
    size = ("--sampling_image_size", "64", "96")
    for way in ((), ("--vae_tile_size", "64"), ("--vae_frames_at_once", "4")):
        written.append([])
        assert main(command(tiny.config("5b"), tmp_path, ONE_PROMPT, *size, *way, name=f"videos{len(written)}")) == 0
    whole, tiled, few = map(torch.cat, written)
    assert whole.shape == tiled.shape and whole.abs().max() > 0.1
    assert_close(few, whole, 1e-5)
    assert 0 < (tiled - whole).abs().mean() < 0.5


@pytest.mark.slow
@needs_compiler
def test_compiled(tiny, tmp_path, base_videos):
    config = tiny.variant("5b", tmp_path / "compiled.yaml", model={"compile_model": True})
    assert main(command(config, tmp_path, ONE_PROMPT, "--offload", "sequential")) == 0
    (record,) = (tmp_path / "videos").rglob("*.json")
    assert json.loads(record.read_text())["compiled"] is True
    compiled, eager = (read_video(files(folder)[0])[1] for folder in (tmp_path / "videos", base_videos))
    assert (compiled - eager).abs().mean() < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Outputs that exist, prompts that fail
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_existing_outputs(tiny, tmp_path, base_videos, caplog):
    shutil.copytree(base_videos, tmp_path / "videos")
    first, second = files(tmp_path / "videos")
    first.write_text("mine")
    second.unlink()
    arguments = command(tiny.config("5b"), tmp_path, TWO_PROMPTS)
    assert main(arguments) == 2
    assert f"{first} exists; give --overwrite" in caplog.text
    assert files(tmp_path / "videos") == [first]
    assert main([*arguments, "--skip_existing"]) == 0
    assert first.read_text() == "mine"
    assert second.read_bytes() == files(base_videos)[1].read_bytes()
    assert main([*arguments, "--overwrite"]) == 0
    assert contents(tmp_path / "videos") == contents(base_videos)


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["none", "stage"])
def test_a_prompt_that_fails_is_named_and_the_others_are_made(tiny, tmp_path, image, caplog, offload):
    broken = tmp_path / "broken.png"
    broken.write_bytes(image.read_bytes()[:100])
    prompts = [f"first@@{image}", f"second@@{broken}", f"third@@{image}"]
    assert main(command(tiny.config("5b_i2v"), tmp_path, prompts, "--offload", offload)) == 1
    assert [path.parts[-3] for path in files(tmp_path / "videos")] == ["0_first", "2_third"]
    assert "failed: prompt 2 ('second'): cannot read the image" in caplog.text


@pytest.mark.slow
def test_a_video_that_cannot_be_written_is_named_and_the_others_are_made(tiny, tmp_path, caplog):
    arguments = command(tiny.config("5b"), tmp_path, TWO_PROMPTS)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "0_a_paper_boat_on_a_pond").touch()  # where its folder belongs
    assert main(arguments) == 1
    assert "failed: prompt 1 ('a paper boat on a pond'): cannot write" in caplog.text
    assert [path.parts[-3] for path in files(tmp_path / "videos")][1:] == ["1_a_red_kite_over_the_hills"]


def test_a_process_that_cannot_go_on_takes_part_in_the_end_of_the_run(monkeypatch):
    """Else the launcher would see it gone and end the others before their videos are made."""
    from cogvideox_sat.sampling import run as sampling_run

    def fail(*_):
        raise UserError("no such checkpoint")

    counts = []
    monkeypatch.setattr(sampling_run, "sample_all", fail)
    monkeypatch.setattr(sampling_run, "total_over_processes", counts.append)
    with pytest.raises(UserError, match="no such checkpoint"):
        sampling_run.run(SamplingArguments(load="gone"), [])
    assert counts == [1]
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_unforeseen_errors_are_shown_with_where_they_happened(tiny, tmp_path, monkeypatch, caplog):
    from cogvideox_sat.sampling.run import CommandRun

    def fail(_, video, bar):
        if video.planned.request.index == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        raise KeyError("surprise")

    monkeypatch.setattr(CommandRun, "decode_to_file", fail)
    assert main(command(tiny.config("5b"), tmp_path, TWO_PROMPTS)) == 1
    full, surprise = (record for record in caplog.records if record.getMessage().startswith("failed: prompt"))
    assert "--offload sequential" in full.getMessage()
    assert surprise.exc_info[1].args == ("surprise",)


@pytest.mark.slow
def test_a_network_that_is_not_finite_ends_its_video_at_once(tiny, tmp_path, monkeypatch, caplog):
    """The video ends at the first step with advice; the other video is made."""
    from diffusion_video import SATVideoDiffusionEngine

    sample, steps = SATVideoDiffusionEngine.sample, []

    def spoil_the_first_video(self, *args, **kwargs):
        denoise, first = self.denoiser.forward, not steps
        with monkeypatch.context() as patch:
            if first:
                patch.setattr(self.denoiser, "forward", lambda *a, **k: steps.append(1) or denoise(*a, **k) * torch.nan)
            return sample(self, *args, **kwargs)

    monkeypatch.setattr(SATVideoDiffusionEngine, "sample", spoil_the_first_video)
    assert main(command(tiny.config("5b"), tmp_path, TWO_PROMPTS, "--bf16")) == 1
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line.startswith("failed: prompt 1 (") and "not finite: use float32 (--no-bf16)" in line
    assert len(steps) == 1
    assert [path.parts[-3] for path in files(tmp_path / "videos")] == ["1_a_red_kite_over_the_hills"]


# ---------------------------------------------------------------------------------------------------------------------
# Weights that do not fit
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_weights_that_do_not_fit_stop_the_run(tiny, tmp_path, caplog):
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"PK" + bytes(100))
    (tmp_path / "empty").mkdir()
    for load, complaint in {
        damaged: "damaged",
        tmp_path / "empty": "holds no checkpoint",
        tiny.folder / "5b_i2v": "does not fit DiffusionTransformer",
    }.items():
        caplog.clear()
        assert main(command(tiny.config("5b"), tmp_path, ONE_PROMPT, "--load", str(load))) == 2
        (message,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert message.startswith("error: ") and complaint in message and "\n" not in message
        assert not files(tmp_path / "videos")


def test_a_vae_that_does_not_fit_is_found_before_sampling(tiny, tmp_path, monkeypatch, caplog):
    from diffusion_video import SATVideoDiffusionEngine

    sampled = []
    monkeypatch.setattr(SATVideoDiffusionEngine, "sample", lambda *_, **__: sampled.append(1))
    torch.save({"state_dict": {"encoder.conv_in.conv.weight": torch.zeros(1)}}, tmp_path / "vae.pt")
    first_stage = {"params": {"ckpt_path": str(tmp_path / "vae.pt")}}
    config = tiny.variant("5b", tmp_path / "vae.yaml", model={"first_stage_config": first_stage})
    assert main(command(config, tmp_path, ONE_PROMPT)) == 2
    assert "vae.pt does not fit" in caplog.text
    assert not sampled


@pytest.mark.slow
def test_force_inference_lets_weights_be_missing(tiny, tmp_path, caplog):
    weights = torch.load(tiny.folder / "5b" / "1" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    del weights["model.diffusion_model.time_embed.0.bias"]
    torch.save({"module": weights}, tmp_path / "incomplete.pt")
    arguments = command(tiny.config("5b"), tmp_path, ONE_PROMPT, "--load", str(tmp_path / "incomplete.pt"))
    assert main(arguments) == 2
    assert "time_embed.0.bias" in caplog.text
    assert main([*arguments, "--force_inference"]) == 0


# ---------------------------------------------------------------------------------------------------------------------
# In its own process
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_terminal_shows_the_bar_and_the_files_only(tiny, tmp_path, base_videos):
    arguments = command(tiny.config("5b"), tmp_path, TWO_PROMPTS)
    result = run_process(sys.executable, str(SCRIPT), *arguments)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "videos") == contents(base_videos)
    assert result.stdout == ""
    shown = [line.strip() for line in result.stderr.replace("\r", "\n").splitlines() if line.strip()]
    written = [line for line in shown if not line.startswith("sampling: ")]
    assert written[0].startswith("device: ")
    assert written[1] == "attention: flash (auto)"
    assert written[2:] == [f"wrote {path}" for path in files(tmp_path / "videos")]
    assert any("4/4" in line for line in shown)
