"""Add adapters to the weights of a network, so that it runs without LoRA."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from cogvideox_sat.conversion.lora_matrices import Adapter
from cogvideox_sat.conversion.lora_names import PROJECTIONS_OF, MatrixKey, Projection, base_weight
from cogvideox_sat.conversion.stored_weights import all_finite
from sgm.errors import UserError


class MergedWeights(Mapping[str, Tensor]):
    """Weights of `base` plus `strength` times each adapter, in the dtype of `base`.

    The sum is computed in float32, each time a tensor is read; merged tensors are not stored.

    Raises:
        UserError: an adapter does not fit the base.
    """

    def __init__(self, base: Mapping[str, Tensor], adapters: Sequence[tuple[Adapter, float]]):
        self.base, self.adapters = base, adapters
        self.adapted: dict[str, tuple[int, str]] = {}
        for adapter, _ in adapters:
            for layer in adapter.layers:
                for module in PROJECTIONS_OF:
                    self.adapted[base_weight(layer, module)] = (layer, module)
            check_fit(base, adapter)

    def __getitem__(self, name: str) -> Tensor:
        weight = self.base[name]
        if name not in self.adapted:
            return weight
        layer, module = self.adapted[name]
        merged = weight.float() if weight.element_size() < 4 else weight.clone()
        for adapter, strength in self.adapters:
            if layer in adapter.layers:
                for rows, part in zip(merged.chunk(len(PROJECTIONS_OF[module])), PROJECTIONS_OF[module], strict=True):
                    projection = Projection(layer, part)
                    a, b = (adapter.matrices[MatrixKey(projection, matrix)].to(merged.dtype) for matrix in "AB")
                    rows.addmm_(b, a, alpha=strength * adapter.scales[projection])
        merged = merged.to(weight.dtype)
        if not all_finite(merged):
            problem = f"{name} is not finite after merging in {weight.dtype}"
            advice = "lower the strength of the adapter" if all_finite(weight) else "name another base, this one is not"
            raise UserError(f"{problem}; {advice}")
        return merged

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def check_fit(base: Mapping[str, Tensor], adapter: Adapter) -> None:
    """Check that `base` has all weights that `adapter` adds to, in the right shape.

    Raises:
        UserError: a weight is missing, or has another shape.
    """
    for layer in adapter.layers:
        for module, parts in PROJECTIONS_OF.items():
            weight = base.get(base_weight(layer, module))
            if weight is None:
                raise UserError(
                    f"{adapter.source} does not fit: it adapts layer {layer}, and the base has no "
                    f"{base_weight(layer, module)}; name the model that it was trained on"
                )
            expected = (len(parts) * adapter.width, adapter.width)
            if weight.shape != expected or not weight.is_floating_point():
                raise UserError(
                    f"{adapter.source} does not fit: {base_weight(layer, module)} is {weight.dtype} "
                    f"{list(weight.shape)}, its adapter needs {list(expected)}; name the model that it was trained on"
                )
