"""Test that a cache gives the same losses as its clips, and is refused if it does not fit."""

import copy
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogvideox_sat.clips.batch_order import SampleKey
from cogvideox_sat.clips.latent_cache import is_cache, open_shard, read_description, read_shards
from cogvideox_sat.clips.latent_dataset import LatentDataset
from cogvideox_sat.clips.latent_identity import conditioner_for_cache, weights_stamp
from cogvideox_sat.clips.loader import collate
from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.settings import DataSettings
from cogvideox_sat.configuration.training_arguments import TrainingArguments
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.runs.datasets import make_dataset
from cogvideox_sat.training import latent_cache_shards, latent_encoding
from cogvideox_sat.training.latent_cache_shards import OpenShard
from diffusion_video import SATVideoDiffusionEngine
from distributed import run_distributed
from long_cases import others_long
from sgm.errors import UserError
from sgm.modules.diffusionmodules.key_frames import noise_pictures
from sgm.randomness import per_sample
from sgm.seeds import sample_seed
from support import assert_close
from training_clips import write_dataset

SEED = 7
DATA = {
    "target": "data_video.SFTDataset",
    "params": {"video_size": [32, 48], "fps": 8, "max_num_frames": 9, "skip_frms_num": 0},
}


def arguments(config: Path, data: Path, **changes: Any) -> TrainingArguments:
    """Return the arguments of a float32 run on the CPU, with the model in the file `config`."""
    values = {
        "train_data": [str(data)],
        "seed": SEED,
        "device": "cpu",
        "num_workers": 0,
        "model_config": load_configs([config])["model"],
        "data_config": DATA,
    }
    return TrainingArguments(**{**values, **changes})


def make_clips(folder: Path, count: int = 5) -> Path:
    """Write clips of 20 frames, which differ by their start; the first two share a caption."""
    write_dataset(folder, count, frames=20)
    (folder / "labels" / "001.txt").write_text("clip 0\n")
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return make_clips(tmp_path_factory.mktemp("clips") / "data")


@pytest.fixture(scope="module")
def cache(tiny, clips, tmp_path_factory) -> Callable[..., Path]:
    """Return a function that makes the cache of the clips for a family and options, only once."""
    made: dict[str, Path] = {}

    def make(family: str, **options) -> Path:
        name = f"{family} {options}"
        if name not in made:
            made[name] = tmp_path_factory.mktemp("cache") / "latents"
            assert latent_encoding.run(arguments(tiny.config(family), clips), made[name], **options) == 0
        return made[name]

    return make


@pytest.fixture
def copied(cache, tmp_path) -> Path:
    """Return a copy of a text-to-video cache, which a test may damage."""
    return shutil.copytree(cache("2b"), tmp_path / "latents")


def model_of(tiny, family: str) -> dict:
    return load_configs([tiny.config(family)])["model"]


def key(index: int, epoch: int = 0) -> SampleKey:
    return SampleKey(index, sample_seed(SEED, epoch, index), epoch)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- content


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variants"), [("2b", 0), ("5b_i2v", 2)])
def test_tensors_are_those_of_a_direct_encoding(tiny, clips, cache, family, variants):
    args = arguments(tiny.config(family), clips)
    encoded = LatentDataset([cache(family, image_variants=variants)], args.model_config)
    read = make_dataset(args.train_data, DataSettings.from_args(args))
    engine = SATVideoDiffusionEngine(args, parts=("first_stage_model", "conditioner"))
    assert len(encoded) == len(read) == 5
    for index in range(len(read)):
        sample, item = read[key(index)], encoded[key(index)]
        clip = engine.load_clip(sample["mp4"][None])
        assert torch.equal(item["moments"], engine.encode_moments(clip)[0])
        assert torch.equal(
            item["txt_embedding"], engine.conditioner({"txt": [sample["txt"]]}, drop=False)["crossattn"][0]
        )
        assert encoded.bucket(index) == read.bucket(index) == Bucket(9, 32, 48)
        same = ("txt", "fps", "num_frames", "index", "seed", "unreadable")
        assert {name: item[name] for name in same} == {name: sample[name] for name in same}
        for epoch in range(variants):
            with per_sample([sample_seed(SEED, epoch, index)]):
                expected = engine.encode_moments(noise_pictures(clip[:, :, :1]))[0]
            assert torch.equal(encoded[key(index, epoch)]["image_moments"], expected)
            assert torch.equal(encoded[key(index, epoch + variants)]["image_moments"], expected)
        assert ("image_moments" in item) == bool(variants)


