"""attention_varlen: packed sequences, each as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import FLOATS, Case, check_lse, covering, exact, factor, theirs
from attention_gradients import assert_within, gradients, noise
from linear_cases import poison
from torch import Tensor
from torch.autograd import forward_ad

from pybigmodel import _native, ops
from pybigmodel.reference import attention as reference
from pybigmodel.testing import assert_exact, assert_no_worse

F32 = torch.float32
Lengths = list[tuple[int, int]]

# (queries, keys) of each sequence: none, one, equal, more of either, both sides of a block.
LENGTHS: dict[str, Lengths] = {
    "one": [(70, 70)],
    "equal": [(33, 33), (1, 1), (64, 64), (17, 17)],
    "empty ones": [(0, 0), (20, 30), (0, 9), (48, 0), (5, 5), (0, 0)],
    "decoding": [(1, 300), (1, 7), (1, 64), (1, 1), (2, 129)],
    "mixed": [(3, 40), (90, 20), (1, 65), (47, 49), (130, 257)],
    "many": [(n % 7, n % 11) for n in range(40)],
}
FACTORS: dict[str, list[Any]] = {
    "lengths": list(LENGTHS),
    "heads": [(4, 2), (3, 3), (6, 1)],
    "sizes": [(16, 16), (33, 20), (64, 64), (128, 72)],
    "dtype": FLOATS,
    "starts": [torch.int32, torch.int64],
    "causal": [None, "bottom_right", "top_left"],
    "window": [None, (5, 2), (40, -1), (None, 9)],
    "alibi": [None, "heads", "batch"],
    "softcap": [0.0, 2.0],
    "scale": [None, 0.2],
    "dropout_p": [0.0, 0.3],
}
MATRIX = covering(FACTORS)


class Packed:
    """Arguments of one call, and the same sequences apart."""

    def __init__(self, choice: dict[str, Any]) -> None:
        self.lengths: Lengths = LENGTHS[choice["lengths"]]
        (hq, hkv), (d, dv) = choice.get("heads", (4, 2)), choice.get("sizes", (33, 20))
        dtype, starts = choice.get("dtype", F32), choice.get("starts", torch.int32)
        queries, keys = (sum(n) for n in zip(*self.lengths, strict=True))
        self.q, self.k, self.v = (
            torch.randn(*shape).to(dtype)
            for shape in ((queries, hq, d), (keys, hkv, d), (keys, hkv, dv))
        )
        self.cu_q, self.cu_k = (
            torch.tensor([0, *n]).cumsum(0).to(starts) for n in zip(*self.lengths, strict=True)
        )
        names = ("window", "softcap", "scale", "dropout_p")
        self.options = {n: choice[n] for n in names if n in choice}
        if choice.get("causal"):
            self.options |= {"causal": True, "causal_align": choice["causal"]}
        if choice.get("alibi"):
            shape = (len(self.lengths), hq) if choice["alibi"] == "batch" else (hq,)
            self.options["alibi_slopes"] = torch.rand(shape) / 2
        if self.options.get("dropout_p"):
            self.options["dropout_seed"] = -77

    def call(self, f: Callable[..., Any] = ops.attention_varlen, **more: Any) -> Any:
        return f(self.q, self.k, self.v, self.cu_q, self.cu_k, **self.options, **more)

    def both(self, **more: Any) -> tuple[Tensor, Tensor]:
        out, lse = self.call(return_lse=True, **more)
        return out, lse

    def sequence(self, i: int) -> tuple[slice, slice]:
        return tuple(slice(*c[i : i + 2].tolist()) for c in (self.cu_q, self.cu_k))  # type: ignore[return-value]

    def alone(self, i: int) -> Case:
        """Sequence i as a batch of one; what the reference calls number i."""
        rows, keys = self.sequence(i)
        q, k, v = (t.transpose(0, 1)[None] for t in (self.q[rows], self.k[keys], self.v[keys]))
        options = dict(self.options)
        slopes = options.get("alibi_slopes")
        if slopes is not None and slopes.dim() == 2:
            options["alibi_slopes"] = slopes[i]
        return Case(q, k, v, options)


@pytest.mark.parametrize("choice", MATRIX, ids=lambda c: " ".join(str(x) for x in c.values()))
def test_matrix(isa: str, choice: dict[str, Any]) -> None:
    packed = Packed(choice)
    out, lse = packed.both()
    flavour = "bf16" if packed.q.dtype == torch.bfloat16 else "f32"
    assert _native.last_kernel() == f"attention_{flavour}.{isa}"
    queries, heads, _ = packed.q.shape
    assert out.shape == (queries, heads, packed.v.shape[2]) and lse.shape == (heads, queries)
    results = []
    for i in range(len(packed.lengths)):
        rows, _ = packed.sequence(i)
        case = packed.alone(i)
        case.options["sequence"] = i  # of the reference only: how dropout counts
        expected, other = exact(case)[0], own_dtype(case)
        results.append([t[0].transpose(0, 1) for t in (other, expected)])
        check_lse(case, lse[:, rows][None])
    other, expected = (torch.cat(t) for t in zip(*results, strict=True))
    assert_no_worse(out, other, expected, factor=factor(packed.alone(0)))
    assert_exact(packed.call(), out)


def own_dtype(case: Case) -> Tensor:
    """What torch makes of it; SDPA refuses none of the sequences but those without keys."""
    if not case.k.shape[2] or not case.q.shape[2]:
        return case.q.new_zeros(*case.q.shape[:-1], case.v.shape[-1])
    return theirs(case)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (20, 3), "causal_align": "top_left"}, {"softcap": 3.0}],
    ids=str,
)
def test_to_the_bit_as_attention(isa: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    for name in LENGTHS:
        packed = Packed({"lengths": name, "dtype": dtype, "alibi": "batch"})
        packed.options |= options
        out, lse = packed.both()
        for i in range(len(packed.lengths)):
            rows, _ = packed.sequence(i)
            # With gradients: without, few rows take a kernel of their own.
            alone, _ = packed.alone(i).leaves("q")
            expected, sums = (t.detach() for t in alone.call(ops.attention, return_lse=True))
            assert_exact(out[rows], expected[0].transpose(0, 1))
            assert_exact(lse[:, rows], sums[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_of_one_length_as_the_batch_with_dropout(isa: str, dtype: torch.dtype) -> None:
    """Sequence b drops what batch entry b drops."""
    b, hq, hkv, s, d = 3, 4, 2, 40, 32
    q, k, v = (torch.randn(b, s, h, d).to(dtype) for h in (hq, hkv, hkv))
    starts = torch.arange(0, (b + 1) * s, s)
    options = {"dropout_p": 0.4, "dropout_seed": 2**50 + 3, "causal": True, "return_lse": True}
    out, lse = ops.attention_varlen(
        *(t.flatten(0, 1) for t in (q, k, v)), starts, starts, **options
    )
    expected, sums = ops.attention(*(t.transpose(1, 2) for t in (q, k, v)), **options)
    assert_exact(out.unflatten(0, (b, s)), expected.transpose(1, 2))
    assert_exact(lse.unflatten(1, (b, s)), sums.transpose(0, 1))


def test_dropout_is_the_references(isa: str) -> None:
    lengths, p, seed = [3, 0, 20, 7], 0.3, 2**35 + 1
    starts = torch.tensor([0, *lengths]).cumsum(0)
    total = int(starts[-1])
    q = torch.zeros(total, 2, 8)
    v = torch.zeros(total, 2, 20)
    for begin, n in zip(starts.tolist(), lengths, strict=False):
        v[begin : begin + n, :, :n] = torch.eye(n)[:, None]
    out = ops.attention_varlen(q, q, v, starts, starts, dropout_p=p, dropout_seed=seed)
    for b, (begin, n) in enumerate(zip(starts.tolist(), lengths, strict=False)):
        keep = reference.dropout_mask(seed, p, 1, 2, n, n, first=b)[0]
        assert_exact(out[begin : begin + n, :, :n] != 0, keep.transpose(0, 1))


@pytest.mark.parametrize("choice", MATRIX[::2], ids=lambda c: " ".join(str(x) for x in c.values()))
def test_gradients(isa: str, choice: dict[str, Any]) -> None:
    packed = Packed(choice)
    d_out = torch.randn(*packed.q.shape[:2], packed.v.shape[2]).to(packed.q.dtype)
    d_lse = torch.randn(packed.q.shape[1], packed.q.shape[0])
    leaves = [t.requires_grad_() for t in (packed.q, packed.k, packed.v)]
    out, lse = packed.both()
    got = torch.autograd.grad((out, lse), leaves, (d_out, d_lse))
    for t in leaves:
        t.requires_grad_(False)
    parts: list[list[tuple[Tensor, ...]]] = [[], [], []]
    for i in range(len(packed.lengths)):
        rows, _ = packed.sequence(i)
        case = packed.alone(i)
        case.options["sequence"] = i
        seeds = d_out[rows].transpose(0, 1)[None], d_lse[:, rows][None]
        expected = gradients(exact, case.to(torch.float64), seeds)
        others = gradients(own_formula, case, seeds)
        for at, *ts in zip(range(3), others, expected, noise(case, *seeds), strict=True):
            parts[at].append(tuple(t[0].transpose(0, 1) for t in ts))
    for name, gradient, part in zip("qkv", got, parts, strict=True):
        other, reference, sigma = (torch.cat(t) for t in zip(*part, strict=True))
        assert gradient.shape == reference.shape and gradient.dtype == packed.q.dtype
        assert_within(f"d_{name}", gradient, other, reference, sigma, factor(packed.alone(0)))


def own_formula(case: Case) -> tuple[Tensor, Tensor]:
    out, lse = case.to(case.q.dtype).call(reference.attention)
    return out, lse


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides(isa: str, dtype: torch.dtype) -> None:
    """Slices of a fused projection, every second row, a last dimension that is not contiguous."""
    packed = Packed({"lengths": "mixed", "dtype": dtype, "causal": "bottom_right"})
    plain = packed.both()
    for t in ("q", "k", "v"):
        x = getattr(packed, t)
        n, h, d = x.shape
        fused = poison((n, 3, h, d + 2), dtype)
        fused[:, 1, :, :d] = x
        second = poison((2 * n, h, d), dtype)
        second[::2] = x
        for view in (fused[:, 1, :, :d], second[::2], x.mT.contiguous().mT):
            assert torch.equal(view, x)
            setattr(packed, t, view)
            for got, expected in zip(packed.both(), plain, strict=True):
                assert_exact(got, expected)
        setattr(packed, t, x)
    packed.cu_q = packed.cu_q.repeat_interleave(2)[::2]
    assert_exact(packed.call(), plain[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_sequence_does_not_depend_on_the_others(
    isa: str, threads: None, dtype: torch.dtype
) -> None:
    """Nor on threads: alone, in another order, and beside one of NaN, the same to the bit."""
    packed = Packed({"lengths": "mixed", "dtype": dtype, "causal": "bottom_right"})
    out, lse = packed.both()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for got, expected in zip(packed.both(), (out, lse), strict=True):
            assert_exact(got, expected)
    rows, keys = packed.sequence(1)
    packed.q[rows], packed.k[keys], packed.v[keys] = torch.nan, torch.nan, torch.nan
    spoilt, sums = packed.both()
    for i in (0, 2, 3, 4):
        rows, keys = packed.sequence(i)
        assert_exact(spoilt[rows], out[rows])
        assert_exact(sums[:, rows], lse[:, rows])
        starts = (
            torch.tensor([0, rows.stop - rows.start]),
            torch.tensor([0, keys.stop - keys.start]),
        )
        alone = (packed.q[rows], packed.k[keys], packed.v[keys], *starts)
        assert_exact(ops.attention_varlen(*alone, **packed.options), out[rows])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_empty(isa: str, dtype: torch.dtype) -> None:
    for starts_q, starts_k in [
        ([0], [0]),
        ([0, 0], [0, 0]),
        ([0, 0, 0], [0, 3, 3]),
        ([0, 4], [0, 0]),
    ]:
        q, k, v = (
            torch.randn(n, 2, d).to(dtype).requires_grad_()
            for n, d in ((starts_q[-1], 8), (starts_k[-1], 8), (starts_k[-1], 5))
        )
        cu = torch.tensor(starts_q), torch.tensor(starts_k)
        out, lse = ops.attention_varlen(q, k, v, *cu, return_lse=True)
        assert_exact(out, torch.zeros(starts_q[-1], 2, 5, dtype=dtype))
        assert_exact(lse, torch.full((2, starts_q[-1]), -torch.inf))
        for t, g in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
            assert_exact(g, torch.zeros_like(t))


def test_only_the_gradients_that_are_asked_for(isa: str) -> None:
    packed = Packed({"lengths": "mixed"})
    whole = {}
    for names in ("qkv", "q", "k", "v", "qv"):
        leaves = [getattr(packed, n).requires_grad_() for n in names]
        packed.call().square().sum().backward()
        for n, t in zip(names, leaves, strict=True):
            assert t.grad is not None
            assert_exact(t.grad, whole.setdefault(n, t.grad))
            t.grad = None
            t.requires_grad_(False)


def test_repeats_agree_to_the_bit(isa: str, threads: None) -> None:
    packed = Packed({"lengths": "mixed", "causal": "bottom_right"})
    leaves = [t.requires_grad_() for t in (packed.q, packed.k, packed.v)]
    for count in (1, 2):
        torch.set_num_threads(count)
        first, second = (
            torch.autograd.grad(packed.call().square().sum(), leaves) for _ in range(2)
        )
        for a, b in zip(first, second, strict=True):
            assert_exact(a, b)


def test_other_derivatives_are_refused() -> None:
    packed = Packed({"lengths": "mixed"})
    packed.q.requires_grad_()
    packed.k.requires_grad_()
    (d_q,) = torch.autograd.grad(packed.call().square().sum(), packed.q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"attention_varlen.*gradient of its gradient"):
        torch.autograd.grad(d_q.sum(), packed.k)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_forward_mode_is_refused(name: str) -> None:
    packed = Packed({"lengths": "mixed"})
    with forward_ad.dual_level():
        t = getattr(packed, name)
        setattr(packed, name, forward_ad.make_dual(t, torch.ones_like(t)))
        with pytest.raises(NotImplementedError, match=f"attention_varlen: {name} is a dual tensor"):
            packed.call()


@pytest.mark.parametrize(
    ("starts", "got"),
    [
        ([1, 20, 30], "got 1 to 30"),
        ([0, 20, 29], "got 0 to 29"),
        ([0, 20, 31], "got 0 to 31"),
        ([0, 40, 30], "got 0 to 30"),
        ([0, -1, 30], "got 0 to 30"),
    ],
)
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_starts_out_of_order(name: str, starts: list[int], got: str) -> None:
    q = torch.randn(30, 2, 8)
    cu = {"cu_seqlens_q": torch.tensor([0, 10, 30]), "cu_seqlens_k": torch.tensor([0, 10, 30])}
    cu[name] = torch.tensor(starts)
    with pytest.raises(
        RuntimeError, match=rf"attention_varlen: {name} must rise from 0 to 30.*{got}"
    ):
        ops.attention_varlen(q, q, q, **cu)
