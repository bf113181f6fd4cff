"""What `optimize` did to each layer, as a table."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Row:
    """One linear layer of a model; `left` is the reason for which it was not replaced."""

    path: str  # as in named_modules(); "" is the model itself
    layer: str
    precision: str  # what its products are computed in
    replaced_by: str | None = None
    kernel: str | None = None  # the one that ran on example_inputs
    speedup: float | None = None  # the original's time over the replacement's, on example_inputs
    error: float | None = None  # ‖y − y₀‖ / ‖y₀‖ to the original's output, the worst call
    cosine: float | None = None  # of y to y₀, the worst call
    bytes_before: int = 0  # of the weight
    bytes_after: int = 0  # with its packed copy, its scales and what is kept for `restore`
    left: str | None = None


_COLUMNS = (
    *("path", "layer", "replaced by", "kernel"),
    *("precision", "speed-up", "error", "left as is"),
)


@dataclass(frozen=True)
class Report:
    """The rows of one model, in the order of `named_modules()`; prints as a table.

    Speed-ups, errors and kernels are known only where `optimize` was given example_inputs.
    """

    rows: tuple[Row, ...]

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
        table = [_COLUMNS, *map(_cells, self.rows)]
        used = [at for at in range(len(_COLUMNS)) if any(row[at] for row in table[1:])]
        widths = {at: max(len(row[at]) for row in table) for at in used}
        lines = ["  ".join(row[at].ljust(widths[at]) for at in used).rstrip() for row in table]
        if self.rows:
            lines.insert(1, "  ".join("-" * widths[at] for at in used))
        return "\n".join([*lines, "", self._summary()] if self.rows else [self._summary()])

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(line(_cells(row), "td") for row in self.rows)
        return f"<table>{line(_COLUMNS, 'th')}{body}</table><p>{html.escape(self._summary())}</p>"

    def _summary(self) -> str:
        before = sum(row.bytes_before for row in self.rows) / 1e6
        after = sum(row.bytes_after for row in self.rows) / 1e6
        return (
            f"{len(self.replaced)} of {len(self.rows)} linear layers replaced; their weights take "
            f"{after:.1f} MB with packed copies and kept originals, {before:.1f} MB before"
        )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.path or "(the model)",
        row.layer,
        row.replaced_by or "",
        row.kernel or "",
        row.precision if row.replaced_by else "",
        "" if row.speedup is None else f"{row.speedup:.2f}×",
        "" if row.error is None else f"{row.error:.1e}",
        row.left or "",
    )
