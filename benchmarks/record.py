"""The rows of benchmarks/results/*.csv: what was measured, on what, with which versions."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One provider in one group; rows of a group share `date` and come from one interleaved run."""

    group: str
    date: str  # UTC, when the group's run began
    op: str
    precision: str
    m: int | None  # m, n, k: of one matrix product; empty for what is not one
    n: int | None
    k: int | None
    shape: str  # the problem's sizes and options in words; rows before this column have none
    threads: int
    # Where the weight (of decoding: the cache) lies when a call begins; empty where it does not
    # matter.
    weight_level: str
    weights_in_rotation: int
    isa: str  # the tier that pybigmodel's kernels and the roofline probe ran on
    provider: str
    provider_version: str
    median_us: float
    p20_us: float
    p80_us: float
    samples: int
    gflops: float
    peak_gflops: float  # measured in the same rounds
    peak_fraction: float
    read_gbps: float | None  # its bytes over the median; empty where arithmetic is the limit
    level_gbps: float | None  # measured in the same rounds
    bandwidth_fraction: float | None
    rel_error: float | None  # relative L2, against float64
    max_error: float | None  # largest, over the RMS of the exact result
    cosine: float | None  # mean cosine of embeddings or logits to torch eager's
    agreement: float | None  # fraction of images whose largest logit is torch eager's
    peak_bytes: (
        int | None
    )  # what one call adds to the process's memory at its peak, output included
    cpu_over_wall: float
    other_load: float  # cores that other processes used during the group's run
    cpu: str
    torch: str
    commit: str
    note: str


@cache
def cpu_model() -> str:
    """The model name with family, model and stepping, since virtual machines shorten the name."""
    found: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if not line:
            break
        found[key.strip()] = value.strip()
    family, model, step = (found.get(k, "?") for k in ("cpu family", "model", "stepping"))
    name = found.get("model name", platform.machine())
    return f"{name} (family {family} model {model} stepping {step}, {os.cpu_count()} cores)"


@cache
def commit() -> str:
    """`git describe --always --dirty` of the checkout that holds the benchmarks.

    Recorded results do not make a checkout dirty: a campaign writes them as it goes.
    """
    git = ["git", "-C", str(RESULTS.parent)]
    described = subprocess.run(
        [*git, "describe", "--always"], capture_output=True, text=True, check=False
    )
    if described.returncode != 0:
        return "unknown"
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)results"],
        capture_output=True,
        text=True,
        check=True,
    )
    return described.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def _text(key: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.10f}" if key == "cosine" else f"{value:.6g}"
    return str(value)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace the groups that `rows` measure (on this CPU) in the CSV file and keep the others.

    A kept row from before a column was added is empty there.
    """
    new = [{key: _text(key, value) for key, value in asdict(row).items()} for row in rows]
    replaced = {(row["group"], row["cpu"]) for row in new}
    kept = [row for row in read(path) if (row["group"], row["cpu"]) not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept + new, key=lambda r: (r["group"], r["provider"], r["date"])))
    temporary.replace(path)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file as text; none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
