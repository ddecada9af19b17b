"""Precomputed modulations equal those of the layers; sampling does not use the weights."""

import pytest
import torch
from sat.model.finetune.lora2 import LoraLinear
from torch import Tensor, nn

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.network import compiled_layers
from cogvideox_sat.network.adaptive_layer import AdaLNMixin
from cogvideox_sat.network.block import block
from cogvideox_sat.network.layer_streaming import layer_modules, stream_layers, tensors_of
from cogvideox_sat.network.modulation_table import ModulationTable
from cogvideox_sat.sampling.part_offloading import PartOffloader
from diffusion_video import SATVideoDiffusionEngine
from reference_networks import network_and_inputs
from sgm.modules.diffusionmodules.sampling_bar import hide_bar
from sgm.util import instantiate_from_config
from support import Reference

CPU = torch.device("cpu")
FAMILIES = ["t2v_2b", "t2v_5b", "i2v_5b", "t2v_15", "i2v_15", "t2v_2b_lora"]


def without_modulation_weights(network: nn.Module) -> None:
    """Make any further use of the weights show."""
    for parameter in network.mixins["adaln_layer"].adaLN_modulations.parameters():
        parameter.data.fill_(float("nan"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_to_the_bit(name, dtype):
    """Results are equal to the bit, plain and streamed, for equal and different timesteps.

    The weights are not needed once all modulations are known.
    """
    network, inputs = network_and_inputs(name)
    network.to(dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    same = {**inputs, "timesteps": torch.full_like(inputs["timesteps"], 7)}
    expected = [network(**given) for given in (inputs, same)]
    assert network.tabulate_modulations(CPU)
    for _ in range(2):
        for given, output in zip((inputs, same), expected, strict=True):
            assert torch.equal(network(**given), output)
        without_modulation_weights(network)
    samples = [rows.shape[1] for rows in network.modulation_table.kept.values()]
    assert samples == [len(inputs["x"]) if len(set(inputs["timesteps"].tolist())) > 1 else 1, 1]
    streamer = stream_layers(network, CPU)
    assert torch.equal(network(**inputs), expected[0])
    streamed = {id(tensor) for tensors in streamer.layers for tensor in tensors}
    assert streamed == {id(t) for modules in layer_modules(network) for module in modules for t in tensors_of(module)}
    assert streamed.isdisjoint(map(id, network.mixins["adaln_layer"].adaLN_modulations.parameters()))


@torch.no_grad()
def test_compiled_layers_take_it(monkeypatch):
    monkeypatch.setattr(compiled_layers, "compiled_block", lambda: block)
    network, inputs = network_and_inputs("t2v_5b")
    assert network.compile_layers()
    expected = network(**inputs)
    network.tabulate_modulations(CPU)
    network(**inputs)
    without_modulation_weights(network)
    assert torch.equal(network(**inputs), expected)
    assert network.compiles_layers


@torch.no_grad()
def test_an_adapter_on_these_weights_counts():
    network, inputs = network_and_inputs("t2v_5b")
    for modulation in network.mixins["adaln_layer"].adaLN_modulations:
        linear = modulation[1]
        lora = LoraLinear(nn.Linear, 1, linear.in_features, linear.out_features, 2, original_obj=linear)
        for matrix in (*lora.matrix_A, *lora.matrix_B):
            nn.init.normal_(matrix)
        modulation[1] = lora
    expected = network(**inputs)
    assert network.tabulate_modulations(CPU)
    assert torch.equal(network(**inputs), expected)


class Watched(AdaLNMixin):
    """A mixin of the user's own."""


def test_other_uses_of_these_weights_keep_them():
    network, _ = network_and_inputs("t2v_5b")
    network.mixins["adaln_layer"].adaLN_modulations[0].register_forward_hook(lambda *_: None)
    assert not network.tabulate_modulations(CPU)
    config = Reference("dit/t2v_5b").case["network_config"]
    config["params"]["modules"]["adaln_layer_config"]["target"] = f"{__name__}.Watched"
    assert not instantiate_from_config(config).tabulate_modulations(CPU)


def test_it_does_not_outgrow_the_weights():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 24) for _ in range(2)]
    table = ModulationTable(layers, CPU)
    assert table.weight_bytes == 2 * (4 * 24 + 24) * 4
    rows = [torch.randn(1, 4) for _ in range(9)]
    table.fill(rows[:4])
    table.fill([rows[0]])  # used last, so it stays
    table.fill(rows[4:6])
    assert len(table.kept) == 5 and torch.equal(table(rows[0])[1], layers[1](rows[0]))
    table.fill(rows)  # all at once are kept however many
    assert len(table.kept) == 9
    table.fill([rows[1]])
    assert len(table.kept) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "guidance_batch", "sampler"),
    [
        ("5b", 2, {}),
        ("1.5_i2v", 1, {}),
        ("2b", 2, {"target": "sgm.modules.diffusionmodules.sampling.VideoDDIMSampler"}),
    ],
)
def test_all_steps_are_worked_out_before_the_first(tiny, monkeypatch, family, guidance_batch, sampler):
    """Latents are equal to the bit; weights are loaded once; random numbers do not change."""
    config = load_configs([tiny.config(family)])
    config["model"]["sampler_config"] |= sampler
    settings = EngineSettings(config["model"], load=config["args"]["load"], guidance_batch=guidance_batch)
    fills = []
    fill = ModulationTable.fill
    monkeypatch.setattr(ModulationTable, "fill", lambda table, asked: fills.append(fill(table, list(asked)) or table))

    def latents(offload: str) -> Tensor:
        engine = SATVideoDiffusionEngine(settings, parts=())
        hide_bar(engine.sampler)
        PartOffloader(engine, offload).use("model")
        width = config["model"]["network_config"]["params"]["modules"]["patch_embed_config"]["params"]
        torch.manual_seed(3)
        cond, uc = ({"crossattn": torch.randn(1, 16, width["text_hidden_size"])} for _ in range(2))
        image = engine.concat_condition(torch.randn(1, 1, 16, 8, 12), 4) if engine.noised_image_input else None
        found, steps = [], []
        for _ in range(2):
            drawn = engine.sample(
                *(cond, uc, 1, (4, 16, 8, 12), image, engine.default_ofs(1), 3),
                callback=lambda done, of: steps.append((done, of)),
            )
            found.append(drawn)
            if offload == "sequential":
                assert len(engine.network.modulation_table.kept) == 3
                without_modulation_weights(engine.network)
        assert steps == [(1, 3), (2, 3), (3, 3)] * 2
        return torch.stack([*found, torch.rand(found[0].shape)])

    expected = latents("none")
    assert not fills
    assert torch.equal(latents("sequential"), expected)
    assert torch.isfinite(expected).all()
