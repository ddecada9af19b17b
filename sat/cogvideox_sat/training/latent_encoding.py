"""Fill a cache of latents: the part of `tools/precompute_latents.py` with PyTorch.

Every process encodes the samples rank, rank + world size, ... into its own shards, and skips those that are already in
a shard. An interrupted run therefore continues where it was, on any number of processes.
"""

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cogvideox_sat.clips.batch_order import SampleKey
from cogvideox_sat.clips.loader import ClipLoader
from cogvideox_sat.clips.transforms import Framing
from cogvideox_sat.configuration.memory_advice import precompute_advice
from cogvideox_sat.configuration.model_checks import check_model
from cogvideox_sat.configuration.model_section import conditions_on_key_frames
from cogvideox_sat.configuration.settings import DataSettings, EngineSettings
from cogvideox_sat.configuration.training_arguments import TrainingArguments
from cogvideox_sat.engine.parts import PARTS
from cogvideox_sat.engine_choice import build_engine, is_overridden
from cogvideox_sat.parallel import process_watch
from cogvideox_sat.parallel.agreement import limited_collectives, meet
from cogvideox_sat.parallel.devices import choose_device, settle_precision
from cogvideox_sat.parallel.process_failures import failing_together
from cogvideox_sat.parallel.process_groups import destroy_process_groups, initialize_process_groups
from cogvideox_sat.runs.clips import same_dataset
from cogvideox_sat.runs.datasets import make_dataset
from cogvideox_sat.training.latent_cache_folder import check_folder, describe, finish, prepare_folder
from cogvideox_sat.training.latent_cache_shards import OpenShard, new_shards
from cogvideox_sat.training.sample_encoder import Encoder
from diffusion_video import SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.memory_errors import memory_guard
from sgm.seeds import sample_seed

logger = logging.getLogger(__name__)


def run(
    args: TrainingArguments, output: Path, store: str = "moments", dtype: str | None = None, image_variants: int = 0
) -> int:
    """Encode the missing samples of `args.train_data` into a cache; return the exit code.

    Args:
        output: folder of the cache.
        store: one of `clips.latent_cache.STORES`.
        dtype: stored dtype, "float32", "bfloat16" or "float16"; None: that of the computation.
        image_variants: number of first frames to encode per clip, each with the noise of another epoch.

    Raises:
        UserError: the data or the model cannot be read, or `output` holds something else, or cannot be written.
    """
    initialize_process_groups(limit=args.collective_timeout)
    try:
        with limited_collectives(args.collective_timeout):
            fill_cache(args, output, store, dtype, image_variants)
        return 0
    finally:
        destroy_process_groups()


def fill_cache(args: TrainingArguments, output: Path, store: str, dtype: str | None, image_variants: int) -> None:
    """Encode the missing samples of the cache; see `run`."""
    device = choose_device(args.device)
    args = settle_precision(args, device)
    check_model(EngineSettings.from_args(args), PARTS[:2])  # before weights and clips are read
    engine = build_engine(EngineSettings.from_args(without_context_parallel(args)), (), device)
    check_encodes_moments(engine)
    dataset = same_dataset(
        lambda: make_dataset(args.train_data, DataSettings.from_args(args), repeats=args.train_data_repeats),
        "the clips of train_data",
    )
    if getattr(dataset, "framing", Framing()) != Framing():
        logger.info("crops and mirrored clips in the cache are those of the first epoch, also in later ones")
    encoding = encoding_of(args, engine, store, dtype, image_variants)
    description = describe(args, dataset, encoding)
    done = check_folder(output, description, dataset)
    wait_for_all()  # the next step changes the folder that the other processes check
    if dist.get_rank() == 0:
        prepare_folder(output, description)
    wait_for_all()
    todo = [index for index in range(dist.get_rank(), len(dataset), dist.get_world_size()) if index not in done]
    with failing_together(), process_watch.phase("encoding clips"), memory_guard("encoding", precompute_advice(args)):
        encode_samples(Encoder(engine, encoding), dataset, todo, output, args)
    wait_for_all()
    if dist.get_rank() == 0:
        finish(output, dataset)


