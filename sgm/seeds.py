"""Seeds that follow from the seed of a run. Nothing here imports PyTorch."""

import hashlib


def derive_seed(seed: int, index: int) -> int:
    """A seed in [0, 2^63) for the item `index`, depending on (seed, index) alone; for index 0 it is `seed` itself."""
    return seed if index == 0 else hashed_seed(seed, index)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of all random numbers that the training sample `index` meets in `epoch` (both from 0)."""
    return hashed_seed(seed, epoch, index)


def hashed_seed(*parts: int | str) -> int:
    """The first eight bytes (big-endian, without the top bit) of the BLAKE2b hash of the parts, joined by ":".

    Neighbouring items and neighbouring seeds share nothing (seed + index would give item 1 of seed 42 and item 0 of
    seed 43 the same noise), and processes, batches and the Python version do not matter.
    """
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & (2**63 - 1)
