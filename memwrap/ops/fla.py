"""The kernels of flash-linear-attention for gated linear attention, slots and the delta rule.

It is used where it is installed (`pip install fla-core`), on a GPU, for bfloat16 and float16. No
GPU has run it from here; `benchmarks/fla_agreement.py` compared 0.5.2 and 0.6.0 on a CPU.
Arguments and shapes are those of `gla.scan`, `gsa.scan` and `delta.scan`. There tokens stand before
heads and keys have as many heads as queries; log gates, strengths, the scale, the states in float32
and the bounds of joined sequences mean the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

OLDEST = (0, 5)
DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
MODULES = ("gla", "simple_gla", "gsa", "delta_rule", "gated_delta_rule")
# Up to so many tokens without gradients go one after another, as in the library's own layers.
RECURRENT = 64
_MOST_KEYS = 256  # of a head, in the delta rules


@cache
def _problem() -> str:
    try:
        version = importlib.import_module("fla").__version__
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            return f"its version is {version}; it must be {'.'.join(map(str, OLDEST))} or newer"
        for name in MODULES:
            importlib.import_module(f"fla.ops.{name}")
    except ModuleNotFoundError as error:
        return f"it is not installed ({error}); `pip install fla-core` adds it"
    except Exception as error:  # its import asks Triton and the device many things
        return f"its import fails: {error}"
    return ""


@torch.compiler.assume_constant_result
def problem() -> str:
    """Say why flash-linear-attention cannot be used at all; empty if it can."""
    return _problem()


def unsupported(q: Tensor, state: Tensor, beta: Tensor | None = None) -> str:
    """Say why flash-linear-attention cannot take a call; empty if it can.

    Args:
        q: queries `(B, H, T, Dk)`.
        state: the first state, of the keys.
        beta: strengths of the delta rule; None for the other recurrences.
    """
    if q.device.type not in DEVICES:
        return f"tensors on {q.device.type}; it needs a GPU"
    if q.dtype not in DTYPES or state.dtype != torch.float32:
        # In float32 it multiplies in TF32 or refuses.
        return f"inputs in {q.dtype}; it takes bfloat16 and float16"
    if not q.shape[2]:
        return "no tokens"
    if beta is not None and beta.dim() == 4:
        return "a beta for each value channel"
    if beta is not None and q.shape[3] > _MOST_KEYS:
        return f"keys of {q.shape[3]} channels; it takes up to {_MOST_KEYS}"
    return problem()


def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan as `gla.scan` does."""
    by_channel = g is not None and g.dim() == 4
    function = _function("gla" if by_channel else "simple_gla", q, k, v, g, state)
    names = {"gk" if by_channel and "recurrent" in function.__name__ else "g": g}
    out, (last,) = _call(function, q, (k, v), names, (state,), scale, cu_seqlens)
    return out, last


def delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float,
    l2norm: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan as `delta.scan` does, with one strength a head."""
    module = "delta_rule" if g is None else "gated_delta_rule"
    function = _function(module, q, k, v, beta, g, state)
    names = {"beta": beta} | ({} if g is None else {"g": g})
    out, (last,) = _call(
        function, q, (k, v), names, (state,), scale, cu_seqlens, use_qk_l2norm_in_kernel=l2norm
    )
    return out, last


def gsa(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, state: tuple[Tensor, Tensor],
    scale: float,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Scan as `gsa.scan` does; what the slots take in is rounded to the queries' dtype."""
    function = _function("gsa", q, k, v, s, g, *state)
    out, (keys, values) = _call(function, q, (k, v, s.to(q.dtype)), {"g": g}, state, scale, None)
    return out, (keys, values)


def _function(module: str, *given: Tensor | None) -> Callable[..., Any]:
    """Choose between the chunked form and, for few tokens without gradients, the recurrent one."""
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    few = given[0] is not None and given[0].shape[2] <= RECURRENT
    kind = "fused_recurrent" if few and not trains else "chunk"
    return getattr(importlib.import_module(f"fla.ops.{module}"), f"{kind}_{module}")


def _call(
    function: Callable[..., Any], q: Tensor, inputs: tuple[Tensor, ...],
    named: Mapping[str, Tensor | None], states: tuple[Tensor, ...], scale: float,
    cu_seqlens: Tensor | None, **options: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Call one of the library's functions with its layout, and give its results in ours."""
    group = q.shape[1] // inputs[0].shape[1]

    def turned(x: Tensor | None) -> Tensor | None:
        """Lay out `(B, Hkv, T, ...)` as `(B, T, H, ...)`."""
        if x is None:
            return None
        return (x if group == 1 else x.repeat_interleave(group, 1)).transpose(1, 2).contiguous()

    first = [x if group == 1 else x.repeat_interleave(group, 1) for x in states]
    out, last = function(
        q.transpose(1, 2).contiguous(), *map(turned, inputs),
        **{name: turned(x) for name, x in named.items()}, scale=scale,
        initial_state=first[0] if len(first) == 1 else tuple(first), output_final_state=True,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long(), **options,
    )  # fmt: skip
    # The copies of a state have seen the same tokens.
    ends = tuple(x[:, ::group].contiguous() for x in ((last,) if len(first) == 1 else last))
    return out.transpose(1, 2), ends
