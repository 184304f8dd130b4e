"""Seeds derived from ids, so that nothing random depends on batch size, sharding, order or workers."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *ids: object) -> int:
    """A 63-bit seed from a study's seed and any ids (compared by their text)."""
    text = "\x1f".join([str(seed), *map(str, ids)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
