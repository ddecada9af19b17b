"""Engines that train autoencoders: reference numbers, turns, weights and settings."""

import copy
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from safetensors.torch import save_file
from torch import Tensor, nn

from autoencoder_training import LOSS, fit, image_config, moving_squares
from seeded import seed_module_, seeded_input
from sgm.errors import UserError
from sgm.models.autoencoder import (
    AutoencoderKL,
    AutoencoderKLModeOnly,
    AutoencoderLegacyVQ,
    AutoencodingEngine,
    AutoencodingEngineLegacy,
    IdentityFirstStage,
)
from sgm.models.autoencoding_engine import AUTOENCODER, DISCRIMINATOR
from sgm.util import instantiate_from_config
from support import Reference, assert_close

SGD = {"target": "torch.optim.SGD", "params": {"lr": 1e-5}}  # the loss of an image is a sum over its pixels
NO_ADVERSARY = {**LOSS, "params": {**LOSS["params"], "disc_start": 10**6}}


pytestmark = pytest.mark.usefixtures("one_thread")


def build(target: str = "AutoencodingEngine", **params: Any) -> AutoencodingEngine:
    torch.manual_seed(0)
    return instantiate_from_config(image_config(target, **params))


def batches(count: int, size: int = 4) -> list[dict[str, Any]]:
    images = moving_squares(count * size, 1)[:, 0]
    seeds = range(count * size)
    return [{"jpg": images[i : i + size], "seed": list(seeds[i : i + size])} for i in range(0, count * size, size)]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Return the parts (`encoder`, `loss`, ...) of which a parameter has changed."""
    return {
        name.split(".")[0] for name, value in module.named_parameters() if not torch.equal(value.detach(), before[name])
    }


# ---------------------------------------------------------------- reference numbers


def test_the_legacy_engine_gives_the_reference_numbers():
    reference = Reference("autoencoder_2d")
    engine = seed_module_(instantiate_from_config(reference.case["config"]), reference.case["seed"])
    assert list(engine.state_dict()) == list(reference.case["keys"])
    x = seeded_input("image", (2, 3, 32, 32), reference.case["seed"]).clamp(-1, 1)
    for engine.max_batch_size in (None, 1):
        z, reconstruction, report = engine(x)
        assert_close(z, reference["z"], 1e-5)
        assert_close(reconstruction, reference["x"], 1e-5)
        assert_close(report["kl_loss"], reference["kl"], 1e-5)


def test_the_identity_first_stage_gives_back_what_it_gets():
    stage, x = instantiate_from_config({"target": "sgm.models.autoencoder.IdentityFirstStage"}), torch.randn(2, 3, 4, 4)
    assert isinstance(stage, IdentityFirstStage)
    assert stage.encode(x) is x and stage.decode(x) is x


# ---------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.parametrize("target", ["AutoencodingEngine", "AutoencodingEngineLegacy", "AutoencoderKL"])
def test_training_brings_reconstructions_closer(target):
    """With the adversarial phase in the second half."""
    engine = build(target, disc_start_iter=24, ema_decay=0.8)
    engine.learning_rate = 2e-3
    data = batches(8)
    start = engine.validate(data[0])
    fit(engine, data * 5, steps=36)
    end = engine.validate(data[0])
    for split in ("val", "val_ema"):
        assert end[f"{split}/rec"] < 0.6 * start[f"{split}/rec"], split
        assert torch.isfinite(end[f"{split}/loss/disc"])
        assert end[f"{split}/loss/disc"] != start[f"{split}/loss/disc"]


def test_autoencoder_and_discriminator_take_turns():
    """The idle one neither moves nor collects a gradient."""
    engine = build(disc_start_iter=2, optimizer_config=SGD)
    seen = []

    def spy(batch: Any, turn: int, split: str = "train", compute: Any = engine.compute_loss) -> Any:
        seen.append((turn, engine.global_step, weights(engine)))
        return compute(batch, turn, split)

    engine.compute_loss = spy
    fit(engine, batches(5), steps=5)
    assert [turn for turn, _, _ in seen] == [AUTOENCODER, AUTOENCODER, DISCRIMINATOR, AUTOENCODER, DISCRIMINATOR]
    assert [step for _, step, _ in seen] == [0, 1, 2, 3, 4]
    states = [state for _, _, state in seen] + [weights(engine)]
    for (turn, _, before), after in zip(seen, states[1:], strict=True):
        changed = {
            name.split(".")[1] if name.startswith("loss") else "coder"
            for name, _ in engine.named_parameters()
            if not torch.equal(before[name], after[name])
        }
        assert changed >= ({"discriminator"} if turn else {"coder", "logvar"})
        assert not changed & ({"coder", "logvar"} if turn else {"discriminator"})
    assert all(parameter.grad is None and parameter.requires_grad for parameter in engine.parameters())


def test_without_a_discriminator_there_is_one_optimizer():
    engine = build(loss_config={"target": "autoencoder_training.MeanSquare"}, optimizer_config=SGD)
    before = weights(engine)
    assert len(engine.configure_optimizers()[0]) == 1
    fit(engine, batches(2), steps=2)
    assert moved(engine, before) == {"encoder", "decoder"}


def test_accumulated_batches_make_the_step_of_one_large_batch():
    data = batches(4)
    pairs = [
        {"jpg": torch.cat([a["jpg"], b["jpg"]]), "seed": a["seed"] + b["seed"]}
        for a, b in zip(data[::2], data[1::2], strict=True)
    ]
    params = {
        "optimizer_config": {**SGD, "params": {"lr": 0.1}},
        "loss_config": {"target": "autoencoder_training.MeanSquare"},
    }
    whole, parts = build(**params), build(**params, accumulate_grad_batches=2)
    fit(whole, pairs, steps=2)
    fit(parts, data, steps=2)
    assert moved(whole, weights(build())) >= {"encoder", "decoder"}
    for name, value in weights(whole).items():
        assert_close(parts.state_dict()[name], value, 1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_gradients_are_clipped_by_their_norm(precision):
    """The clipped norm is that of the loss itself, also with a scaled backward pass."""
    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        options = {"plugins": [MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]}
    loss = {"target": "autoencoder_training.MeanSquare"}
    engine = build(optimizer_config={**SGD, "params": {"lr": 1.0}}, loss_config=loss, gradient_clip_val=1e-3)
    before = weights(engine)
    fit(engine, batches(1), steps=1, **options)
    change = torch.stack([(value.detach() - before[name]).norm() for name, value in engine.named_parameters()]).norm()
    assert 0.99e-3 < change < 1.01e-3


def test_the_schedule_counts_the_steps_of_its_own_optimizer():
    schedule = {
        "target": "sgm.lr_scheduler.LambdaLinearScheduler",
        "params": {"warm_up_steps": [0], "f_start": [1.0], "f_max": [1.0], "f_min": [0.0], "cycle_lengths": [4]},
    }
    engine = build(optimizer_config=SGD, scheduler_config=schedule, disc_start_iter=2)
    trainer = fit(engine, batches(4), steps=4)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
    assert rates == pytest.approx([1e-5 * (1 - 3 / 4), 1e-5 * (1 - 1 / 4)])


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Both optimizers, the schedules, the averages and the generators of samples go on."""
    schedule = {
        "target": "sgm.lr_scheduler.LambdaWarmUpCosineScheduler",
        "params": {"warm_up_steps": 2, "lr_min": 0.1, "lr_max": 1.0, "lr_start": 0.1, "max_decay_steps": 6},
    }
    params = {"disc_start_iter": 2, "ema_decay": 0.9, "scheduler_config": schedule}
    data = batches(8)

    def new() -> AutoencodingEngine:
        engine = build(**params)
        engine.learning_rate = 1e-3
        return engine

    whole, half, rest = new(), new(), new()
    fit(whole, data, steps=8)
    trainer = fit(half, data, steps=4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    for parameter in rest.parameters():
        nn.init.zeros_(parameter)  # nothing of its own may matter
    fit(rest, data[4:] * 2, steps=8, ckpt_path=tmp_path / "half.ckpt")
    assert moved(whole, weights(half)) >= {"encoder", "decoder", "loss"}
    for name, value in weights(whole).items():
        assert torch.equal(rest.state_dict()[name], value), name


def test_a_resumed_run_follows_the_schedule_of_its_own_configuration(tmp_path):
    """Two steps of a line to zero at step 2, then four of one to zero at step 8.

    The second starts from twice the rate.
    """

    def new(rate: float, length: int) -> AutoencodingEngine:
        line = {"warm_up_steps": [0], "f_start": [1.0], "f_max": [1.0], "f_min": [0.0], "cycle_lengths": [length]}
        schedule = {"target": "sgm.lr_scheduler.LambdaLinearScheduler", "params": line}
        return build(optimizer_config={**SGD, "params": {"lr": rate}}, scheduler_config=schedule, disc_start_iter=100)

    trainer = fit(new(1e-3, 2), batches(6), steps=2)
    trainer.save_checkpoint(tmp_path / "short.ckpt")
    trainer = fit(new(2e-3, 8), batches(6), steps=6, ckpt_path=tmp_path / "short.ckpt")
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(2e-3 * (1 - 6 / 8))


# ---------------------------------------------------------------- parameter groups


def test_groups_have_their_own_arguments_and_the_rest_is_fixed():
    engine = build(
        optimizer_config={**SGD, "params": {"lr": 1e-2, "momentum": 0.5}},
        lr_g_factor=0.1,
        trainable_ae_params=[[r"encoder\.conv_out", r"decoder\.conv_in"], [r"decoder\.conv_out"]],
        ae_optimizer_args=[{}, {"lr": 0.5, "weight_decay": 0.25}],
        trainable_disc_params=[[r".*\.weight"]],
        disc_optimizer_args=[{"momentum": 0.0}],
        ema_decay=0.5,
    )
    (autoencoder, discriminator), _ = engine.configure_optimizers()
    names = {id(parameter): name for name, parameter in engine.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in autoencoder.param_groups]
    assert groups == [
        {"encoder.conv_out.weight", "encoder.conv_out.bias", "decoder.conv_in.weight", "decoder.conv_in.bias"},
        {"decoder.conv_out.weight", "decoder.conv_out.bias"},
    ]
    settings = [[group[key] for key in ("lr", "momentum", "weight_decay")] for group in autoencoder.param_groups]
    assert settings == [pytest.approx([1e-3, 0.5, 0]), [0.5, 0.5, 0.25]]
    assert [discriminator.param_groups[0][key] for key in ("lr", "momentum")] == [1e-2, 0.0]
    assert all(names[id(p)].startswith("loss.discriminator") for p in discriminator.param_groups[0]["params"])

    before = weights(engine)
    fit(engine, batches(2), steps=2)
    trained = set().union(*groups) | {names[id(p)] for p in discriminator.param_groups[0]["params"]}
    for name, parameter in engine.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in trained), name
    assert engine.model_ema.shadows().keys() == set().union(*groups)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"trainable_ae_params": [["encoder.conv_ot"]]}, r"'encoder\.conv_ot' matches no .*encoder\.conv_out\.weight"),
        ({"trainable_ae_params": [["encoder"], [".*conv_in"]]}, r"encoder\.conv_in\.weight is in the groups 0 and"),
        ({"trainable_ae_params": [["encoder("]]}, r"'encoder\(' is not a regular expression"),
        ({"trainable_ae_params": ["encoder"]}, "a list of groups"),
        ({"trainable_ae_params": []}, "no parameter of the autoencoder is trained"),
        ({"trainable_ae_params": [["loss.discriminator"]]}, r"'loss\.discriminator' matches no parameter"),
        ({"trainable_disc_params": [["encoder"]]}, r"trainable_disc_params: 'encoder' matches .*loss\.discriminator\."),
        ({"ae_optimizer_args": [{}, {}]}, "2 sets of arguments for 1 groups"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches: got 0"),
        ({"ema_decay": 2}, "ema_decay: got 2"),
        ({"ckpt_path": "a.pt", "ckpt_engine": "b.pt"}, "ckpt_path and ckpt_engine"),
        ({"ckpt_path": "/nowhere.pt"}, r"weight file /nowhere\.pt does not exist"),
        ({"monitr": 1}, "AutoencodingEngine has no setting 'monitr'; did you mean 'monitor'"),
    ],
)  # fmt: skip
def test_unfit_settings_are_refused_in_one_line(setting, message):
    with pytest.raises(UserError, match=message) as error:
        build(**setting)
    assert "\n" not in str(error.value)


