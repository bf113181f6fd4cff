"""Options, shapes, layouts and reference results that the tests of attention share.

The matrix is a covering array: every pair of values of two different factors stands in at least one
case. It is made by a greedy search that has no randomness but its fixed seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

import torch
import torch.nn.functional as F
from linear_cases import poison
from torch import Tensor

from pybigmodel import _native
from pybigmodel.reference import attention as reference
from pybigmodel.testing import assert_no_worse, measure_error
from pybigmodel.testing.tolerance import FACTOR, FLOOR_ULPS

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
Shape = tuple[int, int, int, int, int, int, int]

# (B, Hq, Hkv, Sq, Sk, D, Dv): ones, primes, and both sides of what kernels cut at: tiles of 6 and 8
# rows, panels of 16 columns, blocks of 48 and 64 queries and of 64, 256 and 512 keys. At least 60
# rows each: the error of a row's scores is common to all its outputs, and of few rows it is luck.
SHAPES: list[Shape] = [
    (16, 8, 8, 1, 1, 1, 1),
    (12, 6, 1, 1, 7, 8, 3),
    (4, 4, 2, 6, 1, 17, 16),
    (4, 6, 3, 5, 16, 64, 64),
    (6, 2, 2, 7, 33, 15, 31),
    (2, 3, 1, 17, 63, 32, 48),
    (2, 2, 1, 31, 65, 128, 128),
    (1, 4, 4, 48, 47, 80, 80),
    (1, 2, 2, 49, 257, 65, 64),
    (2, 1, 1, 65, 100, 96, 96),
    (1, 2, 1, 129, 130, 40, 40),
    (5, 4, 2, 3, 513, 256, 256),
    (1, 2, 1, 100, 19, 72, 200),
    (1, 1, 1, 70, 1030, 63, 65),
]


# --- the matrix -----------------------------------------------------------------------------------


def covering(factors: Mapping[str, list[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Choices of one value a factor, so that every pair of values of two factors occurs."""
    dice, names = random.Random(seed), list(factors)
    missing = {
        pair
        for a, b in combinations(range(len(names)), 2)
        for pair in product(*([(at, n) for n in range(len(factors[names[at]]))] for at in (a, b)))
    }
    rows = []
    while missing:
        row = dict(min(missing))
        rest = [at for at in range(len(names)) if at not in row]
        for at in dice.sample(rest, len(rest)):
            count = len(factors[names[at]])
            gains = [sum(_pair(x, (at, n)) in missing for x in row.items()) for n in range(count)]
            row[at] = dice.choice([n for n in range(count) if gains[n] == max(gains)])
        missing -= {_pair(a, b) for a, b in combinations(row.items(), 2)}
        rows.append({names[at]: factors[names[at]][n] for at, n in sorted(row.items())})
    return rows


