"""Accuracy of finding a needle, by length and depth, beside the controls that make it honest."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from memwrap.evaluation.needles import NeedleSample, NeedleTask
from memwrap.evaluation.perplexity import (
    CURVES,
    MEMORY,
    OFF,
    SHUFFLED,
    SINKS,
    TRUNCATED,
    WINDOW,
    lora_disabled,
)
from memwrap.files import write_text
from memwrap.memories.window import WindowConfig, WindowMemory
from memwrap.model import MemoryModelForCausalLM
from memwrap.reading import Loop, check_inputs
from memwrap.segments import SegmentReader
from memwrap.state import MemoryState


@dataclass
class NeedleResult:
    """Share of right answers by curve, length and depth.

    Attributes:
        task: its name.
        lengths: tokens at most.
        depths: where the needle stands, 0 to 1.
        samples: texts at each length and depth.
        window: tokens that "base, truncated" and "base, window + sinks" see.
        accuracy: by curve one row a length, one value a depth; None where it was not measured.
        tokens: by length the mean number of tokens.
    """

    task: str
    lengths: list[int]
    depths: list[float]
    samples: int
    window: int
    accuracy: dict[str, list[list[float | None]]] = field(default_factory=dict)
    tokens: list[float] = field(default_factory=list)

    def mean(self, curve: str, length: int) -> float | None:
        """Accuracy at the `length`-th length over all depths."""
        values = self.accuracy[curve][length]
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known else None

    def error(self, accuracy: float, depths: int = 1) -> float:
        """Binomial standard error over the samples of so many depths."""
        return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / (self.samples * depths))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {"format": "memwrap-needles", "version": 1, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the result as JSON."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def table(self) -> str:
        """A Markdown table: accuracy by length, over all depths."""
        head = [f"{self.task}, tokens", *map(str, self.lengths)]
        rows = [head, ["---"] * len(head)]
        for name in self.accuracy:
            cells = []
            for index in range(len(self.lengths)):
                value = self.mean(name, index)
                error = 0.0 if value is None else self.error(value, len(self.depths))
                cells.append("-" if value is None else f"{value:.2f} ± {error:.2f}")
            rows.append([name, *cells])
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


@torch.no_grad()
def evaluate_needles(
    model: MemoryModelForCausalLM,
    task: NeedleTask,
    *,
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096),
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 8,
    controls: tuple[str, ...] = CURVES[1:],
    window: int | None = None,
    full_context_tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> NeedleResult:
    """Share of answers that are right, by length and depth of the needle.

    The text is read into a state, which is closed; the question is asked of it. An answer is
    right if greedy generation would begin with the number: each of its tokens is the likeliest
    after the right ones before it, and no digit follows. All curves see the same texts.

    Args:
        model: a memwrap model.
        task: makes the texts, with the model's tokenizer.
        lengths: tokens of a text with question and answer, at most.
        depths: where the needle stands.
        samples: texts at each length and depth, read as one batch.
        controls: curves beside "memory", as in `perplexity_by_position`.
        window: tokens of "base, truncated" (the last ones), and of window and sinks together
            (default: the backbone's context, at most 2,048).
        full_context_tokens: how long "base, full context" is tried (default: 4 windows).
        seed: of the texts.
        progress: show a bar.

    Raises:
        ValueError: for an unknown control, or "memory shuffled" with fewer than two samples.
    """
    unknown = sorted(set(controls) - set(CURVES))
    if unknown:
        raise ValueError(f"Unknown controls {unknown}; allowed: {', '.join(CURVES[1:])}.")
    if SHUFFLED in controls and samples < 2:
        raise ValueError("The control 'memory shuffled' needs at least two samples.")
    window = window or min(model.parts.config.max_position_embeddings, 2048)
    limit = full_context_tokens or 4 * window
    result = NeedleResult(task.name, list(lengths), list(depths), samples, window)
    result.accuracy = {
        name: [[None] * len(depths) for _ in lengths] for name in (MEMORY, *controls)
    }
    was_training = model.training
    model.eval()
    counts: list[list[int]] = [[] for _ in lengths]
    cells = list(product(enumerate(lengths), enumerate(depths)))
    for (row, length), (column, depth) in tqdm(cells, desc=task.name, disable=not progress):
        generator = random.Random(f"{seed} {length} {depth}")
        texts = [task.sample(length, depth, generator) for _ in range(samples)]
        counts[row] += [len(t.ids) for t in texts]
        for name, logits in _logits(model, texts, list(result.accuracy), window, limit).items():
            right = sum(_right(task, t, x) for t, x in zip(texts, logits, strict=True))
            result.accuracy[name][row][column] = right / samples
    model.train(was_training)
    result.tokens = [sum(c) / len(c) for c in counts]
    return result


def _right(task: NeedleTask, sample: NeedleSample, logits: Tensor) -> bool:
    """Whether the likeliest tokens are the answer, and no digit goes on with it."""
    best = logits.argmax(-1).cpu()
    wanted = sample.ids[sample.answer :]
    behind = task.tokenizer.decode([int(best[-1])])
    return torch.equal(best[:-1], wanted) and not behind[:1].isdigit()


def _logits(
    model: MemoryModelForCausalLM,
    texts: list[NeedleSample],
    curves: list[str],
    window: int,
    limit: int,
) -> dict[str, list[Tensor]]:
    """For each curve that can answer, every text's logits of its answer and of what follows."""
    state = model.close_segment(model.read([t.ids[: t.question].tolist() for t in texts]))
    questions = [t.ids[t.question :] for t in texts]
    ids = torch.nn.utils.rnn.pad_sequence(questions, batch_first=True).to(model.device)
    lengths = torch.tensor([len(q) for q in questions])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(model.device)
    found: dict[str, list[Tensor]] = {}
    longest = min(limit, model.parts.max_positions or limit)
    for name in curves:
        if name in (MEMORY, OFF, SHUFFLED):
            control = None if name == MEMORY else name.removeprefix("memory ")
            logits = model(
                input_ids=ids, attention_mask=mask, past_key_values=state.clone(),
                memory_control=control,
            ).logits  # fmt: skip
            found[name] = [
                x[t.answer - t.question - 1 : n]
                for x, t, n in zip(logits, texts, lengths.tolist(), strict=True)
            ]
        elif name == WINDOW:
            found[name] = _windowed(model, texts, window)
        elif name == TRUNCATED or max(len(t.ids) for t in texts) <= longest:
            found[name] = [
                _alone(model, t, window if name == TRUNCATED else longest) for t in texts
            ]
    return found


def _alone(model: MemoryModelForCausalLM, sample: NeedleSample, window: int) -> Tensor:
    """The backbone without adapters on the last `window` tokens."""
    ids = sample.ids[-window:][None].to(model.device)
    keep = len(sample.ids) - sample.answer + 1
    with lora_disabled(model.backbone):
        out = model.backbone(input_ids=ids, use_cache=False, logits_to_keep=keep)
    return out.logits[0]


def _windowed(
    model: MemoryModelForCausalLM, texts: list[NeedleSample], window: int
) -> list[Tensor]:
    """The backbone without adapters, with a sliding window and the first tokens (StreamingLLM)."""
    config = WindowConfig(
        segment_size=max(1, window // 4), window_size=max(1, window - SINKS), num_sinks=SINKS
    )
    found = []
    with lora_disabled(model.backbone), model.parts.attention_lent():
        memory = WindowMemory(config, model.sizes(attention=True)).to(model.device)
        loop = Loop(SegmentReader(model.parts, {config.name: memory}), config, False)
        for sample in texts:
            state = MemoryState({config.name: memory.init_state(1, model.device)}, 1)
            inputs = check_inputs(sample.ids[None].to(model.device), None, None)
            reading = loop(inputs, state, hidden_from=sample.answer - 1, keep_open=False)
            found.append(model.parts.head(reading.hidden)[0])  # type: ignore[arg-type]
    return found


__all__ = ["NeedleResult", "evaluate_needles"]