def test_training_without_what_it_needs_is_refused():
    with pytest.raises(UserError, match="learning_rate: missing"):
        fit(build(), batches(1), steps=1)
    with pytest.raises(UserError, match="the key 'target'"):
        fit(build(optimizer_config={"params": {"lr": 1e-5}}), batches(1), steps=1)
    with pytest.raises(UserError, match="Identity cannot train an autoencoder"):
        fit(build(loss_config={"target": "torch.nn.Identity"}, optimizer_config=SGD), batches(1), steps=1)
    with pytest.raises(UserError, match="the batch has no 'png', only jpg, seed"):
        fit(build(input_key="png", optimizer_config=SGD), batches(1), steps=1)
    with pytest.raises(UserError, match="got 15x16; it must be multiples of 2"):
        fit(build(optimizer_config=SGD), [{"jpg": torch.zeros(1, 3, 15, 16)}], steps=1)


# ---------------------------------------------------------------- weights


def test_weights_from_files(tmp_path):
    """Weights load from an autoencoder's file, in two formats, and from Lightning's.

    The discriminator is left as it is.
    """
    source = build(optimizer_config=SGD, ema_decay=0.5)
    fit(source, batches(2), steps=2).save_checkpoint(tmp_path / "run.ckpt")
    torch.save({"state_dict": source.coder_state_dict(ema=False)}, tmp_path / "vae.pt")
    save_file(source.coder_state_dict(ema=False), tmp_path / "vae.safetensors")
    assert {name.split(".")[0] for name in source.coder_state_dict(ema=False)} == {"encoder", "decoder"}
    for file in ("vae.pt", "vae.safetensors", "run.ckpt"):
        engine = build(ckpt_path=tmp_path / file, ema_decay=0.5)
        for name, value in source.coder_state_dict(ema=False).items():
            assert torch.equal(engine.state_dict()[name], value)
        averages = source.coder_state_dict(ema=file == "run.ckpt")  # without averages they start from the weights
        assert all(torch.equal(value, averages[name]) for name, value in engine.coder_state_dict(ema=True).items())
    engine = build(ckpt_engine=str(tmp_path / "run.ckpt"), ignore_keys=["loss"])
    assert torch.equal(engine.decoder.conv_out.weight, source.decoder.conv_out.weight)
    config = {"target": "sgm.modules.checkpoint.CheckpointEngine", "params": {"ckpt_path": tmp_path / "vae.pt"}}
    assert torch.equal(build(ckpt_engine=config).decoder.conv_out.weight, source.decoder.conv_out.weight)
    with pytest.raises(UserError, match="no average"):
        engine.coder_state_dict(ema=True)


