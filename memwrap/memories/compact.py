"""Compact memory: what leaves the recent rows is folded into slots by attention matching."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from memwrap.backbones import LayerAttention, MemoryKeyValues
from memwrap.memories.config import MemoryConfig
from memwrap.memories.parts.reference_queries import ReferenceQueries
from memwrap.memories.parts.slots import (
    Rows,
    compacted,
    empty_slots,
    key_values,
    share_of,
    slots_of,
    with_slots,
)
from memwrap.memories.parts.whole_states import WholeStates
from memwrap.memories.protocol import AttentionMemory, Bounds, Claims
from memwrap.memories.registry import register
from memwrap.memories.settings import (
    Fraction,
    LayerList,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
)
from memwrap.memories.sizes import Sizes, attending_layers
from memwrap.ops import compaction as ops
from memwrap.ops.buffers import filled, take
from memwrap.ops.buffers.left_aligned import earliest
from memwrap.state.progress import Progress
from memwrap.state.trees import Tree


class CompactConfig(MemoryConfig):
    """The first `num_sinks` tokens and the last `memory_size` stay as they are; what is between
    becomes `slots` keys with a bias and a value each, which act like all of it.

    Examples:
        >>> import memwrap
        >>> memwrap.CompactConfig(slots=64).memory_size
        512

    Attributes:
        slots: keys that a KV head keeps of older text.
        memory_size: recent tokens before the segment that stay as they are. `None`: all of them
            (full attention, a state that grows) until `model.compact` makes slots of them.
        num_sinks: first tokens that stay as they are.
        merge: `"match"`: keys are chosen, biases and values fitted to what the segment's queries
            find (attention matching); `"select"`: chosen only; `"mean"`: running means of like keys
            with the logarithm of their number as bias (CAMELoT).
        selection: of `"match"` and `"select"`: keys of the largest root mean square (`"rms"`),
            `"max"` or `"mean"` attention, or matching pursuit on the mass (`"omp"`, slow).
        bias_bound: biases change by at most that at a fold, up or down; 0: slots have none, and
            can become a prefix of PEFT (`model.save_prefix`).
        ridge: of the fits, towards the old values; in units of the mean eigenvalue.
        similarity: of `"mean"`: cosine from which on a token joins a slot.
        reference_every: every so many tokens of a segment one is a reference query (`None`: each;
            every fourth where all of a text is kept).
        share_weights: a reference query counts by the share of attention that the folded rows have.
        max_distance: slots and sinks are seen at most so far before the segment (`None`: where
            they stood, however far that is).
        budgets: shares of all slots by head, `{"L0H0": 0.02, ...}`, sum 1 (`None`: all alike).
        bptt_segments: 1 by default: the memory is a constant for gradients.
        layers: decoder layers that have a memory (`None`: all with attention). Layers with a
            sliding window of their own keep it and get no slots.
    """

    name: ClassVar[str] = "compact"
    not_in_state: ClassVar[frozenset[str]] = frozenset({"max_distance"})

    slots: PositiveInt = 128
    memory_size: PositiveInt | None = 512
    num_sinks: NonNegativeInt = 4
    merge: Literal["match", "select", "mean"] = "match"
    selection: Literal["rms", "max", "mean", "omp"] = "rms"
    bias_bound: NonNegativeFloat = 3.0
    ridge: NonNegativeFloat = 1e-3
    similarity: Fraction = 0.9
    reference_every: PositiveInt | None = None
    share_weights: bool = False
    max_distance: PositiveInt | None = 4096
    budgets: dict | None = None
    bptt_segments: PositiveInt | None = 1
    layers: LayerList | None = None

    @property
    def matching(self) -> ops.Matching:
        """The op's settings."""
        omp, fits = self.selection == "omp", self.merge == "match"
        return ops.Matching(
            selection="omp" if omp else "attention",
            score="rms" if omp else self.selection,  # type: ignore[arg-type]
            fit_bias=fits and self.bias_bound > 0,
            fit_values=fits,
            lower=math.exp(-self.bias_bound),
            upper=math.exp(self.bias_bound),
            ridge=self.ridge,
        )

    @classmethod
    def tiny(cls) -> CompactConfig:
        return cls(
            segment_size=8, memory_size=6, slots=5, num_sinks=2, reference_every=2,
            bptt_segments=None,
        )  # fmt: skip


