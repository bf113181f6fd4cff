"""pybigmodel.nn's transformer layers and stacks: torch's results, options and state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pybigmodel as pbm
from pybigmodel._measure import difference
from pybigmodel.testing import assert_no_worse
from pybigmodel.testing.tolerance import FACTOR

D, HEADS, FF, N, L, S = 48, 4, 80, 3, 9, 13
ENCODER, DECODER = "TransformerEncoderLayer", "TransformerDecoderLayer"
pytestmark = [
    # torch says why it would not take nested tensors, and, once a process, that they may change.
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning"),
]

CONSTRUCTORS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sequence first": {"batch_first": False},
    "norm first": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "silu": {"activation": F.silu},
    "nn.GELU": {"activation": nn.GELU()},
    "nn.ReLU": {"activation": nn.ReLU(inplace=True)},
    "tanh": {"activation": torch.tanh},
    "no bias": {"bias": False},
    "eps": {"layer_norm_eps": 1e-2, "norm_first": True},
}


def pair(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """Our layer and torch's, with equal weights of their own and biases that are not zero."""
    options = {"dim_feedforward": FF, "dropout": 0.0, "batch_first": True, **options}
    theirs = getattr(nn, kind)(D, HEADS, **options)
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, float(parameter.detach().mean()), 0.3)
    ours = getattr(pbm.nn, kind)(D, HEADS, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def stacks(layers: int = 3, **options: Any) -> tuple[Any, Any]:
    ours, theirs = pair(ENCODER, **options)
    # Layers of one stack start as copies: here they differ.
    stack = nn.TransformerEncoder(theirs, layers, nn.LayerNorm(D))
    for parameter in stack.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) / 20)
    mine = pbm.nn.TransformerEncoder(ours, layers, nn.LayerNorm(D))
    mine.load_state_dict(stack.state_dict())
    return mine.eval(), stack.eval()


@pytest.fixture
def without_fast_path() -> Any:
    @contextmanager
    def disabled() -> Iterator[None]:
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    return disabled


def x_of(layer: nn.Module, length: int = L) -> Tensor:
    x = torch.randn(N, length, D)
    return x if layer.self_attn.batch_first else x.transpose(0, 1).contiguous()


def padding(length: int) -> Tensor:
    return torch.arange(length) >= torch.tensor([length, length - 4, 2])[:, None]


