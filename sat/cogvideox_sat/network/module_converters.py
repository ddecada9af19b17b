"""Exchanging modules of a network after it is built and before it has its weights."""

from collections.abc import Callable, Iterable

from torch import nn

Converter = Callable[[nn.Module], nn.Module]
"""Returns what takes the place of a module, or the module itself.

Both may be on the meta device, without values: these are loaded afterwards, under the names of the checkpoint.
"""


def convert_modules(network: nn.Module, converters: Iterable[Converter]) -> None:
    """Have the converters, one after the other, exchange modules inside of `network`.

    Those inside of a module come before it; one that stands in several places is exchanged in all of them.
    """
    for convert in converters:
        converted: dict[nn.Module, nn.Module] = {}
        for name, module in reversed(list(network.named_modules(remove_duplicate=False))):
            if name and module not in converted:
                converted[module] = convert(module)
            if name and converted[module] is not module:
                network.set_submodule(name, converted[module])
