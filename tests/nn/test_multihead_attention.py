"""pybigmodel.nn.MultiheadAttention: torch.nn.MultiheadAttention's results, options and state."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

import pybigmodel as pbm
from pybigmodel import _native
from pybigmodel._measure import difference
from pybigmodel.nn import _packing
from pybigmodel.testing import assert_no_worse
from pybigmodel.testing.tolerance import FACTOR

E, HEADS, N, L, S = 48, 4, 3, 17, 23
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

CONSTRUCTORS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sequence first": {"batch_first": False},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv, zero_attn, sequence first": {
        "add_bias_kv": True,
        "add_zero_attn": True,
        "batch_first": False,
    },
    "kdim": {"kdim": 20},
    "kdim, vdim, no bias": {"kdim": 20, "vdim": 33, "bias": False},
    "kdim, bias_kv": {"kdim": 20, "add_bias_kv": True},
    "rows beside panels": {"embed_dim": 36, "num_heads": 3},
    "one head": {"num_heads": 1},
}


def pair(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, nn.MultiheadAttention]:
    """Our layer and torch's, with equal weights of their own and biases that are not zero."""
    options = {"embed_dim": E, "num_heads": HEADS, "batch_first": True, **options}
    theirs = nn.MultiheadAttention(**options)
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    ours = pbm.nn.MultiheadAttention(**options)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def inputs(layer: nn.MultiheadAttention, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """query, key, value."""
    widths = ((L, layer.embed_dim), (S, layer.kdim), (S, layer.vdim))
    tensors = [torch.randn(N, length, width).to(dtype) for length, width in widths]
    return tensors if layer.batch_first else [x.transpose(0, 1).contiguous() for x in tensors]


def padding() -> Tensor:
    hidden = torch.zeros(N, S, dtype=torch.bool)
    hidden[0, -5:] = hidden[1, 3:6] = True
    return hidden


def by_head(layer: nn.MultiheadAttention) -> Tensor:
    hidden = torch.rand(N * layer.num_heads, L, S) < 0.3
    hidden[..., 5] = False
    return hidden


def causal(like: torch.dtype = torch.bool) -> Tensor:
    hidden = torch.ones(L, S, dtype=torch.bool).triu(1)
    return hidden if like == torch.bool else added(hidden)


def added(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)


CALLS = {
    "plain": lambda layer: {},
    "padding": lambda layer: {"key_padding_mask": padding()},
    "padding, float": lambda layer: {"key_padding_mask": torch.randn(N, S)},
    "mask": lambda layer: {"attn_mask": by_head(layer)[0]},
    "mask, float": lambda layer: {"attn_mask": torch.randn(L, S)},
    "by head": lambda layer: {"attn_mask": by_head(layer)},
    "by head, float": lambda layer: {"attn_mask": torch.randn(N * layer.num_heads, L, S)},
    "mask and padding": lambda layer: {
        "attn_mask": by_head(layer),
        "key_padding_mask": padding(),
    },
    "mask and padding, float": lambda layer: {
        "attn_mask": torch.randn(L, S),
        "key_padding_mask": added(padding()),
    },
    "mask, float, and padding": lambda layer: {
        "attn_mask": torch.randn(L, S),
        "key_padding_mask": padding(),
    },
    "causal": lambda layer: {"attn_mask": causal(), "is_causal": True},
    "causal, float": lambda layer: {"attn_mask": causal(torch.float32), "is_causal": True},
    "causal and padding": lambda layer: {
        "attn_mask": causal(),
        "is_causal": True,
        "key_padding_mask": padding(),
    },
    # What the hint says is then not so, and torch does not read it.
    "another mask than the hint says, and padding": lambda layer: {
        "attn_mask": by_head(layer)[0],
        "is_causal": True,
        "key_padding_mask": padding(),
    },
}


def assert_like(
    ours: Any, theirs: Any, arguments: list[Tensor], options: dict[str, Any], **weights: Any
) -> None:
    """Output and weights no worse than torch's, with and without gradients."""
    exact = copy.deepcopy(theirs).double()
    wanted = exact(*as_double(arguments), **as_double(options), **weights)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got = ours(*arguments, **options, **weights)
            other = theirs(*arguments, **options, **weights)
        assert len(got) == 2
        for mine, torchs, expected in zip(got, other, wanted, strict=True):
            if expected is None:
                assert mine is None
            else:
                assert_no_worse(mine.detach(), torchs.detach(), expected.detach())


def as_double(values: Any) -> Any:
    """A list or dict with its floating tensors in float64; equal objects stay equal."""
    if isinstance(values, dict):
        return dict(zip(values, as_double(list(values.values())), strict=True))
    known = {id(x): x.double() for x in values if isinstance(x, Tensor) and x.is_floating_point()}
    return [known.get(id(x), x) for x in values]


ALL_WEIGHTS = ({"need_weights": False}, {}, {"average_attn_weights": False})


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("constructor", CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys())
def test_results_are_torchs(constructor, call) -> None:
    ours, theirs = pair(**constructor)
    arguments, options = inputs(theirs), call(theirs)
    for weights in ALL_WEIGHTS:
        assert_like(ours, theirs, arguments, options, **weights)


@pytest.mark.parametrize("call", ["plain", "padding", "by head, float", "causal"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_other_dtypes(dtype, call) -> None:
    ours, theirs = pair(dtype)
    options = CALLS[call](theirs)
    floats = {
        k: v.to(dtype) if v.dtype == torch.float32 else v
        for k, v in options.items()
        if isinstance(v, Tensor)
    }
    for weights in ALL_WEIGHTS:
        assert_like(ours, theirs, inputs(theirs, dtype), {**options, **floats}, **weights)
    with torch.no_grad():  # a float32 mask beside them, which torch refuses
        ours(*inputs(theirs, dtype), attn_mask=torch.randn(L, S), need_weights=False)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"embed_dim": 36, "num_heads": 3}, {"bias": False}])
