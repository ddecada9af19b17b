"""Every parameter that is trained is counted, in a group."""

import pytest

from cogvideox_sat.training.trainable_parameters import trainable_groups
from sgm.errors import UserError
from untrained_engines import engine_of

FAMILIES = ("2b", "5b", "5b_i2v", "1.5", "1.5_i2v")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trainable_parameter_has_a_group(tiny, family):
    network = engine_of(tiny.config(family)).network
    groups = trainable_groups(network.named_parameters())
    assert sum(groups.values()) == sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert set(groups) == {"final layer", "modulation", "norms", "attention", "mlp", "embeddings"}
    layer = network.transformer.layers[0]
    assert groups["attention"] == 2 * sum(p.numel() for p in layer.attention.parameters())
    assert groups["mlp"] == 2 * sum(p.numel() for p in layer.mlp.parameters())


def test_adapters_are_a_group_of_their_own(tiny):
    network = engine_of(tiny.config("5b"), lora=True).network
    width, layers, rank = 256, 2, 4
    assert trainable_groups(network.named_parameters()) == {"adapter": layers * (3 + 1) * 2 * rank * width}


def test_nothing_to_train_is_refused(tiny):
    network = engine_of(tiny.config("5b")).network.requires_grad_(False)
    with pytest.raises(UserError, match="nothing is to be trained"):
        trainable_groups(network.named_parameters())
