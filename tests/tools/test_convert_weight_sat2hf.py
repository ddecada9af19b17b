"""Every kind of checkpoint becomes a pipeline for diffusers; errors leave nothing."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import processes
from cogvideox_sat.tool_commands.convert_weight_sat2hf import check_norms
from cogvideox_sat.weights.diffusers_names import assemble, to_diffusers
from pipelines import FAMILIES, assert_identical, checkpoint, convert, pipelines  # noqa: F401
from sgm.weights import read_state_dict
from tool_runs import assert_told_before_pytorch, error_of
from tools.convert_weight_sat2hf import main

ROOT = Path(__file__).parents[2]
PREFIX = "model.diffusion_model."


# Twice, the second time to replace a folder; every file may have 300 kB at most, as on a disk that is full.
FULL_DISK = """
import resource, sys
from pathlib import Path
from tools.convert_weight_sat2hf import main
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
assert main(sys.argv[1:]) == 2
out = Path(sys.argv[-1])
assert not out.parent.exists()
out.mkdir(parents=True)
(out / "model_index.json").touch()
assert main([*sys.argv[1:], "--overwrite"]) == 2
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "sat")]), "OMP_NUM_THREADS": "1"}


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def mistake(caplog, *arguments) -> str:
    return error_of(main, caplog, *arguments)


def written(folder: Path) -> dict[str, torch.Tensor]:
    return read_state_dict(folder / "transformer")


def expected(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    return {name: assemble(pieces, plain) for name, pieces in to_diffusers(plain).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_the_pipeline(tiny, pipelines, family):  # noqa: F811
    """Nothing is missing or unexpected; text encoder and tokenizer are in their places."""
    import diffusers

    folder = pipelines / family
    for name, part in (("CogVideoXTransformer3DModel", "transformer"), ("AutoencoderKLCogVideoX", "vae")):
        _, info = getattr(diffusers, name).from_pretrained(folder, subfolder=part, output_loading_info=True)
        assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    image = "ImageToVideo" if family.endswith("i2v") else ""
    assert type(pipe).__name__ == f"CogVideoX{image}Pipeline"
    assert type(pipe.scheduler).__name__ == f"CogVideoX{'DDIM' if family == '2b' else 'DPM'}Scheduler"
    assert pipe.scheduler.config.snr_shift_scale == (3.0 if family == "2b" else 1.0)
    assert pipe.vae.config.scaling_factor == (1.15258426 if family == "2b" else 0.7)
    assert pipe.tokenizer("a b").input_ids and pipe.text_encoder.config.d_model == 64
    assert_identical(written(folder), expected(checkpoint(tiny.folder / family)))


def test_averages_shards_and_dtypes(tiny, tmp_path):
    """An `-ema` folder becomes bfloat16 files of at most a megabyte, with an index."""
    import diffusers

    weights = checkpoint(tiny.folder / "5b")
    averages = {name: tensor * 0.5 for name, tensor in weights.items() if "pos_embed.freqs" not in name}
    averages |= {name: weights[name] for name in weights.keys() - averages.keys()}
    (tmp_path / "run" / "20-ema").mkdir(parents=True)
    torch.save({"module": averages}, tmp_path / "run" / "20-ema" / "mp_rank_00_model_states.pt")
    (tmp_path / "run" / "latest").write_text("20")
    source = tmp_path / "run" / "20-ema"
    out = tmp_path / "out"
    assert run("--transformer_ckpt_path", source, "--output_path", out, "--bf16", "--max_shard_size", 0.001) == 0
    assert len(list((out / "transformer").glob("*-of-*.safetensors"))) > 3
    half = {name: tensor.bfloat16() for name, tensor in expected(averages).items()}
    assert_identical(written(out), half)
    model = diffusers.CogVideoXTransformer3DModel.from_pretrained(out / "transformer", torch_dtype=torch.bfloat16)
    assert_identical(dict(model.state_dict()), half)
    config = json.loads((out / "transformer" / "config.json").read_text())
    assert (config["sample_frames"], config["sample_height"], config["sample_width"]) == (17, 16, 24)  # of its tables
    assert not (out / "model_index.json").exists() and not (out / "vae").exists()


def test_an_adapter_of_a_run_is_merged_with_what_it_was_trained_on(tiny, tmp_path):
    """The run's configuration gives the base and alpha, as in our engine."""
    weights = checkpoint(tiny.folder / "1.5")
    generator = torch.Generator().manual_seed(0)
    adapter, scale = {}, 2.0 / 3
    for layer in range(2):
        for module, parts in (("query_key_value", 3), ("dense", 1)):
            name = f"{PREFIX}transformer.layers.{layer}.attention.{module}"
            deltas = []
            for i in range(parts):
                a, b = torch.randn(3, 256, generator=generator), torch.randn(256, 3, generator=generator)
                adapter |= {f"{name}.matrix_A.{i}": a, f"{name}.matrix_B.{i}": b}
                deltas.append(scale * b @ a)
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + torch.cat(deltas)
    run_folder = tmp_path / "run"
    (run_folder / "7").mkdir(parents=True)
    torch.save({"module": adapter}, run_folder / "7" / "mp_rank_00_model_states.pt")
    (run_folder / "latest").write_text("7")
    alone = ["--transformer_ckpt_path", tiny.folder / "1.5", "--lora_load", run_folder, "--lora_alpha", 2]
    assert run(*alone, "--output_path", tmp_path / "beside") == 0
    config = yaml.safe_load(tiny.config("1.5").read_text())
    lora = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 3, "lora_alpha": 2}}
    config["model"]["network_config"]["params"]["modules"]["lora_config"] = lora
    (run_folder / "training_config.yaml").write_text(yaml.safe_dump(config))
    assert run("--transformer_ckpt_path", run_folder, "--output_path", tmp_path / "own") == 0
    for name, tensor in expected(weights).items():
        assert torch.allclose(written(tmp_path / "own")[name], tensor, atol=1e-4), name
    assert_identical(written(tmp_path / "own"), written(tmp_path / "beside"))
    # Only the run's configuration knows how large the clips were.
    frames = [
        json.loads((tmp_path / n / "transformer" / "config.json").read_text())["sample_frames"]
        for n in ("own", "beside")
    ]
    assert frames == [17, 81]


