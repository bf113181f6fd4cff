"""Gradients of additive_attention: against float64 autograd under the policy, and through torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from additive_cases import (
    FLOATS,
    Case,
    assert_policy,
    exact,
    make,
    matrix,
    name_of,
    ours,
    sizes,
    theirs,
)
from attention_cases import some_hidden
from linear_cases import layouts
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from pybigmodel import _native, ops
from pybigmodel.reference.additive_attention import additive_attention as reference
from pybigmodel.testing import assert_exact

MATRIX = matrix(through_lse=[False, True])
F32 = torch.float32
Result = tuple[Tensor, Tensor]
backward = torch.ops.pybigmodel.additive_attention_backward.default


def seeds_of(case: Case, through_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """Gradients of the output and of lse."""
    rows = case.query.shape[:2]
    d_out = torch.randn(*rows, case.value.shape[2]).to(case.query.dtype)
    return d_out, torch.randn(rows) if through_lse else None


def gradients(
    f: Callable[[Case], Result], case: Case, seeds: tuple[Tensor, Tensor | None], *names: str
) -> list[Tensor]:
    """Of the floating tensors, or of those named; zeros where nothing leads to one."""
    case, leaves = case.leaves(*names)
    out, lse = f(case)
    outputs, given = [out], [seeds[0].to(out.dtype)]
    if seeds[1] is not None:
        outputs.append(lse)
        given.append((seeds[1] * lse.detach().isfinite()).to(lse.dtype))
    return list(torch.autograd.grad(outputs, leaves, given, materialize_grads=True))


def check(*cases: Case, through_lse: bool = True, floor_ulps: float = 4.0) -> None:
    """Several in one comparison, so that luck does not decide. Gradients of scores are differences
    of products that are rounded themselves: torch's error may be luck below 4 ulp."""
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for case in cases:
        seeds = seeds_of(case, through_lse)
        results = [gradients(f, case, seeds) for f in (ours, theirs)]
        results.append(gradients(exact, case.to(torch.float64), seeds))
        for (name, tensor), got, *others in zip(case.tensors().items(), *results, strict=True):
            assert got.dtype == tensor.dtype and got.shape == tensor.shape, name
            found.setdefault(name, []).append((got, *others))
    for name, triples in found.items():
        try:
            assert_policy(triples, floor_ulps)
        except AssertionError as error:
            raise AssertionError(f"d_{name}: {error}") from None


@pytest.mark.parametrize("choice", MATRIX, ids=map(name_of, MATRIX))
def test_matrix(isa: str, choice: dict[str, Any]) -> None:
    choice = dict(choice)
    through_lse = choice.pop("through_lse")
    check(make(**choice), make(**choice), through_lse=through_lse)
    few = "_few" if choice["shape"][1] <= 3 else ""
    assert _native.last_kernel() == f"additive_attention{few}_backward.{isa}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("queries", [2, 5])
