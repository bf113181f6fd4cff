"""pybigmodel.ops.attention as an attention of transformers: eager's results, on random models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pybigmodel as pbm
from pybigmodel.integrations import transformers as integration
from pybigmodel.reference import attention as reference
from pybigmodel.testing import assert_no_worse

transformers = pytest.importorskip("transformers")
sdpa_mask = pytest.importorskip("transformers.masking_utils").sdpa_mask
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

VOCABULARY = 199
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 24, "pad_token_id": 0}


def bert(**options: Any) -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **options))


def gpt2(**options: Any) -> nn.Module:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "pad_token_id": 0}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, **options)
    return transformers.GPT2LMHeadModel(config)


def llama(**options: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, **options))


def mistral(**options: Any) -> nn.Module:
    config = transformers.MistralConfig(**GROUPED, sliding_window=7, **options)
    return transformers.MistralForCausalLM(config)


def gemma2(**options: Any) -> nn.Module:
    """Softcapped scores, every other layer with a window."""
    config = transformers.Gemma2Config(
        **GROUPED, sliding_window=9, attn_logit_softcapping=2.0, query_pre_attn_scalar=24, **options
    )
    return transformers.Gemma2ForCausalLM(config)


def t5(**options: Any) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        **options,
    )
    return transformers.T5ForConditionalGeneration(config)


DECODERS = [gpt2, llama, mistral, gemma2]
MODELS = [bert, *DECODERS, t5]
Make = Callable[..., nn.Module]


def oracle(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """eager, but in float64 throughout, and without its NaN for a token that sees nothing."""
    bias = None
    if attention_mask is not None:
        bias = torch.zeros((), dtype=query.dtype).masked_fill(~attention_mask, -torch.inf)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    out, _ = reference.attention(
        query,
        key,
        value,
        attn_mask=bias,
        causal=attention_mask is None and module.is_causal,
        softcap=softcap or 0.0,
        scale=scaling,
    )
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture(autouse=True)
def _registered() -> None:
    pbm.integrations.register_transformers()
    transformers.AttentionInterface.register("oracle", oracle)
    transformers.AttentionMaskInterface.register("oracle", sdpa_mask)


def pair(make: Make, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The same weights with eager attention and with ours; larger ones, so that scores differ."""
    torch.manual_seed(0)
    eager = make(attn_implementation="eager", **options).eval()
    with torch.no_grad():
        for name, weight in eager.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.mul_(4.0)
    fast = copy.deepcopy(eager)
    fast.set_attn_implementation("pybigmodel")
    return eager, fast


def exact(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("oracle")
    return model


def batch(model: nn.Module, padding: str | None, length: int = 21) -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (3, length))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if padding is not None:
        for row, count in ((0, 5), (2, 12)):
            at = slice(None, count) if padding == "left" else slice(-count, None)
            given["attention_mask"][row, at] = 0
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(1, VOCABULARY, (3, length - 4))
    return given


