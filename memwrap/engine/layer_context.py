"""What travels down the backbone during a step: the memories meet layers and attention here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from memwrap.backbones import LayerAttention, Positions
from memwrap.backbones.layer_attention import AttentionStep, cached_attention
from memwrap.backbones.recurrence import Recurrence
from memwrap.backbones.rotary import Rotary
from memwrap.engine.mixer_matching import keeps_softmax, matching_mixers, unexplained
from memwrap.engine.recomputation import recomputed
from memwrap.memories.parts.sums import decayed
from memwrap.memories.protocol import AttentionMemory, LayerMemory
from memwrap.memories.sizes import attending_layers
from memwrap.ops import narrowed
from memwrap.state.memory_state import BACKBONE
from memwrap.state.open_segment import OpenSegment
from memwrap.state.trees import Tree, where_rows

Kind = TypeVar("Kind", LayerMemory, AttentionMemory)


@dataclass
class LayerContext:
    """The context that layers and attention meet: reads, and notes what changes.

    Attributes:
        layered: the memories at the layers.
        attending: the memory at the attention, by name; at most one.
        states: the memories' trees before the step; a layer's part is `tree["layers"]["7"]`.
        suffixes: where each memory's suffix stands among the step's columns, from their end.
        closing: whether any row's segment closes.
        positions: where queries and keys stand.
        segment: the open segments before the step.
        seen, attended: layers met.
        noted: layer states after reading; written: layer states after closing.
        hidden: the attention's inputs at all K columns, for memories that need them.
        losses: auxiliary losses `(B,)`.
        notes: what attention leaves in one layer for later ones.
        recurrence: the states of the backbone's own recurrent layers, if it has any.
        feed_forward: takes up the last feed-forward block's input, if a memory asks for it.
        routed: takes up the routers' logits, where experts are to be balanced.
    """

    layered: dict[str, LayerMemory]
    attending: dict[str, AttentionMemory]
    states: dict[str, Tree]
    suffixes: dict[str, slice]
    closing: bool
    positions: Positions
    segment: OpenSegment
    rotary: Rotary
    seen: set[int] = field(default_factory=set)
    attended: set[int] = field(default_factory=set)
    noted: dict[str, Tree] = field(default_factory=lambda: defaultdict(dict))
    written: dict[str, Tree] = field(default_factory=lambda: defaultdict(dict))
    hidden: Tree = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    recurrence: Recurrence | None = None
    feed_forward: list[Tensor] | None = None
    routed: list[Tensor] | None = None
    notes: dict = field(default_factory=dict)
    _steps: dict[torch.device, AttentionStep] = field(default_factory=dict)

    def before_layer(self, layer: int, hidden: Tensor) -> Tensor:
        self.seen.add(layer)
        for name, memory, state in self._at(layer, self.layered):
            read = narrowed(memory.read_layer(layer, hidden, state), hidden.dtype)
            suffix = self.suffixes.get(name, slice(0))
            if self.closing and not memory.suffix_reads and suffix != slice(0):
                read = _with_columns(read, hidden, suffix)
            hidden = read
        return hidden

    def after_layer(self, layer: int, hidden: Tensor) -> None:
        if not self.closing:
            return
        for name, memory, state in self._at(layer, self.layered):
            suffix = hidden[:, self.suffixes.get(name, slice(0))]
            state = decayed(memory, layer, state)
            self.written[name][str(layer)] = memory.write_layer(layer, suffix, state)

    def attention_step(self, device: torch.device) -> AttentionStep:
        """Give what the attention of all layers shares, on one device."""
        if device not in self._steps:
            self._steps[device] = AttentionStep(
                self.positions.to(device), self.rotary, self.losses, self.notes
            )
        return self._steps[device]

    def attention(self, attention: LayerAttention) -> Tensor:
        """Give the attention's output for one layer."""
        self.attended.add(attention.layer)
        if keeps_softmax(attention.layer):
            return attention.local()
        if not matching_mixers():
            return self._read(attention)
        for _, memory, _ in self._at(attention.layer, self.attending):
            converted = attending_layers(memory.config, memory.sizes)
            if attention.layer in converted:
                attention.call.after = partial(self._compare, attention, len(converted))
        return attention.local()

    def _compare(self, attention: LayerAttention, layers: int, wanted: Tensor) -> None:
        """Note how far the attention with its memory is from its own output, as a loss that is the
        mean over `layers`."""
        if len(self.segment):
            raise ValueError(
                "Mixers are compared over whole segments, and one is open; give whole rows, "
                "without `cache`."
            )
        with torch.enable_grad():  # what it needs for gradients is not kept for all layers at once
            part = recomputed(partial(unexplained, attention, self._read, wanted))
            self.losses.append(part / layers)

    def _read(self, attention: LayerAttention) -> Tensor:
        """Let the memory of a layer attend."""
        layer = attention.layer
        for name, memory, state in self._at(layer, self.attending):
            self._keep_hidden(memory, attention)
            out, state = memory.attend(layer, attention, state)
            self.noted[name][str(layer)] = state
            if self.closing:
                state = decayed(memory, layer, state)
                self.written[name][str(layer)] = memory.write_attention(layer, attention, state)
            return narrowed(out, attention.value.dtype)
        return attention.local()

    def close_attention(self, layer: int, module: object, keys: Tensor, values: Tensor) -> None:
        """Close a layer's open segment without new tokens, from its keys and values."""
        for name, memory, state in self._at(layer, self.attending):
            attention = cached_attention(module, self, keys, values)
            self._keep_hidden(memory, attention)
            state = decayed(memory, layer, state)
            self.written[name][str(layer)] = memory.write_attention(layer, attention, state)

    @property
    def noting(self) -> bool:
        """Whether trees changed without a segment's close."""
        return self.recurrence is not None or any(
            new is not self.states[name]["layers"][layer]
            for name, layers in self.noted.items()
            for layer, new in layers.items()
        )

    def changed(self, closes: Tensor) -> dict[str, Tree]:
        """Collect the memories' trees after the step; `closes` `(B,)` says whose segments
        closed. Where mixers are compared every segment begins anew."""
        if matching_mixers():
            return dict(self.states)
        result = {}
        for name, tree in self.states.items():
            new = _with_layers(tree, self.noted.get(name, {}))
            if name in self.written:
                closed = _with_layers(new, self.written[name])
                new = closed if bool(closes.all()) else where_rows(closes, closed, new)
            result[name] = new
        if self.recurrence is not None:
            result[BACKBONE] = {**self.states[BACKBONE], **self.recurrence.after}
        return result

    def _at(self, layer: int, memories: dict[str, Kind]) -> Iterator[tuple[str, Kind, Tree]]:
        """Iterate over those of the memories that keep a state at a layer."""
        for name, memory in memories.items():
            state = self.states[name].get("layers", {}).get(str(layer))
            if state is not None:
                yield name, memory, state

    def _keep_hidden(self, memory: AttentionMemory, attention: LayerAttention) -> None:
        """Give the attention its inputs at all columns of the segment, and note them."""
        if not memory.needs_hidden:
            return
        hidden, key = attention.inputs, str(attention.layer)
        if len(self.segment):
            before = self.segment.tree["hidden"][key].squeeze(1)
            # A segment that closes without new tokens has no inputs, of no width.
            hidden = torch.cat([before, hidden], 1) if hidden.shape[1] else before
        self.hidden[key] = hidden[:, None]
        attention.hidden = hidden


def _with_layers(tree: Tree, layers: Tree) -> Tree:
    return {**tree, "layers": {**tree["layers"], **layers}} if layers else tree


def _with_columns(x: Tensor, other: Tensor, columns: slice) -> Tensor:
    """Take `columns` of `x` `(B, T, D)` from another tensor."""
    first, end, _ = columns.indices(x.shape[1])
    return torch.cat([x[:, :first], other[:, first:end], x[:, end:]], 1)


@dataclass
class PastReader:
    """A context that takes keys and values of all columns but the last as attention is given them,
    which may not be as they are cached.

    Attributes:
        step: what attention is told of the columns.
        past: keys and values by layer.
    """

    step: AttentionStep
    past: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def before_layer(self, layer: int, hidden: Tensor) -> Tensor:
        return hidden

    def after_layer(self, layer: int, hidden: Tensor) -> None:
        return None

    def attention_step(self, device: torch.device) -> AttentionStep:
        return self.step

    def attention(self, attention: LayerAttention) -> Tensor:
        past = attention.rotated_key[:, :, :-1], attention.value[:, :, :-1]
        self.past[attention.layer] = past
        return attention.local()
