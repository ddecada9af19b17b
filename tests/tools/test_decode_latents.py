"""Kept latents become sampling's video; foreign files run no code."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample_video
from cogvideox_sat.media import video_output
from cogvideox_sat.sampling import kept_latents
from cogvideox_sat.sampling import run as sampling_run
from diffusion_video import SATVideoDiffusionEngine
from sgm.errors import UserError
from tools.decode_latents import main
from videos import read_video

PROMPT = "a paper boat on a pond"
KEPT = "000000.latents.safetensors"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def folders_of_tests(tmp_path_factory):
    """Put everything that goes outside of the output folder into folders of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("temporary")))
        patch.setattr(kept_latents.tempfile, "tempdir", None)
        yield


def sample(config: Path, folder: Path, *flags: str, prompts: tuple[str, ...] = (PROMPT,)) -> int:
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    command = ["--base", config, "--input_file", folder / "prompts.txt", "--output_dir", folder / "videos"]
    command += ["--sampling_num_steps", "2", "--sampling_image_size", "32", "48", "--sampling_num_frames", "3", *flags]
    return sample_video.main([str(part) for part in command])


def found(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(suffixes))


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> Path:
    """Make a folder with the video of a successful run, in bfloat16 at 12 frames a second."""
    folder = tmp_path_factory.mktemp("made")
    assert sample(tiny.config("5b"), folder, "--bf16", "--sampling_fps", "12") == 0
    return folder


