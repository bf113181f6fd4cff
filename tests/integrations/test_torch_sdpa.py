"""F.scaled_dot_product_attention on pybigmodel.ops.attention: torch's meaning, on our kernels."""

from __future__ import annotations

import logging
import sys
import types
import unittest
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pybigmodel as pbm
from pybigmodel.testing import assert_no_worse

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def inputs(
    *shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False
) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for _ in range(3)]


def causal(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 16, 32)


def infinite(length: int) -> Tensor:
    """A row and a column hidden, and a key that hides the others from a query."""
    mask = torch.randn(length, length)
    mask[3] = mask[:, 5] = -torch.inf
    mask[7, 9] = torch.inf
    return mask


# --- torch's meaning ------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "causal, more keys": {"k": (4, 8, 90, 40), "v": (4, 8, 90, 40), "is_causal": True},
    "causal, fewer keys": {"k": (4, 8, 30, 40), "v": (4, 8, 30, 40), "is_causal": True},
    "wider values": {"v": (4, 8, 70, 48)},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.3},
    "bool mask": {"attn_mask": lambda: torch.rand(70, 70) > 0.3},
    "padding": {
        "attn_mask": lambda: (torch.arange(70) < torch.tensor([[50], [70], [1], [33]]))[
            :, None, None
        ]
    },
    "nothing visible": {"attn_mask": lambda: torch.zeros(70, 70, dtype=torch.bool)},
    "float mask": {"attn_mask": lambda: torch.randn(4, 1, 70, 70)},
    "float mask to the ends of the range": {"attn_mask": lambda: infinite(70)},
    "float mask of 3 dimensions": {"attn_mask": lambda: torch.randn(8, 70, 70)},
    "grouped": {"k": (4, 2, 70, 40), "v": (4, 2, 70, 40), "enable_gqa": True},
    "grouped, causal": {
        "k": (4, 2, 70, 40),
        "v": (4, 2, 70, 40),
        "enable_gqa": True,
        "is_causal": True,
    },
    "3 dimensions": {"q": (32, 70, 40), "k": (32, 70, 40), "v": (32, 70, 40), "is_causal": True},
    "3 dimensions, mask": {
        "q": (32, 70, 40),
        "k": (32, 70, 40),
        "v": (32, 70, 40),
        "attn_mask": lambda: torch.randn(32, 70, 70),
    },
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, dtype: torch.dtype, ours, left) -> None:
    options = dict(CASES[case])
    leaves = [
        torch.randn(options.pop(name, (4, 8, 70, 40))).to(dtype).requires_grad_() for name in "qkv"
    ]
    mask = options.pop("attn_mask", lambda: None)()
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype).nan_to_num().requires_grad_()  # what is infinite becomes finfo's
        leaves.append(mask)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = mask) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **options)

    grad = torch.randn_like(attend(*leaves))

    def results(tensors: list[Tensor]) -> list[Tensor]:
        y = attend(*tensors)
        return [y, *torch.autograd.grad(y, tensors, grad.to(y.dtype))]

    theirs = results(leaves)
    exact = results([t.detach().double().requires_grad_() for t in leaves])
    with pbm.sdpa():
        assert ours(lambda: attend(*leaves))
        mine = results(leaves)
    assert not left()
    for actual, expected, true in zip(mine, theirs, exact, strict=True):
        if bool(true.any()):
            assert_no_worse(actual.detach(), expected.detach(), true.detach())
        else:
            assert not actual.any()


def test_views_of_heads(x: Tensor, ours) -> None:
    packed = torch.randn(2, 9, 3 * 4 * 8)
    q, k, v = (t.unflatten(2, (4, 8)).transpose(1, 2) for t in packed.chunk(3, -1))
    expected = F.scaled_dot_product_attention(q, k, v)
    with pbm.sdpa():
        assert ours(lambda: F.scaled_dot_product_attention(q, k, v))
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dropout_is_of_torchs_generator_and_unbiased(dtype: torch.dtype, ours) -> None:
    q, k, v = inputs(4, 8, 64, 32, dtype=dtype)
    v = torch.ones_like(v)

    def dropped(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.25)

    with pbm.sdpa():
        assert ours(lambda: dropped(0))
        first = dropped(1)
        assert torch.equal(first, dropped(1))
        assert not torch.equal(first, dropped(2))
        assert abs(float(first.double().mean()) - 1) < 0.01
        assert not F.scaled_dot_product_attention(q, k, v, dropout_p=1.0).any()


