"""`valid_prompts` is checked before anything is loaded, and a mistake is one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.training_arguments import TrainingArguments, training_arguments_from_names
from cogvideox_sat.sampling.prompt_files import read_prompts
from cogvideox_sat.training.prompt_plan import plan_prompts, size_for, usual_clip
from sgm.errors import UserError
from sgm.seeds import derive_seed

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file of prompts, as JSON if they are mappings."""

    def write(*lines: str | dict) -> str:
        path = tmp_path / ("prompts.jsonl" if isinstance(lines[0], dict) else "prompts.txt")
        path.write_text("".join((json.dumps(line) if isinstance(line, dict) else line) + "\n" for line in lines))
        return str(path)

    return write


def arguments(prompts: str | Path, model: str = "cogvideox_2b", data: dict | None = None, **given) -> TrainingArguments:
    files = [CONFIGS / f"{model}.yaml", CONFIGS / ("sft_1.5.yaml" if "1.5" in model else "sft.yaml")]
    settings = {f"data.params.{name}": value for name, value in (data or {}).items()}
    return training_arguments_from_names(files, {"valid_prompts": str(prompts), "load": "w.pt", **given}, settings)


def picture(path: Path, size: tuple[int, int]) -> str:
    Image.new("RGB", size).save(path)
    return str(path)


def test_without_the_argument_there_is_no_plan(write):
    assert plan_prompts(arguments(write("a boat"), valid_prompts=None)) is None


def test_a_prompt_has_the_clips_size_and_length_and_its_own_seed(write):
    plan = plan_prompts(arguments(write("a red boat", "a red boat", "a kite/2"), seed=7, sampling_fps=16))
    assert [(video.size, video.frames, video.fps) for video in plan.videos] == [((480, 720), 13, 16)] * 3
    assert [video.seed for video in plan.videos] == [derive_seed(derive_seed(7, index), 0) for index in range(3)]
    assert [video.path.name for video in plan.videos] == ["0_a_red_boat", "1_a_red_boat", "2_a_kite2"]
    assert plan.texts == [("a red boat", ""), ("a kite/2", "")]
    assert not plan.shows_inputs


def test_a_line_may_have_every_field(write, tmp_path):
    fields = {"seed": 3, "size": [256, 384], "frames": 9, "fps": 4, "steps": 5, "guidance_scale": 2.5}
    fields |= {"sampler": "dpmpp_2m", "guidance_interval": [0, 0.5], "negative_prompt": "grey", "extend": ["then"]}
    plan = plan_prompts(arguments(write({"prompt": "a", **fields}), only_log_video_latents=False))
    (video,) = plan.videos
    assert (video.seed, video.size, video.frames, video.fps, video.steps) == (derive_seed(3, 0), (256, 384), 3, 4, 5)
    assert (video.knobs.guidance_scale, video.knobs.sampler) == (2.5, "VPODEDPMPP2MSampler")
    assert plan.texts == [("a", "grey"), ("then", "grey")]
    image = picture(tmp_path / "a.png", (96, 64))
    (video,) = plan_prompts(arguments(write({"prompt": "a", "image": image}), "cogvideox_5b_i2v")).videos
    assert str(video.request.image) == image


def test_of_several_sizes_the_nearest_to_the_image(write, tmp_path):
    (tall,) = read_prompts(write(f"a@@{picture(tmp_path / 'tall.png', (100, 200))}"))
    sizes = [(480, 720), (720, 480)]
    assert (size_for(tall, sizes), size_for(read_prompts(write("a"))[0], sizes)) == ((720, 480), (480, 720))


@pytest.mark.parametrize(
    ("model", "params", "expected"),
    [
        ("cogvideox_2b", {"video_size": [256, 384], "max_num_frames": 21}, ([(256, 384)], 17)),
        ("cogvideox_2b", {"image_size": [[256, 384], [384, 256]], "num_frames": 9}, ([(256, 384), (384, 256)], 9)),
        ("cogvideox_2b", {}, ([(480, 720)], 49)),
        ("cogvideox1.5_5b", {"max_num_frames": 84}, ([(480, 720)], 81)),
        ("cogvideox1.5_5b", {"max_num_frames": 1}, ([(480, 720)], 1)),
        ("cogvideox1.5_5b", {"max_num_frames": "many"}, ([(480, 720)], 49)),
    ],
)
def test_the_usual_clip(model, params, expected):
    limits = ModelLimits.from_config(load_configs([CONFIGS / f"{model}.yaml"])["model"])
    assert usual_clip(params, limits) == expected


@pytest.mark.parametrize(
    ("model", "lines", "given", "says"),
    [
        (
            "cogvideox_2b",
            ["a"],
            {"valid_prompts": "/nowhere.txt"},
            "valid_prompts: cannot read the prompt file /nowhere",
        ),
        ("cogvideox_2b", [""], {}, "valid_prompts: prompt file .* holds no prompt"),
        ("cogvideox_2b", [{"prompt": "a", "sed": 1}], {}, "valid_prompts: .*, line 1: unknown key 'sed'"),
        ("cogvideox_2b", ["a@@b.png"], {}, "valid_prompts: .*, line 1: image b.png does not exist"),
        ("cogvideox_5b_i2v", ["a"], {}, "valid_prompts: .*, line 1: an image-to-video model needs an image"),
        (
            "cogvideox_2b",
            ["b", {"prompt": "a", "size": [100, 96]}][1:],
            {},
            "valid_prompts: .*, prompt 1: size: height",
        ),
        ("cogvideox_2b", [{"prompt": "a", "frames": 12}], {}, "valid_prompts: .*, prompt 1: frames: got 12"),
        (
            "cogvideox_2b",
            [{"prompt": "a", "video": "b.mp4"}],
            {},
            "valid_prompts: .*, line 1: video b.mp4 does not exist",
        ),
        (
            "cogvideox_2b",
            [{"prompt": "a", "extend": 1}],
            {"only_log_video_latents": True},
            "prompt 1: extend: windows continue decoded frames; set only_log_video_latents to false",
        ),
        ("cogvideox_2b", ["a"], {"data": {"video_size": [100, 96]}}, r"video_size"),
    ],
)
def test_a_mistake_is_one_line(write, model, lines, given, says):
    with pytest.raises(UserError, match=says) as caught:
        plan_prompts(arguments(write(*lines), model, **given))
    assert "\n" not in str(caught.value)


def test_without_evaluations_there_would_be_no_videos(write):
    args = arguments(write("a"))
    args.eval_interval = None
    with pytest.raises(UserError, match="valid_prompts: eval_interval is missing"):
        plan_prompts(args)


@pytest.mark.slow
def test_the_command_refuses_it_before_pytorch_is_loaded(write, tmp_path):
    config = tmp_path / "data.yaml"
    config.write_text(yaml.safe_dump({"args": {"train_data": [str(tmp_path)]}}))
    program = "import sys; from train_video import main; code = main(sys.argv[1:]); print('torch' in sys.modules, code)"
    files = [CONFIGS / "cogvideox_2b.yaml", CONFIGS / "sft.yaml", CONFIGS / "sft_full.yaml", config]
    command = ["--base", *map(str, files), "--load", str(config), "--valid_prompts", write("a@@gone.png")]
    done = subprocess.run(
        [sys.executable, "-c", program, *command], capture_output=True, text=True, cwd=CONFIGS.parent / "sat"
    )
    assert done.stdout.split() == ["False", "2"]
    assert "error: valid_prompts: " in done.stderr and "gone.png does not exist" in done.stderr
    assert "Traceback" not in done.stderr
