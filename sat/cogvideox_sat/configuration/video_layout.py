"""Choose the number of processes that make one video, and what they share.

They share guidance, the sequence of tokens, or the network's weights. rank = (video · G + guidance) · S + sequence: the
S processes that share the tokens of one half of guidance are neighbours, followed by the processes of the other half.
Nothing here imports PyTorch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sgm.errors import UserError

UNGUIDED = "IdentityGuider"


@dataclass(frozen=True)
class VideoLayout:
    """Division of one video among processes.

    Attributes:
        guidance: 2 if each half of guidance has its own processes, else 1.
        sequence: processes that share the tokens of a batch.
    """

    guidance: int = 1
    sequence: int = 1

    @property
    def processes(self) -> int:
        """Return the number of processes that make one video."""
        return self.guidance * self.sequence


def plan_layout(
    model_config: Mapping[str, Any],
    processes_per_video: int | None = None,
    guidance_parallel: bool | None = None,
    sequence_parallel: int | None = None,
    model_parallel_size: int = 1,
) -> VideoLayout:
    """Choose how processes share a video: first guidance, if there is any, then the sequence.

    Args:
        processes_per_video: None: as many as the next two arguments require, or one.
        guidance_parallel, sequence_parallel: a fixed choice; None: chosen here.

    Raises:
        UserError: the numbers contradict each other, or the model cannot be shared in this way.
    """
    for name, value in (("processes_per_video", processes_per_video), ("sequence_parallel", sequence_parallel)):
        if value is not None and value < 1:
            raise UserError(f"{name}: got {value}; expected a whole number from 1")
    if processes_per_video is None:
        layout = VideoLayout(2 if guidance_parallel else 1, sequence_parallel or 1)
    else:
        layout = _divided(processes_per_video, guidance_parallel, sequence_parallel, is_guided(model_config))
    if guidance_parallel and not is_guided(model_config):
        raise UserError(
            "guidance_parallel: the sampler has no guidance, so there is one half only; leave it out, or set "
            "model.sampler_config.params.guider_config"
        )
    if layout.processes > 1 and model_parallel_size > 1:
        raise UserError(
            f"processes_per_video: {layout.processes} processes share a video and model_parallel_size "
            f"{model_parallel_size} the network; choose one of them"
        )
    check_sequence(layout.sequence, model_config, "processes_per_video")
    return layout


def layout_of(settings: Any) -> VideoLayout:
    """Return the layout that arguments or settings of sampling ask for."""
    return plan_layout(
        settings.model_config,
        settings.processes_per_video,
        settings.guidance_parallel,
        settings.sequence_parallel,
        settings.model_parallel_size or 1,
    )


def _divided(processes: int, guidance: bool | None, sequence: int | None, is_guided: bool) -> VideoLayout:
    suits = is_guided and processes % 2 == 0 and sequence in (None, processes // 2)
    halves = 2 if (suits if guidance is None else guidance) else 1
    if processes % halves:
        raise UserError(
            f"guidance_parallel: its two halves cannot share {processes} processes evenly; make processes_per_video "
            "even, or leave guidance_parallel out"
        )
    if sequence is not None and halves * sequence != processes:
        raise UserError(
            f"sequence_parallel: {halves} x {sequence} processes (guidance x sequence) are not the {processes} of "
            "processes_per_video; leave one of them out"
        )
    return VideoLayout(halves, processes // halves)


def is_guided(model_config: Mapping[str, Any]) -> bool:
    """Return whether a model's sampler runs the network both with and without the prompt."""
    params = (model_config.get("sampler_config") or {}).get("params") or {}
    target = (params.get("guider_config") or {}).get("target")
    return bool(target) and not str(target).endswith(UNGUIDED)


def check_sequence(size: int, model_config: Mapping[str, Any], name: str) -> None:
    """Check that `size` processes can share the tokens, each with at least one head.

    Args:
        name: the argument that the message is about.

    Raises:
        UserError: the network has too few heads.
    """
    if size > 1:
        heads = model_config["network_config"]["params"].get("num_attention_heads")
        check_shares(size, "attention heads", heads if isinstance(heads, int) else size, name)


def check_shares(processes: int, what: str, count: int, name: str = "sequence_parallel_size") -> None:
    """Check that each process has one of the things that they share, else raise UserError.

    Args:
        what: the things, in the plural.
        count: the number of things.
        name: the argument that the message is about.
    """
    if processes > count:
        raise UserError(f"{name}: {processes} processes cannot share {count} {what}; use {count} at most")


def check_world(layout: VideoLayout, world: int) -> None:
    """Check that `world` processes are whole groups of the layout, else raise UserError."""
    check_divides("processes_per_video", layout.processes, world)


def check_divides(name: str, size: int, processes: int) -> None:
    """Check that the processes of a run form whole groups of `size`.

    Args:
        name: the argument that says `size`.

    Raises:
        UserError: some processes would be left over.
    """
    if processes % size:
        raise UserError(
            f"{name}: {size} does not divide the {processes} process{'es' if processes > 1 else ''} of this run; start "
            f"a multiple of it, with torchrun --nproc_per_node={size}"
        )