def test_what_is_one_tensor_is_multiplied_once(batch_first, options, monkeypatch) -> None:
    ours, theirs = pair(batch_first=batch_first, **options)
    query, _, _ = inputs(theirs)
    memory = (
        torch.randn(S, N, ours.embed_dim) if not batch_first else torch.randn(N, S, ours.embed_dim)
    )
    columns = []
    product = pbm.nn._product._linear_packed

    def counted(input, packed, n, *rest):
        columns.append(n)
        return product(input, packed, n, *rest)

    e = ours.embed_dim
    for arguments, expected in (
        ([query, query, query], [3 * e]),
        ([query, memory, memory], [e, 2 * e]),
        ([query, memory, memory.clone()], [e, e, e]),
        ([memory, memory, memory.clone()], [e, e, e]),
    ):
        assert_like(ours, theirs, arguments, {}, need_weights=False)
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(pbm.nn._product, "_linear_packed", counted)
            columns.clear()
            ours(*arguments, need_weights=False)
        assert columns == expected


@pytest.mark.parametrize("weights", ALL_WEIGHTS)
@pytest.mark.parametrize("constructor", ["plain", "sequence first", "bias_kv", "zero_attn"])
def test_unbatched(constructor, weights) -> None:
    ours, theirs = pair(**CONSTRUCTORS[constructor])
    query, key = torch.randn(L, E), torch.randn(S, E)
    for options in (
        {},
        {"key_padding_mask": padding()[0]},
        {"attn_mask": by_head(theirs)[:HEADS]},
        {"attn_mask": by_head(theirs)[0], "key_padding_mask": padding()[1]},
    ):
        assert_like(ours, theirs, [query, key, key], options, **weights)


def test_weights_are_computed_only_where_asked(monkeypatch) -> None:
    ours, theirs = pair()

    def fail(*args):
        raise AssertionError("computed")

    monkeypatch.setattr(pbm.nn.multihead_attention, "_attention_with_weights", fail)
    ours(*inputs(theirs), need_weights=False)
    with pytest.raises(AssertionError, match="computed"):
        ours(*inputs(theirs))


