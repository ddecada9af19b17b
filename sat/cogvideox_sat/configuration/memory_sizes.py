"""Read amounts of memory as users write them.

Nothing here imports PyTorch.
"""

import re

from cogvideox_sat.files.sizes import GIB, MIB
from sgm.errors import UserError, shown

AUTO = "auto"
# A GPU sold as 12 GB has 12 GiB, so both units mean the same here.
UNITS = {
    prefix + unit: size for prefix, size in (("m", MIB), ("g", GIB), ("t", 1024 * GIB)) for unit in ("", "b", "ib")
}
AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)")
EXAMPLE = "give an amount such as 12GB, or auto"


def parse_fit(text: str) -> int | None:
    """Return the bytes that `fit` names; None for `auto`, all of the device's free memory.

    Raises:
        UserError: `text` is neither an amount with a unit nor `auto`.
    """
    text = text.strip()
    if text.lower() == AUTO:
        return None
    match = AMOUNT.fullmatch(text)
    if match is None:
        raise UserError(f"fit: {shown(text)} is not an amount of memory; {EXAMPLE}")
    number, unit = match.groups()
    if not unit:
        raise UserError(f"fit: {text} has no unit; {EXAMPLE}")
    if unit.lower() not in UNITS:
        raise UserError(f"fit: {text} has an unknown unit, {shown(unit)}; use GB or MB, as in 12GB")
    size = int(float(number) * UNITS[unit.lower()]) if len(number) < 20 else 0
    if not 0 < size < 2**60:
        raise UserError(f"fit: {shown(text)} is not an amount of memory that a device has; {EXAMPLE}")
    return size
