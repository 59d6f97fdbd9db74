"""Shared by the invariants: wrapped tiny models whose memory matters, comparisons, references."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import memwrap
from memwrap.memories.protocol import LogitsMemory, SeesSegment
from memwrap.state.trees import aligned, alike, tree_leaves
from memwrap.testing.families import FAMILIES, VOCABULARY, build
from memwrap.testing.margins import record

SEGMENT = 8
TOLERANCE = 1e-4
_MODELS: dict[tuple[str, str, int, str], Any] = {}
_SHOWN: set[tuple[Any, ...]] = set()
# peft 0.21 says so of experts whose weights are one tensor, with and without a memory.
PEFT_EXPERTS = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"
)


def pairs(
    reach: Literal["llama", "places", "branches"] = "llama",
    families: Sequence[str] = FAMILIES,
    having: str = "",
) -> pytest.MarkDecorator:
    """Run a test on every pair of a memory and a family; `conftest.py` reads the mark.

    Args:
        reach: which pairs are not left to `full`: all memories on llama; one of each place on the
            other families too; besides those, all memories for which a family makes a difference.
        families: the families, some of `FAMILIES`.
        having: an attribute of the memories' class that is not empty ("sums"); "" for all of them.
    """
    return pytest.mark.pairs(reach=reach, families=tuple(families), having=having)


def tiny(memory: str, **settings: Any) -> memwrap.MemoryConfig:
    """The memory's own test configuration with some fields changed."""
    return dataclasses.replace(memwrap.config_class(memory).tiny(), **settings)


def randomise(model: Any, seed: int = 7, std: float = 0.3) -> Any:
    """Draw every memory parameter anew: a value matrix of zeros would hide mistakes.

    Vectors (biases, norms) become 1 and noise, so that two builds are the same model.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.memory_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(drawn.to(parameter.dtype) + (parameter.dim() < 2))
    return model


def wrapped(
    memory: str = "rmt", family: str = "llama", *, base: Any = None, seed: int = 0, **settings: Any
) -> Any:
    """A tiny wrapped model in evaluation mode, its memory's parameters random.

    What has no base of its own is a copy of a model that each process makes once: wrapping runs a
    model to see that it can be read. It leaves torch's random numbers as they were.
    """
    config = tiny(memory, **settings)
    with torch.random.fork_rng(devices=[]):
        if base is not None:
            return randomise(memwrap.wrap(base, config))
        key = memory, family, seed, repr(config)
        if key not in _MODELS:
            _MODELS[key] = randomise(memwrap.wrap(build(family, seed=seed), config))
        made = copy.deepcopy(_MODELS[key])
        made.made_as = key
        return made


def ids(*shape: int, seed: int = 0) -> Tensor:
    """Random ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, shape, generator=generator)


def error_of(got: Tensor, want: Tensor) -> float:
    """Largest difference, in units of the largest wanted value."""
    assert got.shape == want.shape, f"{tuple(got.shape)} != {tuple(want.shape)}"
    if not want.numel():
        return 0.0
    scale = want.detach().abs().max().clamp_min(1e-12)
    return float((got.detach().to(want.dtype) - want.detach()).abs().max() / scale)


def assert_close(got: Tensor, want: Tensor, tolerance: float = TOLERANCE, label: str = "") -> None:
    """Within `tolerance` of the wanted values' scale."""
    error = error_of(got, want)
    record(error, tolerance, label)
    assert error <= tolerance, f"{label} differs by {error:.2e} of its scale"


def assert_same_states(got: Any, want: Any, tolerance: float = TOLERANCE) -> None:
    """Two states remember the same."""
    for name in ("tokens_seen", "fill", "segments"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for memory, tree in want.memories.items():
        # A row read beside longer ones has zeros behind its own entries of a store.
        tree, other = aligned(tree, got.memories[memory])
        other = dict(tree_leaves(other))
        for name, value in tree_leaves(tree):
            # A buffer that grows is as long as the longest row of its batch needs.
            left, right = alike(other[name].float(), value.float())
            assert_close(left, right, tolerance, f"{memory}.{name}")


def assert_memory_matters(model: Any, text: Tensor) -> None:
    """With the memory off the second segment's logits are others: the test could fail. What
    `wrapped` made is asked once for each text."""
    text = text[:, : 2 * SEGMENT]
    shown = (getattr(model, "made_as", None), *text.flatten().tolist())
    if shown in _SHOWN:
        return
    with torch.no_grad():
        on = model(text).logits[:, SEGMENT:]
        off = model(text, memory_control="off").logits[:, SEGMENT:]
    assert error_of(off, on) > 1e-2, "the memory does not matter here: the test proves nothing"
    if shown[0] is not None:
        _SHOWN.add(shown)


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients by parameter name; they are cleared."""
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def assert_same_gradients(
    got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    """Every gradient within `tolerance` of its own scale (and of noise on the largest)."""
    assert got.keys() == want.keys()
    largest = max(float(g.abs().max()) for g in want.values())
    for name, gradient in want.items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        error = float((got[name] - gradient).abs().max()) / scale
        record(error, tolerance, f"gradient of {name}")
        assert error <= tolerance, f"gradient of {name} differs by {error:.2e} of its scale"


def differ(got: dict[str, Tensor], want: dict[str, Tensor], least: float = 1e-3) -> bool:
    """Whether any gradient differs clearly."""
    return any(
        float((got[n] - g).abs().max()) > least * float(g.abs().max().clamp_min(1e-6))
        for n, g in want.items()
    )


def shifted(labels: Tensor) -> Tensor:
    """`shift_labels` of `labels`, the plain way."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)


def padded(rows: list[Tensor], side: str, total: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids and mask `(B, T)` of rows padded on the left, the right, or both sides."""
    total = total or max(len(r) for r in rows) + (2 if side == "both" else 0)
    text = torch.zeros(len(rows), total, dtype=torch.long)
    mask = torch.zeros_like(text)
    for index, row in enumerate(rows):
        spare = total - len(row)
        start = {"left": spare, "right": 0, "both": spare // 2}[side]
        text[index, start : start + len(row)] = row
        mask[index, start : start + len(row)] = 1
    return text, mask


@torch.no_grad()
def assert_greedy(model: Any, prompt: Tensor, answer: Tensor, label: Any = "") -> None:
    """Each id of an answer `(1, N)` is what recomputation without any cache says at its place.

    One forward of all ids says it for each of them: no logit depends on what follows it
    (`test_causality`), so where all agree, a forward for each new id would give the same.
    """
    assert answer.shape[1] > 0
    logits = model(torch.cat([prompt, answer[:, :-1]], 1), use_cache=False).logits
    assert torch.equal(answer, logits[:, prompt.shape[1] - 1 :].argmax(-1)), label


def needs_ids(model: Any) -> bool:
    """Whether a memory keeps the ids of what is read, so that embeddings are refused."""
    memories = model.memories.values()
    seeing = [m for m in memories if isinstance(m, SeesSegment)]
    reading = [m for m in memories if isinstance(m, LogitsMemory) and m.key == "ids"]
    return bool(reading) or any("ids" in m.looks_at for m in seeing)


def checkpointed(model: Any) -> Any:
    """The model with activations computed again in the backward pass (transformers 5.17 calls
    it gradient checkpointing)."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()
    return model
