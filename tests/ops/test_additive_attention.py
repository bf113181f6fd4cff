"""additive_attention: values and lse, the error of scores, layouts, masks, tiers, threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from additive_cases import (
    FLOATS,
    Case,
    assert_policy,
    exact,
    in_fp32,
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

from pybigmodel import _native, ops
from pybigmodel.reference.attention import dropout_mask
from pybigmodel.testing import assert_exact, available_isas, force_isa

MATRIX = matrix()
F32 = torch.float32


def check(*cases: Case) -> None:
    """Several in one comparison, so that luck does not decide."""
    for at, others in ((0, theirs), (1, in_fp32)):  # lse is fp32 whatever the tensors are
        assert_policy((ours(c)[at], others(c)[at], exact(c)[at]) for c in cases)


@pytest.mark.parametrize("choice", MATRIX, ids=map(name_of, MATRIX))
def test_matrix(isa: str, choice: dict[str, Any]) -> None:
    case = make(**choice)
    check(case, make(**choice))
    few = "_few" if choice["shape"][1] <= 3 else ""
    assert _native.last_kernel() == f"additive_attention{few}.{isa}"
    assert_exact(case.call(ops.additive_attention), ours(case)[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("queries", [2, 5])
def test_every_size(isa: str, queries: int, dtype: torch.dtype) -> None:
    """Every number of keys, of hidden columns, and of columns of value."""
    check(*(make((2, queries, n, 20, 9), dtype) for n in sizes(131, dtype)))
    check(*(make((2, queries, 9, n, 9), dtype) for n in sizes(50, dtype)))
    check(*(make((2, queries, 9, 9, n), dtype) for n in sizes(146, dtype)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_number_of_queries(isa: str, dtype: torch.dtype) -> None:
    check(*(make((1, n, 40, 20, 9), dtype) for n in sizes(80, dtype)))


# --- the scores -----------------------------------------------------------------------------------


def score_case(queries: int, size: float, hidden: int, same_sign: bool) -> Case:
    """With one key, lse is the score itself."""
    case = make((96, queries, 1, hidden, 1), size=size, same_sign=same_sign)
    return case.replaced(v=case.v * 5)


@pytest.mark.parametrize("hidden", [1, 20, 256])
@pytest.mark.parametrize("same_sign", [False, True])
@pytest.mark.parametrize("queries", [1, 8])
def test_scores_are_as_exact_as_the_docstring_says(
    isa: str, queries: int, same_sign: bool, hidden: int
) -> None:
    for size in (1e-30, 1e-6, 1e-3, 0.03, 0.3, 0.7, 1.0, 2.0, 5.0, 12.0, 60.0, 1e4):
        case = score_case(queries, size, hidden, same_sign)
        error = (ours(case)[1] - exact(case)[1]).abs()
        total = case.v.double().abs().sum()
        assert error.max() <= 1e-6 * total, size
        if size < 0.1:
            of = (case.query.double().abs() + case.key.double().abs()) @ case.v.double().abs()
            assert (error <= 1e-6 * of + 1e-40).all(), size


@pytest.mark.parametrize("queries", [2, 8])
def test_columns_of_unlike_size(isa: str, queries: int) -> None:
    """A column's form does not cost its neighbours their digits: one huge, the others tiny."""
    case = make((8, queries, 200, 33, 4), size=1e-4)
    for column, size in ((0, 3.0), (17, 1e3)):
        case.key[..., column] *= size / 1e-4
        quiet = case.v.clone()
        quiet[[0, 17]] = 0
        case = case.replaced(v=quiet)
        check(case)
        error = (ours(case)[1] - exact(case)[1]).abs().max()
        assert error < 2e-6  # of ln 200 and scores near 1e-4
    query = torch.cat([case.query, torch.full_like(case.query[:, :1], 500.0)], 1)
    assert_exact(ours(case.replaced(query=query))[0][:, :queries], ours(case)[0])


