"""``pybigmodel doctor``: what this machine can do, and what stands between it and that."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import pybigmodel
from pybigmodel import _library, _native, ops
from pybigmodel._console import OtherLoad, load_note, si, table
from pybigmodel.testing import roofline
from pybigmodel.testing.timers import interleave

# What each tier adds to the one below it; csrc/common/isa.cpp decides, and a test compares the two.
TIER_FEATURES: dict[str, tuple[str, ...]] = {
    "scalar": (),
    "avx2": ("avx2", "fma", "f16c", "os_saves_ymm"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "os_saves_zmm"),
    "avx512_bf16": ("avx512_bf16",),
}
ENVIRONMENT = ("PYBIGMODEL_ISA", "PYBIGMODEL_LOG", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
KINDS = ("fp32", "bf16", "int8")
LEVELS = ("L1", "L2", "L3", "DRAM")

# A product of 512 rows with a transformer's layer: large enough that a good library is bound by
# arithmetic, and reaches 0.8 and more of the peak.
PROBE_M, PROBE_K, PROBE_N = 512, 768, 768
SLOW_BELOW = 0.6
LARGE_ELEMENTS = 9_500_000  # float32; above any threshold up to which glibc keeps what is freed


def run(*, quick: bool) -> tuple[dict[str, Any], str]:
    facts = collect(seconds=0.02 if quick else 0.15)
    return facts, render(facts)


def collect(seconds: float) -> dict[str, Any]:
    """Everything as plain values; `seconds` is spent on each of 14 probes."""
    threads = torch.get_num_threads()
    load = OtherLoad()
    peaks = {kind: _both(roofline.peak, kind, threads, seconds) for kind in KINDS}
    sizes = roofline.cache_sizes()
    levels = [level for level in LEVELS if level != "L3" or sizes.l3]
    linear = _linear_probe(peaks["fp32"]["all_threads"], seconds)
    bandwidths = {
        level: _both(roofline.read_bandwidth, level, threads, seconds) for level in levels
    }
    return {
        "pybigmodel": {
            "version": pybigmodel.__version__,
            "path": str(Path(pybigmodel.__file__).parent),
            **_native.build_info(),
        },
        "cpu": {
            "model": _cpu_model(),
            "cores_usable": len(os.sched_getaffinity(0)),
            "features": _native.cpu_features(),
            "cache_bytes": {"L1d": sizes.l1d, "L2": sizes.l2, "L3": sizes.l3},
        },
        "tiers": tiers(),
        "threads": threads,
        "peak_ops_per_second": peaks,
        "read_bytes_per_second": bandwidths,
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "blas": _blas_name(),
            "onednn": torch.backends.mkldnn.is_available(),
        },
        "linear": linear,
        "large_output": _large_output_probe(seconds),
        "cores_used_by_others": load.cores(),
        "cuda": _cuda_library(),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
    }


def _both(probe: Any, what: str, threads: int, seconds: float) -> dict[str, float]:
    return {
        "one_thread": probe(what, 1, seconds),
        "all_threads": probe(what, threads, seconds),
    }


def tiers() -> list[dict[str, Any]]:
    """Each tier of kernels, lowest first, with what the CPU or the OS lacks for it."""
    features, available = _native.cpu_features(), _native.available_isas()
    missing: list[str] = []
    found = []
    for name, needed in TIER_FEATURES.items():
        missing += [feature for feature in needed if not features[feature]]
        found.append(
            {
                "name": name,
                "available": name in available,
                "active": name == _native.active_isa(),
                "missing": list(missing),
            }
        )
    return found


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def _blas_name() -> str:
    found = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return found.group(1) if found else "unknown"


def _linear_probe(peak: float, seconds: float) -> dict[str, Any]:
    """F.linear and ours on the same fp32 layer, all threads, as fractions of the measured peak."""
    with torch.no_grad():
        x, w = torch.randn(PROBE_M, PROBE_K), torch.randn(PROBE_N, PROBE_K)
        packed = ops.pack_linear_weight(w)
        timings = interleave(
            {
                "torch": [lambda: nn.functional.linear(x, w)],
                "pybigmodel": [lambda: ops.linear_packed(x, packed, PROBE_N)],
            },
            rounds=3,
            seconds=seconds,
            require_idle=False,
        )
    operations = 2.0 * PROBE_M * PROBE_K * PROBE_N
    # The fastest turns, as the peak is the fastest of its chunks: what the machine can do.
    fraction = {name: operations / timing.percentile(5) / peak for name, timing in timings.items()}
    return {
        "m_k_n": [PROBE_M, PROBE_K, PROBE_N],
        "torch_fraction_of_peak": fraction["torch"],
        "pybigmodel_fraction_of_peak": fraction["pybigmodel"],
        "torch_is_slow": fraction["torch"] < SLOW_BELOW,
    }


def _large_output_probe(seconds: float) -> dict[str, float]:
    """An output of 38 MB, in fresh memory and in memory that the process has: page faults apart."""
    x = torch.zeros(LARGE_ELEMENTS)
    kept = torch.zeros(LARGE_ELEMENTS)
    timings = interleave(
        {"fresh": [lambda: torch.neg(x)], "kept": [lambda: torch.neg(x, out=kept)]},
        rounds=3,
        seconds=seconds / 2,
        require_idle=False,
    )
    return {
        "bytes": 4.0 * LARGE_ELEMENTS,
        "fresh_memory_seconds": timings["fresh"].percentile(5),
        "kept_memory_seconds": timings["kept"].percentile(5),
    }


def _cuda_library() -> dict[str, Any]:
    built = (Path(pybigmodel.__file__).parent / "libpybigmodel_cuda.so").exists()
    architectures = _native.build_info()["cuda_archs"]
    if _library.CUDA_LOADED:
        reason = "loaded"
    elif not built:
        reason = "not in this build (PYBIGMODEL_CUDA=OFF, or no nvcc when it was built)"
    else:
        reason = f"not loaded: torch {torch.__version__} has no CUDA"
    devices = []
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "built": built,
        "architectures": architectures,
        "loaded": _library.CUDA_LOADED,
        "reason": reason,
        "devices": devices,
    }


# --- as text --------------------------------------------------------------------------------------


def render(facts: dict[str, Any]) -> str:
    values = ", ".join(
        f"{name}={'(unset)' if value is None else value}"
        for name, value in facts["environment"].items()
    )
    parts = [
        _render_machine(facts),
        _render_tiers(facts["tiers"]),
        _render_probes(facts),
        _render_torch(facts),
        f"environment  {values}",
    ]
    return "\n\n".join(parts)


def _render_machine(facts: dict[str, Any]) -> str:
    package, cpu = facts["pybigmodel"], facts["cpu"]
    caches = ", ".join(
        f"{name} {size // 1024} KiB" for name, size in cpu["cache_bytes"].items() if size
    )
    return "\n".join(
        [
            f"pybigmodel {package['version']} ({package['commit'] or 'no commit recorded'}) "
            f"in {package['path']}",
            f"  compiler {package['compiler']}, for torch {package['torch_abi']} and later",
            f"CPU      {cpu['model']}, {cpu['cores_usable']} cores usable",
            f"caches   {caches}",
            f"threads  {facts['threads']}",
        ]
    )


def _render_tiers(found: list[dict[str, Any]]) -> str:
    lines = ["kernels"]
    for tier in found:
        if tier["active"]:
            state = "active"
        elif tier["available"]:
            state = "available"
        else:
            state = f"not on this machine: lacks {', '.join(tier['missing'])}"
        lines.append(f"  {tier['name']:<12} {state}")
    return "\n".join(lines)


def _render_probes(facts: dict[str, Any]) -> str:
    threads = facts["threads"]
    rows = [
        [f"{kind} arithmetic", si(peak["one_thread"], "OP/s"), si(peak["all_threads"], "OP/s")]
        for kind, peak in facts["peak_ops_per_second"].items()
    ]
    rows += [
        [f"read from {level}", si(rate["one_thread"], "B/s"), si(rate["all_threads"], "B/s")]
        for level, rate in facts["read_bytes_per_second"].items()
    ]
    text = table(["measured on the active tier", "1 thread", f"{threads} threads"], rows)
    return text + load_note(facts["cores_used_by_others"])


def _render_torch(facts: dict[str, Any]) -> str:
    build, linear, cuda = facts["torch"], facts["linear"], facts["cuda"]
    output = facts["large_output"]
    fresh, kept = output["fresh_memory_seconds"] * 1e3, output["kept_memory_seconds"] * 1e3
    m, k, n = cast(list[int], linear["m_k_n"])
    if facts["cores_used_by_others"] > OtherLoad.ENOUGH_TO_MATTER:
        verdict = "not to be judged while others compute"
    else:
        verdict = "slow here" if linear["torch_is_slow"] else "as fast as it should be"
    lines = [
        f"torch    {build['version']}, BLAS {build['blas']}, "
        f"oneDNN {'yes' if build['onednn'] else 'no'}, CUDA {build['cuda'] or 'no'}",
        f"  its fp32 matrix product is {verdict}: F.linear reaches "
        f"{linear['torch_fraction_of_peak']:.0%} of the measured peak, pybigmodel "
        f"{linear['pybigmodel_fraction_of_peak']:.0%} ({m} rows, {k} to {n} features)",
        f"memory   an output of {output['bytes'] / 1e6:.0f} MB takes {fresh:.1f} ms in fresh "
        f"memory, {kept:.1f} ms in memory kept:\n"
        "  pybigmodel.configure(retain_memory=True) keeps what is freed",
        f"CUDA     {cuda['reason']}"
        + (f"; built for {cuda['architectures']}" if cuda["built"] else ""),
    ]
    lines += [f"  device {i}: {name}" for i, name in enumerate(cuda["devices"])]
    return "\n".join(lines)