def test_a_dry_run_shows_the_map_and_writes_nothing(tiny, tmp_path, caplog):
    parts = ("--transformer_ckpt_path", tiny.folder / "5b_i2v", "--vae_ckpt_path", tiny.folder / "vae.pt")
    caplog.set_level("INFO")
    assert run(*parts, "--output_path", tmp_path / "out", "--dry_run") == 0
    for line in (
        "transformer_blocks.0.attn1.to_k.bias [256] <- transformer.layers.0.attention.query_key_value.bias [2/3]",
        "patch_embed.pos_embedding [1, 544, 256] <- mixins.pos_embed.pos_embedding",
        "mixins.pos_embed.freqs_cos [480, 64]: follows from the sizes",
        "transformer.position_embeddings.weight [64, 256]: stored beside diffusers' files",
        "encoder.down_blocks.0.resnets.0.conv1.conv.bias [32] <- encoder.down.0.block.0.conv1.conv.bias",
    ):
        assert line in caplog.messages, line
    assert not list(tmp_path.iterdir())


def test_overwriting(tiny, tmp_path, caplog):
    out = convert(tiny, "2b", tmp_path / "out")
    (out / "old").touch()
    parts = ("--transformer_ckpt_path", tiny.folder / "2b", "--output_path", out)
    assert "exists; give --overwrite" in mistake(caplog, *parts)
    assert run(*parts, "--overwrite") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and [path.name for path in out.iterdir()] == [
        "transformer"
    ]
    inside = ("--transformer_ckpt_path", tiny.folder / "2b", "--output_path", tiny.folder, "--overwrite")
    assert "is read from and cannot be written to" in mistake(caplog, *inside)
    assert (tiny.folder / "2b" / "latest").exists()


