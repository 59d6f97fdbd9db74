"""Whether a memory is right on an architecture: tried on a small random model of it."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import memwrap
from memwrap.cli.small_models import VOCABULARY
from memwrap.memories.registry import memory_class

RIGHT, LIMIT, REFUSED, WRONG = "right", "limit", "refused", "wrong"
TOLERANCE = 1e-3  # of the logits' scale: float32 leaves some 1e-5, experts chosen by a hair more
_SEGMENT, _LENGTH = 8, 29
_SAVED = "save and load"


@dataclass(frozen=True)
class Trial:
    """The result of trying a memory on a model.

    Attributes:
        memory: its name.
        result: "right", "limit" (right, and something is to be known), "refused" (at wrap) or
            "wrong".
        problem: what is to be known, was refused, or is wrong; empty if it is right.
    """

    memory: str
    result: str = RIGHT
    problem: str = ""

    @property
    def works(self) -> bool:
        return self.result in (RIGHT, LIMIT)

    @property
    def verdict(self) -> str:
        """The result in a line."""
        said = {RIGHT: "works", LIMIT: "works; ", REFUSED: "is refused: ", WRONG: "is wrong: "}
        return said[self.result] + self.problem


def try_memory(
    memory: str, build: Callable[[], PreTrainedModel], checks: Sequence[str] | None = None
) -> Trial:
    """Try one memory on small models.

    Args:
        memory: its name.
        build: makes models, all the same.
        checks: which of `CHECKS`; None for all: logits against the base, whole against pieces,
            left-padded against alone, greedy tokens against recomputed ones, gradients, saved
            against loaded.
    """
    trial = _tried(memory, build, checks)
    if trial.result == WRONG:
        # What differs by rounding alone, blown up by a choice that hangs on a hair, does not here.
        names = tuple(checks or CHECKS)
        numbers = [name for name in names if name != _SAVED]
        exact = _tried(memory, lambda: build().double(), numbers)
        kept = _tried(memory, build, [_SAVED]) if _SAVED in names else exact
        trial = exact if exact.works and kept.works else trial
    return trial


def _tried(
    memory: str, build: Callable[[], PreTrainedModel], checks: Sequence[str] | None
) -> Trial:
    settings = memwrap.config_class(memory).tiny()
    try:
        base = build()
        with _silence():
            model = memwrap.wrap(base, settings)
    except ValueError as error:
        return Trial(memory, REFUSED, _sentence(error))
    except Exception as error:  # whatever a foreign architecture raises
        return Trial(memory, WRONG, f"wrap: {type(error).__name__}: {_sentence(error)}")
    for name in checks or CHECKS:
        check = CHECKS[name]
        try:
            with _silence():
                problem = check(model, build)
        except Exception as error:
            problem = f"{type(error).__name__}: {_sentence(error)}"
        if problem:
            return Trial(memory, WRONG, f"{name}: {problem}")
    if memory_class(memory).claims.whole and _begins_anew(model):
        return Trial(memory, LIMIT, _begins_anew(model))
    return Trial(memory)


def _begins_anew(model: Any) -> str:
    """Tell why a memory that sees all is not the base."""
    if model.parts.max_positions is not None:
        return "learned positions begin anew in every segment"
    if "chunked_attention" in (getattr(model.parts.config, "layer_types", None) or ()):
        return "layers that attend in chunks count these from the segment's start"
    return ""


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def _silence() -> Any:
    return warnings.catch_warnings(action="ignore")


def text(rows: int = 2, length: int = _LENGTH) -> Tensor:
    """Draw ids `(rows, length)`, none of them special."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY - 4, (rows, length), generator=generator)


def _differs(got: Tensor, want: Tensor) -> str:
    error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))
    return "" if error <= TOLERANCE else f"{error:.1e} of the logits' scale"


