"""pybigmodel.nn.AdditiveAttention: results, weights, masks, gradients, state, bad calls."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pybigmodel as pbm
from pybigmodel import _native
from pybigmodel.nn import AdditiveAttention
from pybigmodel.testing import assert_exact, assert_no_worse

B, SQ, SK, QUERY, KEY, HIDDEN, DV = 3, 7, 11, 20, 33, 24, 10
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Composed(nn.Module):
    """The same parameters under the same names, by torch's ops and every tensor in memory."""

    def __init__(self, layer: AdditiveAttention) -> None:
        super().__init__()
        bias, dtype = layer.query_proj.bias is not None, layer.v.dtype
        self.query_proj = nn.Linear(layer.query_dim, layer.hidden_dim, bias, dtype=dtype)
        self.key_proj = nn.Linear(layer.key_dim, layer.hidden_dim, False, dtype=dtype)
        self.v = nn.Parameter(torch.empty(layer.hidden_dim, dtype=dtype))
        self.load_state_dict(layer.state_dict())

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor | None = None, *masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        terms = self.query_proj(query).unsqueeze(2) + self.key_proj(key).unsqueeze(1)
        scores = terms.tanh() @ self.v
        for mask in masks:
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(mask, -torch.inf)
            else:
                scores = scores + mask.to(scores.dtype)
        weights = scores.softmax(-1)
        return weights @ (key if value is None else value), weights


def layer_of(dtype: torch.dtype = torch.float32, **options: Any) -> AdditiveAttention:
    return AdditiveAttention(QUERY, KEY, HIDDEN, dtype=dtype, **options)


def inputs(dtype: torch.dtype = torch.float32, queries: int = SQ) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((B, queries, QUERY), (B, SK, KEY), (B, SK, DV))
    query, key, value = (torch.randn(s).to(dtype) for s in shapes)
    return query, key, value


def padding() -> Tensor:
    return torch.arange(SK) >= torch.tensor([[SK], [4], [1]])


def some_hidden(*shape: int) -> Tensor:
    hidden = torch.rand(shape) > 0.6
    hidden[..., 0] = False
    return hidden


MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "padding": {"key_padding_mask": padding()},
    "padding, added": {"key_padding_mask": torch.randn(B, SK)},
    "shared": {"attn_mask": some_hidden(SQ, SK)},
    "of each": {"attn_mask": some_hidden(B, SQ, SK)},
    "added": {"attn_mask": torch.randn(B, SQ, SK)},
    "both": {"attn_mask": some_hidden(SQ, SK), "key_padding_mask": padding()},
    "both, one added": {"attn_mask": torch.randn(SQ, SK), "key_padding_mask": padding()},
}


def as_composed(masks: dict[str, Tensor]) -> list[Tensor]:
    """For tensors that broadcast to (B, Sq, Sk)."""
    return [m.unsqueeze(1) if name == "key_padding_mask" else m for name, m in masks.items()]


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_results_are_those_of_the_composed(
    dtype: torch.dtype, masks: dict[str, Tensor], need_weights: bool
) -> None:
    layer = layer_of(dtype)
    theirs, given = Composed(layer), inputs(dtype)
    exact = copy.deepcopy(theirs).double()(*(t.double() for t in given), *as_composed(masks))
    for wants_gradient in (False, True):
        with torch.set_grad_enabled(wants_gradient):
            got = layer(*given, need_weights=need_weights, **masks)
            other = theirs(*given, *as_composed(masks))
        assert isinstance(got, tuple) and (got[1] is None) != need_weights
        for ours, torchs, expected in zip(got, other, exact, strict=True):
            if ours is not None:
                assert ours.dtype == dtype
                assert_no_worse(ours.detach(), torchs.detach(), expected.detach(), factor=3)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("queries", [1, SQ])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients(bias: bool, queries: int, need_weights: bool) -> None:
    layer = layer_of(bias=bias)
    theirs = Composed(layer)
    mask = torch.randn(queries, SK)
    seeds = torch.randn(B, queries, DV), torch.randn(B, queries, SK)

    def gradients(module: nn.Module, call: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (*given, mask)]
        out, weights = call(*leaves)
        loss = (out * seeds[0]).sum()
        if need_weights:
            loss = loss + (weights * seeds[1]).sum()
        return list(torch.autograd.grad(loss, [*leaves, *module.parameters()]))

    given = inputs(queries=queries)
    exact = copy.deepcopy(theirs).double()
    results = (
        gradients(
            layer, lambda *t: layer(*t[:3], None, need_weights, attn_mask=t[3]), torch.float32
        ),
        gradients(theirs, theirs, torch.float32),
        gradients(exact, exact, torch.float64),
    )
    for got, other, expected in zip(*results, strict=True):
        assert_no_worse(got, other, expected, factor=4, floor_ulps=8)


