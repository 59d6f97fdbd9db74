"""LoRA that PEFT puts on the linear layers of a memory counts before it is merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import MEMORIES
from torch import nn

from memwrap.model.memory_model import MEMORY_CHILD
from memwrap.testing.helpers import assert_close, error_of, ids, wrapped

# peft asks transformers by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is:FutureWarning")
# Settings with which a memory has more linear layers.
MORE: dict[str, tuple[dict[str, Any], ...]] = {
    "armt": ({"token_gate": True},),
    "rmt": ({"gate": "lstm"},),
    "memoryprompt": ({"memory_size": 8},),
}
CASES = [(name, more) for name in MEMORIES for more in ({}, *MORE.get(name, ()))]


def linear_layers(model: Any) -> list[str]:
    modules = model.named_modules()
    return [n for n, m in modules if n.startswith(MEMORY_CHILD) and isinstance(m, nn.Linear)]


def test_cases() -> None:
    """Most memories with linear layers are here, those with foldable ones among them."""
    having = {name for name, more in CASES if linear_layers(wrapped(name, **more))}
    assert having >= {"armt", "hmt", "memory_decoder", "memoryprompt", "neurocache", "rmt"}


@pytest.mark.long
@pytest.mark.parametrize(("memory", "more"), CASES)
def test_every_adapter_counts(memory: str, more: dict[str, Any]) -> None:
    text = ids(1, 43)
    for name in linear_layers(wrapped(memory, **more)):
        model = wrapped(memory, **more)
        outer: Any = get_peft_model(model, LoraConfig(r=2, target_modules=[name]))
        outer.eval()
        with torch.no_grad():
            plain = outer(text).logits
            for key, parameter in outer.named_parameters():
                if "lora_B" in key:
                    generator = torch.Generator().manual_seed(5)
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
            got = outer(text).logits
            assert error_of(got, plain) > 1e-4, f"an adapter on {name} has no effect"
            outer.merge_adapter()
            assert_close(got, outer(text).logits, label=name)
