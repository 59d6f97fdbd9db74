"""Hashes of weights: which ones wrote a state, which base a memory was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

# So many numbers of each tensor are hashed, evenly spread: training changes nearly all of them.
_SAMPLES = 4096


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash names, shapes, dtypes and evenly spread values of the tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        for part in _parts(tensor.detach()):
            flat = part.reshape(-1)
            step = max(1, flat.numel() // _SAMPLES)
            sample = flat[::step].contiguous().cpu()
            if sample.numel():
                digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _parts(tensor: Tensor) -> list[Tensor]:
    """List the plain tensors that a quantised (or sharded) one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]
