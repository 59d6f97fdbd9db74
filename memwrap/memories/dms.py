"""DMS: every KV head learns which keys it can do without (Lancucki et al. 2025).

"Dynamic Memory Sparsification". A key's fate is decided by the token behind it and heeded once the
key has left a window: in training by a bias on its score, afterwards by dropping it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memwrap.backbones import AttentionSizes, LayerAttention, MemoryKeyValues
from memwrap.memories.config import MemoryConfig
from memwrap.memories.parts.slots import Rows
from memwrap.memories.parts.training_progress import training_done
from memwrap.memories.parts.whole_past import WholePast
from memwrap.memories.protocol import AttentionMemory, Bounds, Claims
from memwrap.memories.registry import register
from memwrap.memories.settings import LayerList, PositiveInt, Range
from memwrap.memories.sizes import Sizes, attending_layers
from memwrap.ops import delayed_eviction as ops
from memwrap.ops.buffers import filled, ring, take
from memwrap.ops.buffers.right_aligned import latest, right_valid
from memwrap.state.progress import Progress
from memwrap.state.trees import RECENT, Tree

EPS = 1e-6  # of the norm
NAMES = ("key", "value", "bias", "place")


class DMSConfig(MemoryConfig):
    """Every token attends to the last `window_size` tokens, itself among them, and to those before
    them that the KV head did not drop: a learned map decides about each key.

    Examples:
        >>> import memwrap
        >>> memwrap.DMSConfig(window_size=128).compression
        8.0

    Attributes:
        window_size: tokens that every head sees whatever was decided. Results do not depend on
            `segment_size`, which only says how many tokens are read at once.
        compression: training asks heads to drop so many keys that one in `compression` stays, on
            average over layers and heads; from 1 at the beginning in a straight line to this.
        decisions: each `"kv_head"` decides for itself, or one map for all heads of a `"layer"`.
        temperature: of the relaxed decisions in training.
        noise: they are drawn in training (Gumbel noise, by torch's generator).
        layers: decoder layers with decisions; the others keep every key (`None`: all with
            attention). Layers with a sliding window of their own keep that, too.
    """

    name: ClassVar[str] = "dms"
    not_in_state: ClassVar[frozenset[str]] = frozenset({"compression", "temperature", "noise"})

    window_size: PositiveInt = 512
    compression: Annotated[float, Range(1)] = 8.0
    decisions: Literal["kv_head", "layer"] = "kv_head"
    temperature: Annotated[float, Range(above=0)] = 0.1
    noise: bool = True
    layers: LayerList | None = None

    @classmethod
    def tiny(cls) -> DMSConfig:
        # Decisions of random maps are far apart: a high temperature keeps their gradients alive.
        return cls(segment_size=8, window_size=10, temperature=10.0, noise=False)


class DecisionMap(nn.Module):
    """One layer's map from the attention's input to decisions; it starts at zero: all keys stay."""

    def __init__(self, heads: int, sizes: Sizes) -> None:
        super().__init__()
        make: dict[str, Any] = {"dtype": sizes.dtype, "device": sizes.device}
        self.norm = nn.Parameter(torch.ones(sizes.hidden_size, **make))
        self.weight = nn.Parameter(torch.zeros(heads, sizes.hidden_size, **make))

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute `(B, G, N)`, in float32 at least, of hidden states `(B, N, D)`."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        normed = F.rms_norm(hidden.to(wide), hidden.shape[-1:], self.norm.to(wide), EPS)
        return (normed @ self.weight.to(wide).T).transpose(1, 2)


@dataclass(frozen=True)
class Decided:
    """Decisions of a segment's tokens.

    Attributes:
        logits: `(B, G, K)` by the token that decides.
        bias: `(B, Hkv, K)` what the scores of the segment's keys get beyond the window.
        before: `(B, Hkv)` the same of the last key in front of the segment.
    """

    logits: Tensor
    bias: Tensor
    before: Tensor


@dataclass(frozen=True)
class StepVisibility:
    """Masks of a step: who sees whom.

    Attributes:
        place: `(B, W)` of the rows kept in order.
        near, far: `(B, T, W)` bool, which of them are seen inside the window and beyond it.
        local, beyond: `(B, T, K)` bool, the same of the segment's keys; None: none are.
    """

    place: Tensor
    near: Tensor
    far: Tensor | None
    local: Tensor
    beyond: Tensor | None


@dataclass(frozen=True)
class Closing:
    """Fate of rows as a segment closes: of those in the window and the segment's, N.

    Attributes:
        tokens: `(B,)` read afterwards.
        place: `(B, N)`.
        stay: `(B, W)` which are in the window afterwards; `real`: which of these are there.
        leaving: `(B, N)` bool, which leave it; `leaves`: whether any does.
    """

    tokens: Tensor
    place: Tensor
    stay: Tensor
    real: Tensor
    leaving: Tensor
    leaves: bool


@register(DMSConfig)
class DMSMemory(AttentionMemory):
    """Per layer the last rows in order, with what was decided about each, and for every KV head
    those before them that stay.

    Nothing is decided about the newest row until the next token comes. A row is dropped as a
    segment closes, long after it was last seen: what a query sees depends on decisions alone.
    """

    claims = Claims(neutral_start=True, bounded=False, lengthens=True, whole={"window_size": 128})

    config: DMSConfig
    needs_hidden = True
    within_window = True

    def __init__(self, config: DMSConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        chosen = attending_layers(config, sizes)
        self.maps = nn.ModuleDict()
        for layer in chosen:
            heads = sizes.attention[layer].num_kv_heads if config.decisions == "kv_head" else 1
            self.maps[str(layer)] = DecisionMap(heads, sizes)
        self.last = max(chosen)
        self.whole = {n: WholePast.of(d) for n, d in sizes.attention.items() if n not in chosen}
        self.bytes_per_token = sum(self._bytes(dims) for dims in sizes.attention.values())
        if not self.bytes_per_token:
            self.claims = Claims(neutral_start=True, lengthens=True)  # type: ignore[misc]

    def _bytes(self, dims: AttentionSizes) -> float:
        """Count the bytes a token and row of a layer that drops nothing."""
        dtype = self.sizes.backbone_dtype
        wide = torch.promote_types(dtype, torch.float32).itemsize
        rows = WholePast.of(dims).bytes_per_token(dims, dtype)
        return rows + dims.num_kv_heads * (wide + 4) if rows else 0

    # State

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        return {
            "layers": {
                str(layer): self.whole[layer].empty(
                    batch_size, dims, self.sizes.backbone_dtype, device
                )
                if layer in self.whole
                else self._empty(dims, batch_size, device)
                for layer, dims in self.sizes.attention.items()
            }
        }

    def _empty(self, dims: AttentionSizes, batch: int, device: torch.device) -> Tree:
        dtype = self.sizes.backbone_dtype
        wide = torch.promote_types(dtype, torch.float32)
        tree: Tree = {"tokens": torch.zeros(batch, dtype=torch.long, device=device)}
        shape = (batch, dims.num_kv_heads, 0)
        tree[RECENT] = {
            "key": torch.zeros(*shape, dims.key_dim, dtype=dtype, device=device),
            "value": torch.zeros(*shape, dims.value_dim, dtype=dtype, device=device),
            "bias": torch.zeros(shape, dtype=wide, device=device),
        }
        tree |= {f"kept_{name}": rows.clone() for name, rows in tree[RECENT].items()}
        tree["kept_place"] = torch.zeros(shape, device=device)
        tree["kept_count"] = torch.zeros(shape[:2], dtype=torch.long, device=device)
        return tree

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        for name, tree in state["layers"].items():
            if int(name) in self.whole:
                yield from self.whole[int(name)].ranges(tree, progress)
                continue
            yield tree["tokens"], *progress.closed
            present, size = tree[RECENT]["key"].shape[2], self._size(int(name))
            yield tree["tokens"], 0, ring.most_counted(present, size)
            yield tree["kept_count"], 0, tree["kept_key"].shape[2]

    def _size(self, layer: int) -> int:
        """Count the last rows that a layer keeps at most."""
        return self.sizes.attention[layer].window or self.config.window_size

    # Reading

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        past = self.whole.get(layer)
        if past is not None:
            everything = past.read(attention, state, None, None)
            return attention.join(everything, name=("whole", past))[0], state
        decided = self._decided(layer, attention)
        attention.notes["dms", layer] = decided
        if self.training:
            self._penalise(layer, attention, decided)
        name = ("dms", attention.window)
        sight = attention.cached_per_step(name, lambda: self._sight(attention, state))
        key, value = state[RECENT]["key"], state[RECENT]["value"]
        rows = [MemoryKeyValues(key, value, sight.place, sight.near, static=True)]
        if attention.window is None:
            rows.append(_kept(state))
        if sight.far is not None:
            bias = _with_last(state[RECENT]["bias"], decided.before)
            far = MemoryKeyValues(key, value, sight.place, sight.far, static=True, bias=bias)
            rows.append(far)
        if sight.beyond is not None:
            where = attention.key_positions
            rows.append(
                MemoryKeyValues(
                    attention.key, attention.value, where, sight.beyond, bias=decided.bias
                )
            )
        return attention.join(*rows, local=sight.local)[0], state

    def _decided(self, layer: int, attention: LayerAttention) -> Decided:
        """Compute what the segment's tokens decide."""
        config, heads = self.config, self.sizes.attention[layer].num_kv_heads
        with torch.autocast(attention.value.device.type, enabled=False):
            raw = self.maps[str(layer)](attention.hidden)
            noise = ops.logistic_noise(raw) if config.noise and self.training else None
            logits = ops.decision_logits(raw, config.temperature, noise)
            made = ops.soft_bias(logits) if self.training else ops.hard_bias(logits)
            keys, before = ops.about_keys(made, attention.key_valid)
        return Decided(logits, keys.expand(-1, heads, -1), before.expand(-1, heads))

    def _penalise(self, layer: int, attention: LayerAttention, decided: Decided) -> None:
        """Add, in the last layer, what the step's tokens drop too little."""
        length = attention.query_valid.shape[1]
        logits = decided.logits[..., decided.logits.shape[2] - length :]
        shares = attention.notes.setdefault("dms shares", [])
        shares.append(ops.dropped_share(logits, attention.query_valid))
        if layer == self.last:
            share = torch.stack([s.to(shares[-1].device) for s in shares]).mean(0)
            compression = 1 + (self.config.compression - 1) * training_done()
            attention.losses.append((ops.target_share(compression) - share).clamp_min(0))

    def _sight(self, attention: LayerAttention, state: Tree) -> StepVisibility:
        """Tell who sees whom."""
        count, queries = state["tokens"], attention.query_positions[:, :, None]
        size, most = state[RECENT]["key"].shape[2], attention.window
        window = min(n for n in (self.config.window_size, most) if n is not None)
        place = torch.arange(-size, 0, device=count.device).expand(len(count), -1)

        def far(distance: Tensor, valid: Tensor) -> Tensor | None:
            seen = valid[:, None] & (distance >= window)
            if most is not None:
                seen = seen & (distance < most)
            return seen if bool(seen.any()) else None

        valid, distance = right_valid(count, size), queries - place[:, None]
        inside = queries - attention.key_positions[:, None]
        near = valid[:, None] & (distance < window)
        return StepVisibility(
            place, near, far(distance, valid), inside < window, far(inside, attention.key_valid)
        )

    # Writing

    def write_attention(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        past = self.whole.get(layer)
        if past is not None:
            return past.closed(attention, state)
        decided = attention.notes.get(("dms", layer))
        if decided is None:  # without new tokens
            decided = self._decided(layer, attention)
        recent, size = state[RECENT], self._size(layer)
        present = recent["key"].shape[2]
        closing = attention.cached_per_step(
            ("dms closes", size), lambda: _closing(attention, state["tokens"], present, size)
        )
        bias = _with_last(recent["bias"], decided.before)
        parts = {
            "key": (recent["key"], attention.key),
            "value": (recent["value"], attention.value),
            "bias": (bias[..., None], decided.bias[..., None]),
        }
        both = {name: torch.cat([old, new.to(old)], 2) for name, (old, new) in parts.items()}
        window = {n: take(rows, closing.stay, closing.real) for n, rows in both.items()}
        new = {**state, "tokens": closing.tokens}
        new[RECENT] = {**window, "bias": window["bias"][..., 0]}
        if attention.window is None:
            new |= self._kept_after(attention, state, both, closing)
        return new

    def _kept_after(
        self, attention: LayerAttention, state: Tree, both: dict[str, Tensor], closing: Closing
    ) -> Tree:
        """Keep of the rows that leave the window those that no decision drops (in training all),
        and move every place back by the segment."""
        moved, rows = attention.key_valid.sum(1)[:, None, None], _rows(state)
        if closing.leaves:
            bias = both["bias"][..., 0]
            goes = torch.zeros_like(bias, dtype=torch.bool)
            if not self.training:
                goes = bias <= ops.FORGOTTEN / 2
            place = closing.place[:, None].expand_as(bias).float()
            valid = closing.leaving[:, None] & ~goes
            rows = rows.beside(Rows(both["key"], both["value"], bias, place, valid))
            rows = rows.packed(int(rows.valid.sum(-1).max()))
        return {
            # Rotated keys are kept beside their tensor: moved ones need another.
            "kept_key": rows.key if closing.leaves else rows.key.clone(),
            "kept_value": rows.value,
            "kept_bias": rows.bias,
            "kept_place": (rows.place - moved) * rows.valid,
            "kept_count": rows.valid.sum(-1),
        }

    # Training

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.maps.parameters()), "weight_decay": 0.0}]

    def figures(self) -> dict[str, Tensor]:
        norms = [one.weight.detach().float().norm(dim=1) for one in self.maps.values()]  # type: ignore[operator]
        same = len({len(n) for n in norms}) == 1
        return {"decision_norm": torch.stack(norms)} if same else {}


