"""InfLLM: far text in blocks that a query looks up, without training (Xiao et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from memwrap.backbones import LayerAttention, MemoryKeyValues
from memwrap.memories.config import MemoryConfig
from memwrap.memories.parts import block_units, grouped_units
from memwrap.memories.parts.block_units import HELD, UNITS_A_PAGE
from memwrap.memories.parts.grouped_units import GroupedUnits, QueryGroups, Units
from memwrap.memories.parts.recent_places import Layout, PoolPlan
from memwrap.memories.protocol import AttentionMemory, Bounds, Claims
from memwrap.memories.registry import register
from memwrap.memories.settings import LayerList, NonNegativeInt, PositiveInt
from memwrap.memories.sizes import Sizes, attending_layers
from memwrap.ops import infllm as ops
from memwrap.ops.buffers.host_prefetch import prefetch
from memwrap.ops.buffers.left_aligned import earliest
from memwrap.ops.buffers.paged import SlotCache, append, number_of, put
from memwrap.ops.buffers.right_aligned import right_valid
from memwrap.state.progress import Progress
from memwrap.state.trees import HOST, RECENT, STORE, Tree

QUERIES_AT_ONCE = 128  # the units that any of them selected are laid out together
FEW_UNITS = 16  # so many are laid out together for all queries
NO_UNITS: Units = ()  # of a layer that looks up units
REPRESENTATIVES_A_PAGE = 256


class InfLLMConfig(MemoryConfig):
    """A token attends to the last `window_size` tokens, to the first `num_sinks` of the document
    and to `top_k` units, blocks of `block_size` tokens of the rest, all of it kept.

    Examples:
        >>> import memwrap
        >>> memwrap.InfLLMConfig(window_size=1024).block_size
        128

    Attributes:
        segment_size: the execution block: tokens that are read at once.
        window_size: l_L, tokens of the local window (the token itself among them).
        num_sinks: first tokens of the document, always visible.
        block_size: l_bs, tokens of a unit.
        top_k: k_m, units that a token attends to.
        num_representatives: r_k, tokens whose mean key stands for a unit, in every query head.
        score: what makes a token a representative: `"attention"`, the attention that it received
            while it was in the window (as the published code has it), or `"dot_product"`, its
            inner products with the queries behind it (as the paper has it).
        selection: `"causal"`: units are selected at every `retrieval_interval`-th token of a
            segment, by the mean query since the last selection; `"block"`: by the mean query of
            all tokens of a segment that a call brings, as published: it looks ahead, and depends on
            how text is fed; `"question"`: as `"block"`, but single tokens, as they are generated,
            keep what the question selected.
        retrieval_interval: tokens that share one selection; published: 1 while generating.
        window_mask: `"corrected"`, or `"published"`, where the first queries of an execution block
            see tokens at the window's edge twice.
        offload: keep units in the host's memory.
        cache_size: units of a layer that stay on the device beside them (least recently used).
        layers: decoder layers that look up units (`None`: those without a sliding window of
            their own; all where every layer has one). Others have window and sinks.
    """

    name: ClassVar[str] = "infllm"
    not_in_state: ClassVar[frozenset[str]] = frozenset(
        {"top_k", "retrieval_interval", "selection", "cache_size"}
    )

    window_size: PositiveInt = 4096
    num_sinks: NonNegativeInt = 128
    block_size: PositiveInt = 128
    top_k: PositiveInt = 16
    num_representatives: PositiveInt = 4
    score: Literal["attention", "dot_product"] = "attention"
    selection: Literal["causal", "block", "question"] = "causal"
    retrieval_interval: PositiveInt = 8
    window_mask: Literal["corrected", "published"] = "corrected"
    offload: bool = False
    cache_size: PositiveInt = 32
    layers: LayerList | None = None

    def validate_representatives(self) -> None:
        if self.num_representatives > self.block_size:
            self.refuse("num_representatives", f"at most `block_size` ({self.block_size})")

    def validate_window(self) -> None:
        if self.segment_size > self.window_size:
            self.refuse("segment_size", f"at most `window_size` ({self.window_size})")

    @classmethod
    def tiny(cls) -> InfLLMConfig:
        return cls(
            segment_size=8, window_size=16, num_sinks=2, block_size=2, top_k=2,
            num_representatives=1, retrieval_interval=4, cache_size=3,
        )  # fmt: skip


@register(InfLLMConfig)
class InfLLMMemory(AttentionMemory):
    """Per layer: the recent tokens' un-rotated keys and values, those of the sinks, and a store of
    units with one representative vector a query head.

    Recent tokens are the window and what has left it but does not fill a unit yet. Sinks, units
    and tokens past the window stand at the constant distance l_L - 1 from every query.
    """

    claims = Claims(neutral_start=True, bounded=False, lengthens=True)
    counts_positions = True

    config: InfLLMConfig

    def __init__(self, config: InfLLMConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        free = [n for n, dims in sizes.attention.items() if dims.window is None]
        chosen = free or list(sizes.attention)
        self.retrieving = set(chosen if config.layers is None else attending_layers(config, sizes))
        self.where = HOST if config.offload else "units"
        self.resettled({"cache_size"})
        size = sizes.backbone_dtype.itemsize
        for dims in (sizes.attention[n] for n in self.retrieving):
            self.bytes_per_token += dims.num_kv_heads * (dims.key_dim + dims.value_dim) * size
            self.bytes_per_token += dims.num_heads * dims.key_dim * size / config.block_size

    def resettled(self, changed: set[str]) -> None:
        size, offload = self.config.cache_size, self.config.offload
        self.slots = {n: SlotCache(size) for n in self.retrieving if offload}

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        return {
            "layers": {
                str(layer): self._empty(layer, batch_size, device) for layer in self.sizes.attention
            }
        }

    def _empty(self, layer: int, batch: int, device: torch.device) -> Tree:
        config, dims = self.config, self.sizes.attention[layer]
        make: dict[str, Any] = {"device": device, "dtype": self.sizes.backbone_dtype}
        tree: Tree = {"tokens": torch.zeros(batch, dtype=torch.long, device=device)}
        widths = {"key": dims.key_dim, "value": dims.value_dim}
        shape = (batch, dims.num_kv_heads)
        tree[RECENT] = {n: torch.zeros(*shape, 0, width, **make) for n, width in widths.items()}
        for name, width in widths.items():
            tree[f"sink_{name}"] = torch.zeros(*shape, config.num_sinks, width, **make)
        if layer not in self.retrieving:
            return tree
        wide = torch.promote_types(self.sizes.backbone_dtype, torch.float32)
        sums: dict[str, Any] = {"device": device, "dtype": wide}
        tree[RECENT]["score"] = torch.zeros(batch, dims.num_heads, 0, **sums)
        tree["open_score"] = torch.zeros(batch, dims.num_heads, config.window_size, **sums)
        tree["query_sum"] = torch.zeros(batch, dims.num_heads, dims.key_dim, **sums)
        tree["query_count"] = torch.zeros_like(tree["tokens"])
        # Numbers from 1 of the units chosen last, 0 for none; no state depends on `top_k`.
        tree["chosen"] = tree["tokens"].new_zeros(batch, 1, 0)
        tree["choices"] = torch.zeros_like(tree["tokens"])  # units among `chosen`
        if config.offload:
            make = {**make, "device": "cpu"}
        block = (batch, 0, dims.num_kv_heads, config.block_size)
        units = {name: torch.zeros(*block, width, **make) for name, width in widths.items()}
        make = {**make, "device": device}
        rep = {"rep": torch.zeros(batch, 0, dims.num_heads, dims.key_dim, **make)}
        return tree | {self.where: {STORE: {"0": units}}, "index": {STORE: {"0": rep}}}

    # Reading

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        for tree in state["layers"].values():
            yield tree["tokens"], *progress.closed
            units = self._counted(tree["tokens"])[1]
            yield self._live(tree["tokens"]), 0, tree[RECENT]["key"].shape[2]
            if "chosen" in tree:
                yield tree["query_count"], 0, progress.read[1]
                yield tree["chosen"], 0, units
                for number in block_units.counts_of(tree["chosen"]):
                    yield tree["choices"], number, number
                for name, size in ((self.where, UNITS_A_PAGE), ("index", REPRESENTATIVES_A_PAGE)):
                    yield units, 0, number_of(tree[name][STORE])
                    yield block_units.first_length(tree[name][STORE], units, size)

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        config = self.config
        selection: ops.Selection | None = None
        noted: Tree = {}
        if layer in self.retrieving:
            selection, noted = self._select(attention, state)
        outputs = []
        received: Any = 0
        length = attention.query.shape[2]
        at_once = QUERIES_AT_ONCE
        if selection is None or selection.marks.shape[1] * config.top_k <= FEW_UNITS:
            at_once = max(1, length)
        starts = range(0, length, at_once)
        parts = [slice(start, min(length, start + at_once)) for start in starts]
        fetched = self._fetched(layer, attention, state, selection, parts)
        for piece, units in zip(parts, fetched, strict=True):
            part = attention if len(parts) == 1 else attention.part(piece.start, piece.stop)
            out, scores = self._attend_part(part, state, units)
            outputs.append(out)
            received = received + scores if scores is not None else None
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        if received is not None:
            noted |= block_units.add_received(attention, state, received, config.window_size)
        return out, {**state, **noted}

    def _select(self, attention: LayerAttention, state: Tree) -> tuple[ops.Selection, Tree]:
        """Select the units that the step's queries see, and note it in the state. Where nothing is
        selected, there are no marks: what was chosen before stands."""
        config, valid = self.config, attention.query_valid
        rows = torch.arange(len(valid), device=valid.device)
        _, units = self._settled(attention, state)
        noted: Tree = {}
        if config.selection == "question" and valid.shape[1] == 1:
            return ops.Selection(valid.new_zeros(len(valid), 0, 0), valid.long() * 0), noted
        if config.selection != "causal":
            index = valid.long()
            query = attention.query.detach().to(state["query_sum"].dtype) * valid[:, None, :, None]
            means = (query.sum(2) / valid.sum(1).clamp_min(1)[:, None, None])[:, None]
        else:
            starts, index, some = attention.cached_per_step(
                (self, "starts"), lambda: self._starts(attention)
            )
            if not some:
                query = attention.query.detach().to(state["query_sum"].dtype)
                noted["query_sum"] = state["query_sum"] + (query * valid[:, None, :, None]).sum(2)
                noted["query_count"] = state["query_count"] + valid.sum(1)
                return ops.Selection(valid.new_zeros(len(valid), 0, 0), index), noted
            means, noted["query_sum"], noted["query_count"] = ops.gather_queries(
                attention.query, starts, valid, state["query_sum"], state["query_count"]
            )
        pages = state["index"][STORE]
        number = number_of(pages)
        carried = torch.zeros(len(rows), 1, number, dtype=torch.bool, device=valid.device)
        if not number:
            return ops.Selection(carried, torch.zeros_like(index)), noted
        chosen = state["chosen"][:, 0]  # column 0 takes what is no choice
        carried = pad(carried[:, 0], (1, 0)).scatter(1, chosen, True)[:, None, 1:]
        place = index.new_full((len(rows), means.shape[1]), self._reach(attention) - 1)
        name = "selecting", self, self._reach(attention), place.shape[1]
        query = attention.rotate(means.transpose(1, 2), place, name).transpose(1, 2)
        representatives = (pages[str(n)]["rep"] for n in range(len(pages)))
        scores = torch.cat([ops.unit_scores(query, rep) for rep in representatives], 2)
        marks = torch.cat([carried, ops.select(scores, units, config.top_k)], 1)
        last = marks[rows, index.amax(1) if index.shape[1] else 0]
        most = min(max(config.top_k, chosen.shape[1]), number)
        chosen_units = earliest(last, most)
        noted["chosen"] = ((chosen_units + 1) * last.gather(1, chosen_units))[:, None]
        noted["choices"] = last.sum(1)
        return ops.Selection(marks, index), noted

    def _starts(self, attention: LayerAttention) -> tuple[Tensor, Tensor, bool]:
        """Find where units are selected, `(B, T)` bool, how often up to each token, and whether."""
        interval, valid = self.config.retrieval_interval, attention.query_valid
        starts = valid & (attention.query_positions % interval == 0)
        return starts, starts.long().cumsum(1), bool(starts.any())

    def _attend_part(
        self, attention: LayerAttention, state: Tree, units: Units | GroupedUnits | None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute some queries' output, and what other columns received, `(B, H, recent + K)`."""
        other = None
        layout = self._layout(attention, state, units is not None)
        recent = {n: _last(state[RECENT][n], layout.valid.shape[1]) for n in HELD}
        if isinstance(units, GroupedUnits):
            other, units = units.attend(attention, layout.far), NO_UNITS
        # Layers see alike where they read units in one way.
        name = "infllm", self, self._reach(attention), units is not None, other is not None
        rows = self._far_rows(attention, state, units, layout, recent)
        if count := layout.valid.shape[1]:
            whole = count == state[RECENT]["key"].shape[2]
            cached: Any = {"static": whole, "name": ("recent", self, count)}
            rows.append(
                MemoryKeyValues(
                    recent["key"], recent["value"], layout.positions, layout.visible, **cached
                )
            )
        if units is not None and self.config.score == "attention":
            out, received = attention.join_received(
                *rows, local=layout.local, name=name, other=other
            )
            return out, received.to(state["open_score"].dtype)
        out, _ = attention.join(*rows, local=layout.local, name=name, other=other)
        if units is None:
            return out, None
        keys = torch.cat([recent["key"].to(attention.key.dtype), attention.key], 2)
        place = torch.cat([layout.positions, attention.key_positions], 1)
        distance = attention.query_positions[:, :, None] - place[:, None]
        reach = self._reach(attention)
        counted = (distance > 0) & (distance < reach) & attention.query_valid[..., None]
        counted &= torch.cat([layout.valid, attention.key_valid], 1)[:, None]
        query = attention.rotate(attention.query, attention.query_positions)
        return out, ops.received_products(query, attention.rotate(keys, place), counted)

    def _layout(self, attention: LayerAttention, state: Tree, looks_up: bool) -> Layout:
        """Say where keys stand and who sees them, once for all layers that are alike."""
        config, reach = self.config, self._reach(attention)

        def made() -> Layout:
            valid = self._recent_valid(state, whole=attention.rotated_query.shape[2] == 1)
            sinks = torch.arange(config.num_sinks, device=valid.device)
            return Layout.of(
                attention, valid, state["tokens"],
                sinks < self._settled(attention, state)[0][:, None], reach, config.window_size,
                looks_up=looks_up, published=config.window_mask == "published",
            )  # fmt: skip

        return attention.cached_per_step((self, "layout", reach, looks_up), made)

    def _far_rows(
        self, attention: LayerAttention, state: Tree, units: Units | None, layout: Layout,
        recent: Tree,
    ) -> list[MemoryKeyValues]:  # fmt: skip
        """Collect the keys at the constant distance: units, sinks, tokens past the window."""
        if units is None and attention.window is not None:
            return []
        far: Units = (state["sink_key"], state["sink_value"], layout.sinks)
        chosen = units is not None and len(units) > 0 and units[0].shape[2] > 0
        if units is not None and chosen:
            far = block_units.behind(units, far)
        elif not layout.some_sinks:
            far = (*far[:2], layout.sinks[..., :0])
        past, reach = layout.past.shape[2], self._reach(attention)
        whole = past == state[RECENT]["key"].shape[2]
        rows = (
            ("far", True, chosen, far),
            ("past", whole, False, (*(recent[n][:, :, :past] for n in HELD), layout.past)),
        )  # fmt: skip
        return [
            MemoryKeyValues(
                key, value, torch.zeros_like(layout.far[:, :1]).expand(-1, mask.shape[2]), mask,
                layout.far, static=static, name=(part, self, reach, mask.shape[2]), by_layer=varies,
            )
            for part, static, varies, (key, value, mask) in rows
            if mask.shape[2]
        ]  # fmt: skip

    def _fetched(
        self, layer: int, attention: LayerAttention, state: Tree,
        selection: ops.Selection | None, parts: list[slice],
    ) -> Iterable[Units | GroupedUnits | None]:  # fmt: skip
        """Yield the units that each part of the queries sees; from the host one part ahead."""
        if selection is None:
            return [None] * len(parts)
        groups: list[QueryGroups | None] = [None] * len(parts)
        if self.config.selection == "causal" and selection.marks.shape[1]:
            at = [(selection.index[:, piece], (self, piece.start)) for piece in parts]
            groups = [grouped_units.grouping(attention, *arguments) for arguments in at]
        fetches = [
            partial(self._units, layer, state, selection, *work)
            for work in zip(parts, groups, strict=True)
        ]
        if layer in self.slots and not torch.is_grad_enabled():
            return prefetch(fetches, selection.index.device)
        return (fetch() for fetch in fetches)

    def _units(
        self, layer: int, state: Tree, selection: ops.Selection, columns: slice,
        groups: QueryGroups | None,
    ) -> Units | GroupedUnits:  # fmt: skip
        """Take the units that any of the queries selected."""
        index, pages = selection.index[:, columns], state[self.where][STORE]
        heads, cache = self.sizes.attention[layer].num_heads, self.slots.get(layer)
        if not selection.marks.shape[1]:
            return block_units.chosen_units(pages, state["chosen"], index, cache)
        return grouped_units.selected_units(pages, selection.marks, index, groups, heads, cache)

    # Writing

    def write_attention(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        config, before = self.config, state["tokens"]
        recent_valid = attention.cached_per_step(
            (self, "recent"), lambda: self._recent_valid(state)
        )

        def planned() -> PoolPlan:
            valid = torch.cat([recent_valid, attention.key_valid], 1)
            tokens = before + attention.key_valid.sum(1)
            old, new = ((n, *self._counted(n)) for n in (before, tokens))
            return PoolPlan.of(valid, old, new, config.block_size)

        closing = attention.cached_per_step((self, "closing"), planned)
        count = recent_valid.shape[1]
        pool = {
            name: closing.pool(_last(state[RECENT][name], count), rows)
            for name, rows in (("key", attention.key), ("value", attention.value))
        }
        new: Tree = {"tokens": closing.tokens}
        if closing.some[0]:
            for name, rows in pool.items():
                buffer = state[f"sink_{name}"]
                new[f"sink_{name}"] = put(buffer, closing.before[0], rows, closing.sinks, 2)
        if layer in self.retrieving:
            opened = block_units.scores_of_segment(attention, state["open_score"])
            score = _last(state[RECENT]["score"], count)
            pool["score"] = closing.pool(score[..., None], opened[..., None])
            if closing.some[1]:
                new |= self._new_units(state, pool, closing)
            new["open_score"] = torch.zeros_like(state["open_score"])
        new[RECENT] = closing.rest(pool)
        if "score" in new[RECENT]:
            new[RECENT]["score"] = new[RECENT]["score"].squeeze(-1)
        return {**state, **new}

    def _new_units(self, state: Tree, pool: Tree, closing: PoolPlan) -> Tree:
        """Append to the stores the units made of a pool's rows."""
        blocks = closing.blocks(pool, self.config.block_size)
        scores = blocks.pop("score").squeeze(-1)
        rep = ops.representatives(blocks["key"], scores, self.config.num_representatives)
        pages, index = state[self.where][STORE], state["index"][STORE]
        counts, more = closing.before[1], closing.units
        return {
            self.where: {STORE: append(pages, counts, blocks, more, UNITS_A_PAGE)},
            "index": {STORE: append(index, counts, {"rep": rep}, more, REPRESENTATIVES_A_PAGE)},
        }

    # Places

    def _counted(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        return ops.settled(tokens, c.window_size, c.num_sinks, c.block_size)

    def _live(self, tokens: Tensor) -> Tensor:
        """Count the recent tokens of rows that have read so many."""
        sinks, units = self._counted(tokens)
        return tokens - sinks - units * self.config.block_size

    def _settled(self, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tensor]:
        """Count the sinks and units of a state, which all layers have alike."""
        return attention.cached_per_step((self, "settled"), lambda: self._counted(state["tokens"]))

    def _reach(self, attention: LayerAttention) -> int:
        """Count the tokens that a layer sees in order: the smaller one of two windows."""
        return min(self.config.window_size, attention.window or self.config.window_size)

    def _recent_valid(self, state: Tree, whole: bool = False) -> Tensor:
        """Tell which recent tokens are there, `(B, R)`; columns that no row needs are left out,
        unless the `whole` buffers are wanted."""
        live, count = self._live(state["tokens"]), state[RECENT]["key"].shape[2]
        count = count if whole else int(live.max()) if len(live) else 0
        return right_valid(live, count)


def _last(buffer: Tensor, count: int) -> Tensor:
    """Take the last rows of a buffer of recent tokens."""
    first = buffer.shape[2] - count
    return buffer[:, :, first:] if first else buffer
