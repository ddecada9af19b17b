"""An impossible run is refused before PyTorch's import; a possible one has its start."""

import json
import os
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from cogvideox_sat.configuration.deepspeed_runtime import BatchSizes
from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.training_arguments import TrainingArguments, get_training_args
from cogvideox_sat.runs.folders import find_resume, new_run_folder
from cogvideox_sat.training.plan import iteration_folder, plan_run
from sgm.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
SFT = CONFIGS / "sft.yaml"
LORA = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 4}}
NOW = datetime(2024, 3, 7, 9, 5)


class Case:
    """A folder with clips, caches and weight files, and its arguments."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("clips", "t5", "cache", "cache2"):
            (folder / name).mkdir()
        for name in ("transformer.pt", "vae.pt"):
            (folder / name).touch()
        for name in ("cache", "cache2"):
            (folder / name / "cache.json").touch()

    def args(
        self, *command_line: str, model: str = "cogvideox_2b", data: dict | None = None, **changes
    ) -> TrainingArguments:
        """Return arguments with `changes` in the `model:` section, `data` in the data's params."""
        config = load_configs([CONFIGS / f"{model}.yaml"])["model"]
        config["conditioner_config"]["params"]["emb_models"][0]["params"]["model_dir"] = str(self.folder / "t5")
        config["first_stage_config"]["params"]["ckpt_path"] = str(self.folder / "vae.pt")
        (self.folder / "model.yaml").write_text(yaml.safe_dump({"model": config}))
        (self.folder / "changes.yaml").write_text(yaml.safe_dump({"model": changes, "data": {"params": data or {}}}))
        files = [self.folder / "model.yaml", SFT, self.folder / "changes.yaml"]
        places = {"load": "transformer.pt", "train_data": "clips", "save": "runs"}
        flags = [flag for name, place in places.items() for flag in (f"--{name}", str(self.folder / place))]
        return get_training_args(["--base", *map(str, files), *flags, *command_line])

    def run(self, name: str, *iterations: int, saved_at: float = 0.0) -> Path:
        """Make the folder of a run that saved at these steps, lastly at `saved_at` seconds."""
        run = self.folder / "runs" / name
        for step in iterations:
            (run / str(step) / "training_state").mkdir(parents=True)
            (run / str(step) / "training_state" / "state.json").write_text(json.dumps({"step": step}))
            (run / "latest").write_text(str(step))
            os.utime(run / "latest", (saved_at, saved_at))
        return run


