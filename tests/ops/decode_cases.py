"""Caches, new tokens and options that the tests of attention_decode share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from attention_cases import Case, covering, layouts, poison
from torch import Tensor

from pybigmodel import ops
from pybigmodel.reference import attention_decode as reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]

# (B, Hq, Hkv, Sq, D, Dv): one and more rows to a tile, both sides of its width, whole and partial
# chunks of 16 and 32 elements.
SHAPES = [
    (3, 8, 2, 1, 128, 128),
    (4, 4, 4, 1, 64, 64),
    (2, 6, 2, 3, 40, 24),
    (5, 3, 1, 1, 17, 65),
    (2, 7, 1, 2, 96, 80),
    (3, 4, 2, 5, 256, 256),
    (8, 2, 2, 1, 1, 3),
    (2, 32, 4, 1, 48, 33),
]
FACTORS: dict[str, list[Any]] = {
    "shape": SHAPES,
    "dtype": FLOATS,
    "int8": [False, True],
    "block": [None, 1, 7, 16, 64, 600],  # of a paged cache
    "layout": ["contiguous", "bshd", "slices", "every second row"],
    "append": [False, True],
    "room": [40, 300, 1300],  # tokens that each sequence's cache has room for, at least
    "window": [None, (0, 0), (5, None), (700, 3)],
    "alibi": [None, "heads", "batch"],
    "softcap": [0.0, 2.0],
    "scale": [None, 0.2, -0.1],
}


def matrix() -> list[dict[str, Any]]:
    return covering(FACTORS)


@dataclass
class DecodeCase:
    """Arguments of one call; slots without a token hold NaN, in int8 caches as scales."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    block_table: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def positional(self) -> tuple[Any, ...]:
        return self.q, self.k_cache, self.v_cache, self.cache_seqlens, self.block_table

    def copy(self) -> DecodeCase:
        """With caches of its own, laid out as these."""
        options = {
            n: copied(o) if n in ("k_scale", "v_scale") else o for n, o in self.options.items()
        }
        k_cache, v_cache = copied(self.k_cache), copied(self.v_cache)
        return DecodeCase(self.q, k_cache, v_cache, self.cache_seqlens, self.block_table, options)

    def run(self) -> tuple[Tensor, Tensor]:
        out, lse = ops.attention_decode(*self.positional, **self.options, return_lse=True)
        return out, lse

    def exact(self) -> tuple[Tensor, Tensor]:
        """Output and lse in float64; the caches stay as they are."""
        q, *rest = self.positional
        return reference.attention_decode(q.double(), *rest, **self.options)

    def sequences(self) -> list[Case]:
        """Each sequence as a causal attention over its own tokens, in q's dtype."""
        o, found = self.options, []
        left, _ = o.get("window") or (None, None)
        for b, length in enumerate(self.cache_seqlens.tolist()):
            kv = [
                self._tokens(cache, o.get(f"{name}_scale"), o.get(name), b, length)
                for name, cache in (("k", self.k_cache), ("v", self.v_cache))
            ]
            slopes = o.get("alibi_slopes")
            options = {
                "causal": True,
                "window": None if left is None else (left, None),
                "alibi_slopes": slopes[b] if slopes is not None and slopes.dim() == 2 else slopes,
                "softcap": o.get("softcap", 0.0),
                "scale": o.get("scale"),
            }
            found.append(Case(self.q[b : b + 1], *kv, options))
        return found

    def _tokens(
        self, cache: Tensor, scale: Tensor | None, new: Tensor | None, b: int, length: int
    ) -> Tensor:
        old = reference.tokens(cache, scale, self.block_table, b, length)
        if new is not None:
            old = torch.cat([old, reference.as_cached(new[b], cache).to(old.dtype)], 1)
        return old[None].to(self.q.dtype)


def copied(x: Tensor) -> Tensor:
    """A copy with x's strides, whatever they are."""
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    if x.numel() == 0:
        return x.clone()
    store = x.as_strided((span,), (1,)).clone()
    return store.as_strided(x.shape, x.stride())


def make(choice: dict[str, Any]) -> DecodeCase:
    b, hq, hkv, sq, d, dv = choice["shape"]
    dtype, block, room = choice["dtype"], choice.get("block"), choice.get("room", 300)
    new = sq if choice.get("append") else 0
    lengths = torch.randint(0, room + 1 - new, (b,), dtype=torch.int32)
    lengths[-1:] = room - new  # to the last slot
    if b > 1:
        lengths[0] = 0
    table = None
    if block is not None:
        per_sequence = -(-room // block)
        table = torch.randperm(b * per_sequence + 3, dtype=torch.int32)[: b * per_sequence]
        table = table.view(b, per_sequence)
    options: dict[str, Any] = {n: choice[n] for n in ("window", "softcap", "scale") if n in choice}
    if choice.get("alibi"):
        slopes = torch.rand(*((b, hq) if choice["alibi"] == "batch" else (hq,))) / 2
        options["alibi_slopes"] = slopes
    caches = []
    for name, width in (("k", d), ("v", dv)):
        tokens = torch.randn(b, hkv, room, width)
        if new:
            options[name] = torch.randn(b, hkv, new, width).to(dtype)
        if choice.get("int8"):
            codes = torch.randint(-127, 128, tokens.shape, dtype=torch.int8)
            scale = torch.rand(b, hkv, room, 1) / 50
            options[f"{name}_scale"] = stored(scale, lengths, table, block, "bshd").squeeze(-1)
            tokens = codes
        else:
            tokens = tokens.to(dtype)
        caches.append(stored(tokens, lengths, table, block, choice.get("layout", "contiguous")))
    return DecodeCase(torch.randn(b, hq, sq, d).to(dtype), *caches, lengths, table, options)


def stored(
    tokens: Tensor, lengths: Tensor, table: Tensor | None, block: int | None, layout: str
) -> Tensor:
    """A cache with the first tokens of each sequence, NaN (int8: whatever) in all other slots."""
    heads, width = tokens.shape[1], tokens.shape[-1]
    if table is None or block is None:
        cache = poison(tokens.shape, tokens.dtype)
        for at, length in enumerate(lengths.tolist()):
            cache[at, :, :length] = tokens[at, :, :length]
    else:
        cache = poison((table.numel() + 3, heads, block, width), tokens.dtype)
        for at, length in enumerate(lengths.tolist()):
            for j in range(length):
                cache[table[at, j // block], :, j % block] = tokens[at, :, j]
    return dict(layouts(cache))[layout]
