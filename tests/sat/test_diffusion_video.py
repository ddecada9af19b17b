"""The whole engine equals reference numbers: embeddings, latents, loss and samples."""

import random
import weakref
from argparse import Namespace
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import nn

from diffusion_video import SATVideoDiffusionEngine
from long_cases import others_long
from seeded import seed_module_, seeded_input
from sgm.errors import UserError
from sgm.modules.autoencoding.clip import Chunk
from sgm.modules.diffusionmodules.sampling_start import Start
from sgm.randomness import per_sample
from support import REFERENCE, Reference, assert_close


def seed_everything(seed: int) -> None:
    for set_seed in (torch.manual_seed, np.random.seed, random.seed):
        set_seed(seed)


@pytest.fixture(scope="module", params=["t2v_2b", "i2v_5b"])
def case(request):
    """Return name, reference, seeded engine and seeded clip (b, t, c, h, w) of one case."""
    name = request.param
    reference = Reference(f"engine/{name}")
    config, seed = reference.case["model"], reference.case["seed"]
    config["conditioner_config"]["params"]["emb_models"][0]["params"]["model_dir"] = str(REFERENCE / "tiny_t5")
    engine = SATVideoDiffusionEngine(Namespace(model_config=config))
    frozen = ("pos_embed.pos_embedding",) if name == "t2v_2b" else ()
    seed_module_(engine.model, seed, prefix="model.", skip=frozen)
    seed_module_(engine.first_stage_model, seed, prefix="first_stage_model.")
    clip = seeded_input(f"{name}.video", reference.case["video"], seed).clamp(-1, 1)
    return name, reference, engine, clip


def embeddings(reference, engine) -> tuple[torch.Tensor, torch.Tensor]:
    texts = reference.case["texts"]
    cond, uncond = engine.conditioner.get_unconditional_conditioning(
        {"txt": texts}, {"txt": [""] * len(texts)}, force_uc_zero_embeddings=["txt"]
    )
    return cond["crossattn"], uncond["crossattn"]


def test_text_embeddings(case):
    _, reference, engine, _ = case
    cond, uncond = embeddings(reference, engine)
    assert_close(cond, reference["crossattn"], 1e-5)
    assert torch.equal(uncond, reference["uncond"])


def test_encoded_latents(case):
    _, reference, engine, clip = case
    torch.manual_seed(reference.case["torch_manual_seed"]["encode"])
    assert_close(engine.encode_first_stage(rearrange(clip, "b t c h w -> b c t h w")), reference["latent"], 2e-4)


def test_training_loss(case):
    """Also fixes the order of all random draws of a training step."""
    _, reference, engine, clip = case
    seed_everything(reference.case["torch_manual_seed"]["loss (torch, numpy and random)"])
    loss, logged = engine.shared_step({"mp4": clip, "txt": reference.case["texts"]})
    assert_close(loss, reference["loss"], 2e-4)
    assert torch.equal(logged["loss"], loss)


def test_sampled_latents(case):
    name, reference, engine, _ = case
    cond, uncond = embeddings(reference, engine)
    concat_images = None
    if reference.case["image_latent"]:
        image = seeded_input(f"{name}.image_latent", reference.case["image_latent"], reference.case["seed"])
        concat_images = engine.concat_condition(image, reference.case["sample_shape"][0])
    torch.manual_seed(reference.case["torch_manual_seed"]["sample"])
    samples = engine.sample(
        {"crossattn": cond[:1]},
        {"crossattn": uncond[:1]},
        shape=tuple(reference.case["sample_shape"]),
        concat_images=concat_images,
    )
    assert_close(samples, reference["sample"], 2e-4)


def draw(case, num_steps=3, **options):
    """Sample latents of the case's first text."""
    name, reference, engine, _ = case
    cond, uncond = embeddings(reference, engine)
    shape = tuple(reference.case["sample_shape"])
    if reference.case["image_latent"]:
        image = seeded_input(f"{name}.image_latent", reference.case["image_latent"], reference.case["seed"])
        options["concat_images"] = engine.concat_condition(image, shape[0])
    torch.manual_seed(5)
    return engine.sample(
        {"crossattn": cond[:1]}, {"crossattn": uncond[:1]}, shape=shape, num_steps=num_steps, **options
    )