def test_every_size(isa: str, queries: int, dtype: torch.dtype) -> None:
    check(*(make((2, queries, n, 20, 9), dtype) for n in sizes(131, dtype)))
    check(*(make((2, queries, 9, n, 9), dtype) for n in sizes(35, dtype)))
    check(*(make((2, queries, 9, 9, n), dtype) for n in sizes(35, dtype)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_number_of_queries(isa: str, dtype: torch.dtype) -> None:
    check(*(make((1, n, 40, 20, 9), dtype) for n in sizes(80, dtype)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_several_strips(isa: str, dtype: torch.dtype) -> None:
    """More queries than are held at a time, of one sequence and of several."""
    check(make((1, 700, 1000, 8, 5), dtype))
    check(make((9, 130, 1000, 3, 5), dtype, "bool"))
    check(make((1, 90, 9000, 3, 5), dtype, "key bias"))


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "dtype"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_broadcast_of_the_mask(isa: str, dtype: torch.dtype, kind: str) -> None:
    """The gradient has the mask's shape: it is the sum over what was broadcast."""
    for queries in (3, 70):
        whole = (2, queries, 37)
        case = make((*whole, 16, 8), dtype)
        shapes = [(), (1,), (37,), (1, 1), (queries, 1), (1, 37), (queries, 37)]
        shapes += [(b, *s) for b in (1, 2) for s in shapes[3:]]
        for shape in shapes:
            mask = torch.randn(shape).to(dtype if kind == "dtype" else F32)
            case.options["attn_mask"] = mask
            seeds = seeds_of(case)
            (got,) = gradients(ours, case, seeds, "mask")
            (other,) = gradients(theirs, case, seeds, "mask")
            (expected,) = gradients(exact, case.to(torch.float64), seeds, "mask")
            assert got.shape == shape and got.dtype == mask.dtype
            # Of few sums, all of the same terms, the error is luck: what cancels does not in fp32.
            floor = 4.0 if shape == whole else 64.0
            assert_policy([(got, other, expected)], floor)
            # Without lse, one value for all keys of a row changes nothing.
            if not shape or shape[-1] == 1:
                (none,) = gradients(ours, case, (seeds[0], None), "mask")
                assert (none == 0).all()


@pytest.mark.parametrize("queries", [2, 70])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_hidden_rows_and_keys_have_no_gradient(isa: str, dtype: torch.dtype, queries: int) -> None:
    case = make((2, queries, 130, 20, 9), dtype)
    visible = some_hidden(queries, 130)
    visible[1], visible[:, 66:] = False, False
    hidden = torch.zeros(queries, 130).masked_fill(~visible, -torch.inf)
    for mask in (visible, hidden):
        case.options["attn_mask"] = mask
        d_query, d_key, d_value, d_v, *rest = gradients(ours, case, seeds_of(case))
        assert all(t.isfinite().all() for t in (d_query, d_key, d_value, d_v))
        assert (d_query[:, 1] == 0).all() and (d_query[:, 0] != 0).any()
        assert (d_key[:, 66:] == 0).all() and (d_value[:, 66:] == 0).all()
        assert all((d_mask[~visible] == 0).all() for d_mask in rest)


# --- layouts, what is needed ----------------------------------------------------------------------


def call(case: Case, seeds: tuple[Tensor, Tensor | None], *needs: bool) -> tuple[Tensor, ...]:
    mask = case.options.get("attn_mask")
    tensors = (case.query, case.key, case.value, case.v)
    return backward(*seeds, *tensors, mask, None, 0.0, *(needs or (True, True, True)))


@pytest.mark.parametrize("queries", [2, 13])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides(isa: str, dtype: torch.dtype, queries: int) -> None:
    case = make((3, queries, 70, 33, 20), dtype, "float32")
    seeds = seeds_of(case)
    plain = call(case, seeds)
    for name, tensor in (*case.tensors().items(), ("d_out", seeds[0])):
        views = [("same", tensor)] if name == "v" else layouts(tensor)
        for kind, view in views:
            if name == "d_out":
                results = call(case, (view, seeds[1]))
            else:
                results = call(case.replaced(**{name: view}), seeds)
            for got, expected in zip(results, plain, strict=True):
                assert torch.equal(got, expected), (name, kind)
    wide = torch.full((queries, 3), torch.nan)
    wide[:] = seeds[1].T  # type: ignore[union-attr]
    for got, expected in zip(call(case, (seeds[0], wide.T)), plain, strict=True):
        assert_exact(got, expected)
    expanded = seeds[0][:1, :1, :1].expand_as(seeds[0])  # as of out.sum().backward()
    results = (call(case, (g, None)) for g in (expanded, expanded.contiguous()))
    for got, expected in zip(*results, strict=True):
        assert_exact(got, expected)


@pytest.mark.parametrize("queries", [2, 13])
@pytest.mark.parametrize("needs", range(8))
def test_only_what_is_needed(needs: int, queries: int) -> None:
    case = make((2, queries, 70, 20, 9), mask="float32")
    seeds, wanted = seeds_of(case), [bool(needs & 1 << i) for i in range(3)]
    hidden, value, mask = wanted
    full = call(case, seeds)
    keep = (hidden, hidden, value, hidden, mask)
    for part, whole, want in zip(call(case, seeds, *wanted), full, keep, strict=True):
        assert_exact(part, whole if want else torch.empty(0))
    names = [n for n, want in zip(("key", "value", "mask"), wanted, strict=True) if want]
    if names:
        at = [list(case.tensors()).index(n) for n in names]
        for got, i in zip(gradients(ours, case, seeds, *names), at, strict=True):
            assert_exact(got, full[i])


@pytest.mark.parametrize("queries", [2, 9])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_empty(isa: str, dtype: torch.dtype, queries: int) -> None:
    for shape in ((0, queries, 5, 4, 3), (2, 0, 5, 4, 3), (2, queries, 0, 4, 3)):
        case = make(shape, dtype)
        got, expected = (gradients(f, case, seeds_of(case)) for f in (ours, exact))
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape and (a == 0).all()
    for shape in ((2, queries, 5, 4, 0), (2, queries, 5, 0, 3)):
        check(*(make(shape, dtype) for _ in range(20)))


def test_threads_agree(isa: str, threads: None) -> None:
    for shape in ((3, 2, 300, 40, 24), (3, 150, 300, 40, 24), (1, 700, 900, 17, 8)):
        case = make(shape, mask="key bias")
        seeds, results = seeds_of(case), []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call(case, seeds))
        for other in results[1:]:
            for a, b in zip(other, results[0], strict=True):
                assert_exact(a, b)


# --- torch ----------------------------------------------------------------------------------------


def test_the_reference_is_differentiable() -> None:
    case = make((2, 3, 4, 3, 2), torch.float64, "float32")
    tensors = [t.double().requires_grad_() for t in case.tensors().values()]
    *leaves, mask = tensors
    assert torch.autograd.gradcheck(lambda *t: reference(*t[:4], attn_mask=t[4]), (*leaves, mask))


def test_the_gradient_of_the_gradient_is_refused() -> None:
    case, leaves = make((2, 5, 7, 4, 3)).leaves()
    out = case.call(ops.additive_attention)
    (d_query,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"additive_attention.*gradient of its gradient"):
        torch.autograd.grad(d_query.sum(), leaves[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", ["query", "key", "value", "v", "mask"])
def test_forward_mode_is_refused(name: str) -> None:
    case = make((2, 5, 7, 4, 3), mask="float32")
    with torch.no_grad(), forward_ad.dual_level():
        tensor = case.tensors()[name]
        case = case.replaced(**{name: forward_ad.make_dual(tensor, torch.ones_like(tensor))})
        name = "attn_mask" if name == "mask" else name
        with pytest.raises(NotImplementedError, match=f"additive_attention: {name} is a dual"):
            ours(case)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Tensors are rounded to autocast's dtype, a mask is not; gradients come in their own dtype."""
    case, leaves = make((2, 9, 20, 16, 8), mask="float32").leaves()
    rounded = case.replaced(
        **{n: t.detach().to(dtype) for n, t in case.tensors().items() if n != "mask"}
    )
    with torch.autocast("cpu", dtype=dtype):
        out, lse = ours(case)
    assert out.dtype == dtype and lse.dtype == F32
    assert_exact(out, ours(rounded)[0])
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert [g.dtype for g in grads] == [F32] * 5
    assert all(g.abs().sum() > 0 for g in grads)


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's, of autograd functions
def test_compile_training() -> None:
    def loss(query: Tensor, key: Tensor, value: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out, lse = ops.additive_attention(query, key, value, v, attn_mask=mask, return_lse=True)
        return out.square().mean() + lse.mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 9, 20, 16, 8), (3, 7, 33, 12, 5), (2, 5, 70, 16, 8)):
        case, leaves = make(shape, mask="float32").leaves()
        results = (
            torch.autograd.grad(f(*case.tensors().values()), leaves) for f in (loss, compiled)
        )
        for expected, got in zip(*results, strict=True):
            assert_exact(got, expected)


class Net(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out = ops.additive_attention(query, key, key, v, attn_mask=mask)
        assert isinstance(out, Tensor)
        return out


@torch.no_grad()
def test_export() -> None:
    rows, keys = (torch.export.Dim(n, min=4, max=512) for n in ("rows", "keys"))
    shapes = ({1: rows}, {1: keys}, None, {1: rows, 2: keys})
    given = [(make((2, m, n, 8, 8)), torch.rand(2, m, n) > 0.5) for m, n in ((7, 9), (40, 21))]
    case, mask = given[0]
    program = torch.export.export(
        Net(), (case.query, case.key, case.v, mask), dynamic_shapes=shapes
    )
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert "pybigmodel.additive_attention.default" in called
    for case, mask in given:
        arguments = (case.query, case.key, case.v, mask)
        assert_exact(program.module()(*arguments), Net()(*arguments))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap() -> None:
    """torch falls back to a loop for ops without a batching rule: slow, and right."""
    case, leaves = make((2, 5, 9, 8, 4)).leaves("v")
    queries = torch.randn(3, 2, 5, 8)
    got = torch.func.vmap(lambda q: ours(case.replaced(query=q))[0])(queries)
    expected = torch.stack([ours(case.replaced(query=q))[0] for q in queries])
    assert_exact(got, expected)
    results = (torch.autograd.grad(y.square().sum(), leaves)[0] for y in (got, expected))
    assert_exact(*results)


def test_flops_are_counted() -> None:
    """The products of the formula, and in backward those that are computed again."""
    b, sq, sk, h, dv = shape = (2, 9, 20, 16, 8)
    pairs = b * sq * sk
    for names, backward_columns in (((), 4 * h + 2 * dv), (("value",), h + 2 * dv)):
        case, leaves = make(shape).leaves(*names)
        with FlopCounterMode(display=False) as counter:
            out = case.call(ops.additive_attention)
        assert counter.get_total_flops() == 2 * pairs * (h + dv)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(out.sum(), leaves)
        assert counter.get_total_flops() == 2 * pairs * backward_columns
