"""A library: documents that a model has encoded once, asked many times, with citations.

Needs a model with the `extended_mind` memory. What the documents leave is a `MemoryState` like
every other; beside it the library remembers which entry is which token of which document.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from memwrap.chat.turns import Turns
from memwrap.io.checksums import check_sums, checksums, head_digest
from memwrap.io.reading import inside, parse_json
from memwrap.io.whole_folders import rewriting, settle
from memwrap.memories.extended_mind import GIVEN, ExtendedMindMemory, Retrieved, retrieved
from memwrap.memories.protocol import InsertsTokens, SoftPrompt
from memwrap.state.memory_state import MemoryState
from memwrap.state.trees import Tree

FORMAT, VERSION = "memwrap-library", 1
STATE, DOCUMENTS = "state.safetensors", "documents.safetensors"
CONVERSATION = "(conversation)"


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `end` (not included) of a document, and the attention that they got: the
    mean over heads and layers, of 1 in all."""

    document: str
    start: int
    end: int
    weight: float


@dataclass
class Citations:
    """For every token of an answer what was read when it was chosen.

    Attributes:
        ids: the answer's ids.
        tokens: for each, spans by falling weight.
        spans: those of the whole answer, weights as means per token.
    """

    ids: list[int]
    tokens: list[list[Span]]
    spans: list[Span]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return asdict(self)