@pytest.fixture(scope="module")
def kept(tiny, tmp_path_factory) -> Path:
    """Make the folder of the same run, whose decoding runs out of memory."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SATVideoDiffusionEngine, "decode_stream", lambda *_: torch.empty(2**50))
        assert sample(tiny.config("5b"), folder, "--bf16", "--sampling_fps", "12") == 2
    return folder


@pytest.mark.slow
def test_latents_that_were_kept_become_the_same_video(made, kept, tmp_path, caplog):
    caplog.set_level("INFO")
    shutil.copytree(kept / "videos", tmp_path / "videos")
    (latents,) = found(tmp_path / "videos", "")
    assert latents.name == KEPT
    assert main([str(latents)]) == 0
    (video,), (expected,) = found(tmp_path / "videos", ".mp4"), found(made / "videos", ".mp4")
    assert video.read_bytes() == expected.read_bytes()
    records = [json.loads(path.with_suffix(".json").read_text()) for path in (video, expected)]
    for record in records:  # hashes of weights may not have been known yet
        for name in ("checkpoint", "vae", "text_encoder"):
            record[name].pop("hash")
    assert records[0] == records[1]
    assert caplog.messages[0].startswith("device: ") and caplog.messages[-1] == f"wrote {video}"


@pytest.mark.slow
def test_the_report_says_the_command(tiny, tmp_path, caplog, monkeypatch):
    """And the others go on."""
    decode = SATVideoDiffusionEngine.decode_stream
    calls = []

    def full_at_first(self, latents):
        calls.append(1)
        return torch.empty(2**50) if len(calls) == 1 else decode(self, latents)

    monkeypatch.setattr(SATVideoDiffusionEngine, "decode_stream", full_at_first)
    assert sample(tiny.config("5b"), tmp_path, prompts=("it's one", "two")) == 1
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    (latents,) = found(tmp_path, KEPT)
    assert line.startswith("failed: prompt 1 (") and "decoding: host memory is full" in line
    command = line.partition("decode them with: ")[2]
    assert command == f"python tools/decode_latents.py {latents} --vae_tile_size 256"
    assert [path.parts[-3] for path in found(tmp_path, ".mp4")] == ["1_two"]
    caplog.clear()
    assert sample(tiny.config("5b"), tmp_path, "--batch_size", "1", prompts=("it's one",)) == 2
    assert f"{latents} exists, latents that tools/decode_latents.py turns into the video" in caplog.text


@pytest.mark.slow
def test_a_full_disk(tiny, tmp_path, caplog, monkeypatch):
    """Video and latents do not fit on the disk, and go to the temporary folder."""

    def no_space(self):
        raise UserError(f"cannot write {self.path}: No space left on device")

    monkeypatch.setattr(video_output.VideoWriter, "__enter__", no_space)
    assert sample(tiny.config("5b"), tmp_path / "a") == 1
    assert [path.name for path in found(tmp_path / "a" / "videos", "")] == [KEPT]
    save = kept_latents.save_latents

    def full_beside_the_video(path, *args):
        if str(path).startswith(str(tmp_path)):
            raise UserError(f"cannot write {path}: No space left on device")
        save(path, *args)

    monkeypatch.setattr(kept_latents, "save_latents", full_beside_the_video)
    caplog.clear()
    assert sample(tiny.config("5b"), tmp_path / "b") == 1
    assert "No space left on device; its latents are kept, decode them with" in caplog.text
    place = Path(caplog.messages[-1].rpartition(" ")[2])
    assert load_file(place)["latents"].shape == (1, 3, 16, 4, 6) and str(place).startswith(os.environ["TMPDIR"])


@pytest.mark.slow
def test_a_record_that_cannot_be_written(tiny, tmp_path, caplog, monkeypatch):
    """The report says how to get both, though the video is there."""

    def no_space(video, content):
        raise UserError(f"cannot write {video.with_suffix('.json')}: No space left on device")

    monkeypatch.setattr(sampling_run, "write_record", no_space)
    assert sample(tiny.config("5b"), tmp_path) == 1
    (latents,) = found(tmp_path, KEPT)
    assert caplog.text.rstrip().endswith(f"decode them with: python tools/decode_latents.py {latents} --overwrite")
    assert main([str(latents), "--overwrite"]) == 0
    assert len(found(tmp_path, ".mp4")) == len(found(tmp_path, ".json")) == 1


@pytest.mark.slow
def test_a_vae_that_does_not_load_any_more(tiny, tmp_path, caplog, monkeypatch):
    """The VAE is built again after sampling, since the parts take turns: all latents are kept."""
    build, calls = SATVideoDiffusionEngine._build_first_stage, []

    def once(self, device):
        calls.append(1)
        return build(self, device) if len(calls) == 1 else torch.empty(2**50)

    monkeypatch.setattr(SATVideoDiffusionEngine, "_build_first_stage", once)
    assert sample(tiny.config("5b"), tmp_path, prompts=("one", "two")) == 2
    assert len(found(tmp_path, KEPT)) == 2
    assert caplog.text.count("its latents are kept, decode them with: ") == 2
    assert caplog.messages[-1].startswith("error: loading the VAE: host memory is full")
    monkeypatch.undo()
    assert main([str(tmp_path / "videos"), "--vae_tile_size", "64"]) == 0
    assert len(found(tmp_path, ".mp4")) == len(found(tmp_path, ".json")) == 2


def test_latents_without_a_word_need_a_configuration(tiny, made, tmp_path, caplog):
    """Latents of training's samples/, (t, c, h, w), and of earlier versions need it."""
    latents = torch.randn(3, 16, 4, 6)
    save_file({"latents": latents}, tmp_path / "0_a_boat.safetensors")
    assert main([str(tmp_path)]) == 2
    assert ": first_stage_config: missing; give the model's configuration as --base" in caplog.text
    command = [str(tmp_path / "0_a_boat.safetensors"), "--base", str(tiny.config("5b"))]
    assert main([*command, "--output_dir", str(tmp_path / "out"), "--fps", "24"]) == 0
    meta, frames = read_video(tmp_path / "out" / "0_a_boat.mp4")
    assert (meta["fps"], meta["size"], len(frames)) == (24, (48, 32), 9)
    assert not found(tmp_path / "out", ".json")
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 2
    assert "exists; give --overwrite" in caplog.text
    assert main([*command, "--output_dir", str(tmp_path / "out"), "--skip_existing"]) == 0


def test_latents_of_training(tiny, tmp_path):
    from cogvideox_sat.configuration.argument_lists import SamplingArguments
    from cogvideox_sat.configuration.files import load_configs
    from cogvideox_sat.sampling.record_making import latents_metadata
    from cogvideox_sat.training.validation import _write_latents
    from diffusion_video import SATVideoDiffusionEngine

    config = load_configs([tiny.config("5b")])
    engine = SATVideoDiffusionEngine(SamplingArguments(model_config=config["model"]), parts=())
    path = _write_latents(tmp_path / "0_a", torch.randn(3, 16, 4, 6), latents_metadata(engine, "5b", "a", 8))
    assert main([str(path)]) == 0
    assert len(read_video(path.with_suffix(".mp4"))[1]) == 9


