"""Seeds derived from ids, so that random numbers do not depend on batch size, sharding, order or workers."""

import hashlib


def derive_seed(seed: int, *ids: object) -> int:
    """Return a 63-bit hash of a seed and any ids, which are converted to text."""
    text = "\x1f".join([str(seed), *map(str, ids)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
