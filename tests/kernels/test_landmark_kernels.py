"""Landmark attention's kernels: numbers and gradients against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import DEVICE, agree, draw
from torch import Tensor

from memwrap_kernels import landmark

TOLERANCE = 2e-5 if DEVICE == "cpu" else 2e-3


def reference(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The two softmaxes over all pairs."""
    group, (queries, tokens) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    x = q @ k.transpose(-1, -2) * scale
    p = torch.arange(tokens - queries, tokens, device=q.device)[:, None]
    j = torch.arange(tokens, device=q.device)
    section, stride = j // (block_size + 1), block_size + 1
    landmark_key = j % stride == block_size
    first = torch.zeros_like(p) if starts is None else starts[:, None, :, None]
    own = (section == p // stride) & (j <= p) & ~landmark_key & (j >= first)
    earlier = (section < p // stride) & (j >= first)
    outer = (own | (earlier & landmark_key)).expand(x.shape)
    lse = x.masked_fill(~outer, -torch.inf).logsumexp(-1)
    top = (x - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp().masked_fill(~outer, 0.0)
    weights = top.masked_fill(landmark_key, 0.0)
    for s in range(tokens // stride):
        inside = earlier & (section == s) & ~landmark_key
        some = inside.any(-1, keepdim=True)
        inner = x.masked_fill(~(inside | ~some), -torch.inf).softmax(-1) * inside
        weights = weights + top[..., s * stride + block_size, None] * inner
    return weights @ v, lse


def compared(
    function: Callable[..., tuple[Tensor, Tensor]], leaves: tuple[Tensor, ...], seen: Tensor | None
) -> list[Tensor]:
    """Output, log-sum-exp where something is seen, and the gradients of their weighted sum."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)
    out, lse = function(*leaves)
    if seen is not None:
        lse = lse.masked_fill(~seen[:, None], 0.0)
    loss = (out * draw(*out.shape, seed=70, dtype=out.dtype)).sum()
    loss = loss + (lse * draw(*lse.shape, seed=71, dtype=lse.dtype)).sum()
    grads = torch.autograd.grad(loss, leaves)
    return [x.detach().float().cpu() for x in (out, lse, *grads)]


def starts_of(batch: int, queries: int, tokens: int, ends: tuple[int, ...]) -> Tensor:
    """Documents that end at `ends`; what follows the last is padding. Row 0 has no documents."""
    starts = torch.full((batch, tokens), tokens)
    for begin, end in zip((0, *ends), ends, strict=False):
        starts[:, begin:end] = begin
    starts[0] = 0
    return starts[:, tokens - queries :].to(DEVICE)


@pytest.mark.parametrize(
    ("sizes", "block_size", "documents", "dtype"),
    [  # B, H, Hkv, Tq, Tk, D
        ((1, 4, 2, 43, 43, 20), 4, None, torch.float32),  # many sections a tile, a partial one
        ((2, 2, 1, 70, 70, 8), 15, (32, 61), torch.float32),  # landmark inside the tile
        ((1, 1, 1, 81, 81, 16), 16, None, torch.bfloat16),  # landmark beside the tile
        ((1, 2, 1, 21, 107, 8), 40, None, torch.float32),  # history; two tiles a section
        ((2, 1, 1, 60, 140, 16), 66, (67, 134), torch.float16),  # three tiles, documents
        ((1, 3, 1, 1, 12, 5), 3, None, torch.float32),  # one query
        ((1, 1, 1, 9, 9, 3), 1, None, torch.float32),
    ],
)
def test_numbers(
    sizes: tuple[int, ...], block_size: int, documents: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    batch, heads, own, queries, tokens, width = sizes
    leaves = (
        draw(batch, heads, queries, width, seed=1, dtype=dtype),
        draw(batch, own, tokens, width, seed=2, dtype=dtype),
        draw(batch, own, tokens, width, seed=3, dtype=dtype),
    )
    starts = None if documents is None else starts_of(batch, queries, tokens, documents)
    seen = None if starts is None else starts < tokens

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        return landmark.attention(*x, block_size, scale=0.4, starts=starts)

    def naive(*x: Tensor) -> tuple[Tensor, Tensor]:
        return reference(*x, block_size, 0.4, starts)

    want = compared(naive, tuple(x.double() for x in leaves), seen)
    # Half types round the weights and their gradients before they are multiplied.
    tolerance = TOLERANCE if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
    agree(compared(run, leaves, seen), want, tolerance, dtype)


def test_padding_reads_nothing_and_reaches_nothing() -> None:
    q, k, v = (draw(1, 2, 13, 4, seed=n).requires_grad_() for n in (1, 2, 3))
    starts = torch.tensor([[0] * 10 + [13] * 3], device=DEVICE)
    out, lse = landmark.attention(q, k, v, 4, starts=starts)
    assert bool((out[:, :, 10:] == 0).all()) and bool((lse[:, :, 10:] == -torch.inf).all())
    out.sum().backward()
    assert q.grad is not None and bool((q.grad[:, :, 10:] == 0).all())
    assert k.grad is not None and bool((k.grad[:, :, 10:] == 0).all())
    assert bool(torch.cat([k.grad, q.grad]).isfinite().all())


def test_views_in_any_layout() -> None:
    q, k, v = (draw(1, 11, 2, 4, seed=n).transpose(1, 2) for n in (1, 2, 3))
    odd = k.transpose(2, 3).contiguous().transpose(2, 3)
    got, _ = landmark.attention(q, odd, v, 4)
    want, _ = reference(q, k, v, 4, 0.5)
    assert float((got - want).abs().max()) < TOLERANCE


def test_no_queries() -> None:
    q, k, v = (draw(2, 2, 0, 4, seed=1).requires_grad_() for _ in range(3))
    out, lse = landmark.attention(q, k, v, 4)
    assert out.shape == q.shape and lse.shape == (2, 2, 0)
    out.sum().backward()


def test_bad_calls_are_refused() -> None:
    q, k = draw(1, 2, 3, 4, seed=1), draw(1, 1, 3, 4, seed=2)
    with pytest.raises(ValueError, match="block_size is 0"):
        landmark.attention(q, k, k, 0)
    with pytest.raises(ValueError, match="one dtype"):
        landmark.attention(q.double(), k, k, 2)
    with pytest.raises(ValueError, match="multiple of Hkv"):
        landmark.attention(q, k[:, :, :2], k[:, :, :2], 2)
    with pytest.raises(ValueError, match="goes up to 128"):
        landmark.attention(*(torch.zeros(1, 1, 1, 129) for _ in range(3)), 2)
    with pytest.raises(ValueError, match="starts is"):
        landmark.attention(q, k, k, 2, starts=torch.zeros(1, 2))


def test_operator_is_registered_as_torch_wants_it() -> None:
    q, k, v = (draw(1, 2, 7, 4, seed=n).requires_grad_() for n in (1, 2, 3))
    starts = torch.tensor([[0] * 4 + [4] * 3], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(landmark.forward, (q, k, v, starts, 3, 0.5))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_whole(compiler: str) -> None:
    leaves = (draw(1, 2, 9, 4, seed=1), draw(1, 1, 9, 4, seed=2), draw(1, 1, 9, 4, seed=3))

    def run(*x: Tensor) -> Any:
        return landmark.attention(*x, 3)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    want = compared(lambda *x: reference(*x, 3, 0.5), leaves, None)
    agree(compared(compiled, leaves, None), want, TOLERANCE, torch.float32)