def test_weights_of_a_configuration_are_found_from_the_folder_of_the_scripts(tmp_path, monkeypatch):
    path = tmp_path / "0_a.safetensors"
    save_file({"latents": torch.randn(1, 3, 16, 8, 8)}, path)
    monkeypatch.chdir(Path(sample_video.__file__).parent)
    assert main([str(path), "--base", "configs/tiny/cogvideox_tiny.yaml", "--fps", "8"]) == 0
    assert len(read_video(path.with_suffix(".mp4"))[1]) == 9


def changed(latents: Path, path: Path, **metadata: str) -> Path:
    with safe_open(latents, "pt") as file:
        known = file.metadata()
    save_file(load_file(latents), path, {**known, **metadata})
    return path


def test_files_from_elsewhere_run_nothing_and_are_refused_in_one_line(kept, tmp_path, caplog):
    (good,) = found(kept / "videos", KEPT)
    with safe_open(good, "pt") as file:
        first_stage = json.loads(file.metadata()["first_stage_config"])
    evil = {**first_stage, "target": "subprocess.getoutput", "params": {**first_stage["params"], "cmd": "touch x"}}
    nested = json.loads(json.dumps(first_stage))
    nested["params"]["encoder_config"]["target"] = "os.system"
    gone = {**first_stage, "params": {**first_stage["params"], "ckpt_path": "/nowhere/vae.pt"}}
    files = {
        "target": changed(good, tmp_path / "a.safetensors", first_stage_config=json.dumps(evil)),
        "inner target": changed(good, tmp_path / "b.safetensors", first_stage_config=json.dumps(nested)),
        "no weights": changed(good, tmp_path / "c.safetensors", first_stage_config=json.dumps(gone)),
        "no JSON": changed(good, tmp_path / "d.safetensors", first_stage_config="[" * 100_000),
        "scale": changed(good, tmp_path / "e.safetensors", scale_factor="nan"),
        "fps": changed(good, tmp_path / "f.safetensors", fps="-1"),
        "dtype": changed(good, tmp_path / "g.safetensors", computed_in="__class__"),
        "record": changed(good, tmp_path / "h.safetensors", record="{}"),
    }
    for name, tensors in (
        ("other", {"weight": torch.zeros(2)}),
        ("even", {"latents": torch.zeros(2, 16, 4, 6)}),
        ("batch", {"latents": torch.zeros(2, 3, 16, 4, 6)}),
        ("flat", {"latents": torch.zeros(3)}),
        ("empty", {"latents": torch.zeros(3, 16, 0, 6)}),
    ):
        files[name] = tmp_path / f"{name}.safetensors"
        save_file(tensors, files[name])
    files["damaged"] = tmp_path / "damaged.safetensors"
    files["damaged"].write_bytes(good.read_bytes()[:50])
    for name, path in files.items():
        caplog.clear()
        assert main([str(path)]) == 2, name
        (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
        assert line.exc_info is None and str(path) in line.getMessage(), name
    assert not found(tmp_path, ".mp4", ".part")


def test_latents_that_are_not_finite_or_of_another_model(tiny, kept, tmp_path, caplog):
    save_file({"latents": torch.full((3, 16, 4, 6), float("nan"))}, tmp_path / "a.safetensors")
    save_file({"latents": torch.zeros(3, 4, 4, 6)}, tmp_path / "b.safetensors")
    save_file({"latents": torch.zeros(3, 16, 4, 6)}, tmp_path / "c.safetensors")
    assert main([str(tmp_path), "--base", str(tiny.config("5b"))]) == 1
    assert "a.safetensors: the latents are not finite numbers" in caplog.text
    assert "b.safetensors: the latents have 4 channels, but the VAE takes 16" in caplog.text
    assert [path.name for path in found(tmp_path, ".mp4")] == ["c.mp4"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "PATH: missing"),
        (["/nowhere"], "/nowhere does not exist"),
        (["{folder}"], "holds no .safetensors file"),
        (["x", "--vae_tile_size", "63"], "vae_tile_size: got 63"),
        (["x", "--vae_frames_at_once", "6"], "vae_frames_at_once: got 6; it must be a multiple of 4, at least 4"),
        (["x", "--fps", "0"], "--fps: got 0"),
        (["x", "--device", "gpu"], "--device: got 'gpu'"),
        (["x", "--overwrite", "--skip_existing"], "overwrite and skip_existing are both on"),
    ],
)
def test_mistakes_are_one_line(tmp_path, caplog, arguments, says):
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 2
    assert len(caplog.messages) == 1 and says in caplog.messages[0]
