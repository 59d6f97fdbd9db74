"""LayerAttention: one layer's attention in one step, as a memory sees it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from memwrap.backbones.positions import Places, Rows
from memwrap.backbones.rotary import Angles, Rotary, rotate, rotated_once, unrotate
from memwrap.ops.buffers import take

PREFIX = "memwrap_"


Call = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass
class SeenAttention:
    """What a layer's attention function was given.

    Attributes:
        module: the attention module; `hidden` `(B, T, D)` and `keywords` are what it was called
            with.
        query: `(B, H, T, Dk)`, rotated. key, value: `(B, Hkv, K, ...)`, the cached ones first.
        mask: as the backbone's attention takes it, or None for plain causal attention.
        scaling: of the scores; some families scale their queries before.
        window: tokens that the layer's own sliding window lets a query see, or None.
        call: the model's own attention: `(query, key, value, mask)` to `(B, T, H, Dv)` and, from
            eager attention, weights.
        softcap: scores s become `softcap * tanh(s / softcap)`, if the model does so.
        added: `(B, T, D)`, added to the module's output.
    """

    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    window: int | None
    call: Call
    eager: Call
    hidden: Tensor
    keywords: dict[str, Any]
    softcap: float | None = None
    added: Tensor | None = None

    @property
    def layer(self) -> int:
        return self.module.layer_idx


@dataclass
class LayerAttention:
    """One layer's attention in one step, as a memory sees it.

    Attributes:
        layer: its number.
        places: positions and validity of queries and keys.
        value: `(B, Hkv, K, Dv)`; the open segment's columns first, the step's T last.
        hidden: `(B, K, D)`, the attention's input at the K columns, for a memory whose
            `needs_hidden` is set.
        losses: auxiliary losses `(B,)`, means per token; appended to by the memory in training.
    """

    seen: SeenAttention
    places: Places
    rotary: Rotary
    hidden: Tensor | None = None
    losses: list[Tensor] = field(default_factory=list)
    shared: dict[Any, Any] = field(default_factory=dict)

    @property
    def layer(self) -> int:
        return self.seen.layer

    @property
    def value(self) -> Tensor:
        return self.seen.value

    @property
    def window(self) -> int | None:
        """Tokens that the layer's own sliding window lets a query see (itself among them)."""
        return self.seen.window

    @property
    def padded(self) -> bool:
        """Whether any of the step's queries is padding."""
        return self.shared["padded"]

    @property
    def groups(self) -> int:
        """Query heads that share a KV head; query head h belongs to KV head h // groups."""
        return self.seen.query.shape[1] // self.seen.key.shape[1]

    @property
    def scaling(self) -> float:
        """What the scores of plain queries are multiplied with."""
        return getattr(self.seen.module, "scaling", None) or self.seen.scaling

    @cached_property
    def query(self) -> Tensor:
        """The queries `(B, H, T, Dk)` without rotation and without scaling."""
        plain = unrotate(self.seen.query, self._angles(self.places.queries, "queries"))
        before = self.seen.scaling / self.scaling
        return plain if before == 1 else plain * before

    @cached_property
    def key(self) -> Tensor:
        """The keys `(B, Hkv, K, Dk)` without rotation."""
        return unrotate(self.seen.key, self._angles(self.places.keys, "keys"))

    def keys_of(self, columns: Tensor, name: Hashable | None = None) -> Tensor:
        """The keys `(B, Hkv, N, Dk)` of columns `(B, N)` without rotation; a `name` says that the
        columns are the same in every layer of the step."""
        if name is None:
            positions = self.places.keys.gather(1, columns)
        else:
            positions = self.once(("at", name), lambda: self.places.keys.gather(1, columns))
        return unrotate(take(self.seen.key, columns), self._angles(positions, name))

    def rotated(self, x: Tensor, positions: Tensor, name: Hashable | None = None) -> Tensor:
        """Un-rotated rows `(B, H, N, Dk)` as the model rotates them at `positions` `(B, N)`; a
        `name` says that the positions are the same in every layer of the step."""
        return rotate(x, self._angles(positions, name))

    def once(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, computed by the first layer of the step that asks for `name`."""
        if ("once", name) not in self.shared:
            self.shared["once", name] = make()
        return self.shared["once", name]

    def local(self) -> Tensor:
        """The model's own attention inside the segment, `(B, T, H, Dv)`."""
        seen = self.seen
        return seen.call(seen.query, seen.key, seen.value, seen.mask)[0]

    def part(self, start: int, stop: int) -> LayerAttention:
        """The same attention for the queries `start` to `stop` of the step alone."""
        seen, places = self.seen, self.places
        kind = self.rotary.kind(self.layer)
        mask = self.visible()[..., start:stop, :]
        if not is_sdpa(seen) and seen.mask is not None:
            mask = seen.mask[..., start:stop, :]
        query = seen.query[:, :, start:stop]
        keys = {("keys", kind): self._angles(places.keys, "keys")} if kind else {}
        return replace(
            self,
            seen=replace(seen, query=query, mask=mask),
            places=replace(
                places,
                queries=places.queries[:, start:stop],
                query_valid=places.query_valid[:, start:stop],
            ),
            shared=keys,
        )

    def join(
        self,
        *rows: Rows,
        local: Tensor | None = None,
        weights: bool = False,
        name: Hashable | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One softmax over the given rows and the segment's own keys.

        Args:
            rows: what stands before the segment, in this order.
            local: `(B, T, K)` bool, further limits who sees whom inside the segment.
            weights: also return the attention weights.
            name: says that in all layers of the step the rows stand at the same places, and are
                visible alike where the model's mask is the same.

        Returns:
            The output `(B, T, H, Dv)` and the weights `(B, H, T, M + K)` or None.
        """
        seen = self.seen
        queries, keys = seen.query, seen.key
        single = queries.shape[2] == 1  # a token is decoded
        if single:
            rows = tuple(r.moved(self.places.queries) for r in rows)
        own = [r for r in rows if r.query_positions is not None]
        if own:  # rows that see the queries elsewhere get channels of their own
            turned = [self._turned(r) for r in own]
            queries = torch.cat([queries, *turned], -1)
            keys = torch.cat([keys, *[torch.zeros_like(keys) for _ in own]], -1)
        before = []
        for index, r in enumerate(rows):
            where = None if name is None else ("row", index, name)
            key = self._rotated_rows(r, where, once=single)
            empty = torch.zeros_like(key)
            parts = [key if r.query_positions is None else empty]
            before.append(torch.cat([*parts, *[key if o is r else empty for o in own]], -1))
        keys = torch.cat([*before, keys], 2)
        values = torch.cat([*[r.values.to(seen.value.dtype) for r in rows], seen.value], 2)
        added = weights or not is_sdpa(seen)
        if name is None:
            mask = self._joined_mask(rows, local, added)
        else:  # the mask beside it stays alive, so that no other has its id
            mask, _ = self.once(
                ("mask", name, id(seen.mask), added),
                lambda: (self._joined_mask(rows, local, added), seen.mask),
            )
        return (seen.eager if weights else seen.call)(queries, keys, values, mask)

    def _joined_mask(self, rows: Sequence[Rows], local: Tensor | None, added: bool) -> Tensor:
        """Who sees whom, rows first: `(B, 1, T, M + K)` bool, or what is `added` to scores."""
        visible = self.visible() if local is None else self.visible() & local[:, None]
        length = visible.shape[2]
        before = [
            (r.visible if r.visible.dim() == 3 else r.visible[:, None].expand(-1, length, -1))
            for r in rows
        ]
        mask = torch.cat([*[b[:, None] for b in before], visible], -1)
        if not added:
            return mask
        dtype = self.seen.query.dtype
        zero = torch.zeros((), dtype=dtype, device=mask.device)
        return torch.where(mask, zero, torch.finfo(dtype).min)

    def add(self, output: Tensor) -> None:
        """Add `(B, T, D)` to what the attention module gives, behind its output projection."""
        added = self.seen.added
        self.seen.added = output if added is None else added + output

    def project(self, rows: Tensor, *, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Keys (un-rotated) and values of stored attention inputs `(B, M, D)`, by the layer's
        own projections; `frozen` keeps gradients away from their weights."""
        capture = _Capture()
        keywords = {**self.seen.keywords, "memory_context": capture, "attention_mask": None}
        for name, value in keywords.items():
            if isinstance(value, Cache) or name == "position_ids":
                keywords[name] = None
        angles = keywords.get("position_embeddings")
        if angles is not None:
            shape = (rows.shape[0], rows.shape[1], angles[0].shape[-1])
            still = (angles[0].new_ones(shape), angles[0].new_zeros(shape))
            keywords["position_embeddings"] = still
        module = self.seen.module
        if frozen:
            weights = {name: p.detach() for name, p in module.named_parameters()}
            torch.func.functional_call(module, weights, (rows,), keywords)
        else:
            module(rows, **keywords)
        return capture.key, capture.value

    def visible(self) -> Tensor:
        """Who sees whom inside the segment, `(B, 1, T, K)` bool."""
        mask = self.seen.mask
        if mask is None:
            batch, length, total = self.seen.key.shape[0], *self._lengths
            plain = torch.ones(length, total, dtype=torch.bool, device=self.seen.key.device)
            return plain.tril(total - length).expand(batch, 1, length, total)
        mask = mask[..., : self.seen.key.shape[2]]
        return mask if mask.dtype == torch.bool else mask >= 0

    @property
    def _lengths(self) -> tuple[int, int]:
        return self.seen.query.shape[2], self.seen.key.shape[2]

    def _rotated_rows(self, rows: Rows, name: Hashable | None, once: bool) -> Tensor:
        dtype = self.seen.key.dtype
        if once and rows.still:
            return rotated_once(rows.keys, dtype, lambda: self._angles(rows.positions, name))
        return rotate(rows.keys.to(dtype), self._angles(rows.positions, name))

    def _turned(self, rows: Rows) -> Tensor:
        """The queries rotated to where `rows` see them (scaled as the model scales them)."""
        plain = unrotate(self.seen.query, self._angles(self.places.queries, "queries"))
        return rotate(plain, self._angles(rows.query_positions))  # type: ignore[arg-type]

    def _angles(self, positions: Tensor, name: Hashable | None = None) -> Angles | None:
        """Angles at positions; those of the step's own are computed once for all layers."""
        kind = self.rotary.kind(self.layer)
        if not kind:
            return None
        if name is None:
            return self.rotary.angles(positions, self.layer, self.seen.key)
        if (name, kind) not in self.shared:
            self.shared[name, kind] = self.rotary.angles(positions, self.layer, self.seen.key)
        return self.shared[name, kind]


class _Capture:
    """Takes keys and values out of an attention module."""

    key: Tensor
    value: Tensor

    def attention(self, seen: SeenAttention) -> Tensor:
        self.key, self.value = seen.key, seen.value
        batch, heads, length, _ = seen.query.shape
        return seen.value.new_zeros(batch, length, heads, seen.value.shape[-1])


def is_sdpa(seen: SeenAttention) -> bool:
    return implementation(seen.module.config) == "sdpa"


def implementation(config: Any) -> str:
    """The backbone's own attention implementation, also while memwrap's stands before it."""
    return str(config._attn_implementation).removeprefix(PREFIX)


def cached_attention(module: Any, key: Tensor, value: Tensor) -> SeenAttention:
    """The attention of a layer that is given no queries, over cached keys and values."""
    nothing = key[:, :, :0]

    def refuse(*args: Any) -> tuple[Tensor, Tensor | None]:
        raise RuntimeError("A segment that closes without queries has no attention output.")

    hidden = value.new_zeros(value.shape[0], 0, 0)
    return SeenAttention(module, nothing, key, value, None, 1.0, None, refuse, refuse, hidden, {})
