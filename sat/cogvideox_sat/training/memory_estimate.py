"""Estimate the memory of a training process from the sizes of network and clips."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cogvideox_sat.configuration.deepspeed_runtime import runtime_config
from cogvideox_sat.configuration.recomputation import Recomputation
from cogvideox_sat.engine.precision import DTYPES
from cogvideox_sat.files.sizes import GIB, in_words
from cogvideox_sat.latent_geometry import Bucket, video_tokens
from cogvideox_sat.memory.encoding_memory import encoding_peak
from cogvideox_sat.memory.weightless import module_bytes
from cogvideox_sat.training.trainable_parameters import trainable_groups
from diffusion_video import SATVideoDiffusionEngine
from sgm.context_parallel import group_size

# Number of float32 tensors that optimizers keep for each trained parameter besides its master copy.
OPTIMIZER_TENSORS = {"fusedemaadam": 3, "emaadam": 3, "lion": 1, "adagrad": 1, "muon": 1, "sgd": 1}
ADAM_TENSORS = 2  # for all other optimizers

AVERAGING = 3  # number of tensors of optimizers that keep a moving average of the weights

# ZeRO's default.
REDUCE_BUCKET_SIZE = 500_000_000  # elements

# Activations that one layer keeps for its backward pass, in tensors of (tokens, hidden_size), see
# `network.lean_functions`. An adapter needs fewer, because frozen weights, modulation and MLP have no gradients. Layers
# that processes share run in another way and keep more: tensors that all processes hold, and tensors that they share.
KEPT_BY_LAYER = {"network": 14, "adapter": 12}
KEPT_BY_SHARED_LAYER = {"network": (8, 15), "adapter": (3, 11)}
KEPT_OUTSIDE_LAYERS = {"network": 4, "adapter": 2}
KEPT_INPUT, KEPT_ATTENTION = 1, 2  # for recomputed layers: the input; the input and the attention's result
WORKING_SET = 6  # gradients in the backward pass of a layer: 4 in the MLP, 2 on the residual path


@dataclass(frozen=True)
class Layout:
    """The distribution of the training state over processes and memories.

    Args:
        zero_stage: ZeRO stage: 1 divides optimizer states among the data-parallel processes, 2 also gradients, 3 also
            weights.
        offload_optimizer, offload_parameters: ZeRO keeps these in host memory (or on NVMe).
        data_parallel, model_parallel: numbers of processes.
        optimizer_tensors: float32 tensors per parameter besides its master copy: 2 for Adam, 3 with averages.
        bucket_bytes: size of the buffers in which ZeRO gathers gradients.
    """

    zero_stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    data_parallel: int = 1
    model_parallel: int = 1
    optimizer_tensors: int = ADAM_TENSORS
    bucket_bytes: int = 0

    @classmethod
    def from_config(
        cls, deepspeed_config: Mapping[str, Any], dtype: torch.dtype, data_parallel: int = 1, model_parallel: int = 1
    ) -> "Layout":
        """Return the layout of a checked `deepspeed:` section, for a network of `dtype`."""
        precision = next((name for name, kind in DTYPES.items() if kind == dtype), "fp32")
        config = runtime_config(deepspeed_config, precision)
        zero = config["zero_optimization"]
        kind = (config.get("optimizer") or {}).get("type", "").rpartition(".")[2].lower()
        stage, bucket_bytes = zero["stage"], 0
        if stage > 0 and zero.get("contiguous_gradients", True):
            buffers = 2 if zero.get("overlap_comm", stage == 3) and stage < 3 else 1
            element = 4 if stage == 1 else dtype.itemsize
            bucket_bytes = buffers * element * zero.get("reduce_bucket_size", REDUCE_BUCKET_SIZE)

        def offloaded(part: str) -> bool:
            return (zero.get(part) or {}).get("device", "none") != "none"

        return cls(
            zero_stage=stage,
            offload_optimizer=stage > 0 and offloaded("offload_optimizer"),
            offload_parameters=stage == 3 and offloaded("offload_param"),
            data_parallel=data_parallel,
            model_parallel=model_parallel,
            optimizer_tensors=OPTIMIZER_TENSORS.get(kind, ADAM_TENSORS),
            bucket_bytes=bucket_bytes,
        )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process: on its device, and `host` in host memory.

    Only one of these is in use at a time: `encoding` of clips, `activations`, and, while the optimizer steps,
    `stepping`.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    encoding: int
    stepping: int
    host: int

    @property
    def total(self) -> int:
        """Return the peak on the device."""
        in_turn = max(self.activations, self.encoding, self.stepping)
        return self.weights + self.gradients + self.optimizer + in_turn


def estimate_memory(
    engine: SATVideoDiffusionEngine, layout: Layout, bucket: Bucket, micro_batch: int
) -> MemoryEstimate:
    """Return the memory that training takes, to within 15 %.

    The use by libraries (about 1 GiB on CUDA) is not included. With Ψ parameters of the network, T of them trained, b
    bytes per parameter, D data-parallel processes, and D₁, D₂, D₃ = D from that ZeRO stage on, otherwise 1 (Rajbhandari
    et al., arXiv:1910.02054):

        weights    b·Ψ / D₃, plus those of the frozen VAE and text encoder
        gradients  b·T / D₂, plus ZeRO's buckets
        optimizer  4·T / D₁ for each of its tensors, and with ZeRO for the float32 weights
        stepping   4·T / D₁ with ZeRO, for the gradients in float32, if b < 4

    Offloaded parts count as `host`. For activations and encoding, see `activation_bytes` and `encoding_bytes`.
    """
    network, d = engine.network, layout.data_parallel
    element = engine.dtype.itemsize
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    network_bytes, frozen_bytes = module_bytes(network), module_bytes(engine) - module_bytes(network)

    weights = network_bytes // (d if layout.zero_stage == 3 else 1)
    gradients = element * trained // (d if layout.zero_stage >= 2 else 1)
    shared = d if layout.zero_stage >= 1 else 1
    optimizer = 4 * (layout.optimizer_tensors + (layout.zero_stage > 0)) * trained // shared
    stepping = 4 * trained // shared if layout.zero_stage > 0 and element < 4 else 0

    host = (optimizer + stepping) * layout.offload_optimizer + weights * layout.offload_parameters
    return MemoryEstimate(
        weights=frozen_bytes + weights * (not layout.offload_parameters),
        gradients=gradients + min(layout.bucket_bytes, 8 * trained),  # `training.deepspeed_engine.limit_buckets`
        optimizer=optimizer * (not layout.offload_optimizer),
        activations=activation_bytes(network, bucket, micro_batch, element, layout.model_parallel),
        encoding=encoding_bytes(engine, bucket, micro_batch, element),
        stepping=stepping * (not layout.offload_optimizer),
        host=host,
    )


def activation_bytes(
    network: nn.Module, bucket: Bucket, micro_batch: int, element: int, model_parallel: int = 1
) -> int:
    """Return the memory of the network's activations at its peak, in the backward pass.

    The unit is a tensor of micro_batch · tokens · hidden_size elements. Each layer keeps k tensors, or if it is
    recomputed 1, or 2 with its attention; the layer at work needs k tensors again. 4 tensors are kept outside of layers
    (2 if only an adapter is trained), and 6 are gradients. k is 14, or 12 for an adapter alone; if model-parallel
    processes share the layers, 23 and 14, of which they share 15 and 11.
    """
    unit = tensor_bytes(network, bucket, micro_batch, element)
    recomputed, all_kept = recomputation(network), kept_by_layer(network, model_parallel)
    # The backward pass begins with the last layers: their tensors are freed before the first layers are recomputed.
    is_last = recomputed.whole + recomputed.attention == network.num_layers
    at_work = all_kept - (KEPT_ATTENTION if recomputed.attention else KEPT_INPUT) if is_last else 0
    return kept_bytes(network, bucket, micro_batch, element, model_parallel) + int((at_work + WORKING_SET) * unit)


def kept_bytes(network: nn.Module, bucket: Bucket, micro_batch: int, element: int, model_parallel: int = 1) -> int:
    """Return the bytes that the forward pass keeps for the backward pass.

    See `activation_bytes`.
    """
    recomputed = recomputation(network)
    others = network.num_layers - recomputed.whole - recomputed.attention
    kept = recomputed.whole * KEPT_INPUT + others * kept_by_layer(network, model_parallel)
    kept += recomputed.attention * (KEPT_ATTENTION + 2 * network.num_attention_heads / network.hidden_size)
    kept += KEPT_OUTSIDE_LAYERS[what_is_trained(network)]
    return int(kept * tensor_bytes(network, bucket, micro_batch, element))


def recomputation(network: nn.Module) -> Recomputation:
    """Return which layers of a `DiffusionTransformer` are recomputed."""
    chosen: Recomputation = network.checkpointing.recomputation(network.num_layers)
    return chosen


def kept_by_layer(network: nn.Module, model_parallel: int = 1) -> float:
    """Return how many tensors a layer keeps for its backward pass, see `KEPT_BY_LAYER`."""
    if model_parallel == 1:
        return KEPT_BY_LAYER[what_is_trained(network)]
    whole, shared = KEPT_BY_SHARED_LAYER[what_is_trained(network)]
    return whole + shared / model_parallel


def what_is_trained(network: nn.Module) -> str:
    """Return "adapter" if only the adapter is trained, else "network"."""
    return "adapter" if set(trainable_groups(network.named_parameters())) == {"adapter"} else "network"


def tensor_bytes(network: nn.Module, bucket: Bucket, micro_batch: int, element: int) -> int:
    """Return the bytes of one value for each hidden feature of each token, including text."""
    tokens = network.mixins["pos_embed"].text_length + video_tokens(bucket, network.patch)
    tokens = -(-tokens // network.sequence_processes)
    return micro_batch * tokens * network.hidden_size * element


def encoding_bytes(engine: SATVideoDiffusionEngine, bucket: Bucket, micro_batch: int, element: int) -> int:
    """Return the bytes of the VAE's activations while it encodes clips; 0 for cached latents.

    See `encoding_peak`.
    """
    vae = engine.first_stage_model
    if vae is None:
        return 0
    dtype = torch.float32 if element == 4 else torch.bfloat16
    first_stage = engine.config["first_stage_config"]
    tile_size, group = getattr(vae, "tile_size", None), getattr(vae, "group", None)
    at_once, processes = getattr(vae, "frames_at_once", None), group_size(group)
    peak = encoding_peak(first_stage, bucket, dtype, engine.device.type, tile_size, processes, at_once)
    return micro_batch * peak


def checkpoint_copy_bytes(network: nn.Module, layout: Layout, full: bool) -> int:
    """Return the host memory for a checkpoint's copy, on the process that writes it.

    It holds the saved weights and the optimizer's float32 tensors and, while files are written, the moving average in
    the dtype of the weights.

    Args:
        full: the whole network is saved, rather than only its trained parameters.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    weights = sum(tensor.nbytes for tensor in (network.state_dict().values() if full else trained))
    state = 4 * (layout.optimizer_tensors + (layout.zero_stage > 0)) * count
    averages = layout.optimizer_tensors == AVERAGING
    average = sum(parameter.nbytes for parameter in trained if parameter.element_size() < 4) if averages else 0
    return weights + state + average


def checkpoint_copy_line(network: nn.Module, layout: Layout, full: bool) -> str:
    """Return the log line about `checkpoint_copy_bytes`."""
    size = in_words(checkpoint_copy_bytes(network, layout, full))
    return f"background_checkpoints: a copy of a checkpoint takes {size} of host memory, on the process that writes it"


def memory_line(memory: MemoryEstimate, bucket: Bucket, micro_batch: int, recomputed: str) -> str:
    """Return the log line about an estimate.

    Args:
        recomputed: the recomputed layers in words; "": none.
    """
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
    parts[f"activations ({recomputed})" if recomputed else "activations"] = memory.activations
    if memory.stepping > max(memory.activations, memory.encoding):
        parts["or, while the optimizer steps,"] = memory.stepping
    if memory.encoding > memory.activations:
        parts["or, while clips are encoded,"] = memory.encoding
    described = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    host = f", and {memory.host / GIB:.2f} GiB in host memory" if memory.host else ""
    clips = f"{micro_batch} x {bucket}"
    return f"expected memory of a process, for {clips}: {memory.total / GIB:.2f} GiB ({described}){host}"
