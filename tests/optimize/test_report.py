"""report: what it says, and that it is true."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn

import pybigmodel as pbm
from pybigmodel._measure import difference
from pybigmodel._report import Report, Row, log_rows

PRECISIONS = ["fp32", "bf16", "int8"]
BOUND = {"fp32": 1e-6, "bf16": 1e-2, "int8": 3e-2}


def test_report(model, x, twice_as_fast) -> None:
    fast = pbm.optimize(model, "int8", example_inputs=x, exclude="head")
    report = pbm.report(fast)
    text = str(report)
    lines = text.splitlines()
    assert lines[0].split()[:2] == ["path", "layer"]
    assert "first   Linear(40, 64)  pybigmodel.nn.Int8Linear" in text
    assert "2.00×" in text and "in exclude" in text
    assert any(line.startswith("3 of 4 layers replaced") for line in lines)
    assert "<td>in exclude</td>" in report._repr_html_()
    facts = json.loads(report.to_json())
    assert facts == json.loads(json.dumps(report.to_dict()))
    assert (facts["layers"], facts["replaced"]) == (4, 3)
    row = facts["rows"][0]
    assert row["path"] == "first" and row["replaced_by"] == "pybigmodel.nn.Int8Linear"
    assert row["precision"] == "int8" and row["speedup"] == 2.0 and 0 < row["error"] < 3e-2
    assert row["bytes_before"] == 64 * 40 * 4
    # packed with column sums, scales, original
    assert row["bytes_after"] == 64 * 44 + 64 * 4 + 64 * 40 * 4


def test_a_report_is_a_sequence_of_rows(model) -> None:
    report = pbm.report(pbm.optimize(model))
    assert len(report) == 4
    assert [row.path for row in report] == ["first", "body.0", "body.2", "head"]


ROWS = (
    Row("a", "Linear(2, 3)", "fp32", "pybigmodel.nn.Linear", speedup=2.0, other_load=1.26),
    Row("b", "Linear(2, 3)", "fp32", left="in exclude", other_load=0.02),
)


def test_report_says_that_the_machine_was_busy() -> None:
    note = "Other processes kept 1.3 cores busy meanwhile: do not rely on these figures."
    assert str(Report(ROWS)).splitlines()[-1] == note
    assert note in Report(ROWS)._repr_html_()
    assert "Other processes" not in str(Report(ROWS[1:]))


def test_what_was_done_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pybigmodel"):
        log_rows(ROWS)
    assert caplog.messages == [
        "optimize: a, Linear(2, 3): pybigmodel.nn.Linear, 2.00×",
        "optimize: b, Linear(2, 3): left as is, in exclude",
    ]


def test_report_bytes_are_those_of_the_packed_weight(model, x) -> None:
    for precision, expected in (("fp32", 4 + 4), ("bf16", 4 + 2)):
        fast = pbm.optimize(model, precision)
        fast.eval()
        with torch.no_grad():
            fast(x)
        row = pbm.report(fast).rows[0]
        packed = sum(copy.nbytes for copy in fast.first._packed.copies.values())
        assert row.bytes_after == 64 * 40 * expected == fast.first.weight.nbytes + packed


def test_a_second_call_keeps_the_rows_of_the_first(model, x, twice_as_fast) -> None:
    pbm.optimize(model, "int8", include="body", example_inputs=x, inplace=True)
    pbm.optimize(model, "fp32", inplace=True)
    rows = {row.path: row for row in pbm.report(model).rows}
    assert rows["body.0"].precision == "int8" and rows["body.0"].speedup == 2.0
    assert rows["head"].precision == "fp32"
    assert all(row.replaced_by is not None for row in rows.values())
    pbm.restore(model)
    assert all(type(m) is not pbm.nn.Linear for m in model.modules())


def test_report_and_restore_of_optimized_parts(model) -> None:
    pbm.optimize(model.body, "int8", inplace=True)
    assert [row.path for row in pbm.report(model).rows] == ["body.0", "body.2"]
    pbm.restore(model)
    assert type(model.body[0]) is nn.Linear


def test_a_model_without_linear_layers() -> None:
    fast = pbm.optimize(nn.Sequential(nn.ReLU()))
    assert str(pbm.report(fast)).startswith("0 of 0 layers replaced")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_low_precision_models(model, x, dtype, precision, twice_as_fast) -> None:
    model, x = model.to(dtype), x.to(dtype)
    fast = pbm.optimize(model, precision, example_inputs=x)
    with torch.no_grad():
        y = fast(x)
        assert y.dtype == dtype
        assert difference(y, model(x))[0] < BOUND["int8"]
    expected = "bf16" if precision == "fp32" and dtype == torch.bfloat16 else precision
    assert {row.precision for row in pbm.report(fast).rows} == {expected}
    assert len(pbm.report(fast).replaced) == 4
