"""Rotary positions as the backbone computes them: rotate, and take the rotation back exactly.

What is known of a family's rotation is measured (`attention_probe`): which channels form a pair,
and which place of the embeddings (cosines and sines) turns it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from memwrap.backbones.position_limits import PositionLimit


@dataclass(frozen=True)
class Rotation:
    """A way of turning a head: channel i becomes `cos x_i + sign sin x_partner`, for the
    channels from `start` on; the lists have a number for each of these.

    Attributes:
        start: channels in front that are not turned.
        partner: the other channel of the pair, counted from `start`; itself: not turned.
        cosine, sine: the channel's place in the embeddings.
        sign: 1 or -1.
    """

    start: int
    partner: tuple[int, ...]
    cosine: tuple[int, ...]
    sine: tuple[int, ...]
    sign: tuple[int, ...]

    @classmethod
    def halves(cls, width: int) -> Rotation:
        """Make the common rotation of `width` channels, whose first half pairs with the second."""
        half = width // 2
        places = tuple(range(width))
        return cls(0, places[half:] + places[:half], places, places, (-1,) * half + (1,) * half)

    def angles(self, cos: Tensor, sin: Tensor) -> Angles:
        """Spread cosines and sines `(B, T, R)` over the channels."""
        cos, sin = _spread(cos, self.cosine), _spread(sin, self.sine)
        still = [i for i, other in enumerate(self.partner) if other == i]
        if still:
            index = torch.tensor(still, device=cos.device)
            cos, sin = cos.index_fill(-1, index, 1.0), sin.index_fill(-1, index, 0.0)
        return Angles(self, cos[:, None], _signed(sin, self.sign)[:, None])

    def partners(self, x: Tensor) -> Tensor:
        """Exchange the channels `(..., N)` of every pair."""
        order = _order(self.partner)
        if order == "halves":
            return x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
        if order == "pairs":
            return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return x[..., list(self.partner)]


@cache
def _order(numbers: tuple[int, ...]) -> str:
    """Name what the numbers of channels, of their places or signs, are in order."""
    count, half = len(numbers), len(numbers) // 2
    known = {
        "all": range(count),
        "twice": (i % max(half, 1) for i in range(count)),
        "each twice": (i // 2 for i in range(count)),
        "halves": ((i + half) % count for i in range(count)),
        "pairs": (i ^ 1 for i in range(count)),
        "signs of halves": (-1 if i < half else 1 for i in range(count)),
        "signs of pairs": (i % 2 * 2 - 1 for i in range(count)),
    }
    return next((name for name, order in known.items() if tuple(order) == numbers), "")


def _spread(x: Tensor, places: tuple[int, ...]) -> Tensor:
    """Take the places `(N,)` of `x` `(..., R)`; by copies and views where there is an order."""
    order, count = _order(places), len(places)
    if order == "all":
        return x[..., :count]
    if order == "twice":
        return torch.cat([x[..., : count // 2]] * 2, -1)
    if order == "each twice":
        return x[..., : count // 2].repeat_interleave(2, -1)
    return x[..., list(places)]


def _signed(x: Tensor, signs: tuple[int, ...]) -> Tensor:
    order = _order(signs)
    if order == "signs of halves":
        first, second = x.chunk(2, -1)
        return torch.cat([-first, second], -1)
    if order == "signs of pairs":
        return torch.stack([-x[..., ::2], x[..., 1::2]], -1).flatten(-2)
    return x * torch.tensor(signs, dtype=x.dtype, device=x.device)


_FEW = 16  # vectors of which a copy costs less than operations that avoid it


@dataclass(frozen=True)
class Angles:
    """The factors of a rotation at positions: of the channel itself, `cos`, and of its partner,
    `sin` with its sign; each `(B, 1, T, N)`, or `(B, H, T, N)` where heads have positions of their
    own."""

    rotation: Rotation
    cos: Tensor
    sin: Tensor

    def of_heads(self, positions: Tensor) -> Angles:
        """Split angles of `positions` `(B, H, T)`, laid side by side, into those of each head."""
        cos, sin = (x[:, 0].unflatten(1, positions.shape[1:]) for x in (self.cos, self.sin))
        return Angles(self.rotation, cos, sin)

    def unit(self) -> Angles:
        """Take away what scales the rotation."""
        scale = (self.cos.square() + self.sin.square()).rsqrt()
        return Angles(self.rotation, self.cos * scale, self.sin * scale)

    def inverse(self) -> Angles:
        """Make the rotation that undoes this one, which may scale; in float32 (or float64)."""
        wide = torch.promote_types(self.cos.dtype, torch.float32)
        cos, sin = self.cos.to(wide), self.sin.to(wide)
        size = cos.square() + sin.square()
        return Angles(self.rotation, cos / size, -sin / size)

    def behind(self, before: Angles) -> Angles:
        """Make the rotation that does first `before` and then this one; in float32 (or float64)."""
        wide = torch.promote_types(self.cos.dtype, torch.float32)
        cos, sin, first_cos, first_sin = (
            x.to(wide) for x in (self.cos, self.sin, before.cos, before.sin)
        )
        partners = self.rotation.partners
        return Angles(
            self.rotation,
            cos * first_cos + sin * partners(first_sin),
            cos * first_sin + sin * partners(first_cos),
        )

    def turn(self, x: Tensor) -> Tensor:
        """Turn `x` `(B, H, T, D)`."""
        rotation, width = self.rotation, self.cos.shape[-1]
        first, stop = rotation.start, rotation.start + width
        wide = torch.promote_types(x.dtype, self.cos.dtype)
        part = (x if width == x.shape[-1] else x[..., first:stop]).to(wide)
        cos, sin = self.cos.to(wide), self.sin.to(wide)
        wasteful = _order(rotation.partner) == "halves" and x.shape[2] > _FEW
        if torch.is_grad_enabled() or not wasteful:
            turned = torch.addcmul(part * cos, rotation.partners(part), sin)
        else:  # without a copy of the partners
            turned, half = part * cos, width // 2
            turned[..., :half].addcmul_(part[..., half:], sin[..., :half])
            turned[..., half:].addcmul_(part[..., :half], sin[..., half:])
        turned = turned.to(x.dtype)
        if width == x.shape[-1]:
            return turned
        around = [x[..., :first], turned, x[..., stop:]]
        return torch.cat([t for t in around if t.shape[-1]], -1)


def is_still(angles: Angles | None) -> bool:
    """Tell whether angles turn nothing: all positions are 0, and nothing scales. Read on a CPU
    alone, where it costs little."""
    if angles is None or angles.cos.device.type != "cpu":
        return False
    return bool((angles.cos == 1).all() & (angles.sin == 0).all())


def rotate(x: Tensor, angles: Angles | None) -> Tensor:
    """Rotate `x` `(B, H, T, D)`."""
    return x if angles is None else angles.turn(x)


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of positions: who computes them, and how they are handed to attention.

    Attributes:
        keyword: of the attention module.
        compute: gives what the backbone hands on, of `like` (for dtype and device) and positions
            `(B, T)`.
        packed: they are one complex tensor. Otherwise a pair.
        swapped: sines come first.
        dims: of the tensors; beyond three, what is in front repeats.
    """

    keyword: str
    compute: Callable[[Tensor, Tensor], Any]
    packed: bool
    swapped: bool
    dims: int = 3

    def cos_sin(self, value: Any) -> tuple[Tensor, Tensor]:
        """Read cosines and sines `(B, T, R)` from what the backbone hands on."""
        if self.packed:
            cos, sin = value.real, value.imag
        else:
            cos, sin = reversed(value) if self.swapped else value
        for _ in range(self.dims - 3):
            cos, sin = cos[0], sin[0]
        return cos, sin

    def of(self, cos: Tensor, sin: Tensor, value: Any) -> Any:
        """Put cosines and sines `(B, T, R)` into the form of what the backbone hands on."""
        if self.packed:
            return torch.complex(cos.to(value.real.dtype), sin.to(value.real.dtype))
        lead = value[0].shape[: self.dims - 3]
        cos, sin = (t.to(value[0].dtype).expand(*lead, *t.shape) for t in (cos, sin))
        return (sin, cos) if self.swapped else (cos, sin)

    def unmoved(self, shape: Sequence[int], value: Any) -> Any:
        """Make embeddings, `shape` is `(B, T)`, that turn nothing."""
        cos, _ = self.cos_sin(value)
        ones = cos.new_ones(*shape, cos.shape[-1])
        return self.of(ones, torch.zeros_like(ones), value)


