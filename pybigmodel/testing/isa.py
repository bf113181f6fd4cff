"""The tier of CPU kernels in force: scalar, avx2, avx512 or avx512_bf16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pybigmodel import _native


def available_isas() -> list[str]:
    """The tiers that this CPU can run, lowest first."""
    return _native.available_isas()


@contextmanager
def force_isa(name: str | None) -> Iterator[str]:
    """Run the block on the tier ``name`` (None: the best one), then go back to the one before.

    The tier belongs to the process, not to the thread: do not force one while another thread
    computes.

    Raises:
        ValueError: no such tier.
        RuntimeError: this CPU cannot run it.
    """
    before = _native.active_isa()
    _native.force_isa(name)
    try:
        yield _native.active_isa()
    finally:
        _native.force_isa(before)
