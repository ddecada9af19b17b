"""The arguments of the network's `forward` are checked; keywords are the original's."""

import pytest
import torch
from sat.model.base_model import BaseMixin

from cogvideox_sat.network.call_arguments import patch_grid
from reference_networks import network_and_inputs
from sgm.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def test_an_image_condition_is_joined_on_channels():
    """Arguments may be positional: x, timesteps, context, y, concat_images, ofs."""
    network, inputs = network_and_inputs("i2v_15")
    expected = network(**inputs)
    x, condition = inputs["x"].chunk(2, dim=2)
    assert torch.equal(network(**{**inputs, "x": x}, concat_images=condition), expected)
    ofs = inputs["ofs"]
    assert torch.equal(network(x, inputs["timesteps"], inputs["context"], None, condition, ofs), expected)
    with pytest.raises(UserError, match="takes `ofs`"):
        network(x, inputs["timesteps"], inputs["context"], concat_images=condition)


@torch.no_grad()
def test_what_denoisers_hand_on_changes_nothing():
    network, inputs = network_and_inputs("t2v_2b")
    expected = network(**inputs)
    ignored = {"idx": torch.tensor([3]), "scale_emb": torch.ones(1), "ofs": torch.tensor([2.0]), "y": None}
    assert torch.equal(network(**inputs, **ignored), expected)


@pytest.mark.parametrize("name", ["concat_image", "attention_mask", "grid", "emb", "text_length"])
def test_other_keywords_are_errors(name):
    network, inputs = network_and_inputs("t2v_2b")
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        network(**inputs, **{name: torch.ones(1)})


@pytest.mark.parametrize("channels", [8, 32])
def test_channels_that_do_not_fit(channels):
    network, inputs = network_and_inputs("t2v_2b")
    b, t, _, h, w = inputs["x"].shape
    inputs["x"] = torch.zeros(b, t, channels, h, w)
    with pytest.raises(UserError, match=f"the latents have {channels} channels, but this network takes 16"):
        network(**inputs)


def test_clips_that_do_not_fit_are_refused():
    patch, largest = (2, 2, 2), (4, 4, 6)
    assert patch_grid(torch.empty(1, 4, 16, 8, 12), patch, largest) == (2, 4, 6)
    with pytest.raises(UserError, match="do not divide into patches"):
        patch_grid(torch.empty(1, 3, 16, 8, 12), patch, largest)
    with pytest.raises(UserError, match=r"exceed this model's \(8, 8, 12\)"):
        patch_grid(torch.empty(1, 4, 16, 8, 14), patch, largest)


def test_the_network_checks_the_size_of_clips():
    network, _ = network_and_inputs("t2v_15")
    with pytest.raises(UserError, match=r"exceed this model's \(8, 8, 12\)"):
        network.patch_grid(torch.empty(1, 4, 16, 8, 14))


def test_a_condition_of_another_size():
    network, inputs = network_and_inputs("i2v_5b")
    x, condition = inputs["x"].chunk(2, dim=2)
    with pytest.raises(UserError, match="concat_images has the shape"):
        network(**{**inputs, "x": x}, concat_images=condition[:, :1])


class Recorder(BaseMixin):
    """A user's mixin: it notes the keywords that reach the layers."""

    def layer_forward(self, hidden_states, mask, *, layer_id, strength, **kwargs):
        self.seen = (strength, kwargs.get("idx"))
        return hidden_states


@torch.no_grad()
def test_a_mixin_of_the_user_s_gets_them():
    network, inputs = network_and_inputs("t2v_2b")
    recorder = Recorder()
    network.del_mixin("adaln_layer")
    network.add_mixin("recorder", recorder)
    network(**inputs, strength=0.5, idx=7)
    assert recorder.seen == (0.5, 7)
    with pytest.raises(TypeError, match="unexpected keyword argument 'grid'"):
        network(**inputs, strength=0.5, grid=(1, 1, 1))
    network.del_mixin("recorder")
    assert not network.has_foreign_mixin
