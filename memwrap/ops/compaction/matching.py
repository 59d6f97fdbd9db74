"""Input, settings and result of a compaction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Matching:
    """The way in which keys are chosen, and biases and values fitted.

    Attributes:
        selection: `"attention"`: the keys of the largest scores; `"omp"`: orthogonal matching
            pursuit on the mass, slower.
        score: of a key, over the queries' attention weights: root mean square, largest or mean.
        pooling: scores are smoothed over neighbouring keys, by their `"mean"` or `"max"`.
        pooling_width: how many of them (odd).
        choices: keys that a step of the pursuit chooses.
        refit_every: steps after which it fits all biases again; new keys have the lower bound until
            then.
        schedule: `(most, choices, refit_every)`, in force while fewer than `most` keys are chosen;
            the last one for the rest. In place of the two above.
        drop_below: keys whose bias is below it are replaced, in at most three rounds.
        absolute: the pursuit ranks by absolute correlation. normalized: by that of columns of
            length 1.
        fit_bias: otherwise biases are 0 (of keys that had one, that).
        lower, upper: bounds of `exp(bias)`, in units of what the key had before.
        steps: None: bounded least squares until it converges. A number: as published, least
            squares without bounds, clamped, and so many steps of projected gradient.
        relative: queries count by the relative error of their mass; otherwise by its error in units
            of their largest exponential, as published.
        fit_values: otherwise slots keep their keys' values.
        ridge: of both fits, towards what was (old values; one weight for all keys). 0: the shortest
            least-squares solution, without `towards_old`.
        ridge_of: the unit of `ridge`: the `"mean"` or the `"largest"` eigenvalue of the Gram
            matrix, or `"one"`.
        towards_old: what `ridge` pulls to; False: to 0, and it is applied to values alone.
        keep_all: where the slots suffice for all keys, these stay as they are.
    """

    selection: Literal["attention", "omp"] = "attention"
    score: Literal["rms", "max", "mean"] = "rms"
    pooling: Literal["mean", "max"] | None = None
    pooling_width: int = 7
    choices: int = 1
    refit_every: int = 1
    schedule: tuple[tuple[int | None, int, int], ...] | None = None
    drop_below: float | None = None
    absolute: bool = False
    normalized: bool = False
    fit_bias: bool = True
    lower: float = math.exp(-3)
    upper: float = math.exp(3)
    steps: int | None = None
    relative: bool = True
    fit_values: bool = True
    ridge: float = 1e-3
    ridge_of: Literal["mean", "largest", "one"] = "mean"
    towards_old: bool = True
    keep_all: bool = True

    def pace(self, chosen: int) -> tuple[int, int]:
        """Give `choices` and `refit_every` of the pursuit when so many keys are chosen."""
        if self.schedule is None:
            return self.choices, self.refit_every
        for most, choices, refit_every in self.schedule:
            if most is None or chosen < most:
                return choices, refit_every
        return self.schedule[-1][1:]


@dataclass(frozen=True)
class KeyValueBlock:
    """The keys and values to be compacted, and the queries by which it is judged.

    Attributes:
        query: `(B, Hkv, N, D)`. key: `(B, Hkv, T, D)`. value: `(B, Hkv, T, Dv)`. As attention sees
            them: rotated.
        scaling: of the scores.
        bias: `(B, Hkv, T)` added to scores already (slots of an earlier compaction), or None.
        valid: `(B, Hkv, T)` bool, which keys there are; None: all.
        weight: `(B, Hkv, N)`, what a query counts; 0 for one that is not there. None: all 1.
        softcap: as in `LayerAttention`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    bias: Tensor | None = None
    valid: Tensor | None = None
    weight: Tensor | None = None
    softcap: float | None = None

    def flat(self) -> KeyValueBlock:
        """Make one dimension `(R, ...)` of rows and heads, with all that may be None filled in."""
        bias = self.key.new_zeros(self.key.shape[:3]) if self.bias is None else self.bias
        valid = torch.ones_like(bias, dtype=torch.bool) if self.valid is None else self.valid
        weight = self.query.new_ones(self.query.shape[:3]) if self.weight is None else self.weight
        tensors = (x.flatten(0, 1) for x in (self.query, self.key, self.value))
        extra = (x.flatten(0, 1) for x in (bias, valid, weight))
        query, key, value = tensors
        bias, valid, weight = extra
        return KeyValueBlock(query, key, value, self.scaling, bias, valid, weight, self.softcap)

    def logits(self, query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
        """Score keys `(..., T, D)` for queries `(..., N, D)`: `(..., N, T)`."""
        scores = query @ key.transpose(-1, -2) * self.scaling
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores + bias[..., None, :]


@dataclass(frozen=True)
class Compacted:
    """The slots: which keys they are, and with what bias and value they stand for all.

    Attributes:
        index: `(B, Hkv, S)` of the keys, in the order in which they were chosen; 0 where `filled`
            is False.
        filled: `(B, Hkv, S)` bool.
        bias: `(B, Hkv, S)`, natural logarithms; 0 where not filled.
        value: `(B, Hkv, S, Dv)`; 0 where not filled.
    """

    index: Tensor
    filled: Tensor
    bias: Tensor
    value: Tensor

    def ordered(self) -> Compacted:
        """Sort the slots by the place of their keys, those that are not filled last."""
        last = self.index.max() + 1 if self.index.numel() else 0
        order = torch.where(self.filled, self.index, last).argsort(dim=-1, stable=True)
        value = self.value.gather(2, order[..., None].expand_as(self.value))
        index, filled, bias = (x.gather(2, order) for x in (self.index, self.filled, self.bias))
        return Compacted(index, filled, bias, value)
