"""The inputs of a call: checked, and where each row's text lies."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

from memwrap.state.memory_state import MemoryState

IGNORED = -100
# Keywords of models that read more than text begin so.
_NO_TEXT = ("pixel", "image", "video", "audio", "input_features", "speech", "vision")


@dataclass(frozen=True)
class Teacher:
    """Last hidden states of a model with the same head, whose distribution is to be followed.

    The loss of a target gets `weight * temperature^2 * KL(teacher || student)` beside the cross
    entropy, both distributions at that temperature (Hinton et al. 2015, arXiv 1503.02531).

    Attributes:
        hidden: `(B, T, D)` for every column.
        weight: of the divergence.
        temperature: by which both models' logits are divided.
        labels: weight of the cross entropy with the targets beside it.
    """

    hidden: Tensor
    weight: float = 1.0
    temperature: float = 1.0
    labels: float = 1.0


@dataclass(frozen=True)
class Inputs:
    """Checked inputs of one call: ids or embeddings, where N texts lie in them, and what is to be
    predicted.

    Attributes:
        ids, embeds: `(B, T)` or `(B, T, D)`; the other one is None.
        real: `(B, T)` bool, on the CPU; False is padding.
        starts, lengths: `(N,)` first column and tokens of each text.
        rows: `(N,)` the row of each text, where documents are packed in rows; None: one a row.
        targets: `(B, T)` the id that each column predicts, -100 for none; None for no loss.
        teacher: whose distribution is followed beside the targets.
    """

    ids: Tensor | None
    embeds: Tensor | None
    real: Tensor
    starts: Tensor
    lengths: Tensor
    rows: Tensor | None = None
    targets: Tensor | None = None
    teacher: Teacher | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.real.shape[0], self.real.shape[1]

    @property
    def device(self) -> torch.device:
        return (self.ids if self.ids is not None else self.embeds).device  # type: ignore[union-attr]

    def first_column(self, keep: int | Tensor) -> int:
        """Find the first column that is wanted: of the last `keep`, or of all."""
        return max(0, self.shape[1] - keep) if isinstance(keep, int) and keep > 0 else 0


def check_inputs(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None
) -> Inputs:
    """Check a call's inputs and find each row's text.

    Raises:
        ValueError: for missing, double, empty or misshapen inputs, or a mask with a hole.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give either `input_ids` or `inputs_embeds`; got both or neither.")
    given: Tensor = input_ids if input_ids is not None else inputs_embeds  # type: ignore[assignment]
    name, need = ("input_ids", 2) if input_ids is not None else ("inputs_embeds", 3)
    if given.dim() != need:
        raise ValueError(
            f"`{name}` has shape {tuple(given.shape)}; it needs {need} dimensions, (batch, tokens"
            + (", width)." if need == 3 else ").")
        )
    batch, total = given.shape[:2]
    if batch == 0 or total == 0:
        raise ValueError(
            f"`{name}` is empty (shape {tuple(given.shape)}); give at least one token."
        )
    if attention_mask is None:
        real = torch.ones(batch, total, dtype=torch.bool)
        starts = torch.zeros(batch, dtype=torch.long)
        return Inputs(input_ids, inputs_embeds, real, starts, torch.full_like(starts, total))
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, not ({batch}, {total})."
        )
    if attention_mask.shape[1] < total:
        raise ValueError(
            f"`attention_mask` covers {attention_mask.shape[1]} tokens; `{name}` has {total}."
        )
    real = attention_mask[:, -total:].bool().cpu()  # generate's mask covers what was read before
    lengths = real.sum(1)
    starts = real.int().argmax(1)
    filled = torch.arange(total)[None, :]
    expected = (filled >= starts[:, None]) & (filled < (starts + lengths)[:, None])
    if not torch.equal(real, expected):
        row = int((real != expected).any(1).int().argmax())
        raise ValueError(
            f"`attention_mask` of row {row} has a hole: padding may stand before and after a row's "
            "tokens, not between them."
        )
    return Inputs(input_ids, inputs_embeds, real, starts, lengths)


def check_mask(mask: Tensor, new: int, state: MemoryState) -> None:
    """Check that a mask is of the `new` columns alone, or agrees with what the state has read
    before them.

    Raises:
        ValueError: for another length, or other columns of padding than were read.
    """
    length, read = mask.shape[1], state.columns
    if length == new:
        return
    if length != read + new:
        raise ValueError(
            f"`attention_mask` covers {length} tokens; there are {new} new ones"
            + (f" after {read} that the state has read." if read else ".")
            + " Give the mask of the new ones, or of all."
        )
    wrong = state.mask_hash != state.mask_hash_of(mask[:, :read].bool().cpu())
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise ValueError(
            f"`attention_mask` of row {row} marks other padding than was read into the state. Give "
            "the mask of the new tokens alone, or read the text again with this one."
        )