def test_sampling_starts_from_a_clip(case):
    """Strength 1 ignores the clip to the bit, 0 returns it, others take fewer steps."""
    from_noise = draw(case)
    clip, told = torch.randn_like(from_noise), []
    assert torch.equal(draw(case, start=Start(clip, 1.0)), from_noise)
    assert torch.equal(draw(case, start=Start(clip, 0.0)), clip)
    between = draw(case, start=Start(clip, 0.67), callback=lambda *counts: told.append(counts))
    assert told == [(1, 2), (2, 2)] and not torch.equal(between, from_noise)
    with pytest.raises(UserError, match="video: latents of shape"):
        draw(case, start=Start(clip[:, 1:]))


def test_sampling_goes_on_from_a_prefix(case):
    from_noise = draw(case)
    prefix = torch.randn_like(from_noise[:, :1])
    longer = draw(case, prefix=prefix)
    assert torch.equal(longer[:, :1], prefix) and not torch.equal(longer[:, 1:], from_noise[:, 1:])
    assert torch.equal(draw(case, start=Start(prefix=prefix)), longer)
    assert torch.equal(draw(case, prefix=prefix[:, :0]), from_noise)
    for wrong in (torch.randn_like(from_noise), prefix[..., :2]):
        with pytest.raises(UserError, match="prefix: latents of shape"):
            draw(case, prefix=wrong)


def test_a_sampler_of_the_users_own_goes_on_from_frames_but_starts_from_no_clip(case, monkeypatch):
    """It finds the frames where the original puts them: in front of the noise."""
    given = []

    def sampler(denoise, x, cond, uc=None, num_steps=None):
        given.append(x)
        return x

    monkeypatch.setattr(case[2], "sampler", sampler)
    clip = torch.randn(1, *case[1].case["sample_shape"])
    draw(case, prefix=clip[:, :1])
    assert torch.equal(given[0][:, :1], clip[:, :1])
    with pytest.raises(UserError, match="video: function takes no `start`"):
        draw(case, start=Start(clip))


def test_a_clip_is_encoded_without_chance(case):
    """As the mean of its posterior, for which no random number is drawn."""
    _, _, engine, clip = case
    clip = rearrange(clip, "b t c h w -> b c t h w")
    state = torch.get_rng_state()
    means = engine.encode_means(clip)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(means, engine.scale_factor * engine.encode_moments(clip)[:, : means.shape[1]])
    engine.regularizer.sample = False
    assert_close(engine.sample_latent(engine.encode_moments(clip)), means, 1e-6)
    engine.regularizer.sample = True


def test_decoding_all_at_once_equals_the_stream(case):
    _, reference, engine, _ = case
    latents = reference["latent"][:1]
    frames = engine.decode_first_stage(latents)
    assert frames.shape == (1, 3, 9, 64, 96)
    assert torch.equal(frames, torch.cat(list(engine.decode_stream(latents)), dim=2))


@pytest.mark.slow
def test_log_video_shows_inputs_reconstructions_and_samples(case):
    _, reference, engine, clip = case
    batch = {"mp4": clip, "txt": reference.case["texts"]}
    log = engine.log_video(batch, N=1, num_steps=2)
    assert log["txt"] == reference.case["texts"][:1]
    for key in ("inputs", "reconstructions", "samples"):
        assert log[key].shape == (1, *clip.shape[1:]) and torch.isfinite(log[key]).all()
    latents = engine.log_video(batch, N=1, num_steps=2, only_log_video_latents=True)["latents"]
    assert latents.shape == (1, *reference.case["sample_shape"])


def test_only_the_network_trains(case):
    _, _, engine, _ = case
    engine.disable_untrainable_params()
    trainable = {name.split(".")[0] for name, parameter in engine.named_parameters() if parameter.requires_grad}
    assert trainable == {"model"}


@pytest.mark.slow
def test_a_released_part_gives_its_memory_back():
    """At once, not when the garbage collector happens to run."""
    config = Reference("engine/t2v_2b").case["model"]
    engine = SATVideoDiffusionEngine(Namespace(model_config=config), parts=("model", "first_stage_model"))
    for part in ("model", "first_stage_model"):
        weight = weakref.ref(next(getattr(engine, part).parameters()))
        engine.release(part)
        assert weight() is None and getattr(engine, part) is None


