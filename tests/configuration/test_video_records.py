"""Test that the record beside each video is complete and repeats the video.

A record from elsewhere runs no code.
"""

import copy
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors import safe_open

import processes
from cogvideox_sat.configuration.video_records import differences, parse_record, read_record, record_path
from cogvideox_sat.files.content_hashes import content_hash
from cogvideox_sat.sampling import run as sampling_run
from sample_video import main
from sgm.errors import UserError

ROOT = Path(__file__).parents[2]
PROMPT = "a paper boat on a pond"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def hash_memory(tmp_path_factory):
    """Remember hashes in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def sample(config: Path, folder: Path, prompts: list, *flags: str, output: str = "videos") -> int:
    file = folder / ("prompts.jsonl" if isinstance(prompts[0], dict) else "prompts.txt")
    file.write_text("\n".join(json.dumps(p) if isinstance(p, dict) else p for p in prompts) + "\n")
    command = ["--base", config, "--input_file", file, "--output_dir", folder / output, "--sampling_num_steps", "2"]
    command += ["--sampling_image_size", "32", "48", "--sampling_num_frames", "3", *flags]
    return main([str(part) for part in command])


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> Path:
    """Sample two videos for each of two prompts, with few default settings."""
    folder = tmp_path_factory.mktemp("made")
    pixels = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "first.png")
    prompt = {"prompt": PROMPT, "image": "first.png", "negative_prompt": "blurred"}
    flags = ["--seed", "7", "--batch_size", "2", "--bf16", "--sampling_fps", "16", "--vae_tile_size", "64"]
    assert sample(tiny.config("5b_i2v"), folder, [{**prompt, "prompt": "first"}, prompt], *flags) == 0
    return folder


def video_of(folder: Path, number: int = 1) -> Path:
    return next(folder.glob(f"1_*/{number}/000000.mp4"))


@pytest.mark.slow
def test_what_it_says(tiny, made):
    record = json.loads(record_path(video_of(made / "videos")).read_text())
    expected = {
        "prompt": PROMPT,
        "original_prompt": None,
        "negative_prompt": "blurred",
        "index": 1,
        "steps": 2,
        "size": [32, 48],
        "frames": 9,
        "latent_frames": 3,
        "fps": 16,
        "precision": "bf16",
        "computed_in": "bfloat16",
        "adapters": [],
        "threads": 1,
    }
    assert {name: record[name] for name in expected} == expected
    assert record["image"] == {"path": str(made / "first.png"), "hash": content_hash([made / "first.png"])}
    assert record["checkpoint"]["hash"] == content_hash((tiny.folder / "5b_i2v").glob("*/*.pt"))
    assert record["vae"]["hash"] == content_hash([tiny.folder / "vae.pt"])
    assert record["text_encoder"]["hash"].startswith("sha256:")
    assert record["video"]["hash"] == content_hash([video_of(made / "videos")])
    assert record["model"]["name"] == "5b_i2v" and record["model"]["scale_factor"] > 0
    assert record["versions"]["torch"] == version("torch")
    assert record["arguments"]["vae_tile_size"] == 64 and isinstance(record["guidance"], float | int)


@pytest.mark.slow
def test_it_repeats_the_video_to_the_bit(made, tmp_path, caplog):
    """The record repeats the video in another process and folder, without a configuration."""
    video = video_of(made / "videos")
    command = [ROOT / "sat" / "sample_video.py", "--input_file", record_path(video), "--output_dir", tmp_path / "again"]
    process = processes.run(command, cwd=tmp_path, timeout=300)
    assert process.returncode == 0, process.stderr
    (again,) = (tmp_path / "again").rglob("*.mp4")
    assert again.read_bytes() == video.read_bytes()
    assert again.parts[-3] == video.parts[-3]
    assert "equals the video" in process.stderr and "repeating" not in process.stderr
    assert json.loads(record_path(again).read_text()) == json.loads(record_path(video).read_text())


@pytest.mark.slow
def test_knobs_of_lines_and_flags_are_those_of_the_configuration_and_repeat(tiny, tmp_path):
    """The bytes of a video are the same by .jsonl, by flags, by --set and from its record.

    A line without knobs gives the same video as before, and its record has no knobs.
    """
    knobs = {"sampler": "ddim", "guidance_scale": 3, "guidance_interval": [0, 0.5], "guidance_schedule": "step"}
    others = {"steps": 3, "frames": 9, "fps": 16}
    config, line = tiny.config("5b"), {"prompt": PROMPT, "seed": 7}
    assert sample(config, tmp_path, [{**line, **knobs, **others}, line], output="line") == 0
    assert sample(config, tmp_path, [PROMPT], "--seed", "7", output="plain") == 0
    line_video, other_video = sorted((tmp_path / "line").rglob("*.mp4"))
    (plain,) = (tmp_path / "plain").rglob("*.mp4")
    assert other_video.read_bytes() == plain.read_bytes() != line_video.read_bytes()
    record = json.loads(record_path(line_video).read_text())
    assert (record["steps"], record["fps"], record["guidance"], record["frames"]) == (3, 16, 3, 9)
    assert record["arguments"].items() >= {**knobs, "sampler": "VideoDDIMSampler"}.items()
    assert not json.loads(record_path(plain).read_text())["arguments"].keys() & knobs.keys()

    flags = ["--sampler", "VideoDDIMSampler", "--guidance_scale", "3", "--guidance-interval", "0", "0.5", "--seed", "7"]
    flags += ["--guidance_schedule", "step", "--sampling_num_steps", "3", "--sampling_fps", "16"]
    assert sample(config, tmp_path, [PROMPT], *flags, output="flags") == 0
    guider, module = "model.sampler_config.params.guider_config.params", "sgm.modules.diffusionmodules.sampling"
    keys = [f"{guider}.scale=3", f"{guider}.count=step", f"model.sampler_config.target={module}.VideoDDIMSampler"]
    keys += ["model.sampler_config.params.guidance_interval=[0, 0.5]"]
    rest = ["--seed", "7", "--sampling_num_steps", "3", "--sampling_fps", "16"]
    assert sample(config, tmp_path, [PROMPT], "--set", *keys, *rest, output="set") == 0
    again = ["--input_file", str(record_path(line_video)), "--output_dir", str(tmp_path / "again")]
    assert main(again) == 0
    for output in ("flags", "set", "again"):
        (video,) = (tmp_path / output).rglob("*.mp4")
        assert video.read_bytes() == line_video.read_bytes(), output


@pytest.mark.slow
def test_each_fact_that_differs_is_a_warning(tiny, made, tmp_path, caplog):
    """The model's configuration and a flag are given; the flag takes precedence."""
    content = json.loads(record_path(video_of(made / "videos")).read_text())
    content["versions"]["torch"] = "1.0"
    content["threads"] = 99
    content["image"]["hash"] = content["checkpoint"]["hash"] = "sha256:0"
    (tmp_path / "old.json").write_text(json.dumps(content))
    command = ["--base", str(tiny.config("5b_i2v")), "--input_file", str(tmp_path / "old.json")]
    assert main([*command, "--output_dir", str(tmp_path / "out"), "--sampling_num_steps", "1"]) == 0
    lines = [record.getMessage() for record in caplog.records if "repeating" in record.getMessage()]
    for fact in ("version of torch", "threads", "content of the image", "content of the checkpoint"):
        assert sum(f": {fact}: the video was made with" in line for line in lines) == 1, (fact, lines)
    assert len(lines) == 4 and "differs from the video" in caplog.text
    (path,) = (tmp_path / "out").rglob("*.json")
    assert json.loads(path.read_text())["steps"] == 1