def logits(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Of the tokens that are not padding; what the others give is nobody's concern."""
    y = model(**given).logits
    if model.config.is_encoder_decoder:
        return y.flatten(0, 1)
    return y[given["attention_mask"].bool()]


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("make", MODELS)
def test_logits(make: Make, padding: str | None, ours, left) -> None:
    eager, fast = pair(make)
    given = batch(eager, padding)
    with torch.no_grad():
        assert ours(lambda: fast(**given))
        mine, theirs = logits(fast, given), logits(eager, given)
        assert_no_worse(mine, theirs, logits(exact(eager), given))
    assert not left()


@pytest.mark.parametrize("make", MODELS)
def test_gradients(make: Make) -> None:
    eager, fast = pair(make)
    given = batch(eager, "right")
    found = []
    for model in (fast, eager, exact(eager)):
        logits(model, given).square().mean().backward()
        found.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert_no_worse(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [bert, llama])
def test_other_dtypes(make: Make, dtype: torch.dtype, ours) -> None:
    eager, fast = (model.to(dtype) for model in pair(make))
    given = batch(eager, "right")
    with torch.no_grad():
        assert ours(lambda: fast(**given))
        assert_no_worse(logits(fast, given), logits(eager, given), logits(exact(eager), given))


@pytest.mark.parametrize("end", ["min", "max"])
def test_masks_to_the_ends_of_the_range(end: str) -> None:
    """A mask of one's own, as transformers' models have it: finfo.min hides."""
    eager, fast = pair(llama)
    ids = torch.randint(1, VOCABULARY, (2, 21))
    mask = torch.full((2, 1, 21, 21), torch.finfo(torch.float32).min).triu(1)
    if end == "max":
        mask = mask + torch.finfo(torch.float32).max  # the same: what counts is the difference
    mask[0, :, 4] = torch.finfo(torch.float32).min  # a token that sees nothing: everything alike
    with torch.no_grad():
        got, expected = (m(ids, attention_mask=mask).logits for m in (fast, eager))
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_a_bias_where_nothing_is_seen(calls) -> None:
    """As eager's: a mean of the values, not nothing."""
    forward = transformers.AttentionInterface()["pybigmodel"]
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    mask[..., 2, :] = False
    y, _ = forward(nn.Module(), q, k, v, mask, position_bias=torch.randn(1, 2, 5, 5))
    torch.testing.assert_close(y[:, 2], v.mean(2))


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("make", [*DECODERS, t5])
def test_generation_is_eagers(make: Make, padding: str | None, cache: str, ours) -> None:
    eager, fast = pair(make)
    given = {k: v for k, v in batch(eager, padding).items() if not k.startswith("decoder")}
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    if not (make is t5 and cache == "dynamic"):
        options["cache_implementation"] = cache
    expected = eager.generate(**given, **options)
    assert ours(lambda: fast.generate(**given, **options))
    assert torch.equal(fast.generate(**given, **options), expected)
    assert len(expected.unique()) > 2  # not one token over and over


@pytest.mark.parametrize("make", [gpt2, llama, t5])
def test_beams_and_chunks(make: Make) -> None:
    """Beams reorder the cache; a prompt in pieces has queries at the end of a longer cache."""
    eager, fast = pair(make)
    given = {k: v for k, v in batch(eager, "left").items() if not k.startswith("decoder")}
    options = {"max_new_tokens": 12, "do_sample": False}
    for more in ({"num_beams": 3}, {"prefill_chunk_size": 8}):
        expected = eager.generate(**given, **options, **more)
        assert torch.equal(fast.generate(**given, **options, **more), expected)


# --- what the op is given -------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch) -> list[dict[str, Any]]:
    """The arguments of each call of the op."""
    seen: list[dict[str, Any]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        seen.append({"q": q, "k": k, **options})
        return pbm.ops.attention(q, k, v, **options)

    monkeypatch.setattr(integration, "attention", spy)
    return seen


@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_no_mask_is_made_in_vain(make: Make, calls) -> None:
    _, fast = pair(make)
    with torch.no_grad():
        fast(**batch(fast, None))
    assert len(calls) == 2
    for call in calls:
        assert call["attn_mask"] is None
        assert call["causal"] is (make is not bert)


def test_a_prompt_in_a_longer_cache_has_one(calls) -> None:
    _, fast = pair(llama)
    given = {"input_ids": torch.randint(1, VOCABULARY, (2, 9))}
    fast.generate(**given, max_new_tokens=2, do_sample=False, cache_implementation="static")
    prompt, step = calls[0], calls[2]
    assert prompt["q"].shape[2] == 9 < prompt["k"].shape[2]
    assert prompt["attn_mask"].dtype == step["attn_mask"].dtype == torch.bool


def gemma4(**options: Any) -> nn.Module:
    """The last layers drop the queries whose logits are not wanted, and keep their keys."""
    config = transformers.Gemma4TextConfig(
        **GROUPED | {"num_hidden_layers": 4, "head_dim": 16},
        global_head_dim=16,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=64,
        **options,
    )
    return transformers.Gemma4ForCausalLM(config)


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="newer transformers")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_queries_dropped_by_the_model(dtype: torch.dtype, calls) -> None:
    eager, fast = (model.to(dtype) for model in pair(gemma4))
    ids = torch.randint(1, VOCABULARY, (2, 20))
    with torch.no_grad():
        for keep in (1, 2, 5):
            given = {"input_ids": ids, "logits_to_keep": keep}
            got, expected = fast(**given).logits, eager(**given).logits
            assert (got - expected).norm() < 1e-5 * expected.norm()  # eager's softmax is fp32
            assert not calls or calls[-1]["q"].shape[2] == keep < calls[-1]["k"].shape[2]
    assert bool(calls) == (dtype == torch.float32)
    options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    for cache in ("dynamic", "static"):
        expected = eager.generate(ids, **options, cache_implementation=cache)
        assert torch.equal(fast.generate(ids, **options, cache_implementation=cache), expected)


def test_grouped_heads_are_not_repeated(calls) -> None:
    _, fast = pair(llama)
    with torch.no_grad():
        fast(**batch(fast, None))
    assert all(call["q"].shape[1] == 4 and call["k"].shape[1] == 2 for call in calls)


def test_softcap_is_the_ops(calls) -> None:
    _, fast = pair(gemma2)
    with torch.no_grad():
        fast(**batch(fast, None))
    assert all(call["softcap"] == 2.0 for call in calls)


# --- training -------------------------------------------------------------------------------------


def test_attention_dropout(calls) -> None:
    _, fast = pair(llama, attention_dropout=0.25)
    given = batch(fast, None)

    def trained(seed: int) -> Tensor:
        torch.manual_seed(seed)
        fast.zero_grad()
        fast.train()(**given).logits.square().mean().backward()
        return torch.cat([p.grad.flatten() for p in fast.parameters()])

    first = trained(0)
    assert torch.equal(first, trained(0))
    assert not torch.equal(first, trained(1))
    assert calls[0]["dropout_p"] == 0.25
    with torch.no_grad():
        fast.eval()(**given)
    assert calls[-1]["dropout_p"] == 0.0


def test_gradient_checkpointing() -> None:
    _, fast = pair(llama, attention_dropout=0.25)
    given, found = batch(fast, None), []
    for checkpointing in (False, True):
        if checkpointing:
            fast.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        fast.zero_grad()
        fast.train()(**given).logits.square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in fast.parameters()]))
    assert torch.equal(*found)


