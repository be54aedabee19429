"""Numbers from a seed: the formula of src/check/seeded.rs."""

import numpy as np

MASK = (1 << 64) - 1


def seed(text):
    """FNV-1a, 64 bits."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return value


def bits(seed, count):
    """64 bits for each of the numbers `0..count`: splitmix64."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def rounded(values):
    """The nearest f32, as f64."""
    return np.asarray(values, np.float64).astype(np.float32).astype(np.float64)


def unit(seed, count):
    """In `[-1, 1)`."""
    return (bits(seed, count) >> np.uint64(40)).astype(np.float64) / (1 << 23) - 1.0


def around(mean, spread):
    return lambda seed, count: rounded(mean + spread * unit(seed, count))


def off_zero(seed, count):
    u = unit(seed, count)
    return rounded(np.where(u < 0, 0.9 * u - 0.1, 0.9 * u + 0.1))


def distinct(seed, count):
    values = np.empty(count)
    values[np.argsort(bits(seed, count), kind="stable")] = np.arange(count)
    return rounded((2 * values + 1) / count - 1.0)


def tied(seed, count):
    return np.floor(2 * unit(seed, count)) / 2


def unit_rows(rows, d):
    def values(seed, count):
        x = unit(seed, count).reshape(rows, d)
        # One after another, as Rust adds them.
        norm = np.sqrt(np.cumsum(x * x, axis=1)[:, -1:])
        return rounded(x / norm).ravel()

    return values


def indices(seed, count, below):
    return (bits(seed, count) % np.uint64(below)).astype(np.int64)