@pytest.mark.slow
@pytest.mark.parametrize("family", others_long("1.5_i2v", "2b", "5b_i2v"))
def test_losses_are_those_of_the_clips_without_vae_and_text_encoder(tiny, clips, cache, family):
    """Captions and images are dropped at a high rate; stored latents are those of epoch 0."""
    args = arguments(tiny.config(family), clips)
    variants = 0 if family == "2b" else 1
    folders = {store: cache(family, image_variants=variants, store=store) for store in ("moments", "latents")}
    clips_read = make_dataset(args.train_data, DataSettings.from_args(args))
    model = model_of(tiny, family)
    model["conditioner_config"]["params"]["emb_models"][0]["ucg_rate"] = model["noised_image_dropout"] = 0.4
    args.model_config = copy.deepcopy(model)
    engine = SATVideoDiffusionEngine(args)

    model["first_stage_config"]["params"]["ckpt_path"] = "/nowhere/vae.pt"
    model["conditioner_config"]["params"]["emb_models"][0]["params"]["model_dir"] = "/nowhere/t5"
    encoded = {store: LatentDataset([folder], model) for store, folder in folders.items()}
    model["conditioner_config"] = conditioner_for_cache(model["conditioner_config"])
    args.model_config = model
    light = SATVideoDiffusionEngine(args, parts=("conditioner",))
    light.model = engine.model

    def loss(engine, dataset, indices) -> torch.Tensor:
        batch = collate([dataset[key(index)] for index in indices])
        with per_sample(batch["seed"]):
            return engine.shared_step(batch)[0].detach()

    for index in range(5):
        expected = loss(engine, clips_read, [index])
        assert_close(loss(light, encoded["moments"], [index]), expected, 1e-6)
        assert_close(loss(light, encoded["latents"], [index]), expected, 1e-5)
    assert_close(loss(light, encoded["moments"], [0, 3]), loss(engine, clips_read, [0, 3]), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", others_long("1.5_i2v", "5b_i2v"))
def test_key_frames_are_encoded_too_and_give_the_same_losses(tiny, clips, cache, tmp_path, family):
    """Any number of key frames is encoded with noise; a cache without them is refused."""
    conditioning = {"first": 1, "first_last": 1, "random": 2}
    config = tiny.variant(family, tmp_path / "key_frames.yaml", model={"conditioning": conditioning})
    args = arguments(config, clips)
    folders = {store: tmp_path / store for store in ("moments", "latents")}
    for store, folder in folders.items():
        assert latent_encoding.run(args, folder, image_variants=1, store=store) == 0
    read, engine = make_dataset(args.train_data, DataSettings.from_args(args)), SATVideoDiffusionEngine(args)

    def loss(dataset, indices) -> torch.Tensor:
        batch = collate([dataset[key(index)] for index in indices])
        with per_sample(batch["seed"]):
            return engine.shared_step(batch)[0].detach()

    encoded = {store: LatentDataset([folder], args.model_config) for store, folder in folders.items()}
    for indices in ([0], [1], [2], [0, 3, 4]):
        expected = loss(read, indices)
        assert_close(loss(encoded["moments"], indices), expected, 1e-5)
        assert_close(loss(encoded["latents"], indices), expected, 1e-5)
    alone = loss(read, [1])
    engine.key_frames = None
    assert loss(read, [1]) != alone, "key frames make a difference"
    with pytest.raises(UserError, match="has no key frames, which model"):
        LatentDataset([cache(family, image_variants=1)], args.model_config)


@pytest.mark.slow
def test_captions_that_samples_share_are_stored_once(cache):
    (shard,) = read_shards(cache("2b"))
    texts = [name for name in load_file(shard.path) if name.endswith(".text")]
    assert sorted(texts) == ["0.text", "2.text", "3.text", "4.text"]
    assert [sample.text for sample in shard.samples] == [0, 0, 2, 3, 4]


@pytest.mark.slow
def test_bfloat16_is_stored_rounded_and_stacks(tiny, cache):
    exact, rounded = (LatentDataset([cache("2b", **o)], model_of(tiny, "2b")) for o in ({}, {"dtype": "bfloat16"}))
    for name in ("moments", "txt_embedding"):
        assert torch.equal(rounded[key(1)][name], exact[key(1)][name].bfloat16())
    batch = collate([rounded[key(index)] for index in (0, 1)])
    assert batch["moments"].shape == (2, 32, 3, 4, 6) and batch["moments"].dtype == torch.bfloat16


@pytest.mark.slow
def test_several_caches_are_one_dataset_and_travel_to_workers(tiny, cache):
    dataset = LatentDataset([cache("2b"), cache("2b", dtype="bfloat16")], model_of(tiny, "2b"))
    sample = dataset[key(6)]
    assert len(dataset) == 10 and sample["moments"].dtype == torch.bfloat16 and sample["index"] == 6
    travelled = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(travelled[key(6)]["moments"], sample["moments"])


@pytest.mark.slow
def test_the_data_module_recognises_a_cache(tiny, cache):
    args = arguments(tiny.config("2b"), cache("2b"))
    dataset = make_dataset(args.train_data, DataSettings.from_args(args))
    assert isinstance(dataset, LatentDataset) and len(dataset) == 5
    assert is_cache(cache("2b")) and not is_cache(cache("2b").parent)


def test_caches_come_as_often_as_is_asked_for(tiny, cache):
    args = arguments(tiny.config("2b"), cache("2b"))
    paths = [str(cache("2b")), str(cache("2b", dtype="bfloat16"))]
    repeated = make_dataset(paths, DataSettings.from_args(args), repeats=[3, 1])
    equal = make_dataset([paths[0]] * 3 + [paths[1]], DataSettings.from_args(args))
    assert repeated.samples == equal.samples and len(repeated) == 20
    assert make_dataset(paths, DataSettings.from_args(args), weights=[3, 1]).draws == [1.5] * 5 + [0.5] * 5


def test_an_option_that_a_cache_was_not_made_with_is_refused(tiny, cache):
    args = arguments(tiny.config("2b"), cache("2b"))
    says = "data.params.{} is .*, but .* was made with .*; set it to that, or run"
    for option, value in {"horizontal_flip": 0.5, "caption_prefix": "a", "reshape_mode": "none"}.items():
        data = {**DATA, "params": {**DATA["params"], option: value}}
        with pytest.raises(UserError, match=says.format(option)):
            make_dataset(args.train_data, DataSettings.from_args(args, data_config=data))
    same = {"horizontal_flip": 0, "clips_per_video": 1, "reshape_mode": "center", "min_frames": None}
    data = {**DATA, "params": {**DATA["params"], **same}}
    assert len(make_dataset(args.train_data, DataSettings.from_args(args, data_config=data))) == 5


# ---------------------------------------------------------------- making it


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on(tiny, clips, tmp_path, monkeypatch):
    """Afterwards the files are those of a run in one go; one that is complete stays as it is."""
    monkeypatch.setattr(latent_cache_shards, "SHARD_SAMPLES", 2)
    args = arguments(tiny.config("5b_i2v"), clips)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert latent_encoding.run(args, whole, image_variants=1) == 0
    expected = contents(whole)
    assert len(expected) == 4

    write = OpenShard.write

    def write_first_only(self, encoder):
        if not self.path.name.endswith("00000.safetensors"):
            raise KeyboardInterrupt
        write(self, encoder)

    monkeypatch.setattr(OpenShard, "write", write_first_only)
    with pytest.raises(KeyboardInterrupt):
        latent_encoding.run(args, cut, image_variants=1)
    monkeypatch.setattr(OpenShard, "write", write)
    (cut / ".rank0000-00001.safetensors.123.part").write_bytes(b"half a shard")
    with pytest.raises(UserError, match=r"is unfinished, 2 of 5 samples; run tools/precompute_latents.py again"):
        LatentDataset([cut])
    assert latent_encoding.run(args, cut, image_variants=1) == 0
    assert contents(cut) == expected
    assert latent_encoding.run(args, cut, image_variants=1) == 0
    assert contents(cut) == expected


def encode_on_rank(config: Path, clips: Path, folder: Path) -> list[str]:
    latent_encoding.run(arguments(config, clips), folder)
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_share_the_work(tiny, clips, cache, tmp_path):
    run_distributed(encode_on_rank, 2, tiny.config("2b"), clips, tmp_path / "latents")
    names = sorted(path.name for path in (tmp_path / "latents").iterdir())
    assert names == ["cache.json", "rank0000-00000.safetensors", "rank0001-00000.safetensors"]
    alone, together = LatentDataset([cache("2b")]), LatentDataset([tmp_path / "latents"])
    for index in range(5):
        ours, theirs = together[key(index)], alone[key(index)]
        assert ours["txt"] == theirs["txt"]
        for name in ("moments", "txt_embedding"):  # other numbers of threads round differently
            assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_unreadable_clips_are_left_out_and_listed(tiny, tmp_path):
    """The clip has a good header but damaged frames; no other clip replaces it."""
    data = make_clips(tmp_path / "data", 4)
    path = data / "videos" / "002.mp4"
    content = path.read_bytes()
    start = content.index(b"mdat") + 4
    path.write_bytes(content[:start] + bytes(len(content) - start))
    args = arguments(tiny.config("2b"), data, max_unreadable_share=0.5)
    assert latent_encoding.run(args, tmp_path / "latents") == 0
    dataset = LatentDataset([tmp_path / "latents"])
    assert [dataset[key(index)]["txt"] for index in range(len(dataset))] == ["clip 0", "clip 0", "clip 3"]
    (line,) = (tmp_path / "latents" / "unreadable.txt").read_text().splitlines()
    assert line.startswith(f"{path}: ")

    args.max_unreadable_share = 0.1
    with pytest.raises(UserError, match=re.escape(str(path))):
        latent_encoding.run(args, tmp_path / "strict")


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({}, {"store": "latents"}, 'encoding.store is "moments" there and "latents" now'),
        ({}, {"dtype": "bfloat16"}, 'encoding.dtype is "float32" there and "bfloat16" now'),
        ({"seed": 8}, {}, "encoding.seed is 7 there and 8 now"),
        ({"data_config": {**DATA, "params": {**DATA["params"], "fps": 4}}}, {}, "data.config.params.fps is 8 there"),
    ],
)
def test_a_run_with_other_settings_is_refused(tiny, clips, copied, changes, options, says):
    before = contents(copied)
    with pytest.raises(UserError, match=re.escape(says) + ".*another folder"):
        latent_encoding.run(arguments(tiny.config("2b"), clips, **changes), copied, **options)
    assert contents(copied) == before


