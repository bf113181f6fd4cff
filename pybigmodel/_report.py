"""What `optimize` did to each layer, as a table."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pybigmodel._console import load_note, table

log = logging.getLogger("pybigmodel")


@dataclass(frozen=True)
class Row:
    """One layer of a model; `left` is the reason for which it was not replaced.

    What is measured of attention and transformer layers stands in the row of the outermost one.
    """

    path: str  # as in named_modules(); "" is the model itself
    layer: str
    precision: str  # what its products are computed in; empty of a pooling
    replaced_by: str | None = None
    norm: str | None = None  # the path of what normalises its output, and is folded into it
    residual: bool = False  # whether one is added in the same pass
    activation: str | None = None  # that follows it, and is done in the same pass
    found: str | None = None  # where it was found that these follow
    kernel: str | None = None  # the one that ran on example_inputs
    speedup: float | None = None  # the original's time over the replacement's, on example_inputs
    error: float | None = None  # ‖y − y₀‖ / ‖y₀‖ to the original's output, the worst call
    cosine: float | None = None  # of y to y₀, the worst call
    bytes_before: int = 0  # of the weight
    bytes_after: int = 0  # with its packed copy, its scales and what is kept for `restore`
    left: str | None = None
    gives: str | None = None  # "uint8": only int8 convolutions take its output, which stays so
    in_float: str | None = None  # why it was replaced by a floating layer where int8 was asked for
    other_load: float | None = None  # cores that other processes used while it was timed


_COLUMNS = (
    *("path", "layer", "replaced by", "norm", "residual", "activation", "found in", "kernel"),
    *("precision", "gives", "speed-up", "error", "not in int8", "left as is"),
)
_FIGURES = ("speed-up", "error")


@dataclass(frozen=True)
class Report:
    """The rows of one model, in the order of `named_modules()`; prints as a table.

    Speed-ups, errors and kernels are known only where `optimize` was given example_inputs.
    """

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def replaced(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.replaced_by is not None)

    def under(self, path: str) -> Report:
        """The same rows for a model that holds this one at `path`."""

        def longer(row: Row) -> Row:
            return replace(row, path=f"{path}.{row.path}" if row.path else path)

        return Report(tuple(map(longer, self.rows))) if path else self

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": len(self.rows),
            "replaced": len(self.replaced),
            "bytes_before": sum(row.bytes_before for row in self.rows),
            "bytes_after": sum(row.bytes_after for row in self.rows),
            "rows": [asdict(row) for row in self.rows],
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        if not self.rows:
            return self._summary()
        rows = [_cells(row) for row in self.rows]
        used = [at for at in range(len(_COLUMNS)) if any(row[at] for row in rows)]
        shown = table(
            [_COLUMNS[at] for at in used],
            [[row[at] for at in used] for row in rows],
            text=[i for i, at in enumerate(used) if _COLUMNS[at] not in _FIGURES],
        )
        return f"{shown}\n\n{self._summary()}"

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(line(_cells(row), "td") for row in self.rows)
        return f"<table>{line(_COLUMNS, 'th')}{body}</table><p>{html.escape(self._summary())}</p>"

    def _summary(self) -> str:
        before = sum(row.bytes_before for row in self.rows) / 1e6
        after = sum(row.bytes_after for row in self.rows) / 1e6
        busy = max((row.other_load or 0.0 for row in self.rows), default=0.0)
        return (
            f"{len(self.replaced)} of {len(self.rows)} layers replaced; weights of "
            f"{after:.1f} MB in all the forms held, {before:.1f} MB before{load_note(busy)}"
        )


def log_rows(rows: Sequence[Row]) -> None:
    """What `optimize` did, to the logger `pybigmodel`: a line for each layer."""
    for row in rows:
        said = [f"{row.path or '(the model)'}, {row.layer}: {row.replaced_by or 'left as is'}"]
        said += [] if row.speedup is None else [f"{row.speedup:.2f}×"]
        said += [] if row.in_float is None else [f"not in int8: {row.in_float}"]
        said += [] if row.left is None else [row.left]
        log.info("optimize: %s", ", ".join(said))


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.path or "(the model)",
        row.layer,
        row.replaced_by or "",
        (row.norm or "").rpartition(".")[2],
        "added" if row.residual else "",
        row.activation or "",
        row.found or "",
        row.kernel or "",
        row.precision if row.replaced_by else "",
        row.gives or "",
        "" if row.speedup is None else f"{row.speedup:.2f}×",
        "" if row.error is None else f"{row.error:.1e}",
        row.in_float or "",
        row.left or "",
    )
