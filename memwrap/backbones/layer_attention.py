"""LayerAttention: one layer's attention in one step, as a memory sees it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, MutableMapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache

from memwrap.backbones import joining
from memwrap.backbones.contexts import reaching
from memwrap.backbones.positions import MemoryKeyValues, Positions
from memwrap.backbones.rotary import Angles, Rotary, is_still, rotate
from memwrap.ops.buffers import take

PREFIX = "memwrap_"

# `(query, key, value, mask)` to the output `(B, T, H, Dv)` and, from eager attention, weights.
AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class AttentionReader(Protocol):
    """The protocol of a run's context, as attention modules see it."""

    def attention_step(self, device: torch.device) -> AttentionStep: ...

    def attention(self, attention: LayerAttention) -> Tensor: ...


@dataclass
class AttentionStep:
    """The part of a step that the attention of all layers shares, on one device.

    Attributes:
        positions: of queries and keys.
        rotary: the backbone's.
        losses: auxiliary losses `(B,)`, means per token.
        notes: what a layer leaves for later ones, on any device.
        cached: what the first layer that needed it has computed.
    """

    positions: Positions
    rotary: Rotary
    losses: list[Tensor] = field(default_factory=list)
    notes: dict[Hashable, Any] = field(default_factory=dict)
    cached: dict[Hashable, Any] = field(default_factory=dict)


@dataclass
class AttentionCall:
    """One call of an attention module on the way to the attention function, so that nothing of the
    call is kept on the module.

    Attributes:
        module: the module.
        context: what is read there.
        inputs: `(B, T, D)`, the hidden states that the module was called with.
        keywords: the other arguments.
        added: `(B, T, D)`, is added to the module's output.
        after: is given the module's own output `(B, T, D)`.
    """

    module: Any
    context: AttentionReader
    inputs: Tensor
    keywords: dict[str, Any] = field(default_factory=dict)
    added: Tensor | None = None
    after: Callable[[Tensor], None] | None = None


