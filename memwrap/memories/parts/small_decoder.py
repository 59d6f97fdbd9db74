"""A small decoder-only language model with a sliding window, and the state that it reads on from.

Norm, attention with rotary embedding and grouped queries, norm, gated feed-forward, tied
embeddings: the form, and the names of weights, that most published checkpoints have, so that these
can be taken over by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memwrap.ops.buffers import take
from memwrap.ops.buffers.right_aligned import latest
from memwrap.state.trees import Tree


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder.

    Attributes:
        vocabulary: ids that it knows.
        width, layers, heads, kv_heads, inner: of hidden states, their layers, query heads, heads
            of keys and values, and of the feed-forward block.
        window: tokens that a layer sees, the newest among them.
        theta: base of the rotary embedding.
        eps: of the norms.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    window: int
    theta: float
    eps: float

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class Seen:
    """The columns that a step's tokens see.

    Attributes:
        mask: `(B, 1, N, P + N)` bool.
        cos, sin: `(B, 1, P + N, d)` of every column's place.
    """

    mask: Tensor
    cos: Tensor
    sin: Tensor

    def rotated(self, x: Tensor, first: int) -> Tensor:
        """Rotate `x` `(B, H, M, d)`, which stands at the columns from `first` on."""
        left, right = x.chunk(2, -1)
        turned = torch.cat([-right, left], -1)
        return x * self.cos[:, :, first:] + turned * self.sin[:, :, first:]


class DecoderAttention(nn.Module):
    """Attention over what the state has and the new tokens."""

    def __init__(self, shape: DecoderShape, make: dict[str, Any]) -> None:
        super().__init__()
        self.shape = shape
        inner = shape.kv_heads * shape.head_width
        self.q_proj = nn.Linear(shape.width, shape.width, bias=False, **make)
        self.k_proj = nn.Linear(shape.width, inner, bias=False, **make)
        self.v_proj = nn.Linear(shape.width, inner, bias=False, **make)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False, **make)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor], seen: Seen) -> tuple[Tensor, ...]:
        """Attend from tokens `(B, N, D)`; `past` are keys and values `(B, Hkv, P, d)`.

        Returns:
            The output, and the keys (not rotated) and values of all P + N columns.
        """
        shape = self.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, shape.head_width)).transpose(1, 2)

        key = torch.cat([past[0], heads(self.k_proj(x))], 2)
        value = torch.cat([past[1], heads(self.v_proj(x))], 2)
        query = seen.rotated(heads(self.q_proj(x)), key.shape[2] - x.shape[1])
        groups = shape.heads // shape.kv_heads
        keys, values = (t.repeat_interleave(groups, 1) for t in (seen.rotated(key, 0), value))
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen.mask)
        return self.o_proj(out.transpose(1, 2).flatten(2)), key, value


class DecoderFeedForward(nn.Module):
    """A gated feed-forward block."""

    def __init__(self, shape: DecoderShape, make: dict[str, Any]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.inner, bias=False, **make)
        self.up_proj = nn.Linear(shape.width, shape.inner, bias=False, **make)
        self.down_proj = nn.Linear(shape.inner, shape.width, bias=False, **make)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and feed-forward block, each behind a norm and added to its input."""

    def __init__(self, shape: DecoderShape, make: dict[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.width, shape.eps, **make)
        self.self_attn = DecoderAttention(shape, make)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, shape.eps, **make)
        self.mlp = DecoderFeedForward(shape, make)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor], seen: Seen) -> tuple[Tensor, ...]:
        attended, key, value = self.self_attn(self.input_layernorm(x), past, seen)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), key, value