@pytest.fixture
def case(tmp_path, monkeypatch) -> Case:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return Case(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Plans
# ---------------------------------------------------------------------------------------------------------------------


def test_a_new_run(case):
    plan = plan_run(case.args())
    assert (plan.resume, plan.cached, plan.batch) == (None, False, BatchSizes(1, 1, 1))
    assert not (case.folder / "runs").exists()


def test_batches_on_several_processes(case, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert plan_run(case.args()).batch == BatchSizes(1, 1, 4)
    assert plan_run(case.args("--model_parallel_size", "2")).batch == BatchSizes(1, 1, 2)


def test_caches_need_neither_vae_nor_text_encoder(case):
    (case.folder / "vae.pt").unlink()
    (case.folder / "t5").rmdir()
    caches = [str(case.folder / name) for name in ("cache", "cache2")]
    assert plan_run(case.args("--train_data", caches[0], "--valid_data", caches[1])).cached


def test_shards_may_be_a_pattern(case):
    shards = [str(case.folder / name) for name in ("{000..003}.tar", "*.tar")]
    plan = plan_run(case.args("--train_data", *shards))
    assert (plan.resume, plan.cached) == (None, False)
    for path in (shards[0].replace("{000..003}", "004"), shards[1].replace(".tar", ".zip")):  # no pattern, no shards
        with pytest.raises(UserError, match="train_data"):
            plan_run(case.args("--train_data", path))


@pytest.mark.parametrize(
    ("model", "size", "frames"),
    [
        ("cogvideox_2b", [480, 720], [1, 5, 45, 49]),
        ("cogvideox1.5_5b", [768, 1360], [1, 9, 81, 161]),
        ("cogvideox1.5_5b", [1360, 768], [81]),
        ("cogvideox_5b", [[480, 720], [256, 256]], [49]),
    ],
)
def test_clips_that_fit(case, model, size, frames):
    for count in frames:
        plan = plan_run(case.args(model=model, data={"video_size": size, "max_num_frames": count}))
        assert (plan.cached, plan.batch) == (False, BatchSizes(1, 1, 1))
        with pytest.raises(UserError, match=f"data.params.max_num_frames: got {count + 1};"):
            plan_run(case.args(model=model, data={"video_size": size, "max_num_frames": count + 1}))


def test_all_weights_at_the_rate_of_an_adapter_is_worth_a_warning(case, caplog):
    plan_run(case.args())
    assert "the learning rate 0.001 is for LoRA" in caplog.text
    caplog.clear()
    plan_run(case.args(network_config={"params": {"modules": {"lora_config": LORA}}}))
    assert not caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Refused runs
# ---------------------------------------------------------------------------------------------------------------------


def network(**params) -> dict:
    return {"network_config": {"params": params}}


QLORA_MODEL = network(modules={"lora_config": {**LORA, "params": {"r": 4, "qlora": True}}})


@pytest.mark.parametrize(
    ("flags", "changes", "says"),
    [
        (("--train_data", "gone"), {}, "train_data: gone does not exist"),
        (("--valid_data", "gone"), {}, "valid_data: gone does not exist"),
        (("--valid_data", "{folder}/cache"), {}, "/cache is a cache of latents and"),
        (("--load", "gone"), {}, "args.load: gone does not exist"),
        (("--lora_load", "{folder}/clips"), {}, "lora_load is given, but the model has no lora_config"),
        (("--save", "{folder}/vae.pt/runs"), {}, "save: {folder}/vae.pt/runs: {folder}/vae.pt is not a folder; name"),
        ((), {"first_stage_config": {"params": {"ckpt_path": "gone"}}}, "ckpt_path: gone does not exist"),
        ((), {"noised_image_input": True}, "noised_image_input is on, but this is a text-to-video model"),
        ((), network(in_channels=32), "model.noised_image_input is off, but this is an image-to-video model"),
        ((), {"data": {"max_num_frames": 50}}, "params.max_num_frames: got 50; this model takes 4k+1 frames up to 49"),
        ((), {"data": {"max_num_frames": 48}}, "up to 49, for example 49"),
        ((), {"data": {"max_num_frames": 81}}, "up to 49, for example 49"),
        ((), {"data": {"max_num_frames": 0}}, "max_num_frames: got 0; expected a positive number"),
        ((), {"data": {"fps": "8 fps"}}, "fps: got '8 fps'; expected a positive number"),
        ((), {"data": {"skip_frms_num": -1}}, "skip_frms_num: got -1; expected a number"),
        ((), {"data": {"video_size": [480, 712]}}, "width 712 does not fit; this model takes multiples of 16"),
        ((), {"data": {"video_size": [[480, 720], [720, 480]]}}, "height 720 does not fit"),
        ((), {"data": {"video_size": 480}}, "video_size: got 480; expected [height, width]"),
        (("--model_parallel_size", "2"), {}, "model_parallel_size: 2 does not divide the 1 process of"),
    ],
)  # fmt: skip
def test_refused(case, flags, changes, says):
    flags = [flag.format(folder=case.folder) for flag in flags]
    with pytest.raises(UserError) as error:
        plan_run(case.args(*flags, **changes))
    assert says.format(folder=case.folder) in str(error.value)


@pytest.mark.parametrize(
    ("size", "changes", "says"),
    [
        (4, {}, "model_parallel_size: got 4; it must divide the model's 30 heads"),
        (2, QLORA_MODEL, "model_parallel_size: got 2; processes cannot share an adapter with qlora"),
        (2, {"first_stage_config": {"params": {"cp_size": 4}}}, "cp_size is 4 and model_parallel_size 2"),
    ],
)
def test_networks_that_cannot_be_shared(case, monkeypatch, size, changes, says):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=says):
        plan_run(case.args("--model_parallel_size", str(size), **changes))


def test_frames_of_the_second_generation():
    limits = ModelLimits.from_config(load_configs([CONFIGS / "cogvideox1.5_5b.yaml"], used=())["model"])
    for frames, nearest in ((49, None), (85, 81), (87, 89), (169, 161), (5, 1)):
        if nearest is None:
            limits.check_training_clip(frames, 768, 1360)
            continue
        with pytest.raises(
            UserError, match=rf"{frames}; this model takes 8k\+1 frames up to 161, for example {nearest}$"
        ):
            limits.check_training_clip(frames, 768, 1360)


def test_data_without_a_name(case):
    args = case.args()
    args.train_data = []
    with pytest.raises(UserError, match="train_data: missing; name a folder"):
        plan_run(args)


# ---------------------------------------------------------------------------------------------------------------------
# Folders of runs
# ---------------------------------------------------------------------------------------------------------------------


def test_runs_of_the_same_minute_have_folders_of_their_own(case):
    args = case.args("--experiment_name", "disney")
    names = [new_run_folder(args, NOW).name for _ in range(3)]
    assert names == ["disney-03-07-09-05", "disney-03-07-09-05-2", "disney-03-07-09-05-3"]


def test_latest_is_the_run_of_this_name_that_saved_last(case):
    """Names cannot tell: they have no year."""
    case.run("finetune-12-31-23-59", 10, 20, saved_at=1)
    newest = case.run("finetune-01-01-00-01-2", 10, saved_at=2)
    case.run("finetune-more-01-01-00-02", 30, saved_at=3)
    (case.folder / "runs" / "finetune-01-01-00-03").mkdir()  # has not saved anything
    assert find_resume(case.args("--resume", "latest"), iteration_folder) == newest / "10"
    assert plan_run(case.args("--resume", "latest")).resume == newest / "10"


def test_latest_of_nothing_is_a_new_run(case, caplog):
    assert find_resume(case.args("--resume", "latest"), iteration_folder) is None
    assert "no run 'finetune' has saved anything" in caplog.text


def test_latest_of_a_complete_run_is_nothing_to_do(case):
    """So that a command which is started again and again ends well."""
    case.run("finetune-01-01-00-00", 10, 20)
    assert plan_run(case.args("--resume", "latest", "--train_iters", "20")).finished
    assert not plan_run(case.args("--resume", "latest", "--train_iters", "21")).finished


def test_a_path_names_a_run_or_one_of_its_iterations(case):
    run = case.run("any", 10, 20)
    assert find_resume(case.args("--resume", str(run)), iteration_folder) == run / "20"
    assert find_resume(case.args("--resume", str(run / "10")), iteration_folder) == run / "10"


def test_what_cannot_be_resumed(case):
    run = case.run("any", 10, 20)
    with pytest.raises(UserError, match=r"20 is at step 20 of 20; raise train_iters to continue"):
        plan_run(case.args("--resume", str(run), "--train_iters", "20"))
    with pytest.raises(UserError, match="resume: gone does not exist"):
        find_resume(case.args("--resume", "gone"), iteration_folder)
    (run / "latest").write_text("30")
    with pytest.raises(UserError, match="latest names 30, which does not exist"):
        find_resume(case.args("--resume", str(run)), iteration_folder)
    with pytest.raises(UserError, match=r"has no training_state/state\.json"):
        find_resume(case.args("--resume", str(case.folder / "clips")), iteration_folder)