def test_flags_that_are_right_are_taken_and_wrong_ones_refused(tiny, tmp_path, caplog):
    parts = ("--transformer_ckpt_path", tiny.folder / "5b_i2v", "--output_path", tmp_path / "out", "--dry_run")
    right = ("--num_layers", 2, "--num_attention_heads", 4, "--use_rotary_positional_embeddings", "--i2v")
    right += ("--version", "1.0", "--scaling_factor", 0.7, "--snr_shift_scale", 1.0, "--fp16")
    assert run(*parts, *right) == 0
    for flags, message in (
        (("--num_layers", 30), "--num_layers is 30, but the weights have 2"),
        (("--num_attention_heads", 48), "--num_attention_heads is 48, but the weights have 4"),
        (("--version", "1.5"), "--version is 1.5, but the weights have 1.0"),
        (("--scaling_factor", 1.15258426), "--scaling_factor is 1.15258, but CogVideoX-5B-I2V"),
        (("--snr_shift_scale", 3), "--snr_shift_scale is 3, but"),
        (
            ("--base", ROOT / "configs" / "cogvideox_5b.yaml"),
            "cogvideox_5b.yaml is of another model: it has num_layers 42",
        ),
    ):
        assert message in mistake(caplog, *parts, *flags)
    text_to_video = ("--transformer_ckpt_path", tiny.folder / "2b", "--output_path", tmp_path / "out")
    assert "--i2v is given, but according to its weights" in mistake(caplog, *text_to_video, "--i2v")
    assert "--use_rotary" in mistake(caplog, *text_to_video, "--use_rotary_positional_embeddings")
    vae = ("--vae_ckpt_path", tiny.folder / "vae.pt", "--output_path", tmp_path / "out")
    assert "--scaling_factor is needed for a VAE alone" in mistake(caplog, *vae)
    assert not list(tmp_path.iterdir())
    groups = {"first_stage_config": {"params": {"decoder_config": {"params": {"norm_groups": 4}}}}}
    base = ("--base", tiny.variant("2b", tmp_path / "groups.yaml", model=groups))
    for more in ((), ("--transformer_ckpt_path", tiny.folder / "2b")):
        assert "groups.yaml: the VAE has norms of 4 groups" in mistake(caplog, *vae, *more, *base)
    for coder in (None, {"params": None}):  # a part without settings has the usual norms
        check_norms({"model": {"first_stage_config": coder}}, "empty.yaml")


def test_mistakes_are_told_before_pytorch_comes_in(tiny, tmp_path):
    network, out = str(tiny.folder / "2b"), str(tmp_path / "out")
    cases = {
        "/nowhere does not exist": [
            "--transformer_ckpt_path",
            "/nowhere",
            "--output_path",
            out,
        ],
        "nothing to convert": ["--output_path", out],
        "--fp16 and --bf16": ["--transformer_ckpt_path", network, "--output_path", out, "--fp16", "--bf16"],
        "exists; give --overwrite": ["--transformer_ckpt_path", network, "--output_path", str(tmp_path)],
        "--output_path": ["--transformer_ckpt_path", network],
        "--lora_load needs": ["--vae_ckpt_path", network, "--lora_load", network, "--output_path", out],
        "is not a positive number": ["--vae_ckpt_path", network, "--scaling_factor", "-1", "--output_path", out],
        "unrecognized arguments: --vae": ["--vae", network, "--output_path", out],
    }
    assert_told_before_pytorch(
        "convert_weight_sat2hf", {message: (arguments, message) for message, arguments in cases.items()}
    )