def _pair(a: tuple[int, int], b: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    return (a, b) if a < b else (b, a)


MASKS: dict[str, Callable[[Shape, torch.dtype], Tensor | None]] = {
    "none": lambda s, t: None,
    "bool": lambda s, t: some_hidden(s[3], s[4]),
    "bool rows": lambda s, t: torch.rand(s[1], s[3], 1) > 0.3,
    "padding": lambda s, t: torch.arange(s[4]) < torch.randint(1, s[4] + 1, (s[0], 1, 1, 1)),
    "float32": lambda s, t: torch.randn(s[0], s[1], s[3], s[4]),
    "dtype": lambda s, t: torch.randn(s[0], 1, s[3], s[4]).to(t),
    "infinite": lambda s, t: torch.zeros(s[3], s[4], dtype=t).masked_fill(
        ~some_hidden(s[3], s[4]), -torch.inf
    ),
    "key bias": lambda s, t: torch.randn(s[4]),
    "lowest": lambda s, t: torch.zeros(s[3], s[4], dtype=t).masked_fill(
        ~some_hidden(s[3], s[4]), torch.finfo(t).min
    ),
    "highest": lambda s, t: torch.zeros(s[0], 1, 1, s[4], dtype=t).masked_fill(
        torch.rand(s[0], 1, 1, s[4]) > 0.8, torch.finfo(t).max
    ),
}


def some_hidden(sq: int, sk: int) -> Tensor:
    """A bool mask with holes, and rows that see nothing."""
    mask = torch.rand(sq, sk) > 0.3
    mask[sq // 2 :: 9] = False
    return mask


FACTORS: dict[str, list[Any]] = {
    "shape": SHAPES,
    "dtype": FLOATS,
    "mask": list(MASKS),
    "layout": ["contiguous", "bshd", "slices"],
    "causal": [None, "bottom_right", "top_left"],
    "window": [None, (5, 0), (0, 3), (None, 40), (100, -1), (2, 2)],
    "alibi": [None, "heads", "batch"],
    "softcap": [0.0, 2.0],
    "scale": [None, 0.2],
    "dropout_p": [0.0, 0.3],
}


@dataclass
class Case:
    """Arguments of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Those that are floating and may have gradients."""
        named = {"q": self.q, "k": self.k, "v": self.v}
        mask = self.options.get("attn_mask")
        return named if mask is None or mask.dtype == torch.bool else {**named, "mask": mask}

    def to(self, dtype: torch.dtype) -> Case:
        """q, k, v and what floats among the options in one dtype."""
        options = {
            n: o.to(dtype) if isinstance(o, Tensor) and o.is_floating_point() else o
            for n, o in self.options.items()
        }
        return Case(self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), options)

    def leaves(self, *names: str) -> tuple[Case, list[Tensor]]:
        """A copy whose tensors of these names, all if none, are leaves that require grad."""
        own = {
            name: t.detach().requires_grad_(name in names or not names)
            for name, t in self.tensors().items()
        }
        options = {**self.options, **({"attn_mask": own["mask"]} if "mask" in own else {})}
        wanted = [t for t in own.values() if t.requires_grad]
        return Case(own["q"], own["k"], own["v"], options), wanted

    def call(self, f: Callable[..., Any], **more: Any) -> Any:
        return f(self.q, self.k, self.v, **self.options, **more)


def matrix(**restricted: list[Any]) -> list[dict[str, Any]]:
    return covering({**FACTORS, **restricted})


def name_of(choice: dict[str, Any]) -> str:
    words = {n: v for n, v in choice.items() if v not in (None, 0.0, "none", "contiguous")}
    words["shape"] = "x".join(map(str, choice["shape"]))
    words["dtype"] = str(choice["dtype"])[6:]
    return " ".join(v if n in ("shape", "dtype") else f"{n}={v}" for n, v in words.items())


def make(choice: dict[str, Any]) -> Case:
    b, hq, hkv, sq, sk, d, dv = shape = choice["shape"]
    dtype, layout = choice["dtype"], choice.get("layout", "contiguous")
    tensors = (
        laid_out(torch.randn(s).to(dtype), layout)
        for s in ((b, hq, sq, d), (b, hkv, sk, d), (b, hkv, sk, dv))
    )
    causal, alibi = choice.get("causal"), choice.get("alibi")
    options = {n: choice[n] for n in ("window", "softcap", "scale", "dropout_p") if n in choice}
    options["attn_mask"] = MASKS[choice.get("mask", "none")](shape, dtype)
    if causal is not None:
        options |= {"causal": True, "causal_align": causal}
    if alibi is not None:
        options["alibi_slopes"] = torch.rand(*((b, hq) if alibi == "batch" else (hq,))) / 2
    if options.get("dropout_p"):
        options["dropout_seed"] = 2**40 + 11
    return Case(*tensors, options)


# --- memory layouts -------------------------------------------------------------------------------


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` (B, H, S, D) as models hand them over."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "bshd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return dict(layouts(x))[layout]


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values as ``x`` (B, H, S, D) in memory as it can be found; NaN in between."""
    b, h, s, d = x.shape
    yield "contiguous", x.contiguous()
    yield "bshd", laid_out(x, "bshd")
    wide = poison((b, s, h + 3, d), x.dtype)
    wide[:, :, 2 : 2 + h] = x.transpose(1, 2)
    yield "slices", wide[:, :, 2 : 2 + h].transpose(1, 2)
    wide = poison((s, b, h, d + 5), x.dtype)
    wide[..., 3 : 3 + d] = x.permute(2, 0, 1, 3)
    yield "columns of (S, B, H, D)", wide[..., 3 : 3 + d].permute(1, 2, 0, 3)
    wide = poison((b, h, 2 * s, d), x.dtype)
    wide[:, :, ::2] = x
    yield "every second row", wide[:, :, ::2]
    wide = poison((b, h, s, 2 * d), x.dtype)
    wide[..., ::2] = x
    yield "every second column", wide[..., ::2]
    yield "transposed", x.mT.contiguous().mT
    store = poison((x.numel() + 1,), x.dtype)
    store[1:] = x.flatten()
    yield "one element off", store[1:].view(x.shape)


# --- reference results ----------------------------------------------------------------------------


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """Output and lse in float64 of the same rounded inputs."""
    out, lse = case.to(torch.float64).call(reference.attention)
    return out, lse


def theirs(case: Case) -> Tensor:
    """What torch makes of the call in the tensors' own dtype: SDPA's result where it has the
    options, with position, slopes and mask as one mask; else that of the formula's own ops."""
    o = case.options
    if o.get("softcap") or o.get("dropout_p"):
        return formula(case)[0]
    attend = F.scaled_dot_product_attention
    more = {"scale": o.get("scale"), "enable_gqa": case.q.shape[1] != case.k.shape[1]}
    return attend(case.q, case.k, case.v, attn_mask=as_one_mask(case), **more)


def as_one_mask(case: Case) -> Tensor | None:
    o, q = case.options, case.q
    align = o.get("causal_align", "bottom_right")
    distance = reference.distances(q.shape[2], case.k.shape[2], align)
    visible = ~reference.hidden_by_position(distance, o.get("causal", False), o.get("window"))
    mask, slopes = o.get("attn_mask"), o.get("alibi_slopes")
    if mask is not None and mask.dtype == torch.bool:
        visible, mask = visible & mask, None
    if slopes is not None:
        bias = -slopes[..., None, None] * distance.abs()
        mask = bias if mask is None else bias + mask
    if mask is not None:
        ends = torch.finfo(q.dtype)
        mask = torch.where(mask.isfinite(), mask.clamp(ends.min, ends.max), mask)
        mask = mask.masked_fill(~visible, -torch.inf)
        # SDPA takes two dimensions or four, and of floating masks q's dtype only.
        return mask.to(q.dtype).expand(*q.shape[:2], *distance.shape)
    if bool(visible.all()):
        return None
    return visible.expand(*q.shape[:2], *distance.shape)


def formula(case: Case) -> tuple[Tensor, Tensor]:
    """Output and lse of the formula's ops, each rounding to the tensors' own dtype."""
    out, lse = case.to(case.q.dtype).call(reference.attention)
    return out, lse


def kernel_of(case: Case) -> str:
    """Of a forward pass without gradients, the tier left out."""
    rows = case.q.shape[1] // case.k.shape[1] * case.q.shape[2]
    bf16 = case.q.dtype == torch.bfloat16
    few = (2 if bf16 else 4) if case.k.shape[2] < 256 else (8 if bf16 else 12)
    if rows > few or case.options.get("dropout_p"):
        return "attention_bf16" if bf16 else "attention_f32"
    return "attention_decode_" + {4: "f32", 2: "bf16" if bf16 else "f16"}[case.q.itemsize]


def lse_in_fp32(case: Case) -> Tensor:
    """What fp32 makes of the same rounded inputs: the lse is fp32 whatever q's dtype is."""
    lse: Tensor = case.to(torch.float32).call(reference.attention)[1]
    return lse


# --- the policy -----------------------------------------------------------------------------------

# How far the sum of a row's exponentials may be off beyond what its scores are: the op's docstring
# bounds 2^x by 2e-7 (3e-6 before probabilities are rounded to bf16), a logarithm comes to it. The
# bf16 lse of torch's own kernel is off by up to 6e-5.
LSE_BOUNDS = {"fp32": 3e-7, "bf16": 4e-6}


CAPPED_FACTOR = 3.0  # tanh has 2.5 ulp, torch's about 1
SCALAR_FACTOR = 2.5  # products and sums are rounded apart: with D = 256, twice torch's error in all


def factor(case: Case) -> float:
    """Of torch's error, what a result may have."""
    if case.options.get("softcap"):
        return CAPPED_FACTOR
    return SCALAR_FACTOR if _native.active_isa() == "scalar" else FACTOR


def check_lse(case: Case, lse: Tensor, products: str | None = None, luck: float = 1.0) -> None:
    """Absolutely, since the lse is an exponent: the bound of e^x, and three times what fp32 is off
    by. Twice would be the policy, but that the scores of torch's own kernel (which gives no lse
    beside a mask) are off by 1.3 times what those of its matmul are."""
    bound = LSE_BOUNDS[products or ("bf16" if case.q.dtype == torch.bfloat16 else "fp32")]
    sums = exact(case)[1]
    assert lse.dtype == torch.float32
    assert measure_error(lse, sums).maximum < torch.inf, "a wrong NaN or infinity"
    seen = sums.isfinite()
    if bool(seen.any()):
        error, other = ((t[seen] - sums[seen]).abs().max() for t in (lse, lse_in_fp32(case)))
        floor = FLOOR_ULPS * torch.finfo(torch.float32).eps * sums[seen].abs().max()
        limit = luck * (bound + max(3 * other, floor))
        assert error <= limit, f"lse is off by {error:.3g}, above {limit:.3g}; fp32 by {other:.3g}"


def check_forward(case: Case, out: Tensor, lse: Tensor, luck: float = 1.0) -> None:
    """Output and lse of a call against float64: the policy of docs/numerics.md."""
    assert out.shape == (*case.q.shape[:-1], case.v.shape[-1]) and lse.shape == case.q.shape[:-1]
    assert_no_worse(out, theirs(case), exact(case)[0], factor=luck * factor(case))
    check_lse(case, lse, luck=luck)
