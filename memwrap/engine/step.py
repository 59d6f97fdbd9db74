"""The steps of a call: what is read and written when.

A call's tokens are cut into steps (`planning`). In one step every row reads a piece of at most
one segment: `[prefix | tokens | suffix]`, the prefix where the row's segment opens, the suffix
where it closes. A step is a function of (tokens, parameters, state tensors), so that
checkpointing a whole segment is one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memwrap.backbones import Backbone, Positions
from memwrap.backbones.masks import layers_without_attention
from memwrap.backbones.recurrence import Recurrence
from memwrap.engine.insertion import Inserted, insert, inserted_before
from memwrap.engine.layer_context import LayerContext, Local
from memwrap.engine.plan import Step
from memwrap.engine.step_input import Layout, _wide
from memwrap.memories.protocol import Memory, SegmentTokens
from memwrap.state.memory_state import BACKBONE, cache_of, tree_of
from memwrap.state.trees import Tree, tree_map, where_rows


@dataclass
class Outcome:
    """What a step gives.

    Attributes:
        hidden: the tokens' last hidden states `(B, N, D)`.
        states: the memories' trees after it.
        local: the open segments after it.
        auxiliary: the memories' own losses `(B,)`, means per token, or None.
        named: `(B, N, D)` hidden states at the tokens themselves, and `(B, N)` which of them
            predict an inserted token; None where no such token is a target.
        mixed_on: `(B, N, D)` what the memory at the logits place is given of the tokens, or None.
    """

    hidden: Tensor
    states: dict[str, Tree]
    local: Local
    auxiliary: Tensor | None = None
    named: tuple[Tensor, Tensor] | None = None
    mixed_on: Tensor | None = None


class SegmentReader:
    """Runs steps: the backbone and its memories, without any state of its own."""

    def __init__(self, backbone: Backbone, memories: dict[str, Memory]) -> None:
        self.backbone = backbone
        self.memories = memories
        self.tokens = {n: m for n, m in memories.items() if "tokens" in m.config.places}
        self.layers = {n: m for n, m in memories.items() if "layer" in m.config.places}
        self.attending = {n: m for n, m in memories.items() if "attention" in m.config.places}
        mixing = [(n, m) for n, m in memories.items() if "logits" in m.config.places]
        self.mixer: tuple[str, Memory] | None = mixing[0] if mixing else None
        self.num_suffix = sum(m.num_suffix for m in self.tokens.values())
        self.looks_at = sorted({kind for m in memories.values() for kind in m.looks_at})
        inserting = [m for m in self.tokens.values() if m.insert_every]
        self.inserting = inserting[0] if inserting else None  # one memory at most is at a place
        mixes_on = {m.mixes_on for _, m in mixing}
        self.notes_ffn = "ffn" in mixes_on.union(self.looks_at)
        self.count_padding = any(m.config.count_padding for m in memories.values())
        zero = any(m.zero_positions for m in self.tokens.values())
        self.zero_positions = zero and backbone.max_positions is not None

    @property
    def attachment_points(self) -> set[str]:
        """What of the backbone meets the memories."""
        points = {place for memory in self.memories.values() for place in memory.config.places}
        return points | {"feed_forward"} if self.notes_ffn else points

    def init_states(self, batch_size: int, device: torch.device) -> dict[str, Tree]:
        """The trees of rows that have read nothing, of the memories and of the backbone itself."""
        trees = {n: m.init_state(batch_size, device) for n, m in self.memories.items()}
        if self.backbone.recurrent:
            trees[BACKBONE] = self.backbone.remembered(batch_size)
        return trees

    @property
    def prefix_positions(self) -> int:
        """Most positions that the prefix takes in front of a segment's tokens."""
        return 0 if self.zero_positions else sum(m.num_prefix for m in self.tokens.values())

    def run(
        self,
        embeds: Tensor,
        step: Step,
        states: dict[str, Tree],
        local: Local,
        keep: bool,
        ids: Tensor | None = None,
    ) -> Outcome:
        """Read one step.

        Args:
            embeds: `(B, N, D)` of the step's tokens (anything at empty places).
            step: the plan.
            states: the memories' trees.
            local: the open segments before the step.
            keep: whether the open segments are wanted after it.
            ids: `(B, N)` of the step's tokens, -1 where there is none; for memories that look
                at them.
        """
        if bool(step.opens.any()):
            states = self._open(embeds, step, states)
        layout = self._layout(embeds, step, states)
        places = self._places(layout, local)
        order, valid = places.key_positions, places.key_valid
        context = self._context(step, states, local, places)
        cache = cache_of(local.tree) if keep or not local.empty else None
        hidden, ffn = self._hidden(layout, places, local, cache, context)
        count, named = step.columns.shape[1], None
        predicts = self.inserting is not None and self.inserting.insert_predicts
        tokens = layout.tokens(hidden, count, predicts)
        if predicts and layout.among is not None:
            named = layout.tokens(hidden, count), layout.among.ends
        states = context.changed(step.closes)
        now = {"embeds": layout.x, "hidden": hidden, "ffn": ffn}
        if ids is not None:
            now["ids"] = layout.spread(ids)
        seen = self._seen(now, local)
        if bool(step.closes.any()):
            inside = (order >= layout.base[:, None]) & ~places.inserted
            states = self._write(step, states, hidden, seen, valid, inside)
        kept = Local({}, order[:, :0], valid[:, :0])
        if keep and cache is not None:
            noted = {"hidden": context.hidden, "tokens": seen}
            tree = tree_of(cache) | {name: part for name, part in noted.items() if part}
            kept = _still_open(tree, order, valid, step.closes)
        auxiliary = torch.stack(context.losses).sum(0) if context.losses else None
        on = None
        if self.mixer is not None:
            on = layout.tokens(now[self.mixer[1].mixes_on], count, predicts)
        return Outcome(tokens, states, kept, auxiliary, named, on)

    def alone(self, embeds: Tensor, visible: Tensor, counted: Tensor) -> Tensor:
        """Last hidden states of embeddings `(B, K, D)` without memories, positions from 0; see
        `SegmentTokens.run`."""
        visible, counted = visible.cpu(), counted.cpu()
        places = (counted.long().cumsum(1) - 1).clamp(min=0)
        plain = bool(visible.all()) and bool(counted.all())
        recurrence = Recurrence({}, visible) if self.backbone.recurrent else None
        return self.backbone.run(
            embeds,
            places,
            key_positions=None if plain else places,
            key_valid=None if plain else visible,
            recurrence=recurrence,
        )

    def _hidden(
        self, layout: Layout, places: Positions, local: Local, cache: Any, context: LayerContext
    ) -> tuple[Tensor, Tensor]:
        """Last hidden states `(B, N', D)` of a step's input, and what the last layer's
        feed-forward block was given (nothing, where no memory asks for it)."""
        nothing = layout.x.new_zeros(len(layout.x), 0, self.backbone.config.hidden_size)
        if layout.x.shape[1] == 0:  # a segment that closes without tokens or suffix
            self._close_cached(context)
            return layout.x, nothing
        hidden = self._run(layout, places, local, cache, context)
        if context.feed_forward is None:
            return hidden, nothing
        return hidden, context.feed_forward[0].view(*hidden.shape[:2], -1)

    def _run(
        self, layout: Layout, places: Positions, local: Local, cache: Any, context: LayerContext
    ) -> Tensor:
        plain = local.empty and bool(layout.valid.all()) and self._contiguous(layout.places)
        plain = plain and layout.position_ids is None
        hidden = self.backbone.run(
            layout.x,
            layout.places,
            key_positions=None if plain else places.key_positions,
            key_valid=None if plain else places.key_valid,
            position_ids=layout.position_ids,
            cache=cache,
            context=context if self.layers or self.attending else None,
            recurrence=context.recurrence,
            feed_forward=context.feed_forward,
        )
        self._check_met(context)
        return hidden

    def _context(
        self, step: Step, states: dict[str, Tree], local: Local, places: Positions
    ) -> LayerContext:
        recurrent, own = self.backbone.recurrent, places.query_valid
        return LayerContext(
            layered=self.layers,
            attending=self.attending,
            states=states,
            num_suffix=self.num_suffix,
            closing=bool(step.closes.any()),
            places=places,
            local=local,
            rotary=self.backbone.rotary,
            recurrence=Recurrence(states[BACKBONE], own) if recurrent else None,
            feed_forward=[] if self.notes_ffn else None,
        )

    def _close_cached(self, context: LayerContext) -> None:
        if self.attending and context.closing and not context.local.empty:
            for layer, module in self.backbone.attention_modules.items():
                context.close_attention(layer, module)

    def _check_met(self, context: LayerContext) -> None:
        """Every layer must have met its memories: a model that drops keywords is refused."""
        name = type(self.backbone.model).__name__
        count = len(self.backbone.layers) if self.layers or self.attending else 0
        with_attention = count - len(layers_without_attention(self.backbone.config))
        if self.layers and len(context.seen) != count:
            raise ValueError(
                f"{name} does not hand keyword arguments down to its decoder layers, which "
                "layer-level memories need; use a token-level one (rmt)."
            )
        if context.recurrence is not None:
            context.recurrence.check_met(len(self.backbone.recurrent), name)
        if context.feed_forward == []:
            raise ValueError(
                f"{name}'s last feed-forward block no longer meets the memory: classes were "
                "changed after wrapping. Unwrap, change them, and wrap again."
            )
        if self.attending and len(context.attended) != with_attention:
            raise ValueError(
                f"{name}'s attention no longer meets the memory: its attention implementation "
                f"was changed to {self.backbone.config._attn_implementation!r} after wrapping. "
                "Unwrap, change it, and wrap again."
            )

    def _layout(self, embeds: Tensor, step: Step, states: dict[str, Tree]) -> Layout:
        """What the backbone is given, and where it stands."""
        batch, real = embeds.shape[0], step.columns >= 0
        masks = [self._prefix_mask(m, states[n], batch) for n, m in self.tokens.items()]
        mask = torch.cat([torch.zeros(batch, 0, dtype=torch.bool), *masks], 1)
        base = mask.sum(1)
        among = self._among(step)
        blocks, valid, places = [embeds], [real], [self._places_of(step.offsets) + base[:, None]]
        marked = torch.zeros_like(real)
        if among is not None:
            x, there, order, marked = self._insert(embeds, real, among, states)
            blocks, valid, places = [x], [there], [order + base[:, None]]
        there = mask & step.opens[:, None]
        used = there.any(0)
        first = int(used.sum())
        if first:
            parts = [m.prefix(states[n]) for n, m in self.tokens.items() if m.num_prefix]
            prefix = torch.cat(parts, 1).to(embeds.dtype)
            if first < prefix.shape[1]:  # columns that no row needs
                prefix = prefix[:, used.nonzero().squeeze(1).to(prefix.device)]
            blocks.insert(0, prefix)
            valid.insert(0, there[:, used])
            places.insert(0, (mask.long().cumsum(1) - 1).clamp(min=0)[:, used])
        if self.num_suffix and bool(step.closes.any()):
            parts = [m.suffix(states[n]) for n, m in self.tokens.items() if m.num_suffix]
            blocks.append(torch.cat(parts, 1).to(embeds.dtype))
            valid.append(step.closes[:, None].expand(-1, self.num_suffix))
            end = step.ends + base
            if self.inserting is not None:
                end = end + inserted_before(step.ends, self.inserting.insert_every)
            places.append(end[:, None] + torch.arange(self.num_suffix))
        ids = self._table_positions(step, among, places, first, base)
        if self.zero_positions:
            own = 1 if first else 0  # which block holds the tokens
            vector = self.backbone.first_position().to(embeds.dtype)
            blocks = [b if i == own else b - vector for i, b in enumerate(blocks)]
            other = [torch.zeros_like(p) for p in places]
            ids = torch.cat([step.offsets if i == own else p for i, p in enumerate(other)], 1)
        x = torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0]
        marked = torch.nn.functional.pad(marked, (first, x.shape[1] - first - marked.shape[1]))
        return Layout(x, torch.cat(valid, 1), torch.cat(places, 1), ids, first, base, marked, among)

    def _among(self, step: Step) -> Inserted | None:
        if self.inserting is None:
            return None
        return insert(step, self.inserting.insert_every, self.count_padding)

    def _places_of(self, offsets: Tensor) -> Tensor:
        """Where tokens stand behind those inserted before them."""
        return (
            offsets if self.inserting is None else offsets + offsets // self.inserting.insert_every
        )

    def _insert(
        self, embeds: Tensor, real: Tensor, among: Inserted, states: dict[str, Tree]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens and inserted ones by place: embeddings, validity, places, which are inserted."""
        memory: Memory = self.inserting  # type: ignore[assignment]
        batch, count = among.valid.shape
        if memory.insert_id is None:
            own = memory.inserted(states[memory.config.name])
        else:
            own = self.backbone.embed(torch.full((1, 1), memory.insert_id, device=embeds.device))
        x = torch.cat([embeds, own.to(embeds.dtype).expand(batch, count, -1)], 1)
        x = x.gather(1, _wide(among.order, x))
        both = (real, among.valid), (among.token_places, among.places)
        valid, places = (torch.cat(pair, 1).gather(1, among.order) for pair in both)
        return x, valid, places, among.order >= real.shape[1]

    def _table_positions(
        self, step: Step, among: Inserted | None, places: list[Tensor], first: int, base: Tensor
    ) -> Tensor | None:
        """What a table of learned positions is asked for, where that is not the order: inserted
        tokens take up no position of it."""
        if self.inserting is None or self.backbone.max_positions is None:
            return None
        offsets = step.offsets
        if among is not None:
            offsets = torch.cat([offsets, among.followed], 1).gather(1, among.order)
        places = list(places)
        places[1 if first else 0] = offsets + base[:, None]
        if self.num_suffix and bool(step.closes.any()):
            places[-1] = (step.ends + base)[:, None] + torch.arange(self.num_suffix)
        return torch.cat(places, 1)

    def _places(self, layout: Layout, local: Local) -> Positions:
        """Where the step's columns and those of the open segment stand."""
        inserted = torch.zeros_like(local.valid)
        if self.inserting is not None:
            every = self.inserting.insert_every + 1
            inserted = (local.positions - layout.base[:, None]) % every == every - 1
        return Positions.of(
            (local.positions, local.valid),
            (layout.places, layout.valid),
            torch.cat([inserted, layout.marked], 1),
        )

    @staticmethod
    def _prefix_mask(memory: Memory, state: Tree, batch: int) -> Tensor:
        mask = memory.prefix_mask(state) if memory.num_prefix else None
        if mask is None:
            return torch.ones(batch, memory.num_prefix, dtype=torch.bool)
        return mask.cpu()

    @staticmethod
    def _contiguous(positions: Tensor) -> bool:
        return bool((positions == torch.arange(positions.shape[1])).all())

    def _open(self, embeds: Tensor, step: Step, states: dict[str, Tree]) -> dict[str, Tree]:
        """The memories as segments open, where one looks at the first tokens."""
        real = step.columns >= 0
        counted = torch.ones_like(real) if self.count_padding else real
        tokens = SegmentTokens(embeds, None, real, counted, self.alone)
        result = dict(states)
        for name, memory in self.tokens.items():
            new = memory.opened(states[name], tokens)
            if new is not states[name]:
                every = bool(step.opens.all())
                result[name] = new if every else where_rows(step.opens, new, states[name])
        return result

    def _seen(self, now: Tree, local: Local) -> Tree:
        """What memories look at, `(B, 1, K, D)` as keys are laid out, open columns first."""
        before = local.tree.get("tokens", {})
        return {
            kind: torch.cat([*([before[kind]] if kind in before else []), now[kind][:, None]], 2)
            for kind in self.looks_at
        }

    def _write(
        self,
        step: Step,
        states: dict[str, Tree],
        hidden: Tensor,
        seen: Tree,
        valid: Tensor,
        inside: Tensor,
    ) -> dict[str, Tree]:
        """The memories' trees after the suffix and the tokens of the rows that closed.

        Args:
            step, hidden: as in `run`.
            states: what the layers made of the trees.
            seen: what memories look at, of the columns before the step and of the step.
            valid, inside: `(B, K)` of those columns: there; behind the prefix.
        """
        result = dict(states)
        place = hidden.shape[1] - self.num_suffix
        end = valid.shape[1] - self.num_suffix
        looked = {kind: value[:, 0, :end] for kind, value in seen.items()}
        mask = (valid & inside)[:, :end]
        counted = inside[:, :end] if self.count_padding else mask
        ids = looked["ids"][..., 0] if "ids" in looked else None
        tokens = SegmentTokens(
            looked.get("embeds"), looked.get("hidden"), mask, counted, self.alone,
            looked.get("ffn"), ids,
        )  # fmt: skip
        for name, memory in self.memories.items():
            new = states[name]
            if name in self.tokens:
                new = memory.write(new, hidden[:, place : place + memory.num_suffix])
                place += memory.num_suffix
            if memory.looks_at:
                new = memory.closed(new, tokens)
            if new is not states[name]:
                every = bool(step.closes.all())
                result[name] = new if every else where_rows(step.closes, new, states[name])
        return result


def _still_open(tree: Tree, positions: Tensor, valid: Tensor, closes: Tensor) -> Local:
    """Drop what belongs to closed segments; columns that no row needs go altogether."""
    valid = valid & ~closes[:, None]
    used = valid.any(0)
    if not bool(used.any()):
        return Local({}, positions[:, :0], valid[:, :0])
    if not bool(used.all()):
        columns = used.nonzero().squeeze(1)
        tree = tree_map(lambda t: t.index_select(2, columns.to(t.device)), tree)
        positions, valid = positions[:, used], valid[:, used]
    return Local(tree, positions, valid)