@register(CompactConfig)
class CompactMemory(AttentionMemory, WholeStates):
    """Per layer: sinks, slots, recent rows, and the open segment's reference queries.

    A segment attends to `[sinks; slots; recent; segment]` in one softmax. When it closes, rows of
    `[recent; segment]` beyond the last `memory_size` are folded into the slots.
    """

    claims = Claims(neutral_start=True, lengthens=True)
    # `memwrap.compact` may give more slots than the config.
    widens = ("slot_key", "slot_value", "slot_bias", "slot_place", "slot_age")

    config: CompactConfig
    within_window = True

    def __init__(self, config: CompactConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.chosen = attending_layers(config, sizes)
        whole = config.memory_size is None
        every = config.reference_every or (4 if whole else 1)
        self.references = ReferenceQueries(every, config.segment_size, whole)
        self.budgets = self._budgets()
        if config.memory_size is None:
            dims = (self.sizes.attention[n] for n in self.chosen)
            numbers = sum(
                d.num_kv_heads * (d.key_dim + d.value_dim) + d.num_heads * d.key_dim for d in dims
            )
            self.bytes_per_token = numbers * sizes.backbone_dtype.itemsize + 8 * len(self.chosen)
            self.claims = replace(self.claims, bounded=False)  # type: ignore[misc]

    # State

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        config, dtype = self.config, self.sizes.backbone_dtype
        layers: Tree = {}
        for layer in self.chosen:
            dims = self.sizes.attention[layer]
            width = int(self.budgets[layer].max())
            tree = empty_slots(batch_size, width, dims, dtype, device, config.slots)
            make: dict[str, Any] = {"dtype": dtype, "device": device}
            sizes = {"sink": config.num_sinks, "recent": 0}
            for name, size in sizes.items():
                shape = (batch_size, dims.num_kv_heads, size)
                tree[f"{name}_key"] = torch.zeros(*shape, dims.key_dim, **make)
                tree[f"{name}_value"] = torch.zeros(*shape, dims.value_dim, **make)
                tree[f"{name}_count"] = torch.zeros(batch_size, dtype=torch.long, device=device)
            tree["tokens"] = torch.zeros(batch_size, dtype=torch.long, device=device)
            tree |= self.references.empty(batch_size, dims, dtype, device)
            if config.merge == "mean":
                tree["slot_age"] = torch.zeros_like(tree["slot_place"])
            layers[str(layer)] = tree
        return {"layers": layers}

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        alike: dict[int | None, Tree] = {}
        for name, tree in state["layers"].items():
            window = self.sizes.attention[int(name)].window
            yield from self._same_ranges(tree, alike.setdefault(window, tree))
            if window is None:
                yield self.references.number(progress.open), 0, tree["query"].shape[2]
            yield tree["tokens"], 0, progress.closed[1]
            yield tree["limit"], 1, self._most_slots(tree)
            for name in ("slot", "sink", "recent"):
                yield tree[f"{name}_count"], 0, tree[f"{name}_key"].shape[2]
            if "past_count" in tree:
                yield tree["past_count"], 0, tree["past_query"].shape[2]

    def _same_ranges(self, tree: Tree, first: Tree) -> Iterator[Bounds]:
        """Say what is the same in layers that are alike, whose masks are made in the `first`."""
        for name in ("tokens", "recent_count", "sink_count"):
            yield tree[name], first[name], first[name]
        if self.config.budgets is None:
            yield tree["limit"], first["limit"], first["limit"]
            for name in ("slot_key", "recent_key"):
                width, wanted = (t[name].shape[2] for t in (tree, first))
                yield torch.full_like(tree["limit"], width), wanted, wanted

    def _recent_size(self, layer: int) -> int | None:
        """Give how many recent rows a layer keeps; None: all. What its own window does not reach is
        not among them."""
        size, window = self.config.memory_size, self.sizes.attention[layer].window
        if window is None:
            return size
        return window - 1 if size is None else min(size, window - 1)

    def _budgets(self) -> dict[int, Tensor]:
        """Give the slots of every KV head, `(Hkv,)`, by layer."""
        config, dims = self.config, self.sizes.attention
        even = {n: torch.full((dims[n].num_kv_heads,), config.slots) for n in self.chosen}
        if config.budgets is None:
            return even
        names = {f"L{n}H{h}" for n in self.chosen for h in range(dims[n].num_kv_heads)}
        if names != config.budgets.keys():
            wrong = sorted(names ^ config.budgets.keys())
            raise ValueError(
                f"CompactConfig.budgets needs one share for each KV head of each layer, as 'L0H0'; "
                f"{wrong[0]!r} is missing or foreign."
            )
        total = config.slots * len(names)
        return {
            n: torch.tensor(
                [int(config.budgets[f"L{n}H{h}"] * total + 1e-6) for h in range(len(even[n]))]
            ).clamp_min(1)
            for n in self.chosen
        }

    # Reading

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        window = self.sizes.attention[layer].window
        request = self.request
        if request is not None:
            if request.kept:
                given = self.references.kept(state)
                first = torch.nn.functional.pad(given.place, (0, 1)).amin(1)  # of all documents
                given = given.asked_again(-first)
            else:
                given = self.references.of_step(attention)
            state = self._compact_layer(layer, attention, state, request.limit, given)
            request.trees[str(layer)] = state
        elif window is None:
            state = self.references.noted(attention, state)
        name = ("compact", window) if self.config.budgets is None else None
        recent = self._recent(attention, state, window)
        if window is not None:
            return attention.join(recent, name=name)[0], state
        slots = key_values(state, self.config.max_distance, self.config.budgets is not None)
        return attention.join(self._sinks(state), slots, recent, name=name)[0], state

    def _recent(
        self, attention: LayerAttention, state: Tree, window: int | None
    ) -> MemoryKeyValues:
        count, size = state["recent_count"], state["recent_key"].shape[2]
        place = torch.arange(size, device=count.device) - count[:, None]
        place = place.clamp_max(-1)  # those that hold nothing yet stand nowhere else
        visible = filled(count, size)
        if window is not None:
            distance = attention.query_positions[:, :, None] - place[:, None]
            visible = visible[:, None] & (distance < window)
        return MemoryKeyValues(state["recent_key"], state["recent_value"], place, visible)

    # Writing

    def write_attention(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        count, before = attention.key_valid.sum(1), state["recent_count"]
        old = torch.arange(state["recent_key"].shape[2], device=count.device) - before[:, None]
        place = torch.cat([old, attention.key_positions], 1)
        real = torch.cat([filled(before, old.shape[1]), attention.key_valid], 1)
        order = earliest(real, real.shape[1])
        key, value = (
            take(torch.cat([state[f"recent_{n}"], x.to(state[f"recent_{n}"])], 2), order)
            for n, x in (("key", attention.key), ("value", attention.value))
        )
        total, place = before + count, place.gather(1, order)
        size = self._recent_size(layer)
        stays = total if size is None else total.clamp_max(size)
        leaving = total - stays
        width = old.shape[1]
        if size is None or width < size:
            width = max(width, int(stays.max()))
        index = torch.arange(width, device=stays.device) + leaving[:, None]
        index, valid = index.clamp_max(place.shape[1] - 1), filled(stays, width)
        new = {**state, "recent_key": take(key, index, valid), "recent_count": stays}
        new |= {"recent_value": take(value, index, valid), "tokens": state["tokens"] + count}
        if self.sizes.attention[layer].window is not None:
            return new
        first = state["tokens"] - before  # the number of the first row in the document
        new = self._with_sinks(new, (key, value), first, leaving)
        rows = Rows.plain(key, value, place, filled(total, place.shape[1]))
        new = self._folded(layer, attention, new, rows, first, leaving)
        return self.references.closed(attention, new)

    def _folded(
        self, layer: int, attention: LayerAttention, state: Tree, rows: Rows, first: Tensor,
        leaving: Tensor,
    ) -> Tree:  # fmt: skip
        """Fold the leaving rows behind the sinks into the slots."""
        config, softcap = self.config, self.sizes.attention[layer].softcap
        number = torch.arange(rows.key.shape[2], device=first.device)
        folds = (number < leaving[:, None]) & (number + first[:, None] >= config.num_sinks)
        moved = attention.key_valid.sum(1)
        if not attention.cached_per_step("compact folds", lambda: bool(folds.any())):
            return with_slots(state, slots_of(state), moved)
        new = replace(rows, valid=folds[:, None].expand(rows.valid.shape))
        new = new.packed(int(folds.sum(1).max()))
        if config.merge == "mean":
            return self._averaged(state, new, moved)
        references = self.references.of_segment(attention, state).asked_again(moved)
        pool = slots_of(state).beside(new)
        if config.share_weights:
            others = replace(rows, valid=rows.valid & ~folds[:, None])
            share = share_of(attention, pool, others, references, config.max_distance, softcap)
            references = replace(references, weight=references.weight * share)
        slots = compacted(
            attention, pool, self._budget(layer, state["limit"]), references, config.matching,
            config.max_distance, softcap,
        )  # fmt: skip
        return with_slots(state, slots, moved)

    def _averaged(self, state: Tree, new: Rows, moved: Tensor) -> Tree:
        """Let the slots follow the means of like keys."""
        slots = slots_of(state)
        count = slots.bias.exp() * slots.valid
        given = (slots.key, slots.value, slots.place, count, state["slot_age"])
        key, value, place, count, age = ops.running_means(
            given, (new.key, new.value, new.place[:, 0]), new.valid[:, 0], self.config.similarity
        )
        valid = count > 0
        rows = Rows(key, value, count.clamp_min(1).log(), place, valid)
        return {**with_slots(state, rows, moved), "slot_age": age.float()}
