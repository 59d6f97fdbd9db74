"""What is changed at a wrapped model afterwards: casts, checkpointing, frozen memories."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import memwrap
from memwrap.testing.families import build
from memwrap.testing.helpers import SEGMENT, error_of, ids, randomise, tiny, wrapped

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


OTHER_DTYPES = [pytest.param(d, marks=pytest.mark.long) for d in (torch.float16, torch.float64)]


@pytest.mark.parametrize("memory", memwrap.available())
@pytest.mark.parametrize("dtype", [torch.bfloat16, *OTHER_DTYPES])
def test_a_cast_model_is_one_of_a_cast_base(memory: str, dtype: torch.dtype) -> None:
    """Bit for bit: the memory keeps float32 (float64 with the backbone), as `wrap` chooses it."""
    text = ids(2, 2 * SEGMENT + 3)
    cast = wrapped(memory).to(dtype)
    fresh = randomise(memwrap.wrap(build("llama").to(dtype), tiny(memory)))
    with torch.no_grad():
        for own, other in zip(cast.memory_parameters(), fresh.memory_parameters(), strict=True):
            assert own.dtype == other.dtype
            own.copy_(other)
        got, want = cast(text, use_cache=True), fresh(text, use_cache=True)
    assert torch.equal(got.logits, want.logits) and bool(got.logits.isfinite().all())
    assert cast.generate(text, max_new_tokens=2, do_sample=False).shape[1] <= text.shape[1] + 2


def test_ways_to_cast() -> None:
    text, model = ids(1, 20), wrapped("memoryprompt")
    for cast in (model.half, model.bfloat16, model.float, model.double):
        assert cast() is model
        model(text)
    state = model.read(text)
    model.float()
    with pytest.raises(ValueError, match="dtype 'float64', this one 'float32'"):
        model(text, cache=state)
    model.backbone.to(torch.bfloat16)
    assert model(text).logits.dtype == torch.bfloat16
    model.backbone.double()
    with pytest.raises(ValueError, match=r"cast the whole model \(model.to\(torch.float64\)\)"):
        model(text)


@pytest.mark.parametrize("memory", ["rmt", "armt", "infini", "window", "landmark"])
def test_checkpointing_turned_on_at_the_backbone(memory: str) -> None:
    text = ids(2, 2 * SEGMENT + 3)

    def gradients(turn_on: Any) -> tuple[float, list[Any]]:
        model = wrapped(memory).train()
        turn_on(model.backbone)
        state = model(text[:, :5], use_cache=True).cache
        loss = model(text[:, 5:], cache=state, labels=text[:, 5:]).loss
        loss.backward()
        return float(loss.detach()), [p.grad for p in model.parameters() if p.grad is not None]

    def one_layer(backbone: Any) -> None:
        backbone.get_decoder().layers[1].gradient_checkpointing = True

    want, grads = gradients(lambda backbone: None)
    for turn_on in (lambda b: b.gradient_checkpointing_enable(), one_layer):
        loss, got = gradients(turn_on)
        assert loss == pytest.approx(want, abs=1e-6) and len(got) == len(grads)
        for left, right in zip(got, grads, strict=True):
            assert error_of(left, right) < 1e-4


def test_a_memory_that_peft_froze_is_told() -> None:
    lora: dict[str, Any] = {"target_modules": ["q_proj"]}
    text = ids(1, 20)
    outer: Any = get_peft_model(wrapped("rmt"), LoraConfig(**lora)).train()
    with pytest.warns(UserWarning, match=r"modules_to_save=\['memory_modules'\]"):
        outer(text, labels=text)
    quiet = [
        get_peft_model(wrapped("rmt"), LoraConfig(**lora, modules_to_save=["memory_modules"])),
        wrapped("rmt"), wrapped("rmt"), outer.eval(),
    ]  # fmt: skip
    quiet[1].add_lora(LoraConfig(**lora))
    for parameter in quiet[2].memory_parameters():  # on purpose
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in quiet:
            model.train(model is not outer)(text, labels=text)
    trained: Any = quiet[0]
    trained(text, labels=text).loss.backward()
    assert all(p.grad is not None for p in trained.get_base_model().memory_parameters())


def test_logits_in_evaluation_are_made_when_looked_at() -> None:
    model, text = wrapped("armt"), ids(2, 20)
    want = model(text).logits
    state = model.read(ids(2, 5, seed=1))
    after = model(text, cache=state.clone()).logits
    loops: list[int] = []
    plain = model.loop

    def loop(*given: Any) -> Any:
        made = plain(*given)
        call = made.__class__.__call__
        made.__class__ = type("Counted", (made.__class__,), {
            "__call__": lambda self, *a, **k: (loops.append(1), call(self, *a, **k))[1]
        })  # fmt: skip
        return made

    model.loop = loop
    out = model(text, labels=text)
    assert len(loops) == 1 and out.loss.isfinite()
    assert error_of(out.logits, want) < 1e-5 and len(loops) == 2
    assert out.logits is out["logits"] and out[1] is out.logits and len(loops) == 2
    assert list(out.keys())[:2] == ["loss", "logits"] and "logits" in out
    out = model(text, labels=text, cache=state)  # the state has moved on when they are looked at
    assert error_of(out.to_tuple()[1], after) < 1e-5
    assert error_of(model(text, labels=text, return_dict=False)[1], want) < 1e-5
    # accelerate's autocast, gathering over devices and torch's trees build another from its parts.
    out = model(text, labels=text)
    kind = type(out)
    for other in (kind(dict(out)), kind((k, out[k]) for k in out), kind(**out), kind({})):
        assert other == {} or torch.equal(other.logits, out.logits), other
    count = len(loops)
    assert model(text, labels=text, return_logits=False).logits is None
    assert model.train()(text, labels=text).logits is None
    assert len(loops) == count + 2