def check_fit(inputs: Inputs, vocab_size: int, width: int) -> None:
    """Check that ids are in the vocabulary, or that embeddings have the backbone's width.

    Raises:
        ValueError: names the id or the width.
    """
    if inputs.embeds is not None:
        if inputs.embeds.shape[2] != width:
            raise ValueError(
                f"`inputs_embeds` has width {inputs.embeds.shape[2]}; the backbone's is {width}."
            )
        return
    ids: Tensor = inputs.ids  # type: ignore[assignment]
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"`input_ids` are {ids.dtype}; they must be integers.")
    least, most = (int(x) for x in ids.aminmax())
    if least < 0 or most >= vocab_size:
        raise ValueError(
            f"`input_ids` holds {least if least < 0 else most}; the vocabulary has ids from 0 to "
            f"{vocab_size - 1}. Is it another model's tokenizer?"
        )


def with_targets(
    inputs: Inputs, labels: Tensor | None, shift_labels: Tensor | None, teacher: Any
) -> Inputs:
    """Add what is to be predicted: `shift_labels` as they are, or `labels` shifted inside each
    text, both `(B, T)`; and a teacher to follow beside them. Nothing without either.

    Raises:
        ValueError: for another shape than the input's.
    """
    given = shift_labels if shift_labels is not None else labels
    if given is None:
        return inputs
    if given.shape != inputs.real.shape:
        raise ValueError(
            f"The labels have shape {tuple(given.shape)}, the input {tuple(inputs.shape)}; "
            "they must agree."
        )
    real = inputs.real.to(given.device)
    targets = given
    if shift_labels is None:
        labels = given.masked_fill(~real, IGNORED)
        if inputs.rows is not None:
            labels[inputs.rows.to(given.device), inputs.starts.to(given.device)] = IGNORED
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if teacher is not None:
        known = isinstance(teacher, Teacher)
        got: Any = tuple(teacher.hidden.shape) if known else type(teacher).__name__
        if got[:2] != inputs.shape:
            raise ValueError(f"`teacher` is {got}; it must be a Teacher of {inputs.shape} tokens.")
    return replace(inputs, targets=targets.masked_fill(~real, IGNORED), teacher=teacher)


def refuse_pictures(kwargs: dict[str, Any]) -> None:
    """Refuse what models that see and hear take beside text."""
    for name, value in kwargs.items():
        if name.startswith(_NO_TEXT) and value is not None:
            raise ValueError(
                f"`{name}` was given, but memwrap reads text alone, also on models that see and "
                "hear; leave pictures and sound out (model.backbone takes them without memory)."
            )


def refuse_unknown(kwargs: dict[str, Any], forward: Callable[..., Any]) -> None:
    """Refuse keywords that cannot be given or look like a misspelt one of `forward`; other ones
    of transformers' callers have no effect here."""
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name):
            raise ValueError(
                f"`{name}` is not collected across segments; model.base_model(...) gives the last "
                "hidden states, model.backbone(...) everything of one window."
            )
    if kwargs.get("output_router_logits"):
        raise ValueError(
            "`output_router_logits` asks for the loss that balances experts, a part of the model's "
            "own loss: give it labels. The routers' logits themselves are not collected."
        )
    refuse_pictures(kwargs)
    names = [*inspect.signature(forward).parameters, "shift_labels", "teacher", "answer_from"]
    for name in kwargs.keys() - FlashAttentionKwargs.__annotations__:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
        if near:
            raise ValueError(f"`{name}` is no argument of the model; did you mean `{near[0]}`?")


def as_batch(
    text: Tensor | str | list, mask: Tensor | None, tokenizer: Any = None
) -> tuple[Tensor, Tensor | None]:
    """Turn text into ids `(B, T)` and their mask; lists are padded on the right, strings tokenized
    first.

    Raises:
        ValueError: for nothing to read, or strings without a tokenizer.
    """
    if isinstance(text, Tensor):
        return (text[None] if text.dim() == 1 else text), mask
    if isinstance(text, str) or (text and isinstance(text[0], int)):
        text = [text]
    if text and isinstance(text[0], str):
        if tokenizer is None:
            raise ValueError("`text` is a string; give a `tokenizer` too, or ids.")
        text = tokenizer(text, verbose=False)["input_ids"]
    rows = [torch.as_tensor(row, dtype=torch.long) for row in text]
    if not rows:
        raise ValueError("`text` is empty; give at least one row of ids.")
    pad = torch.nn.utils.rnn.pad_sequence
    real = pad([torch.ones_like(r) for r in rows], batch_first=True)
    return pad(rows, batch_first=True), real


def check_control(control: str | MemoryState | None, state: MemoryState, inputs: Inputs) -> None:
    """Check what is to be read instead of the memory.

    Args:
        control: None, "off", "shuffled", or a state of the model.
        state: what the rows remember.
        inputs: the call's.

    Raises:
        ValueError: for another value, another number of rows, or rows whose segment is open.
    """
    if control is None:
        return
    if isinstance(control, MemoryState):
        if control.batch_size != state.batch_size:
            raise ValueError("The state in `memory_control` has another number of rows.")
    elif control not in ("off", "shuffled"):
        raise ValueError(
            f"`memory_control` is {control!r}; allowed: None, 'off', 'shuffled', a MemoryState."
        )
    elif control == "shuffled" and state.batch_size < 2:
        raise ValueError("`memory_control='shuffled'` needs at least two rows.")
    if bool(((state.fill > 0) & inputs.real.any(1)).any()):
        raise ValueError(
            "`memory_control` needs closed segments: feed whole ones, or close_segment first."
        )