@pytest.mark.parametrize("change", [{"ch": 64}, {"num_res_blocks": 2}, {"ch_mult": [1, 1, 1]}])
@pytest.mark.parametrize("larger", ["file", "engine"])
def test_a_checkpoint_of_another_architecture_is_refused_in_one_line(tmp_path, change, larger):
    config = image_config()
    other = copy.deepcopy(config)
    for part in ("encoder_config", "decoder_config"):
        other["params"][part]["params"] |= change
    first, second = (other, config) if larger == "file" else (config, other)
    torch.save(instantiate_from_config(first).coder_state_dict(ema=False), tmp_path / "other.pt")
    second["params"]["ckpt_path"] = tmp_path / "other.pt"
    with pytest.raises(UserError, match=r"other\.pt does not fit AutoencodingEngine") as error:
        instantiate_from_config(second)
    assert "\n" not in str(error.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"state_dict": build().state_dict(), "hyper_parameters": IdentityFirstStage}, tmp_path / "code.ckpt")
    with pytest.raises(UserError, match="never run"):
        build(ckpt_path=tmp_path / "code.ckpt")


def test_a_file_that_fits_in_part(tmp_path, caplog):
    """With `strict: false` fitting entries are loaded, and the log names all others."""
    config = image_config()
    other = copy.deepcopy(config)
    other["params"]["decoder_config"]["params"] |= {"ch_mult": [1, 2]}
    torch.manual_seed(1)
    source = instantiate_from_config(other)
    torch.save({"state_dict": {**source.coder_state_dict(ema=False), "extra.w": torch.ones(1)}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt does not fit"):
        build(ckpt_path=tmp_path / "a.pt")

    fresh, engine = build(), build(ckpt_path=tmp_path / "a.pt", strict=False, ema_decay=0.5)
    ours, theirs = engine.state_dict(), source.state_dict()
    coder = source.coder_state_dict(ema=False)
    fitting = {name for name, value in coder.items() if name in ours and value.shape == ours[name].shape}
    assert any(name.startswith("encoder.") for name in fitting)
    assert all(torch.equal(ours[name], theirs[name]) for name in fitting)
    kept = {name for name in fresh.coder_state_dict(ema=False) if name not in fitting}
    assert kept and all(torch.equal(ours[name], fresh.state_dict()[name]) for name in kept)
    assert {name for name in kept if name in theirs} == {
        line.split()[2] for line in caplog.messages if line.startswith("left out: ") and "instead of" in line
    }
    assert "left out: extra.w (no such entry)" in caplog.messages
    assert "fits in part (strict: false)" in caplog.text
    assert kept == {line.split()[-1] for line in caplog.messages if line.startswith("keeps its start: ")}
    averages = engine.coder_state_dict(ema=True)
    assert all(torch.equal(averages[name], ours[name]) for name in averages)

    torch.save({"other": torch.ones(1)}, tmp_path / "b.pt")
    with pytest.raises(UserError, match=r"strict: nothing in .*b\.pt fits AutoencodingEngine: the file holds other"):
        build(ckpt_path=tmp_path / "b.pt", strict=False)


def test_weights_are_applied_after_the_constructor(tmp_path):
    source, engine = build(), build(ema_decay=0.5)
    with torch.no_grad():
        source.decoder.conv_out.weight.add_(1)
    torch.save(source.coder_state_dict(ema=False), tmp_path / "a.pt")
    before = weights(engine)
    engine.apply_ckpt(None)
    assert all(torch.equal(value, before[name]) for name, value in engine.state_dict().items())
    config = {"target": "sgm.modules.checkpoint.CheckpointEngine", "params": {"ckpt_path": str(tmp_path / "a.pt")}}
    for ckpt in (str(tmp_path / "a.pt"), config):
        engine = build(ema_decay=0.5)
        engine.apply_ckpt(ckpt)
        assert torch.equal(engine.decoder.conv_out.weight, source.decoder.conv_out.weight)
        assert torch.equal(engine.model_ema.shadows()["decoder.conv_out.weight"], source.decoder.conv_out.weight)


# ---------------------------------------------------------------- for code written for other engines


class OnlyTheDecoder(AutoencodingEngine):
    """Chooses what is trained, and the optimizer, by the methods that engines have for it."""

    def get_autoencoder_params(self):
        return list(self.decoder.parameters())

    def instantiate_optimizer_from_config(self, params, lr, cfg):
        return super().instantiate_optimizer_from_config(params, 2 * lr, cfg)


def test_leading_arguments_are_positional_in_the_usual_order():
    params = image_config()["params"]
    engine = AutoencodingEngine(0.5, "val/rec", "png", **params)
    assert (engine.ema_decay, engine.monitor, engine.input_key) == (0.5, "val/rec", "png")
    assert engine.use_ema and not build().use_ema
    stage = IdentityFirstStage(None, "val/rec", "png")
    assert (stage.monitor, stage.input_key, stage.use_ema) == ("val/rec", "png", False)
    legacy = image_config("AutoencodingEngineLegacy")["params"]
    assert AutoencodingEngineLegacy(legacy.pop("embed_dim"), **legacy).quant_conv.out_channels == 8
    kl = image_config("AutoencoderKL")["params"]
    embed_dim = kl.pop("embed_dim")
    kl["lossconfig"] = kl.pop("loss_config")
    assert AutoencoderKL(embed_dim, **kl).has_discriminator


def test_encoding_without_the_regularizer_gives_a_pair():
    x = torch.randn(2, 3, 16, 16)
    for target in ("AutoencodingEngine", "AutoencodingEngineLegacy", "AutoencoderKL"):
        engine = build(target)
        moments, report = engine.encode(x, unregularized=True)
        assert moments.shape == (2, 8, 8, 8) and report == {}
        assert torch.equal(engine.encode(x, return_reg_log=True, unregularized=True)[0], moments)
        assert engine.encode(x).shape == (2, 4, 8, 8)
    stage = IdentityFirstStage()
    assert stage.encode(x, unregularized=True) == (x, {}) and stage.get_input(x) is x


def test_the_mean_and_the_codes_as_latents():
    params = image_config("AutoencoderKL")["params"]
    torch.manual_seed(0)
    mean = AutoencoderKLModeOnly(**params)
    x = torch.randn(1, 3, 16, 16)
    moments = mean.encode(x, unregularized=True)[0]
    assert torch.equal(mean.encode(x), moments.chunk(2, dim=1)[0])
    params["ddconfig"] = {**params["ddconfig"], "double_z": False}
    codes = AutoencoderLegacyVQ(4, 16, **{name: value for name, value in params.items() if name != "embed_dim"})
    latents = codes.encode(x).movedim(1, -1).flatten(0, -2)
    table = codes.regularization.embedding.weight
    assert (torch.cdist(latents, table).min(1).values < 1e-4).all()
    with pytest.raises(UserError, match="double_z is on; set double_z: false"):
        AutoencoderLegacyVQ(4, 16, ddconfig=image_config("AutoencoderKL")["params"]["ddconfig"])


def test_parameters_by_their_optimizer_and_in_groups():
    engine = build()
    names = {id(parameter): name for name, parameter in engine.named_parameters()}
    autoencoder = {names[id(each)].split(".")[0] for each in engine.get_autoencoder_params()}
    assert autoencoder == {"encoder", "decoder", "loss"}  # `loss` has the log-variance
    assert [names[id(each)] for each in engine.get_autoencoder_params() if names[id(each)].startswith("loss")] == [
        "loss.logvar"
    ]
    assert all(names[id(each)].startswith("loss.discriminator") for each in engine.get_discriminator_params())
    plain = build(loss_config={"target": "torch.nn.MSELoss"})
    assert plain.get_discriminator_params() == [] and plain.get_autoencoder_params()

    groups, count = engine.get_param_groups([["encoder", r"decoder\.conv_in"], ["decoder.conv_out"]], [{}, {"lr": 3.0}])
    assert [group.get("lr") for group in groups] == [None, 3.0]
    assert [id(each) for each in groups[1]["params"]] == [id(each) for each in engine.decoder.conv_out.parameters()]
    assert count == sum(each.numel() for group in groups for each in group["params"])
    with pytest.raises(UserError, match="parameter_names: 'encodr' matches no parameter"):
        engine.get_param_groups([["encodr"]])
    with pytest.raises(UserError, match="optimizer_args: 1 sets of arguments for 2 groups"):
        engine.get_param_groups([["encoder"], ["decoder"]], [{}])

    optimizer = engine.instantiate_optimizer_from_config(groups, 0.5, {"target": "torch.optim.SGD"})
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 3.0]


def test_overridden_methods_take_effect():
    engine = OnlyTheDecoder(**image_config(optimizer_config=SGD)["params"])
    before = weights(engine)
    optimizer = engine.configure_optimizers()[0][0]
    assert optimizer.param_groups[0]["lr"] == 2e-5
    fit(engine, batches(2), steps=1)
    assert "encoder" not in moved(engine, before)
    assert not any(parameter.requires_grad for parameter in engine.encoder.parameters())


def test_averages_within_a_named_scope(caplog):
    engine = build(ema_decay=0.5)
    with torch.no_grad():
        engine.decoder.conv_out.bias.fill_(5.0)
    with caplog.at_level("INFO"), engine.ema_scope("Validation"):
        assert (engine.decoder.conv_out.bias != 5).any()
    assert (engine.decoder.conv_out.bias == 5).all()
    assert caplog.messages == [
        "Validation: with the averaged weights",
        "Validation: back to the weights in training",
    ]


# ---------------------------------------------------------------- validation and images


def test_validation_reports_every_term_with_the_weights_and_their_averages():
    engine = build(optimizer_config=SGD, ema_decay=0.99)
    data = batches(4)
    fit(engine, data, steps=4)
    before = weights(engine)
    log, again = engine.validate(data[0]), engine.validate(data[0])
    terms = {"rec", "loss/total", "loss/rec", "loss/nll", "loss/g", "loss/logvar", "loss/disc", "loss/kl_loss"}
    for split in ("val", "val_ema"):
        missing = {term for term in terms if f"{split}/{term}" not in log and f"{split}/{term[5:]}" not in log}
        assert not missing
    assert log["val/rec"] != log["val_ema/rec"]
    assert all(torch.equal(value, again[name]) for name, value in log.items())
    assert all(
        torch.equal(value, before[name])
        for name, value in engine.state_dict().items()
        if "num_batches" not in name and "running" not in name
    )
    with engine.ema_scope():
        assert torch.equal(engine.decoder.conv_out.weight, engine.model_ema.shadows()["decoder.conv_out.weight"])
        x = engine.get_input(data[0])
    assert x.min() >= -1 and x.max() <= 1
    assert torch.equal(engine.decoder.conv_out.weight, before["decoder.conv_out.weight"])


def test_images_to_look_at():
    engine = build(ema_decay=0.9, diff_boost_factor=5.0)
    batch = batches(1)[0]
    images = engine.log_images(batch)
    kinds = ("reconstructions", "diff", "diff_boost")
    of_the_loss = {"logits_real", "logits_fake"}
    assert set(images) == {"inputs", *kinds, *(f"{kind}_ema" for kind in kinds), *of_the_loss}
    for image in images.values():
        assert image.shape == batch["jpg"].shape and image.min() >= -1 and image.max() <= 1
    assert_close(images["inputs"], batch["jpg"] / 127.5 - 1, 1e-6)
    difference = (images["inputs"] - images["reconstructions"]).abs()
    assert_close(images["diff"], difference - 1, 1e-5)
    assert_close(images["diff_boost"], (5 * difference).clamp(max=2) - 1, 1e-5)
    assert engine.training


def test_regularizer_parameters_are_trained():
    """A codebook is trained with the autoencoder, averaged and exported."""
    config = image_config()
    config["params"]["encoder_config"]["params"] = {**config["params"]["encoder_config"]["params"], "double_z": False}
    config["params"] |= {
        "regularizer_config": {
            "target": "sgm.modules.autoencoding.regularizers.VectorQuantizer",
            "params": {"n_e": 16, "e_dim": 4, "beta": 0.25},
        },
        "optimizer_config": SGD,
        "ema_decay": 0.5,
    }
    config["params"]["loss_config"] = {"target": "autoencoder_training.MeanSquare", "params": {"penalty": 1.0}}
    engine = instantiate_from_config(config)
    before = weights(engine)
    fit(engine, batches(2), steps=2)
    assert moved(engine, before) == {"encoder", "decoder", "regularization"}
    assert any(name.startswith("regularization.") for name in engine.coder_state_dict(ema=True))