class Library:
    """Encoded documents.

    Examples:
        >>> import memwrap
        >>> from memwrap.assets import asset
        >>> from transformers import AutoModelForCausalLM
        >>> base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"))
        >>> model = memwrap.wrap(base, "extended_mind", segment_size=64)
        >>> library = memwrap.Library.encode(model, {"a": list(range(100)), "b": list(range(50))})
        >>> list(library.documents)
        ['a', 'b']

    Attributes:
        model: a model with the `extended_mind` memory.
        state: its state after the documents, one row.
        documents: ids `(T,)` by name.
        entries: `(N, 2)`, the document's number and the token of every entry.
    """

    def __init__(
        self, model: Any, state: MemoryState, documents: dict[str, Tensor], entries: Tensor
    ) -> None:
        self.memory = mind_of(model)
        self.model, self.state, self.documents, self.entries = model, state, documents, entries
        if len(entries) != count_of(state):
            raise ValueError(
                f"The state has {count_of(state)} entries, the documents {len(entries)}: they do "
                "not belong together."
            )

    @classmethod
    @torch.no_grad()
    def encode(
        cls,
        model: Any,
        documents: Mapping[str, Tensor | list[int] | str],
        *,
        tokenizer: Any = None,
        window: int | None = None,
        stride: int | None = None,
        special_ids: Iterable[int] | None = None,
        batch_size: int = 8,
        progress: bool = False,
    ) -> Library:
        """Encode documents, each by itself: in overlapping windows, without looking anything up.

        Args:
            model: with the `extended_mind` memory.
            documents: ids or text by name.
            tokenizer: for text.
            window: tokens that are read at once, at most (and by default) the segment size.
            stride: tokens by which windows advance; half a window by default. A window's last
                tokens that no window before has covered are kept, so that all but a document's
                first have `window - stride` tokens or more before them.
            special_ids: tokens that leave no entry; by default the tokenizer's special ones, or
                the backbone's beginning and end of text.
            batch_size: windows that are read together.
            progress: show a bar.

        Raises:
            ValueError: for a model without the memory, no documents, an empty one, text without a
                tokenizer, or sizes that do not fit.
        """
        memory = mind_of(model)
        window = window or memory.config.segment_size
        stride = stride or max(1, window // 2)
        if not 0 < stride <= window <= memory.config.segment_size:
            raise ValueError(
                f"`stride` {stride} and `window` {window} do not fit: 0 < stride <= window <= "
                f"segment_size ({memory.config.segment_size}) is needed."
            )
        texts = {name: _ids_of(name, text, tokenizer) for name, text in documents.items()}
        if not texts:
            raise ValueError("`documents` is empty; give at least one.")
        special = torch.tensor(sorted(_special(model, tokenizer, special_ids)), dtype=torch.long)
        pieces = [p for n, t in enumerate(texts.values()) for p in _windows(n, t, window, stride)]
        state, entries = model.new_state(1), []
        layers = state.memories["extended_mind"]["layers"]
        bar = tqdm(total=len(pieces), desc="encoding", unit="window", disable=not progress)
        for first in range(0, len(pieces), batch_size):
            batch = pieces[first : first + batch_size]
            read = model.close_segment(model.read([ids for _, _, ids, _ in batch]))
            for row, (number, start, ids, new) in enumerate(batch):
                keep = ~torch.isin(ids[-new:], special)
                encoded = read.memories["extended_mind"]["layers"]
                for layer, tree in encoded.items():
                    layers[layer] = _added(memory, layers[layer], tree, row, len(ids), keep)
                token = start + len(ids) - new + keep.nonzero().squeeze(1)
                entries.append(torch.stack([torch.full_like(token, number), token], 1))
            bar.update(len(batch))
        bar.close()
        state.memories["extended_mind"][GIVEN] = next(iter(layers.values()))["count"]
        state.weights = None if model.training else model.fingerprint()
        return cls(model, state, texts, torch.cat(entries))

    def save(self, folder: str | Path) -> None:
        """Write the library into a folder: the state, and the documents with their entries."""
        names, rows = list(self.documents), list(self.documents.values())
        tensors = {"ids": torch.cat(rows), "lengths": torch.tensor([len(r) for r in rows])}
        tensors["entries"] = self.entries.contiguous()
        with rewriting(folder) as new:
            self.state.save(new / STATE)
            metadata = {
                "format": FORMAT, "version": str(VERSION), "names": json.dumps(names),
                "state": head_digest(new / STATE),
            }  # fmt: skip
            metadata |= checksums(tensors, names=metadata["names"], state=metadata["state"])
            save_file(tensors, new / DOCUMENTS, metadata=metadata)

    @classmethod
    def load(cls, folder: str | Path, model: Any) -> Library:
        """Read a library for the model that encoded it.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: for a damaged or foreign file, another model, or documents of another save
                than the state beside them.
        """
        folder = Path(folder)
        settle(folder)
        path, state_path = inside(folder, DOCUMENTS), inside(folder, STATE)
        for file in (path, state_path):
            if not file.is_file():
                raise FileNotFoundError(f"There is no library in {folder}: {file.name} is missing.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)):
                raise ValueError(f"{path} is damaged or not a library of format {VERSION}.")
            check_sums(tensors, metadata, path, needed=True)
            documents = _documents(tensors, parse_json(metadata["names"], path), model, path)
        except (SafetensorError, KeyError, OSError) as error:
            raise ValueError(f"{path} is damaged or not a library: {error}") from error
        if metadata.get("state") != head_digest(state_path):
            raise ValueError(
                f"{path} and {STATE} beside it do not belong together: they are not of one save. "
                "Encode the documents again."
            )
        return cls(model, MemoryState.load(state_path, model), documents, tensors["entries"])

    def ask(
        self, question: Tensor | list[int] | str, *, tokenizer: Any = None, **settings: Any
    ) -> Citations:
        """Generate an answer and say what it was made of.

        Args:
            question: ids `(T,)` or text.
            tokenizer: for text. With a chat template the question is put as a user's turn.
            settings: of `generate`.
        """
        turns = Turns(tokenizer)
        if isinstance(question, str) and question.strip() and turns.present:
            question = turns.ids([{"role": "user", "content": question}])
            settings = {**turns.stops_for(self.model), **settings}
        ids = _ids_of("question", question, tokenizer).to(self.model.device)
        answer = self.model.generate(ids[None], cache=self.state, **settings)
        if len(answer) != 1:
            raise ValueError("Citations are made for one answer: leave num_return_sequences at 1.")
        return self.cite(ids, answer[0, len(ids) :])

    @torch.no_grad()
    def cite(
        self, question: Tensor | list[int], answer: Tensor | list[int], *, least: float = 1e-4,
    ) -> Citations:  # fmt: skip
        """Tell what was read while each of the answer's tokens was chosen.

        Args:
            question, answer: ids `(T,)`; the answer continues the question.
            least: spans of less weight are left out.
        """
        question, answer = (
            torch.as_tensor(x, device=self.model.device) for x in (question, answer)
        )
        if not len(question) or not len(answer):
            raise ValueError("`question` and `answer` need at least one id each.")
        text = torch.cat([question, answer[:-1]])[None]
        with retrieved() as notes:
            self.model(text, cache=self.state.clone(), logits_to_keep=1)
        token, entry, weight = _weights(notes, len(question) - 1)
        per_token = [
            self._spans(entry[token == t], weight[token == t], least) for t in range(len(answer))
        ]
        unique, place = entry.unique(return_inverse=True)
        total = weight.new_zeros(len(unique)).index_add(0, place, weight) / len(answer)
        return Citations(answer.tolist(), per_token, self._spans(unique, total, least))

    def report(self, citations: Citations, tokenizer: Any = None, limit: int = 5) -> str:
        """Return the answer and its `limit` heaviest spans, and for every token the heaviest."""

        def words(ids: Any) -> str:
            text = tokenizer.decode(ids) if tokenizer is not None else " ".join(map(str, ids))
            return " ".join(text.split())

        def place(span: Span) -> str:
            return f"{span.document} [{span.start}:{span.end}] {span.weight:.1%}"

        lines = [f"answer: {words(citations.ids)}", "", "read most:"]
        for span in citations.spans[:limit]:
            quoted = ""
            if span.document in self.documents:
                quoted = ": " + words(self.documents[span.document][span.start : span.end].tolist())
            lines.append(f"  {place(span)}{quoted}")
        lines += ["", "by token:"]
        for id_, spans in zip(citations.ids, citations.tokens, strict=True):
            lines.append(f"  {words([id_])!r}: {place(spans[0]) if spans else 'nothing'}")
        return "\n".join(lines)

    def _spans(self, entry: Tensor, weight: Tensor, least: float) -> list[Span]:
        """Join entries that stand side by side; spans come by falling weight."""
        names, known = list(self.documents), len(self.entries)
        result: list[list[Any]] = []
        order = entry.argsort()
        for number, w in zip(entry[order].tolist(), weight[order].tolist(), strict=True):
            document, token = self.entries[number].tolist() if number < known else (-1, number)
            last = result[-1] if result else None
            if last is not None and last[0] == document and last[2] == token:
                last[2], last[3] = token + 1, last[3] + w
            else:
                result.append([document, token, token + 1, w])
        spans = [
            Span(names[d], a, b, w) if d >= 0 else Span(CONVERSATION, a - known, b - known, w)
            for d, a, b, w in result
        ]
        return sorted((s for s in spans if s.weight >= least), key=lambda s: -s.weight)


def _documents(tensors: dict[str, Tensor], names: Any, model: Any, path: Path) -> dict[str, Tensor]:
    """Read the documents of a file, whose tensors must fit each other and the model.

    Raises:
        ValueError: says what does not fit.
    """
    ids, lengths, entries = (tensors[name] for name in ("ids", "lengths", "entries"))
    good = ids.dtype == lengths.dtype == entries.dtype == torch.long
    good = good and ids.dim() == lengths.dim() == 1 and entries.dim() == 2 == entries.shape[1]
    good = good and isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not good or len(names) != len(lengths) or len({*names}) != len(names):
        raise ValueError(f"{path} is damaged: its documents cannot be told apart.")
    if not len(lengths) or int(lengths.min()) < 1 or int(lengths.sum()) != len(ids):
        raise ValueError(f"{path} is damaged: its documents have other lengths.")
    if int(ids.min()) < 0 or int(ids.max()) >= model.parts.embedding_weight.shape[0]:
        raise ValueError(f"{path} has ids that the model has not.")
    number, token = entries.unbind(1)
    if len(entries) and not (0 <= int(number.min()) <= int(number.max()) < len(names)):
        raise ValueError(f"{path} is damaged: it names documents that are not there.")
    if bool((token < 0).any()) or bool((token >= lengths[number]).any()):
        raise ValueError(f"{path} is damaged: it names tokens that are not there.")
    return dict(zip(names, ids.split(lengths.tolist()), strict=True))


def mind_of(model: Any) -> ExtendedMindMemory:
    """Return the model's `extended_mind` memory.

    Raises:
        ValueError: if it has none, or others beside it that add tokens of their own.
    """
    memories = getattr(model, "memories", {})
    memory = memories.get("extended_mind")
    if memory is None:
        raise ValueError("A library needs a model with the memory 'extended_mind'.")
    if any(isinstance(m, SoftPrompt | InsertsTokens) for m in memories.values()):
        raise ValueError("A library needs a model without memories that add tokens of their own.")
    return memory


def count_of(state: MemoryState) -> int:
    """Count the entries written into a state's row."""
    layers = state.memories["extended_mind"]["layers"]
    return int(next(iter(layers.values()))["count"][0])


def _ids_of(name: str, text: Tensor | list[int] | str, tokenizer: Any) -> Tensor:
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError(f"{name!r} is a string; give a `tokenizer` too, or ids.")
        text = tokenizer(text, verbose=False)["input_ids"]
    ids = torch.as_tensor(text, dtype=torch.long).cpu()
    if ids.dim() != 1 or not len(ids):
        raise ValueError(f"{name!r} has shape {tuple(ids.shape)}; ids (T,) with T > 0 are needed.")
    return ids


def _special(model: Any, tokenizer: Any, given: Iterable[int] | None) -> set[int]:
    if given is not None:
        return set(given)
    if tokenizer is not None:
        return set(tokenizer.all_special_ids)
    special: list[int] = []
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(model.parts.config, name, None)
        special += value if isinstance(value, list) else [value] if value is not None else []
    return set(special)


def _windows(
    number: int, ids: Tensor, window: int, stride: int
) -> Iterator[tuple[int, int, Tensor, int]]:
    """Cut documents into `(document, first token, ids, how many of the last are new)`."""
    end = 0
    for start in range(0, len(ids), stride):
        piece = ids[start : start + window]
        before, end = end, start + len(piece)
        yield number, start, piece, end - before
        if end == len(ids):
            return


def _added(
    memory: ExtendedMindMemory, entries: Tree, read: Tree, row: int, length: int, keep: Tensor
) -> Tree:
    """Return a layer's tree with those of a window's last entries that are kept. The window was
    read into row `row` of `read` and has `length` tokens."""
    size = memory.config.cache_size
    number = torch.arange(length - len(keep), length)[keep]
    number = number[number >= length - size].to(read["key"].device)
    key, value = (read[n][row : row + 1].index_select(2, number % size) for n in ("key", "value"))
    lost = int(keep.sum()) - len(number)  # a window longer than the cache
    entries = {**entries, "count": entries["count"] + lost}
    valid = torch.ones(1, len(number), dtype=torch.bool, device=key.device)
    return memory.rings.add(entries, key, value, valid)


def _weights(notes: list[Retrieved], first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(token, entry, weight)` of all that queries `first` and later read: each pair once,
    summed over heads and layers and divided by their number."""
    layers: dict[int, list[Retrieved]] = {}
    for note in notes:
        layers.setdefault(note.layer, []).append(note)
    tokens, entries, weights = [], [], []
    for layer in layers.values():
        place = 0
        for note in layer:
            heads, length = note.entries.shape[1:3]
            query = torch.arange(place, place + length, device=note.entries.device) - first
            place += length
            known = (note.entries[0] >= 0) & (query >= 0)[:, None]
            tokens.append(query[:, None].expand_as(note.entries[0])[known])
            entries.append(note.entries[0][known])
            weights.append(note.weights[0][known].float() / (heads * len(layers)))
    token, entry, weight = (torch.cat(x).cpu() for x in (tokens, entries, weights))
    pairs, place = torch.stack([token, entry], 1).unique(dim=0, return_inverse=True)
    total = weight.new_zeros(len(pairs)).index_add(0, place, weight)
    return pairs[:, 0], pairs[:, 1], total
