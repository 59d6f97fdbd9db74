"""Attention of a layer's queries, in one softmax, to what memories hold and to the segment's own
keys."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from memwrap.backbones.key_biases import add_bias, bias_of_keys
from memwrap.backbones.positions import MemoryKeyValues
from memwrap.ops import accumulation_dtype, flash
from memwrap.ops.buffers.kept import kept_beside

if TYPE_CHECKING:
    from memwrap.backbones.layer_attention import LayerAttention

Made = TypeVar("Made")
MOVED = 32  # so many keys, or fewer, are turned for a decoded token instead of the query


def join(
    attention: LayerAttention,
    memories: Sequence[MemoryKeyValues],
    local: Tensor | None,
    weights: bool,
    name: Hashable | None,
    other: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Do what `LayerAttention.join` says."""
    single = attention.rotated_query.shape[2] == 1  # a token is decoded
    if flashes(attention) and not weights:
        if single:
            memories = [_moved(attention, m, index, name) for index, m in enumerate(memories)]
        plan = _plan(attention, memories, local, name)
        groups, width = _groups(attention, memories, plan, name), attention.value.shape[-1]
        return flash.attend(groups, attention.rotated_scaling, other, width)[0], None
    return _join_by_the_model(attention, memories, local, weights, name)


def _join_by_the_model(
    attention: LayerAttention,
    memories: Sequence[MemoryKeyValues],
    local: Tensor | None,
    weights: bool,
    name: Hashable | None,
) -> tuple[Tensor, Tensor | None]:
    """Let the model's own attention do it."""
    name = None if any(m.by_layer for m in memories) else name
    if attention.rotated_query.shape[2] == 1:
        memories = [m.moved_to(attention.query_positions) for m in memories]
    queries, keys = attention.rotated_query, attention.rotated_key
    elsewhere = [m for m in memories if m.query_positions is not None]
    if elsewhere:  # keys that see the queries elsewhere get channels of their own
        seen = [attention.turned(m.query_positions) for m in elsewhere]  # type: ignore[arg-type]
        queries = torch.cat([queries, *seen], -1)
        keys = torch.cat([keys, *[torch.zeros_like(keys) for _ in elsewhere]], -1)
    before = []
    for index, memory in enumerate(memories):
        key = _rotated_keys(attention, memory, _name(memory, index, name), slice(None))
        empty = torch.zeros_like(key)
        channels = [key if memory.query_positions is None else empty]
        channels += [key if other is memory else empty for other in elsewhere]
        before.append(torch.cat(channels, -1))
    keys = torch.cat([*before, keys], 2)
    values = [m.values.to(attention.value.dtype) for m in memories]

    def mask() -> tuple[Tensor, Tensor | None]:
        visible = torch.cat(_visible(attention, memories, local), -1)[:, None]
        boolean = attention.boolean_mask and not weights
        return attention.mask_for(visible, boolean=boolean), attention.mask

    joint = _once(attention, ("mask", weights), name, mask)[0]
    if any(m.bias is not None for m in memories):
        bias = bias_of_keys([(m.keys.shape[2], m.bias) for m in memories], keys)
        scores = queries, keys, joint
        queries, keys, joint = add_bias(*scores, bias, attention.rotated_scaling, attention.softcap)
    function = attention.eager if weights else attention.function
    return function(queries, keys, torch.cat([*values, attention.value], 2), joint)


def flashes(attention: LayerAttention) -> bool:
    """Tell whether the CPU's flash kernel does what the model's attention does. What is seen is
    looked at on the way there, which torch.compile cannot trace."""
    if not attention.plain or torch.compiler.is_compiling():
        return False
    given = cast(attention.rotated_query, attention.rotated_key, attention.value)
    return flash.usable(*given)


def cast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring tensors to the dtype in which autocast lets attention run."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def attend_beside(attention: LayerAttention, out: Tensor, log: Tensor) -> tuple[Tensor, Tensor]:
    """Attend in one softmax to the segment's own keys and to others that have been attended to:
    `out` `(B, H, T, Dv)`, and `log` `(B, H, T)` of their softmax's sum. Only where it `flashes`.

    Returns:
        The output `(B, T, H, Dv)`, and the log of the whole sum `(B, H, T)`, which has no gradient.
    """
    plan = _plan(attention, (), None, "the segment")
    given = cast(attention.rotated_query, attention.rotated_key, attention.value)
    group = flash.Group(*given, sights=plan.main)
    return flash.attend([group], attention.rotated_scaling, (out, log))


