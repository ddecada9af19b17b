"""Test that configuration files merge in order, and errors name file and key.

Shipped files and files of other projects load too.
"""

from pathlib import Path

import pytest
import yaml

from arguments import get_args
from cogvideox_sat.configuration.files import check_paths, load_configs
from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.targets import iterate_targets, why_target_fails
from sgm.errors import UserError
from sgm.util import instantiate_from_config

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted(path.name for path in CONFIGS.glob("cogvideox*.yaml"))


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file in the test's folder and returns its path."""

    def write(name: str, content: dict | str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


# ---------------------------------------------------------------------------------------------------------------------
# Merging
# ---------------------------------------------------------------------------------------------------------------------


def test_later_files_override_earlier_ones(write):
    first = write("a.yaml", {"args": {"seed": 1, "load": "x"}, "model": {"sizes": [1, 2], "deep": {"a": 1, "b": 2}}})
    second = write("b.yaml", {"args": {"seed": 2}, "model": {"sizes": [3], "deep": {"b": 3}}})
    config = load_configs([first, second])
    assert config["args"] == {"seed": 2, "load": "x"}
    assert config["model"] == {"sizes": [3], "deep": {"a": 1, "b": 3}}
    assert load_configs([second, first])["args"]["seed"] == 1


def test_included_files_come_first_and_are_found_beside_the_one_that_includes_them(write):
    write("parts/a.yaml", {"include": "b.yaml", "args": {"seed": 1}})
    write("parts/b.yaml", {"args": {"seed": 0, "load": "b"}})
    write("c.yaml", {"args": {"load": "c"}})
    path = write("all.yaml", {"include": ["parts/a.yaml", "c.yaml"], "args": {"batch_size": 2}})
    assert load_configs([path]) == {"args": {"seed": 1, "load": "c", "batch_size": 2}}


def test_references_within_the_merged_files(write):
    first = write("a.yaml", {"args": {"load": "${args.output_dir}/x"}})
    second = write("b.yaml", {"args": {"output_dir": "y"}})
    assert load_configs([first, second])["args"]["load"] == "y/x"


def test_references_lead_to_the_arguments_of_the_command_line(write):
    path = write("a.yaml", {"args": {"contact_sheet": "${args.output_dir}/x", "output_dir": "y"}})
    assert load_configs([path], given={"output_dir": None})["args"]["contact_sheet"] == "y/x"
    config = load_configs([path], given={"output_dir": "z", "seed": 1})
    assert config["args"] == {"contact_sheet": "z/x", "output_dir": "y"}


def test_the_contact_sheet_of_the_tiny_model_is_beside_its_videos():
    base = ["--base", *(str(CONFIGS / "tiny" / name) for name in ("cogvideox_tiny.yaml", "inference.yaml"))]
    assert get_args(base).contact_sheet == "outputs/tiny/contact_sheet.png"
    assert get_args([*base, "--output-dir", "videos"]).contact_sheet == "videos/contact_sheet.png"
    assert get_args([*base, "--set", "args.output_dir=videos"]).contact_sheet == "videos/contact_sheet.png"
    assert get_args([*base, "--output_dir", "videos", "--contact_sheet", "a.png"]).contact_sheet == "a.png"


def test_an_empty_section_changes_nothing(write):
    first, second = write("a.yaml", {"args": {"seed": 1}}), write("b.yaml", "args:\nmodel:\n")
    assert load_configs([first, second]) == {"args": {"seed": 1}}


# ---------------------------------------------------------------------------------------------------------------------
# Files that load
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_its_arguments_and_a_clip_that_fits(name):
    args = get_args(["--base", str(CONFIGS / name), str(CONFIGS / "inference.yaml")])
    limits = ModelLimits.from_config(args.model_config)
    limits.check_mode(args.image2video, args.latent_channels)
    limits.check_clip(args.sampling_num_frames, *args.sampling_image_size)
    assert ("lora_config" in args.model_config["network_config"]["params"]["modules"]) == name.endswith("_lora.yaml")
    assert args.fp16 == ("2b" in name) and args.bf16 == ("5b" in name)


def test_all_five_families_and_their_lora_twins_are_there():
    families = {"cogvideox_2b", "cogvideox_5b", "cogvideox_5b_i2v", "cogvideox1.5_5b", "cogvideox1.5_5b_i2v"}
    assert set(MODELS) == {f"{family}{twin}.yaml" for family in families for twin in ("", "_lora")}


WILD = """
args:
  mode: inference
  load: "checkpoints/gone/transformer"
  batch_size: 1
  input_type: txt
  input_file: configs/test.txt
  sampling_num_frames: 3
  sampling_fps: 8
  fp16: True
  output_dir: outputs/
  force_inference: True
model:
  scale_factor: 1.15258426
  disable_first_stage_autocast: true
  not_trainable_prefixes: ['all']
  log_keys:
    - txt
  denoiser_config: &denoiser
    target: sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser
    params:
      num_idx: 1000
      quantize_c_noise: False
      weighting_config:
        target: sgm.modules.diffusionmodules.denoiser_weighting.EpsWeighting
      scaling_config:
        target: sgm.modules.diffusionmodules.denoiser_scaling.VideoScaling
      discretization_config: &schedule
        target: sgm.modules.diffusionmodules.discretizer.ZeroSNRDDPMDiscretization
        params:
          shift_scale: 3.0
  network_config:
    target: dit_video_concat.DiffusionTransformer
    params:
      time_embed_dim: 64
      elementwise_affine: True
      num_frames: 9
      time_compressed_rate: 4
      latent_width: 90
      latent_height: 60
      num_layers: 1
      patch_size: 2
      in_channels: 16
      out_channels: 16
      hidden_size: 128
      adm_in_channels: 256
      num_attention_heads: 2
      height_interpolation: 1.875
      width_interpolation: 1.875
      transformer_args:
        checkpoint_activations: True
        vocab_size: 1
        max_sequence_length: 64
        layernorm_order: pre
        skip_init: false
        model_parallel_size: 1
        is_decoder: false
      modules:
        pos_embed_config:
          target: dit_video_concat.Basic3DPositionEmbeddingMixin
          params:
            text_length: 226
        patch_embed_config:
          target: dit_video_concat.ImagePatchEmbeddingMixin
          params:
            text_hidden_size: 64
        adaln_layer_config:
          target: dit_video_concat.AdaLNMixin
          params:
            qk_ln: True
        final_layer_config:
          target: dit_video_concat.FinalLayerMixin
  conditioner_config:
    target: sgm.modules.GeneralConditioner
    params:
      emb_models:
        - is_trainable: false
          input_key: txt
          ucg_rate: 0.1
          target: sgm.modules.encoders.modules.FrozenT5Embedder
          params:
            model_dir: "t5-v1_1-xxl"
            max_length: 226
  first_stage_config:
    target: vae_modules.autoencoder.VideoAutoencoderInferenceWrapper
    params:
      cp_size: 1
      ckpt_path: "vae/3d-vae.pt"
      ignore_keys: ['loss']
      loss_config:
        target: torch.nn.Identity
      regularizer_config:
        target: vae_modules.regularizers.DiagonalGaussianRegularizer
      encoder_config:
        target: vae_modules.cp_enc_dec.ContextParallelEncoder3D
        params: &vae
          double_z: true
          z_channels: 16
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: 32
          ch_mult: [1, 2, 2, 4]
          attn_resolutions: []
          num_res_blocks: 1
          dropout: 0.0
          gather_norm: True
      decoder_config:
        target: vae_modules.cp_enc_dec.ContextParallelDecoder3D
        params: *vae
  loss_fn_config:
    target: sgm.modules.diffusionmodules.loss.VideoDiffusionLoss
    params:
      offset_noise_level: 0
      sigma_sampler_config:
        target: sgm.modules.diffusionmodules.sigma_sampling.DiscreteSampling
        params:
          uniform_sampling: True
          num_idx: 1000
          discretization_config: *schedule
  sampler_config:
    target: sgm.modules.diffusionmodules.sampling.VPSDEDPMPP2MSampler
    params:
      num_steps: 50
      verbose: True
      discretization_config: *schedule
      guider_config:
        target: sgm.modules.diffusionmodules.guiders.DynamicCFG
        params:
          scale: 6
          exp: 5
          num_steps: 50
data:
  target: someones_own_data.Dataset
deepspeed:
  train_micro_batch_size_per_gpu: 2
  fp16:
    enabled: True
"""


def test_one_flat_file_as_others_write_it(write):
    """One file holds all sections, without `sampling_image_size`."""
    args = get_args(["--base", str(write("wild.yaml", WILD))])
    assert (args.fp16, args.sampling_image_size, args.input_file) == (True, [480, 720], "configs/test.txt")
    ModelLimits.from_config(args.model_config).check_clip(args.sampling_num_frames, *args.sampling_image_size)
    for part in ("denoiser_config", "sampler_config", "loss_fn_config"):
        instantiate_from_config(args.model_config[part])
    network = instantiate_on_meta(args.model_config["network_config"])
    assert network.state_dict()["mixins.pos_embed.pos_embedding"].shape == (1, 226 + 3 * 30 * 45, 128)
    first_stage = args.model_config["first_stage_config"]
    first_stage["params"]["ckpt_path"] = None
    instantiate_from_config(first_stage)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


def test_a_file_that_includes_itself_is_named(write):
    write("a.yaml", {"include": "b.yaml"})
    path = write("b.yaml", {"include": "a.yaml"})
    with pytest.raises(UserError, match="includes itself"):
        load_configs([path])


def test_the_file_with_the_wrong_target_is_named(write):
    first = write("a.yaml", {"model": {"parts": [{"target": "torch.nn.Identity"}, {"target": "sgm.nothing.Thing"}]}})
    second = write("b.yaml", {"model": {"other": {"target": "torch.nn.Identity"}}})
    with pytest.raises(UserError, match=r"a\.yaml: model\.parts\[1\]\.target: sgm\.nothing\.Thing: module 'sgm"):
        load_configs([first, second])
    assert load_configs([first, second], used=("args",))


def test_invalid_yaml_is_named_with_its_line(write):
    with pytest.raises(UserError, match=r"a\.yaml, line 3: not valid YAML"):
        load_configs([write("a.yaml", "args:\n  seed: 1\n bad\n")])


@pytest.mark.parametrize("key", ["load", "lora_load", "ckpt_path", "model_dir"])
def test_paths_are_checked_wherever_they_are(tmp_path, key):
    check_paths({"model": [{"params": {key: str(tmp_path)}}]})
    check_paths({"model": [{"params": {key: None}}]})
    with pytest.raises(UserError, match=rf"model\.0\.params\.{key}: {tmp_path}/gone does not exist"):
        check_paths({"model": [{"params": {key: f"{tmp_path}/gone"}}]})


def test_a_name_on_a_hub_is_no_path():
    hub = {"params": {"model_dir": "google/t5-v1_1-xxl", "cache_dir": "cache"}}
    check_paths(hub)
    del hub["params"]["cache_dir"]
    with pytest.raises(UserError, match=r"params\.model_dir: .*google/t5-v1_1-xxl"):
        check_paths(hub)


@pytest.mark.parametrize("target", ["torch.nn.Identity", "sat.ops.FusedEmaAdam", "sgm.modules.GeneralConditioner"])
def test_targets_that_import(target):
    assert why_target_fails(target) is None


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("Identity", "not an import path"),
        ("torchh.nn.Identity", "module 'torchh' does not exist"),
        ("sgm.modules.nothing.Thing", "module 'sgm.modules.nothing' does not exist"),
        ("sgm.seeds.nothing", "module 'sgm.seeds' has no 'nothing'"),
        ("sgm.util.instantiate_from_config.deeper", "module 'sgm.util.instantiate_from_config' does not"),
    ],
)
def test_targets_that_do_not_import(target, reason):
    assert reason in why_target_fails(target)


def test_every_target_of_every_shipped_file_imports():
    files = [path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "parts"]
    assert len(files) > 10
    for path in files:
        assert all(why_target_fails(target) is None for _, target in iterate_targets(load_configs([path])))