class SmallDecoder(nn.Module):
    """A causal language model of its own.

    Its state holds keys and values of the last `window - 1` tokens, `(B, layers * Hkv, P, d)`, at
    the right end, and which of these columns are filled, `(B, P)`. Keys are not rotated: a column
    is a place, and only distances count, so that a text may be of any length.
    """

    def __init__(self, shape: DecoderShape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        make: dict[str, Any] = {"dtype": dtype, "device": device}
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width, **make)
        self.layers = nn.ModuleList(DecoderLayer(shape, make) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, shape.eps, **make)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=shape.width**-0.5)

    def empty(self, batch_size: int, device: torch.device) -> Tree:
        """Make the state of rows that have read nothing."""
        shape, dtype = self.shape, self.embed_tokens.weight.dtype
        size = batch_size, shape.layers * shape.kv_heads, shape.window - 1, shape.head_width
        return {
            "keys": torch.zeros(size, dtype=dtype, device=device),
            "values": torch.zeros(size, dtype=dtype, device=device),
            "there": torch.zeros(batch_size, shape.window - 1, dtype=torch.bool, device=device),
        }

    def forward(self, ids: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """Read ids `(B, N)`, -1 where there is none, behind what a state holds.

        Returns:
            Last hidden states `(B, N, D)`, and the state behind the tokens.
        """
        real = torch.cat([state["there"], ids >= 0], 1)
        hidden, keys, values = self._run(ids, state, real)
        kept = latest(real, self.shape.window - 1)
        filled = real.gather(1, kept)
        after = {"keys": take(keys, kept, filled), "values": take(values, kept, filled)}
        return hidden, {**after, "there": filled}

    def text(self, ids: Tensor) -> Tensor:
        """Compute the last hidden states `(B, N, D)` of texts `(B, N)` from their beginnings; -1
        where there is none."""
        empty = self.empty(len(ids), ids.device)
        nothing = {name: empty[name][:, :, :0] for name in ("keys", "values")}
        return self._run(ids, nothing, ids >= 0)[0]

    def _run(self, ids: Tensor, past: Tree, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute hidden states, and keys and values of all columns `real` `(B, P + N)`."""
        seen = self._seen(real, ids.shape[1])
        x, keys, values = self.embed_tokens(ids.clamp_min(0)), [], []
        pasts = [past[name].chunk(self.shape.layers, 1) for name in ("keys", "values")]
        for layer, *rows in zip(self.layers, *pasts, strict=True):
            x, key, value = layer(x, rows, seen)
            keys.append(key)
            values.append(value)
        return self.norm(x), torch.cat(keys, 1), torch.cat(values, 1)

    def head(self, hidden: Tensor) -> Tensor:
        """Compute logits `(..., V)` of last hidden states."""
        return hidden @ self.embed_tokens.weight.T

    def _seen(self, real: Tensor, new: int) -> Seen:
        """Lay out the columns `real` `(B, P + N)`, the last `new` of which are the step's."""
        shape, weight = self.shape, self.embed_tokens.weight
        past = real.shape[1] - new
        # A step's tokens stand side by side behind the past, whatever padding lies between them.
        place = torch.arange(past, device=real.device).expand(len(real), -1)
        place = torch.cat([place, past - 1 + real[:, past:].long().cumsum(1)], 1)
        query, key = place[:, past:, None], place[:, None]
        mask = real[:, None] & (key <= query) & (key > query - shape.window)
        # What is no token sees itself, lest it see nothing.
        number = torch.arange(new, device=real.device)
        mask[:, number, past + number] = True
        wide = torch.promote_types(weight.dtype, torch.float32)
        rates = torch.arange(0, shape.head_width, 2, device=real.device, dtype=wide)
        angles = place[..., None] * shape.theta ** (-rates / shape.head_width)
        angles = torch.cat([angles, angles], -1)[:, None]
        return Seen(mask[:, None], angles.cos().to(weight.dtype), angles.sin().to(weight.dtype))

    def resize(self, vocabulary: int) -> None:
        """Know `vocabulary` ids from now on; new rows are the mean of those there."""
        table = self.embed_tokens.weight
        if vocabulary == len(table):
            return
        more = table.detach().mean(0, keepdim=True).expand(max(0, vocabulary - len(table)), -1)
        rows = torch.cat([table.detach()[:vocabulary], more])
        self.embed_tokens = nn.Embedding.from_pretrained(rows, freeze=not table.requires_grad)

    @torch.no_grad()
    def take_over(self, weights: dict[str, Tensor]) -> None:
        """Begin with the weights of a decoder of the same form. Where that has more layers, some
        are taken, from its first to its last.

        Args:
            weights: its state dict, names as here.

        Raises:
            ValueError: if a weight is missing or has another shape.
        """
        layers = {int(name.split(".")[1]) for name in weights if name.startswith("layers.")}
        last, count = max(layers, default=0), self.shape.layers
        chosen = [round(i * last / max(1, count - 1)) for i in range(count)]
        for name, weight in self.state_dict().items():
            source = name
            if name.startswith("layers."):
                _, number, rest = name.split(".", 2)
                source = f"layers.{chosen[int(number)]}.{rest}"
            given = weights.get(source)
            if given is None or given.shape != weight.shape:
                shape = "is missing" if given is None else f"has shape {tuple(given.shape)}"
                raise ValueError(
                    f"{source} {shape}; the decoder needs {tuple(weight.shape)}. Give the settings "
                    "of the model that it is to begin with, or begin with none."
                )
            weight.copy_(given)