@dataclass(frozen=True)
class _Plan:
    """Plan of what queries see, which depends on positions alone.

    Attributes:
        mask: the model's; while it is kept, no other has its id.
        columns: of each memory's keys those that are seen by any query; None: none are.
        main: what is seen of the memories' keys and the segment's.
        apart: what is seen of each memory, if its keys see the queries elsewhere.
    """

    mask: Tensor | None
    columns: list[slice | None]
    main: list[flash.Sight | None]
    apart: list[list[flash.Sight | None]]


def join_received(
    attention: LayerAttention, memories: Sequence[MemoryKeyValues], local: Tensor | None,
    name: Hashable | None, other: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Do what `LayerAttention.join_received` says."""
    if not flashes(attention):
        out, weights = _join_by_the_model(attention, memories, local, True, name)
        runs, start = [], 0
        for memory in memories:
            stop = start + memory.keys.shape[2]
            runs += [] if memory.query_positions is not None else [slice(start, stop)]
            start = stop
        counted = attention.query_valid[:, None, :, None]
        wide = accumulation_dtype(out)
        whole = (weights.detach().to(wide) * counted).sum(2)  # type: ignore[union-attr]
        return out, torch.cat([*(whole[..., columns] for columns in runs), whole[..., start:]], -1)
    plan = _plan(attention, memories, local, name)
    groups = _groups(attention, memories, plan, name)
    scaling, width = attention.rotated_scaling, attention.value.shape[-1]
    out, received = flash.attend_received(groups, scaling, attention.query_valid, width, other)
    parts, start = [], 0  # zeros for the columns that were left out
    for memory, columns in zip(memories, plan.columns, strict=True):
        total = memory.keys.shape[2]
        if memory.query_positions is not None:
            continue
        columns = slice(0, 0) if columns is None else columns
        count = columns.stop - columns.start
        got = received[..., start : start + count]
        parts.append(pad(got, (columns.start, total - columns.stop)))
        start += count
    return out, torch.cat([*parts, received[..., start:]], -1)


def _groups(
    attention: LayerAttention, memories: Sequence[MemoryKeyValues], plan: _Plan,
    name: Hashable | None,
) -> list[flash.Group]:  # fmt: skip
    """Make the groups of keys: first the segment's, behind memories' that see the queries where
    they stand; then one for each memory whose keys see them elsewhere. What no query sees is left
    out."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    biases: list[tuple[int, Tensor | None]] = []
    apart: list[flash.Group] = []
    turned: dict[int, Tensor] = {}
    for index, (memory, columns) in enumerate(zip(memories, plan.columns, strict=True)):
        if columns is None:
            continue
        where = _name(memory, index, name)
        key = _rotated_keys(attention, memory, where, columns)
        value = _columns(memory.values, columns).to(attention.value.dtype)
        bias = key.shape[2], None if memory.bias is None else memory.bias[..., columns]
        at = memory.query_positions
        if at is None:
            keys, values, biases = [*keys, key], [*values, value], [*biases, bias]
            continue
        if id(at) not in turned:
            turned[id(at)] = attention.turned(at, where)
        apart.append(_group(attention, turned[id(at)], key, value, plan.apart[index], [bias]))
    key = torch.cat([*keys, attention.rotated_key], 2) if keys else attention.rotated_key
    value = torch.cat([*values, attention.value], 2) if keys else attention.value
    return [_group(attention, attention.rotated_query, key, value, plan.main, biases), *apart]


def _group(
    attention: LayerAttention, query: Tensor, key: Tensor, value: Tensor,
    sights: list[flash.Sight | None], biases: Sequence[tuple[int, Tensor | None]],
) -> flash.Group:  # fmt: skip
    """Make a group of keys; biases of the first of them have channels of their own."""
    if any(bias is not None for _, bias in biases):
        width, scaling = key.shape[-1], attention.rotated_scaling
        query, key, _ = add_bias(query, key, None, bias_of_keys(biases, key), scaling, None)
        value = pad(value, (0, key.shape[-1] - width))
    return flash.Group(*cast(query, key, value), sights=sights)


def _plan(
    attention: LayerAttention, memories: Sequence[MemoryKeyValues], local: Tensor | None,
    name: Hashable | None,
) -> _Plan:  # fmt: skip
    """Find who sees what; with a `name` once a step, but for what layers see each in a way of
    their own."""
    if any(m.by_layer and m.query_positions is None for m in memories):
        name = None
    shared = [name is None or not memory.by_layer for memory in memories]
    plan = _once(attention, "plan", name, lambda: _shared_plan(attention, memories, local, shared))
    if all(shared):
        return plan
    columns, apart = list(plan.columns), list(plan.apart)
    for index, memory in enumerate(memories):
        if not shared[index]:
            columns[index], apart[index] = _apart(attention, _of_queries(attention, memory))
    return replace(plan, columns=columns, apart=apart)


def _shared_plan(
    attention: LayerAttention, memories: Sequence[MemoryKeyValues], local: Tensor | None,
    shared: list[bool],
) -> _Plan:  # fmt: skip
    """Find who sees what of the memories that are `shared`."""
    query = attention.rotated_query
    groups, dtype = attention.groups, cast(query, query, query)[0].dtype
    columns: list[slice | None] = []
    apart: list[list[flash.Sight | None]] = []
    inside = []
    *before, visible = _visible(attention, memories, local)
    for memory, seen, planned in zip(memories, before, shared, strict=True):
        if not planned or memory.query_positions is not None:
            made = _apart(attention, seen) if planned else (None, [])
            columns, apart = [*columns, made[0]], [*apart, made[1]]
            continue
        chosen = _chosen(seen)
        columns, apart = [*columns, chosen], [*apart, []]
        if chosen is not None:
            inside.append(seen[..., chosen])
    main = torch.cat([*inside, visible], -1) if inside else visible
    return _Plan(attention.mask, columns, flash.sights(main, groups, dtype), apart)


def _apart(
    attention: LayerAttention, seen: Tensor
) -> tuple[slice | None, list[flash.Sight | None]]:
    """Find which of the keys of a memory are seen, by `seen` `(B, T, M)`, and by whom."""
    query, chosen = attention.rotated_query, _chosen(seen)
    if chosen is None:
        return None, []
    dtype = cast(query, query, query)[0].dtype
    return chosen, flash.sights(seen[..., chosen], attention.groups, dtype)


def _chosen(seen: Tensor) -> slice | None:
    chosen = flash.columns_seen(seen)
    if chosen is not None and seen.shape[1] == 1:  # cheaper attended to than cut off
        return slice(0, seen.shape[2])
    return chosen


def _of_queries(attention: LayerAttention, memory: MemoryKeyValues) -> Tensor:
    """Tell who sees a memory's keys, `(B, T, M)`."""
    length, visible = attention.rotated_query.shape[2], memory.visible
    return visible if visible.dim() == 3 else visible[:, None].expand(-1, length, -1)


def _visible(
    attention: LayerAttention, memories: Sequence[MemoryKeyValues], local: Tensor | None
) -> list[Tensor]:
    """Tell which keys each query sees: of every memory `(B, T, M)` and of the segment `(B, T,
    K)`."""
    visible = attention.visible()[:, 0]
    before = [_of_queries(attention, memory) for memory in memories]
    return [*before, visible if local is None else visible & local]


def _name(memory: MemoryKeyValues, index: int, name: Hashable | None) -> Hashable | None:
    """Name a memory's positions, where they are the same in all layers with this `name`."""
    if memory.name is not None:
        return "memory", memory.name
    return None if name is None or memory.positions.dim() == 3 else ("memory", index, name)


def _rotated_keys(
    attention: LayerAttention, memory: MemoryKeyValues, name: Hashable | None, columns: slice
) -> Tensor:
    """Rotate some of a memory's keys; where a token is decoded, static ones are kept for later."""
    dtype = attention.rotated_key.dtype
    if memory.static and attention.rotated_query.shape[2] == 1:
        whole = kept_beside(
            memory.keys, ("rotated", memory.name, dtype),
            lambda: attention.rotate(memory.keys.to(dtype), memory.positions, name),
        )  # fmt: skip
        return _columns(whole, columns)
    name = None if name is None else (name, columns.start, columns.stop)
    return attention.rotate(
        _columns(memory.keys, columns).to(dtype), memory.positions[..., columns], name
    )


def _moved(
    attention: LayerAttention, memory: MemoryKeyValues, index: int, name: Hashable | None
) -> MemoryKeyValues:
    """Move a memory's keys, if they are few, to where a decoded token's query stands."""
    if memory.query_positions is None or memory.keys.shape[2] > MOVED:
        return memory
    at = attention.query_positions
    moved = _once(attention, ("moved", index), name, lambda: memory.moved_to(at))
    return replace(moved, keys=memory.keys, values=memory.values, bias=memory.bias)


def _columns(x: Tensor, columns: slice) -> Tensor:
    """Take columns of keys or values `(B, Hkv, M, D)`."""
    return x if columns == slice(0, x.shape[2]) else x[:, :, columns]


def _once(
    attention: LayerAttention, kind: Hashable, name: Hashable | None, make: Callable[[], Made]
) -> Made:
    """Compute `make()`, with a `name` once for all layers of the step with the same mask, which
    stays alive in it, so that no other has its id."""
    if name is None:
        return make()
    return attention.cached_per_step((kind, name, id(attention.mask)), make)
