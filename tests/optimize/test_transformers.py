"""optimize on models of the transformers library, made from a configuration."""

from __future__ import annotations

import pytest
import torch

import pybigmodel as pbm
from pybigmodel import _measure
from pybigmodel._measure import difference

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.fixture
def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    )
    return transformers.BertModel(config).eval()


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-6), ("bf16", 5e-3), ("int8", 2e-2)])
def test_bert(bert, monkeypatch, precision, bound) -> None:
    monkeypatch.setattr(_measure, "time_pair", lambda *_: (2.0, 1.0))
    ids = torch.randint(0, 100, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    fast = pbm.optimize(bert, precision, example_inputs=inputs)
    report = pbm.report(fast)
    assert len(report.replaced) == len(report.rows) == 2 * 6 + 1
    assert [row.activation for row in report if "intermediate" in row.path] == ["gelu"] * 2
    with torch.no_grad():
        expected = bert(**inputs).last_hidden_state
        assert difference(fast(**inputs).last_hidden_state, expected)[0] < bound
        pbm.restore(fast)
        assert torch.equal(fast(**inputs).last_hidden_state, expected)


def test_bert_trains(bert) -> None:
    fast = pbm.optimize(bert)
    ids = torch.randint(0, 100, (2, 9))
    gradients = []
    for model in (bert, fast):
        model(ids).last_hidden_state.square().mean().backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert difference(gradients[1], gradients[0])[0] < 1e-5


def test_gpt2(tmp_path) -> None:
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 50, (1, 7))
    fast = pbm.optimize(model)
    left = {row.path: row.left for row in pbm.report(fast).rows}
    assert "Conv1D" in left["transformer.h.0.mlp.c_fc"]
    assert left["lm_head"] is None
    assert fast.lm_head.weight is fast.transformer.wte.weight
    with torch.no_grad():
        assert difference(fast(ids).logits, model(ids).logits)[0] < 1e-6
    assert (
        "tied"
        in {row.path: row.left for row in pbm.report(pbm.optimize(model, "int8")).rows}["lm_head"]
    )
    # Its checkpoint loads into transformers without this library.
    fast.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert pbm.report(pbm.optimize(again, inplace=True)).replaced  # weights from one file