@pytest.mark.slow
def test_a_refined_prompt_is_recorded_with_the_users_own(tiny, tmp_path, monkeypatch):
    from cogvideox_sat.sampling import planned_videos

    monkeypatch.setattr(planned_videos.Endpoint, "from_environment", lambda: None)
    monkeypatch.setattr(planned_videos, "refine", lambda prompts, endpoint: ["a boat, written out"])
    assert sample(tiny.config("5b"), tmp_path, [PROMPT], "--refine_prompts") == 0
    (record,) = (tmp_path / "videos").rglob("*.json")
    content = json.loads(record.read_text())
    assert (content["prompt"], content["original_prompt"]) == ("a boat, written out", PROMPT)
    assert main(["--input_file", str(record), "--output_dir", str(tmp_path / "again")]) == 0
    (video,) = (tmp_path / "again").rglob("*.mp4")
    assert video.read_bytes() == record.with_suffix(".mp4").read_bytes()
    assert video.parts[-3] == record.parts[-3]


@pytest.mark.slow
def test_a_record_belongs_to_its_video(tiny, tmp_path, caplog, monkeypatch):
    config = tiny.config("5b")
    assert sample(config, tmp_path, [PROMPT]) == 0
    (video,) = (tmp_path / "videos").rglob("*.mp4")
    first = record_path(video).read_bytes()
    assert sample(config, tmp_path, [PROMPT], "--skip_existing", "--seed", "8") == 0
    assert record_path(video).read_bytes() == first

    # The run ended between the video and its record: the record is missing, not that of the video before.
    monkeypatch.setattr(sampling_run, "write_record", lambda *_: (_ for _ in ()).throw(UserError("disk full")))
    assert sample(config, tmp_path, [PROMPT], "--overwrite", "--seed", "8") == 1
    assert video.exists() and not record_path(video).exists()
    monkeypatch.undo()

    video.unlink()
    record_path(video).write_bytes(first)
    assert sample(config, tmp_path, [PROMPT]) == 2
    assert f"{record_path(video)} exists, the record of a video that does not; give --overwrite" in caplog.text
    assert sample(config, tmp_path, [PROMPT], "--skip_existing", "--seed", "9") == 0
    assert json.loads(record_path(video).read_text())["seed"] == 9


