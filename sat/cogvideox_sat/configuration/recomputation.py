"""Choose the layers that recompute activations in the backward pass.

This is the setting `checkpoint_activations`. Nothing here imports PyTorch.
"""

from dataclasses import dataclass
from typing import Any

from sgm.errors import UserError, shown

ATTENTION, AUTO = "attention", "auto"
Mode = bool | int | str
"""Layers that recompute: False: none; True: all; a number: this many, from the first on; `ATTENTION`: all, but they
keep the result of their attention; `AUTO`: as many as the memory requires."""

WORDS: dict[str, Mode] = {"true": True, "false": False, ATTENTION: ATTENTION, AUTO: AUTO}
EXPECTED = f"true, false, {ATTENTION}, {AUTO} or a number of layers"


def recomputation_mode(name: str, value: Any) -> Mode:
    """Return the mode that a value of a configuration or of the command line stands for.

    Args:
        name: the argument or key in the message.

    Raises:
        UserError: the value stands for no mode.
    """
    if isinstance(value, str):
        text = value.strip().lower()
        if text in WORDS:
            return WORDS[text]
        value = int(text) if text.isdecimal() and len(text) < 7 else value
    if type(value) is bool or (type(value) is int and value >= 0):
        return value
    raise UserError(f"{name}: got {shown(value)}; it can be {EXPECTED}")


def check_layers(name: str, mode: Any, layers: int) -> None:
    """Check that a mode does not name more layers than the network has, else raise UserError."""
    if type(mode) is int and mode > layers:
        raise UserError(f"{name}: got {mode}, but the network has {layers} layers; it can be {EXPECTED}")


@dataclass(frozen=True)
class Recomputation:
    """Layers of a network that recompute, counted from the first one.

    Attributes:
        whole: layers that keep only their input.
        attention: the next layers, which keep their input and the result of their attention; later layers keep
            everything.
    """

    whole: int
    attention: int = 0

    @classmethod
    def of(cls, mode: Any, layers: int, skipped: int = 0) -> "Recomputation":
        """Return the layers that a mode stands for in a network; `AUTO` stands for all layers.

        Args:
            layers: the number of layers of the network.
            skipped: the number of layers, the last ones, that keep everything.
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
        """Return a description for the log; "" if all layers keep everything."""
        parts = [f"{count} layers recomputed{but}" for count, but in self._counts() if count]
        if not parts:
            return ""
        if len(parts) == 1 and self.whole + self.attention == layers:
            return parts[0].replace(f"{layers} layers ", "", 1)
        return ", ".join(parts)

    def _counts(self) -> tuple[tuple[int, str], ...]:
        return (self.whole, ""), (self.attention, " but for their attention")


def take_recomputation(transformer_args: dict[str, Any], args: Any) -> None:
    """Copy the run's arguments about recomputation, if given, into `transformer_args`."""
    for name in ("checkpoint_activations", "checkpoint_skip_layers"):
        if getattr(args, name) is not None:
            transformer_args[name] = getattr(args, name)