@pytest.mark.parametrize("weights", ALL_WEIGHTS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_sees_nothing_gives_zeros(kind, weights) -> None:
    ours, theirs = pair()
    mask = torch.zeros(L, S, dtype=torch.bool)
    mask[4] = True
    arguments = [x.requires_grad_() for x in inputs(theirs)]
    options = {"attn_mask": mask if kind == "bool" else added(mask)}
    y, shares = ours(*arguments, **options, **weights)
    torch.testing.assert_close(y[:, 4], ours.out_proj.bias.expand(N, E), rtol=0, atol=0)
    if shares is not None:
        assert not shares[..., 4, :].any()
    expected, _ = theirs(*arguments, **options, **weights)
    kept = torch.arange(L) != 4
    assert difference(y[:, kept], expected[:, kept])[0] < 1e-6
    y.sum().backward()
    assert all(x.grad.isfinite().all() for x in (*arguments, *ours.parameters()))
    assert not arguments[0].grad[:, 4].any()


# --- constructor, state, copies -------------------------------------------------------------------


@pytest.mark.parametrize("options", CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys())
def test_constructor_and_state_dict_are_torchs(options) -> None:
    options = {"embed_dim": E, "num_heads": HEADS, **options}
    torch.manual_seed(3)
    ours = pbm.nn.MultiheadAttention(**options)
    after = torch.rand(1)
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(**options)
    assert torch.equal(after, torch.rand(1))
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert not dict(ours.named_buffers())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("options", [{}, {"kdim": 20}])
def test_state_dict_goes_both_ways(options, assign) -> None:
    ours, _ = pair(**options)
    _, other = pair(**options)
    arguments = inputs(other)
    with torch.no_grad():
        ours(*arguments)
        ours.load_state_dict(other.state_dict(), assign=assign)
        assert difference(ours(*arguments)[0], other(*arguments)[0])[0] < 1e-6
        fresh = nn.MultiheadAttention(E, HEADS, batch_first=True, **options)
        fresh.load_state_dict(ours.state_dict(), assign=assign)
        assert torch.equal(fresh(*arguments)[0], other(*arguments)[0])


def test_copies_and_pickles() -> None:
    ours, theirs = pair()
    ours.precision = "bf16"
    arguments = inputs(theirs)
    with torch.no_grad():
        expected = ours(*arguments)[0]
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        for again in (
            copy.deepcopy(ours),
            pickle.loads(pickle.dumps(ours)),
            torch.load(file, weights_only=False),
        ):
            assert torch.equal(again(*arguments)[0], expected)
            again.in_proj_weight.mul_(2)
            assert not torch.equal(again(*arguments)[0], expected)
        assert torch.equal(ours(*arguments)[0], expected)


@pytest.mark.parametrize("need_weights", [False, True])
def test_masks_to_the_ends_of_the_range(need_weights) -> None:
    """finfo's ends are numbers, and what they are added to is lost in them: a row of them is even,
    where one of −∞ is nothing."""
    ours, theirs = pair()
    ends = torch.finfo(torch.float32)
    mask, padding = torch.randn(L, S), torch.zeros(N, S)
    mask[3] = mask[:, 5] = ends.min
    mask[7, 9] = ends.max
    padding[1] = padding[0, -5:] = ends.min
    query, key, value = inputs(theirs)
    exact = copy.deepcopy(theirs).double()
    for given in ({"attn_mask": mask}, {"key_padding_mask": padding}):
        found = [
            m(*(x.to(m.out_proj.weight.dtype) for x in (query, key, value)), **options)[0]
            for m, options in (
                (ours, given),
                (theirs, given),
                (exact, {name: m.double() for name, m in given.items()}),
            )
            for options in [{**options, "need_weights": need_weights}]
        ]
        assert_no_worse(*(y.detach() for y in found))


def test_precision_may_be_changed() -> None:
    ours, theirs = pair()
    arguments = inputs(theirs)
    with torch.no_grad():
        expected, _ = theirs(*arguments, need_weights=False)
        exact, _ = ours(*arguments, need_weights=False)
        ours.precision = "bf16"
        assert ours.precision == ours.out_proj.precision == "bf16"
        rounded, _ = ours(*arguments, need_weights=False)
        assert rounded.dtype == torch.float32
        assert 1e-4 < difference(rounded, expected)[0] < 1e-2
        ours.precision = "fp32"
        assert torch.equal(ours(*arguments, need_weights=False)[0], exact)
    with pytest.raises(ValueError, match="precision must be 'fp32' or 'bf16'; got 'int8'"):
        ours.precision = "int8"
    with pytest.raises(ValueError, match="precision must be"):
        pbm.nn.MultiheadAttention(E, HEADS, precision="fp8")
    assert pbm.nn.MultiheadAttention(E, HEADS, precision="bf16").out_proj.precision == "bf16"
    assert repr(ours).splitlines()[1].strip() == "48, num_heads=4, precision='fp32'"


# --- packed copies --------------------------------------------------------------------------------


def change_by_step(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    layer.zero_grad()


CHANGES = {
    "in place": lambda layer: layer.in_proj_weight.mul_(2),
    "through .data": lambda layer: layer.in_proj_weight.data.mul_(2),
    "another Parameter": lambda layer: setattr(
        layer, "in_proj_weight", nn.Parameter(layer.in_proj_weight * 2)
    ),
    "optimizer": change_by_step,
    "load_state_dict": lambda layer: layer.load_state_dict(pair()[1].state_dict()),
    "bias": lambda layer: layer.in_proj_bias.mul_(2),
    "out_proj": lambda layer: layer.out_proj.weight.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_are_seen(change) -> None:
    ours, theirs = pair()
    query, key, _ = inputs(theirs)
    with torch.no_grad():
        for arguments in ((query, query, query), (query, key, key)):
            before = ours(*arguments)[0]
            change(ours)
            theirs.load_state_dict(ours.state_dict())
            after = ours(*arguments)[0]
            assert difference(after, theirs(*arguments)[0])[0] < 1e-6
            assert not torch.equal(after, before)


@pytest.mark.parametrize(("options", "copies"), [({}, 1), ({"embed_dim": 36, "num_heads": 3}, 4)])
def test_the_weight_is_packed_once(options, copies, monkeypatch) -> None:
    ours, theirs = pair(**options)
    query, key, _ = inputs(theirs)
    packed = []
    pack = _packing._pack_linear_weight

    def counted(weight, precision):
        packed.append(weight.shape)
        return pack(weight, precision)

    monkeypatch.setattr(_packing, "_pack_linear_weight", counted)
    with torch.no_grad():
        for arguments in ((query, query, query), (query, key, key), (query, query, query)):
            ours(*arguments)
    # Of the whole, of q's rows, of k's and v's; and of out_proj. Panels of 16 rows are shared.
    assert len(packed) == copies + 1 if copies == 1 else len(packed) == 4
    ours.forget_packed()
    assert id(ours.in_proj_weight) not in _packing._entries


def test_training_packs_no_copies_and_frozen_weights_do() -> None:
    ours, theirs = pair()
    arguments = inputs(theirs)
    for _ in range(2):
        ours(*arguments, need_weights=False)[0].sum().backward()
        change_by_step(ours)
    assert id(ours.in_proj_weight) not in _packing._entries
    ours.requires_grad_(False)
    ours(*arguments, need_weights=False)
    assert id(ours.in_proj_weight) in _packing._entries
    for change in (ours.train, ours.eval, ours.half):
        ours.requires_grad_(False)
        change()
        theirs.train(ours.training)
    assert id(ours.in_proj_weight) not in _packing._entries


def test_an_edit_unseen_needs_forget_packed() -> None:
    ours, theirs = pair()
    arguments = inputs(theirs)
    with torch.no_grad():
        before = ours(*arguments)[0]
        ours.in_proj_weight.data[3, 7] += 10
        ours.forget_packed()
        assert not torch.equal(ours(*arguments)[0], before)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ALL_WEIGHTS[:2])
@pytest.mark.parametrize("call", ["plain", "by head, float", "mask and padding", "causal"])
@pytest.mark.parametrize("constructor", CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys())
def test_gradients_are_torchs(constructor, call, weights) -> None:
    ours, theirs = pair(**constructor)
    exact = copy.deepcopy(theirs).double()
    arguments, options = inputs(theirs), CALLS[call](theirs)
    grad_output = torch.randn(ours(*arguments)[0].shape)
    gradients = []
    for layer, as_dtype in ((ours, list), (theirs, list), (exact, as_double)):
        leaves = [x.detach().clone().requires_grad_() for x in as_dtype(arguments)]
        mask = options.get("attn_mask")
        given = options if layer is not exact else as_double(options)
        if mask is not None and mask.is_floating_point():
            leaves.append(given["attn_mask"].detach().clone().requires_grad_())
            given = {**given, "attn_mask": leaves[-1]}
        y, _ = layer(*leaves[:3], **given, **weights)
        y.backward(grad_output.to(y.dtype))
        gradients.append([x.grad for x in (*leaves, *layer.parameters())])
    # In one vector, each in units of its size, so that luck with a few elements decides less; and
    # twice the policy's factor, since torch keeps the weights of its forward pass here, where ours
    # come from scores computed again (see tests/ops/attention_gradients.py).
    scales = [expected.abs().max() for expected in gradients[2]]
    together = (_together(each, scales, 3 * ours.embed_dim) for each in gradients)
    assert_no_worse(*together, factor=2 * FACTOR)


def _together(gradients: list[Tensor], scales: list[Tensor], in_proj_bias: int) -> Tensor:
    parts = []
    for gradient, scale in zip(gradients, scales, strict=True):
        if gradient.shape == (in_proj_bias,):
            # A bias of all keys moves a query's scores alike: its gradient is exactly 0.
            gradient = torch.stack(gradient.chunk(3)[::2])
        parts.append((gradient / scale.to(gradient.dtype)).flatten())
    return torch.cat(parts)


def test_training_is_torchs() -> None:
    ours, theirs = pair()
    query, key, _ = inputs(theirs)
    for layer in (ours, theirs):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            layer(query, key, key, need_weights=False)[0].square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        assert difference(ours(query, key, key)[0], theirs(query, key, key)[0])[0] < 1e-4


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout(need_weights) -> None:
    p = 0.25
    ours, theirs = pair(dropout=p)
    arguments = inputs(theirs)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return ours(*arguments, need_weights=need_weights)[0]

    ours.eval()
    with torch.no_grad():
        kept = run(0)
        assert torch.equal(kept, run(1))
        ours.train()
        assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
        runs, torchs = torch.stack([run(seed) for seed in range(400)]), []
        for _ in range(400):
            torchs.append(theirs(*arguments, need_weights=False)[0])
        # The mean is what it is without dropout, to the standard error; the spread is torch's.
        error = (runs.mean(0) - kept).norm() / (runs.std(0).norm() / 20)
        assert 0.8 < error < 1.2
        assert runs.std(0).norm() / torch.stack(torchs).std(0).norm() == pytest.approx(1, abs=0.05)
        if need_weights:
            weights = ours(*arguments, average_attn_weights=False)[1]
            assert (weights == 0).float().mean() == pytest.approx(p, abs=0.03)
        ours.dropout = 1.0
        torch.testing.assert_close(run(0), ours.out_proj.bias.expand(N, L, E), rtol=0, atol=0)


def test_gradients_with_dropout_are_those_of_what_was_kept() -> None:
    ours, theirs = pair(dropout=0.5)
    arguments = [x.requires_grad_() for x in inputs(theirs)]

    def loss(scale: float) -> Tensor:
        torch.manual_seed(7)  # the same elements
        query, key, value = arguments
        return ours(query, key, value * scale, need_weights=False)[0].sum()

    loss(1.0).backward()
    with torch.no_grad():  # linear in value
        along = (arguments[2].grad * arguments[2]).sum()
        assert float(along) == pytest.approx(float(loss(2.0) - loss(1.0)), rel=1e-3)


# --- within torch's machinery ---------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo(tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


COMPILED = ["plain", "mask and padding", "by head, float", "causal", "causal and padding"]
# Of torch 2.13's own: it loads torch.jit with Inductor, and Dynamo instantiates autograd functions.
of_torch = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@of_torch
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("constructor", "call"),
    [
        *[("plain", call) for call in COMPILED],
        *[
            (constructor, "mask and padding")
            for constructor in ("sequence first", "bias_kv", "kdim")
        ],
    ],
)
def test_compiled(constructor, call) -> None:
    ours, theirs = pair(**CONSTRUCTORS[constructor])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    arguments, options = inputs(theirs), CALLS[call](theirs)
    for grad in (False, True):
        for weights in ALL_WEIGHTS[:2]:
            with torch.set_grad_enabled(grad):
                got, expected = (m(*arguments, **options, **weights) for m in (compiled, theirs))
            assert difference(got[0], expected[0])[0] < 2e-6
            if expected[1] is not None:
                assert difference(got[1], expected[1])[0] < 2e-6


@of_torch
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_by_inductor_sees_changes_and_trains() -> None:
    ours, theirs = pair()
    query, key, _ = inputs(theirs)
    compiled = torch.compile(ours, fullgraph=True)
    explained = torch._dynamo.explain(ours)
    with torch.no_grad():
        nodes = explained(query, key, key, need_weights=False).graphs[0].graph.nodes
        called = [str(n.target) for n in nodes if str(n.target).startswith("pybigmodel.")]
        cached = "pybigmodel.linear_cached.default"
        assert called == [cached, cached, "pybigmodel.attention.default", cached]
        for factor in (1, 2, 3):
            ours.in_proj_weight.mul_(factor)
            theirs.in_proj_weight.mul_(factor)
            got, _ = compiled(query, key, key, need_weights=False)
            assert difference(got, theirs(query, key, key, need_weights=False)[0])[0] < 2e-6
    for layer, call in ((ours, compiled), (theirs, theirs)):
        layer.zero_grad()
        call(query, key, key, need_weights=False)[0].square().sum().backward()
    assert difference(ours.in_proj_weight.grad, theirs.in_proj_weight.grad)[0] < 1e-5


@of_torch
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", [{}, {"kdim": 20, "add_bias_kv": True}])
def test_export(options, strict) -> None:
    ours, theirs = pair(**options)
    arguments = inputs(theirs)
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    program = torch.export.export(
        ours.eval(),
        tuple(arguments),
        {"need_weights": False, "key_padding_mask": padding()},
        strict=strict,
        dynamic_shapes={
            "query": {0: batch},
            "key": {0: batch, 1: length},
            "value": {0: batch, 1: length},
            "key_padding_mask": {0: batch, 1: length},
            "need_weights": None,
        },
    )
    assert "pybigmodel.attention.default" in str(program.graph)
    assert "linear_cached" not in str(program.graph)
    run = program.module()
    with torch.no_grad():
        for n, s in ((N, S), (5, 9)):
            query, key, value = (torch.randn(n, *x.shape[1:]) for x in arguments)
            key, value, mask = key[:, :s], value[:, :s], torch.zeros(n, s, dtype=torch.bool)
            mask[1, 2:] = True
            given = {"need_weights": False, "key_padding_mask": mask}
            got, expected = (m(query, key, value, **given)[0] for m in (run, theirs))
            assert difference(got, expected)[0] < 2e-6


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("call", ["plain", "mask, float", "mask and padding"])
@pytest.mark.parametrize("constructor", ["plain", "bias_kv"])
def test_autocast(constructor, call, dtype, grad) -> None:
    ours, theirs = pair(**CONSTRUCTORS[constructor])
    arguments, options = inputs(theirs), CALLS[call](theirs)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=dtype):
        for weights in ALL_WEIGHTS[:2]:
            got, expected = (m(*arguments, **options, **weights) for m in (ours, theirs))
            assert got[0].dtype == dtype
            assert difference(got[0].float(), expected[0].float())[0] < 1e-2
            if expected[1] is not None:
                assert got[1].dtype == expected[1].dtype
                assert difference(got[1].float(), expected[1].float())[0] < 1e-2
    with torch.no_grad():
        assert difference(ours(*arguments)[0], theirs(*arguments)[0])[0] < 1e-6  # outside again


