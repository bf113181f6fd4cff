"""Dropout of attention: which weights are kept, the seed, the statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import FLOATS, make
from torch import Tensor

from pybigmodel import ops
from pybigmodel.reference.attention import dropout_mask
from pybigmodel.testing import assert_exact, available_isas, force_isa

P, SEED = 0.3, 2**33 + 7


def kept(b: int, h: int, sq: int, sk: int, seed: int, p: float, **options: object) -> Tensor:
    """The weights that the op keeps, seen through unit vectors as values, 256 keys at a time."""
    q, k = torch.zeros(b, h, sq, 8), torch.zeros(b, h, sk, 8)
    parts = []
    for begin in range(0, sk, 256):
        columns = min(256, sk - begin)
        v = torch.zeros(b, h, sk, columns)
        v[:, :, begin : begin + columns] = torch.eye(columns)
        parts.append(ops.attention(q, k, v, dropout_p=p, dropout_seed=seed, **options))
    return torch.cat(parts, -1)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 7, 33), (1, 2, 70, 258), (3, 1, 1, 700)])
@pytest.mark.parametrize("p", [0.01, P, 0.9])
def test_the_kept_weights_are_the_references(
    isa: str, p: float, shape: tuple[int, int, int, int]
) -> None:
    for seed in (0, SEED, -1, -(2**63), 2**63 - 1):
        keep = dropout_mask(seed, p, *shape)
        weights = kept(*shape, seed, p)
        assert_exact(weights != 0, keep)
        expected = keep / (shape[3] * (1 - p))
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_same_weights_in_every_dtype_and_precision(isa: str, dtype: torch.dtype) -> None:
    b, h, sq, sk = 2, 2, 20, 70
    keep = dropout_mask(SEED, P, b, h, sq, sk)
    q, k = torch.randn(b, h, sq, 16).to(dtype), torch.randn(b, h, sk, 16).to(dtype)
    v = torch.eye(sk, dtype=dtype).expand(b, h, sk, sk)
    for precision in (None, "fp32", "bf16"):
        got = ops.attention(q, k, v, dropout_p=P, dropout_seed=SEED, precision=precision)
        assert_exact(got != 0, keep)


def test_position_counts_whatever_is_hidden(isa: str) -> None:
    """The word belongs to (b, h, i, j): masks and windows hide more, and move nothing."""
    b, h, sq, sk = 2, 2, 90, 130
    keep = dropout_mask(SEED, P, b, h, sq, sk)
    visible = torch.rand(sq, sk) > 0.5
    distance = torch.arange(sk) - torch.arange(sq)[:, None] - (sk - sq)
    assert_exact(kept(b, h, sq, sk, SEED, P, attn_mask=visible) != 0, keep & visible)
    assert_exact(kept(b, h, sq, sk, SEED, P, causal=True) != 0, keep & (distance <= 0))
    window = kept(b, h, sq, sk, SEED, P, window=(20, 5))
    assert_exact(window != 0, keep & (distance >= -20) & (distance <= 5))


def test_query_heads_that_share_keys_drop_apart(isa: str) -> None:
    q, k = torch.zeros(1, 4, 9, 8), torch.zeros(1, 2, 40, 8)
    v = torch.eye(40).expand(1, 2, 40, 40)
    got = ops.attention(q, k, v, dropout_p=P, dropout_seed=SEED)
    assert_exact(got != 0, dropout_mask(SEED, P, 1, 4, 9, 40))


def test_lse_knows_no_dropout(isa: str) -> None:
    case = make({"shape": (2, 2, 2, 30, 65, 16, 16), "dtype": torch.float32})
    _, expected = case.call(ops.attention, return_lse=True)
    _, lse = case.call(ops.attention, return_lse=True, dropout_p=P, dropout_seed=SEED)
    assert_exact(lse, expected)


def test_seeds(isa: str) -> None:
    """Equal seeds, equal results, as an integer and as a tensor; others differ."""
    case = make({"shape": (2, 2, 2, 30, 65, 16, 16), "dtype": torch.float32})

    def run(seed: object) -> Tensor:
        return case.call(ops.attention, dropout_p=P, dropout_seed=seed)

    for seed in (0, 1, -5, SEED, 2**63 - 1):
        expected = run(seed)
        assert_exact(run(seed), expected)
        assert_exact(run(torch.tensor(seed)), expected)
        assert_exact(run(torch.tensor([seed])), expected)
        for other in (seed ^ 1, seed ^ 2**32, seed ^ 2**62):
            assert not torch.equal(run(other), expected)


def test_a_seed_is_drawn_from_torchs_generator() -> None:
    case = make({"shape": (1, 2, 2, 30, 65, 16, 16), "dtype": torch.float32})

    def run() -> Tensor:
        return case.call(ops.attention, dropout_p=P)

    torch.manual_seed(3)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert_exact(run(), first)
    assert_exact(run(), second)
    torch.manual_seed(3)
    case.call(ops.attention, dropout_p=0.0)  # draws nothing
    assert_exact(run(), first)


def test_none_and_all(isa: str) -> None:
    for dtype in FLOATS:
        case = make({"shape": (2, 2, 1, 9, 33, 16, 24), "dtype": dtype})
        plain, sums = case.call(ops.attention, return_lse=True)
        none = case.call(ops.attention, dropout_p=0.0, dropout_seed=5)
        assert_exact(none, plain)
        out, lse = case.call(ops.attention, dropout_p=1.0, dropout_seed=5, return_lse=True)
        assert_exact(out, torch.zeros_like(plain))
        assert_exact(lse, sums)


def test_threads_and_tiers_drop_the_same(threads: None) -> None:
    expected = dropout_mask(SEED, P, 3, 4, 40, 100)
    for isa in available_isas():
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with force_isa(isa):
                assert_exact(kept(3, 4, 40, 100, SEED, P) != 0, expected)


def test_statistics() -> None:
    """The frequency within 5 σ, and the mean of many seeds comes to what no dropout gives."""
    for p in (0.1, 0.5):
        weights = kept(2, 4, 64, 256, 1, p)
        frequency = (weights != 0).double().mean()
        assert abs(frequency - (1 - p)) < 5 * math.sqrt(p * (1 - p) / weights.numel())
    case = make({"shape": (1, 1, 1, 8, 64, 16, 16), "dtype": torch.float32})
    runs = torch.stack([case.call(ops.attention, dropout_p=P, dropout_seed=s) for s in range(400)])
    spread = runs.std(0) / math.sqrt(len(runs))
    assert ((runs.mean(0) - case.call(ops.attention)).abs() < 6 * spread).all()


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_probabilities_out_of_range(p: float) -> None:
    q = torch.randn(1, 1, 3, 8)
    with pytest.raises(RuntimeError, match=r"attention: dropout_p must be .*"):
        ops.attention(q, q, q, dropout_p=p, dropout_seed=1)


@pytest.mark.parametrize("seed", [1.5, 2**63, -(2**63) - 1, "7"])
def test_seeds_that_are_none(seed: Any) -> None:
    q = torch.randn(1, 1, 3, 8)
    with pytest.raises(ValueError, match=r"dropout_seed must be .*; got "):
        ops.attention(q, q, q, dropout_p=0.5, dropout_seed=seed)
