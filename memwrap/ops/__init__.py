"""The mathematics of the memories as pure functions, and the choice of implementation.

`naive` is the specification, plain and slow; `torch` is the fast (chunked) one; `triton` the
kernels of `memwrap_kernels`; `fla` those of flash-linear-attention, for gated linear attention,
gated slots and the delta rules. Left alone, tensors on a GPU take fla where it is installed, then
our kernels where they can; all else takes torch. Use `with memwrap.ops.backend("naive"):` to force
an implementation.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

BACKENDS = ("auto", "naive", "torch", "triton", "fla")
_choice: ContextVar[str] = ContextVar("memwrap_ops_backend", default="auto")


@cache
def _runs_on(device_type: str) -> bool | None:
    try:
        kernels = importlib.import_module("memwrap_kernels")
    except ImportError:
        return None
    return kernels.runs_on(torch.device(device_type))


@torch.compiler.assume_constant_result
def _kernels_run_on(device_type: str) -> bool | None:
    """Tell whether `memwrap_kernels` runs on a kind of device; None if it cannot be imported."""
    return _runs_on(device_type)


@torch.compiler.assume_constant_result
def _chosen() -> str:
    """Give what `backend` set. A function that torch.compile compiled keeps what it saw then."""
    return _choice.get()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the block with one implementation.

    Args:
        name: `"naive"`, `"torch"`, `"triton"`, `"fla"` or `"auto"`. Ops that
            flash-linear-attention does not have run under `"fla"` as under `"auto"`.

    Raises:
        ValueError: for an unknown name, or for kernels that cannot run here. Inside the block
            an op that the kernels cannot do raises a ValueError too.
    """
    if name not in BACKENDS:
        raise ValueError(f"Unknown ops backend {name!r}; allowed: {', '.join(BACKENDS)}.")
    if name == "triton":
        _check_triton()
    elif name == "fla":
        _check_fla()
    token = _choice.set(name)
    try:
        yield
    finally:
        _choice.reset(token)


def _check_triton() -> None:
    if _kernels_run_on("cuda") is None:
        raise ValueError(
            "The Triton kernels are not installed: `import memwrap_kernels` fails. Install triton "
            "(Linux), or use the backend 'torch'."
        )
    if not torch.cuda.is_available() and not _kernels_run_on("cpu"):
        raise ValueError(
            "The Triton kernels need a GPU and none was found. Use the backend 'torch', or set "
            "TRITON_INTERPRET=1 before Python starts to try them on the CPU (very slow)."
        )


def _check_fla() -> None:
    from memwrap.ops import fla

    if fla.problem():
        raise ValueError(f"flash-linear-attention cannot be used: {fla.problem()}.")


def current_backend(
    tensor: Tensor | None = None, unsupported: str = "", fla: str | None = None
) -> str:
    """Give the implementation that an op called now will use: `"naive"`, `"torch"`, `"triton"` or
    `"fla"`.

    Args:
        tensor: what the op is called with (`None`: tensors on the CPU).
        unsupported: why the op's kernels cannot take this call; empty if they can.
        fla: why flash-linear-attention cannot; empty if it can, None if it has no such op.

    Raises:
        ValueError: if the kernels were asked for and cannot do it.
    """
    choice = _chosen()
    if choice in ("naive", "torch"):
        return choice
    device = "cpu" if tensor is None else tensor.device.type
    if choice == "fla" and fla is not None:
        if fla:
            raise ValueError(f"flash-linear-attention cannot do this: {fla}. Use 'auto'.")
        return "fla"
    if choice in ("auto", "fla"):
        # Our kernels are ops that torch.compile takes whole; it stops at flash-linear-attention's.
        if fla == "" and not torch.compiler.is_compiling():
            return "fla"
        usable = device == "cuda" and not unsupported and _kernels_run_on(device)
        return "triton" if usable else "torch"
    if tensor is not None and not _kernels_run_on(device):
        raise ValueError(
            f"The Triton kernels cannot run on {device} tensors; move them to a GPU or use the "
            "backend 'torch'."
        )
    if unsupported:
        raise ValueError(f"The Triton kernels cannot do this: {unsupported}. Use 'torch'.")
    return "triton"


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Choose the dtype in which sums are kept: float32, or float64 for a float64 tensor."""
    return torch.promote_types(tensor.dtype, torch.float32)


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring numbers into another dtype. What float16 has no room for becomes half of the largest
    number that it has: an infinite one would spread, and the backbone adds to what it is given."""
    if dtype != torch.float16 or x.dtype == dtype:
        return x.to(dtype)
    most = torch.finfo(dtype).max / 2
    return x.clamp(-most, most).to(dtype)


def unsupported_dtypes(memory: Tensor, *inputs: Tensor) -> str:
    """Say why kernels cannot take these dtypes: states in float32, inputs in 16 or 32 bits."""
    if memory.dtype != torch.float32:
        return f"a memory in {memory.dtype}; they keep float32"
    for tensor in inputs:
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"inputs in {tensor.dtype}; they take bfloat16, float16 and float32"
    return ""