def test_a_folder_of_other_things_is_left_alone(tiny, clips):
    with pytest.raises(UserError, match="is not empty and not a cache of latents"):
        latent_encoding.run(arguments(tiny.config("2b"), clips), clips)
    assert sorted(path.name for path in clips.iterdir() if not path.name.startswith(".")) == ["labels", "videos"]


@pytest.mark.slow
def test_a_full_disk_is_foreseen_or_named(tiny, clips, tmp_path, monkeypatch):
    args = arguments(tiny.config("2b"), clips)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2000))
        # 5 × 4 bytes × (32 × 3 × 4 × 6 numbers of the clip and 64 × 64 of the text)
        with pytest.raises(UserError, match=r"needs up to 125 KiB more in .*, but 1\.95 KiB are free"):
            latent_encoding.run(args, tmp_path / "latents")

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(UserError, match="the disk is full; earlier shards are kept"):
        latent_encoding.run(args, tmp_path / "latents")
    assert [path.name for path in (tmp_path / "latents").iterdir()] == ["cache.json"]


# ---------------------------------------------------------------- refusing it


def test_a_cache_of_another_model_is_refused(tiny, cache, tmp_path):
    folder = cache("2b")

    def refused(model: dict, says: str) -> None:
        with pytest.raises(UserError, match=says):
            LatentDataset([folder], model)

    model = model_of(tiny, "2b")
    first_stage = model["first_stage_config"]["params"]
    content = bytearray(Path(first_stage["ckpt_path"]).read_bytes())
    content[-100] ^= 1
    (tmp_path / "other.pt").write_bytes(content)
    first_stage["ckpt_path"] = str(tmp_path / "other.pt")
    refused(model, r"another VAE than this model's \(other weights\); run tools/precompute_latents.py")

    text = (model := model_of(tiny, "2b"))["conditioner_config"]["params"]["emb_models"][0]
    shutil.copytree(text["params"]["model_dir"], tmp_path / "t5")
    text["params"]["model_dir"] = str(tmp_path / "t5")
    LatentDataset([folder], model)  # the same text encoder at another place
    (tmp_path / "t5" / "spiece.model").write_bytes(b"another vocabulary")
    refused(model, r"another text encoder than this model's \(other weights\)")

    text["params"]["max_length"] = 32
    refused(model, "another text encoder than this model's: tokens is 64 there and 32 here")
    refused(model_of(tiny, "5b_i2v"), "has no first frames, since it was made with a text-to-video model")

    model = model_of(tiny, "2b")
    model["network_config"]["params"]["num_frames"] = 5
    refused(model, "latents are of clips of 9 frames of 32x48: max_num_frames: got 9; this model takes")


