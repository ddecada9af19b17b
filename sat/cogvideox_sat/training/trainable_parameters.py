"""Determine which parameters of a network are trained, and how many."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from cogvideox_sat.memory.weightless import short_count
from sgm.errors import UserError

# A parameter belongs to the first group of which its name contains a mark.
GROUPS = {
    "adapter": (".matrix_A.", ".matrix_B."),
    "final layer": ("final_layer.",),
    "modulation": ("adaLN_modulation",),
    "norms": ("norm",),
    "attention": (".attention.",),
    "mlp": (".mlp.",),
    "embeddings": ("patch_embed.", "pos_embed.", "time_embed.", "ofs_embed.", "position_embeddings."),
    "other": ("",),
}


def trainable_groups(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Return the numbers of trainable parameters by group, the largest first.

    Raises:
        UserError: no parameter is trainable.
    """
    counts = dict.fromkeys(GROUPS, 0)
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            group = next(group for group, marks in GROUPS.items() if any(mark in name for mark in marks))
            counts[group] += parameter.numel()
    if not any(counts.values()):
        raise UserError("model.not_trainable_prefixes: nothing is to be trained; name fewer prefixes")
    return {group: count for group, count in sorted(counts.items(), key=lambda item: -item[1]) if count}


def trainable_line(groups: Mapping[str, int], total: int, model_parallel: int = 1) -> str:
    """Return the log line about the trainable parameters."""
    trained = sum(groups.values())
    shares = ", ".join(f"{group} {short_count(count)}" for group, count in groups.items())
    where = f" in each of {model_parallel} model-parallel processes" if model_parallel > 1 else ""
    return (
        f"trainable parameters{where}: {short_count(trained)} of {short_count(total)} ({trained / total:.1%}): {shares}"
    )
