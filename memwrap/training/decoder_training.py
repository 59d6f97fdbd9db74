"""A Memory Decoder learns what a kNN-LM's store says (Cao et al. 2025)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from memwrap.memories.memory_decoder import MemoryDecoderMemory
from memwrap.memories.settings import Fraction, PositiveInt, Range, Settings
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.ops.imitation import imitation_losses
from memwrap.ops.interpolation import neighbour_probabilities
from memwrap.retrieval.datastore import NAME, read_tokens

DECODER = "memory_decoder"
WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_AT_ONCE = 2048  # positions whose distributions over the vocabulary exist at once


class DecoderTraining(Settings):
    """The settings of a Memory Decoder's training.

    Attributes:
        top_k: neighbours of a token (published: 1024).
        temperature: divides their distances (published: 16); `None`: as tuned for the store, else
            1.
        imitation: share of the divergence from the store's distribution; the rest is cross entropy
            with the text.
        tokens: of a row.
        batch_size: rows of a step.
        steps: of the optimizer.
        minutes: stop after so many.
        learning_rate: at its highest, behind `warmup` of the steps; it falls to zero in a line.
        warmup: see `learning_rate`.
        weight_decay: of weights.
        seed: of the rows' order.
    """

    top_k: PositiveInt = 64
    temperature: Annotated[float, Range(above=0)] | None = None
    imitation: Fraction = 0.5
    tokens: PositiveInt = 512
    batch_size: PositiveInt = 8
    steps: PositiveInt = 1000
    minutes: Annotated[float, Range(above=0)] | None = None
    learning_rate: Annotated[float, Range(above=0)] = 1e-3
    warmup: Fraction = 0.05
    weight_decay: Annotated[float, Range(0)] = 0.01
    seed: int = 0


@dataclass(frozen=True)
class Lesson:
    """A document, and what the store says of it.

    Attributes:
        ids: `(T,)`.
        costs: `(T - 1, k)` distances of the neighbours of every token but the last, infinite where
            there is none.
        following: `(T - 1, k)` the tokens that follow these neighbours.
    """

    ids: Tensor
    costs: Tensor
    following: Tensor


@torch.no_grad()
def lessons_of(
    model: MemoryModelForCausalLM, documents: Mapping[str, Tensor], top_k: int
) -> Iterator[Lesson]:
    """Ask a kNN-LM's store about documents that it holds. A token's own entry is left out by its
    place in the document: it need not be the nearest, where text repeats itself.

    Args:
        model: a memwrap model with a kNN-LM memory and its store.
        documents: ids `(T,)` by the name that they have in the store.
        top_k: neighbours of a token.

    Raises:
        ValueError: without a store.
    """
    memory: Any = model.memories.get(NAME)
    if memory is None or memory.store is None or not len(memory.store):
        raise ValueError("The model has no kNN-LM store to learn from; attach one.")
    store = memory.store
    numbers = {name: number for number, name in enumerate(store.documents)}
    for name, ids in documents.items():
        if len(ids) < 2:
            continue
        keys = torch.cat([key.cpu() for _, key in read_tokens(model, ids)])[:-1]
        near = store.search(keys, top_k + 1)
        about = store.entries(near.ids)
        values, places = (torch.from_numpy(x.astype("int64")) for x in (about.values, about.starts))
        same = torch.from_numpy(about.documents.astype("int64")) == numbers.get(name, -2)
        itself = same & (places == torch.arange(1, len(ids))[:, None])
        costs = near.scores if store.metric == "l2" else -near.scores
        costs, order = costs.masked_fill(itself | (values < 0), torch.inf).sort(dim=-1, stable=True)
        values = values.clamp_min(0).gather(1, order)
        yield Lesson(ids.cpu(), costs[:, :top_k].float(), values[:, :top_k].int())


def train_decoder(
    model: MemoryModelForCausalLM,
    lessons: Sequence[Lesson],
    settings: DecoderTraining,
    temperature: float = 1.0,
    say: Callable[[str], None] = print,
) -> list[dict[str, float]]:
    """Train a model's Memory Decoder, alone.

    Args:
        model: a memwrap model with a Memory Decoder.
        lessons: documents with their neighbours.
        settings: of the training.
        temperature: of the neighbours, where the settings have none.
        say: takes a line of report now and then.

    Returns:
        Divergence and cross entropy of every step.

    Raises:
        ValueError: without a Memory Decoder, or without text.
    """
    memory: Any = model.memories.get(DECODER)
    if not isinstance(memory, MemoryDecoderMemory):
        raise ValueError("The model has no Memory Decoder: memwrap.wrap(base, 'memory_decoder').")
    rows = _Rows(lessons, settings)
    decoder, heat = memory.decoder, settings.temperature or temperature
    weights = [p for p in decoder.parameters() if p.dim() > 1]
    others = [p for p in decoder.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98)
    )
    begun, losses, done = time.monotonic(), [], 0.0
    limit = (settings.minutes or float("inf")) * 60
    for step in range(settings.steps):
        # Where time ends it, the rate follows the clock.
        done = max(step / settings.steps, (time.monotonic() - begun) / limit)
        if done >= 1:
            break
        rise = min(1.0, done / settings.warmup if settings.warmup else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(max(rise, 1e-3), 1 - done)
        losses.append(_step(decoder, rows.batch(), settings.imitation, heat))
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            recent = losses[-50:]
            means = (sum(one[name] for one in recent) / len(recent) for name in recent[0])
            say(f"step {step + 1}: divergence {next(means):.3f}, cross entropy {next(means):.3f}")
    return losses


class _Rows:
    """Rows of tokens with their neighbours, drawn without replacement until all were seen."""

    def __init__(self, lessons: Sequence[Lesson], settings: DecoderTraining) -> None:
        self.lessons, self.settings = lessons, settings
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.waiting: list[tuple[int, int]] = []
        if not any(len(lesson.costs) for lesson in lessons):
            raise ValueError("There is no text to learn from: give documents of two tokens.")

    def batch(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Draw rows: ids, the tokens behind them, costs and following tokens of neighbours."""
        drawn: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        while len(drawn) < self.settings.batch_size:
            if not self.waiting:
                self.waiting = self._cut()
            number, first = self.waiting.pop()
            lesson, part = self.lessons[number], slice(first, first + self.settings.tokens)
            costs, following = lesson.costs[part], lesson.following[part]
            ids, behind = lesson.ids[:-1][part], lesson.ids[1:][part]
            drawn.append((ids, behind, costs, following))
        return drawn

    def _cut(self) -> list[tuple[int, int]]:
        """Cut all documents into rows, at another place each time, in a random order."""
        size, places = self.settings.tokens, []
        for number, lesson in enumerate(self.lessons):
            shift = int(torch.randint(size, (), generator=self.generator))
            starts = {0, *range(shift, max(1, len(lesson.costs)), size)}
            places += [(number, start) for start in sorted(starts) if start < len(lesson.costs)]
        order = torch.randperm(len(places), generator=self.generator).tolist()
        return [places[i] for i in order]


