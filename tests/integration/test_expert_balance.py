"""The loss that balances a backbone's experts: the base's own, of each segment's text alone."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, MixtralConfig, Qwen2MoeConfig, Qwen3VLMoeConfig

import memwrap
from memwrap.cli.small_models import small_model
from memwrap.cli.trying import builder
from memwrap.testing.families import build
from memwrap.testing.helpers import SEGMENT, error_of, ids, padded, tiny

CONFIGS: dict[str, Any] = {
    "mixtral": MixtralConfig, "qwen2_moe": Qwen2MoeConfig, "gpt_oss": GptOssConfig,
    "seeing": Qwen3VLMoeConfig,
}  # fmt: skip
ASKED = {"output_router_logits": True}


@cache
def architecture(name: str) -> Any:
    return builder(lambda: small_model(CONFIGS[name]()))


def seeing(base: Any, segment: int) -> Any:
    """A memory model whose every token sees all before it, as the base's do."""
    settings = {"segment_size": segment, "window_size": 64, "num_sinks": 0}
    return memwrap.wrap(base, "window", **settings)


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels of two texts of unequal length."""
    text, mask = padded([ids(1, n, seed=n)[0] for n in (2 * SEGMENT + 3, SEGMENT - 1)], "right")
    return text, mask, text.masked_fill(mask == 0, -100)


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    own = (p for n, p in model.named_parameters() if "memory_modules" not in n)
    return [p.grad for p in own if p.grad is not None]


@pytest.mark.parametrize("name", CONFIGS)
def test_in_one_segment_it_is_the_bases(name: str) -> None:
    base, (text, mask, labels) = architecture(name)(), rows()
    given = {"attention_mask": mask, "labels": labels}
    plain = base(text, **given, output_router_logits=False).loss
    want = base(text, **given, **ASKED).loss
    grads = gradients(base, want)
    assert float((want - plain).detach().abs()) > 1e-4
    model = seeing(base, 64).train()
    assert error_of(model(text, **given).loss, plain) < 1e-5
    for asked in (True, False):
        model.parts.config.output_router_logits = asked
        assert error_of(model(text, **given).loss, want if asked else plain) < 1e-5
        model.gradient_checkpointing = asked
        loss = model(text, **given, **ASKED).loss
        assert error_of(loss, want) < 1e-5
        for got, own in zip(gradients(model, loss), grads, strict=True):
            assert error_of(got, own) < 1e-3
        assert error_of(model(text, **given, output_router_logits=False).loss, plain) < 1e-5


@torch.no_grad()
def test_of_several_segments_it_is_the_mean_by_targets() -> None:
    base, (text, mask, labels) = architecture("mixtral")(), rows()
    given = {"attention_mask": mask, "labels": labels}
    out = base(text, **given, **ASKED)
    balance = sys.modules[type(base).__module__].load_balancing_loss_func
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) != -100
    want = base(text, **given, output_router_logits=False).loss
    for start in range(0, text.shape[1], SEGMENT):
        part = slice(start, start + SEGMENT)
        router = tuple(x.view(*text.shape, -1)[:, part].flatten(0, 1) for x in out.router_logits)
        loss = balance(router, base.num_experts, base.num_experts_per_tok, mask[:, part])
        want += base.router_aux_loss_coef * loss * targets[:, part].sum() / targets.sum()
    assert error_of(seeing(base, SEGMENT)(text, **given, **ASKED).loss, want) < 1e-5


@torch.no_grad()
def test_memory_tokens_are_not_counted() -> None:
    base, text = architecture("mixtral")(), ids(2, SEGMENT)
    model = memwrap.wrap(base, tiny("rmt"))
    vectors = model.memories["rmt"].prefix(model.new_state(2).memories["rmt"])
    got = model(text, labels=text, **ASKED).loss - model(text, labels=text).loss
    memwrap.unwrap(model)
    embeds = torch.cat([vectors, base.get_input_embeddings()(text)], 1)
    out = base(inputs_embeds=embeds, **ASKED)
    of_text = (x.view(2, embeds.shape[1], -1)[:, -SEGMENT:] for x in out.router_logits)
    router = tuple(x.flatten(0, 1) for x in of_text)
    balance = sys.modules[type(base).__module__].load_balancing_loss_func
    want = balance(router, base.num_experts, base.num_experts_per_tok)
    assert error_of(got, base.router_aux_loss_coef * want) < 1e-3


def test_what_has_no_experts_says_so() -> None:
    model, text = memwrap.wrap(build("llama"), tiny("armt")), ids(1, 9)
    with pytest.raises(ValueError, match="LlamaForCausalLM does not have as others do"):
        model(text, labels=text, **ASKED)
    with pytest.raises(ValueError, match="give it labels"):
        model(text, **ASKED)