@pytest.mark.slow
def test_latents_say_what_they_are(tiny, tmp_path):
    assert sample(tiny.config("5b"), tmp_path, [PROMPT], "--only_save_latents") == 0
    (path,) = (path for path in (tmp_path / "videos").rglob("*") if path.is_file())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["prompt"], metadata["model"], metadata["fps"]) == (PROMPT, "5b", "8")
    scale = yaml.safe_load(tiny.config("5b").read_text())["model"]["scale_factor"]
    assert float(metadata["scale_factor"]) == scale
    assert json.loads(metadata["record"])["seed"] == 1234


# ---------------------------------------------------------------- records from elsewhere


def spoilt(content: dict, path: str, value) -> dict:
    content = copy.deepcopy(content)
    *parents, last = path.split("/")
    node = content
    for part in parents:
        node = node[int(part) if isinstance(node, list) else part]
    node[last] = value
    return content


FOREIGN = {
    "code": ("model/config/conditioner_config/params/emb_models/0/target", "subprocess.getoutput"),
    "code of ours that runs others": ("model/config/denoiser_config/target", "os.system"),
    "wrapper": ("model/config/network_wrapper", "os.system"),
    "no text": ("model/config/first_stage_config/target", ["os.system"]),
    "hub": ("model/config/conditioner_config/params/emb_models/0/params/cache_dir", "/tmp"),
    "no model": ("model", {}),
    "seed": ("seed", "7"),
    "true seed": ("seed", True),
    "size": ("size", [32]),
    "deep": ("model", json.loads('{"a":' * 80 + "1" + "}" * 80)),
    "half a character": ("prompt", "a \ud83d boat"),
    "precision": ("precision", "int4"),
    "index": ("index", -5),
    "rate": ("fps", 10**12),
    "format": ("format", 2),
    "adapter": ("adapters", [{"path": 3, "scale": 1.0}]),
    "image": ("image", {"path": "/nowhere/first.png"}),
    "no image": ("image", None),
    "checkpoint": ("checkpoint/path", "/nowhere"),
    "weights": ("model/config/first_stage_config/params/ckpt_path", "/nowhere/vae.pt"),
}


def test_a_foreign_record_runs_nothing_and_is_refused_in_one_line(made, tmp_path, caplog):
    content = json.loads(record_path(video_of(made / "videos")).read_text())
    texts = {name: json.dumps(spoilt(content, *change)) for name, change in FOREIGN.items()}
    texts |= {"text": "a boat", "list": "[1]", "prompts": '{"prompt": "a boat"}', "nested": "[" * 100_000}
    for name, text in texts.items():
        file = tmp_path / "foreign.json"
        file.write_text(text)
        caplog.clear()
        assert main(["--input_file", str(file), "--output_dir", str(tmp_path / "out")]) == 2, name
        errors = [record for record in caplog.records if record.levelname == "ERROR"]
        assert len(errors) == 1 and errors[0].exc_info is None, name
        assert errors[0].getMessage().startswith("error: ") and "\n" not in errors[0].getMessage(), name
        assert not (tmp_path / "out").exists(), name


def test_differences_leave_out_what_is_not_known(made):
    record = read_record(record_path(video_of(made / "videos"))).content
    assert differences(record, record) == []
    unknown = {**record, "vae": {**record["vae"], "hash": None}, "processors": None}
    assert differences(record, unknown) == differences(unknown, record) == []
    model = spoilt(record, "model/config/scale_factor", 2.0)
    (line,) = differences(model, record)
    assert line.startswith("model.scale_factor: the video was made with 2.0, this is ")


def test_parse_record_names_the_key():
    with pytest.raises(UserError, match="x: prompt: got None; expected text"):
        parse_record('{"format": 1}', "x")
