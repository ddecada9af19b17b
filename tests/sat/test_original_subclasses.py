"""Engines and samplers with the original's signatures work in place of ours."""

import pytest
import torch
from sat.model.base_model import get_model

from arguments import get_args
from diffusion_video import SATVideoDiffusionEngine
from sgm.modules.diffusionmodules.base_sampler import BaseDiffusionSampler
from sgm.modules.diffusionmodules.sampling import VPSDEDPMPP2MSampler

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = ["--sampling_image_size", "64", "96", "--sampling_num_frames", "1"]


class Original(SATVideoDiffusionEngine):
    def __init__(self, args, **kwargs):
        super().__init__(args, **kwargs)

    def shared_step(self, batch):
        return super().shared_step(batch)

    def forward(self, x, batch):
        return super().forward(x, batch)


class OriginalSampler(VPSDEDPMPP2MSampler):
    def __call__(self, denoiser, x, cond, uc=None, num_steps=None, scale=None, scale_emb=None):
        return super().__call__(denoiser, x, cond, uc=uc, num_steps=num_steps)


class Halving(BaseDiffusionSampler):
    """Has neither a schedule nor a place for `ofs`."""

    def __call__(self, denoiser, x, cond, uc=None, num_steps=None):
        return x / 2 + 0 * denoiser(x, x.new_ones(len(x)), cond)


def arguments(tiny, name="5b"):
    return get_args(["--base", str(tiny.config(name)), "--input_file", "p.txt", *SIZE])


def test_an_evaluation_drops_nothing_in_a_step_of_the_original(tiny):
    args = arguments(tiny)
    args.model_config["conditioner_config"]["params"]["emb_models"][0]["ucg_rate"] = 1.0
    clip = torch.randint(0, 256, (1, 1, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    losses = {}
    for engine in (SATVideoDiffusionEngine(args), Original(args)):
        for step in (engine.validation_step, engine.shared_step):
            torch.manual_seed(1)
            losses[type(engine).__name__, step.__name__] = step({"mp4": clip, "txt": ["a fox in the snow"]})[0].item()
    ours, theirs = (
        [losses[name, step] for step in ("validation_step", "shared_step")]
        for name in (SATVideoDiffusionEngine.__name__, Original.__name__)
    )
    assert ours == theirs
    assert ours[0] != ours[1]  # the caption was dropped


def test_a_sampler_of_the_original(tiny):
    engine = SATVideoDiffusionEngine(arguments(tiny), parts=("model",))
    cond, uncond = ({"crossattn": torch.full((1, 16, 64), value)} for value in (1.0, 0.0))

    def sample() -> torch.Tensor:
        torch.manual_seed(0)
        return engine.sample(cond, uncond, shape=(1, 16, 8, 12), num_steps=2, callback=lambda *_: None)

    ours = sample()
    config = dict(engine.config["sampler_config"]["params"])
    engine.sampler = OriginalSampler(**config)
    assert torch.equal(sample(), ours)


def test_a_sampler_without_ofs_for_a_network_that_takes_it(tiny):
    engine = SATVideoDiffusionEngine(arguments(tiny, "1.5_i2v"), parts=("model",))
    asked = []
    engine.denoiser.forward = lambda network, x, level, c, **inputs: asked.append(inputs["ofs"]) or x
    engine.sampler = Halving({"target": "sgm.modules.diffusionmodules.discretizer.EDMDiscretization"})
    engine.sample({}, shape=(2, 16, 8, 12), ofs=engine.default_ofs(1))
    assert asked == [torch.tensor([2.0])]


def test_swissarmytransformers_get_model(tiny):
    args = arguments(tiny)
    args.bf16, args.device = True, "cpu"
    engine = get_model(args, SATVideoDiffusionEngine)
    assert engine.dtype == next(engine.network.parameters()).dtype == torch.bfloat16
