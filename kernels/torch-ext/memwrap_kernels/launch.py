"""What the host side of all kernels shares: what can run where, and how tensors are handed over."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from . import infini_kernels
from .tiles import precision


def interpreted() -> bool:
    """Tell whether Triton's interpreter was chosen (TRITON_INTERPRET=1 before the first import)."""
    return not isinstance(infini_kernels.outer_kernel, triton.JITFunction)


def runs_on(device: torch.device) -> bool:
    """Tell whether the kernels can run on tensors of this device."""
    return device.type == "cuda" or (device.type == "cpu" and interpreted())


def is_hip() -> bool:
    return torch.version.hip is not None


def rule(dtype: torch.dtype, hip: bool) -> str:
    """Choose PRECISION for `products.dot` on operands of this dtype."""
    return "wide" if interpreted() else precision(dtype, hip)


def rows(x: Tensor) -> Tensor:
    """Return the tensor itself where its last dimension is dense; a dense copy otherwise."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def flags(mask: Tensor | None, like: Tensor) -> Tensor:
    """Return a mask as bytes; any tensor in place of none (a pointer that is never read)."""
    return like if mask is None else mask.contiguous().view(torch.uint8)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Send launches inside to the tensor's own GPU: Triton launches on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
