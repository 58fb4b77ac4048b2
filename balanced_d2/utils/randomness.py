"""Random numbers that depend only on where they are drawn, not on what was drawn before."""

import contextlib
import random
from typing import Iterator

import numpy as np
import torch


def seed_all(*key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, on all devices, from numbers >= 0."""
    state = np.random.SeedSequence(key).generate_state(4).tolist()
    random.seed(state[0])
    np.random.seed(state[1])
    torch.manual_seed(state[2] << 32 | state[3])


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Context manager in which the CPU's random numbers are drawn as after ``seed_all(*key)``."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            seed_all(*key)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