def samples(dtype: torch.dtype) -> list[Any]:
    """torch's own. Its test helpers import expecttest, for a class that these do not need."""
    added = "expecttest" not in sys.modules
    if added:
        stub = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stub
    try:
        from torch.testing._internal.common_methods_invocations import op_db
    finally:
        if added:
            del sys.modules["expecttest"]
    (info,) = (o for o in op_db if o.name == "nn.functional.scaled_dot_product_attention")
    return list(info.sample_inputs("cpu", dtype, requires_grad=True))


@pytest.mark.filterwarnings("ignore")  # of torch's helpers
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_torchs_samples(dtype: torch.dtype, left) -> None:
    """All results together, since single ones have few elements, of which luck decides."""

    def results(sample: Any, as_dtype: torch.dtype) -> Tensor:
        def cast(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.detach().to(as_dtype).requires_grad_()
            return value

        q, k, v = (cast(t) for t in (sample.input, *sample.args))
        options = {name: cast(value) for name, value in sample.kwargs.items()}
        y = F.scaled_dot_product_attention(q, k, v, **options)
        leaves = [q, k, v, *(t for t in options.values() if isinstance(t, Tensor))]
        grads = torch.autograd.grad(y.sum(), leaves)
        return torch.cat([t.detach().flatten() for t in (y, *grads)])

    found, compared = samples(dtype), 0
    columns: list[list[Tensor]] = [[], [], []]
    for sample in found:
        if sample.kwargs.get("dropout_p"):
            with pbm.sdpa():
                torch.manual_seed(0)
                first = results(sample, dtype)
                torch.manual_seed(0)
                assert torch.equal(first, results(sample, dtype))
            continue
        compared += 1
        columns[1].append(results(sample, dtype))
        columns[2].append(results(sample, torch.float64))
        with pbm.sdpa():
            columns[0].append(results(sample, dtype))
    assert compared > 8
    actual, theirs, exact = map(torch.cat, columns)
    if dtype == torch.float64:
        assert torch.equal(actual, theirs)  # left to torch
        assert left() == {"scaled_dot_product_attention with dtype float64": len(found) * 1 + 12}
    else:
        assert_no_worse(actual, theirs, exact)
        assert set(left()) == {
            "scaled_dot_product_attention with q of 3 dimensions, k of 4, v of 4"
        }


# --- what is left to torch, and says so -----------------------------------------------------------

LEFT: dict[str, tuple[str, Any]] = {
    "float64": ("dtype float64", lambda: (inputs(1, 2, 5, 8, dtype=torch.float64), {})),
    "wide heads": ("a head dimension above 256", lambda: (inputs(1, 2, 5, 257), {})),
    "2 dimensions": ("q of 2 dimensions, k of 2, v of 2", lambda: (inputs(5, 8), {})),
    "batches": (
        "batches that broadcast",
        lambda: ([torch.randn(3, 2, 5, 8), *inputs(1, 2, 5, 8)[1:]], {}),
    ),
    "heads": (
        "numbers of heads that broadcast or do not match",
        lambda: ([torch.randn(1, 4, 5, 8), *inputs(1, 1, 5, 8)[1:]], {}),
    ),
    "empty": ("an empty tensor", lambda: ([torch.randn(1, 2, 5, 8), *inputs(1, 2, 0, 8)[1:]], {})),
    "mask and causal": (
        "attn_mask beside is_causal",
        lambda: (
            inputs(1, 2, 5, 8),
            {"attn_mask": torch.ones(5, 5, dtype=torch.bool), "is_causal": True},
        ),
    ),
    "meta": ("", lambda: ([t.to("meta") for t in inputs(1, 2, 5, 8)], {})),  # not even asked
}


@pytest.mark.parametrize("case", LEFT)
def test_left_to_torch(case: str, ours, left) -> None:
    reason, make = LEFT[case]
    tensors, options = make()
    expected = F.scaled_dot_product_attention(*tensors, **options)
    with pbm.sdpa():
        assert not ours(lambda: F.scaled_dot_product_attention(*tensors, **options))
        y = F.scaled_dot_product_attention(*tensors, **options)
    assert y.shape == expected.shape
    assert y.is_meta or torch.equal(y, expected)
    assert left() == ({f"scaled_dot_product_attention with {reason}": 2} if reason else {})


@pytest.mark.parametrize(
    ("tensors", "options"),
    [
        (lambda: inputs(1, 2, 5, 8), {"attn_mask": torch.ones(5, 5, dtype=torch.int32)}),
        (lambda: inputs(1, 2, 5, 8), {"attn_mask": torch.ones(4, 5, dtype=torch.bool)}),
        (lambda: inputs(1, 2, 5, 8), {"attn_mask": torch.ones(5, 5, dtype=torch.float64)}),
        (lambda: inputs(1, 2, 5, 8), {"dropout_p": 2.0}),
        (lambda: [torch.randn(1, 3, 5, 8), *inputs(1, 2, 5, 8)[1:]], {"enable_gqa": True}),
        (lambda: [torch.randn(1, 2, 5, 7), *inputs(1, 2, 5, 8)[1:]], {}),
        (lambda: [torch.randn(1, 2, 5, 8).bfloat16(), *inputs(1, 2, 5, 8)[1:]], {}),
        (lambda: [t.int() for t in inputs(1, 2, 5, 8)], {}),
    ],
)
def test_errors_are_torchs(tensors, options) -> None:
    args = tensors()
    with pytest.raises(RuntimeError) as theirs:
        F.scaled_dot_product_attention(*args, **options)
    with pbm.sdpa(), pytest.raises(RuntimeError) as mine:
        F.scaled_dot_product_attention(*args, **options)
    assert str(mine.value) == str(theirs.value)


def test_a_reason_is_logged_once(caplog, monkeypatch) -> None:
    monkeypatch.setattr(pbm.integrations._left, "_counts", type(pbm.integrations._left._counts)())
    caplog.set_level(logging.INFO, "pybigmodel")
    q, k, v = inputs(1, 2, 5, 8, dtype=torch.float64)
    with pbm.sdpa():
        for _ in range(3):
            F.scaled_dot_product_attention(q, k, v)
    text = "scaled_dot_product_attention with dtype float64"
    assert caplog.messages == [f"attention left to torch: {text}"]
    assert pbm.integrations.left_to_torch() == {text: 3}


def test_sdpa_kernel_is_obeyed(x: Tensor, ours, left) -> None:
    with pbm.sdpa():
        with sdpa_kernel(SDPBackend.MATH):
            assert not ours(lambda: causal(x))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            assert ours(lambda: causal(x))
    assert len(left()) == 1


def test_double_backward_is_refused(x: Tensor) -> None:
    x.requires_grad_()
    with pbm.sdpa():
        (grad,) = torch.autograd.grad(causal(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of its gradient is not implemented"):
        grad.sum().backward()


# --- who calls ------------------------------------------------------------------------------------


def test_layers_of_torch(ours) -> None:
    layer = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 9, 32)
    expected = layer(x, x, x, need_weights=False)[0]
    with pbm.sdpa():
        assert ours(lambda: layer(x, x, x, need_weights=False))
        torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], expected)


