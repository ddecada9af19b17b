"""The video autoencoder is trained on clips and images and is fit for use afterwards."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vae_modules.autoencoder
from autoencoder_training import fit, moving_squares, video_config
from seeded import seed_module_
from sgm.errors import UserError
from sgm.models.autoencoder import VideoAutoencodingEngine
from sgm.util import instantiate_from_config
from support import assert_close
from vae_modules.autoencoder import VideoAutoencoderInferenceWrapper

SGD = {"target": "torch.optim.SGD", "params": {"lr": 1e-5}}  # the loss of a frame is a sum over its pixels


pytestmark = pytest.mark.usefixtures("one_thread")


def build(**params: Any) -> VideoAutoencodingEngine:
    torch.manual_seed(0)
    return instantiate_from_config(video_config(**params))


def batches(count: int, frames: int = 5, clips: int = 2) -> list[dict[str, Any]]:
    """Return batches as the fine-tuning data set gives them."""
    videos = moving_squares(count * clips, frames).split(clips)
    return [{"mp4": video, "seed": [clips * i + j for j in range(clips)]} for i, video in enumerate(videos)]


def weights(engine: VideoAutoencodingEngine) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in engine.state_dict().items()}


# ---------------------------------------------------------------- training


@pytest.mark.slow
def test_training_brings_reconstructions_closer():
    """On videos and images, with the adversarial phase at the end."""
    engine = build(disc_start_iter=20, ema_decay=0.8)
    engine.learning_rate = 1e-3
    data = [batch for pair in zip(batches(4), batches(4, frames=1), strict=True) for batch in pair]
    start = engine.validate(data[0])
    fit(engine, data * 4, steps=28)
    end = engine.validate(data[0])
    for split in ("val", "val_ema"):
        assert end[f"{split}/rec"] < 0.7 * start[f"{split}/rec"], split
    assert end["val/loss/disc"] != start["val/loss/disc"]
    assert all(torch.isfinite(value) for value in end.values())


@pytest.mark.parametrize("frames", [1, 5])
def test_images_can_train_the_last_taps_alone(frames):
    """With `image_taps: last` videos keep their gradients, and images train one tap."""
    batch = batches(1, frames)[0]
    gradients = {}
    for taps in ("all", "last"):
        engine = seed_module_(build(image_taps=taps, loss_config={"target": "autoencoder_training.MeanSquare"}), 0)
        engine.compute_loss(batch, 0)[0].backward()
        gradients[taps] = {name: each.grad for name, each in engine.named_parameters() if each.grad is not None}
    in_time = 0
    for name, expected in gradients["all"].items():
        if name.startswith(("encoder", "decoder")) and expected.ndim == 5 and expected.shape[2] == 3:
            in_time += 1
            if frames == 1:
                expected = torch.cat([torch.zeros_like(expected[:, :, :2]), expected[:, :, 2:]], dim=2)
        assert torch.equal(gradients["last"][name], expected), name
    assert in_time > 10
    with pytest.raises(UserError, match="image_taps: got 'first'"):
        build(image_taps="first")


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Through the adversarial phase, with both optimizers, their schedules and the averages."""
    schedule = {
        "target": "sgm.lr_scheduler.LambdaWarmUpCosineScheduler",
        "params": {"warm_up_steps": 2, "lr_min": 0.1, "lr_max": 1.0, "lr_start": 0.1, "max_decay_steps": 6},
    }
    data = batches(6, clips=1)

    def new(seed: int) -> VideoAutoencodingEngine:
        engine = seed_module_(build(disc_start_iter=1, ema_decay=0.9, scheduler_config=schedule), seed)
        engine.learning_rate = 1e-3
        return engine

    whole, half, rest = new(0), new(0), new(1)
    fit(whole, data, steps=6)
    fit(half, data, steps=3).save_checkpoint(tmp_path / "half.ckpt")
    fit(rest, data[3:] * 2, steps=6, ckpt_path=tmp_path / "half.ckpt")
    for name, value in weights(whole).items():
        assert torch.equal(rest.state_dict()[name], value), name
    assert not torch.equal(whole.decoder.conv_out.conv.weight, half.decoder.conv_out.conv.weight)


# ---------------------------------------------------------------- settings


def test_images_and_videos_have_their_weights():
    """They multiply the reconstruction's part of the loss."""
    plain, weighted = build(), build(image_video_weights=[0.25, 3.0])
    for batch, weight in ((batches(1, frames=1)[0], 0.25), (batches(1)[0], 3.0)):
        loss, log = plain.compute_loss(batch, 0)
        other, _ = weighted.compute_loss(batch, 0)
        assert_close(other - loss, (weight - 1) * log["train/loss/nll"], 1e-5)


