"""The tolerance of every numerical test: no worse than torch by more than a factor.

A tolerance is a policy, not a number per test. Both results, ours and torch's in the same dtype,
are measured against the same float64 result, in two norms:

- relative Frobenius: ``‖a − e‖₂ / ‖e‖₂``, the error of the result as a whole;
- scaled maximum: ``max|a − e| / max|e|``, the worst element, in units of the largest.

Ours may have at most twice torch's error in each. Where torch's error is a lucky zero (small
integers, a single product), a floor of two units in the last place applies instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0
FLOOR_ULPS = 2.0


@dataclass(frozen=True)
class Error:
    """What a result is off by; both 0 where it is exact, infinite where it has a wrong NaN or ∞."""

    frobenius: float
    maximum: float

    def __str__(self) -> str:
        return f"relative Frobenius {self.frobenius:.3g}, scaled maximum {self.maximum:.3g}"


def measure_error(actual: Tensor, exact: Tensor) -> Error:
    """The error of ``actual`` against ``exact``, a float64 tensor of the same shape.

    Elements of ``exact`` that ``actual``'s dtype cannot hold (NaN, ±∞, overflow) must come out as
    NaN or that ∞; they take no part in the norms.
    """
    if exact.dtype != torch.float64:
        raise TypeError(f"exact must be float64, got {exact.dtype}")
    if actual.shape != exact.shape:
        raise ValueError(
            f"actual must have exact's shape {tuple(exact.shape)}, got {tuple(actual.shape)}"
        )
    reachable = exact.to(actual.dtype)
    finite = reachable.isfinite()
    same = (actual == reachable) | (actual.isnan() & reachable.isnan())
    if not bool(torch.where(finite, actual.isfinite(), same).all()):
        return Error(float("inf"), float("inf"))
    e = exact[finite]
    difference = actual[finite].to(torch.float64) - e
    if not difference.numel() or not bool(difference.any()):
        return Error(0.0, 0.0)

    def ratio(a: Tensor, b: Tensor) -> float:
        return float(a) / float(b) if float(b) else float("inf")

    return Error(ratio(difference.norm(), e.norm()), ratio(difference.abs().max(), e.abs().max()))


def assert_no_worse(
    actual: Tensor,
    torch_result: Tensor,
    exact: Tensor,
    *,
    factor: float = FACTOR,
    floor_ulps: float = FLOOR_ULPS,
) -> None:
    """Fail unless ``actual``'s error against ``exact`` is at most ``factor`` times torch's.

    Args:
        actual: the result under test.
        torch_result: torch's result in the same dtype, of which only the error counts.
        exact: the result in float64, from the same (rounded) inputs.
        factor: 2 for everything that does not state a bound of its own in its docstring.
        floor_ulps: errors below this many epsilons of actual's dtype always pass.

    Raises:
        AssertionError: naming both errors, the bound and the worst element.
    """
    if actual.dtype != torch_result.dtype:
        raise AssertionError(f"expected torch's dtype {torch_result.dtype}, got {actual.dtype}")
    ours, theirs = measure_error(actual, exact), measure_error(torch_result, exact)
    floor = floor_ulps * torch.finfo(actual.dtype).eps
    # Where torch itself is wrong about NaN or infinity, ours has to be right: the floor remains.
    pairs = (
        ("frobenius", ours.frobenius, theirs.frobenius),
        ("maximum", ours.maximum, theirs.maximum),
    )
    for norm, mine, other in pairs:
        bound = max(floor, factor * other if other != float("inf") else 0.0)
        if not mine <= bound:
            raise AssertionError(
                f"{norm} error {mine:.3g} is above {bound:.3g}: ours has {ours}; torch has "
                f"{theirs}; factor {factor}, floor {floor_ulps} ulp. {_worst(actual, exact)}"
            )


def assert_exact(actual: Tensor, expected: Tensor) -> None:
    """Fail unless shapes, dtypes and values agree to the last bit (NaNs are equal, as are zeros).

    The rule for integers, for layouts, and for a result computed in two ways that must not differ.
    """
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def _worst(actual: Tensor, exact: Tensor) -> str:
    if not actual.numel():
        return "No elements."
    off = (actual.to(torch.float64) - exact).abs().flatten()
    off = torch.where(off.isnan(), torch.inf, off)
    off = torch.where(actual.flatten().isnan() & exact.flatten().isnan(), 0.0, off)
    at = int(off.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), actual.shape))
    got, expected = float(actual.flatten()[at]), float(exact.flatten()[at])
    return f"The worst element is {index}: got {got:.9g}, expected {expected:.9g}."
