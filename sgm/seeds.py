"""Seeds derived from the seed of a run; PyTorch is not imported."""

import hashlib


def derive_seed(seed: int, index: int) -> int:
    """Return a seed in [0, 2^63) for the item `index`, which depends on (seed, index) alone.

    The seed for index 0 is `seed` itself.
    """
    return seed if index == 0 else hashed_seed(seed, index)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Return the seed of all random numbers of training sample `index` in `epoch`, from 0."""
    return hashed_seed(seed, epoch, index)


def hashed_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2^63) from the BLAKE2b hash of the parts, joined by ":".

    The seed is the first eight bytes, big-endian, without the top bit. Neighbouring items and seeds are unrelated (with
    seed + index, item 1 of seed 42 and item 0 of seed 43 would have the same noise), and processes, batches and the
    Python version have no influence.
    """
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & (2**63 - 1)