def test_autocast(x: Tensor, ours) -> None:
    with pbm.sdpa(), torch.autocast("cpu", torch.bfloat16):
        assert ours(lambda: causal(x))
        assert causal(x).dtype == torch.bfloat16


def test_inference_mode(x: Tensor, ours) -> None:
    with torch.inference_mode(), pbm.sdpa():
        assert ours(lambda: causal(torch.randn(2, 4, 16, 32)))
        assert ours(lambda: causal(x))


def test_precision(x: Tensor, ours) -> None:
    with pbm.sdpa(precision="bf16"):
        assert ours(lambda: causal(x))
        y = causal(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, pbm.ops.attention(x, x, x, causal=True, precision="bf16"))
    with pytest.raises(ValueError, match="precision must be"), pbm.sdpa(precision="fp4"):
        pass


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's vmap of its own op
def test_torch_func(x: Tensor, ours) -> None:
    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: causal(x).square().sum())(x)

    batches = x.unsqueeze(1)
    theirs, exact = gradient(x), gradient(x.double())
    batched = torch.vmap(causal)(batches)
    with pbm.sdpa():
        assert ours(lambda: gradient(x))
        assert_no_worse(gradient(x), theirs, exact)
        assert torch.equal(torch.vmap(causal)(batches), batched)  # torch's own