def _step(decoder: Any, rows: list, share: float, temperature: float) -> dict[str, float]:
    """Run both passes over a batch; returns its mean divergence and cross entropy."""
    device = decoder.embed_tokens.weight.device
    inputs, *parts = zip(*rows, strict=True)
    ids = torch.nn.utils.rnn.pad_sequence(list(inputs), True, -1).to(device)
    hidden = decoder.text(ids)[ids >= 0]
    targets, costs, following = (torch.cat(part).to(device) for part in parts)
    sums = {"divergence": 0.0, "cross_entropy": 0.0}
    leaf, count = hidden.detach().requires_grad_(), len(targets)
    for part in torch.arange(count, device=device).split(_AT_ONCE):
        logits = decoder.head(leaf[part])
        near = costs[part], following[part].long()
        probs = neighbour_probabilities(*near, logits.shape[-1], temperature)
        apart, surprise = imitation_losses(logits, targets[part], probs)
        weight = len(part) / count
        (torch.lerp(surprise, apart, share) * weight).backward()
        sums["divergence"] += float(apart.detach()) * weight
        sums["cross_entropy"] += float(surprise.detach()) * weight
    hidden.backward(leaf.grad)
    return sums


@torch.no_grad()
def token_likelihoods(model: MemoryModelForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log-likelihoods `(T - 1,)` of a text's tokens behind the first: the backbone's,
    segment by segment, and the decoder's own."""
    memory: Any = model.memories[DECODER]
    ids = ids.to(model.device)[None]
    behind = ids[:, 1:, None]
    base = model(ids, memory_control="off", use_cache=False).logits[:, :-1].float()
    alone = memory.decoder.head(memory.decoder.text(ids)[:, :-1]) / memory.config.temperature
    pair = (scores.log_softmax(-1).gather(2, behind)[0, :, 0].double() for scores in (base, alone))
    return next(pair), next(pair)


def mixed_nats(base: Tensor, decoder: Tensor, weight: float) -> Tensor:
    """Compute the surprise, in nats, at tokens of which model and decoder have the log-likelihoods
    `base` and `decoder`."""
    return -torch.log((1 - weight) * base.exp() + weight * decoder.exp())


def best_weight(
    pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float] = WEIGHTS
) -> tuple[float, dict[float, float]]:
    """Choose the decoder's share on validation text: the best of `weights`, and the nats per token
    with each; `pairs` are from `token_likelihoods`."""
    base, alone = (torch.cat(part) for part in zip(*pairs, strict=True))
    nats = {weight: float(mixed_nats(base, alone, weight).mean()) for weight in weights}
    return min(nats, key=lambda weight: nats[weight]), nats


__all__ = [
    "DecoderTraining",
    "Lesson",
    "best_weight",
    "lessons_of",
    "mixed_nats",
    "token_likelihoods",
    "train_decoder",
]
