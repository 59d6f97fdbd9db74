"""The rule of a step, and what goes into it and comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from memwrap.ops.fast_weights.networks import Weights

EPS = 1e-5  # of a row's norm
EPS_MUON = 1e-7
STEPS = ("gradient", "muon", "titans")
# Five Newton-Schulz steps, each with coefficients of its own.
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


@dataclass(frozen=True)
class StepRule:
    """The rule by which a segment changes a network.

    Attributes:
        network: one of `NETWORKS`.
        step: `"gradient"` and `"muon"` (LaCT): one step a segment on `-v . f(k)`, the second one
            orthogonalized; every row of a matrix then gets its first norm back. `"titans"`: a step
            a token on `|f(k) - v|^2` with momentum and decay, all gradients at the weights that
            the segment found, and no norm.
        row_norm: `"post"`: what is scaled is what the next step starts from; `"pre"`: the raw sum
            of all steps is kept, and only what is read is scaled.
    """

    network: Literal["swiglu", "linear", "mlp"] = "swiglu"
    step: Literal["gradient", "muon", "titans"] = "muon"
    row_norm: Literal["post", "pre"] = "post"
    coefficients: tuple[tuple[float, float, float], ...] = NEWTON_SCHULZ

    @property
    def squared(self) -> bool:
        """Whether the inner loss is the squared error."""
        return self.step == "titans"

    @property
    def keeps_sum(self) -> bool:
        """Whether the raw sum is kept beside what is read."""
        return self.step != "titans" and self.row_norm == "pre"


@dataclass(frozen=True)
class WriteGates:
    """The numbers that a segment's tokens are written with.

    Attributes:
        rates: `(B, G, T, n)` of the n matrices, or n = 1 for all of them.
        momentum: `(B, G, T)` from 0 to 1; None: no momentum. LaCT takes its mean.
        decay: `(B, G, T)` from 0 to 1, for `"titans"`.
    """

    rates: Tensor
    momentum: Tensor | None = None
    decay: Tensor | None = None


@dataclass(frozen=True)
class FastMemory:
    """Matrices of a network and what is kept beside them: tuples of matrices `(B, G, out, in)`.

    Attributes:
        weights: what is read.
        momentum: the last step, as it was before Muon; None without momentum.
        total: the raw sum, where it is kept.
    """

    weights: Weights
    momentum: Weights | None = None
    total: Weights | None = None