def test_autocast_takes_bf16_products() -> None:
    ours, theirs = pair()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours(*inputs(theirs), need_weights=False)
    assert sorted(_packing._entries[id(ours.in_proj_weight)].copies) == [1]
    assert "bf16" in _native.last_kernel()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_func() -> None:
    ours, theirs = pair()
    query, key, _ = inputs(theirs)
    other = {name: torch.randn_like(p) / 5 for name, p in ours.named_parameters()}

    def call(layer: nn.Module, parameters: Any, query: Tensor) -> Tensor:
        arguments = (query, key, key)
        return torch.func.functional_call(layer, parameters, arguments, {"need_weights": False})[0]

    with torch.no_grad():
        before = ours(query, key, key)[0]
        assert difference(call(ours, other, query), call(theirs, other, query))[0] < 2e-6
        assert torch.equal(ours(query, key, key)[0], before)
    for transform in (
        lambda layer: torch.func.grad(lambda p: call(layer, p, query).square().sum())(other),
        lambda layer: {"": torch.func.grad(lambda q: call(layer, other, q).square().sum())(query)},
        lambda layer: {"": torch.vmap(lambda q: call(layer, other, q))(torch.stack([query] * 2))},
    ):
        mine, expected = (
            torch.cat([value.flatten() for value in transform(layer).values()])
            for layer in (ours, theirs)
        )
        assert difference(mine, expected)[0] < 1e-5


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("which", ["query", "value", "in_proj_weight"])
def test_forward_mode_is_refused(which) -> None:
    ours, theirs = pair()
    arguments = dict(zip(("query", "key", "value"), inputs(theirs), strict=True))
    with torch.no_grad(), forward_ad.dual_level():
        if which in arguments:
            x = arguments[which]
            arguments[which] = forward_ad.make_dual(x, torch.ones_like(x))
        else:
            weight = ours.in_proj_weight.detach()
            del ours.in_proj_weight
            ours.in_proj_weight = forward_ad.make_dual(weight, torch.ones_like(weight))
        with pytest.raises(NotImplementedError, match="is a dual tensor"):
            ours(**arguments)