@pytest.mark.parametrize("queries", [1, 5])
def test_queries_and_keys_cancel(isa: str, queries: int) -> None:
    """q + k = 0 of any size is a score of 0; near it, scores are no worse than torch's."""
    for size in (1e-3, 0.5, 1.0, 7.0, 14.0, 100.0):
        case = make((3, queries, 70, 40, 4), size=size)
        query = case.query[:, :1].expand(-1, queries, -1).contiguous()
        key = -query[:, :1].expand(-1, 70, -1)
        lse = ours(case.replaced(query=query, key=key.contiguous()))[1]
        torch.testing.assert_close(lse, torch.full_like(lse, 70.0).log(), rtol=0, atol=2e-6)
        check(case.replaced(query=query, key=key + torch.randn(3, 70, 40) / 100))


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [2, 13])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides(isa: str, dtype: torch.dtype, queries: int) -> None:
    """The layout of no argument changes one bit of the result."""
    case = make((3, queries, 70, 33, 20), dtype, "float32")
    plain = ours(case)
    wide = torch.full((99,), torch.nan, dtype=dtype)
    wide[::3] = case.v
    for name, tensor in case.tensors().items():
        views = [("every third", wide[::3])] if name == "v" else layouts(tensor)
        for kind, view in views:
            for got, expected in zip(ours(case.replaced(**{name: view})), plain, strict=True):
                assert torch.equal(got, expected), (name, kind)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_expanded(isa: str, dtype: torch.dtype) -> None:
    for queries in (2, 9):
        case = make((3, queries, 40, 20, 8), dtype)
        for name, tensor in case.tensors().items():
            for axis in range(tensor.dim()):
                view = tensor.narrow(axis, 0, 1).expand(tensor.shape)
                expected = ours(case.replaced(**{name: view.contiguous()}))
                for a, b in zip(ours(case.replaced(**{name: view})), expected, strict=True):
                    assert_exact(a, b)


@pytest.mark.parametrize("kind", ["bool", "float32", "dtype"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_broadcast_of_the_mask(isa: str, dtype: torch.dtype, kind: str) -> None:
    """To the bit as with the whole mask, whichever dimensions are 1 or missing."""
    for queries in (3, 7):
        whole = (2, queries, 70)
        case = make((*whole, 16, 8), dtype)
        shapes = [(), (1,), (70,), (1, 1), (queries, 1), (1, 70), (queries, 70)]
        shapes += [(b, *s) for b in (1, 2) for s in shapes[3:]]
        for shape in shapes:
            mask = torch.randn(shape).to(dtype if kind == "dtype" else F32)
            mask = mask > 0 if kind == "bool" else mask
            case.options["attn_mask"] = mask
            got = ours(case)
            case.options["attn_mask"] = mask.expand(whole).contiguous()
            for a, b in zip(got, ours(case), strict=True):
                assert torch.equal(a, b), shape


@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_that_see_nothing(isa: str, dtype: torch.dtype, queries: int) -> None:
    case = make((2, queries, 130, 20, 9), dtype)
    visible = some_hidden(queries, 130)
    visible[0] = False
    hidden = torch.zeros(queries, 130).masked_fill(~visible, -torch.inf)
    for mask in (visible, hidden, hidden.to(dtype), visible[:, :1], visible[0, 0]):
        case.options["attn_mask"] = mask
        out, lse = ours(case)
        assert (out[:, 0] == 0).all() and (lse[:, 0] == -torch.inf).all()
        assert out.isfinite().all()


@pytest.mark.parametrize("queries", [3, 9])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_empty(isa: str, dtype: torch.dtype, queries: int) -> None:
    for shape in ((0, queries, 5, 4, 3), (2, 0, 5, 4, 3), (2, queries, 5, 4, 0)):
        assert [t.shape for t in ours(make(shape, dtype))] == [(*shape[:2], shape[4]), shape[:2]]
    out, lse = ours(make((2, queries, 0, 4, 3), dtype))
    assert (out == 0).all() and (lse == -torch.inf).all()
    check(make((30, queries, 5, 0, 3), dtype))  # no column: every score is 0


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [2, 20])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dropout_keeps_what_the_reference_keeps(isa: str, dtype: torch.dtype, queries: int) -> None:
    """As attention of one head does; seen through unit vectors as values."""
    case = make((3, queries, 130, 8, 130), dtype)
    case = case.replaced(value=torch.eye(130, dtype=dtype).expand(3, -1, -1))
    for seed in (0, 2**33 + 7, -1, 2**63 - 1):
        case.options |= {"dropout_p": 0.3, "dropout_seed": seed}
        out = case.call(ops.additive_attention)
        assert_exact(out != 0, dropout_mask(seed, 0.3, 3, 1, queries, 130).squeeze(1))
    case.options["dropout_p"] = 1.0
    assert (case.call(ops.additive_attention) == 0).all()


def test_a_seed_is_drawn_from_torchs_generator() -> None:
    case = make((2, 9, 40, 8, 4), dropout_p=0.5)
    outs = []
    for seed in (None, None, torch.tensor([5]), 5):
        torch.manual_seed(3)
        case.options["dropout_seed"] = seed
        outs.append(case.call(ops.additive_attention))
    assert_exact(outs[0], outs[1])
    assert_exact(outs[2], outs[3])
    assert not torch.equal(outs[0], outs[2])
    case.options["dropout_seed"] = None
    assert not torch.equal(
        case.call(ops.additive_attention), case.call(ops.additive_attention)
    )  # the generator moves on


# --- what is not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e38])
@pytest.mark.parametrize("queries", [3, 70])
def test_a_bad_query_spoils_its_row_only(isa: str, queries: int, bad: float) -> None:
    case = make((2, queries, 100, 20, 9))
    clean, query = ours(case), case.query.clone()
    query[1, 2, 7] = bad
    got = ours(case.replaced(query=query))
    for tensor, expected in zip(got, exact(case.replaced(query=query)), strict=True):
        torch.testing.assert_close(tensor[1, 2].double(), expected[1, 2], equal_nan=True)
    for tensor, before in zip(got, clean, strict=True):
        tensor[1, 2] = before[1, 2]
        assert_exact(tensor, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e38, 20.0, -90.0])
