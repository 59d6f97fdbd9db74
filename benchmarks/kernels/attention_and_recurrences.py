"""Landmark attention, gated linear attention and the delta rule: checks and times on a GPU.

`on_gpu.py` calls this. The kernels are held against float64, then timed in one run beside what a
user would take otherwise: causal SDPA for Landmark attention (which does more), memwrap's chunked
torch for the recurrences, and flash-linear-attention where it is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memwrap_kernels import delta, gla, landmark

Run = Callable[..., Sequence[Tensor]]
Check = Callable[[Run, Run, list[Tensor], torch.dtype], float]
Clock = Callable[[Callable[[], Any]], float | str]

BLOCK = 63
LANDMARK = {  # B, H, Hkv, T, D
    "batch 1, 32 heads on 8, head dim 128, 8192 tokens": (1, 32, 8, 8_192, 128),
    "batch 1, 16 heads, head dim 128, 32768 tokens": (1, 16, 16, 32_768, 128),
    "batch 4, 32 heads on 8, head dim 64, 4096 tokens": (4, 32, 8, 4_096, 64),
}
RECURRENCES = {  # B, H, T, D: the shapes of flash-linear-attention's own benchmarks
    "batch 1, 96 heads, head dim 128, 8192 tokens": (1, 96, 8_192, 128),
    "batch 2, 16 heads, head dim 128, 16384 tokens": (2, 16, 16_384, 128),
    "batch 4, 16 heads, head dim 128, 2048 tokens": (4, 16, 2_048, 128),
    "batch 4, 64 heads, head dim 128, 4096 tokens": (4, 64, 4_096, 128),
    "batch 8, 32 heads, head dim 256, 2048 tokens": (8, 32, 2_048, 256),
    "batch 8, 8 heads, head dim 64, 1024 tokens": (8, 8, 1_024, 64),
}
RULES = ("no gate", "a gate a head", "a gate a channel", "delta", "gated delta")
HEAD_GATED = ("a gate a head", "gated delta")
UNGATED = ("no gate", "delta")


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def two_softmaxes(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> Sequence[Tensor]:
    """Landmark attention over all pairs, one document."""
    group, (queries, tokens) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    x = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    j, stride = torch.arange(tokens, device=q.device), block_size + 1
    p = j[tokens - queries :, None]
    mark, own, earlier = (
        j % stride == block_size,
        j // stride == p // stride,
        j // stride < p // stride,
    )
    outer = (own & (j <= p) & ~mark) | (earlier & mark)
    lse = x.masked_fill(~outer, -torch.inf).logsumexp(-1)
    top = (x - lse[..., None]).exp() * outer
    weights = top * ~mark
    for s in range((tokens - 1) // stride):
        inside = earlier & (j // stride == s) & ~mark
        some = inside.any(-1, keepdim=True)
        inner = x.masked_fill(~(inside | ~some), -torch.inf).softmax(-1) * inside
        weights = weights + top[..., s * stride + block_size, None] * inner
    return weights @ v, lse


def token_by_token(rule: str) -> Run:
    """The recurrences as they are written."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, group = [], q.shape[1] // k.shape[1]
        for t in range(q.shape[2]):
            if rule in HEAD_GATED:
                state = state * g[:, :, t, None, None].exp()
            elif rule not in UNGATED:
                state = state * g[:, :, t, :, None].exp()
            change = v[:, :, t]
            if "delta" in rule:
                change = change - (k[:, :, t, :, None] * state).sum(-2)
                change = change * beta[:, :, t, None]
            state = state + k[:, :, t, :, None] * change[..., None, :]
            own = state.repeat_interleave(group, 1)
            rows.append((q[:, :, t, :, None] * own).sum(-2) * q.shape[-1] ** -0.5)
        return torch.stack(rows, 2), state

    return run


def by_kernel(rule: str) -> Run:
    def run(
        q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor]:
        scale, gates = q.shape[-1] ** -0.5, None if rule in UNGATED else g
        if "delta" in rule:
            return delta.scan(q, k, v, beta, gates, state, scale)
        return gla.scan(q, k, v, gates, state, scale)

    return run


def by_torch(rule: str) -> Run | None:
    """memwrap's chunked torch, where this version has it."""
    try:
        ops = importlib.import_module("memwrap.ops." + ("delta" if "delta" in rule else "gla"))
    except ImportError:
        return None
    from memwrap.ops import backend

    def run(
        q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor]:
        gates = None if rule in UNGATED else g
        with backend("torch"):
            if "delta" in rule:
                return ops.scan(q, k, v, beta, gates, state)
            return ops.scan(q, k, v, gates, state)

    return run


