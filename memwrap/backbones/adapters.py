"""Adapters inside a backbone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer


@contextmanager
def lora_disabled(model: torch.nn.Module) -> Iterator[None]:
    """Run the block with the adapters of the backbone switched off."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    on = [layer for layer in layers if not layer.disable_adapters]
    trained = [p for layer in on for p in layer.parameters() if p.requires_grad]
    for layer in on:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in on:
            layer.enable_adapters(True)
        for parameter in trained:  # switching adapters also switches what is trained
            parameter.requires_grad_(True)
