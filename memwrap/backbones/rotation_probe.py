"""How an attention module turns its heads, found by giving it embeddings that tell channels apart.

Everything is exact in any dtype: cosines and sines are 0, 1 or 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from memwrap.backbones.layer_attention import LayerAttention
from memwrap.backbones.rotary import Embeddings, LayerRotation, PositionCall, Rotation


def error(got: Tensor, want: Tensor) -> float:
    """Compute by how much one differs from the other: the norm of the difference, of its norm."""
    wide = torch.promote_types(want.dtype, torch.float32)
    got, want = got.to(wide), want.to(wide)
    return float((got - want).norm() / want.norm().clamp_min(torch.finfo(wide).tiny))


def close(got: Tensor, want: Tensor, rounding: float = 0.0) -> bool:
    """Tell whether both agree as closely as their dtype lets them, or as what rounding alone was
    seen to leave."""
    return error(got, want) <= max(1e-5, 2 * torch.finfo(want.dtype).eps, 4 * rounding)


def position_keyword(
    attention: LayerAttention, calls: Sequence[PositionCall]
) -> tuple[str, Any, PositionCall] | None:
    """Find the keyword of an attention module that is what one of `calls` gave, for positions 0, 1,
    ...: its name, its value and the call."""
    for call in calls:
        made = tree_leaves(call.output)
        for keyword, value in attention.call.keywords.items():
            if _equal(tree_leaves(value), made):
                return keyword, value, call
    return None


def _equal(given: list[Any], made: list[Any]) -> bool:
    return (
        len(given) == len(made) > 0
        and all(isinstance(t, Tensor) for t in (*given, *made))
        and all(
            a is b or (a.shape == b.shape and torch.equal(a.cpu(), b.cpu()))
            for a, b in zip(given, made, strict=True)
        )
    )


def find_embeddings(keyword: str, value: Any, call: PositionCall) -> Embeddings | None:
    """Learn how cosines and sines are handed on; None for a way that is not known. At position 0
    all sines are zero."""
    compute = call.again
    if isinstance(value, Tensor):
        form = Embeddings(keyword, compute, True, False) if value.is_complex() else None
    elif isinstance(value, tuple | list) and len(value) == 2 and value[0].shape == value[1].shape:
        zero = [not bool(t[..., 0, :].any()) for t in value]
        form = Embeddings(keyword, compute, False, zero[0], value[0].dim()) if any(zero) else None
    else:
        form = None
    return form if form is not None and _computes(form, value) else None


def _computes(form: Embeddings, value: Any) -> bool:
    """Tell whether embeddings are computed for any position; a table ends, and has no negative
    ones."""
    like = value if isinstance(value, Tensor) else value[0]
    where = torch.tensor([[1, -1]], device=like.device)
    cos, sin = form.cos_sin(form.compute(like.real, where))
    return torch.equal(cos[:, 0], cos[:, 1]) and torch.equal(sin[:, 0], -sin[:, 1])


def find_rotation(attention: LayerAttention, embeddings: Embeddings) -> LayerRotation:
    """Learn what embeddings of positions do to the queries and keys of a layer.

    The module is called with every token alone: unmoved; turned by a right angle, which exchanges
    the channels of every pair; with cosines of 2, which a norm behind the rotation takes back; and
    with cosines, then sines, that are the digits of their place's number, counted from 1.
    """
    given = attention.call.keywords[embeddings.keyword]
    inputs = attention.inputs.transpose(0, 1)
    cos, _ = embeddings.cos_sin(given)
    numbers = torch.arange(1, cos.shape[-1] + 1, device=cos.device)
    digits = [(numbers >> n & 1).to(cos) for n in range(int(numbers[-1]).bit_length())]
    ones, nothing = torch.ones_like(digits[0]), torch.zeros_like(digits[0])
    asked = [(ones, nothing), (nothing, ones), (2 * ones, nothing)]
    asked += [(digit, nothing) for digit in digits] + [(nothing, digit) for digit in digits]
    count = len(inputs)
    cos, sin = (
        torch.stack(t).repeat_interleave(count, 0)[:, None] for t in zip(*asked, strict=True)
    )
    repeated = inputs.repeat(len(asked), 1, 1)
    response = attention.called_with(repeated, embeddings.of(cos, sin, given))
    wide = torch.promote_types(attention.value.dtype, torch.float32)
    # One row of samples for each channel.
    sides = [
        t.to(wide).unflatten(0, (-1, count)).flatten(1, 3)
        for t in (response.query, response.key)
        if len(t) == len(repeated)  # not keys of another layer
    ]
    rotation = _rotation(sides, len(digits))
    if rotation is None:
        return LayerRotation(embeddings)
    span = slice(rotation.start, rotation.start + len(rotation.partner))
    unit = all(bool(t[2, :, span].norm() < 1.5 * t[0, :, span].norm()) for t in sides)
    if unit and not (_weightless(attention) and all(_even(rows, rotation) for rows in sides)):
        return LayerRotation(embeddings)
    return LayerRotation(embeddings, rotation, unit)


def _weightless(attention: LayerAttention) -> bool:
    """Tell whether the module has no weights of a norm over heads, which training may make
    uneven."""
    width = attention.rotated_key.shape[-1:]
    return all(parameter.shape != width for parameter in attention.module.parameters())


def _even(rows: Tensor, rotation: Rotation) -> bool:
    """Tell whether a norm behind the rotation weighs both channels of every pair alike. Otherwise
    scores depend on more than distances."""
    start, size = rotation.start, len(rotation.partner)
    unmoved, turned = (t[:, start : start + size].norm(dim=0) for t in rows[:2])
    return bool(((turned - unmoved[list(rotation.partner)]).abs() <= 1e-2 * turned).all())


def _rotation(sides: Sequence[Tensor], digits: int) -> Rotation | None:
    """Read pairs, signs and places from the answers `(asked, samples, D)` of both sides; None where
    nothing is turned."""
    # Both sides are turned alike: a channel that is dead on one of them is seen on the other.
    rows = torch.cat([t / t[0].norm().clamp_min(1e-30) for t in sides], 1)
    unmoved, turned = rows[0], rows[1]
    moved = (turned != unmoved).any(0).nonzero().flatten().tolist()
    if not moved:
        return None
    start, stop = moved[0], moved[-1] + 1
    unit = [t / t.norm(dim=0).clamp_min(1e-30) for t in (turned, unmoved)]
    likeness = unit[0].T @ unit[1]
    best = likeness.abs().argmax(1)
    sign = likeness.gather(1, best[:, None])[:, 0].sign()

    def places(first: int) -> list[int]:
        marks = (rows[first : first + digits] != 0).any(1)
        power = 2 ** torch.arange(digits, device=marks.device)
        return ((marks * power[:, None]).sum(0) - 1).clamp_min(0).tolist()

    partner, cosine, sine = best.tolist(), places(3), places(3 + digits)
    of = range(start, stop)
    pairs = {i: partner[i] if i in moved and start <= partner[i] < stop else i for i in of}
    return Rotation(
        start,
        tuple(pairs[i] - start for i in of),
        tuple(cosine[i] if pairs[i] != i else 0 for i in of),
        tuple(sine[i] if pairs[i] != i else 0 for i in of),
        tuple(int(sign[i]) or 1 for i in of),
    )
