"""Which layers compute their activations again in the backward pass, rather than keep them: `checkpoint_activations`.

Nothing here imports PyTorch.
"""

from dataclasses import dataclass
from typing import Any

from sgm.errors import UserError, shown

ATTENTION, AUTO = "attention", "auto"
Mode = bool | int | str
"""False: no layer; True: all; a number: so many, the first ones; `ATTENTION`: all, but they keep the result of their
attention; `AUTO`: what the memory has room for."""

WORDS: dict[str, Mode] = {"true": True, "false": False, ATTENTION: ATTENTION, AUTO: AUTO}
EXPECTED = f"true, false, {ATTENTION}, {AUTO} or a number of layers"


def recomputation_mode(name: str, value: Any) -> Mode:
    """Return the mode that a value of a configuration or of the command line means.

    Args:
        name: of the argument or key, for the message.

    Raises:
        UserError: it means none.
    """
    if isinstance(value, str):
        text = value.strip().lower()
        if text in WORDS:
            return WORDS[text]
        value = int(text) if text.isdecimal() and len(text) < 7 else value
    if type(value) is bool or (type(value) is int and value >= 0):
        return value
    raise UserError(f"{name} is {shown(value)}; it can be {EXPECTED}")


def check_layers(name: str, mode: Any, layers: int) -> None:
    """Check that a mode does not name more layers than there are, else raise UserError."""
    if type(mode) is int and mode > layers:
        raise UserError(f"{name} is {mode}, but the network has {layers} layers; it can be {EXPECTED}")


@dataclass(frozen=True)
class Recomputation:
    """What the layers of a network do, from the first one on.

    Attributes:
        whole: so many keep their input alone.
        attention: so many then keep their input and the result of their attention; others keep all.
    """

    whole: int
    attention: int = 0

    @classmethod
    def of(cls, mode: Any, layers: int, skipped: int = 0) -> "Recomputation":
        """Return what a mode means for a network; an `AUTO` that nobody decided recomputes all.

        Args:
            skipped: so many layers, the last ones, keep all.
        """
        if isinstance(mode, cls):
            return mode
        most = max(layers - skipped, 0)
        if mode == ATTENTION:
            return cls(0, most)
        if type(mode) is int:
            return cls(min(mode, most))
        return cls(most if mode else 0)

    def __bool__(self) -> bool:
        return self.whole + self.attention > 0

    def in_words(self, layers: int) -> str:
        """Return what stands in the log, "" if all layers keep all."""
        parts = [f"{count} layers recomputed{but}" for count, but in self._counts() if count]
        if not parts:
            return ""
        if len(parts) == 1 and self.whole + self.attention == layers:
            return parts[0].replace(f"{layers} layers ", "", 1)
        return ", ".join(parts)

    def _counts(self) -> tuple[tuple[int, str], ...]:
        return (self.whole, ""), (self.attention, " but for their attention")


def take_recomputation(transformer_args: dict[str, Any], args: Any) -> None:
    """Put the arguments of a run that are given into those of its transformer."""
    for name in ("checkpoint_activations", "checkpoint_skip_layers"):
        if getattr(args, name) is not None:
            transformer_args[name] = getattr(args, name)
