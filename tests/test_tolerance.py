"""The policy itself: it has to fail where a result is worse than torch's."""

from __future__ import annotations

import pytest
import torch

from pybigmodel.testing import assert_exact, assert_no_worse, measure_error


def test_measures() -> None:
    exact = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)
    error = measure_error(torch.tensor([3.0, -4.0, 0.5]), exact)
    assert error.frobenius == pytest.approx(0.1) and error.maximum == pytest.approx(0.125)
    assert measure_error(exact.float(), exact).maximum == 0
    assert measure_error(torch.empty(0), torch.empty(0, dtype=torch.float64)).frobenius == 0
    assert measure_error(torch.ones(2), torch.zeros(2).double()).frobenius == float("inf")
    with pytest.raises(TypeError, match="exact must be float64"):
        measure_error(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="shape"):
        measure_error(torch.ones(2), torch.ones(1, 2).double())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_elements(value: float) -> None:
    exact = torch.tensor([1.0, value], dtype=torch.float64)
    assert measure_error(torch.tensor([1.0, value]), exact).maximum == 0
    for wrong in {torch.nan, torch.inf, -torch.inf, 0.0} - {value}:
        if wrong == wrong or value == value:
            assert measure_error(torch.tensor([1.0, wrong]), exact).maximum == float("inf")
    assert measure_error(torch.tensor([value, 1.0]), torch.ones(2).double()).maximum == float("inf")
    overflow = torch.tensor([1.0, 1e6], dtype=torch.float64)
    assert measure_error(torch.tensor([1.0, torch.inf]).half(), overflow).maximum == 0


def test_twice_torchs_error_and_no_more() -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    noise = torch.randn(1000, dtype=torch.float64)
    theirs = (exact + 1e-4 * noise).float()
    assert_no_worse((exact + 1.9e-4 * noise).float(), theirs, exact)
    with pytest.raises(AssertionError, match=r"frobenius error .* worst element"):
        assert_no_worse((exact + 2.1e-4 * noise).float(), theirs, exact)
    one_off = exact.float()
    one_off[17] += 1e-2
    with pytest.raises(AssertionError, match=r"The worst element is \(17,\)"):
        assert_no_worse(one_off, theirs, exact)
    with pytest.raises(AssertionError, match="dtype"):
        assert_no_worse(exact.bfloat16(), theirs, exact)


def test_the_floor() -> None:
    exact = torch.ones(4, dtype=torch.float64)
    assert_no_worse(torch.full((4,), 1 + 2**-22), torch.ones(4), exact)
    with pytest.raises(AssertionError):
        assert_no_worse(torch.full((4,), 1 + 2**-21), torch.ones(4), exact)
    with pytest.raises(AssertionError):  # torch's being wrong excuses nothing
        assert_no_worse(torch.full((4,), torch.nan), torch.full((4,), torch.nan), exact)


def test_exact() -> None:
    assert_exact(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]))
    with pytest.raises(AssertionError):
        assert_exact(torch.tensor([1.0]), torch.tensor([1 + 2**-23]))
    with pytest.raises(AssertionError):
        assert_exact(torch.tensor([1], dtype=torch.int8), torch.tensor([1]))