@pytest.mark.parametrize("queries", [3, 70])
def test_a_bad_key_spoils_the_rows_that_see_it(isa: str, queries: int, bad: float) -> None:
    case = make((2, queries, 100, 20, 9), mask="bool")
    key = case.key.clone()
    key[1, 77, 3] = bad
    spoilt = case.replaced(key=key)
    assert case.options["attn_mask"][1, :, 77].any()
    for got, expected in zip(ours(spoilt), exact(spoilt), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    case.options["attn_mask"][:, :, 77] = False  # hidden by bool, even a NaN is
    for got, expected in zip(ours(case.replaced(key=key)), exact(case), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [2, 9])
def test_a_bad_v(isa: str, queries: int) -> None:
    case = make((2, queries, 30, 20, 9))
    for bad in (torch.nan, torch.inf, 1e20, -3e38):
        v = case.v.clone()
        v[3] = bad
        spoilt = case.replaced(v=v)
        for got, expected in zip(ours(spoilt), exact(spoilt), strict=True):
            expected = expected.to(got.dtype)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


# --- determinism, tiers -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_threads_and_neighbours_change_nothing(isa: str, dtype: torch.dtype, threads: None) -> None:
    for queries in (2, 150):
        case = make((3, queries, 300, 40, 24), dtype, "float32", dropout_p=0.2)
        results: list[tuple[Tensor, Tensor]] = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ours(case))
        for other in results[1:]:
            for a, b in zip(other, results[0], strict=True):
                assert_exact(a, b)
    case.options = {}
    plain = ours(case)
    for rows in (slice(0, 5), slice(60, 150), slice(149, 150)):
        query = case.query[:, rows].expand(-1, max(4, rows.stop - rows.start), -1)
        for part, whole in zip(ours(case.replaced(query=query)), plain, strict=True):
            assert_exact(part[:, : rows.stop - rows.start], whole[:, rows])
    for got, whole in zip(
        ours(case.replaced(**{n: t[1:2] for n, t in case.tensors().items() if n != "v"})),
        plain,
        strict=True,
    ):
        assert_exact(got[0], whole[1])


def test_tiers_differ_by_rounding_only() -> None:
    case = make((2, 70, 150, 65, 30), mask="bool")
    results = []
    for isa in available_isas():
        with force_isa(isa):
            results.append(ours(case))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
