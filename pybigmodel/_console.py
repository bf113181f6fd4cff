"""What commands and reports share: tables in plain text, other load on the machine."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path


class CommandError(Exception):
    """What the user can mend; printed as one line, without a traceback."""


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], text: Collection[int] = (0,)
) -> str:
    """Columns two spaces apart; those in `text` are words, the others figures and right-aligned."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in text else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def si(value: float, unit: str) -> str:
    """A value with a decimal prefix and three significant digits: 1.23 TB/s, 985 GOP/s."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


class OtherLoad:
    """How many cores other processes used since this was made: what spoils measurements."""

    ENOUGH_TO_MATTER = 0.1  # cores; below it is what any idle system does

    def __init__(self) -> None:
        self._wall, self._others = time.perf_counter(), self._seconds()

    def cores(self) -> float:
        used, wall = self._seconds() - self._others, time.perf_counter() - self._wall
        return max(0.0, used / wall)

    @staticmethod
    def _seconds() -> float:
        """CPU seconds since boot that were not this process's."""
        ticks = [int(t) for t in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        idle = ticks[3] + ticks[4]  # idle, waiting for input and output
        return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK") - time.process_time()


def load_note(cores: float) -> str:
    """A line of warning, or nothing."""
    if cores <= OtherLoad.ENOUGH_TO_MATTER:
        return ""
    return f"\nOther processes kept {cores:.1f} cores busy meanwhile: do not rely on these figures."
