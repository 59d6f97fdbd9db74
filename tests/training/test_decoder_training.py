"""What a Memory Decoder learns from: neighbours, the loss that falls, the share that is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import memwrap
from memwrap.memories.memory_decoder import MemoryDecoderConfig
from memwrap.ops.imitation import imitation_loss, imitation_losses
from memwrap.retrieval.datastore import add_document, read_tokens
from memwrap.stores import TorchStore
from memwrap.testing.families import build
from memwrap.testing.helpers import assert_close, ids
from memwrap.training.decoder_training import (
    DecoderTraining,
    best_weight,
    lessons_of,
    mixed_nats,
    token_likelihoods,
    train_decoder,
)

DOCUMENTS = {"a": ids(1, 30, seed=1)[0], "b": ids(1, 21, seed=2)[0]}
# Word for word what "a" holds: its tokens' nearest neighbours lie there, at no distance.
DOCUMENTS["copy"] = DOCUMENTS["a"].clone()


def searching(**settings: Any) -> Any:
    config = memwrap.KnnLMConfig(segment_size=64, top_k=4, **settings)
    model: Any = memwrap.wrap(build("llama"), config).eval()
    memory = model.memories["knnlm"]
    store = TorchStore(memory.width, memory.config.metric)
    for name, text in DOCUMENTS.items():
        add_document(model, store, text, name)
    memory.attach(store)
    return model


def learning() -> Any:
    config = MemoryDecoderConfig.tiny()
    return memwrap.wrap(build("llama"), config).eval()


def keys_of(model: Any, text: Tensor) -> Tensor:
    return torch.cat([key for _, key in read_tokens(model, text)])[:-1]


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_neighbours_without_the_token_itself(metric: str) -> None:
    model = searching(metric=metric)
    lessons = dict(zip(DOCUMENTS, lessons_of(model, DOCUMENTS, 4), strict=True))
    every = torch.cat([keys_of(model, text) for text in DOCUMENTS.values()])
    behind = torch.cat([text[1:] for text in DOCUMENTS.values()])
    first = 0
    for name, text in DOCUMENTS.items():
        keys, count = keys_of(model, text), len(text) - 1
        costs = (keys[:, None] - every).square().sum(-1) if metric == "l2" else -keys @ every.T
        costs[torch.arange(count), torch.arange(first, first + count)] = torch.inf
        want = costs.sort(-1)
        assert_close(lessons[name].costs, want.values[:, :4], 1e-4)
        if metric == "l2":
            nearest = lessons[name].following[:, 0].long()
            assert torch.equal(nearest, behind[want.indices[:, 0]])
            assert bool((lessons[name].costs[:, 0] < 1e-3).all()) == (name != "b")
        first += count
    with pytest.raises(ValueError, match="no kNN-LM store"):
        next(lessons_of(learning(), DOCUMENTS, 4))


def test_it_learns_what_the_store_says() -> None:
    lessons = list(lessons_of(searching(), DOCUMENTS, 4))
    found, lines = {}, []
    for share in (0.0, 1.0):
        torch.manual_seed(0)
        model = learning()
        settings = DecoderTraining(
            imitation=share, tokens=16, batch_size=4, steps=60, learning_rate=1e-2, seed=1
        )
        losses = train_decoder(model, lessons, settings, 5.0, lines.append)
        assert len(losses) == 60 and all(p.grad is None for p in model.parameters())
        found[share] = losses
    assert [line.split(":")[0] for line in lines] == ["step 50"] * 2
    for part in ("divergence", "cross_entropy"):
        begun, ended = ([one[part] for one in found[1.0]][i] for i in (0, -1))
        assert ended < 0.7 * begun, part
    # Each learns best what it is taught.
    assert found[1.0][-1]["divergence"] < found[0.0][-1]["divergence"]
    assert found[0.0][-1]["cross_entropy"] < found[1.0][-1]["cross_entropy"]


def test_what_it_refuses_and_when_it_stops() -> None:
    lessons = list(lessons_of(searching(), DOCUMENTS, 4))
    with pytest.raises(ValueError, match="no Memory Decoder"):
        train_decoder(searching(), lessons, DecoderTraining())
    with pytest.raises(ValueError, match="no text"):
        train_decoder(learning(), [], DecoderTraining())
    short = DecoderTraining(minutes=1e-9, steps=10**6)
    assert len(train_decoder(learning(), lessons, short)) <= 1


def test_the_share_is_chosen_on_other_text() -> None:
    model, text = learning(), ids(1, 20, seed=7)
    pair = token_likelihoods(model, text[0])
    model.memory_settings("memory_decoder", interpolation=0.4)
    with torch.no_grad():
        loss = model(text, labels=text).loss
    assert_close(mixed_nats(*pair, 0.4).mean(), loss.double(), 1e-5)
    good, bad = torch.tensor([-1.0, -1.0]), torch.tensor([-3.0, -3.0])
    assert best_weight([(good, bad)])[0] == 0.0
    assert best_weight([(bad, good)])[0] == 0.8
    share, nats = best_weight([(torch.tensor([-1.0]), torch.tensor([-3.0])),
                               (torch.tensor([-3.0]), torch.tensor([-1.0]))])  # fmt: skip
    assert share == 0.5 and nats[0.5] == min(nats.values())


def test_gradients_of_the_loss() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(3, 5, dtype=torch.float64)
    probs[0, :3] = 0
    probs[1] = 0  # a token without neighbours
    probs /= probs.sum(-1, keepdim=True).clamp_min(1e-9)
    targets = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(lambda x: imitation_loss(x, targets, probs, 0.3), logits)
    apart, _ = imitation_losses(logits, targets, probs)
    own = logits.log_softmax(-1)
    rows = torch.special.xlogy(probs, probs).sum(-1) - (probs * own).sum(-1)
    assert float(rows[1].detach()) == 0.0
    assert_close(apart, rows.mean(), 1e-12)