@dataclass
class LayerAttention:
    """One layer's attention in one step, as a memory sees it: B rows, T queries, and K keys, the
    open segment's columns first and the step's T last.

    Attributes:
        module: the attention module; `call`: its call.
        step: what all layers share.
        rotated_query: `(B, H, T, Dk)`. rotated_key: `(B, Hkv, K, Dk)`. They are as the model
            makes them, and their products are scaled by `rotated_scaling`; some families scale
            their queries before.
        value: `(B, Hkv, K, Dv)`.
        mask: as the backbone's attention takes it, or None for plain causal attention.
        function: the model's own attention; `eager`: the same, giving weights too.
        plain: `function` is torch's attention without dropout or anything added.
        window: tokens that the layer's own sliding window lets a query see (itself among them), or
            None.
        softcap: scores s become `softcap * tanh(s / softcap)`, if the model does so.
        sinks: `(H,)`, a score more in each head's softmax, of nothing, if the model has it.
        hidden: `(B, K, D)`, the attention's input at the K columns, if a memory `needs_hidden`.
    """

    module: Any
    call: AttentionCall
    step: AttentionStep
    rotated_query: Tensor
    rotated_key: Tensor
    value: Tensor
    mask: Tensor | None
    rotated_scaling: float
    function: AttentionFunction
    eager: AttentionFunction
    plain: bool = False
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    hidden: Tensor | None = None
    # No cached_property: in Python 3.11 all instances share its lock.
    _query: Tensor | None = field(default=None, init=False, repr=False)
    _key: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def layer(self) -> int:
        """The layer's number."""
        return self.module.layer_idx

    @property
    def positions(self) -> Positions:
        """Positions and validity of queries and keys."""
        return self.step.positions

    @property
    def query_positions(self) -> Tensor:
        """Where the queries stand in their segments, `(B, T)`."""
        return self.step.positions.query_positions

    @property
    def key_positions(self) -> Tensor:
        """Where the keys stand in their segments, `(B, K)`."""
        return self.step.positions.key_positions

    @property
    def query_valid(self) -> Tensor:
        """Which queries are real, `(B, T)` bool; the others are padding."""
        return self.step.positions.query_valid

    @property
    def key_valid(self) -> Tensor:
        """Which keys are real, `(B, K)` bool."""
        return self.step.positions.key_valid

    @property
    def answers(self) -> Tensor | None:
        """Which queries are part of an answer, `(B, T)` bool; None: none."""
        return self.step.positions.answers

    @property
    def losses(self) -> list[Tensor]:
        """Auxiliary losses `(B,)`, means per token; appended to by the memory in training."""
        return self.step.losses

    @property
    def notes(self) -> dict[Hashable, Any]:
        """What a memory leaves in one layer for later layers of the step."""
        return self.step.notes

    @property
    def inputs(self) -> Tensor:
        """The attention's input `(B, T, D)` at the step's own columns."""
        return self.call.inputs

    @property
    def groups(self) -> int:
        """Query heads that share a KV head; query head h belongs to KV head h // groups."""
        return self.rotated_query.shape[1] // self.rotated_key.shape[1]

    @property
    def scaling(self) -> float:
        """What the scores of plain queries are multiplied with."""
        return getattr(self.module, "scaling", None) or self.rotated_scaling

    @property
    def padded(self) -> bool:
        """Whether any of the step's queries is padding."""
        return self.cached_per_step("padded", lambda: not bool(self.query_valid.all()))

    @property
    def boolean_mask(self) -> bool:
        """Whether the model's attention takes a bool mask; otherwise one that is added."""
        return implementation(self.module.config) == "sdpa"

    @property
    def query(self) -> Tensor:
        """The queries `(B, H, T, Dk)` without rotation and without scaling."""
        if self._query is None:
            plain, ratio = self.unrotated_query(), self.rotated_scaling / self.scaling
            self._query = plain if ratio == 1 else plain * ratio
        return self._query

    @property
    def key(self) -> Tensor:
        """The keys `(B, Hkv, K, Dk)` without rotation."""
        if self._key is None:
            self._key = self._unrotated(self.rotated_key, self.key_positions, "keys")
        return self._key

    @property
    def step_key(self) -> Tensor:
        """The keys `(B, Hkv, T, Dk)` of the step's own columns, without rotation."""
        length, total = self.rotated_query.shape[2], self.rotated_key.shape[2]
        if self._key is not None or length == total:
            return self.key[:, :, total - length :]
        positions = self.key_positions[:, total - length :]
        return self._unrotated(self.rotated_key[:, :, total - length :], positions, "step")

    def keys_at(self, columns: Tensor, name: Hashable | None = None) -> Tensor:
        """Take the keys `(B, Hkv, N, Dk)` of columns `(B, N)`, without rotation; a `name` says
        that the columns are the same in every layer of the step."""

        def gathered() -> Tensor:
            return self.key_positions.gather(1, columns)

        positions = gathered() if name is None else self.cached_per_step(("at", name), gathered)
        return self._unrotated(take(self.rotated_key, columns), positions, name)

    def rotate(self, x: Tensor, positions: Tensor, name: Hashable | None = None) -> Tensor:
        """Rotate `x` `(B, H, N, Dk)` as the model does at `positions` `(B, N)` or `(B, H, N)`; a
        `name` says that the positions are the same in every layer of the step."""
        if name is not None:  # a look that pays where it is taken once
            still = "still", name, self.step.rotary.kind(self.layer)
            if self.cached_per_step(still, lambda: is_still(self._angles(positions, name))):
                return x
        return rotate(x, self._angles(positions, name))

    def cached_per_step(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """Compute `make()` once per step and share it between layers under `name`."""
        cached = self.step.cached
        if name not in cached:
            cached[name] = make()
        return cached[name]

    def local(self) -> Tensor:
        """Run the model's own attention inside the segment: `(B, T, H, Dv)`."""
        return self.function(self.rotated_query, self.rotated_key, self.value, self.mask)[0]

    def part(self, start: int, stop: int) -> LayerAttention:
        """Take the same attention for the queries `start` to `stop` of the step alone."""
        kind, angles = self.step.rotary.kind(self.layer), self._angles(self.key_positions, "keys")
        name = "part", start, stop, id(self.mask)
        part, mask, _ = self.cached_per_step(name, lambda: self._step_part(start, stop))
        if kind is not None:
            part.cached[("angles", "keys", kind)] = angles
        query = self.rotated_query[:, :, start:stop]
        return replace(self, rotated_query=query, mask=mask, step=part)

    def _step_part(self, start: int, stop: int) -> tuple[AttentionStep, Tensor, Tensor | None]:
        """Make what all layers with one mask share of a part of the queries: the step, the part's
        mask, and the whole one, which stays alive beside them."""
        if self.boolean_mask or self.mask is None:
            mask = self.visible()[..., start:stop, :]
        else:
            mask = self.mask[..., start:stop, :]
        positions = self.positions.of_queries(start, stop)
        return replace(self.step, positions=positions, cached={}), mask, self.mask

    def join(
        self,
        *memories: MemoryKeyValues,
        local: Tensor | None = None,
        weights: bool = False,
        name: Hashable | None = None,
        other: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend in one softmax to what memories hold and to the segment's own keys.

        Args:
            memories: what stands before the segment, in this order, M keys altogether.
            local: `(B, T, K)` bool, further limits who sees whom inside the segment.
            weights: also return the attention weights.
            name: says that in all layers of the step the keys stand at the same positions (where
                these do not differ by head), and are visible alike where masks are the same.
            other: as of `flash.attend`, where attention `joining.flashes`.

        Returns:
            The output `(B, T, H, Dv)` and the weights `(B, H, T, M + K)` or None.
        """
        return joining.join(self, memories, local, weights, name, other)

    def join_received(
        self,
        *memories: MemoryKeyValues,
        local: Tensor | None = None,
        name: Hashable | None = None,
        other: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend as `join`, and sum the weights that keys got from the step's queries.

        Returns:
            The output `(B, T, H, Dv)`, and without a gradient `(B, H, M + K)`: what the keys of
            memories that see the queries in the segment and the segment's own got from real ones.
        """
        return joining.join_received(self, memories, local, name, other)

    def mask_for(self, visible: Tensor, boolean: bool | None = None) -> Tensor:
        """Make the mask that the model's attention takes of who sees whom, a bool tensor; `boolean`
        overrules what it takes."""
        if self.boolean_mask if boolean is None else boolean:
            return visible
        dtype = self.rotated_query.dtype
        zero = torch.zeros((), dtype=dtype, device=visible.device)
        return torch.where(visible, zero, torch.finfo(dtype).min)

    def add(self, output: Tensor) -> None:
        """Add `(B, T, D)` to what the attention module gives, behind its output projection."""
        added = self.call.added
        self.call.added = output if added is None else added + output

    def project(self, inputs: Tensor, *, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Project stored attention inputs `(B, M, D)` by the layer's own matrices: to keys
        (un-rotated) and values; `frozen` keeps gradients away from the matrices."""
        with _FrozenParameters() if frozen else nullcontext():
            capture = self.called_with(inputs)
        return capture.key, capture.value

    def called_with(self, inputs: Tensor, embeddings: Any = None) -> Capture:
        """Call the attention module again with other inputs `(B, M, D)`, without a cache and a
        mask.

        Args:
            inputs: hidden states in front of the attention.
            embeddings: of their positions, as the model hands them on; None: they are not moved.
        """
        capture, shape = Capture(self.step), inputs.shape[:2]
        keywords = {**self.call.keywords, "attention_mask": None}
        for name, value in keywords.items():
            if isinstance(value, Cache):
                keywords[name] = None
            elif isinstance(value, Tensor) and value.dtype == torch.long and value.dim() > 1:
                keywords[name] = value.new_zeros(*value.shape[:-2], *shape)  # positions
            elif isinstance(value, MutableMapping):  # keys that other layers take up
                keywords[name] = copy.copy(value)
        known = self.step.rotary[self.layer].embeddings
        if known is not None:
            given = keywords[known.keyword]
            unmoved = embeddings is None
            keywords[known.keyword] = known.unmoved(shape, given) if unmoved else embeddings
        with reaching(capture):
            self.module(inputs, **keywords)
        return capture

    def visible(self) -> Tensor:
        """Tell who sees whom inside the segment, `(B, 1, T, K)` bool."""
        key, mask = self.rotated_key, self.mask
        if mask is None:
            batch, length, total = key.shape[0], self.rotated_query.shape[2], key.shape[2]
            causal = torch.ones(length, total, dtype=torch.bool, device=key.device)
            return causal.tril(total - length).expand(batch, 1, length, total)
        mask = mask[..., : key.shape[2]]
        return mask if mask.dtype == torch.bool else mask >= 0

    def turned(self, positions: Tensor, name: Hashable | None = None) -> Tensor:
        """Turn the queries to `positions` `(B, T)` (scaled as the model scales them): `(B, H, T,
        Dk)`; `name` as for `rotate`."""
        kind = self.step.rotary.kind(self.layer)
        if kind is None:
            return self.rotated_query

        def angles() -> Angles | None:
            key, query = self._angles(positions), self._angles(self.query_positions, "queries")
            return None if key is None or query is None else key.behind(query.inverse())

        made = angles() if name is None else self.cached_per_step(("turn", name, kind), angles)
        return rotate(self.rotated_query, made)

    def unrotated_query(self) -> Tensor:
        """Compute the queries `(B, H, T, Dk)` without rotation, scaled as the model scales them."""
        return self._unrotated(self.rotated_query, self.query_positions, "queries")

    def _unrotated(self, x: Tensor, positions: Tensor, name: Hashable | None) -> Tensor:
        def inverse() -> Angles | None:
            angles = self._angles(positions, name)
            return None if angles is None else angles.inverse()

        kind = self.step.rotary.kind(self.layer)
        known = name is not None and kind is not None
        return rotate(
            x, self.cached_per_step(("back", name, kind), inverse) if known else inverse()
        )

    def _angles(self, positions: Tensor, name: Hashable | None = None) -> Angles | None:
        """Compute the angles at positions; with a `name`, once for all layers of the step."""
        rotary = self.step.rotary
        kind = rotary.kind(self.layer)
        if kind is None:
            return None

        def angles() -> Angles | None:
            made = rotary.angles(positions.flatten(1), self.layer, self.rotated_key)
            return made if positions.dim() == 2 or made is None else made.of_heads(positions)

        return angles() if name is None else self.cached_per_step(("angles", name, kind), angles)


class _FrozenParameters(TorchFunctionMode):
    """Keeps gradients away from parameters, in this thread alone: modules stay as they are."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(nn.Parameter, _constant, (args, kwargs or {}))
        return func(*args, **kwargs)


def _constant(parameter: nn.Parameter) -> Tensor:
    return parameter.detach() if parameter.requires_grad else parameter


class Capture:
    """A context that takes queries, keys and values out of an attention module."""

    query: Tensor
    key: Tensor
    value: Tensor

    def __init__(self, step: AttentionStep) -> None:
        self._step = step

    def attention_step(self, device: torch.device) -> AttentionStep:
        return self._step

    def attention(self, attention: LayerAttention) -> Tensor:
        self.query, self.key = attention.rotated_query, attention.rotated_key
        self.value = attention.value
        batch, heads, length, _ = attention.rotated_query.shape
        return self.value.new_zeros(batch, length, heads, self.value.shape[-1])


def implementation(config: Any) -> str:
    """Name the backbone's own attention implementation, also while memwrap's stands before it."""
    return str(config._attn_implementation).removeprefix(PREFIX)


def cached_attention(
    module: Any, context: AttentionReader, key: Tensor, value: Tensor
) -> LayerAttention:
    """Make the attention of a layer that is given no queries, over cached keys and values."""

    def refuse(*args: Any) -> tuple[Tensor, Tensor | None]:
        raise RuntimeError("A segment that closes without queries has no attention output.")

    call = AttentionCall(module, context, value.new_zeros(value.shape[0], 0, 0))
    step = context.attention_step(key.device)
    return LayerAttention(module, call, step, key[:, :, :0], key, value, None, 1.0, refuse, refuse)
