"""Count memory and traffic of one of the processes that share the tokens of a clip.

Tensors have no content.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.memory.weightless import FirstOfGroup, WeightlessEngine
from cogvideox_sat.network import sequence_parallel
from measuring.training_peak import counted_peak, network_inputs
from sgm.attention_kernels import KERNELS
from sgm.models.video_coder_memory import AllocatedBytes

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXCHANGES = tuple(each._opoverload for each in (sequence_parallel.tokens_to_heads, sequence_parallel.heads_to_tokens))
GATHER = sequence_parallel.gather_tokens._opoverload


class SharedClip(NamedTuple):
    """Memory and traffic of a process.

    The values are the peak bytes in sampling and in training, and for a call of the network without gradients the
    number of exchanges of tokens and heads, the number of gathers of tokens, and the bytes sent to other processes.
    """

    sampling: int
    training: int
    exchanges: int
    gathers: int
    sent: int


class Traffic(TorchDispatchMode):
    """Counts the bytes that the operators of `network.sequence_parallel` send."""

    def __init__(self) -> None:
        super().__init__()
        self.exchanges = self.gathers = self.sent = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in EXCHANGES:
            own = [args[0]] if isinstance(args[0], torch.Tensor) else args[0]
            kept = args[2][0] / sum(args[2]) if function is EXCHANGES[0] else args[1][0] / sum(args[1])
            self.exchanges += 1
            self.sent += round(sum(part.nbytes for part in own) * (1 - kept))
        elif function is GATHER:
            self.gathers += 1
            self.sent += args[0].nbytes * (len(args[1]) - 1)
        return result


def counted_shares(model: str, clip: Bucket, processes: int, layers: int | None = None) -> SharedClip:
    """Count memory and traffic of the first process for one clip of a released model.

    Args:
        processes: number of processes that share the clip.
        layers: number of layers of the network; None: all.
    """
    network, width = _network(f"{model}.yaml", processes, layers)
    adapted, _ = _network(f"{model}_lora.yaml", processes, layers)
    adapted.disable_untrainable_params()
    training = counted_peak(adapted, clip, [True], width)[True]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        network.to_empty(device="cpu").eval()
        network.attention = KERNELS["softmax"]
        held = {
            id(each.untyped_storage()): each.untyped_storage() for each in (*network.parameters(), *network.buffers())
        }
        with AllocatedBytes(workspaces=False, host=True) as allocated, Traffic() as traffic:
            allocated.leave_out(held.values())
            network(**network_inputs(network, clip, width))
    sampling = allocated.peak + sum(storage.nbytes() for storage in held.values())
    return SharedClip(sampling, training, traffic.exchanges, traffic.gathers, traffic.sent)


def _network(file: str, processes: int, layers: int | None) -> tuple[nn.Module, int]:
    """Return a network without content, and the features of a text state."""
    config = deepcopy(load_configs([CONFIGS / file]))
    params = config["model"]["network_config"]["params"]
    params["num_layers"] = layers or params["num_layers"]
    engine = WeightlessEngine(EngineSettings(config["model"], bf16=True), parts=("model",), device="cuda")
    network = engine.network
    if processes > 1:
        network.share_tokens(FirstOfGroup(processes))
    return network, params["modules"]["patch_embed_config"]["params"]["text_hidden_size"]
