"""The choice of tier: what force_isa takes, refuses and restores."""

from __future__ import annotations

import pytest
import torch

from pybigmodel import _native, ops
from pybigmodel.testing import available_isas, force_isa

ORDER = ["scalar", "avx2", "avx512", "avx512_bf16"]


def test_tiers_follow_from_the_features() -> None:
    features = _native.cpu_features()
    expected = ["scalar"]
    if all(features[f] for f in ("avx2", "fma", "f16c", "os_saves_ymm")):
        expected.append("avx2")
        names = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "os_saves_zmm")
        if all(features[f] for f in names):
            expected.append("avx512")
            if features["avx512_bf16"]:
                expected.append("avx512_bf16")
    assert available_isas() == expected
    with open("/proc/cpuinfo") as file:
        flags = next(line for line in file if line.startswith("flags")).split()
    for name in ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16"):
        assert features[name] == (name in flags)


def test_force_isa_restores() -> None:
    before = _native.active_isa()
    with force_isa("scalar") as name:
        assert name == _native.active_isa() == "scalar"
        with force_isa(available_isas()[-1]):
            assert _native.active_isa() == available_isas()[-1]
        assert _native.active_isa() == "scalar"
        with force_isa(None) as best:
            assert best == available_isas()[-1]
    assert _native.active_isa() == before
    with pytest.raises(ZeroDivisionError), force_isa("scalar"):
        raise ZeroDivisionError
    assert _native.active_isa() == before


def test_unknown_and_lacking_tiers() -> None:
    before = _native.active_isa()
    with (
        pytest.raises(ValueError, match=r"isa must be one of scalar, avx2, .*got 'sse2'"),
        force_isa("sse2"),
    ):
        pass
    for name in [n for n in ORDER if n not in available_isas()]:
        with (
            pytest.raises(RuntimeError, match=rf"cannot run the '{name}' kernels"),
            force_isa(name),
        ):
            pass
    assert _native.active_isa() == before


def test_last_kernel_names_the_tier(isa: str) -> None:
    ops.linear(torch.randn(2, 3), torch.randn(4, 3))
    assert _native.last_kernel() == f"gemm_f32.{isa}"
