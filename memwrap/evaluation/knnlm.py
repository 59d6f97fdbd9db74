"""Tuning a kNN-LM on validation text: one reading, then every setting from what it found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from memwrap.engine.loss import Collect
from memwrap.memories.knnlm import adapt
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.retrieval.datastore import NAME, read_tokens

WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
TEMPERATURES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)


@dataclass
class Setting:
    """One setting and its mean negative log-likelihood (nats per token)."""

    interpolation: float
    temperature: float
    distance_scale: float | None
    nats: float


@dataclass
class Tuning:
    """The findings of a tuning.

    Attributes:
        base: nats per token of the model without its store.
        best: the best setting; settings: all of them.
        tokens: tokens that were predicted.
        hits: part of the tokens that are among their neighbours' values.
    """

    base: float
    best: Setting
    settings: list[Setting]
    tokens: int
    hits: float

    def tuned(self) -> dict[str, Any]:
        """Give what a store keeps in its notes and `KnnLMConfig` falls back to."""
        values = {k: v for k, v in asdict(self.best).items() if k != "nats"}
        return {k: v for k, v in values.items() if v is not None}

    def table(self) -> str:
        """Write a Markdown table: nats per token, the best temperature for every lambda."""
        rows = ["| lambda | temperature | distance scale | nats | perplexity |", "|" + "---|" * 5]
        for weight in sorted({s.interpolation for s in self.settings}):
            best = min((s for s in self.settings if s.interpolation == weight), key=_nats)
            scale = "-" if best.distance_scale is None else f"{best.distance_scale:.3g}"
            mark = " **" if best is self.best else ""
            rows.append(
                f"| {weight:g}{mark} | {best.temperature:g} | {scale} | {best.nats:.4f} | "
                f"{math.exp(best.nats):.3f} |"
            )
        return "\n".join(rows)


def _nats(setting: Setting) -> float:
    return setting.nats


@dataclass
class _Readings:
    """The result of one reading for `n` predicted tokens: the model's own log-likelihoods `(n,)`,
    neighbours' costs `(n, k)`, and which of them hold the token that came."""

    log_probs: Tensor
    costs: Tensor
    hit: Tensor

    def nats(self, weight: float, temperature: float, scale: float | None, adaptive: bool) -> float:
        """Compute the mean negative log-likelihood with a setting, in pieces."""
        total = 0.0
        for log_p, costs, hit in zip(
            self.log_probs.split(4096), self.costs.split(4096), self.hit.split(4096), strict=True
        ):
            share: Any = weight
            heat: Any = temperature
            if adaptive:
                share, heat = adapt(costs, weight, temperature, scale)
            finite = costs.isfinite().any(-1)
            scores = (-costs / heat).masked_fill(~finite[:, None], 0)
            store_probs = (scores.softmax(-1) * hit).sum(-1)
            share = torch.as_tensor(share, dtype=log_p.dtype).expand(len(log_p), 1)[:, 0] * finite
            mixed = (1 - share) * log_p.exp() + share * store_probs
            total -= float(mixed.clamp_min(1e-30).log().sum())
        return total / len(self.log_probs)


@torch.no_grad()
def _read(model: MemoryModelForCausalLM, rows: Sequence[Tensor], progress: bool) -> _Readings:
    memory: Any = model.memories[NAME]
    base_log_probs, costs, hits = [], [], []
    for ids in tqdm(rows, desc="reading", unit="document", disable=not progress):
        ids = ids.to(model.device)
        pairs = zip(read_tokens(model, ids), read_tokens(model, ids, Collect.HIDDEN), strict=True)
        for (first, keys), (_, hidden) in pairs:
            targets = ids[first + 1 : first + 1 + len(keys)]
            keys, hidden = keys[: len(targets)], hidden[: len(targets)]
            if not len(targets):
                continue
            for h, t in zip(hidden.split(512), targets.split(512), strict=True):
                log_probs = model.parts.head(h[None])[0].float().log_softmax(-1)
                base_log_probs.append(log_probs.gather(1, t[:, None])[:, 0].double().cpu())
            distances, values = memory._in_store(memory.store, keys[None])
            costs.append(distances[0].double().cpu())
            hits.append((values[0] == targets[:, None]).cpu())
    if not base_log_probs:
        raise ValueError("The text has fewer than two tokens; give more.")
    return _Readings(torch.cat(base_log_probs), torch.cat(costs), torch.cat(hits))


def tune(
    model: MemoryModelForCausalLM,
    rows: Sequence[Tensor],
    *,
    weights: Sequence[float] = WEIGHTS,
    temperatures: Sequence[float] = TEMPERATURES,
    progress: bool = True,
) -> Tuning:
    """Find lambda and temperature for a model's store on validation text.

    With `adaptive` in the memory's config the temperatures are parts of the mean distance, and
    scales of the nearest distance are tried too.

    Args:
        model: a memwrap model with a kNN-LM memory and its store.
        rows: ids `(T,)` of documents that are not in the store.
        weights, temperatures: the grid.
        progress: show a bar.

    Raises:
        ValueError: without a store, without text, or for a weight outside [0, 1).
    """
    memory: Any = model.memories.get(NAME)
    if memory is None or memory.store is None or not len(memory.store):
        raise ValueError("The model has no kNN-LM store to tune; attach one that is not empty.")
    if not all(0 <= w < 1 for w in weights) or not all(t > 0 for t in temperatures):
        raise ValueError("`weights` must be from 0 to below 1, `temperatures` above 0.")
    was_training = model.training
    model.eval()
    try:
        readings = _read(model, rows, progress)
    finally:
        model.train(was_training)
    adaptive = memory.config.adaptive
    scales: list[float | None] = [None]
    if adaptive:
        nearest = readings.costs.amin(-1)
        middle = float(nearest[nearest.isfinite()].median())
        temperatures = [t / 100 for t in temperatures]
        scales += [middle * part for part in (0.25, 0.5, 1.0, 2.0, 4.0) if middle > 0]
    settings = [
        Setting(w, t, s, readings.nats(w, t, s, adaptive))
        for w in sorted(weights) for t in temperatures for s in scales
        if w > 0 or (t == temperatures[0] and s is None)
    ]  # fmt: skip
    base = -float(readings.log_probs.mean())
    hits = float(readings.hit.any(-1).double().mean())
    return Tuning(base, min(settings, key=_nats), settings, len(readings.log_probs), hits)
