"""Convert a SwissArmyTransformer checkpoint and a VAE to a pipeline folder of diffusers.

  python tools/convert_weight_sat2hf.py --transformer_ckpt_path checkpoints/cogvideox_5b/transformer \\
      --vae_ckpt_path checkpoints/vae/3d-vae.pt --text_encoder_cache_dir checkpoints/t5-v1_1-xxl --output_path out
  python tools/convert_weight_sat2hf.py --transformer_ckpt_path ckpts/RUN --vae_ckpt_path VAE --output_path out --bf16

`--transformer_ckpt_path` is a run, one of its iterations (`1000`, `1000-ema`), a file, or a folder that DeepSpeed saved
under ZeRO. An adapter in the checkpoint, or given as `--lora_load`, is merged. The model is recognised by its tensors;
flags that describe the model are not needed, and are checked if given. Values that the tensors do not determine are
read from the run's training_config.yaml or `--base`; without these, they are those of the released model.

`CogVideoXPipeline.from_pretrained(out)` (or `CogVideoXImageToVideoPipeline`) loads the result; the scheduler is that of
the released pipeline. If only the network or only the VAE is given, only its folder is written. Exit codes: 0 the
folder is written, 2 the input has an error, and nothing is written.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox_sat.commands.input_paths import tell_places
from cogvideox_sat.commands.tool_parser import ToolParser, check_output_folder, locate_inputs, positive, run_tool
from cogvideox_sat.files.hub_upload import check_logged_in, upload
from sgm.errors import UserError

if TYPE_CHECKING:
    import torch

    from cogvideox_sat.conversion.model_sizes import ModelSizes
    from cogvideox_sat.conversion.network_sources import NetworkSource
    from cogvideox_sat.conversion.stored_weights import StoredWeights
    from cogvideox_sat.conversion.weight_family import NetworkFamily

logger = logging.getLogger(__name__)

GB = 10**9


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_tool(convert, arguments, logger.name)


def build_parser() -> ToolParser:
    """Return the parser of the command line."""
    parser = ToolParser(__doc__)
    add = parser.add_argument
    add(
        "--transformer_ckpt_path", type=Path, metavar="PATH", help="the network: a file, a run or one of its iterations"
    )
    add("--vae_ckpt_path", type=Path, metavar="PATH", help="the VAE, 3d-vae.pt")
    add("--text_encoder_cache_dir", type=Path, metavar="FOLDER", help="T5 and its tokenizer, copied into the pipeline")
    add("--output_path", type=Path, required=True, metavar="FOLDER", help="the pipeline")
    add("--typecast_text_encoder", action="store_true", help="convert T5 to --fp16 or --bf16, too")
    add("--push_to_hub", action="store_true", help="upload the result as the user of `hf auth login`")
    add(
        "--repo_id",
        metavar="NAME",
        help="repository to upload to (default: the name of --output_path, under that user)",
    )
    add("--lora_load", type=Path, metavar="PATH", help="an adapter to merge into the network")
    add("--lora_scale", type=float, default=1.0, help="strength of the adapter (default: 1)")
    add("--lora_alpha", type=positive, help="alpha of adapters (default: the value recorded beside each adapter, or 1)")
    add(
        "--base",
        type=Path,
        nargs="+",
        metavar="YAML",
        help="configuration of the model, for values that tensors do not determine",
    )
    add("--fp16", action="store_true", help="write float16 (default: the stored dtype)")
    add("--bf16", action="store_true", help="write bfloat16")
    add(
        "--max_shard_size",
        type=positive,
        default=5.0,
        metavar="GB",
        help="largest size of a file of tensors (default: 5)",
    )
    checked = parser.add_argument_group("checked if given")
    checked.add_argument("--num_layers", type=int)
    checked.add_argument("--num_attention_heads", type=int)
    checked.add_argument(
        "--use_rotary_positional_embeddings", action="store_true", help="the model is not the 2B model"
    )
    checked.add_argument("--i2v", action="store_true", help="the model is image-to-video")
    checked.add_argument("--version", choices=("1.0", "1.5"))
    checked.add_argument("--scaling_factor", type=positive, help="scale of latents; required for a VAE alone")
    checked.add_argument("--snr_shift_scale", type=positive)
    parser.add_writing_arguments()
    return parser


def convert(arguments: Sequence[str] | None) -> None:
    """Convert a checkpoint as the arguments say.

    Raises:
        UserError: arguments contradict each other, an input cannot be read, or the output cannot be written.
    """
    options = build_parser().parse_args(arguments)
    check_arguments(options)
    if options.push_to_hub and not options.dry_run:
        logger.info("the result will be uploaded by %s", check_logged_in())

    import torch

    from cogvideox_sat.conversion.model_sizes import title
    from cogvideox_sat.conversion.pipeline_writing import PipelineContent, write_pipeline
    from cogvideox_sat.conversion.text_encoder_files import check_text_encoder, text_files

    dtype = torch.float16 if options.fp16 else torch.bfloat16 if options.bf16 else None
    content = PipelineContent(text_dtype=dtype if options.typecast_text_encoder else None)
    if options.transformer_ckpt_path:
        content.family, content.sizes, content.parts["transformer"], content.tables = read_network(options, dtype)
        logger.info("%s is %s", options.transformer_ckpt_path, title(content.family))
        check_flags(options, content.family, content.sizes)
    if options.vae_ckpt_path:
        content.parts["vae"] = read_vae(options, content.family, content.sizes, dtype)
    if options.text_encoder_cache_dir:
        content.text_files = text_files(options.text_encoder_cache_dir)
        if content.family:
            check_text_encoder(content.text_files[0], content.family.text_hidden_size)
    if options.dry_run:
        return
    write_pipeline(content, options.output_path, int(options.max_shard_size * GB))
    logger.info("wrote %s", options.output_path)
    if options.push_to_hub:
        logger.info(
            "uploaded to %s", upload(options.output_path, options.repo_id or options.output_path.resolve().name)
        )


def check_arguments(options: Any) -> None:
    """Resolve the paths of inputs, and check what can be checked without reading weights.

    Raises:
        UserError: an input does not exist, arguments contradict each other, or the output exists.
    """
    sources = locate_inputs(
        options, "transformer_ckpt_path", "vae_ckpt_path", "text_encoder_cache_dir", "lora_load", "base"
    )
    if not options.transformer_ckpt_path and not options.vae_ckpt_path:
        raise UserError("nothing to convert: give --transformer_ckpt_path, --vae_ckpt_path or both")
    if options.fp16 and options.bf16:
        raise UserError("--fp16 and --bf16 are both given; choose one")
    if options.lora_load and not options.transformer_ckpt_path:
        raise UserError("--lora_load needs --transformer_ckpt_path, the network to merge the adapter into")
    if options.typecast_text_encoder and not options.text_encoder_cache_dir:
        raise UserError("--typecast_text_encoder needs --text_encoder_cache_dir, the text encoder")
    if options.typecast_text_encoder and not (options.fp16 or options.bf16):
        raise UserError("--typecast_text_encoder needs --fp16 or --bf16, the dtype to write")
    if options.repo_id and not options.push_to_hub:
        raise UserError("--repo_id needs --push_to_hub; give both or neither")
    check_output_folder(options.output_path, options, ["model_index.json", "transformer", "vae"], sources)
    tell_places()


def read_network(options: Any, dtype: "torch.dtype | None") -> tuple[Any, ...]:
    """Return family and sizes of the network, its part of the pipeline, and extra tables.

    The extra tables are those that diffusers' format does not store.

    Raises:
        UserError: the checkpoint is not a CogVideoX network.
    """
    from cogvideox_sat.conversion.assembled_weights import assembled, log_pieces
    from cogvideox_sat.conversion.diffusers_configs import transformer_config
    from cogvideox_sat.conversion.model_sizes import sizes_of_tables
    from cogvideox_sat.conversion.network_sources import open_network
    from cogvideox_sat.conversion.pipeline_writing import unreproducible
    from cogvideox_sat.conversion.weight_family import check_shapes, detect_network, table_shapes
    from cogvideox_sat.weights.diffusers_names import TABLES, check_divisible, to_diffusers

    source = open_network(options.transformer_ckpt_path, options.lora_load, options.lora_alpha, options.lora_scale)
    shapes = source.weights.shapes
    family = detect_network(shapes, source.name)
    tables = source.weights.select(name for name in TABLES if name in shapes)
    sizes = find_sizes(options, source, family, sizes_of_tables(tables, family, source.name))
    expected = table_shapes(family, sizes.grid(family.patch), sizes.text_length)
    given = {name: shape for name, shape in tables.shapes.items() if name in expected}
    check_shapes(given, {name: expected[name] for name in given}, source.name, ())
    config = transformer_config(family, sizes)
    pieces = to_diffusers(shapes, source.name)
    check_divisible(pieces, shapes, source.name)
    source_weights = source.weights.cast(dtype)
    extra = unreproducible(tables.cast(dtype), family, sizes)
    if options.dry_run:
        log_pieces(pieces, shapes)
        for name in tables:
            if not any(name == piece.name for parts in pieces.values() for piece in parts):
                kept = "stored beside diffusers' files" if name in extra else "follows from the sizes"
                logger.info("%s %s: %s", name, list(shapes[name]), kept)
    return family, sizes, (config, assembled(pieces, source_weights)), extra


def find_sizes(options: Any, source: "NetworkSource", family: "NetworkFamily", found: dict[str, Any]) -> "ModelSizes":
    """Return the sizes of the model that its tensors do not determine."""
    from cogvideox_sat.configuration.files import load_configs
    from cogvideox_sat.conversion.model_sizes import combined, released_config, sizes_of_config

    files = options.base or list(filter(None, [source.config]))
    if files:
        name = " ".join(map(str, files))
        config = load_configs(files, trusted=bool(options.base))
        sizes = combined(sizes_of_config(config, family, name), found, name)
        if options.vae_ckpt_path:
            check_norms(config, name)
        return sizes
    released = released_config(family)
    released["model"]["network_config"]["params"] |= family.parameters()
    return combined(sizes_of_config(released, family, "the released model"), found, None)


def check_flags(options: Any, family: "NetworkFamily", sizes: "ModelSizes") -> None:
    """Check that the given flags agree with the weights, else raise UserError."""
    import math

    from cogvideox_sat.conversion.model_sizes import title

    version = "1.5" if family.is_15 else "1.0"
    for flag, is_so in (("i2v", family.image_to_video), ("use_rotary_positional_embeddings", family.rotary)):
        if getattr(options, flag) and not is_so:
            raise UserError(
                f"--{flag} is given, but according to its weights the model is {title(family)}; leave it out"
            )
    for flag, value in (
        ("num_layers", family.num_layers),
        ("num_attention_heads", family.num_attention_heads),
        ("version", version),
    ):
        if getattr(options, flag) not in (None, value):
            raise UserError(f"--{flag} is {getattr(options, flag)}, but the weights have {value}; leave it out")
    for flag, factor in (("scaling_factor", sizes.scale_factor), ("snr_shift_scale", sizes.shift_scale)):
        given = getattr(options, flag)
        if given is not None and not math.isclose(given, factor, rel_tol=1e-6):
            raise UserError(
                f"--{flag} is {given:g}, but {title(family)} has {factor:g}; if this model differs, give its "
                "configuration as --base"
            )


def check_norms(config: dict[str, Any], name: str) -> None:
    """Check that a configuration has the VAE's norms of diffusers, else raise UserError.

    The tensors do not determine them.
    """
    from cogvideox_sat.configuration.yaml_reading import value_at
    from cogvideox_sat.conversion.diffusers_configs import NORM_GROUPS

    for coder in ("encoder_config", "decoder_config"):
        place = ("model", "first_stage_config", "params", coder, "params", "norm_groups")
        groups = value_at(config, *place) or NORM_GROUPS
        if groups != NORM_GROUPS:
            raise UserError(
                f"{name}: the VAE has norms of {groups} groups of channels; diffusers' pipelines have {NORM_GROUPS}"
            )


def read_vae(
    options: Any, family: "NetworkFamily | None", sizes: "ModelSizes | None", dtype: "torch.dtype | None"
) -> tuple[dict[str, Any], "StoredWeights"]:
    """Return the configuration and the weights of the VAE for diffusers.

    Raises:
        UserError: the file is not a CogVideoX autoencoder.
    """
    from cogvideox_sat.configuration.files import load_configs
    from cogvideox_sat.conversion.assembled_weights import log_pieces
    from cogvideox_sat.conversion.diffusers_configs import vae_config
    from cogvideox_sat.conversion.stored_weights import StoredWeights, open_weights
    from cogvideox_sat.conversion.weight_family import detect_autoencoder
    from cogvideox_sat.weights.diffusers_names import Piece
    from sgm.diffusers_vae_names import to_diffusers
    from sgm.modules.checkpoint import TRAINING_ONLY

    path = options.vae_ckpt_path
    if path.is_dir():
        raise UserError(f"--vae_ckpt_path is the folder {path}; name the file of the VAE's weights in it")
    weights = open_weights(path)
    weights = weights.select(name for name in weights if not name.startswith(TRAINING_ONLY))
    autoencoder = detect_autoencoder(weights.shapes, str(path))
    if options.base and family is None:
        check_norms(load_configs(options.base), " ".join(map(str, options.base)))
    if sizes is None and options.scaling_factor is None:
        raise UserError("--scaling_factor is needed for a VAE alone; give 1.15258426 for CogVideoX-2B, otherwise 0.7")
    scale = options.scaling_factor if sizes is None else sizes.scale_factor
    is_15 = options.version == "1.5" if family is None else family.is_15
    if family and family.out_channels != autoencoder.z_channels:
        raise UserError(
            f"{path} has latents of {autoencoder.z_channels} channels, but the network has {family.out_channels}; "
            "name the VAE of this model"
        )  # fmt: skip
    names = to_diffusers(weights)
    if options.dry_run:
        log_pieces({theirs: (Piece(ours),) for theirs, ours in names.items()}, weights.shapes)
    cast = weights.cast(dtype)
    renamed = StoredWeights({theirs: cast.entries[ours] for theirs, ours in names.items()})
    return vae_config(autoencoder, scale, is_15), renamed