class Evil:
    """Unpickling it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_bad_files_are_one_line_and_leave_nothing(tiny, tmp_path, caplog):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    good = tiny.folder / "2b" / "1" / "mp_rank_00_model_states.pt"
    (source / "cut.pt").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    torch.save({"module": Evil(tmp_path / "evil")}, source / "evil.pt")
    weights = checkpoint(tiny.folder / "2b")
    torch.save(
        {"module": {name: t for name, t in weights.items() if "layers.1.mlp.dense_4h" not in name}}, source / "less.pt"
    )
    torch.save({"lm_head.weight": torch.zeros(3)}, source / "other.pt")
    torch.save(
        {"module": {**weights, f"{PREFIX}mixins.patch_embed.proj.bias": torch.full((256,), 1e30)}}, source / "large.pt"
    )
    save_file(expected(weights), source / "diffusion_pytorch_model.safetensors")
    torch.save(load_file(source / "diffusion_pytorch_model.safetensors"), source / "names.pt")
    torch.save(
        {"module": {f"{PREFIX}transformer.layers.0.attention.dense.matrix_A.0": torch.zeros(2, 256)}},
        source / "half.pt",
    )
    for name, message in (
        ("cut.pt", "it is damaged or not a PyTorch file"),
        ("evil.pt", "code in a weight file is never run"),
        ("less.pt", "lacks transformer.layers.1.mlp.dense_4h_to_h.weight"),
        ("other.pt", "is not a CogVideoX network"),
        ("names.pt", "is not a CogVideoX network"),
        ("large.pt", "mixins.patch_embed.proj.bias is out of the range of float16"),
        ("diffusion_pytorch_model.safetensors", "already has the form of diffusers"),
        ("half.pt", "has a matrix A but no matrix B"),
    ):
        line = mistake(caplog, "--transformer_ckpt_path", source / name, "--output_path", out, "--fp16")
        assert message in line
        assert (str(source) in line) == (name != "large.pt"), line  # this error appears while another file is written
    vae = ("--transformer_ckpt_path", good, "--vae_ckpt_path")
    assert "is not a CogVideoX autoencoder" in mistake(caplog, *vae, good, "--output_path", out)
    text = ("--text_encoder_cache_dir", source)
    assert "no T5 encoder" in mistake(caplog, *vae, tiny.folder / "vae.pt", *text, "--output_path", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_behind(tiny, tmp_path):
    """Neither a new folder nor a loss of the one that was to be replaced."""
    out = tmp_path / "a" / "out"
    command = ["-c", FULL_DISK, "--transformer_ckpt_path", tiny.folder / "2b", "--output_path", out]
    result = processes.run(command, env=environment())
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(lines) == 2 and all(f"cannot write {out}: File too large" in line for line in lines)
    assert [path.name for path in out.parent.rglob("*")] == ["out", "model_index.json"]


def test_a_cache_of_the_hub_as_text_encoder(tiny, tmp_path, pipelines):  # noqa: F811
    """The hub client's cache layout works; pickles beside safetensors are left out."""
    snapshot = tmp_path / "cache" / "models--google--t5-v1_1-xxl" / "snapshots" / "abc"
    shutil.copytree(tiny.folder / "t5", snapshot)
    (snapshot / "pytorch_model.bin").touch()
    parts = ("--transformer_ckpt_path", tiny.folder / "2b", "--text_encoder_cache_dir", tmp_path / "cache")
    assert run(*parts, "--output_path", tmp_path / "out") == 0
    names = {path.name: path.read_bytes() for path in (pipelines / "2b" / "text_encoder").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "text_encoder").iterdir()} == names


# ---------------------------------------------------------------------------------------------------------------------
# Flags of the public tool
# ---------------------------------------------------------------------------------------------------------------------


def test_the_text_encoder_is_cast_if_asked(tiny, tmp_path):
    import transformers

    convert(tiny, "2b", tmp_path / "out", "--bf16", "--typecast_text_encoder", "--max_shard_size", "0.0001")
    folder = tmp_path / "out" / "text_encoder"
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    _, info = transformers.T5EncoderModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = read_state_dict(folder)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    before = read_state_dict(tiny.folder / "t5")
    assert_identical(stored, {name: tensor.bfloat16() for name, tensor in before.items()})
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


class Hub:
    """Stands for the hub's client: it knows a user, or none."""

    uploads: list = []  # noqa: RUF012
    user = "someone"

    def whoami(self):
        if self.user is None:
            raise OSError("Token is required, but no token found")
        return {"name": self.user}

    def create_repo(self, repo_id, exist_ok):
        from types import SimpleNamespace

        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"{self.user}/{repo_id}")

    def upload_folder(self, repo_id, folder_path):
        self.uploads.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def test_a_pipeline_is_uploaded_by_the_user_of_the_hubs_client(tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "uploads", [])
    convert(tiny, "2b", tmp_path / "mine", "--push_to_hub")
    convert(tiny, "2b", tmp_path / "other", "--push-to-hub", "--repo_id", "team/model")
    files = ["model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"]
    assert Hub.uploads == [("someone/mine", files), ("team/model", files)]
    monkeypatch.setattr(Hub, "user", None)
    flags = ["--vae_ckpt_path", tiny.folder / "vae.pt", "--scaling_factor", "1", "--output_path", tmp_path / "new"]
    message = mistake(caplog, *flags, "--push_to_hub")
    assert "no token found" in message and "hf auth login" in message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--typecast_text_encoder"], "needs --text_encoder_cache_dir"),
        (["--typecast_text_encoder", "--text_encoder_cache_dir", "."], "needs --fp16 or --bf16"),
        (["--repo_id", "a/b"], "--repo_id needs --push_to_hub"),
    ],
)
def test_flags_that_need_others(tiny, tmp_path, caplog, flags, says):
    assert says in mistake(caplog, "--vae_ckpt_path", tiny.folder / "vae.pt", "--output_path", tmp_path / "o", *flags)