@torch.no_grad()
def _against_the_base(model: Any, build: Any) -> str:
    """Compare with the base: with settings that see all, where a memory has them; for others, what
    the first segment gives, in which there is nothing to remember, is compared with the base's."""
    ids, base = text(), build()
    (memory,) = model.memories
    whole = memory_class(memory).claims.whole
    if whole and not _begins_anew(model):
        seeing = memwrap.wrap(base, memory, segment_size=_SEGMENT, **whole)
        return _differs(seeing(ids).logits, base_logits(build(), ids))
    ids = ids[:, : _SEGMENT - 1]
    vectors = [m.prefix(model.new_state(2).memories[n]) for n, m in _prompts(model)]
    logits = model(ids).logits
    if not vectors:
        if not all(memory.claims.neutral_start for memory in model.memories.values()):
            return ""  # untrained, it gives something else
        want = base_logits(base, ids)
    else:
        if model.parts.ids_matter:
            return ""  # its vectors are no embeddings of ids
        embeds = torch.cat([*vectors, base.get_input_embeddings()(ids)], 1)
        if model.parts.max_positions is not None:
            return ""  # its vectors stand at no position
        want = base_logits(base, None, embeds)[:, vectors[0].shape[1] :]
    return _differs(logits.log_softmax(-1), want.float().log_softmax(-1))


def _prompts(model: Any) -> Iterator[tuple[str, Any]]:
    for name, memory in model.memories.items():
        if (
            getattr(memory, "num_prefix", 0)
            and memory.prefix_mask(model.new_state(2).memories[name]) is None
        ):
            yield name, memory


def base_logits(base: Any, ids: Tensor | None, embeds: Tensor | None = None) -> Tensor:
    """Compute the logits of the base itself, without a cache."""
    if embeds is not None:
        return base(inputs_embeds=embeds, use_cache=False).logits
    return base(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def _pieces(model: Any, build: Any) -> str:
    ids, want = text(), model(text()).logits
    state, parts = model.new_state(2), list[Tensor]()
    for piece in ids.split([5, 1, 1, 12, _LENGTH - 19], dim=1):
        earlier = state.clone() if len(parts) == 2 else None  # asked again: nothing wrote into it
        parts.append(model(piece, cache=state).logits)
        if earlier is not None:
            parts[-1] = model(piece, cache=earlier).logits
    return _differs(torch.cat(parts, 1), want)


@torch.no_grad()
def _padded(model: Any, build: Any) -> str:
    ids = text()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    logits = model(ids.masked_fill(mask == 0, 0), attention_mask=mask).logits
    return _differs(logits[0, 5:], model(ids[:1, 5:]).logits[0])


@torch.no_grad()
def _greedy(model: Any, build: Any) -> str:
    ids = text(1, 13)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    for place in range(ids.shape[1], out.shape[1]):
        logits = model(out[:, :place], use_cache=False).logits[0, -1]
        best = logits.max()
        if best - logits[out[0, place]] > TOLERANCE * logits.abs().max():
            return f"token {place} is not the likeliest"
    return ""


def _gradients(model: Any, build: Any) -> str:
    ids = text(length=3 * _SEGMENT + 1)  # the last segment has a token
    model.train()
    try:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    finally:
        model.eval()
    wanted = [p for p in model.memory_parameters() if p.requires_grad]
    wanted = wanted or [model.get_input_embeddings().weight]
    grads = [p.grad for p in wanted if p.grad is not None]
    problem = "" if grads else "no parameter of the memory gets one"
    if any(not bool(g.isfinite().all()) for g in grads) or not bool(loss.isfinite()):
        problem = "they are not finite"
    model.zero_grad(set_to_none=True)
    return problem


@torch.no_grad()
def _saved(model: Any, build: Any) -> str:
    ids = text()
    want = model(ids).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, include_base=True)
        return _differs(memwrap.load(folder)(ids).logits, want)


CHECKS: dict[str, Callable[[Any, Any], str]] = {
    "logits against the base": _against_the_base,
    "whole against pieces": _pieces,
    "left-padded against alone": _padded,
    "generate": _greedy,
    "gradients": _gradients,
    _SAVED: _saved,
}

QUICK = (*tuple(CHECKS)[:3], "gradients")


def builder(make: Callable[[], PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    """Make a function that gives copies of what `make` makes once."""
    made: list[PreTrainedModel] = []

    def build() -> PreTrainedModel:
        if not made:
            made.append(make())
        return copy.deepcopy(made[0])

    return build