def by_fla(rule: str) -> Run | None:
    """flash-linear-attention, where it is installed: tokens before heads."""
    try:
        found = importlib.import_module("fla.ops")
    except ImportError:
        return None

    def run(
        q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k, v, g = (x.transpose(1, 2) for x in (q, k, v, g))
        beta, given = beta.transpose(1, 2).to(q.dtype), {}
        given = {"initial_state": state, "output_final_state": True}
        if rule == "delta":
            return found.chunk_delta_rule(q, k, v, beta, **given)
        if rule == "gated delta":
            return found.chunk_gated_delta_rule(q, k, v, g, beta, **given)
        if rule == "a gate a channel":
            return found.chunk_gla(q, k, v, g, **given)
        return found.chunk_simple_gla(q, k, v, None if rule in UNGATED else g, **given)

    return run


def inputs(
    rule: str, batch: int, heads: int, own: int, tokens: int, keys: int, values: int,
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """q, unit keys, v, states, gates (one a head or one a channel) and betas."""
    kept = torch.promote_types(dtype, torch.float32)
    rows = (batch, own, tokens)
    key = draw(*rows, keys, dtype=torch.float32)
    return [
        draw(batch, heads, tokens, keys, dtype=dtype),
        (key / key.norm(dim=-1, keepdim=True)).to(dtype),
        draw(*rows, values, dtype=dtype),
        draw(batch, own, keys, values, dtype=kept),
        -draw(*rows, *(() if rule in HEAD_GATED else (keys,)), dtype=kept).abs() * 0.1,
        torch.rand(*rows, device="cuda", dtype=kept),
    ]


def checked(check: Check, dtypes: Sequence[torch.dtype]) -> dict[str, float]:
    """Largest errors of outputs and gradients against float64, over each one's largest value."""
    found = {}
    for dtype in dtypes:
        for width, size in ((64, 63), (128, 63), (128, 64), (64, 20), (128, 200), (256, 63)):
            if dtype == torch.float32 and width > 64:
                continue
            own = [draw(1, h, n, width, dtype=dtype) for h, n in ((4, 300), (2, 700), (2, 700))]
            name = f"landmark {dtype} {width}, blocks of {size}"
            found[name] = check(
                lambda *x, size=size: landmark.attention(*x, size),
                lambda *x, size=size: two_softmaxes(*x, size),
                own, dtype,
            )  # fmt: skip
        for rule in RULES:
            for keys, values in ((64, 64), (128, 128), (80, 96), (256, 128)):
                own = inputs(rule, 2, 4, 2, 333, keys, values, dtype)
                name = f"{rule} {dtype} {keys} and {values}"
                found[name] = check(by_kernel(rule), token_by_token(rule), own, dtype)
    return found


def both(run: Run, leaves: list[Tensor], clock: Clock) -> dict[str, float | str]:
    """Forward, and forward with backward."""

    def forward() -> None:
        with torch.no_grad():
            run(*leaves)

    def backward() -> None:
        sum(x.float().sum() for x in run(*leaves)).backward()  # type: ignore[union-attr]

    return {"forward": clock(forward), "both": clock(backward)}


def as_in_models(given: list[Tensor]) -> list[Tensor]:
    """Leaves in which a token's heads lie together, as projections leave them and as
    flash-linear-attention takes them, and whose gates are as strong as in its benchmarks."""
    given[4] = F.logsigmoid(torch.randn_like(given[4])).clamp_min(-5)
    return [
        x.requires_grad_()
        if n == 3  # the state
        else x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for n, x in enumerate(given)
    ]


def causal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),)


def timed(clock: Clock, quick: bool) -> dict[str, Any]:
    """Milliseconds of every version of each shape."""
    found: dict[str, Any] = {"landmark": {}, "recurrences": {}}
    shapes = list(LANDMARK.items())
    for name, (batch, heads, own, tokens, width) in shapes[:1] if quick else shapes:
        leaves = [draw(batch, h, tokens, width).requires_grad_() for h in (heads, own, own)]
        found["landmark"][name] = {
            "triton": both(lambda *x: landmark.attention(*x, BLOCK)[:1], leaves, clock),
            "causal SDPA": both(causal, leaves, clock),
        }
    rows = list(RECURRENCES.items())
    for name, (batch, heads, tokens, width) in rows[:1] if quick else rows:
        found["recurrences"][name] = {}
        for rule in RULES:
            given = inputs(rule, batch, heads, heads, tokens, width, width, torch.bfloat16)
            leaves = as_in_models(given)
            versions = {"triton": by_kernel(rule), "torch": by_torch(rule), "fla": by_fla(rule)}
            found["recurrences"][name][rule] = {
                label: both(run, leaves, clock) for label, run in versions.items() if run
            }
        # What a kernel that mixed in the window's output itself could save at most.
        v, local = leaves[2].detach(), torch.randn_like(leaves[2])
        found["recurrences"][name]["mixing two branches"] = clock(
            partial(torch.lerp, v, local, 0.5)
        )
        q, k, v, state, g, beta = (x.detach()[:, :, :1] for x in leaves)
        state = leaves[3].detach()
        by_delta = partial(delta.step, q, k, v, g, beta, state, width**-0.5)
        wide = g[..., None].expand_as(k).contiguous()
        by_channel = partial(delta.step, q, k, v, wide, None, state, width**-0.5)
        found["recurrences"][name]["one step"] = {
            "a gate a channel": clock(by_channel), "gated delta": clock(by_delta),
        }  # fmt: skip
        torch.cuda.empty_cache()
    return found