def test_only_the_decoder_is_trained_when_asked():
    engine = build(only_train_decoder=True, optimizer_config=SGD, ema_decay=0.5)
    before = weights(engine)
    fit(engine, batches(2), steps=2)
    changed = {name.split(".")[0] for name, p in engine.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"decoder", "loss"}
    assert not torch.equal(engine.loss.logvar, before["loss.logvar"])
    assert all(name.startswith("decoder.") for name in engine.model_ema.shadows())
    with pytest.raises(UserError, match="only_train_decoder and trainable_ae_params"):
        build(only_train_decoder=True, trainable_ae_params=[["encoder"]])


@pytest.mark.parametrize(
    ("shape", "message"),
    [((4, 3, 16, 16), "4 frames of 16x16; the number of frames must be 4k"), ((5, 3, 14, 16), "5 frames of 14x16")],
)
def test_unfit_clips_are_refused_in_training(shape, message):
    with pytest.raises(UserError, match=message):
        fit(build(optimizer_config=SGD), [{"mp4": torch.zeros(1, *shape, dtype=torch.uint8)}], steps=1)


def test_context_parallelism_needs_its_processes():
    with pytest.raises(UserError, match=r"over 2 processes: the number of processes must be .* got 1"):
        # Built before there are processes, which the trainer may start.
        fit(build(context_parallel_size=2, optimizer_config=SGD), batches(1), steps=1)


# ---------------------------------------------------------------- afterwards


def test_the_engines_have_a_second_path():
    assert vae_modules.autoencoder.VideoAutoencodingEngine is VideoAutoencodingEngine


def test_the_input_is_what_the_data_set_gives():
    engine, batch = build(), batches(1)[0]
    x = engine.get_input(batch)
    assert x.shape == (2, 3, 5, 16, 16) and x.dtype == torch.float32
    assert_close(x[:, :, 2], batch["mp4"][:, 2] / 127.5 - 1, 1e-6)
    assert torch.equal(engine.get_input({"mp4": batch["mp4"] / 127.5 - 1}), x)


def test_a_loader_of_another_layout():
    """Videos (b, c, t, h, w) under `jpg` and images (b, c, h, w) train the same."""
    ours, theirs = build(), build(input_key="jpg", input_layout="b c t h w")
    batch = batches(1)[0]
    videos = batch["mp4"].transpose(1, 2)
    assert torch.equal(theirs.get_input({"jpg": videos}), ours.get_input(batch))
    assert_close(
        theirs.compute_loss({"jpg": videos / 127.5 - 1, "seed": batch["seed"]}, 0)[0],
        ours.compute_loss(batch, 0)[0],
        1e-6,
    )
    for engine, key in ((ours, "mp4"), (theirs, "jpg")):
        images = engine.get_input({key: videos[:, :, 0]})
        assert torch.equal(images, ours.get_input(batch)[:, :, :1])
    with pytest.raises(UserError, match=r"input_key: 'jpg' has the shape \(2, 3\); expected b c t h w"):
        theirs.get_input({"jpg": torch.zeros(2, 3)})
    with pytest.raises(UserError, match="input_layout: 'b h w' is unknown; use 'b t c h w' or 'b c t h w'"):
        build(input_layout="b h w")


def test_leading_arguments_are_positional_in_the_usual_order(tmp_path):
    torch.save(build().coder_state_dict(ema=False), tmp_path / "a.pt")
    params = video_config()["params"]
    engine = VideoAutoencodingEngine(tmp_path / "a.pt", ["loss"], [2, 3], True, 1, **params)
    assert (engine.image_weight, engine.video_weight, engine.context_parallel_size) == (2, 3, 1)
    assert not any(parameter.requires_grad for parameter in engine.encoder.parameters())
    assert torch.equal(engine.encoder.conv_in.conv.weight, build().encoder.conv_in.conv.weight)
    parts = {key: params[key] for key in ("encoder_config", "decoder_config", "regularizer_config")}
    stage = VideoAutoencoderInferenceWrapper(1, tmp_path / "a.pt", [], **parts).eval()
    x = engine.get_input(batches(1)[0])
    with torch.no_grad():
        torch.manual_seed(0)
        z, frames, report = stage(x)
        torch.manual_seed(0)
        assert torch.equal(z, stage.encode(x)) and frames.shape == x.shape and report["kl_loss"] > 0
        assert torch.equal(frames, stage.decode_at_once(z))
        assert torch.equal(
            stage.decode(z[:, :, :1], False, False, True, clear_fake_cp_cache=True),
            stage.decode(z[:, :, :1], use_cp=False, clear_fake_cp_cache=True),
        )
        moments, nothing = stage.encode(x, unregularized=True)
        assert nothing == {} and torch.equal(stage.encode(x, unregularized=True, use_cp=False)[0], moments)