def test_computed_weights_and_hooks() -> None:
    ours, theirs = pair()
    arguments = inputs(theirs)

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    seen = []
    with torch.no_grad():
        ours(*arguments)
        for layer in (ours, theirs):
            parametrize.register_parametrization(layer, "in_proj_weight", Double())
        ours.out_proj.register_forward_hook(lambda module, args, output: seen.append(module))
        assert difference(ours(*arguments)[0], theirs(*arguments)[0])[0] < 1e-6
    assert seen == [ours.out_proj]


def test_meta_device_then_weights() -> None:
    meta = pbm.nn.MultiheadAttention(E, HEADS, batch_first=True, device="meta")
    _, theirs = pair()
    shapes = [x.to("meta") for x in inputs(theirs)]
    assert meta(*shapes)[0].shape == (N, L, E) and meta(*shapes)[1].shape == (N, L, S)
    meta.load_state_dict(theirs.state_dict(), assign=True)
    arguments = inputs(theirs)
    with torch.no_grad():
        assert difference(meta(*arguments)[0], theirs(*arguments)[0])[0] < 1e-6


@pytest.mark.parametrize("empty", [(0, L, S), (N, 0, S), (N, L, 0)], ids=str)
def test_empty(empty) -> None:
    ours, theirs = pair()
    n, length, keys = empty
    query, key = torch.randn(n, length, E), torch.randn(n, keys, E)
    for weights in ALL_WEIGHTS[:2]:
        with torch.no_grad():
            got, expected = (m(query, key, key, **weights) for m in (ours, theirs))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# --- what is refused ------------------------------------------------------------------------------

