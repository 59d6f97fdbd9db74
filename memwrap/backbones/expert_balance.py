"""The loss that keeps a backbone's experts in even use, as its own class computes it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

OPTION = "output_router_logits"
"""What transformers calls the request for this loss, in configs and calls."""
_FUNCTION = "load_balancing_loss_func"
_EXPERTS = ("num_experts", "num_local_experts")
_CHOSEN = ("num_experts_per_tok",)
_WEIGHT = ("router_aux_loss_coef",)


@dataclass(frozen=True)
class ExpertBalance:
    """A model's own balancing loss, with the numbers that it is called with.

    Attributes:
        function: of its module.
        experts, chosen: how many there are, and how many a token is sent to.
        weight: of the loss beside the cross entropy.
    """

    function: Callable[..., Any]
    experts: int
    chosen: int
    weight: float

    def __call__(self, router_logits: tuple[Tensor, ...], real: Tensor) -> Tensor:
        """Compute the weighted loss of the columns that `real` `(B, T)` marks.

        Args:
            router_logits: `(B * T, experts)` for each layer with experts.
            real: 1 for tokens of the text, 0 for padding and what memories put among them.
        """
        loss = self.function(router_logits, self.experts, self.chosen, real)
        return self.weight * loss


def find_balance(model: PreTrainedModel) -> ExpertBalance | None:
    """Find the balancing loss of a model's class; None where it has none that is called as most
    are."""
    function = getattr(sys.modules[type(model).__module__], _FUNCTION, None)
    places = (model, model.config, model.config.get_text_config(decoder=True))
    numbers: list[Any] = [_first(places, names) for names in (_EXPERTS, _CHOSEN, _WEIGHT)]
    if function is None or None in numbers:
        return None
    return ExpertBalance(function, *numbers)


def _first(places: tuple[Any, ...], names: tuple[str, ...]) -> Any:
    values = (getattr(place, name, None) for place in places for name in names)
    return next((v for v in values if isinstance(v, int | float)), None)
