"""A batch in parts gives the same result, with one part in the network at a time."""

import pytest
import torch

from arguments import get_args
from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.network.batch_parts import in_parts
from diffusion_video import SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.modules.diffusionmodules.sampling_bar import hide_bar
from support import assert_close


def test_what_is_divided():
    calls = []

    def network(x, t, cond, **inputs):
        calls.append((len(x), len(t), len(cond["a"]), {name: getattr(v, "shape", v) for name, v in inputs.items()}))
        return x + t[:, None]

    x, t = torch.randn(5, 3), torch.arange(5.0)
    cond = {"a": torch.randn(5, 2)}
    out = in_parts(network, 2)(x, t, cond, idx=torch.arange(5), scale=torch.tensor(2.0), ofs=torch.zeros(1), name="n")
    assert torch.equal(out, x + t[:, None])
    assert [call[:3] for call in calls] == [(2, 2, 2), (2, 2, 2), (1, 1, 1)]
    assert calls[0][3] == {"idx": (2,), "scale": (), "ofs": (1,), "name": "n"}
    assert in_parts(network, 5)(x, t, cond).shape == x.shape and len(calls) == 4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["2b", "5b_i2v", "1.5_i2v"])
def test_guidance_in_two_halves(tiny, family, one_thread):
    """Results are equal except for float32 rounding: 1e-6 after a step, 0 in float64."""
    for steps, dtype in ((1, torch.float32), (3, torch.float64)):
        latents, seen = zip(*(sampled(tiny, family, parts, steps, dtype) for parts in (2, 1)), strict=True)
        assert set(seen[0]) == {4} and set(seen[1]) == {2} and len(seen[1]) == 2 * len(seen[0])
        assert_close(latents[1], latents[0], 1e-6)


def sampled(tiny, family: str, guidance_batch: int, steps: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[int]]:
    """Return the latents of two videos, and how many samples the network had at each call."""
    config, seen = load_configs([tiny.config(family)]), []
    settings = EngineSettings(config["model"], load=config["args"]["load"], guidance_batch=guidance_batch)
    engine = SATVideoDiffusionEngine(settings, parts=("model",), params_dtype=dtype)
    hide_bar(engine.sampler)
    engine.network.register_forward_pre_hook(lambda _, args, __: seen.append(len(args[0])), with_kwargs=True)
    modules, channels = config["model"]["network_config"]["params"]["modules"], engine.network.out_channels
    torch.manual_seed(0)
    width = modules["patch_embed_config"]["params"]["text_hidden_size"]
    cond, uc = ({"crossattn": torch.randn(2, 16, width)} for _ in range(2))
    image = None
    if engine.noised_image_input:
        image = engine.concat_condition(torch.randn(2, 1, channels, 8, 12), 4)
    ofs = engine.default_ofs(2)
    return engine.sample(cond, uc, 2, (4, channels, 8, 12), image, ofs, num_steps=steps), seen


def test_other_numbers_are_refused(tiny):
    with pytest.raises(UserError, match="guidance_batch: got 3; it can be 1 or 2"):
        get_args(["--base", str(tiny.config("5b")), "--input_file", "prompts.txt", "--guidance_batch", "3"])
