"""What a model's attention is like, learned by running a few tokens through it.

Every layer is asked on its own, inside the run: its attention module is called again with what it
was called with, and with embeddings of positions that tell its channels apart. Nothing is known of
a family beforehand, and what was learned is held to the model's own numbers at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from memwrap.backbones.layer_attention import AttentionStep, LayerAttention
from memwrap.backbones.positions import MemoryKeyValues, Positions
from memwrap.backbones.rotary import LayerRotation, PositionCall, Rotary
from memwrap.backbones.rotation_probe import (
    close,
    error,
    find_embeddings,
    find_rotation,
    position_keyword,
)

TOKENS = 8
BEFORE = 3  # of them, seen as a memory's


@dataclass(frozen=True)
class AttentionSizes:
    """Heads and widths of one layer's attention, its own sliding window if it has one, whether
    its output is a softmax over scaled and capped scores and nothing else but sinks,
    and its soft cap."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    plain_softmax: bool = True
    softcap: float | None = None


def probe(
    run: Callable[[Tensor, Any], Any],
    decoder: nn.Module,
    layers: Iterable[nn.Module],
    num_layers: int,
    rotary: Rotary,
    name: str,
) -> dict[int, AttentionSizes]:
    """Learn heads and widths of every layer with attention and how it rotates, from a few tokens.

    Args:
        run: runs the decoder on tokens at positions `(1, T)`, with a context.
        decoder: watched for what computes embeddings of positions, outside its `layers`.
        num_layers: decoder layers with attention.
        rotary: is filled, all at once, if nothing is known of it.
        name: of the model, for errors.

    Raises:
        ValueError: if attention does not go through transformers' attention functions, if the
            rotation is not one that can be taken back, or if attention is more than memwrap can
            join memories to.
    """
    positions = torch.arange(TOKENS)[None]
    with _position_calls(decoder, layers, TOKENS) as calls:
        context = _Probe(positions, Rotary(), calls, name)
        run(positions, context)
    if len(context.sizes) != num_layers:
        raise ValueError(
            f"{name}'s attention does not go through transformers' attention functions, where "
            "memories at the attention place meet it; use one at another place (rmt, armt, knnlm)."
        )
    if not rotary.layers:  # other threads may be reading with what is known
        rotary.layers = context.rotary.layers
    return dict(sorted(context.sizes.items()))


@contextmanager
def _position_calls(
    decoder: nn.Module, layers: Iterable[nn.Module], length: int
) -> Iterator[list[PositionCall]]:
    """Note this thread's calls of modules outside the layers that are given whole numbers
    `(..., 1, length)`: positions."""
    inside = {module for layer in layers for module in layer.modules()}
    calls: list[PositionCall] = []
    thread = get_ident()

    def note(module: nn.Module, *call: Any) -> None:
        if get_ident() != thread:  # torch may leave out the keywords while the hook comes or goes
            return
        args, kwargs, output = call
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if any(not t.is_floating_point() and t.shape[-2:] == (1, length) for t in given):
            calls.append(PositionCall(module, args, kwargs, output))

    watched = [module for module in decoder.modules() if module not in inside]
    handles = [m.register_forward_hook(note, with_kwargs=True) for m in watched]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Probe:
    """A context that learns what every layer's attention is like.

    Attributes:
        where: `(1, T)`, positions of the tokens.
        rotary, calls, name: as in `probe`.
        sizes: what was learned.
    """

    where: Tensor
    rotary: Rotary
    calls: list[PositionCall]
    name: str
    sizes: dict[int, AttentionSizes] = field(default_factory=dict)

    def before_layer(self, layer: int, hidden: Tensor) -> Tensor:
        return hidden

    def after_layer(self, layer: int, hidden: Tensor) -> None:
        return None

    def attention_step(self, device: torch.device) -> AttentionStep:
        return AttentionStep(_positions(self.where).to(device), self.rotary)

    def attention(self, attention: LayerAttention) -> Tensor:
        layer, local = attention.layer, attention.local()
        (_, heads, _, width), (_, kv_heads, _, _) = (
            attention.rotated_query.shape,
            attention.rotated_key.shape,
        )
        if layer in self.sizes:
            raise ValueError(
                f"{self.name} attends several times in layer {layer}; memories at the attention "
                "place need layers that attend once. Use one at another place (rmt, armt)."
            )
        if not self._learn_rotation(attention):
            raise ValueError(
                f"{self.name} rotates the keys of layer {layer} in a way that memwrap cannot take "
                "back (a norm with weights behind the rotation, angles from a table, or a "
                "convolution may do that); use a memory at another place (rmt, armt)."
            )
        if not close(_joined(attention), local[:, BEFORE:], _rounding(attention)):
            raise ValueError(
                f"{self.name}'s attention in layer {layer} depends on more of the past than "
                "queries, keys, values and their distance (norms behind the rotation or biases may "
                "do that); use a memory at another place (rmt, armt)."
            )
        self.sizes[layer] = AttentionSizes(
            heads, kv_heads, width, attention.value.shape[-1], attention.window,
            plain_softmax=_is_plain(attention, local), softcap=attention.softcap,
        )  # fmt: skip
        return local

    def _learn_rotation(self, attention: LayerAttention) -> bool:
        """Learn how the layer rotates; tells whether what was learned gives the model's own
        queries and keys."""
        layers, layer = self.rotary.layers, attention.layer
        given = position_keyword(attention, self.calls)
        embeddings = None if given is None else find_embeddings(*given)
        if given is not None and embeddings is None:
            return False
        for known in {id(one): one for one in layers.values()}.values():  # as another layer, mostly
            if known.embeddings == embeddings:
                layers[layer] = known
                if _taken_back(attention):
                    return True
        layers[layer] = LayerRotation(embeddings)
        if embeddings is not None:
            layers[layer] = find_rotation(attention, embeddings)
        return _taken_back(attention)


