"""Gradients of attention as its tests take them, and what rounding may do to them.

torch's math path, to which masks and unequal head dimensions lead, keeps the weights of its forward
pass, so that what ought to cancel in p·(dp − δ) does. A flash backward takes the weights from
scores computed again and δ from the rounded output: its errors can be many times those, where one
key has all of a row's weight. `noise` is what they come to, to first order, and the second
yardstick beside torch's error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from attention_cases import Case, exact, factor, formula, theirs
from torch import Tensor

from pybigmodel import ops
from pybigmodel.reference import attention as reference
from pybigmodel.testing.tolerance import FACTOR, FLOOR_ULPS

Result = tuple[Tensor, Tensor | None]


def ours(case: Case) -> Result:
    out, lse = case.call(ops.attention, return_lse=True)
    return out, lse


def seeds_of(case: Case, through_lse: bool = False) -> Result:
    """Gradients of the output and of lse."""
    rows = case.q.shape[:-1]
    d_out = torch.randn(*rows, case.v.shape[-1]).to(case.q.dtype)
    return d_out, torch.randn(rows) if through_lse else None


def gradients(f: Callable[[Case], Result], case: Case, seeds: Result, *names: str) -> list[Tensor]:
    """Of q, k, v and a floating mask, or of those named; zeros where nothing leads to one."""
    case, leaves = case.leaves(*names)
    out, lse = f(case)
    outputs, given = [out], [seeds[0].to(out.dtype)]
    if seeds[1] is not None and lse is not None:
        seen = lse.detach().isfinite()
        outputs.append(lse)
        given.append((seeds[1] * seen).to(lse.dtype))
    return list(torch.autograd.grad(outputs, leaves, given, materialize_grads=True))


def check_gradients(case: Case, through_lse: bool = False, *names: str) -> None:
    """The policy for the gradients of the op: twice torch's error, or twice what rounding does."""
    seeds = seeds_of(case, through_lse)
    torchs = formula if through_lse else lambda c: (theirs(c), None)
    got = gradients(ours, case, seeds, *names)
    expected = gradients(exact, case.to(torch.float64), seeds, *names)
    others = gradients(torchs, case, seeds, *names)
    sigmas = dict(zip(case.tensors(), noise(case, *seeds), strict=True))
    for name, *results in zip(names or case.tensors(), got, others, expected, strict=True):
        tensor = case.tensors()[name]
        assert results[0].dtype == tensor.dtype and results[0].shape == tensor.shape, name
        assert_within(f"d_{name}", *results, sigmas[name], factor(case))


def assert_within(
    name: str, got: Tensor, other: Tensor, expected: Tensor, sigma: Tensor, factor: float = FACTOR
) -> None:
    """In both norms at most `factor` times torch's error, or what noise of `sigma` comes to."""
    assert got.isfinite().all(), f"{name}: not finite"
    floor = FLOOR_ULPS * torch.finfo(got.dtype).eps

    def largest(t: Tensor) -> Tensor:
        return t.abs().max() if t.numel() else t.sum()

    # A row's errors have much in common, and there may be few rows; the largest of 10⁵ normal
    # errors is at 4.4 σ.
    norms = (("Frobenius", torch.linalg.vector_norm, 3.0), ("largest", largest, 6.0))
    for norm, of, sigmas in norms:
        error, torchs = of(got - expected), of(other - expected)
        limits = factor * torchs, sigmas * of(sigma), floor * of(expected)
        assert error <= max(limits), (
            f"{name}: {norm} error {error:.3g} is above {max(limits):.3g}: torch has {torchs:.3g}, "
            f"rounding gives {of(sigma):.3g}, the gradient is {of(expected):.3g}"
        )


# --- rounding -------------------------------------------------------------------------------------

# Standard deviations: of one rounding, in epsilons of the value, and of a chain of n additions, in
# epsilons of the root of its squares' sum.
ROUNDING = 0.3
TANH = 1.0


def chain(n: int) -> float:
    return n**0.5 / 8


def noise(case: Case, d_out: Tensor, d_lse: Tensor | None) -> list[Tensor]:
    """Standard deviations of the errors of d_q, d_k, d_v and, if there is one, d_mask; float64."""
    fine, coarse = torch.finfo(torch.float32).eps, torch.finfo(case.q.dtype).eps
    product = coarse if case.q.dtype == torch.bfloat16 else fine  # to which p and ds are rounded
    c = case.to(torch.float64)
    q, (k, v), o = c.q, _repeated(c), c.options
    d_out = d_out.double()
    scale, cap = o.get("scale"), o.get("softcap", 0.0)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    raw = scale * (q @ k.mT)
    tanh = torch.tanh(raw / cap) if cap else torch.zeros_like(raw)
    slope = 1 - tanh.square()
    p, kept, lse = _weights(q, k, o)
    dropped = torch.where(p > 0, kept / p, 0.0)
    out = kept @ v
    d_p = dropped * (d_out @ v.mT) - (d_out * out).sum(-1, keepdim=True)
    if d_lse is not None:
        d_p = d_p + d_lse.double()[..., None]

    # Squares: of p, relatively; of ds, each for itself and what is common to a row, by δ.
    score = slope.square() * (scale * chain(q.shape[-1]) * fine) ** 2 * (q.square() @ k.square().mT)
    score += fine**2 * ((ROUNDING * raw * slope).square() + (TANH * cap * tanh).square())
    relative = score + (ROUNDING * fine) ** 2 * (lse.square() + 1) + (ROUNDING * product) ** 2
    of_d_p = (chain(v.shape[-1]) * fine) ** 2 * (d_out.square() @ v.square().mT)
    apart = (p * d_p).square() * relative + (p * dropped).square() * of_d_p
    of_out = (ROUNDING * coarse) ** 2 + (ROUNDING * fine) ** 2 * k.shape[2] / 3
    of_delta = (chain(v.shape[-1]) * fine) ** 2 + of_out
    row = of_delta * (d_out * out).square().sum(-1, keepdim=True)
    both = (apart + p.square() * row) * slope.square()

    d_q = scale**2 * ((apart * slope.square()) @ k.square() + row * ((p * slope) @ k).square())
    d_k = scale**2 * both.mT @ q.square()
    d_v = (kept.square() * relative).mT @ d_out.square()
    group = q.shape[1] // max(1, c.k.shape[1])
    variances = [d_q, *(t.unflatten(1, (-1, group)).sum(2) for t in (d_k, d_v))]
    mask = o.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        if mask.shape[-1:] in ((), (1,)):  # what is common to a row adds up
            p = p.sum(-1, keepdim=True)
        parts = (apart, p.square() * row)
        variances.append(sum(t.sum_to_size(mask.shape) for t in parts))
    return [t.sqrt() for t in variances]


def _repeated(case: Case) -> tuple[Tensor, Tensor]:
    group = case.q.shape[1] // max(1, case.k.shape[1])
    return case.k.repeat_interleave(group, 1), case.v.repeat_interleave(group, 1)


def _weights(q: Tensor, k: Tensor, options: dict[str, object]) -> tuple[Tensor, Tensor, Tensor]:
    """p before and after dropout, and lse: the oracle's output for unit vectors as values."""
    units = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:3], -1)
    plain = {n: x for n, x in options.items() if n not in ("dropout_p", "dropout_seed")}
    p, lse = reference.attention(q, k, units, **plain)  # type: ignore[arg-type]
    kept, _ = reference.attention(q, k, units, **options)  # type: ignore[arg-type]
    # At 1e30 every score is rounded to the same number, and so is the exact one.
    return p, kept, lse.masked_fill(lse.abs() > 1e30, 0)[..., None]