def causal(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


ENCODER_CALLS = {
    "plain": {},
    "padding": {"src_key_padding_mask": padding(L)},
    "mask": {"src_mask": torch.rand(L, L, generator=torch.manual_seed(1)) < 0.2},
    "causal": {"src_mask": causal(L), "is_causal": True},
    "causal and padding": {
        "src_mask": causal(L).isinf(),
        "is_causal": True,
        "src_key_padding_mask": padding(L),
    },
}
DECODER_CALLS = {
    "plain": {},
    "padding": {
        "tgt_key_padding_mask": padding(L),
        "memory_key_padding_mask": padding(S),
    },
    "masks": {"tgt_mask": causal(L), "memory_mask": torch.ones(L, S).tril(-1).bool()},
    "causal": {"tgt_mask": causal(L), "tgt_is_causal": True},
    "memory causal": {
        "memory_mask": torch.ones(L, S).triu(1).bool(),
        "memory_is_causal": True,
    },
}


def assert_like(ours: Any, theirs: Any, *arguments: Tensor, **options: Any) -> None:
    exact = copy.deepcopy(theirs).double()
    floats = {
        name: value.double()
        for name, value in options.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    wanted = exact(*(x.double() for x in arguments), **{**options, **floats}).detach()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got, other = (m(*arguments, **options).detach() for m in (ours, theirs))
        assert_no_worse(got, other, wanted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("constructor", CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys())
def test_encoder_layer(constructor, training) -> None:
    ours, theirs = (m.train(training) for m in pair(ENCODER, **constructor))
    for options in ENCODER_CALLS.values():
        assert_like(ours, theirs, x_of(theirs), **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("constructor", CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys())
def test_decoder_layer(constructor, training) -> None:
    ours, theirs = (m.train(training) for m in pair(DECODER, **constructor))
    for options in DECODER_CALLS.values():
        assert_like(ours, theirs, x_of(theirs), x_of(theirs, S), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [ENCODER, DECODER])
def test_other_dtypes(kind, dtype) -> None:
    ours, theirs = (m.eval() for m in pair(kind, dtype, activation="gelu"))
    x = x_of(theirs).to(dtype)
    assert_like(ours, theirs, *([x] if kind == ENCODER else [x, x_of(theirs, S).to(dtype)]))


class Unhashable:
    __hash__ = None

    def __call__(self, x: Tensor) -> Tensor:
        return x.relu()


@pytest.mark.parametrize("kind", [ENCODER, DECODER])
def test_any_callable_activates(kind) -> None:
    ours, theirs = (m.eval() for m in pair(kind, activation=Unhashable()))
    assert_like(ours, theirs, x_of(theirs), *([] if kind == ENCODER else [x_of(theirs, S)]))


def test_gelu_tanh_is_what_it_says() -> None:
    """torch's fast path takes every nn.GELU for the exact one; ours does what training does."""
    ours, theirs = pair(ENCODER, activation=nn.GELU(approximate="tanh"))
    x = x_of(theirs)
    trained = theirs(x)
    with torch.no_grad():
        assert difference(ours.eval()(x), trained)[0] < 1e-6
        assert difference(theirs.eval()(x), trained)[0] > 1e-6


@pytest.mark.parametrize("kind", [ENCODER, DECODER])
def test_unbatched(kind) -> None:
    ours, theirs = pair(kind)
    memory = [] if kind == ENCODER else [torch.randn(S, D)]
    assert_like(ours, theirs, torch.randn(L, D), *memory)


@pytest.mark.parametrize("kind", [ENCODER, DECODER])
def test_the_activation_is_part_of_the_product(kind, monkeypatch) -> None:
    ours, theirs = (m.eval() for m in pair(kind, activation="gelu"))
    arguments = [x_of(theirs)] + ([] if kind == ENCODER else [x_of(theirs, S)])
    codes = []
    product = pbm.nn._product._linear_packed

    def counted(*args):
        codes.append(args[-1])
        return product(*args)

    monkeypatch.setattr(pbm.nn._product, "_linear_packed", counted)
    with torch.no_grad():
        ours(*arguments)
        assert codes.count(2) == 1 and set(codes) == {0, 2}  # gelu
        seen = []
        hook = ours.linear1.register_forward_hook(lambda module, args, output: seen.append(output))
        y = ours(*arguments)
        hook.remove()
        assert len(seen) == 1 and codes.count(2) == 1  # who looks on sees what torch's layer gives
        look = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: seen.append(output) if module is ours.linear1 else None
        )
        ours(*arguments)
        look.remove()
        assert len(seen) == 2 and codes.count(2) == 1  # who looks at every module, too
        assert difference(seen[0], F.linear(*_given_to_linear1(ours, arguments)))[0] < 1e-6
        assert difference(y, theirs(*arguments))[0] < 1e-6


def _given_to_linear1(layer: nn.Module, arguments: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    given = []
    handle = layer.linear1.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    layer(*arguments)
    handle.remove()
    return given[0], layer.linear1.weight, layer.linear1.bias


@pytest.mark.parametrize("kind", [ENCODER, DECODER])
def test_gradients_are_torchs(kind) -> None:
    for constructor in ("plain", "norm first", "gelu", "sequence first"):
        ours, theirs = pair(kind, **CONSTRUCTORS[constructor])
        exact = copy.deepcopy(theirs).double()
        arguments = [x_of(theirs)] + ([] if kind == ENCODER else [x_of(theirs, S)])
        calls = ENCODER_CALLS if kind == ENCODER else DECODER_CALLS
        grad_output = torch.randn(arguments[0].shape)
        gradients = []
        for layer in (ours, theirs, exact):
            double = torch.float64 if layer is exact else torch.float32
            leaves = [x.detach().to(double).requires_grad_() for x in arguments]
            layer(*leaves, **calls["padding"]).backward(grad_output.to(double))
            gradients.append([leaf.grad for leaf in (*leaves, *layer.parameters())])
        # Each in units of its size. A bias of keys has a gradient of exactly 0; and torch keeps
        # weights that ours computes again: see test_multihead_attention.py.
        parts: list[list[Tensor]] = [[], [], []]
        for each in zip(*gradients, strict=True):
            for part, gradient in zip(parts, each, strict=True):
                of_keys = gradient.shape == (3 * D,)
                kept = torch.cat(gradient.chunk(3)[::2]) if of_keys else gradient
                part.append((kept / each[2].abs().max().to(kept.dtype)).flatten())
        assert_no_worse(*map(torch.cat, parts), factor=2 * FACTOR)


@pytest.mark.parametrize("kind", [ENCODER, DECODER])
def test_training_with_dropout(kind) -> None:
    ours, theirs = pair(kind, dropout=0.2)
    arguments = [x_of(theirs)] + ([] if kind == ENCODER else [x_of(theirs, S)])
    with torch.no_grad():
        runs = [torch.stack([m(*arguments) for _ in range(300)]) for m in (ours, theirs)]
    mean, spread = (r.mean(0) for r in runs), [r.std(0).norm() for r in runs]
    first, second = mean
    assert float(spread[0] / spread[1]) == pytest.approx(1, abs=0.05)
    assert (first - second).norm() < 1.2 * spread[0] * (2 / 300) ** 0.5
    torch.manual_seed(0)
    y = ours(*arguments)
    torch.manual_seed(0)
    assert torch.equal(ours(*arguments), y)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


# --- constructors, state --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ENCODER, DECODER])
@pytest.mark.parametrize("options", CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys())
def test_constructors_and_state_dicts_are_torchs(options, kind) -> None:
    torch.manual_seed(3)
    ours = getattr(pbm.nn, kind)(D, HEADS, FF, **options)
    after = torch.rand(1)
    torch.manual_seed(3)
    theirs = getattr(nn, kind)(D, HEADS, FF, **options)
    assert torch.equal(after, torch.rand(1))
    assert isinstance(ours, getattr(nn, kind))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    kinds = {type(m) for m in ours.modules()}
    assert {pbm.nn.Linear, pbm.nn.MultiheadAttention} <= kinds
    assert not kinds & {nn.Linear, nn.MultiheadAttention}


def test_transformer() -> None:
    options = {"dim_feedforward": FF, "dropout": 0.0, "batch_first": True}
    torch.manual_seed(3)
    ours = pbm.nn.Transformer(D, HEADS, 2, 2, **options)
    torch.manual_seed(3)
    theirs = nn.Transformer(D, HEADS, 2, 2, **options)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    src, tgt = torch.randn(N, S, D), torch.randn(N, L, D)
    for given in (
        {},
        {"tgt_mask": causal(L), "src_key_padding_mask": padding(S)},
        {"tgt_mask": causal(L), "tgt_is_causal": True},
    ):
        assert_like(ours, theirs, src, tgt, **given)
    mine = pbm.nn.Transformer(D, HEADS, 1, 1, FF, precision="bf16", bias=False, dtype=torch.half)
    assert {m.precision for m in mine.modules() if hasattr(m, "precision")} == {"bf16"}
    assert {p.dtype for p in mine.parameters()} == {torch.half}
    assert not any(name.endswith("bias") for name, _ in mine.named_parameters())
    custom = nn.Identity()
    kept = pbm.nn.Transformer(D, HEADS, custom_encoder=custom, custom_decoder=custom)
    assert kept.encoder is kept.decoder is custom


@pytest.mark.parametrize("kind", [ENCODER, DECODER])
def test_precision(kind) -> None:
    ours, theirs = pair(kind)
    rounded = getattr(pbm.nn, kind)(D, HEADS, FF, 0.0, batch_first=True, precision="bf16")
    rounded.load_state_dict(ours.state_dict())
    arguments = [x_of(theirs)] + ([] if kind == ENCODER else [x_of(theirs, S)])
    with torch.no_grad():
        y = rounded(*arguments)
        assert y.dtype == torch.float32
        assert 1e-4 < difference(y, theirs(*arguments))[0] < 1e-2
    with pytest.raises(ValueError, match="precision must be"):
        getattr(pbm.nn, kind)(D, HEADS, precision="int8")


@pytest.mark.parametrize("kind", [ENCODER, DECODER])
def test_copies_and_pickles(kind) -> None:
    ours, theirs = (m.eval() for m in pair(kind))
    arguments = [x_of(theirs)] + ([] if kind == ENCODER else [x_of(theirs, S)])
    with torch.no_grad():
        expected = ours(*arguments)
        for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(again(*arguments), expected)
            again.linear1.weight.mul_(2)
            assert not torch.equal(again(*arguments), expected)
        assert torch.equal(ours(*arguments), expected)
        theirs.load_state_dict(ours.state_dict())
        assert difference(expected, theirs(*arguments))[0] < 1e-6


# --- stacks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("constructor", ["plain", "norm first", "sequence first", "gelu"])
@pytest.mark.parametrize("training", [True, False])
def test_encoder_stack(constructor, training) -> None:
    ours, theirs = (m.train(training) for m in stacks(**CONSTRUCTORS[constructor]))
    x = x_of(theirs.layers[0])
    for options in (
        {},
        {"mask": causal(L)},
        {"mask": causal(L).isinf()},
        {"mask": ENCODER_CALLS["mask"]["src_mask"]},
        {"mask": causal(L), "is_causal": True},
        {"mask": causal(L), "src_key_padding_mask": padding(L).float() * -1e9},
        {"src_key_padding_mask": padding(L)},
        {"src_key_padding_mask": padding(L).float().masked_fill(padding(L), -torch.inf)},
        {"src_key_padding_mask": padding(L).flip(1)},  # not left-aligned: torch computes it
        {"src_key_padding_mask": torch.zeros(N, L, dtype=torch.bool)},
    ):
        # The float64 stack takes whichever path torch's takes, nested tensors included.
        with torch.no_grad():
            got, other = ours(x, **options), theirs(x, **options)
        assert difference(got, other)[0] < 1e-6
        assert torch.equal(got == got[..., :1], other == other[..., :1])  # rows without tokens


@pytest.fixture
def widths(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of what goes into the attention of sequences that lie end to end."""
    seen = []
    attention_varlen = pbm.nn.multihead_attention.attention_varlen

    def spy(q, *args, **options):
        seen.append(tuple(q.shape))
        return attention_varlen(q, *args, **options)

    monkeypatch.setattr(pbm.nn.multihead_attention, "attention_varlen", spy)
    return seen


def test_padding_is_left_out_of_the_computation(widths) -> None:
    ours, theirs = stacks()
    x, hidden = x_of(theirs.layers[0]), padding(L)
    with torch.no_grad():
        got = ours(x, src_key_padding_mask=hidden)
        assert widths == [((~hidden).sum(), HEADS, D // HEADS)] * 3
        assert difference(got, theirs(x, src_key_padding_mask=hidden))[0] < 1e-6
        hidden[1] = True  # a sequence of padding only
        got, other = (m(x, src_key_padding_mask=hidden) for m in (ours, theirs))
    assert got.isfinite().all() and difference(got, other)[0] < 1e-6


@pytest.mark.parametrize("at", ["", "self_attn", "self_attn.out_proj", "linear1", "norm2", "all"])
def test_hooks_are_called_with_padding(at, widths) -> None:
    """And see what they see without: another shape would break who looks on."""
    ours, theirs = stacks()
    given = {"src": x_of(theirs.layers[0]), "src_key_padding_mask": padding(L)}
    seen = []

    def look(module, args, output) -> None:
        seen.append((type(module).__name__, tuple(args[0].shape) if args else None))

    if at == "all":
        handle = nn.modules.module.register_module_forward_hook(look)
    else:
        handle = ours.layers[1].get_submodule(at).register_forward_hook(look)
    with torch.no_grad():
        hooked = ours(**given)
        handle.remove()
        assert not widths
        assert difference(hooked, ours(**given))[0] < 1e-6
    assert len(widths) == 3
    names = [name for name, _ in seen]
    if at == "all":
        assert names.count("Linear") == 9 and names.count("MultiheadAttention") == 3
    else:
        assert names == [type(ours.layers[1].get_submodule(at)).__name__]
    assert {shape[:2] for _, shape in seen if shape} == {(N, L)}


def test_padding_is_computed_where_torch_computes_it(without_fast_path) -> None:
    ours, theirs = stacks()
    x, hidden = x_of(theirs.layers[0]), {"src_key_padding_mask": padding(L)}

    def zeroed() -> bool:
        y = ours(x, **hidden)
        assert difference(y, theirs(x, **hidden))[0] < 1e-6
        empty = (y - ours.norm.bias).abs().amax(-1) == 0
        assert torch.equal(empty, padding(L)) or not empty.any()
        return bool(empty.any())

    assert not zeroed()  # gradients are wanted
    with torch.no_grad():
        assert zeroed()
        with without_fast_path():
            assert not zeroed()
        ours.train(), theirs.train()
        assert not zeroed()
        ours.eval(), theirs.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):  # in which torch's fast path fails
            y = ours(x, **hidden)
            with without_fast_path():
                assert difference(y, theirs(x, **hidden))[0] < 1e-2
        ours.use_nested_tensor = theirs.use_nested_tensor = False
        assert not zeroed()


def test_our_layers_in_torchs_stack() -> None:
    ours, theirs = stacks()
    mixed = nn.TransformerEncoder(pair(ENCODER)[0], 3, nn.LayerNorm(D)).eval()
    mixed.load_state_dict(theirs.state_dict())
    x = x_of(theirs.layers[0])
    with torch.no_grad():  # which hands them nested tensors
        for options in ({}, {"src_key_padding_mask": padding(L)}, {"mask": causal(L)}):
            assert difference(mixed(x, **options), theirs(x, **options))[0] < 1e-6
    other = pbm.nn.TransformerEncoder(theirs.layers[0], 2)  # and torch's in ours
    with torch.no_grad():
        y = other.eval()(x, src_key_padding_mask=padding(L))
        expected = ours.layers[0](ours.layers[0](x, None, padding(L)), None, padding(L))
    assert difference(y, expected.masked_fill(padding(L)[..., None], 0))[0] < 1e-6


def test_nested_tensors() -> None:
    ours, theirs = (m.eval() for m in pair(ENCODER))
    sequences = [torch.randn(n, D) for n in (5, 0, 9, 1)]
    nested = torch.nested.nested_tensor(sequences)
    with torch.no_grad():
        for got, expected in zip(ours(nested).unbind(), theirs(nested).unbind(), strict=True):
            assert got.shape == expected.shape
            assert not got.numel() or difference(got, expected)[0] < 1e-6
        refusals = [
            lambda: ours(torch.nested.nested_tensor(sequences, layout=torch.jagged)),
            lambda: ours(nested, src_key_padding_mask=torch.zeros(4, 9, dtype=torch.bool)),
            lambda: pair(ENCODER, batch_first=False)[0](nested),
        ]
        for refused in refusals:
            with pytest.raises(RuntimeError, match="src may be nested only where"):
                refused()


@pytest.mark.parametrize("constructor", ["plain", "norm first", "sequence first"])
def test_decoder_stack(constructor) -> None:
    ours, theirs = pair(DECODER, **CONSTRUCTORS[constructor])
    stack = nn.TransformerDecoder(theirs, 2, nn.LayerNorm(D))
    mine = pbm.nn.TransformerDecoder(ours, 2, nn.LayerNorm(D))
    x, memory = x_of(theirs), x_of(theirs, S)
    for training in (True, False):
        mine.train(training), stack.train(training)
        for options in (*DECODER_CALLS.values(), {"tgt_mask": causal(L).isinf()}):
            assert_like(mine, stack, x, memory, **options)


def test_causality_is_detected(monkeypatch) -> None:
    ours, _ = stacks()
    hints = []
    attention = pbm.nn.multihead_attention.attention

    def counted(*args, **options):
        hints.append((options["causal"], options["attn_mask"] is None))
        return attention(*args, **options)

    monkeypatch.setattr(pbm.nn.multihead_attention, "attention", counted)
    x = x_of(ours.layers[0])
    almost = causal(L)
    almost[0, 3] = 0.0
    for mask, is_causal, expected in (
        (causal(L), None, (True, True)),
        (causal(L).isinf(), None, (True, True)),
        (almost, None, (False, False)),
        (causal(L), False, (False, False)),
        (almost, True, (True, True)),  # as torch: the hint is believed
        (None, None, (False, True)),
    ):
        hints.clear()
        ours(x, mask, is_causal=is_causal)
        assert hints == [expected] * 3
    with pytest.raises(RuntimeError, match="attn_mask must be given with is_causal"):
        ours(x, is_causal=True)


# --- within torch's machinery ---------------------------------------------------------------------


# Of torch 2.13's own: it loads torch.jit with Inductor, and Dynamo instantiates autograd functions.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_by_inductor(tmp_path, monkeypatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    ours, theirs = stacks(1, activation="gelu")
    compiled, x = torch.compile(ours, fullgraph=True), x_of(theirs.layers[0])
    with torch.no_grad():
        assert difference(compiled(x), theirs(x))[0] < 2e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled() -> None:
    torch._dynamo.reset()
    ours, theirs = stacks(2, activation="gelu")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = x_of(theirs.layers[0])
    with torch.no_grad():
        for options in ({}, {"mask": causal(L)}, {"src_key_padding_mask": padding(L)}):
            got, expected = compiled(x, **options), theirs(x, **options)
            kept = ~options.get("src_key_padding_mask", torch.zeros(N, L, dtype=torch.bool))
            assert difference(got[kept], expected[kept])[0] < 2e-6
    for stack, call in ((ours, compiled), (theirs, theirs)):
        stack.train()
        call(x).square().sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_decoder() -> None:
    torch._dynamo.reset()
    ours, theirs = pair(DECODER)
    mine = pbm.nn.TransformerDecoder(ours, 2)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    stack = nn.TransformerDecoder(theirs, 2)
    x, memory = x_of(theirs), x_of(theirs, S)
    for options in ({"tgt_mask": causal(L)}, {"tgt_mask": causal(L), "tgt_is_causal": True}):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                got, expected = (m(x, memory, **options) for m in (compiled, stack))
            assert difference(got, expected)[0] < 2e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict) -> None:
    ours, theirs = stacks(2)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        ours, (x_of(theirs.layers[0]),), strict=strict, dynamic_shapes=({0: batch},)
    )
    assert "pybigmodel.attention.default" in str(program.graph)
    with torch.no_grad():
        for n in (2, 5):
            x = torch.randn(n, L, D)
            assert difference(program.module()(x), theirs(x))[0] < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [False, True])
def test_autocast(grad, dtype, without_fast_path) -> None:
    for kind in (ENCODER, DECODER):
        ours, theirs = (m.eval() for m in pair(kind, activation="gelu"))
        arguments = [x_of(theirs)] + ([] if kind == ENCODER else [x_of(theirs, S)])
        # torch's fast path gives sums in autocast's dtype, where the slow one gives them in x's.
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=dtype), without_fast_path():
            got, expected = ours(*arguments), theirs(*arguments)
        assert got.dtype == expected.dtype
        assert difference(got.float(), expected.float())[0] < 1e-2


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_call() -> None:
    ours, theirs = pair(ENCODER)
    x = x_of(theirs)
    other = {name: torch.randn_like(p) / 5 for name, p in ours.named_parameters()}

    def loss(layer: nn.Module) -> Any:
        return lambda p: torch.func.functional_call(layer, p, (x,)).square().sum()

    mine, expected = (
        torch.cat([g.flatten() for g in torch.func.grad(loss(m))(other).values()])
        for m in (ours, theirs)
    )
    assert difference(mine, expected)[0] < 1e-5


def test_subclasses_keep_their_blocks() -> None:
    """Code that overrides the parts of torch's layer does so here too."""

    class Louder(pbm.nn.TransformerEncoderLayer):
        def _sa_block(self, x, *args, **kwargs):
            return 2 * super()._sa_block(x, *args, **kwargs)

        def _ff_block(self, x):
            return 3 * super()._ff_block(x)

    _, theirs = pair(ENCODER)
    louder = Louder(D, HEADS, FF, 0.0, batch_first=True)
    louder.load_state_dict(theirs.state_dict())
    x = x_of(theirs)
    with torch.no_grad():
        h = theirs.norm1(x + 2 * theirs._sa_block(x, None, None))
        expected = theirs.norm2(h + 3 * theirs._ff_block(h))
        assert difference(louder.eval()(x), expected)[0] < 1e-6
        stack = pbm.nn.TransformerEncoder(louder, 1).eval()
        y = stack(x, src_key_padding_mask=padding(L))[~padding(L)]
        assert difference(y, stack.layers[0](x, None, padding(L))[~padding(L)])[0] < 1e-6


def test_bad_arguments_are_named() -> None:
    ours, _ = pair(ENCODER)
    x = x_of(ours)
    with pytest.raises(RuntimeError, match="query's last dimension must be embed_dim = 48"):
        ours(x[..., 1:], None)
    with pytest.raises(RuntimeError, match="attn_mask must have shape"):
        ours(x, torch.zeros(L, L + 1))
    with pytest.raises(RuntimeError, match="key_padding_mask must be bool or floating, got int32"):
        ours(x, src_key_padding_mask=padding(L).int())
    for layers in (stacks()[0], stacks(batch_first=False)[0]):
        with torch.no_grad():
            x = x_of(layers.layers[0])
            with pytest.raises(
                RuntimeError, match=r"src_key_padding_mask must be bool or fl.*int64"
            ):
                layers(x, src_key_padding_mask=padding(L).long())
            with pytest.raises(RuntimeError, match=rf"mask must have shape \({N}, {L}\), got"):
                layers(x, src_key_padding_mask=padding(L).T)
    with pytest.raises(ValueError, match="must be at most 256"):
        pbm.nn.TransformerDecoderLayer(600, 2)
    with pytest.raises(RuntimeError, match="activation should be relu/gelu, not swish"):
        pbm.nn.TransformerEncoderLayer(D, HEADS, activation="swish")