def check_encodes_moments(engine: SATVideoDiffusionEngine) -> None:
    """Check that an engine encodes clips as a cache does, else raise UserError.

    An engine of the user's own may encode clips in another way.
    """
    if is_overridden(engine, "encode_first_stage") and not is_overridden(engine, "encode_moments"):
        raise UserError(
            f"model.target: {type(engine).__name__} encodes clips in its own way (encode_first_stage), which a "
            "cache does not use; give it encode_moments too, or train on the clips themselves"
        )


def encoding_of(
    args: TrainingArguments, engine: SATVideoDiffusionEngine, store: str, dtype: str | None, image_variants: int
) -> dict[str, Any]:
    """Return the section `encoding` of `cache.json`; the arguments are those of `run`."""
    encoding = {
        "store": store,
        "dtype": dtype or str(engine.dtype).removeprefix("torch."),
        "computed_in": str(engine.dtype).removeprefix("torch."),
        "tile_size": args.vae_tile_size or args.model_config["first_stage_config"]["params"].get("tile_size"),
        "image_variants": image_variants,
        "seed": args.seed,
    }
    if conditions_on_key_frames(args.model_config):
        encoding["key_frames"] = True
    return encoding


def without_context_parallel(args: TrainingArguments) -> TrainingArguments:
    """Return the arguments with a VAE that each process uses for its own clips."""
    model_config = copy.deepcopy(args.model_config)
    model_config["first_stage_config"]["params"]["cp_size"] = 1
    return replace(args, model_config=model_config)


def wait_for_all() -> None:
    """Wait until all processes have called this.

    Raises:
        UserError: another process has failed.
    """
    try:
        meet("the other processes")
    except RuntimeError as error:
        raise UserError("another process has failed; see its message") from error


def encode_samples(encoder: Encoder, dataset: Any, todo: list[int], folder: Path, args: TrainingArguments) -> None:
    """Encode the samples of this process into new shards.

    Raises:
        UserError: more than `max_unreadable_share` of them cannot be read, or a shard cannot be written.
    """
    if not todo:
        return
    encoder.build()
    keys = [[SampleKey(index, sample_seed(args.seed, 0, index))] for index in todo]
    batches = ClipLoader(ReadableSamples(dataset), keys, args.num_workers, args.clip_timeout)
    paths = new_shards(folder)
    shard, left_out = OpenShard(next(paths)), 0
    bar = tqdm(batches, desc="encoding", unit="clip", total=len(todo), disable=dist.get_rank() != 0)
    with bar, logging_redirect_tqdm():
        for index, batch in zip(todo, bar, strict=True):
            if unreadable := batch["unreadable"][0]:
                left_out += 1
                shard.skipped[index] = unreadable
                logger.warning("left out, unreadable: %s", "; ".join(unreadable))
                if left_out > args.max_unreadable_share * len(todo):
                    raise UserError(
                        f"{left_out} of {len(todo)} clips are unreadable, more than max_unreadable_share "
                        f"{args.max_unreadable_share:g} allows; the last one: {unreadable[0]}"
                    )
            else:
                shard.add(index, batch["mp4"], batch["txt"][0], float(batch["fps"][0]), encoder)
            if shard.is_full:
                shard.write(encoder)
                shard = OpenShard(next(paths))
    if shard.samples or shard.skipped:
        shard.write(encoder)


class ReadableSamples:
    """The samples of a data set, without replacements for unreadable ones.

    For an unreadable sample, only the unreadable files are returned.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        try:
            sample = self.dataset[key]
        except UserError as error:  # no other sample has its shape
            return {"unreadable": [str(error)]}
        return {"unreadable": sample["unreadable"]} if sample["unreadable"] else sample
