"""Model cases whose description has a Llama base and segments of equal length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def base_of(case: Case) -> LlamaForCausalLM:
    """The Llama that the hyperparameters describe, with the case's weights."""
    settings = dict(case.settings["base"])
    theta = settings.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": theta}
    config = LlamaConfig(**settings, rope_parameters=rope)
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    weights = {n[len("base.") :]: t for n, t in case.tensors.items() if n.startswith("base.")}
    model.load_state_dict(weights, strict=True)
    return model.eval()


def segment_size_of(case: Case) -> int:
    lengths = case.settings["segment_lengths"]
    assert len(set(lengths)) == 1 and sum(lengths) == case.tensors["input_ids"].shape[1]
    return lengths[0]


def run(model: Any, case: Case, own: dict[str, Any]) -> dict[str, Tensor]:
    """Logits, losses, gradients, and the state after the text.

    Args:
        own: memory parameters by the reference's name.
    """
    ids, size = case.tensors["input_ids"], segment_size_of(case)
    logits = model(ids).logits
    out = model(ids, labels=ids, use_cache=True)
    out.loss.backward()
    results = {"logits": logits, "loss_next_token": out.loss.detach()[None]}
    if "loss_per_segment" in case.tensors:
        parts = [
            F.cross_entropy(
                logits[:, a : a + size - 1].flatten(0, 1), ids[:, a + 1 : a + size].flatten()
            )
            for a in range(0, ids.shape[1], size)
        ]
        results["loss_per_segment"] = torch.stack(parts)
    weights = dict(model.backbone.named_parameters())
    for name in case.tensors:
        if name.startswith("grad.base."):
            gradient = weights[name.removeprefix("grad.base.")].grad
            assert gradient is not None
            results[name] = gradient
        elif name.startswith("grad."):
            results[name] = own[name.removeprefix("grad.")]()
    results |= {"state": out.cache}
    return results


def check(case: Case, got: dict[str, Tensor], tolerances: dict[str, float]) -> None:
    """Compare everything that the case holds beside inputs and parameters."""
    inputs = {"input_ids", "memory.beta"}
    expected = {n for n in case.tensors if n not in inputs and not n.startswith("base.")}
    assert got.keys() == expected, sorted(got.keys() ^ expected)
    for name in sorted(expected):
        want = case.tensors[name]
        most = tolerances[max((p for p in tolerances if name.startswith(p)), key=len)]
        scale = float(want.abs().max())
        error = float((got[name].detach().reshape(want.shape) - want).abs().max())
        assert error == pytest.approx(0, abs=most * scale), f"{name}: {error / scale:.1e}"
