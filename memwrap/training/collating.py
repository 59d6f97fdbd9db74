"""Documents as token rows and batches for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from memwrap.data.documents import encode
from memwrap.data.stdlib_corpus import Document
from memwrap.training.batches import IGNORED


class DocumentDataset(Dataset):
    """Tokenised documents, cut into pieces of at most `max_tokens` tokens.

    A piece never joins two documents. Every document ends with the tokenizer's end-of-text
    token, if it has one; only its first piece begins with what the tokenizer puts in front.

    Args:
        documents: `Document`s or plain strings.
        tokenizer: any tokenizer of transformers.
        max_tokens: longest piece (default: whole documents).
        min_tokens: shorter pieces are dropped; at least 2, for there is nothing to predict
            in a piece of one token.
        progress: show a bar while tokenising.

    Attributes:
        names: the document's name of every piece.

    Raises:
        ValueError: for lengths that do not fit together, or if no piece is left.
    """

    def __init__(
        self,
        documents: Sequence[Document | str],
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int | None = None,
        min_tokens: int = 2,
        progress: bool = True,
    ) -> None:
        if min_tokens < 2:
            raise ValueError(f"`min_tokens` is {min_tokens}; it must be at least 2.")
        if max_tokens is not None and max_tokens < min_tokens:
            raise ValueError(
                f"`max_tokens` is {max_tokens}; it must be at least `min_tokens` ({min_tokens})."
            )
        self.names: list[str] = []
        self._pieces: list[Tensor] = []
        longest = 0
        bar = tqdm(documents, desc="tokenising", unit="doc", disable=not progress)
        for index, document in enumerate(bar):
            text, name = (
                (document, str(index))
                if isinstance(document, str)
                else (document.text, document.name)
            )
            ids = list(encode(tokenizer, text))
            end = tokenizer.eos_token_id
            if end is not None and (not ids or ids[-1] != end):
                ids.append(end)
            longest = max(longest, len(ids))
            # int32 halves what a large corpus takes; __getitem__ gives the usual int64.
            for piece in torch.tensor(ids, dtype=torch.int32).split(max_tokens or len(ids) or 1):
                if len(piece) >= min_tokens:
                    self._pieces.append(piece)
                    self.names.append(name)
        if not self._pieces:
            raise ValueError(
                f"No piece of at least {min_tokens} tokens (`min_tokens`) is left of "
                f"{len(documents)} documents; the longest has {longest} tokens."
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of all pieces."""
        return sum(len(piece) for piece in self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Give `{"input_ids": (T,)}`; the collator makes labels and mask."""
        return {"input_ids": self._pieces[index].long()}


@dataclass
class DocumentCollator:
    """Put documents of different lengths into one batch, padded on the right.

    Args:
        pad_token_id: the id of padding; any id will do, for the mask hides it.
        pad_to_multiple_of: round the length up to a multiple of this.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate.

        Args:
            features: with `input_ids (T,)`; with `labels (T,)` where not every token is a
                target, and `attention_mask (T,)` where some are padding already.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each `(B, T)`; labels are -100 on
            padding.

        Raises:
            ValueError: for a feature without `input_ids`, or fields of different lengths.
        """
        rows = [self._row(feature) for feature in features]
        width = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        return {
            name: torch.stack(
                [torch.nn.functional.pad(r[name], (0, width - len(r[name])), value=f) for r in rows]
            )
            for name, f in fills.items()
        }

    @staticmethod
    def _row(feature: dict[str, Any]) -> dict[str, Tensor]:
        if "input_ids" not in feature:
            raise ValueError(
                f"A feature holds {', '.join(sorted(feature)) or 'nothing'}; it needs `input_ids`."
            )
        ids = torch.as_tensor(feature["input_ids"]).long()
        mask = torch.as_tensor(feature.get("attention_mask", torch.ones_like(ids))).long()
        labels = torch.as_tensor(feature.get("labels", ids)).long()
        for name, value in (("attention_mask", mask), ("labels", labels)):
            if value.shape != ids.shape:
                raise ValueError(
                    f"A feature has {len(value)} `{name}` for {len(ids)} `input_ids`; "
                    "they must be as many."
                )
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels.masked_fill(mask == 0, IGNORED),
        }
