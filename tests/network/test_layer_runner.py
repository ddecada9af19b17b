"""The stack around each layer: its order, its context, and its cost of zero."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from arguments import get_args
from cogvideox_sat.network.layer_runner import LayerContext, LayerRunner, RunLayer, SamplingProgress
from cogvideox_sat.network.layer_streaming import stream_layers
from diffusion_video import SATVideoDiffusionEngine
from reference_networks import network_and_inputs
from sgm.modules.diffusionmodules.sampling import VPSDEDPMPP2MSampler

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder:
    """Notes the contexts that it is called with."""

    def __init__(self):
        self.contexts: list[LayerContext] = []

    def __call__(self, run: RunLayer, hidden: Tensor, context: LayerContext) -> Tensor:
        self.contexts.append(context)
        return run(hidden)


def scaling(factor: float, shift: float):
    return lambda run, hidden, context: factor * run(hidden + shift)


@torch.no_grad()
def test_the_first_function_is_the_outermost():
    context = LayerContext(0, 1, torch.zeros(1), (1, 1, 1), 0, False, SamplingProgress())
    runner = LayerRunner([scaling(2, 1)])
    layer, x = torch.square, torch.tensor([3.0])
    assert LayerRunner()(layer, x, context).item() == 9
    assert runner(layer, x, context).item() == 2 * (3 + 1) ** 2
    runner.add(scaling(3, 10))
    assert runner(layer, x, context).item() == 2 * (3 * (3 + 1 + 10) ** 2)
    runner.add(lambda run, hidden, context: run(-run(hidden)), outermost=True)
    once = 2 * (3 * (3 + 1 + 10) ** 2)
    assert runner(layer, x, context).item() == 2 * (3 * (-once + 1 + 10) ** 2)
    runner.add(lambda run, hidden, context: hidden)  # instead of the layer
    assert runner(layer, x, context).item() == 2 * 3 * (1 + 10 - 2 * 3 * (3 + 1 + 10))


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_a_network_tells_what_it_knows(training):
    network, inputs = network_and_inputs("t2v_15")
    expected = network(**inputs)
    recorder = Recorder()
    network.train(training).layer_runner.add(recorder)
    assert torch.equal(network(**inputs), expected)
    assert [context.layer for context in recorder.contexts] == list(range(network.num_layers))
    first = recorder.contexts[0]
    assert all(replace(context, layer=0) == first for context in recorder.contexts)
    _, t, _, h, w = inputs["x"].shape
    assert (first.layers, first.grid, first.training) == (network.num_layers, (t // 2, h // 2, w // 2), training)
    assert first.timesteps is inputs["timesteps"] and first.text_length == inputs["context"].shape[1]
    assert (first.sampling.step, first.sampling.steps) == (None, None)


class WithoutCallback(VPSDEDPMPP2MSampler):
    def __call__(self, denoiser, x, cond, uc=None, num_steps=None):
        return super().__call__(denoiser, x, cond, uc=uc, num_steps=num_steps)


def test_a_sampler_s_step_and_video_reach_the_layers(tiny):
    args = get_args(["--base", str(tiny.config("2b")), "--input_file", "p.txt", "--sampling_num_frames", "1"])
    engine = SATVideoDiffusionEngine(args, parts=("model",))
    cond, uncond = ({"crossattn": torch.full((1, 16, 64), value)} for value in (1.0, 0.0))
    seen, done = [], []

    def around(run: RunLayer, hidden: Tensor, context: LayerContext) -> Tensor:
        if context.layer == 0:
            seen.append((context.sampling, context.sampling.step, context.sampling.steps))
        return run(hidden)

    def sample(**options) -> list[tuple[int | None, int | None]]:
        seen.clear()
        engine.sample(cond, uncond, shape=(1, 16, 8, 12), **options)
        assert len({id(progress) for progress, *_ in seen}) == 1
        return [steps for _, *steps in seen]

    engine.network.layer_runner.add(around)
    assert sample(num_steps=3, callback=lambda *steps: done.append(steps)) == [[0, 3], [1, 3], [2, 3]]
    assert done == [(1, 3), (2, 3), (3, 3)]
    first = seen[0][0]
    engine.sampler.num_steps = 2
    assert sample() == [[0, 2], [1, 2]]
    assert seen[0][0] is not first  # another video
    assert engine.network.layer_runner.sampling not in (first, seen[0][0])  # both are over
    engine.sampler = WithoutCallback(**engine.config["sampler_config"]["params"])
    assert sample(num_steps=2) == [[None, None]] * 2


def test_a_failing_sampler_leaves_no_progress_behind(tiny):
    args = get_args(["--base", str(tiny.config("2b")), "--input_file", "p.txt", "--sampling_num_frames", "1"])
    engine = SATVideoDiffusionEngine(args, parts=("model",))
    before = engine.network.layer_runner.sampling
    with pytest.raises(KeyboardInterrupt):
        engine.sample({"crossattn": torch.zeros(1, 16, 64)}, shape=(1, 16, 8, 12), num_steps=2, callback=interrupt)
    assert engine.network.layer_runner.sampling is before


def interrupt(done: int, steps: int) -> None:
    raise KeyboardInterrupt


def kept_bytes(network: torch.nn.Module, inputs: dict[str, Tensor]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, with parameters."""
    sizes = {}

    def keep(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        network(**inputs)
    return sum(sizes.values())


def test_checkpointing_follows_the_transformer_s_setting():
    """Also that of a copy, apart from the other's; and an evaluation keeps nothing anyway."""
    network, inputs = network_and_inputs("t2v_5b")
    network.train()
    twin = copy.deepcopy(network)
    plain = kept_bytes(network, inputs)
    assert kept_bytes(twin, inputs) == plain
    twin.transformer.checkpoint_activations = True
    assert kept_bytes(network, inputs) == plain > 1.2 * kept_bytes(twin, inputs)
    assert kept_bytes(twin.eval(), inputs) == plain
    with torch.no_grad():
        assert kept_bytes(twin.train(), inputs) == 0


def test_layers_run_again_in_the_backward_pass_in_their_own_order():
    """Functions within the checkpoint run again with the layer, those around it do not."""
    network, inputs = network_and_inputs("t2v_5b")
    network.train().transformer.checkpoint_activations = True
    outside, inside = Recorder(), Recorder()
    network.layer_runner.add(outside, outermost=True)
    network.layer_runner.add(inside)
    network(**inputs).sum().backward()
    layers = list(range(network.num_layers))
    assert [context.layer for context in outside.contexts] == layers
    assert [context.layer for context in inside.contexts] == layers + layers[::-1]


def operations_of_a_step(network: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, int]:
    network.zero_grad()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        network(**inputs).sum().backward()
    return {event.key: event.count for event in profiler.key_averages() if event.key.startswith("aten::")}


class Direct:
    """Replaces a runner: calls layers, with or without PyTorch's checkpointing."""

    sampling = None

    def __init__(self, checkpointing: bool):
        self.checkpointing = checkpointing

    def __call__(self, run: RunLayer, hidden: Tensor, context: LayerContext) -> Tensor:
        return checkpoint(run, hidden, use_reentrant=False) if self.checkpointing else run(hidden)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_stack_adds_no_operation(checkpointing):
    """A training step makes the operations that it makes when layers are called directly."""
    network, inputs = network_and_inputs("t2v_5b")
    network.train().transformer.checkpoint_activations = checkpointing
    network.layer_runner.add(Recorder())
    stacked = operations_of_a_step(network, inputs)
    network.layer_runner = Direct(checkpointing)
    assert operations_of_a_step(network, inputs) == stacked
    network.layer_runner = Direct(not checkpointing)
    assert operations_of_a_step(network, inputs) != stacked


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_compiler_sees_one_graph_of_the_stack(checkpointing):
    """The compiler makes one graph, in training and over sampling steps and videos."""
    network, inputs = network_and_inputs("t2v_5b")
    network.train().transformer.checkpoint_activations = checkpointing
    expected = network(**inputs)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(**inputs), expected)
        for steps in (2, 3):
            with network.layer_runner.during(progress := SamplingProgress(steps, 0)):
                for progress.step in range(steps):
                    assert torch.equal(compiled(**inputs), expected)


@torch.no_grad()
def test_a_streamed_layer_that_is_left_out_is_not_fetched():
    network, inputs = network_and_inputs("t2v_2b_wide")
    network.layer_runner.add(lambda run, hidden, context: hidden if context.layer == 1 else run(hidden))
    expected = network(**inputs)
    streamer = stream_layers(network, torch.device("cpu"))
    assert not torch.equal(expected, network_and_inputs("t2v_2b_wide")[0](**inputs))
    fetched = []
    fetch = streamer.fetch
    streamer.fetch = lambda index, slot: fetched.append(index) or fetch(index, slot)
    assert torch.equal(network(**inputs), expected)
    assert network.num_layers == 3 and fetched == [0, 1, 2, 0]
