"""Randomness as a function of what it is for: (seed, epoch, index) for a sample, (seed, step, pass) for a forward pass.

Nothing depends on what was drawn before, so a run does not change with the number of loader processes, and goes on from
a checkpoint as if it had never stopped, without generator states in it.
"""

import hashlib
import random

import numpy as np
import torch


def seed_of(*key: str | int) -> int:
    """A 63-bit seed for `key`, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def seed_cpu(*key: str | int):
    """Seed the generators of random, numpy and torch's CPU: all that transforms draw from."""
    seed = seed_of(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also visits the accelerators: 90 µs instead of 1


def seed_all(*key: str | int):
    """Seed the generators of random, numpy and torch on every device."""
    seed_cpu(*key)
    torch.manual_seed(seed_of(*key))


def permutation(length: int, *key: str | int) -> list[int]:
    """The numbers 0..length-1 in an order that depends on `key` alone."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed_of(*key))).tolist()
