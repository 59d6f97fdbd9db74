"""Which weights are these: a short hash of a model's parameters, cheap at any size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

# So many numbers of each tensor are hashed, evenly spread: training changes nearly all of them.
_SAMPLES = 4096


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash over names, shapes, dtypes and evenly spread values of the tensors."""
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
    """The plain tensors that a quantised (or sharded) one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def loaded_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`named_parameters`, with the values of those that a device map keeps off their devices."""
    for name, parameter in module.named_parameters():
        if parameter.device.type == "meta":
            owner, _, own = name.rpartition(".")
            yield name, loaded(module.get_submodule(owner), own)
        else:
            yield name, parameter


def loaded(module: nn.Module, name: str) -> Tensor:
    """The parameter `name` of `module` itself; where accelerate keeps it in the host's memory or
    on disk and puts an empty one in its place, the one that is kept."""
    parameter = getattr(module, name)
    if parameter.device.type == "meta":
        for hook in hooks_of(module):
            if getattr(hook, "weights_map", None) is not None:
                return hook.weights_map[name]
    return parameter


def hooks_of(module: nn.Module) -> tuple:
    """What accelerate hung before and behind a module's forward."""
    hook = getattr(module, "_hf_hook", None)
    return (hook, *getattr(hook, "hooks", ()))
