"""Invariant 8: gradients, truncation, checkpointing, and the loss they belong to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import memwrap
from memwrap.testing.families import build
from memwrap.testing.helpers import (
    PEFT_EXPERTS,
    SEGMENT,
    assert_close,
    assert_memory_matters,
    assert_same_gradients,
    differ,
    gradients,
    ids,
    padded,
    pairs,
    shifted,
    wrapped,
)

# transformers 5.23 has another name for checkpointing, older versions only this one.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

TEXT = ids(2, 3 * SEGMENT + 3)


def gradients_of(model: Any, text: Tensor = TEXT, **kwargs: Any) -> tuple[float, dict]:
    loss = model.train()(text, labels=text, **kwargs).loss
    loss.backward()
    return loss.item(), gradients(model)


def unrolled(model: Any, text: Tensor, window: int | None) -> tuple[float, dict]:
    """The same by hand: segment by segment, the state cut after every `window` segments."""
    model.train()
    labels, total, state = shifted(text), torch.zeros(()), model.new_state(text.shape[0])
    for index, start in enumerate(range(0, text.shape[1], SEGMENT)):
        if window and index and index % window == 0:
            state = state.detach()
        columns = slice(start, start + SEGMENT)
        out = model(
            text[:, columns], shift_labels=labels[:, columns], cache=state,
            num_items_in_batch=1, use_cache=True,
        )  # fmt: skip
        state, total = out.cache, total + out.loss
    loss = total / (labels != -100).sum()
    loss.backward()
    return loss.item(), gradients(model)


@pairs()
@pytest.mark.parametrize(
    ("segments", "windows"), [(3, (1, 2)), pytest.param(4, (1, 2, 3), marks=pytest.mark.slow)]
)
def test_truncation_equals_an_unrolled_graph(
    memory: str, family: str, segments: int, windows: tuple[int, ...]
) -> None:
    model = wrapped(memory, family)
    assert_memory_matters(model, ids(1, 2 * SEGMENT))
    text = ids(2, segments * SEGMENT + 3)
    full = gradients_of(model, text)
    # A state carries gradients between calls where nothing cuts it.
    loss, got = unrolled(model, text, None)
    assert loss == pytest.approx(full[0], rel=1e-5)
    assert_same_gradients(got, full[1], 3e-4)
    _, got = gradients_of(wrapped(memory, family, bptt_segments=segments + 1), text)
    assert_same_gradients(got, full[1], 1e-6)
    for window in windows:
        reference = unrolled(model, text, window)
        loss, got = gradients_of(wrapped(memory, family, bptt_segments=window), text)
        assert loss == pytest.approx(reference[0], rel=1e-5) == pytest.approx(full[0], rel=1e-5)
        assert_same_gradients(got, reference[1], 3e-4)
        assert differ(got, full[1]), f"truncation to {window} changes nothing: no proof"


@pairs()
@pytest.mark.parametrize(
    ("window", "ragged"),
    [(None, False), (2, True), pytest.param(None, True, marks=pytest.mark.slow)],
)
def test_checkpointing_changes_nothing(
    memory: str, family: str, window: int | None, ragged: bool
) -> None:
    text, mask = padded([TEXT[0], TEXT[1, :19]], "left")
    kwargs = {"text": text, "attention_mask": mask} if ragged else {"text": TEXT}
    model = wrapped(memory, family, bptt_segments=window)
    calls: list[int] = []
    model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    want = gradients_of(model, **kwargs)
    plain = len(calls)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    got = gradients_of(model, **kwargs)
    assert len(calls) - plain == 2 * plain  # every segment was run again
    assert got[0] == want[0]
    assert_same_gradients(got[1], want[1], 1e-6)
    model.gradient_checkpointing_disable()
    if not ragged:
        assert_same_gradients(gradients_of(model, **kwargs)[1], want[1], 1e-6)
        assert len(calls) == 4 * plain


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")  # gpt2's turned weights
@PEFT_EXPERTS
@pairs()
def test_lora_and_memory_get_the_gradients(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    model.add_lora(LoraConfig(r=2, target_modules="all-linear"))
    want = gradients_of(model)
    assert want[1] and all("lora_" in n or n.startswith("memory_modules") for n in want[1])
    memory_names = {n for n, p in model.named_parameters() if n.startswith("memory_modules")}
    assert memory_names <= want[1].keys(), "some memory parameter gets no gradient"
    if memory_names:
        assert any(float(want[1][n].abs().max()) > 0 for n in memory_names)
    model.gradient_checkpointing_enable()
    assert_same_gradients(gradients_of(model)[1], want[1], 1e-6)


def mean_of(logits: Tensor, labels: Tensor) -> Any:
    """What a loss is to be, within rounding."""
    flat, targets = logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
    return pytest.approx(F.cross_entropy(flat.float(), targets).item(), rel=1e-5)


@pytest.mark.long
@pairs("places")
def test_the_loss_is_the_mean_over_all_targets(memory: str, family: str) -> None:
    """Also of the first target of each later segment alone: nothing is lost where segments meet."""
    model = wrapped(memory, family)
    labels = TEXT.masked_fill(torch.rand(TEXT.shape) < 0.3, -100)
    edges = torch.full_like(TEXT, -100)
    edges[:, SEGMENT::SEGMENT] = TEXT[:, SEGMENT::SEGMENT]
    with torch.no_grad():
        logits = model(TEXT).logits
        for wanted in (labels, edges):
            assert model(TEXT, labels=wanted).loss.item() == mean_of(logits, wanted)


@pytest.mark.long
@pairs()
def test_forms_in_which_a_loss_is_asked_for(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    labels = TEXT.masked_fill(torch.rand(TEXT.shape) < 0.3, -100)
    with torch.no_grad():
        logits = model(TEXT).logits
        want, count = mean_of(logits, labels), (labels[:, 1:] != -100).sum()
        assert_close(model(TEXT, labels=labels).logits, logits)  # made when they are looked at
        assert model(TEXT, labels=labels, return_logits=False).logits is None
        assert model(TEXT, shift_labels=shifted(labels)).loss.item() == want
        divided = model(TEXT, labels=labels, num_items_in_batch=7).loss
        assert divided.item() * 7 / count.item() == want
        both = model(TEXT, labels=labels, return_logits=True)
    assert_close(both.logits, logits)


@pytest.mark.long
@pairs()
def test_logits_come_with_labels_when_they_are_asked_for(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    with torch.no_grad():
        want = model(TEXT).logits
        got = model(TEXT, labels=TEXT, logits_to_keep=5).logits
    assert got is not None, "`logits_to_keep` was given beside labels: the contract returns logits"
    assert_close(got, want[:, -5:])


@pytest.mark.long
@pairs()
def test_loss_on_the_last_segment(memory: str, family: str) -> None:
    rows = [TEXT[0], TEXT[1, :19]]
    text, mask = padded(rows, "left")
    labels = text.masked_fill(mask == 0, -100)
    last = shifted(labels).masked_fill(mask == 0, -100)
    for index, row in enumerate(rows):
        closed = (len(row) - 1) // SEGMENT * SEGMENT
        last[index, : text.shape[1] - len(row) + closed] = -100
    assert 0 < int((last != -100).sum()) < 2 * SEGMENT
    want = wrapped(memory, family).train()(text, attention_mask=mask, shift_labels=last).loss
    model = wrapped(memory, family, loss_on="last").train()
    got = model(text, attention_mask=mask, labels=labels).loss
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    got.backward()
    grads = gradients(model)
    names = [n for n, _ in model.named_parameters() if n.startswith("memory")] or list(grads)
    assert any(float(grads[n].abs().max()) > 0 for n in names)


class Float32Softmax(TorchDispatchMode):
    """Whether a softmax was taken in float32 inside the block."""

    seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default:
            self.seen |= out.dtype == torch.float32
        return out


@pytest.mark.long
def test_a_model_in_float64_agrees_to_its_precision(memory: str) -> None:
    """Truncation once more where noise cannot hide a mistake (norms still round to float32).

    Transformers' eager attention takes its softmax in float32 whatever the dtype; where a memory
    has it run, another order of sums in its gradient is seen at 1.9e-8.
    """

    model = wrapped(memory, base=build("gpt_neox").double())
    with Float32Softmax() as softmax:
        _, want = unrolled(model, TEXT, 2)
    base = memwrap.unwrap(model)
    _, got = gradients_of(wrapped(memory, base=base, bptt_segments=2))
    assert all(g.dtype == torch.float64 for g in got.values())
    assert_same_gradients(got, want, 1e-7 if softmax.seen else 1e-9)