@pytest.mark.parametrize(
    "change",
    [
        *({"samples": value} for value in (None, {}, [1], [{}])),
        *({"skipped": value} for value in ([], {"x": []}, {"1": 5}, {"1": [2]})),
        *({name: value} for name, value in (("index", "0"), ("bucket", [9, 32]), ("bucket", [9, 32, "48"]))),
        *({name: value} for name, value in (("caption", 5), ("text", -1), ("fps", "8"), ("fps", None))),
    ],
    ids=str,
)
def test_a_shard_that_says_wrong_things_is_refused(copied, change):
    (shard,) = copied.glob("*.safetensors")
    with safe_open(shard, "pt") as file:
        content = json.loads(file.metadata()["content"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change.keys() <= content.keys():
        content |= change
    else:
        content["samples"][0] |= change
    save_file(tensors, shard, metadata={"content": json.dumps(content)})
    with pytest.raises(UserError, match=re.escape(str(shard)) + " is not a shard of latents; run tools/precompute"):
        LatentDataset([copied])


def test_a_damaged_cache_is_refused(copied):
    (shard,) = copied.glob("*.safetensors")
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(UserError, match=re.escape(str(shard)) + " is damaged .*delete it and run tools/precompute"):
        LatentDataset([copied])
    shard.unlink()
    with pytest.raises(UserError, match="is unfinished, 0 of 5 samples"):
        LatentDataset([copied])

    description = json.loads((copied / "cache.json").read_text())
    (copied / "cache.json").write_text(json.dumps({**description, "format": 99}))
    with pytest.raises(UserError, match=r"cache\.json has format 99, but this program reads 1"):
        LatentDataset([copied])
    for change in ({"model": -1}, {"model": {}}, {"data": []}, {"encoding": {}}, {"reader": {"video_backend": []}}):
        (copied / "cache.json").write_text(json.dumps({**description, **change}))
        with pytest.raises(UserError, match=rf"cache\.json does not describe latents: .*{next(iter(change))}"):
            LatentDataset([copied])
    (copied / "cache.json").write_text("{")
    with pytest.raises(UserError, match=r"cache\.json does not describe latents"):
        LatentDataset([copied])


def test_other_data_settings_are_reported(tiny, cache, caplog):
    data = {**DATA, "params": {**DATA["params"], "fps": 16}}
    LatentDataset([cache("2b")], model_of(tiny, "2b"), data)
    assert [record.getMessage() for record in caplog.records] == [
        f"{cache('2b')} was made with fps 8, not 16; its clips are not changed"
    ]


def test_the_reader_of_the_videos_is_recorded_and_another_one_is_reported(tiny, clips, cache, copied, caplog):
    dataset = LatentDataset([cache("2b")], model_of(tiny, "2b"), DATA)
    assert dataset.reader["video_backend"] == read_description(cache("2b"))["reader"]["video_backend"] == "pyav"
    assert not caplog.messages

    by_decord = {**DATA, "params": {**DATA["params"], "video_backend": "decord"}}
    LatentDataset([cache("2b")], model_of(tiny, "2b"), by_decord)
    assert "was made with video_backend pyav, not decord; its clips are not changed" in caplog.text
    caplog.clear()
    args = arguments(tiny.config("2b"), clips, data_config=by_decord)
    assert latent_encoding.run(args, copied) == 0  # continue a complete cache
    assert f"{copied}: videos were read with pyav and are now read with decord" in caplog.text
    caplog.clear()

    description = json.loads((copied / "cache.json").read_text())
    del description["reader"]  # written before other decoders than decord existed
    (copied / "cache.json").write_text(json.dumps(description))
    assert LatentDataset([copied], model_of(tiny, "2b"), DATA).reader["video_backend"] == "decord"
    assert "was made with video_backend decord, not pyav" in caplog.text


def test_conditioners_that_cannot_be_cached_are_refused(tiny):
    config = model_of(tiny, "2b")["conditioner_config"]
    (embedder,) = config["params"]["emb_models"]
    for change, says in (
        ([embedder, embedder], "the embeddings of one FrozenT5Embedder"),
        ([{**embedder, "target": "torch.nn.Identity"}], "it has torch.nn.Identity, but a cache"),
        ([{**embedder, "legacy_ucg_value": ""}], "leave out legacy_ucg_value"),
    ):
        with pytest.raises(UserError, match=says):
            conditioner_for_cache({**config, "params": {"emb_models": change}})


@pytest.mark.slow
def test_tiles_are_part_of_what_a_cache_is(tiny, clips, tmp_path, cache):
    """A cache records that it was encoded in tiles, and is not continued without them."""
    config = tiny.config("2b")
    data = {**DATA, "params": {**DATA["params"], "video_size": [64, 96]}}
    folders = {None: tmp_path / "whole", 64: tmp_path / "tiled"}
    for size, folder in folders.items():
        args = arguments(config, clips, data_config=data, vae_tile_size=size)
        assert latent_encoding.run(args, folder) == 0
        assert json.loads((folder / "cache.json").read_text())["encoding"]["tile_size"] == size
    whole, tiled = (LatentDataset([folder], model_of(tiny, "2b"))[key(0)]["moments"] for folder in folders.values())
    few = arguments(config, clips, data_config=data, vae_frames_at_once=4)
    assert latent_encoding.run(few, folders[None]) == 0, "whole frames by few at a time are the same cache"
    assert latent_encoding.run(few, tmp_path / "few") == 0
    by_few = LatentDataset([tmp_path / "few"], model_of(tiny, "2b"))[key(0)]["moments"]
    assert (by_few - whole).norm() <= 1e-2 * whole.norm()  # stored in half precision
    assert whole.shape == tiled.shape and 0 < (whole - tiled).norm() / whole.norm() < 0.5
    with pytest.raises(UserError, match=r"encoding.tile_size is 64 there and null now"):
        latent_encoding.run(arguments(config, clips, data_config=data), folders[64])


def test_files_that_may_not_be_read_are_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "shard.safetensors").write_bytes(b"damaged")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        with pytest.raises(UserError, match=r"^cannot read .*shard\.safetensors: Permission denied; change the permi"):
            open_shard(tmp_path / "shard.safetensors")
    with pytest.raises(UserError, match=r"shard\.safetensors is damaged .*; delete it and run "):
        open_shard(tmp_path / "shard.safetensors")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"^cannot read .*shard\.safetensors: Permission denied; change the permi"):
        weights_stamp([tmp_path / "shard.safetensors"])