def _closing(attention: LayerAttention, before: Tensor, present: int, size: int) -> Closing:
    """Find what becomes of the rows, of which `present` are there and `size` may stay; `before`
    `(B,)` tokens were read."""
    tokens = before + attention.key_valid.sum(1)
    old = torch.arange(-present, 0, device=before.device).expand(len(before), -1)
    place = torch.cat([old, attention.key_positions], 1)
    valid = torch.cat([right_valid(before, present), attention.key_valid], 1)
    leaving = valid & (valid.flip(1).cumsum(1).flip(1) > size)
    count = ring.capacity(tokens, present, size)
    stay, real = latest(valid, count), right_valid(tokens, count)
    return Closing(tokens, place, stay, real, leaving, bool(leaving.any()))


def _with_last(bias: Tensor, last: Tensor) -> Tensor:
    """Put in what has been decided about the last row, where there is one."""
    if not bias.shape[-1]:
        return bias
    return torch.cat([bias[..., :-1], last[..., None].to(bias)], -1)


def _rows(state: Tree) -> Rows:
    """Take the rows that every head keeps."""
    count, size = state["kept_count"], state["kept_key"].shape[2]
    valid = filled(count.flatten(), size).view(*count.shape, size)
    key, value, bias, place = (state[f"kept_{name}"] for name in NAMES)
    return Rows(key, value, bias, place, valid)


def _kept(state: Tree) -> MemoryKeyValues:
    """Give the rows that every head keeps as attention reads them."""
    rows = _rows(state)
    bias = rows.bias.masked_fill(~rows.valid, -torch.inf)
    return MemoryKeyValues(
        rows.key, rows.value, rows.place, rows.valid.any(1), static=True, bias=bias
    )