def test_the_tensor_of_weights_is_computed_only_where_asked(monkeypatch: Any) -> None:
    layer, widths = layer_of(), []
    op = pbm.nn.additive_attention.additive_attention

    def counted(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        widths.append(value.shape[-1])
        return op(query, key, value, *rest, **options)

    monkeypatch.setattr(pbm.nn.additive_attention, "additive_attention", counted)
    layer(*inputs())
    assert widths == [DV]
    assert _native.last_kernel().startswith("additive_attention")
    layer(*inputs(), need_weights=True)
    assert widths == [DV, SK]


def test_values_are_keys_by_default_and_keys_may_be_projected_once() -> None:
    layer, (query, key, value) = layer_of(), inputs()
    with torch.no_grad():
        assert_exact(layer(query, key)[0], layer(query, key, key)[0])
        projected = layer.key_proj(key)
        for masks in MASKS.values():
            expected = layer(query, key, value, need_weights=True, **masks)
            got = layer.attend(query, projected, value, need_weights=True, **masks)
            assert_exact(got[0], expected[0])
            assert_exact(got[1], expected[1])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("queries", [1, SQ])
def test_a_query_that_sees_nothing_gives_zeros(queries: int, need_weights: bool) -> None:
    layer, hidden = layer_of(), torch.zeros(B, SK, dtype=torch.bool)
    hidden[1] = True
    added = torch.zeros(B, SK).masked_fill(hidden, -torch.inf)
    for mask in (hidden, added):
        given = [t.requires_grad_() for t in inputs(queries=queries)]
        out, weights = layer(*given, key_padding_mask=mask, need_weights=need_weights)
        assert not out[1].any() and out[[0, 2]].all()
        if weights is not None:
            assert not weights[1].any()
            torch.testing.assert_close(weights[[0, 2]].sum(-1), torch.ones(2, queries))
        for gradient in torch.autograd.grad(out.square().sum(), given):
            assert not gradient[1].any() and gradient[0].any() and gradient.isfinite().all()


@pytest.mark.parametrize("length", ["queries", "keys", "batch"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_empty(length: str, need_weights: bool) -> None:
    b, sq, sk = (
        0 if length == n else size
        for n, size in zip(("batch", "queries", "keys"), (B, SQ, SK), strict=True)
    )
    out, weights = layer_of()(
        torch.randn(b, sq, QUERY),
        torch.randn(b, sk, KEY),
        torch.randn(b, sk, DV),
        need_weights=need_weights,
    )
    assert out.shape == (b, sq, DV) and not out.any()
    assert weights is None or weights.shape == (b, sq, sk)


def test_dropout_in_training_only() -> None:
    layer, (query, key, _) = layer_of(dropout=0.4), inputs()
    units = torch.eye(SK).expand(B, SK, SK)
    full = layer.eval()(query, key, need_weights=True)[1]
    layer.train()
    torch.manual_seed(5)
    out, weights = layer(query, key, units, need_weights=True)
    assert_exact(out, weights)
    dropped = weights == 0
    assert 0.2 < dropped.float().mean() < 0.6
    torch.testing.assert_close(weights, (full / 0.6).masked_fill(dropped, 0))
    torch.manual_seed(5)
    assert_exact(layer(query, key, units)[0], weights)
    assert not torch.equal(layer(query, key, units)[0], weights)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\], got 1.5"):
        layer_of(dropout=1.5)


# --- construction and state -----------------------------------------------------------------------


def test_parameters() -> None:
    names = ["v", "query_proj.weight", "query_proj.bias", "key_proj.weight"]
    assert [n for n, _ in layer_of().named_parameters()] == names
    assert "query_proj.bias" not in layer_of(bias=False).state_dict()
    assert all(p.dtype == torch.bfloat16 for p in layer_of(torch.bfloat16).parameters())
    assert all(p.is_meta for p in layer_of(device="meta").parameters())
    assert repr(layer_of(dropout=0.1)).startswith("AdditiveAttention(\n  20, 33, 24, dropout=0.1")


def test_reset_parameters() -> None:
    layer = layer_of()
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    for p in layer.parameters():
        nn.init.constant_(p, 9.0)
    torch.manual_seed(1)
    layer.reset_parameters()
    for name, tensor in layer.state_dict().items():
        bound = (KEY if "key" in name else QUERY if "query" in name else HIDDEN) ** -0.5
        assert not torch.equal(tensor, before[name])
        assert bound / 2 < tensor.abs().max() <= bound, name


def test_copies_and_pickles() -> None:
    layer, given, file = layer_of(precision="bf16"), inputs(), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    with torch.no_grad():
        expected = layer(*given)[0]
        for again in (
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(file, weights_only=False),
        ):
            assert_exact(again(*given)[0], expected)
        layer.v.mul_(2)
        assert not torch.equal(layer(*given)[0], expected)


def test_precision_is_the_projections() -> None:
    exact, given = layer_of(), inputs()
    rounded = layer_of(precision="bf16")
    rounded.load_state_dict(exact.state_dict())
    assert rounded.query_proj.precision == rounded.key_proj.precision == "bf16"
    with torch.no_grad():
        difference = (rounded(*given)[0] - exact(*given)[0]).abs().max()
    assert 1e-6 < difference < 1e-2


def test_it_learns() -> None:
    """To copy the value whose key is marked."""
    torch.manual_seed(0)
    layer = AdditiveAttention(4, 6, 16)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(150):
        key, marked = torch.randn(16, 9, 6), torch.randint(9, (16, 1, 1))
        key[..., :1] = 0
        key.scatter_(1, marked.expand(-1, 1, 6), key.gather(1, marked.expand(-1, 1, 6)) + 3)
        out, _ = layer(torch.ones(16, 1, 4), key)
        loss = (out - key.gather(1, marked.expand(-1, 1, 6))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


# --- torch ----------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's, of autograd functions
@pytest.mark.parametrize("need_weights", [False, True])
def test_compile(need_weights: bool) -> None:
    layer, given, masks = layer_of(), inputs(), MASKS["both, one added"]
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")

    def loss(f: Any) -> Tensor:
        out, weights = f(*given, need_weights=need_weights, **masks)
        return out.square().sum() + (weights.square().sum() if need_weights else 0)

    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got, expected = loss(compiled), loss(layer)
        torch.testing.assert_close(got, expected)
    parameters = list(layer.parameters())
    results = (torch.autograd.grad(x, parameters) for x in (got, expected))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_export() -> None:
    layer, given = layer_of().eval(), inputs()
    batch, keys = torch.export.Dim("batch", max=64), torch.export.Dim("keys", min=4, max=512)
    shapes = ({0: batch}, {0: batch, 1: keys}, {0: batch, 1: keys})
    program = torch.export.export(layer, given, dynamic_shapes=shapes)
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert "pybigmodel.additive_attention.default" in called
    query = torch.cat([given[0], given[0]])
    given = (query, torch.randn(2 * B, 90, KEY), torch.randn(2 * B, 90, DV))
    assert_exact(program.module()(*given)[0], layer(*given)[0])


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast(need_weights: bool) -> None:
    layer, given = layer_of(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, weights = layer(*given, need_weights=need_weights)
    assert out.dtype == torch.bfloat16 and (weights is None or weights.dtype == torch.bfloat16)
    torch.testing.assert_close(out.float(), layer(*given)[0], rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.parameters())


# --- what it refuses ------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"query": torch.randn(B, SQ, 5)}, r"query's last dimension must be query_dim = 20.*7, 5\)"),
    ({"key": torch.randn(B, SK, 5)}, r"key's last dimension must be key_dim = 33.*11, 5\)"),
    ({"query": torch.randn(SQ, QUERY)}, r"query must have 3 dimensions, got shape \(7, 20\)"),
    ({"value": torch.randn(SK, DV)}, r"value must have 3 dimensions, got shape \(11, 10\)"),
    ({"key": torch.randn(2, SK, KEY)}, r"key must have query's batch of 3, got shape \(2,"),
    ({"value": torch.randn(B, 5, DV)}, r"value must have key's batch and length \(3, 11\), got"),
    ({"query": torch.randn(B, SQ, QUERY).double()}, "query must be float32 as.*got float64"),
    ({"key": torch.randn(B, SK, KEY).bfloat16()}, "key must be float32 as.*got bfloat16"),
    ({"value": torch.randn(B, SK, DV).half()}, "value must be float32 as.*got float16"),
    ({"key_padding_mask": torch.zeros(B, SQ).bool()}, r"key_padding_mask must have shape \(3, 11"),
    ({"key_padding_mask": torch.zeros(B, SK).int()}, "key_padding_mask must be bool or floating"),
    ({"attn_mask": torch.zeros(SK, SQ)}, r"attn_mask must have shape \(7, 11\), got \(11, 7\)"),
    ({"attn_mask": torch.zeros(2, SQ, SK)}, r"attn_mask must have shape \(3, 7, 11\), got \(2,"),
    ({"attn_mask": torch.zeros(SQ, SK).long()}, "attn_mask must be bool or floating, got int64"),
]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(("changed", "message"), BAD, ids=[m[:40] for _, m in BAD])
def test_bad_calls(changed: dict[str, Any], message: str, need_weights: bool) -> None:
    given = dict(zip(("query", "key", "value"), inputs(), strict=True))
    with pytest.raises(RuntimeError, match=f"nn.AdditiveAttention: {message}"):
        layer_of()(**{**given, **changed}, need_weights=need_weights)


def test_nested_tensors_and_projected_keys_are_checked() -> None:
    layer, (query, key, value) = layer_of(), inputs()
    nested = torch.nested.nested_tensor(
        [torch.randn(n, KEY) for n in (3, 5, 2)], layout=torch.jagged
    )
    with pytest.raises(RuntimeError, match="key must not be nested: pad it"):
        layer(query, nested)
    with pytest.raises(RuntimeError, match="projected_key's last dimension must be hidden_dim"):
        layer.attend(query, key, value)