@dataclass(frozen=True)
class LayerRotation:
    """One layer's rotation.

    Attributes:
        embeddings: of positions, where it is given some; `rotation`: what they do. None: the layer
            does not rotate.
        unit: a norm behind the rotation takes back what scales it.
    """

    embeddings: Embeddings | None = None
    rotation: Rotation | None = None
    unit: bool = False


class Rotary:
    """The backbone's own rotation, layer by layer, as far as it is known."""

    def __init__(
        self,
        layers: dict[int, LayerRotation] | None = None,
        limit: PositionLimit | None = None,
    ) -> None:
        self.layers = {} if layers is None else layers
        self.limit = limit

    def __getitem__(self, layer: int) -> LayerRotation:
        return self.layers.get(layer, LayerRotation())

    def rotates(self, layer: int) -> bool:
        """Tell whether a layer rotates."""
        return self[layer].rotation is not None

    def kind(self, layer: int) -> int | None:
        """Name the layer's kind: layers of one kind share their angles; None for a layer that does
        not rotate."""
        one = self[layer]
        if one.rotation is None:
            return None
        return next(n for n, other in self.layers.items() if other == one)

    def angles(self, positions: Tensor, layer: int, like: Tensor) -> Angles | None:
        """Compute the angles at `positions` `(B, T)` (negative and fractional ones too) for a
        layer; None where it does not rotate. `like` gives dtype and device.

        Raises:
            ValueError: for positions where angles depend on how much is fed at once.
        """
        one = self[layer]
        if one.rotation is None or one.embeddings is None:
            return None
        if self.limit is not None and positions.numel():
            self.limit.check(positions)
        given = one.embeddings.compute(like, positions.to(like.device))
        angles = one.rotation.angles(*one.embeddings.cos_sin(given))
        return angles.unit() if one.unit else angles


@dataclass(frozen=True)
class PositionCall:
    """A call of a module that was given positions `(..., 1, T)`, to be made again with others.

    Attributes:
        module: the module; `args`, `kwargs`: of the call.
        output: what it gave.
    """

    module: nn.Module
    args: Sequence[Any]
    kwargs: dict[str, Any]
    output: Any

    def again(self, like: Tensor, positions: Tensor) -> Any:
        """Call the module with `like` for every tensor of numbers, and with `positions`."""

        def put(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point():
                return like
            return positions.expand(*value.shape[:-2], *positions.shape)

        return self.module(*map(put, self.args), **{n: put(v) for n, v in self.kwargs.items()})
