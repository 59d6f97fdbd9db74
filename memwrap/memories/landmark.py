"""Landmark attention: blocks of the past, found by their landmarks (Mohtashami, Jaggi 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from memwrap.backbones import LayerAttention
from memwrap.memories.config import MemoryConfig
from memwrap.memories.protocol import AttentionMemory, Bounds, Claims, Insertion, InsertsTokens
from memwrap.memories.registry import register
from memwrap.memories.settings import LayerList, PositiveInt
from memwrap.memories.sizes import Sizes, attending_layers
from memwrap.ops import landmark as ops
from memwrap.ops.buffers import filled, ring, take
from memwrap.ops.buffers.host_prefetch import prefetch
from memwrap.ops.buffers.left_aligned import earliest
from memwrap.state.progress import Progress
from memwrap.state.trees import HOST, Tree

# Buffers grow by so many blocks, so that a short text does not take the room of a long one.
GROWTH = 16
HELD = ("key", "value")


class LandmarkConfig(MemoryConfig):
    """A landmark follows every `block_size` tokens. Inside a segment attention goes through the
    grouped softmax; blocks of closed segments are kept, and each query reads `top_k` of them.

    Examples:
        >>> import memwrap
        >>> memwrap.LandmarkConfig(block_size=32).top_k
        4

    Attributes:
        block_size: m, tokens of a block. Blocks begin with the segment; one that is not full when
            the segment closes gets its landmark then.
        top_k: stored blocks that are read.
        cache_size: blocks that are kept, the last ones (`None`: all).
        retrieval: who chooses: every `"token"` (and head) for itself; every token by the largest
            share that a block got from it or an earlier token of its segment (`"chunk"`); all the
            tokens of a `"call"` together, as published code does with its offloaded cache: then
            results depend on how text is fed, and on later tokens of the call.
        first_layer: layer 0 reads stored blocks too. Its landmarks know nothing of their block
            yet: their scores tie, and of equal ones the most recent blocks are read.
        landmark_id: the landmark is this id of the vocabulary, for bases that were trained with
            one. `None`: it is a parameter of the memory, the mean embedding at first.
        landmark_in_loss: the landmark is predicted, and predicts the token behind it. Otherwise
            it is outside the loss, as in the published code's fused training. Needs
            `landmark_id`.
        offload: keys and values of stored blocks lie in the CPU's memory; landmarks do not.
        layers: decoder layers with landmark attention (`None`: all). The others attend to the
            segment alone, landmarks included.
    """

    name: ClassVar[str] = "landmark"
    not_in_state: ClassVar[frozenset[str]] = frozenset({"top_k"})

    block_size: PositiveInt = 64
    top_k: PositiveInt = 4
    cache_size: PositiveInt | None = 4096
    retrieval: Literal["token", "chunk", "call"] = "token"
    first_layer: bool = False
    landmark_id: PositiveInt | None = None
    landmark_in_loss: bool = False
    offload: bool = False
    layers: LayerList | None = None

    def validate_landmark(self) -> None:
        if self.landmark_in_loss and self.landmark_id is None:
            self.refuse("landmark_in_loss", "false without `landmark_id`: no id could be predicted")

    @classmethod
    def tiny(cls) -> LandmarkConfig:
        return cls(segment_size=8, block_size=4, top_k=2, cache_size=6)


@register(LandmarkConfig)
class LandmarkMemory(InsertsTokens, AttentionMemory):
    """Per layer the blocks of closed segments: keys rotated to their place in the block, values,
    landmarks' keys. A block keeps no place in the text: a query sees the chosen ones in slots right
    before its segment (section 3.2, stingy position mapping)."""

    claims = Claims(lengthens=True)
    counts_positions = True

    config: LandmarkConfig

    def __init__(self, config: LandmarkConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.insertion = Insertion(config.block_size, config.landmark_id, config.landmark_in_loss)
        self.chosen = attending_layers(config, sizes)
        other = [n for n in self.chosen if not sizes.attention[n].plain_softmax]
        if other:
            raise ValueError(
                "The landmark memory computes the softmax itself, and the backbone does more than "
                f"scale and cap its scores in layers {other}; use another memory (window, infini)."
            )
        if config.landmark_id is None:
            mean = torch.zeros(sizes.embedding_size) if sizes.embedding_mean is None else (
                sizes.embedding_mean
            )  # fmt: skip
            self.token = nn.Parameter(mean[None].to(sizes.device, sizes.dtype))
        elif config.landmark_id >= sizes.vocab_size:
            raise ValueError(
                f"LandmarkConfig.landmark_id is {config.landmark_id}; the backbone has ids up to "
                f"{sizes.vocab_size - 1}. Add a token first (resize_token_embeddings)."
            )

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        config = self.config
        room = 0  # it grows with what is read
        make: dict[str, Any] = {"dtype": self.sizes.backbone_dtype}
        place = torch.device("cpu") if config.offload else device
        layers: Tree = {}
        for layer in self.chosen:
            dims = self.sizes.attention[layer]
            tree: Tree = {"count": torch.zeros(batch_size, dtype=torch.long, device=device)}
            if self.retrieves(layer):
                shape = (batch_size, dims.num_kv_heads, room)
                block = (*shape, config.block_size)
                held = tree.setdefault(HOST, {}) if config.offload else tree
                held["key"] = torch.zeros(*block, dims.key_dim, device=place, **make)
                held["value"] = torch.zeros(*block, dims.value_dim, device=place, **make)
                tree["landmark"] = torch.zeros(*shape, dims.key_dim, device=device, **make)
                tree["valid"] = torch.zeros(
                    batch_size, 1, room, config.block_size, dtype=torch.bool, device=device
                )
                if config.retrieval == "chunk":
                    tree["best"] = torch.zeros(batch_size, dims.num_heads, room, device=device)
            layers[str(layer)] = tree
        return {"layers": layers}

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        for tree in state["layers"].values():
            yield tree["count"], 0, tree["landmark"].shape[2] if "landmark" in tree else 0

    def inserted(self, state: Tree) -> Tensor:
        return self.token[None]

    def retrieves(self, layer: int) -> bool:
        """Tell whether a layer keeps and reads blocks."""
        return self.config.first_layer or layer > 0

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        query, key, value = attention.rotated_query, attention.rotated_key, attention.value
        inserted, where, valid = attention.positions.inserted, None, None
        marks = inserted[:, inserted.shape[1] - query.shape[2] :]
        if not attention.positions.ordered:
            index, valid = self._by_position(attention)
            key, value, where = take(key, index), take(value, index), attention.query_positions
        local = ops.attention(
            query, key, value, self.config.block_size,
            scaling=attention.rotated_scaling, places=where, landmark=marks, valid=valid,
            softcap=attention.softcap, window=attention.window,
        )  # fmt: skip
        parts = [local]
        if self.retrieves(layer) and self._any(attention, state):
            # The choice has no graph: where one is recorded, queries are turned anew.
            known: dict[int, Tensor] | None = None if torch.is_grad_enabled() else {}
            ids, state = self._chosen(layer, attention, state, known)
            parts.append(self._past(attention, state, ids, known))
        if attention.sinks is not None:
            log = attention.sinks.to(local[1]).view(1, -1, 1).expand_as(local[1])
            parts.append((torch.zeros_like(local[0][..., :1]), log))
        out = ops.merge(*parts) if len(parts) > 1 else local[0]
        return out.transpose(1, 2).contiguous(), state

    def choose(self, layer: int, scores: Tensor) -> Tensor:
        """Choose the blocks `(B, H, T, R)` that are read, ascending, by scores `(B, H, T, N)`."""
        return ops.choose(scores, self.config.top_k)

    def write_attention(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        if not self.retrieves(layer):
            return state
        new, valid = self._blocks(attention, state)
        size, limit = state["landmark"].shape[2], self.config.cache_size
        total = state["count"] + valid.sum(1)
        most = int(total.max()) if limit is None else min(int(total.max()), limit)
        room = max(size, -(-most // GROWTH) * GROWTH)
        room = room if limit is None else min(room, limit)
        result: Tree = {"count": total if limit is None else total.clamp(max=limit)}
        held = {**state, **self._held(state)}
        evicting = bool((total > room).any())
        for name, rows in new.items():
            rows = rows.to(held[name].device, held[name].dtype)
            add = _pushed if evicting else _appended
            offloaded = self.config.offload and name in HELD
            into = result.setdefault(HOST, {}) if offloaded else result
            into[name] = add(held[name], state["count"], rows, valid, room)
        if "best" in state:
            best = state["best"]
            result["best"] = best.new_zeros(*best.shape[:2], room)
        return result

    def _held(self, state: Tree) -> Tree:
        """Tell where the stored blocks' keys and values are."""
        return state[HOST] if self.config.offload else state

    def _any(self, attention: LayerAttention, state: Tree) -> bool:
        """Tell whether any row has stored blocks; asked once a step."""
        return attention.cached_per_step((self, "any"), lambda: bool((state["count"] > 0).any()))

    def _by_position(self, attention: LayerAttention) -> tuple[Tensor, Tensor]:
        """Find the column of each position's key, `(B, P)`, and whether there is one."""

        def columns() -> tuple[Tensor, Tensor]:
            spare = attention.positions.length
            target = torch.where(attention.key_valid, attention.key_positions, spare)
            columns = torch.arange(target.shape[1], device=target.device).expand_as(target)
            empty = torch.zeros(len(target), spare + 1, dtype=torch.long, device=target.device)
            index = empty.scatter(1, target, columns)[:, :spare]
            return index, empty.bool().scatter(1, target, True)[:, :spare]

        return attention.cached_per_step((self, "columns"), columns)

    def _pieces(self, attention: LayerAttention, state: Tree) -> list[slice]:
        """Cut the queries into parts for which scores and gathered blocks may exist at once."""
        batch, heads, length, width = attention.rotated_query.shape
        config, landmarks = self.config, state["landmark"]
        each = max(landmarks.shape[2], (config.top_k + 1) * width, config.top_k * config.block_size)
        block = config.block_size * width
        if landmarks.shape[:3].numel() * block > ops.AT_ONCE:  # all blocks are too many at once
            each = max(each, config.top_k * block)
        step = max(1, ops.AT_ONCE // max(1, batch * heads * each))
        return [slice(a, a + step) for a in range(0, length, step)]

    def _queries(
        self, attention: LayerAttention, piece: slice, known: dict[int, Tensor] | None
    ) -> Tensor:
        """Turn queries to how blocks 1 to R + 1 back see them, `(B, H, T, R + 1, Dk)`; what has
        been turned for the layer is `known`."""
        if known is not None and piece.start in known:
            return known.pop(piece.start)
        config, query = self.config, attention.query[:, :, piece]
        positions = ops.queries_for(
            config.block_size, config.top_k, attention.query_positions[:, piece]
        )
        many = query[:, :, :, None].expand(-1, -1, -1, config.top_k + 1, -1)
        name = self, piece.start
        rotated = attention.rotate(many.flatten(2, 3), positions.flatten(1), name)
        rotated = rotated.unflatten(2, (-1, config.top_k + 1))
        if known is not None and rotated.shape[2] == attention.rotated_query.shape[2]:
            known[piece.start] = rotated  # all are, at once: they are turned once
        return rotated

    @torch.no_grad()
    def _chosen(
        self, layer: int, attention: LayerAttention, state: Tree, known: dict[int, Tensor] | None
    ) -> tuple[list[Tensor], Tree]:
        """Choose blocks for each piece of the queries: their ids, and the state that knows of
        them."""
        retrieval = self.config.retrieval
        valid, softcap = attention.query_valid, attention.softcap
        result: list[Tensor] = []
        together = retrieval == "call"
        zero = torch.zeros((), device=valid.device)
        best: Tensor | None = zero if together else state.get("best")
        for piece in self._pieces(attention, state):
            q = self._queries(attention, piece, known)
            scores = ops.block_scores(
                q, state["landmark"], state["count"], attention.scaling, softcap, tied=layer == 0
            )
            if best is None:
                result.append(self.choose(layer, scores))
                continue
            shares = ops.shares(scores) * valid[:, None, piece, None]
            if together:
                best = torch.maximum(best.to(shares.dtype), shares.amax(2, keepdim=True))
                continue
            shares = torch.maximum(shares.cummax(2).values, best[:, :, None].to(shares.dtype))
            result.append(self.choose(layer, shares.masked_fill(scores == -torch.inf, -torch.inf)))
            best = shares[:, :, -1].to(best.dtype)
        if best is not None and together:
            valid_blocks = filled(state["count"], best.shape[-1])[:, None, None]
            ids = self.choose(layer, best.masked_fill(~valid_blocks, -torch.inf))
            result = [ids] * len(self._pieces(attention, state))
        return result, state if retrieval != "chunk" else {**state, "best": best}

    def _past(
        self,
        attention: LayerAttention,
        state: Tree,
        ids: list[Tensor],
        known: dict[int, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Read for the queries in their blocks; the result is for `merge`."""

        def part(
            keys: Tensor, values: Tensor, landmarks: Tensor, piece: slice, read: Tensor
        ) -> Any:
            q = self._turned(attention, state, piece, read, known)
            return ops.retrieved(
                q, keys, values, landmarks, state["valid"].squeeze(1), read,
                attention.scaling, attention.softcap,
            )  # fmt: skip

        if self.config.offload and not torch.is_grad_enabled():
            return self._past_fetched(attention, state, ids, known)
        held = self._held(state)
        tensors = held["key"], held["value"], state["landmark"]
        pieces = self._pieces(attention, state)
        each = sum(t.shape[3:].numel() for t in tensors) * self.config.top_k
        again = each * attention.rotated_query.shape[:3].numel() > ops.SAVED
        parts = [
            ops.again_later(part, again, *tensors, piece, read)
            for piece, read in zip(pieces, ids, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([out for out, _ in parts], 2), torch.cat([log for _, log in parts], 2)

    def _turned(
        self, attention: LayerAttention, state: Tree, piece: slice, read: Tensor,
        known: dict[int, Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """Turn queries to how each of the blocks `read` sees them, `(B, H, T, R, Dk)`."""
        q = self._queries(attention, piece, known)
        back = ops.read_slots(read, state["count"], self.config.top_k) - 1
        return q.gather(3, back[..., None].expand(*q.shape[:3], -1, q.shape[-1]))

    def _past_fetched(
        self,
        attention: LayerAttention,
        state: Tree,
        ids: list[Tensor],
        known: dict[int, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Read as `_past`, from blocks in the host's memory, one KV head after the other: the
        blocks of the next come over while one is read. A single token reads all heads at once."""
        held, heads, groups = self._held(state), state["landmark"].shape[1], attention.groups
        at_once = heads if attention.rotated_query.shape[2] == 1 else 1
        pieces = self._pieces(attention, state)
        work = [(n, first) for n in range(len(pieces)) for first in range(0, heads, at_once)]

        def fetch(n: int, first: int) -> tuple[Tensor, ...]:
            def rows(x: Tensor) -> Tensor:
                """Lay out heads as rows, each with blocks of its own (no copy of the store)."""
                return x[:, first] if at_once == 1 else x.flatten(0, 1)

            chosen = rows(ids[n].unflatten(1, (heads, groups)))
            valid = rows(state["valid"].expand(-1, heads, -1, -1))
            return ops.used_blocks(
                chosen, valid, rows(state["landmark"]), *(rows(held[name]) for name in HELD)
            )

        outputs: list[list[Tensor]] = [[] for _ in pieces]
        logs: list[list[Tensor]] = [[] for _ in pieces]
        fetched = prefetch(
            [partial(fetch, *arguments) for arguments in work], attention.value.device
        )
        for (n, first), blocks in zip(work, fetched, strict=True):
            chosen, valid, landmarks, keys, values = blocks
            if not first:
                turned = self._turned(attention, state, pieces[n], ids[n], known)
            q = turned[:, first * groups : (first + at_once) * groups]
            q = q.unflatten(1, (-1, groups)).flatten(0, 1)
            result = ops.retrieved(
                q, keys[:, None], values[:, None], landmarks[:, None], valid, chosen,
                attention.scaling, attention.softcap,
            )  # fmt: skip
            for part, into in zip(result, (outputs[n], logs[n]), strict=True):
                into.append(part.unflatten(0, (-1, at_once)).flatten(1, 2))
        out, log = (torch.cat([torch.cat(p, 1) for p in x], 2) for x in (outputs, logs))
        return out, log

    def _blocks(self, attention: LayerAttention, state: Tree) -> tuple[Tree, Tensor]:
        """Cut the segment into blocks as they are stored, `(B, Hkv, S, ...)`, and tell which are
        there."""
        size = self.config.block_size + 1
        index, valid = self._by_position(attention)
        short = -index.shape[1] % size
        index, valid = (torch.nn.functional.pad(t, (0, short)) for t in (index, valid))
        marks = attention.positions.inserted.gather(1, index) & valid
        inside = attention.key_positions % size
        key = take(attention.rotate(attention.key, inside, (self, "inside")), index)
        key, value = (x.unflatten(2, (-1, size)) for x in (key, take(attention.value, index)))
        valid, marks = (t.unflatten(1, (-1, size)) for t in (valid, marks))
        tokens = (valid & ~marks)[..., :-1]
        # The landmark of a partial block stands right behind its tokens.
        last = marks.to(torch.int8).argmax(-1)[:, None, :, None, None]
        landmark = key.gather(3, last.expand(*key.shape[:3], 1, key.shape[-1])).squeeze(3)
        kept = tokens[:, None, ..., None]
        new = {
            "key": key[:, :, :, :-1] * kept,
            "value": value[:, :, :, :-1] * kept,
            "landmark": landmark,
            "valid": tokens[:, None],
        }
        return new, tokens.any(-1) & marks.any(-1)


def _appended(old: Tensor, count: Tensor, new: Tensor, valid: Tensor, room: int) -> Tensor:
    """Append blocks: `(B, H, room, ...)` with the `count` `(B,)` of `old`, and behind them those of
    `new` `(B, H, K, ...)` that `valid` `(B, K)` names."""
    place = ring.slots(count, valid, room).to(old.device)
    return ring.store(old.flatten(3), place, new.flatten(3), room).unflatten(3, old.shape[3:])


def _pushed(old: Tensor, count: Tensor, new: Tensor, valid: Tensor, room: int) -> Tensor:
    """Append as `_appended`, where the oldest have to go: what is left stays in order, from the
    first slot."""
    size, more = old.shape[2], new.shape[2]
    if size == room >= more and bool((count == size).all()) and bool(valid.all()):
        return torch.cat([old[:, :, more:], new.to(old.dtype)], 2)  # full, and one copy
    both = torch.cat([filled(count, old.shape[2]), valid], 1)
    kept = both & (both.flip(1).cumsum(1).flip(1) <= room)
    order = earliest(kept, room).to(old.device)
    held = filled(kept.sum(1), room).to(old.device)
    rows = torch.cat([old, new], 2)
    return take(rows.flatten(3), order, held).to(old.dtype).unflatten(3, old.shape[3:])
