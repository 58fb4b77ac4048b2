"""Random numbers that depend on where they are drawn only, and not on what was drawn before."""

import contextlib
import random
from typing import Iterator

import numpy as np
import torch


def seed_all(*key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, on all devices, from numbers from 0 on."""
    state = np.random.SeedSequence(key).generate_state(4).tolist()
    random.seed(state[0])
    np.random.seed(state[1])
    torch.manual_seed(state[2] << 32 | state[3])


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Within it, random numbers of the CPU are drawn as after ``seed_all(*key)``."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            seed_all(*key)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
