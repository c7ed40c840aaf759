"""Stop a run anywhere and take it up again bit for bit: weights, optimiser and random numbers."""

import io
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed every generator a run may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Draw from generators seeded here, and leave the run's own as they were."""
    before = _random_state()
    seed_all(seed)
    try:
        yield
    finally:
        _set_random_state(before)


def save(path: Path, **state: Any) -> None:
    """Write the state and all random number generators, whole or not at all."""
    buffer = io.BytesIO()
    torch.save({**state, "random": _random_state()}, buffer)
    write_whole(path, buffer.getvalue())


def restore(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a state back, setting all random number generators as they were."""
    state = read(path, device)
    _set_random_state(state.pop("random"))
    return state


def read(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a state without touching any generator."""
    return torch.load(path, map_location=device, weights_only=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that whoever reads it finds the old one or the new one, never a part."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)


def _random_state() -> dict[str, Any]:
    """The states of the generators, as plain data that torch.load accepts unconditionally."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    """Set the generators back to a recorded state."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    # Generator states live on the CPU even where map_location moved the rest.
    torch.set_rng_state(state["torch"].cpu())
    torch.cuda.set_rng_state_all([cuda.cpu() for cuda in state["cuda"]])
