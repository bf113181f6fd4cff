"""The checks of attention's fake kernels: what csrc/cpu/attention_problem.cpp refuses."""

from __future__ import annotations

import torch
from torch import Tensor

from pybigmodel.ops import _checks as check

MAX_HEAD_DIM = 256


def check_attention(op: str, q: Tensor, k: Tensor, v: Tensor, dim: int) -> None:
    check.check_float(op, "q", q)
    check.check_dim(op, "q", q, dim)
    heads_at, rows_at = 1, 2 if dim == 4 else 0  # (B, H, S, D) or (T, H, D)
    for name, tensor in (("k", k), ("v", v)):
        check.check_dim(op, name, tensor, dim)
        check.check_dtype(op, name, tensor, q.dtype)
        check.check_same_device(op, name, tensor, q)
        if dim == 4:
            torch._check(
                tensor.shape[0] == q.shape[0],
                lambda name=name, tensor=tensor: (
                    f"{op}: {name} must have q's batch size {q.shape[0]}, got shape "
                    f"{tuple(tensor.shape)}"
                ),
            )
    for at in (heads_at, rows_at):
        torch._check(
            k.shape[at] == v.shape[at],
            lambda: (
                f"{op}: v must have k's heads and length, k has shape {tuple(k.shape)}, got v of "
                f"shape {tuple(v.shape)}"
            ),
        )
    hq, hkv = q.shape[heads_at], k.shape[heads_at]
    torch._check(
        hq % hkv == 0 if hkv else hq == 0,
        lambda: f"{op}: q's heads must be a multiple of k's {hkv}, got {hq}",
    )
    torch._check(
        k.shape[-1] == q.shape[-1],
        lambda: f"{op}: k must have q's last dimension {q.shape[-1]}, got shape {tuple(k.shape)}",
    )
    for name, tensor in (("q", q), ("v", v)):
        torch._check(
            1 <= tensor.shape[-1] <= MAX_HEAD_DIM,
            lambda name=name, tensor=tensor: (
                f"{op}: {name}'s last dimension must be in 1..{MAX_HEAD_DIM}, got "
                f"{tensor.shape[-1]}"
            ),
        )


def check_mask(op: str, mask: Tensor | None, q: Tensor, k: Tensor, name: str = "q") -> None:
    if mask is None:
        return
    full = (*q.shape[:-1], k.shape[-2])
    torch._check(
        mask.dtype in (torch.bool, torch.float32, q.dtype),
        lambda: (
            f"{op}: attn_mask must be bool, float32 or {check.name_of(q.dtype)} as {name} is, got "
            f"{check.name_of(mask.dtype)}"
        ),
    )
    check.check_same_device(op, "attn_mask", mask, q)

    def message() -> str:
        return (
            f"{op}: attn_mask must be broadcastable to {tuple(full)}, got shape {tuple(mask.shape)}"
        )

    torch._check(mask.dim() <= len(full), message)
    for got, want in zip(reversed(mask.shape), reversed(full), strict=False):
        torch._check(got == 1 or got == want, message)


def check_on_cpu(op: str, name: str, tensor: Tensor, q: Tensor) -> None:
    """Numbers that the op reads; where q has no data, they need none."""
    torch._check(
        tensor.device.type == "cpu" or (q.is_meta and tensor.is_meta),
        lambda: f"{op}: {name} must be on the CPU; got {tensor.device}",
    )


def check_dropout(op: str, dropout_seed: Tensor | None, dropout_p: float, q: Tensor) -> None:
    torch._check(0 <= dropout_p <= 1, lambda: f"{op}: dropout_p must be in [0, 1], got {dropout_p}")
    if dropout_p != 0:
        torch._check(
            dropout_seed is not None,
            lambda: f"{op}: dropout_seed must be given where dropout_p is not 0",
        )
        assert dropout_seed is not None
        check.check_dtype(op, "dropout_seed", dropout_seed, torch.int64)
        check_on_cpu(op, "dropout_seed", dropout_seed, q)
        torch._check(
            dropout_seed.numel() == 1,
            lambda: (
                f"{op}: dropout_seed must have one element, got shape {tuple(dropout_seed.shape)}"
            ),
        )


def check_options(
    op: str,
    q: Tensor,
    batch: int,
    heads: int,
    alibi_slopes: Tensor | None,
    dropout_seed: Tensor | None,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    dropout_p: float,
    scale: float,
    precision: int,
) -> None:
    torch._check(
        softcap == 0 or 1e-30 <= softcap <= 1e30,
        lambda: f"{op}: softcap must be 0 or in 1e-30..1e30, got {softcap}",
    )
    torch._check(abs(scale) <= 1e38, lambda: f"{op}: scale must be in -1e38..1e38, got {scale}")
    torch._check(
        precision in (0, 1),
        lambda: f"{op}: precision must be 0 (fp32) or 1 (bf16), got {precision}",
    )
    check_dropout(op, dropout_seed, dropout_p, q)
    if alibi_slopes is not None:
        check.check_dtype(op, "alibi_slopes", alibi_slopes, torch.float32)
        check.check_same_device(op, "alibi_slopes", alibi_slopes, q)

        def message() -> str:
            return (
                f"{op}: alibi_slopes must have shape ({heads},) or ({batch}, {heads}), got "
                f"{tuple(alibi_slopes.shape)}"
            )

        torch._check(alibi_slopes.dim() in (1, 2), message)
        expected = (heads,) if alibi_slopes.dim() == 1 else (batch, heads)
        for got, want in zip(alibi_slopes.shape, expected, strict=True):
            torch._check(got == want, message)


def check_starts(op: str, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q: Tensor) -> None:
    """Not their values, which a fake tensor has not."""
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_on_cpu(op, name, starts, q)
        check.check_dtype(op, name, starts, torch.int32, torch.int64)
        torch._check(
            starts.dim() == 1 and starts.shape[0] >= 1,
            lambda name=name, starts=starts: (
                f"{op}: {name} must have shape (sequences + 1,), got {tuple(starts.shape)}"
            ),
        )
    torch._check(
        cu_seqlens_q.shape[0] == cu_seqlens_k.shape[0],
        lambda: (
            f"{op}: cu_seqlens_k must have cu_seqlens_q's shape ({cu_seqlens_q.shape[0]},), got "
            f"{tuple(cu_seqlens_k.shape)}"
        ),
    )
