"""Parameters that accelerate's hooks keep elsewhere until a module runs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def loaded_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over `named_parameters`, with the values of those that a device map keeps off their
    devices."""
    for name, parameter in module.named_parameters():
        yield from at_hand(module, {name: parameter}).items()


def at_hand(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the kept values into `tensors`, by their names in `module`, where these are empty."""
    whole = {}
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        empty = tensor.device.type == "meta"
        whole[name] = loaded(module.get_submodule(owner), last) if empty else tensor
    return whole


def loaded(module: nn.Module, name: str) -> Tensor:
    """Return the parameter `name` of `module`; where accelerate keeps it in the host's memory or on
    disk and puts an empty one in its place, return the one that is kept."""
    parameter = getattr(module, name)
    if parameter.device.type == "meta":
        for hook in hooks_of(module):
            if getattr(hook, "weights_map", None) is not None:
                return hook.weights_map[name]
    return parameter


def hooks_of(module: nn.Module) -> tuple:
    """List the hooks that accelerate hung before and behind a module's forward."""
    hook = getattr(module, "_hf_hook", None)
    return (hook, *getattr(hook, "hooks", ()))