# --- what there is not ----------------------------------------------------------------------------


def test_weights_are_refused() -> None:
    _, fast = pair(llama)
    with pytest.raises(ValueError, match="output_attentions"):
        fast(**batch(fast, None), output_attentions=True)
    module, (q, k, v) = nn.Module(), torch.randn(3, 1, 2, 5, 8)
    forward = transformers.AttentionInterface()["pybigmodel"]
    with pytest.raises(ValueError, match="pybigmodel: output_attentions=True, but no attention w"):
        forward(module, q, k, v, None, output_attentions=True)


def test_sinks_and_paged_caches_are_refused() -> None:
    module, (q, k, v) = nn.Module(), torch.randn(3, 1, 2, 5, 8)
    forward = transformers.AttentionInterface()["pybigmodel"]
    with pytest.raises(NotImplementedError, match=r"attention sinks \(s_aux\) are not implemented"):
        forward(module, q, k, v, None, s_aux=torch.zeros(2))
    with pytest.raises(NotImplementedError, match="paged cache of continuous batching"):
        forward(module, q, k, v, None, cache=object())


def deepseek_v32(**options: Any) -> nn.Module:
    config = transformers.DeepseekV32Config(
        **SIZES,
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        index_topk=4,
        index_n_heads=2,
        index_head_dim=16,
        **options,
    )
    return transformers.DeepseekV32ForCausalLM(config)


@pytest.mark.skipif(not hasattr(transformers, "DeepseekV32Config"), reason="newer transformers")
def test_sparse_attention_is_refused() -> None:
    _, fast = pair(deepseek_v32)
    with pytest.raises(
        NotImplementedError, match=r"sparse attention \(indices\) is not implemented"
    ):
        fast(**batch(fast, None))


def test_what_is_not_known_is_refused() -> None:
    module, (q, k, v) = nn.Module(), torch.randn(3, 1, 2, 5, 8)
    forward = transformers.AttentionInterface()["pybigmodel"]
    expected, _ = forward(module, q, k, v, None)
    harmless = {"position_ids": torch.arange(5), "use_cache": True, "unknown": None, "other": False}
    assert torch.equal(forward(module, q, k, v, None, **harmless)[0], expected)
    with pytest.raises(NotImplementedError, match="pybigmodel: unknown is not implemented"):
        forward(module, q, k, v, None, **harmless | {"unknown": torch.ones(5)})


@pytest.mark.parametrize("make", [llama, t5])
def test_float64_goes_to_sdpa(make: Make, ours, left) -> None:
    theirs, fast = (model.double() for model in pair(make))
    theirs.set_attn_implementation("sdpa")
    given = batch(theirs, "right")
    with torch.no_grad():
        assert not ours(lambda: fast(**given))
        assert torch.equal(logits(fast, given), logits(theirs, given))
    assert set(left()) == {"transformers with dtype float64"}


def test_softcap_in_float64_raises_as_sdpa_does() -> None:
    _, fast = (model.double() for model in pair(gemma2))
    with pytest.raises(ValueError, match="softcap"):
        fast(**batch(fast, None))


def test_another_name_and_precision(ours) -> None:
    pbm.integrations.register_transformers("pybigmodel_bf16", precision="bf16")
    eager, fast = pair(llama)
    low = llama(attn_implementation="pybigmodel_bf16").eval()
    low.load_state_dict(fast.state_dict())
    given = batch(eager, None)
    with torch.no_grad():
        assert ours(lambda: low(**given))
        true = logits(exact(eager), given)
        error = (logits(low, given) - true).norm() / true.norm()
        assert 1e-5 < error < 2e-2
    with pytest.raises(ValueError, match="precision must be"):
        pbm.integrations.register_transformers(precision="fp4")


# --- torch.compile --------------------------------------------------------------------------------


def test_compiled(ours) -> None:
    eager, fast = pair(llama)
    given = batch(eager, None)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert ours(lambda: compiled(**given, use_cache=False))
        y = compiled(**given, use_cache=False).logits
        torch.testing.assert_close(y, fast(**given).logits)
    torch._dynamo.reset()


def test_left_while_compiling_is_counted(left) -> None:
    _, fast = pair(bert)
    fast = fast.double()
    given = batch(fast, None)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given).logits, fast(**given).logits)
    assert left()["transformers with dtype float64"] >= 3  # two layers eagerly, one traced or two
    torch._dynamo.reset()
