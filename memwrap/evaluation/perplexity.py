"""Perplexity by position on long documents, beside the controls that make it honest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from memwrap.backbones.adapters import lora_disabled
from memwrap.engine.inputs import check_inputs
from memwrap.evaluation.controls import (
    CURVES,
    FULL,
    MEMORY,
    OFF,
    SHUFFLED,
    TRUNCATED,
    WINDOW,
    own_context,
    windowed,
)
from memwrap.evaluation.measure import peak_memory
from memwrap.evaluation.saved_result import SavedResult
from memwrap.model.memory_model import MemoryModelForCausalLM

BRANCH = "only "  # and the name of a branch of the memory
GROWN = 2.0  # times what training saw: worth a warning
# NLL by row and position, the seconds it took, and the most bytes in use meanwhile.
Reading = tuple[Tensor, float, int | None]


@dataclass
class Curve:
    """One reading: nats per token by bucket, with the standard error across documents.

    Attributes:
        mean, error: one value a bucket; NaN where nothing was read.
        tokens: tokens counted in each bucket.
        overall: mean over all tokens it read.
        gain: mean of (this - memory) over the tokens both read, in nats; positive: worse.
        gain_error: its standard error across documents.
        seconds: time it took.
        peak_bytes: most memory in use meanwhile; None where the system does not tell.
    """

    mean: list[float]
    error: list[float]
    tokens: list[int]
    overall: float
    gain: float
    gain_error: float
    seconds: float
    peak_bytes: int | None = None


@dataclass
class PerplexityResult(SavedResult):
    """Curves over the same documents; buckets are `[edges[i], edges[i + 1])` in tokens.

    Attributes:
        norms: how large the memories' sums were (`model.state_norms`, the largest of all rows)
            after so many `"tokens"`: one dict a piece, by memory and layer.
        trained_norms: how large they were at the end of training; None if unknown.
    """

    format: ClassVar[str] = "memwrap-perplexity"
    version: ClassVar[int] = 2
    older: ClassVar[frozenset[int]] = frozenset({1})  # without norms
    records: ClassVar[dict[str, type]] = {"curves": Curve}

    edges: list[int]
    segment_size: int
    window: int
    documents: int
    curves: dict[str, Curve] = field(default_factory=dict)
    norms: list[dict[str, Any]] = field(default_factory=list)
    trained_norms: dict[str, dict[str, float]] | None = None

    def _largest(self, name: str, layer: str) -> float:
        return max((at.get(name, {}).get(layer, 0.0) for at in self.norms), default=0.0)

    def growth(self) -> str | None:
        """Warn, in a sentence, if a memory's sums grew far beyond what training saw."""
        grown = [
            (norm / seen, name, layer, norm, seen)
            for name, layers in (self.trained_norms or {}).items()
            for layer, seen in layers.items()
            if seen and (norm := self._largest(name, layer)) > GROWN * seen
        ]
        if not grown:
            return None
        times, name, layer, norm, seen = max(grown)
        return (
            f"warning: what {name!r} sums in layer {layer} grew to {norm:.4g}, {times:.1f} times "
            f"what training saw ({seen:.4g}). Give memory.state_decay (0.8) or memory.read_cap, or "
            "train on more segments."
        )

    def table(self) -> str:
        """Write a Markdown table: nats per token by position, and the difference to memory."""
        size = self.segment_size
        spans = [
            f"{a // size}" if b - a == size else f"{a // size}-{b // size - 1}"
            for a, b in pairwise(self.edges)
        ]
        head = ["segments", *spans, "all", "minus memory"]
        rows = [head, ["---"] * len(head)]
        for name, curve in self.curves.items():
            gain = "" if name == MEMORY else f"{curve.gain:+.4f}"
            if gain and not math.isnan(curve.gain_error):  # one document has no error
                gain += f" ± {curve.gain_error:.4f}"
            cells = ["-" if math.isnan(v) else f"{v:.3f}" for v in curve.mean]
            rows.append([name, *cells, f"{curve.overall:.3f}", gain])
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def perplexity_by_position(
    model: MemoryModelForCausalLM,
    documents: list[Tensor],
    *,
    controls: tuple[str, ...] = CURVES[1:],
    window: int | None = None,
    full_context_tokens: int | None = None,
    piece_tokens: int = 1024,
    base: dict[str, Reading] | None = None,
    progress: bool = True,
) -> PerplexityResult:
    """Measure the negative log-likelihood (nats) of long documents by position, in bounded memory.

    Args:
        model: a memwrap model; the base controls run its backbone without adapters.
        documents: ids `(T,)`, read as rows of one batch.
        controls: which curves stand beside "memory". For a memory with branches (a linearized
            model) also "only window" and "only recurrent".
        window: tokens of a window of "base, truncated", and of window and sinks together
            (default: the backbone's context).
        full_context_tokens: how far "base, full context" is followed (default: 4 windows).
        piece_tokens: tokens fed at once, rounded to whole segments; changes no result.
        base: an empty dict takes up what the base alone gave on these documents, a filled one
            gives it back: several memories on one base need it only once.
        progress: show a bar for each curve.

    Returns:
        The curves, with standard errors across documents.

    Raises:
        ValueError: for no documents, or for a shuffled control with fewer than two.
    """
    if not documents:
        raise ValueError("`documents` is empty; give at least one document.")
    if SHUFFLED in controls and len(documents) < 2:
        raise ValueError("The control 'memory shuffled' needs at least two documents.")
    branches = {BRANCH + b: b for m in model.memories.values() for b in m.branches}
    unknown = sorted(set(controls) - set(CURVES) - branches.keys())
    if unknown:
        allowed = ", ".join([*CURVES[1:], *branches])
        raise ValueError(f"Unknown controls {unknown}; allowed: {allowed}.")
    size = model.segment_size
    window = window or own_context(model)
    rows = [torch.as_tensor(d) for d in documents]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    lengths = torch.tensor([len(r) for r in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    piece = max(1, piece_tokens // size) * size
    norms: list[dict[str, Any]] = []
    readers: dict[str, Callable[[], Tensor]] = {
        MEMORY: lambda: _memory(model, ids, mask, piece, None, progress, norms),
        OFF: lambda: _memory(model, ids, mask, piece, "off", progress),
        SHUFFLED: lambda: _memory(model, ids, mask, piece, "shuffled", progress),
        TRUNCATED: lambda: _windows(model, ids, mask, window, ids.shape[1], progress),
        FULL: lambda: _full(model, ids, mask, full_context_tokens or 4 * window),
        WINDOW: lambda: _window_and_sinks(model, ids, mask, window, progress),
    }
    for name, branch in branches.items():
        readers[name] = partial(_branch, model, ids, mask, piece, branch, progress)
    was_training = model.training
    model.eval()
    readings: dict[str, Reading] = {}
    try:
        with torch.no_grad():
            for name in (MEMORY, *controls):
                known = (base or {}).get(name)
                readings[name] = _timed(readers[name], model.device) if known is None else known
                if base is not None and name in (TRUNCATED, FULL, WINDOW):
                    base[name] = readings[name]
    finally:
        model.train(was_training)
    result = PerplexityResult(
        _edges(size, ids.shape[1]), size, window, len(rows), {}, norms, model.config.trained_norms
    )
    for name, reading in readings.items():
        result.curves[name] = _curve(reading, readings[MEMORY][0], result.edges)
    return result


def _timed(read: Callable[[], Tensor], device: torch.device) -> Reading:
    start = time.perf_counter()
    with peak_memory(device) as peak:
        values = read()
    return values, time.perf_counter() - start, peak.bytes


def token_nll(logits: Tensor, ids: Tensor, mask: Tensor, first: int) -> Tensor:
    """Compute the NLL `(B, n)` of the tokens after columns `first ..`, NaN where there is none.

    Args:
        logits: `(B, n, V)` of columns `first` to `first + n - 1`.
        ids, mask: `(B, T)` of the whole text.
        first: first column.
    """
    batch, count = logits.shape[:2]
    targets = torch.full((batch, count), -100, dtype=torch.long, device=ids.device)
    following = ids[:, first + 1 : first + 1 + count]
    real = mask[:, first + 1 : first + 1 + count].bool().to(ids.device)
    targets[:, : following.shape[1]] = following.masked_fill(~real, -100)
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100
    ).view(batch, count)
    return loss.masked_fill(targets == -100, math.nan).cpu()


def _place(nll: Tensor, values: Tensor, first: int) -> None:
    """Enter the NLL of the tokens after columns `first ..` at those tokens' own positions."""
    count = min(values.shape[1], nll.shape[1] - first - 1)
    nll[:, first + 1 : first + 1 + count] = values[:, :count]


def _memory(
    model: MemoryModelForCausalLM,
    ids: Tensor,
    mask: Tensor,
    piece: int,
    control: str | None,
    progress: bool,
    norms: list[dict[str, Any]] | None = None,
) -> Tensor:
    nll = torch.full(ids.shape, math.nan)
    state, loop = model.new_state(ids.shape[0]), model.loop()
    name = MEMORY if control is None else f"memory {control}"
    for first in tqdm(range(0, ids.shape[1], piece), desc=name, disable=not progress):
        part, part_mask = ids[:, first : first + piece], mask[:, first : first + piece]
        reading = loop(
            check_inputs(part, None, part_mask),
            state,
            hidden_from=0,
            collect=model._collected,
            keep_open=control != "off",  # then nothing is written, either
            control=control,
        )
        state = reading.state
        if norms is not None and (now := model.state_norms(state)):
            largest = {n: {str(k): float(v.max()) for k, v in at.items()} for n, at in now.items()}
            norms.append({"tokens": first + part.shape[1], **largest})
        logits = model._logits(reading.hidden, 0)  # type: ignore[arg-type]
        _place(nll, token_nll(logits, ids, mask, first), first)
    return nll


def _branch(
    model: MemoryModelForCausalLM,
    ids: Tensor,
    mask: Tensor,
    piece: int,
    branch: str,
    progress: bool,
) -> Tensor:
    """Read with one branch of the model's memory alone."""
    with ExitStack() as stack:
        for memory in model.memories.values():
            if branch in memory.branches:
                stack.enter_context(memory.only(branch))
        return _memory(model, ids, mask, piece, None, progress)


def _windows(
    model: MemoryModelForCausalLM, ids: Tensor, mask: Tensor, window: int, end: int, progress: bool
) -> Tensor:
    """Run the backbone alone on consecutive windows, each read without what came before."""
    nll = torch.full(ids.shape, math.nan)
    with lora_disabled(model.backbone):
        for first in tqdm(range(0, end, window), desc=TRUNCATED, disable=not progress):
            # Columns behind a row's end follow its text, so causal attention never sees them.
            logits = model.backbone(
                input_ids=ids[:, first : first + window], use_cache=False
            ).logits
            _place(nll, token_nll(logits, ids, mask, first), first)
    return nll


def _full(model: MemoryModelForCausalLM, ids: Tensor, mask: Tensor, end: int) -> Tensor:
    """Run the backbone alone over the whole prefix, as far as `end` and its position table
    reach."""
    limit = model.parts.max_positions
    end = min(end, ids.shape[1], limit or end)
    return _windows(model, ids[:, :], mask, end, end, False)


def _window_and_sinks(
    model: MemoryModelForCausalLM, ids: Tensor, mask: Tensor, window: int, progress: bool
) -> Tensor:
    """Run the backbone alone with a sliding window and the first tokens (StreamingLLM)."""
    nll = torch.full(ids.shape, math.nan)
    with windowed(model, window, len(ids)) as (feed, piece):
        for first in tqdm(range(0, ids.shape[1], piece), desc=WINDOW, disable=not progress):
            columns = slice(first, first + piece)
            logits = feed(ids[:, columns], mask[:, columns])
            _place(nll, token_nll(logits, ids, mask, first), first)
    return nll


def _edges(size: int, total: int) -> list[int]:
    """Bucket edges in tokens: segment 0, 1-3, 4-7, 8-15, ... to the end."""
    edges, step = [0, size], 4 * size
    while edges[-1] < total:
        edges.append(step)
        step *= 2
    return edges


def _curve(reading: Reading, memory: Tensor, edges: list[int]) -> Curve:
    values, seconds, peak = reading
    mean, error, tokens = [], [], []
    for a, b in pairwise(edges):
        part = values[:, a:b]
        mean.append(float(part.nanmean()))
        error.append(_error(part.nanmean(1)))
        tokens.append(int((~part.isnan()).sum()))
    difference = values - memory
    return Curve(
        mean, error, tokens,
        overall=float(values.nanmean()),
        gain=float(difference.nanmean()),
        gain_error=_error(difference.nanmean(1)),
        seconds=round(seconds, 2), peak_bytes=peak,
    )  # fmt: skip


def _error(values: Tensor) -> float:
    """Compute the standard error of the mean across documents."""
    values = values[~values.isnan()]
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