def test_a_first_stage_from_a_file_that_fits_in_part(tmp_path, caplog):
    source = build()
    state = source.coder_state_dict(ema=False)
    state["decoder.conv_out.conv.weight"] = torch.zeros(1, 32, 3, 3, 3)
    torch.save(state, tmp_path / "a.pt")
    params = video_config()["params"]
    parts = {key: params[key] for key in ("encoder_config", "decoder_config", "regularizer_config")}
    stage = VideoAutoencoderInferenceWrapper(ckpt_path=tmp_path / "a.pt", strict=False, **parts)
    assert torch.equal(stage.encoder.conv_in.conv.weight, source.encoder.conv_in.conv.weight)
    assert "left out: decoder.conv_out.conv.weight ((1, 32, 3, 3, 3) instead of (3, 32, 3, 3, 3))" in caplog.messages


@pytest.mark.slow
def test_what_is_exported_is_a_first_stage(tmp_path):
    """The averages have the weights' names, and give the engine within `ema_scope`."""
    engine = build(ema_decay=0.5, optimizer_config=SGD)
    fit(engine, batches(2), steps=2).save_checkpoint(tmp_path / "run.ckpt")
    torch.save({"state_dict": engine.coder_state_dict(ema=True)}, tmp_path / "3d-vae.pt")
    parts = {key: video_config()["params"][key] for key in ("encoder_config", "decoder_config", "regularizer_config")}
    x = engine.get_input(batches(1)[0])
    averaged = VideoAutoencoderInferenceWrapper(**parts, ckpt_path=tmp_path / "3d-vae.pt")
    trained = VideoAutoencoderInferenceWrapper(**parts, ckpt_path=tmp_path / "run.ckpt")
    with torch.no_grad():
        moments = engine.encode(x, unregularized=True)[0]
        assert torch.equal(trained.encode(x, unregularized=True)[0], moments)
        assert not torch.equal(averaged.encode(x, unregularized=True)[0], moments)
        with engine.ema_scope():
            assert torch.equal(averaged.encode(x, unregularized=True)[0], engine.encode(x, unregularized=True)[0])
    engine = build(ckpt_path=tmp_path / "3d-vae.pt")
    assert torch.equal(engine.decoder.conv_out.conv.weight, averaged.decoder.conv_out.conv.weight)


def test_a_larger_autoencoder_does_not_load_into_a_smaller_one(tmp_path):
    """Though it holds everything that the smaller one asks for."""
    config = video_config()["params"]
    parts = {key: config[key] for key in ("encoder_config", "decoder_config", "regularizer_config")}
    coder = config["encoder_config"]["params"]
    config["encoder_config"]["params"] = {**coder, "num_res_blocks": 2}
    torch.save(
        {"state_dict": build(encoder_config=config["encoder_config"]).coder_state_dict(ema=False)}, tmp_path / "vae.pt"
    )
    parts["encoder_config"] = {**config["encoder_config"], "params": coder}
    with pytest.raises(
        UserError, match=r"vae\.pt does not fit .* unknown to VideoAutoencoderInferenceWrapper"
    ) as error:
        VideoAutoencoderInferenceWrapper(**parts, ckpt_path=tmp_path / "vae.pt")
    assert "\n" not in str(error.value)


def test_videos_to_look_at():
    engine, batch = build(ema_decay=0.5), batches(1)[0]
    videos = engine.log_videos(batch)
    assert {"inputs", "reconstructions", "diff_boost", "reconstructions_ema"} <= videos.keys()
    assert all(video.shape == (2, 3, 5, 16, 16) and video.abs().max() <= 1 for video in videos.values())
    assert torch.equal(videos["inputs"], engine.get_input(batch))


def test_one_precision_after_another():
    """Mixed and pure 16-bit training run, and the loss is finite."""
    for precision in ("bf16-mixed", "bf16-true"):
        engine = build(optimizer_config=SGD, ema_decay=0.5)
        trainer = fit(engine, batches(2, clips=1), steps=2, precision=precision)
        assert torch.isfinite(trainer.callback_metrics["train/loss/total"])
        assert all(torch.isfinite(value).all() for value in engine.state_dict().values())