def _positions(where: Tensor) -> Positions:
    real = torch.ones_like(where, dtype=torch.bool)
    return Positions.of((where[:, :0], real[:, :0]), (where, real), ~real)


def _taken_back(attention: LayerAttention) -> bool:
    """Tell whether the model's queries and keys, un-rotated, are what the module makes of every
    token alone, unmoved; and whether these, rotated, are the model's."""
    attention = replace(attention, step=replace(attention.step, cached={}))
    where = attention.key_positions
    try:
        alone = attention.called_with(attention.inputs.transpose(0, 1))
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, TypeError):  # it is not made for a token alone
        return False
    sides = [(attention.unrotated_query(), attention.rotated_query, alone.query)]
    if (
        alone.key.shape[2] == 1
    ):  # otherwise they are those of another layer, held to the model there
        sides.append((attention.key, attention.rotated_key, alone.key))
    return all(
        close(back, plain.transpose(0, 2)) and close(attention.rotate(back, where), rotated)
        for back, rotated, plain in sides
    )


def _rounding(attention: LayerAttention) -> float:
    """Measure what a change of queries and keys by as much as their dtype resolves does: of scores
    of some tens half types leave more than their resolution."""
    query, key = attention.rotated_query, attention.rotated_key
    generator, most = torch.Generator().manual_seed(0), torch.finfo(query.dtype).eps
    mask = attention.mask_for(attention.visible())  # as joined attention has one

    def changed(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=generator).to(x.device) * 2 - 1
        return (x * (1 + most * noise)).to(x.dtype)

    def attended(query: Tensor, key: Tensor) -> Tensor:
        return attention.function(query, key, attention.value, mask)[0]

    return error(attended(changed(query), changed(key)), attended(query, key))


def _joined(attention: LayerAttention) -> Tensor:
    """Attend to the first tokens as if they were a memory's, and the others a new segment."""
    where, visible = attention.key_positions - BEFORE, attention.visible()[..., BEFORE:, :]
    before, now = where[:, :BEFORE], where[:, BEFORE:]
    step = replace(attention.step, positions=_positions(now.cpu()).to(now.device), cached={})
    key, query = attention.key[:, :, BEFORE:], attention.unrotated_query()[:, :, BEFORE:]
    segment = replace(
        attention,
        step=step,
        rotated_query=attention.rotate(query, now),
        rotated_key=attention.rotate(key, now),
        value=attention.value[:, :, BEFORE:],
        mask=attention.mask_for(visible[..., BEFORE:]),
    )
    memory = MemoryKeyValues(
        attention.key[:, :, :BEFORE], attention.value[:, :, :BEFORE], before,
        visible[:, 0, :, :BEFORE],
    )  # fmt: skip
    return segment.join(memory)[0]


def _is_plain(attention: LayerAttention, local: Tensor) -> bool:
    """Tell whether a layer's attention is a softmax over scaled and capped scores and the sinks,
    which some functions round to the model's dtype and others do not."""
    dtype, names = torch.promote_types(local.dtype, torch.float32), ("query", "key")
    wide = {f"rotated_{n}": getattr(attention, f"rotated_{n}").to(dtype) for n in names}
    ways = attention, replace(attention, value=attention.value.to(dtype), **wide)
    return any(close(_plain(way), local) for way in ways)


def _plain(attention: LayerAttention) -> Tensor:
    """Attend by a softmax over scaled and capped scores and the sinks."""
    key, value = (
        x.repeat_interleave(attention.groups, 1) for x in (attention.rotated_key, attention.value)
    )
    scores = attention.rotated_query @ key.transpose(-1, -2) * attention.rotated_scaling
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    scores = scores.masked_fill(~attention.visible(), -torch.inf)
    if attention.sinks is not None:
        sinks = attention.sinks.to(scores).view(1, -1, 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], -1)
    weights = scores.float().softmax(-1)[..., : key.shape[2]]
    return (weights.to(value.dtype) @ value).transpose(1, 2)
