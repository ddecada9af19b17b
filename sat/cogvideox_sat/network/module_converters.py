"""Replace modules of a network after it is built and before its weights are loaded."""

from collections.abc import Callable, Iterable

from torch import nn

Converter = Callable[[nn.Module], nn.Module]
"""Returns the replacement of a module, or the module itself.

Both may be on the meta device; the values are loaded afterwards, under the names in the checkpoint.
"""


def convert_modules(network: nn.Module, converters: Iterable[Converter]) -> None:
    """Apply the converters, one after the other, to the modules inside of `network`.

    Inner modules are converted before the modules that contain them. A module that occurs in several places is replaced
    in all of them.
    """
    for convert in converters:
        converted: dict[nn.Module, nn.Module] = {}
        for name, module in reversed(list(network.named_modules(remove_duplicate=False))):
            if name and module not in converted:
                converted[module] = convert(module)
            if name and converted[module] is not module:
                network.set_submodule(name, converted[module])