X, Y = torch.randn(N, L, E), torch.randn(N, S, E)
REFUSED = {
    "query must have 2 or 3 dimensions, got shape": lambda m: m(X[None], Y, Y),
    "key must have query's 3 dimensions": lambda m: m(X, Y[0], Y[0]),
    r"query's last dimension must be embed_dim = 48, got shape \(3, 17, 40\)": lambda m: m(
        X[..., :40], Y, Y
    ),
    "value's last dimension must be vdim = 48": lambda m: m(X, Y, Y[..., 1:]),
    "value must have key's length and batch": lambda m: m(X, Y, Y[:, 1:]),
    "key must have query's batch of 3": lambda m: m(X, Y[:2], Y[:2]),
    "attn_mask must be given with is_causal": lambda m: m(X, Y, Y, is_causal=True),
    "attn_mask must be bool or floating, got int64": lambda m: m(
        X, Y, Y, attn_mask=torch.ones(L, S, dtype=torch.int64)
    ),
    r"attn_mask must have shape \(17, 23\), got \(17, 22\)": lambda m: m(
        X, Y, Y, attn_mask=torch.ones(L, S - 1)
    ),
    r"attn_mask must have shape \(12, 17, 23\), got \(3, 17, 23\)": lambda m: m(
        X, Y, Y, attn_mask=torch.ones(N, L, S)
    ),
    r"key_padding_mask must have shape \(3, 23\), got \(23, 3\)": lambda m: m(
        X, Y, Y, key_padding_mask=torch.ones(S, N)
    ),
    r"key_padding_mask must have shape \(23,\), got \(1, 23\)": lambda m: m(
        X[0], Y[0], Y[0], key_padding_mask=torch.ones(1, S)
    ),
    "weight must be bfloat16, got float32": lambda m: m(X.bfloat16(), Y.bfloat16(), Y.bfloat16()),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("message", REFUSED)
def test_bad_arguments_are_named(message, grad) -> None:
    ours, _ = pair()
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=message):
        REFUSED[message](ours)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_are_refused(layout) -> None:
    ours, _ = pair()
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)], layout=layout)
    with torch.no_grad(), pytest.raises(RuntimeError, match="query must not be nested: pad it"):
        ours(nested, nested, nested)


def test_wide_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be at most 256, got 600 / 2"):
        pbm.nn.MultiheadAttention(600, 2)
    with torch.no_grad():
        ours, theirs = pair(embed_dim=512, num_heads=2)
        x = torch.randn(1, 3, 512)
        assert difference(ours(x, x, x)[0], theirs(x, x, x)[0])[0] < 1e-6
