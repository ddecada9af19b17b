"""The exported file makes diffusers equal our engine with the adapter, without scales."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cogvideox_sat.conversion.lora_names import LORA_FILE
from cogvideox_sat.weights.checkpoint_files import NETWORK_PREFIX
from diffusers_network import build_diffusers_network, diffusers_rotary, map_weights
from lora_adapters import FAMILIES, AdaptedNetwork, adapted_network, random_adapter, save
from support import assert_close, relative_error
from tool_runs import error_of, error_on_a_full_disk
from tools.export_sat_lora_weight import main
from training_clips import write_dataset
from training_runs import assert_same, train, write_config


def export(checkpoint: Path, folder: Path, *flags: str) -> Path:
    assert main(["--sat_pt_path", str(checkpoint), "--lora_save_directory", str(folder), *flags]) == 0
    return folder / LORA_FILE


def content(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def diffusers_pipeline(adapted: AdaptedNetwork):
    """Return a pipeline around the base network, with nothing else in it."""
    import diffusers

    transformer = build_diffusers_network(adapted.params)
    weights = map_weights(adapted.loaded(adapted.folder / "base").state_dict())
    if not transformer.config.use_rotary_positional_embeddings:
        weights.pop("patch_embed.pos_embedding")  # diffusers computes its own
    transformer.load_state_dict(weights)
    name = "CogVideoXImageToVideoPipeline" if "i2v" in adapted.case["kind"] else "CogVideoXPipeline"
    scheduler = diffusers.CogVideoXDPMScheduler()
    return getattr(diffusers, name)(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler
    )


@torch.no_grad()
def diffusers_output(pipe, adapted: AdaptedNetwork) -> torch.Tensor:
    x, timesteps, context = adapted.inputs()
    return pipe.transformer(
        hidden_states=x,
        encoder_hidden_states=context,
        timestep=timesteps,
        ofs=adapted.ofs,
        image_rotary_emb=diffusers_rotary(adapted.params, adapted.network.patch_grid(x)),
        return_dict=False,
    )[0]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> AdaptedNetwork:
    return adapted_network(tmp_path_factory.mktemp("adapted"), "t2v_5b", alpha=3)


@pytest.mark.parametrize(
    ("name", "alpha", "flags"),
    [
        *((name, alpha, ()) for name, alpha in zip(FAMILIES, (None, 1, 6, 2.5, 4), strict=True)),
        ("t2v_2b", 2.5, ("--fold_scale",)),
    ],
)
def test_diffusers_with_the_file_equals_our_engine_with_the_adapter(tmp_path, name, alpha, flags):
    adapted = adapted_network(tmp_path, name, alpha=alpha)
    expected = adapted.output()
    pipe = diffusers_pipeline(adapted)
    assert relative_error(diffusers_output(pipe, adapted), expected) > 0.01  # the adapter matters
    pipe.load_lora_weights(str(export(tmp_path / "run", tmp_path / "exported", *flags).parent))
    assert_close(diffusers_output(pipe, adapted), expected, 1e-4)


def test_every_form_of_checkpoint_gives_the_same_file(adapted, tmp_path):
    expected = content(export(adapted.folder / "run", tmp_path / "run"))
    adapter = adapted.folder / "run" / "10"
    for i, path in enumerate([adapted.folder / "full", adapter, adapter / "mp_rank_00_model_states.pt"]):
        tensors, metadata = content(export(path, tmp_path / str(i)))
        assert metadata == expected[1]
        assert_same(tensors, expected[0])


def test_alpha_and_rank_are_in_the_header(adapted, tmp_path):
    def header(*flags: str) -> dict:
        with safe_open(export(adapted.folder / "run", tmp_path, "--overwrite", *flags), "pt") as file:
            assert len(file.keys()) == 2 * 4 * adapted.params["num_layers"]
            return json.loads(file.metadata()["lora_adapter_metadata"])

    assert (header()["transformer.r"], header()["transformer.lora_alpha"]) == (4, 3)
    assert header("--lora_alpha", "0.5")["transformer.lora_alpha"] == 0.5
    assert header("--fold_scale")["transformer.lora_alpha"] == 4


def test_alpha_is_not_rounded_and_values_are_not_judged(tmp_path):
    """1/49 * 49 is less than 1 in floating point; NaN is copied like any other value."""
    random_adapter(tmp_path / "run", width=8, layers=1, rank=49)
    (file,) = (tmp_path / "run").rglob("*.pt")
    weights = torch.load(file)
    next(tensor for name, tensor in weights["module"].items() if "matrix_B" in name)[0, 0] = float("nan")
    torch.save(weights, file)
    tensors, header = content(export(tmp_path / "run", tmp_path / "exported", "--lora_alpha", "1"))
    assert json.loads(header["lora_adapter_metadata"])["transformer.lora_alpha"] == 1
    assert any(tensor.isnan().any() for tensor in tensors.values())


def test_some_layers_alone(tmp_path, caplog):
    caplog.set_level("INFO")
    adapted = adapted_network(tmp_path, "t2v_5b")
    kept = {name: tensor for name, tensor in adapted.adapter.items() if ".layers.1." in name}
    pipe = diffusers_pipeline(adapted)
    pipe.load_lora_weights(str(export(save(kept, tmp_path / "some", "1"), tmp_path / "exported").parent))
    for name, tensor in adapted.network.named_parameters():
        if ".layers.0." in name and ".matrix_B." in name:
            tensor.data.zero_()
    assert_close(diffusers_output(pipe, adapted), adapted.output(), 1e-4)
    assert "no training_config.yaml beside it, so alpha is assumed to be 1" in caplog.text


def test_a_dry_run_shows_the_key_map_and_writes_nothing(adapted, tmp_path, caplog):
    command = ["--sat_pt_path", str(adapted.folder / "run"), "--lora_save_directory", str(tmp_path / "a" / "b")]
    caplog.set_level("INFO")
    assert main([*command, "--dry_run"]) == 0
    assert (
        "transformer.layers.1.attention.query_key_value.matrix_B.2 -> "
        "transformer.transformer_blocks.1.attn1.to_v.lora_B.weight [64, 4] float32"
    ) in caplog.text
    assert not (tmp_path / "a").exists()


def test_a_file_that_exists_stays(adapted, tmp_path, caplog):
    file = export(adapted.folder / "run", tmp_path)
    before = file.read_bytes()
    command = ["--sat_pt_path", adapted.folder / "run", "--lora_save_directory", tmp_path, "--lora_alpha", "9"]
    assert f"{file} exists; give --overwrite" in error_of(main, caplog, *command)
    assert file.read_bytes() == before
    export(adapted.folder / "run", tmp_path, "--lora_alpha", "9", "--overwrite")
    assert file.read_bytes() != before
    assert list(tmp_path.iterdir()) == [file]


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_bad_input(adapted, tmp_path, caplog):
    """One line each, and nothing is left where the file would have been."""
    adapter, out = adapted.adapter, tmp_path / "out"
    first = "transformer.layers.0.attention.query_key_value.matrix_"

    def message(path: Path, *flags: str) -> str:
        text = error_of(main, caplog, "--sat_pt_path", path, "--lora_save_directory", out, *flags)
        assert not out.exists()
        return text

    def changed(name: str, **changes: torch.Tensor | None) -> Path:
        weights = {**adapter, **{first + key.replace("_", "."): value for key, value in changes.items()}}
        return save({key: value for key, value in weights.items() if value is not None}, tmp_path / name, "1")

    assert "nowhere does not exist" in message(tmp_path / "nowhere")
    assert "holds no adapter" in message(adapted.folder / "base")
    ranks = changed("ranks", A_1=torch.zeros(8, 64), B_1=torch.zeros(64, 8))
    assert "the rank differs between layers: 8 (layer 0 to_k), 4 (layer 0 to_out.0)" in message(ranks)
    assert "layer 0 to_v has a matrix A but no matrix B" in message(changed("half", B_2=None))
    assert "layer 0 has no to_v" in message(changed("third", A_2=None, B_2=None))
    assert "the width differs" in message(changed("width", A_0=torch.zeros(4, 32)))
    assert "modules that CogVideoX does not have" in message(changed("fourth", A_3=torch.zeros(4, 64)))
    assert "is not a positive number" in message(adapted.folder / "run", "--lora_alpha", "0")

    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes((adapted.folder / "run" / "10" / "mp_rank_00_model_states.pt").read_bytes()[:-3000])
    assert "damaged" in message(truncated)
    torch.save({"module": {NETWORK_PREFIX + first + "A.0": Code(tmp_path / "was_run")}}, tmp_path / "code.pt")
    assert "code in a weight file is never run" in message(tmp_path / "code.pt")
    assert not (tmp_path / "was_run").exists()

    run = tmp_path / "run"
    save(adapter, run, "1")
    config = (adapted.folder / "run" / "training_config.yaml").read_text()
    (run / "training_config.yaml").write_text(config.replace("r: 4", "r: 8"))
    assert "is of an adapter of rank 8" in message(run)
    (run / "training_config.yaml").write_text(config.replace("lora_alpha: 3", "lora_alpha: many"))
    assert "lora_alpha: got 'many'" in message(run)


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(adapted, tmp_path):
    out = tmp_path / "new" / "out"
    arguments = ("--sat_pt_path", adapted.folder / "run", "--lora_save_directory", out)
    line = error_on_a_full_disk("export_sat_lora_weight.py", 2**13, *arguments)
    assert line.startswith(f"error: cannot write {out / LORA_FILE}")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_of_the_trainer(tiny, tmp_path):
    """Two steps of training, also averaged; alpha comes from the run's files."""
    clips = write_dataset(tmp_path / "data", clips=2, frames=9, sizes=[(64, 96)])
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips, lora=True, train_iters=2)
    run = train(config)
    for name, path in (("run", run), ("average", run / "2-ema")):
        with safe_open(export(path, tmp_path / name), "pt") as file:
            metadata = json.loads(file.metadata()["lora_adapter_metadata"])
            assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (4, 1)
            up = [file.get_tensor(key) for key in file.keys() if "lora_B" in key]  # noqa: SIM118
        assert len(up) == 2 * 4
        assert any(tensor.any() for tensor in up)  # `up` starts at zero
    assert (tmp_path / "run" / LORA_FILE).read_bytes() != (tmp_path / "average" / LORA_FILE).read_bytes()
