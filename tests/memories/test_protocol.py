"""The protocol checks itself: what a memory may name, and which memories go together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import MEMORIES
from torch import Tensor

import memwrap
from memwrap.memories.pairs import check_together
from memwrap.memories.protocol import (
    PLACES,
    AttentionMemory,
    Claims,
    LayerMemory,
    Memory,
    SeesSegment,
    SoftPrompt,
    places_of,
)
from memwrap.memories.registry import memory_class
from memwrap.testing.families import build
from memwrap.testing.helpers import ids, randomise, tiny, wrapped


def nothing(self: Any, *args: Any) -> Any:
    return args[-1]


@pytest.mark.parametrize(
    ("base", "members", "said"),
    [
        (SeesSegment, {"look_at": frozenset({"hidden"})}, "did you mean `looks_at`"),
        (SoftPrompt, {"num_prefx": 3}, "did you mean `num_prefix`"),
        (SoftPrompt, {"write_sufix": nothing}, "did you mean `write_suffix`"),
        (
            SoftPrompt,
            {"attend": nothing},
            "belongs to AttentionMemory.*Derive from",
        ),
        (Memory, {"write_layer": nothing}, "belongs to LayerMemory"),
        (AttentionMemory, {"looks_at": frozenset({"ids"})}, "belongs to SeesSegment"),
        (AttentionMemory, {"breadth": 3}, "is no attribute of a memory; set it in __init__"),
    ],
)
def test_names_that_would_never_be_used_are_refused(
    base: type[Memory], members: dict[str, Any], said: str
) -> None:
    with pytest.raises(TypeError, match=f"Mine.{next(iter(members))} .*{said}"):
        type("Mine", (base,), members)


def test_names_of_its_own_are_allowed() -> None:
    members = {"RATE": 3, "_wide": 3, "claims": Claims(neutral_start=True), "recall": nothing}
    kind = type("Mine", (SoftPrompt, LayerMemory), {**members, "read_layer": nothing})
    assert places_of(kind) == ["prompt", "layer"]


@pytest.mark.parametrize("memory", MEMORIES)
def test_every_memory_attaches_somewhere(memory: str) -> None:
    places = places_of(memory_class(memory))
    assert places and set(places) <= set(PLACES)
    for stale in ("places", "neutral_start", "bounded", "linearizes", "extra_tokens"):
        assert not hasattr(memwrap.config_class(memory), stale)


@pytest.mark.parametrize("place", ["attention", "logits"])
def test_what_only_one_can_have_is_refused(place: str) -> None:
    names = [name for name in MEMORIES if place in places_of(memory_class(name))]
    if len(names) < 2:  # nothing to refuse yet: a second one is made
        first = memory_class(names[0])
        with pytest.raises(ValueError, match=f"both attach at the {place} place"):
            check_together({"one": first, "two": first})
        return
    with pytest.raises(ValueError, match=f"both attach at the {place} place"):
        memwrap.wrap(build("llama"), tiny(names[0]), tiny(names[1]))


def test_each_memory_writes_its_own_suffix() -> None:
    """Beside another's, armt's matrices are written by armt's tokens alone."""
    seen: dict[str, Tensor] = {}
    model = randomise(memwrap.wrap(build("llama"), tiny("rmt"), tiny("armt")))
    memory = model.memories["armt"]
    layer = memory.layers["0"]
    write = layer.write

    def noting(hidden: Tensor, state: Any) -> Any:
        seen["hidden"] = hidden
        return write(hidden, state)

    layer.write = noting
    with torch.no_grad():
        model(ids(1, 8))
    assert seen["hidden"].shape[1] == memory.num_suffix == 2
    assert model.memories["rmt"].num_suffix == 3


def test_positions_follow_from_the_sizes() -> None:
    """A table of positions has room for tokens, prefix and suffix, whatever the config says."""
    memory = wrapped("rmt", "gpt2", segment_size=58).memories["rmt"]
    assert memory.num_prefix + memory.num_suffix == 6
    with pytest.raises(ValueError, match="with 6 memory tokens needs 65 positions"):
        wrapped("rmt", "gpt2", segment_size=59)
