"""Philox4x32-10 streams and shuffles, equal to src/device/philox.rs."""

import numpy as np

MASK = 0xFFFFFFFF
SHUFFLE = 6


def block(key, counter):
    key, counter = list(key), list(counter)
    for turn in range(10):
        if turn:
            key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & MASK,
            (first >> 32) ^ counter[3] ^ key[1],
            first & MASK,
        ]
    return counter


def words(seed, purpose, major, minor):
    for counter in range(1 << 32):
        yield from block((seed & MASK, seed >> 32), (counter, major, minor, purpose))


def permutation(count, seed, major, minor, purpose=SHUFFLE):
    """Fisher-Yates with Lemire's draws."""
    stream, items = words(seed, purpose, major, minor), np.arange(count)
    for i in range(count - 1, 0, -1):
        n = i + 1
        while True:
            product = next(stream) * n
            if product & MASK >= (1 << 32) % n:
                break
        j = product >> 32
        items[i], items[j] = items[j], items[i]
    return items