def test_loss_reaches_every_parameter_of_the_network(case):
    _, reference, engine, clip = case
    loss, _ = engine.shared_step({"mp4": clip[:1], "txt": reference.case["texts"][:1]})
    loss.backward()
    frozen = {name for name, parameter in engine.network.named_parameters() if not parameter.requires_grad}
    table = "transformer.position_embeddings.weight"  # not used, so that training freezes it
    assert frozen <= {"mixins.pos_embed.pos_embedding", table}  # sines and cosines
    unused = {table} | frozen
    gradients = {name: parameter.grad for name, parameter in engine.network.named_parameters()}
    assert {name for name, gradient in gradients.items() if gradient is None} == unused & gradients.keys()
    finite = [gradient.isfinite().all() for gradient in gradients.values() if gradient is not None]
    assert len(finite) > 20 and all(finite)
    engine.zero_grad()


# ---------------------------------------------------------------- a few samples at a time


class OneByOne(nn.Module):
    """An encoder whose result for a sample does not depend on the batch, to the bit."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.sizes = encoder, []
        self.time_factor, self.space_factor = encoder.time_factor, encoder.space_factor

    def forward(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        self.sizes.append(len(x))
        return torch.cat([self.encoder(sample[None], chunk) for sample in x])


@pytest.fixture
def few(case):
    """Return the engine, three clips (b, c, t, h, w), and the encoder's batch sizes."""
    _, _, engine, clip = case
    stage = engine.first_stage_model
    stage.encoder = OneByOne(stage.encoder)
    clip = clip[:, :5]
    clips = rearrange(torch.cat([clip, clip.flip(1), -clip]), "b t c h w -> b c t h w")[:3]
    yield engine, clips, stage.encoder.sizes
    stage.encoder, engine.samples_at_a_time = stage.encoder.encoder, None


@pytest.mark.slow
@pytest.mark.parametrize("seeded_samples", others_long(True, False))
def test_samples_are_encoded_a_few_at_a_time_with_the_same_noise(few, seeded_samples):
    engine, clips, sizes = few
    latents = {}
    for engine.samples_at_a_time in (None, 2, 1, 7):
        torch.manual_seed(0)
        with per_sample([3, 4, 5]) if seeded_samples else nullcontext():
            latents[engine.samples_at_a_time] = engine.encode_first_stage(clips)
    assert sizes == [3, 2, 1, 1, 1, 1, 3]
    for at_a_time in (2, 1, 7):
        assert torch.equal(latents[at_a_time], latents[None])
    for engine.samples_at_a_time in (None, 2):
        with torch.no_grad():  # with gradients other kernels compute
            whole = engine.first_stage_model.encode(clips, unregularized=True)[0]
        assert torch.equal(engine.encode_moments(clips), whole)


@pytest.mark.slow
@pytest.mark.long
def test_samples_are_decoded_a_few_at_a_time(few):
    """Samples equal those of each group to the bit, and those of one batch up to rounding."""
    engine, clips, _ = few
    z = engine.encode_first_stage(clips)
    whole, chunks = engine.decode_first_stage(z), list(engine.decode_stream(z))
    sizes = []
    hook = engine.first_stage_model.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for at_a_time in (2, 1):
        groups = torch.cat([engine.decode_first_stage(group) for group in z.split(at_a_time)])
        sizes.clear()
        engine.samples_at_a_time = at_a_time
        assert torch.equal(engine.decode_first_stage(z), groups)
        streamed = list(engine.decode_stream(z))
        assert max(sizes) == at_a_time
        assert [chunk.shape for chunk in streamed] == [chunk.shape for chunk in chunks]
        assert torch.equal(torch.cat(streamed, dim=2), groups)
        assert_close(groups, whole, 1e-5)
        engine.samples_at_a_time = None
    hook.remove()


@pytest.mark.slow
def test_a_training_step_is_the_same_in_groups(case, few):
    engine, clips, sizes = few
    _, reference, _, _ = case
    texts = (reference.case["texts"] * 3)[:3]
    losses = []
    for engine.samples_at_a_time in (None, 1):
        sizes.clear()
        seed_everything(1)
        losses.append(engine.shared_step({"mp4": rearrange(clips, "b c t h w -> b t c h w"), "txt": texts})[0])
    assert torch.equal(*losses) and set(sizes) == {1}


def test_the_number_comes_from_the_configuration(case):
    _, reference, _, _ = case
    config = {**reference.case["model"], "en_and_decode_n_samples_a_time": 3}
    assert SATVideoDiffusionEngine(Namespace(model_config=config), parts=()).samples_at_a_time == 3
