"""Training on a long text in one call: the graph does not grow, and gradients are as if it had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memwrap.engine import loop
from memwrap.testing.helpers import (
    SEGMENT,
    assert_close,
    assert_same_gradients,
    gradients,
    ids,
    wrapped,
)

TEXT = ids(2, 9 * SEGMENT + 3)


class KeptGraph:
    """What `EarlyGradients` would be if it never did anything."""

    loss = None

    def __init__(self, embeds: Tensor | None) -> None: ...

    def take(self, loss: Tensor) -> bool:
        return False


class Saved:
    """A tensor that a graph keeps."""

    alive = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.count = tensor.detach(), tensor.numel()
        Saved.alive += self.count
        Saved.most = max(Saved.most, Saved.alive)

    def __del__(self) -> None:
        Saved.alive -= self.count


def gradients_of(model: Any, **inputs: Any) -> tuple[Tensor, dict]:
    model.zero_grad()
    loss = model.train()(**inputs).loss
    (3 * loss).backward()
    return loss.detach(), gradients(model)


def both_ways(model: Any, monkeypatch: pytest.MonkeyPatch, **inputs: Any) -> list:
    early = gradients_of(model, **inputs)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "EarlyGradients", KeptGraph)
        return [early, gradients_of(model, **inputs)]


@pytest.mark.parametrize("memory", ["armt", "window", "landmark"])
def test_gradients_are_those_of_the_kept_graph(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped(memory, bptt_segments=2)
    (loss, early), (kept_loss, kept) = both_ways(model, monkeypatch, input_ids=TEXT, labels=TEXT)
    assert_close(loss, kept_loss, 1e-6)
    assert_same_gradients(early, kept, 1e-5)


def test_the_graph_does_not_grow() -> None:
    """What is kept for the backward pass at its most, for 4 and for 16 segments."""
    model, most = wrapped("armt", bptt_segments=2).train(), []
    for segments in (4, 16):
        text = ids(1, segments * SEGMENT)
        Saved.alive = Saved.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            loss = model(text, labels=text).loss
        loss.backward()
        del loss
        most.append(Saved.most)
    assert most[1] < 1.05 * most[0], most


@pytest.mark.parametrize("retained", [False, True])
def test_gradients_of_embeddings(retained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings that are computed get their gradient themselves, and so does what made them."""
    model = wrapped("armt", bptt_segments=2).train()
    found = []
    for graph in (loop.EarlyGradients, KeptGraph):
        monkeypatch.setattr(loop, "EarlyGradients", graph)
        scale = torch.ones(1, requires_grad=True)
        embeds = model.get_input_embeddings()(TEXT).detach() * scale
        if retained:
            embeds.retain_grad()
        loss = model(inputs_embeds=embeds, labels=TEXT).loss
        if retained:
            loss.backward()
            found.append((embeds.grad, scale.grad))
        else:
            found.append(torch.autograd.grad(loss, (embeds, scale)))
    for early, kept in zip(*found, strict=True):
        assert_close(early, kept, 1e-5)


def test_hooks_of_weights_see_the_whole_gradient_once() -> None:
    model, seen = wrapped("armt", bptt_segments=2), []
    weight = model.get_input_embeddings().weight
    hook = weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    _, found = gradients_of(model, input_ids=TEXT, labels=TEXT)
    hook.remove()
    assert len(seen) == 1
    name = next(n for n, p in model.named_parameters() if p is weight)
    assert_close(seen[0], found[name], 1e-6)


def test_documents_in_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of packed documents have nothing to do with each other either."""
    model = wrapped("armt", bptt_segments=2)
    numbers = torch.tensor([[n // (3 * SEGMENT) for n in range(TEXT.shape[1])]]).expand(2, -1)
    given = {"input_ids": TEXT, "labels": TEXT, "seq_idx": numbers}
    (loss, early), (kept_loss, kept) = both_ways(model, monkeypatch, **given)
    assert_close(loss, kept_loss, 1e-6)
    assert_same_gradients(early, kept, 1e-5)
