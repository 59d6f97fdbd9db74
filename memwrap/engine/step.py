"""One step of a call: a piece of at most one segment a row, `[prefix | tokens | suffix]`.

The prefix stands where a row's segment opens, the suffix where it closes. A step is a function of
(tokens, parameters, state tensors), so that checkpointing a whole segment is one call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memwrap.backbones import Backbone, Positions
from memwrap.backbones.adapters import lora_disabled
from memwrap.backbones.expert_balance import ExpertBalance
from memwrap.backbones.layer_attention import AttentionStep
from memwrap.backbones.masks import layers_without_attention
from memwrap.backbones.recurrence import Recurrence
from memwrap.engine.layer_context import LayerContext, PastReader
from memwrap.engine.mixer_matching import as_it_was, matching_mixers
from memwrap.engine.plan import Step
from memwrap.engine.step_input import InputLayout, StepInput
from memwrap.memories.protocol import (
    AttentionMemory,
    LayerMemory,
    LogitsMemory,
    Memory,
    SeesSegment,
    SegmentTokens,
)
from memwrap.state.memory_state import BACKBONE
from memwrap.state.open_segment import OpenSegment, keys_and_values
from memwrap.state.trees import Tree, where_rows


@dataclass
class StepOutput:
    """The results of a step.

    Attributes:
        hidden: `(B, N, D)` last hidden states that predict what follows each token.
        states: the memories' trees after it.
        segment: the open segments after it.
        auxiliary: the memories' own losses `(B,)`, means per token, or None.
        inserted: `(B, N, D)` hidden states at the tokens themselves, and `(B, N)` which of them
            predict an inserted token; None where no such token is a target.
        key: `(B, N, D)` what the memory at the logits is given of the tokens, or None.
    """

    hidden: Tensor
    states: dict[str, Tree]
    segment: OpenSegment
    auxiliary: Tensor | None = None
    inserted: tuple[Tensor, Tensor] | None = None
    key: Tensor | None = None


class SegmentReader:
    """The backbone and its memories, which run steps without any state of their own."""

    def __init__(
        self, backbone: Backbone, memories: dict[str, Memory], balance: ExpertBalance | None = None
    ) -> None:
        self.backbone, self.balance = backbone, balance
        self.memories = memories
        self.layered = {n: m for n, m in memories.items() if isinstance(m, LayerMemory)}
        self.attending = {n: m for n, m in memories.items() if isinstance(m, AttentionMemory)}
        self.seeing = {
            n: m for n, m in memories.items() if isinstance(m, SeesSegment) and m.looks_at
        }
        mixing = [(n, m) for n, m in memories.items() if isinstance(m, LogitsMemory)]
        self.mixer: tuple[str, LogitsMemory] | None = mixing[0] if mixing else None
        self.looks_at = sorted({kind for m in self.seeing.values() for kind in m.looks_at})
        self.keeps_ids = [n for n, m in self.seeing.items() if "ids" in m.looks_at]
        self.keeps_ids += [n for n, m in mixing if m.key == "ids"]
        self.needs_ids = bool(self.keeps_ids) or backbone.ids_matter
        self.notes_ffn = "ffn" in {*self.looks_at, *(m.key for _, m in mixing)}
        self.tells_answers = any(m.tells_answers for m in self.attending.values())
        self.count_padding = any(m.config.count_padding for m in memories.values())
        self.layout = InputLayout(backbone, memories, self.count_padding)

    @property
    def attachment_points(self) -> set[str]:
        """What of the backbone meets the memories."""
        names = ("layer", "attention", "feed_forward")
        wanted = (self.layered, self.attending, self.notes_ffn)
        return {name for name, any_ in zip(names, wanted, strict=True) if any_}

    def init_states(self, batch_size: int, device: torch.device) -> dict[str, Tree]:
        """Make the trees of rows that have read nothing, of the memories and of the backbone
        itself."""
        trees = {n: m.init_state(batch_size, device) for n, m in self.memories.items()}
        if self.backbone.recurrent:
            trees[BACKBONE] = self.backbone.remembered(batch_size)
        return trees

    def run(
        self,
        embeds: Tensor,
        step: Step,
        states: dict[str, Tree],
        segment: OpenSegment,
        keep: bool,
        ids: Tensor | None = None,
        answers: Tensor | None = None,
    ) -> StepOutput:
        """Read one step.

        Args:
            embeds: `(B, N, D)` of the step's tokens (anything at empty positions).
            step: the plan.
            states: the memories' trees.
            segment: the open segments before the step.
            keep: whether the open segments are wanted after it.
            ids: `(B, N)` of the step's tokens, -1 where there is none; for memories that look
                at them, and a backbone where they matter.
            answers: `(B, N)` bool, tokens that are part of an answer; None: none.
        """
        given = self.layout(embeds, step, states, segment)
        if answers is not None:
            given.positions.answers = given.spread(answers.long())[..., 0] > 0
        recurrent, valid = self.backbone.recurrent, given.positions.query_valid
        context = LayerContext(
            layered=self.layered,
            attending=self.attending,
            states=states,
            suffixes=self.layout.suffixes,
            closing=bool(step.closes.any()),
            positions=given.positions,
            segment=segment,
            rotary=self.backbone.rotary,
            recurrence=Recurrence(states[BACKBONE], valid) if recurrent else None,
            feed_forward=[] if self.notes_ffn else None,
            routed=[] if self.balance and not matching_mixers() else None,
        )
        cache = segment.cache() if keep or len(segment) else None
        spread = None if ids is None else given.spread(ids)
        with self._adapters():
            hidden, ffn = self._hidden(given, cache, context, spread)
        if context.routed:
            text = given.spread((step.columns >= 0).long())[..., 0] > 0
            balance: Tensor = self.balance(tuple(context.routed), text.to(hidden.device).long())  # type: ignore[misc]
            context.losses.append(balance.expand(len(text)))
        states, key = self._key(ids, context.changed(step.closes))
        noted_now = segment.noted or context.noting or key is not None
        now = {"embeds": given.embeds, "hidden": hidden, "ffn": ffn}
        if spread is not None:
            now["ids"] = spread
        looked = self._looked_at(now, segment)
        if context.closing:
            states = self._write(step, states, hidden, looked, given)
        after = OpenSegment.empty(len(embeds))
        if keep and cache is not None:
            noted = {"hidden": context.hidden, "tokens": looked}
            tree = keys_and_values(cache) | {name: part for name, part in noted.items() if part}
            where, valid = given.positions.key_positions, given.positions.key_valid
            tokens = self.layout.insertion.tokens(where - given.base)
            after = OpenSegment(tree, where, valid, tokens, noted_now).after(step.closes)
        auxiliary = torch.stack(context.losses).sum(0) if context.losses else None
        in_loss, ends = self.layout.insertion.in_loss, given.ends
        inserted = (given.of_tokens(hidden), ends) if in_loss and ends is not None else None
        if self.mixer and key is None:
            key = given.of_tokens(now[self.mixer[1].key], in_loss)
        tokens = given.of_tokens(hidden, in_loss)
        return StepOutput(tokens, states, after, auxiliary, inserted, key)

    def _adapters(self) -> AbstractContextManager[None]:
        """Switch the backbone's adapters off where a memory has them for its own passes alone, and
        where the backbone is the teacher."""
        if matching_mixers():
            return as_it_was(self.backbone.model)
        frozen = any(memory.frozen_reader for memory in self.seeing.values())
        return lora_disabled(self.backbone.model) if frozen else nullcontext()

    def _key(
        self, ids: Tensor | None, states: dict[str, Tree]
    ) -> tuple[dict[str, Tree], Tensor | None]:
        """Let the memory at the logits read the step's ids, if it does; the trees after it, and
        what it makes of them."""
        if self.mixer is None or self.mixer[1].key != "ids" or ids is None:
            return states, None
        name, memory = self.mixer
        key, tree = memory.read_ids(ids, states[name])
        return {**states, name: tree}, key

    def alone(self, embeds: Tensor, visible: Tensor, counted: Tensor) -> Tensor:
        """Compute the last hidden states of embeddings `(B, K, D)` without memories, positions from
        0; see `SegmentTokens.run`."""
        visible, counted = visible.cpu(), counted.cpu()
        positions = (counted.long().cumsum(1) - 1).clamp(min=0)
        plain = bool(visible.all()) and bool(counted.all())
        recurrence = Recurrence({}, visible) if self.backbone.recurrent else None
        return self.backbone.run(
            embeds,
            positions,
            key_positions=None if plain else positions,
            key_valid=None if plain else visible,
            recurrence=recurrence,
        )

    def _hidden(
        self, given: StepInput, cache: Any, context: LayerContext, ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Compute the last hidden states `(B, N', D)` of a step's input, and what the last layer's
        feed-forward block was given (nothing, where no memory asks for it)."""
        x, positions = given.embeds, given.positions
        nothing = x.new_zeros(len(x), 0, self.backbone.config.hidden_size)
        if x.shape[1] == 0:  # a segment that closes without tokens or suffix
            if self.attending and context.closing and len(context.segment):
                past = self._past(x, context)
                for layer, module in self.backbone.attention_modules.items():
                    context.close_attention(layer, module, *past[layer])
            return x, nothing
        hidden = self.backbone.run(
            x,
            positions.query_positions,
            key_positions=None if given.plain else positions.key_positions,
            key_valid=None if given.plain else positions.key_valid,
            position_ids=given.position_ids,
            cache=cache,
            context=context if self.layered or self.attending else None,
            recurrence=context.recurrence,
            feed_forward=context.feed_forward,
            routed=context.routed,
            ids=None if ids is None else ids.squeeze(-1),
        )
        self._check_met(context)
        if context.feed_forward is None:
            return hidden, nothing
        return hidden, context.feed_forward[0].view(*hidden.shape[:2], -1)

    def _past(self, embeds: Tensor, context: LayerContext) -> dict[int, tuple[Tensor, Tensor]]:
        """Find the open segments' keys and values by layer: those that are cached or, where the
        model caches something else (latents), what it makes of them for one token more, which
        leaves no trace; `embeds` is `(B, 0, D)`."""
        segment = context.segment
        keys, values = segment.tree["keys"], segment.tree["values"]
        sizes = next(iter(self.attending.values())).sizes.attention
        cached = {n: (keys[str(n)], values[str(n)]) for n in sizes if str(n) in keys}
        if all(
            n in cached and cached[n][0].shape[1::2] == (size.num_kv_heads, size.key_dim)
            for n, size in sizes.items()
        ):
            return cached
        last = segment.positions.amax(1, keepdim=True) + 1
        real = torch.ones_like(last, dtype=torch.bool)
        places = (segment.positions, segment.valid), (last, real)
        inserted = torch.zeros_like(torch.cat([segment.valid, real], 1))
        positions = Positions.of(*places, inserted)
        reader = PastReader(AttentionStep(positions, self.backbone.rotary))
        states = context.states.get(BACKBONE, {})
        self.backbone.run(
            embeds.new_zeros(len(embeds), 1, embeds.shape[2]),
            last,
            key_positions=positions.key_positions,
            key_valid=positions.key_valid,
            cache=segment.cache(),
            context=reader,
            recurrence=Recurrence(states, ~real) if self.backbone.recurrent else None,
        )
        return reader.past

    def _check_met(self, context: LayerContext) -> None:
        """Refuse a model whose classes were changed: every layer must have met its memories."""
        name = type(self.backbone.model).__name__
        count = len(self.backbone.layers) if self.layered or self.attending else 0
        with_attention = count - len(layers_without_attention(self.backbone.config))
        if self.layered and len(context.seen) != count:
            raise ValueError(
                f"{name}'s decoder layers no longer meet the memory: classes were changed after "
                "wrapping. Unwrap, change them, and wrap again."
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

    def _looked_at(self, now: Tree, segment: OpenSegment) -> Tree:
        """Collect what memories look at, `(B, 1, K, D)` as keys are laid out, open columns
        first."""
        before = segment.tree.get("tokens", {})
        return {
            kind: torch.cat([*([before[kind]] if kind in before else []), now[kind][:, None]], 2)
            for kind in self.looks_at
        }

    def _write(
        self, step: Step, states: dict[str, Tree], hidden: Tensor, looked: Tree, given: StepInput
    ) -> dict[str, Tree]:
        """Write the memories' trees with the suffix and the tokens of the rows that closed.

        Args:
            step, hidden: as in `run`.
            states: what the layers made of the trees.
            looked: what memories look at, of the columns before the step and of the step.
            given: the step's input.
        """
        result = dict(states)
        for name in self.memories:
            new = states[name]
            if name in self.layout.prompts:
                suffix = hidden[:, self.layout.suffixes[name]]
                new = self.layout.prompts[name].write_suffix(new, suffix)
            if name in self.seeing:
                new = self.seeing[name].write_segment(new, self._segment_tokens(looked, given))
            if new is not states[name]:
                every = bool(step.closes.all())
                result[name] = new if every else where_rows(step.closes, new, states[name])
        return result

    def _segment_tokens(self, looked: Tree, given: StepInput) -> SegmentTokens:
        """Take the closing segments' tokens, which stand in front of all suffixes."""
        end = given.positions.key_positions.shape[1] - self.layout.num_suffix
        inside = given.inside[:, :end]
        valid = given.positions.key_valid[:, :end] & inside
        counted = inside if self.count_padding else valid
        of = {kind: value[:, 0, :end] for kind, value in looked.items()}
        ids = of["ids"][..., 0] if "ids" in of else None
        return SegmentTokens(
            of.get("embeds"), of.get("hidden"), valid, counted, self.alone, of.get("ffn"), ids
        )
