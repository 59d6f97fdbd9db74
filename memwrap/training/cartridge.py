"""Cartridges: the slots of one document, trained so that the frozen model answers as if it had the
document before it (Eyuboglu et al., arXiv 2506.06266)."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from memwrap.chat.first_turn import read_document
from memwrap.chat.held import Held
from memwrap.chat.turns import Turns, under
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.state.memory_state import MemoryState

# What a model is asked to ask, about a chunk of the document.
SEEDS = (
    "Write one question about a fact in the text above. Answer with the question only.",
    "Write one question about how something works in the text above. Answer with it only.",
    "Write one question that asks to explain a term of the text above. Answer with it only.",
    "Write one question that asks to list what the text above names. Answer with it only.",
    "Write one request to summarise a part of the text above. Answer with the request only.",
)
TRAINED = ("slot_key", "slot_value", "slot_bias")


@dataclass(frozen=True)
class Cartridge:
    """Settings of a training.

    Attributes:
        slots: of a KV head.
        start: `"match"`: slots by attention matching; `"first"`: keys and values of the
            document's first tokens. Sinks stay as they are in both.
        minutes: of training, the study before it not counted. steps: at most; None: any number.
        talks: questions with answers to train on. held_out: others, to measure with.
        chunk_tokens: of the document that a question is made from.
        question_tokens, answer_tokens: at most.
        temperature: of questions; answers are the likeliest.
        top: tokens of the full context's distribution that are followed.
        batch: talks a step.
        learning_rate: of Adam; it falls to 0 with `steps`, or where none are given with `minutes`.
        seed: of questions and of the order.
    """

    slots: int = 128
    start: Literal["match", "first"] = "match"
    minutes: float = 10.0
    steps: int | None = None
    talks: int = 64
    held_out: int = 16
    chunk_tokens: int = 256
    question_tokens: int = 32
    answer_tokens: int = 64
    temperature: float = 0.6
    top: int = 20
    batch: int = 4
    learning_rate: float = 5e-3
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = ("slots", "talks", "held_out", "chunk_tokens", "question_tokens", "batch", "top")
        for name in (*numbers, "answer_tokens"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be at least 1.")
        if self.start not in ("match", "first"):
            raise ValueError(f"`start` is {self.start!r}; allowed: 'match', 'first'.")


@dataclass(frozen=True)
class Talk:
    """A question and its answer as they follow a document.

    Attributes:
        ids: of both. answer: where the answer begins.
        best: `(T - 1, top)` the likeliest next ids of the full context, and log probabilities.
    """

    ids: list[int]
    answer: int
    best: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        state: the document's, small. steps: taken. seconds: of study, and of training.
        losses: of each step. nats: per token of held-out answers, by reader.
    """

    state: MemoryState
    steps: int
    seconds: tuple[float, float]
    losses: list[float]
    nats: dict[str, list[float]]

    def summary(self) -> dict[str, Any]:
        """Give what a file says of it."""
        study, training = self.seconds
        means = {name: statistics.mean(values) for name, values in self.nats.items()}
        return {"steps": self.steps, "study_seconds": study, "training_seconds": training,
                "nats": means, "held_out": self.nats}  # fmt: skip


def train_cartridge(
    model: MemoryModelForCausalLM,
    tokenizer: Any,
    document: str,
    settings: Cartridge,
    note: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train the slots of one document against the model that has all of it before it.

    The model itself makes questions about chunks and answers them with the whole document; slots
    then follow the `top` likeliest tokens of the full context at every place of these talks.

    Args:
        model: with the memory `compact` and `memory_size=None`; its weights stay as they are.
        tokenizer: the model's.
        document: its text.
        settings: of the training.
        note: is told what goes on, line by line.

    Raises:
        ValueError: for another memory, or a document of no more tokens than slots.
    """
    reader = model.memories.get("compact")
    config: Any = getattr(reader, "config", None)
    if config is None or config.memory_size is not None or len(model.memories) > 1:
        raise ValueError(
            "A cartridge needs a model that keeps all of a document until slots are made of it: "
            "memwrap.wrap(base, 'compact', memory_size=None)."
        )
    began = time.perf_counter()
    full = model.close_segment(read_document(model, tokenizer, document))
    tokens = int(full.tokens_seen[0])
    if tokens <= settings.slots + config.num_sinks:
        raise ValueError(
            f"The document has {tokens} tokens, no more than slots ({settings.slots}) and sinks."
        )
    note(f"the document has {tokens} tokens")
    wanted = settings.talks + settings.held_out
    talks = study(model, tokenizer, document, full, settings, wanted)
    studied = time.perf_counter() - began
    note(f"{len(talks)} questions with answers in {studied:.0f} s")
    held, rest = talks[: settings.held_out], talks[settings.held_out :]
    if not rest:
        raise ValueError(
            "The model made too few different questions; give `talks` a larger number."
        )
    matched = model.compact(full, settings.slots)
    start = matched if settings.start == "match" else first_tokens(model, full, settings.slots)
    readers = {"full": full, "compaction": matched, "start": start}
    nats = {name: [nats_of(model, state, talk) for talk in held] for name, state in readers.items()}
    nats["no document"] = [nats_of(model, model.new_state(1), talk) for talk in held]
    note("before: " + _means(nats))
    began = time.perf_counter()
    state, losses = _followed(model, start, rest, settings, note)
    trained = time.perf_counter() - began
    nats["trained"] = [nats_of(model, state, talk) for talk in held]
    note("after: " + _means(nats))
    return Trained(state, len(losses), (studied, trained), losses, nats)


def _means(nats: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {statistics.mean(values):.3f}" for name, values in nats.items())


@torch.no_grad()
def first_tokens(model: MemoryModelForCausalLM, full: MemoryState, slots: int) -> MemoryState:
    """Make slots of a document's first tokens, with their own keys and values."""
    small = model.compact(full, slots)
    memory: Any = model.memories["compact"]
    trees, old = small.memories["compact"]["layers"], full.memories["compact"]["layers"]
    for layer in memory.chosen:
        if memory.sizes.attention[layer].window is None:
            rows = memory.rows_of(layer, old[str(layer)])
            part = slice(memory.config.num_sinks, memory.config.num_sinks + slots)
            tree = trees[str(layer)]
            tree["slot_key"] = rows.key[:, :, part].clone()
            tree["slot_value"] = rows.value[:, :, part].clone()
            tree["slot_place"] = rows.place[:, :, part].clone()
            tree["slot_bias"] = torch.zeros_like(tree["slot_place"])
    return small


# Study


@torch.no_grad()
def study(
    model: MemoryModelForCausalLM, tokenizer: Any, document: str, full: MemoryState,
    settings: Cartridge, count: int,
) -> list[Talk]:  # fmt: skip
    """Let the model ask about chunks and answer with the document; questions that repeat go."""
    draw, turns = random.Random(settings.seed), Turns(tokenizer)
    ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    lines: dict[str, None] = {}
    size = 8
    for _ in range(2 * -(-count // size)):
        prompts = []
        for _ in range(size):
            begin = draw.randrange(max(1, len(ids) - settings.chunk_tokens // 2))
            chunk = tokenizer.decode(ids[begin : begin + settings.chunk_tokens])
            content = under(chunk, draw.choice(SEEDS))
            prompts.append(_prompt(turns, content))
        with torch.random.fork_rng():
            torch.manual_seed(draw.getrandbits(32))
            texts = _written(
                model, turns, prompts, None, settings.question_tokens,
                do_sample=True, temperature=settings.temperature,
            )  # fmt: skip
        for text in texts:
            line = turns.tokenizer.decode(text, skip_special_tokens=True).strip()
            if line:
                lines.setdefault(line.splitlines()[0])
        if len(lines) >= count:
            break
    talks = []
    questions = list(lines)[:count]
    for part in (questions[i : i + size] for i in range(0, len(questions), size)):
        asked = [_behind(turns, full, question) for question in part]
        answers = _written(model, turns, asked, full, settings.answer_tokens, do_sample=False)
        for question, answer in zip(asked, answers, strict=True):
            if answer:
                best = _best(model, full, question + answer, settings.top)
                talks.append(Talk(question + answer, len(question), best))
    return talks


def _prompt(turns: Turns, content: str) -> list[int]:
    if turns.present:
        return turns.ids([{"role": "user", "content": content}])
    return turns.tokenizer(f"{content}\n\n", verbose=False)["input_ids"]


def _behind(turns: Turns, state: MemoryState, question: str) -> list[int]:
    """Compute the ids that put a question behind the document that a state has read."""
    held = Held.of(state, turns)
    if held is None:
        return turns.encode(f"\n\n{question}\n")
    ids = turns.ids(held.messages([{"role": "user", "content": question}]))
    return ids[held.read :]


def _written(
    model: MemoryModelForCausalLM, turns: Turns, prompts: Sequence[list[int]],
    state: MemoryState | None, most: int, **settings: Any,
) -> list[list[int]]:  # fmt: skip
    """Let the model write behind prompts of different lengths, each behind a row of `state`."""
    width, pad = max(map(len, prompts)), turns.tokenizer.eos_token_id or 0
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    cache = model.new_state(len(prompts)) if state is None else state.repeat(len(prompts))
    out: Any = model.generate(
        ids, attention_mask=mask.to(model.device), cache=cache, remember=False,
        max_new_tokens=most, pad_token_id=pad, **turns.stops_for(model), **settings,
    )  # fmt: skip
    stops = {pad, *(turns.stops() if turns.present else [])}
    texts = []
    for row in out[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        texts.append(row[:end])
    return texts


@torch.no_grad()
def _best(
    model: MemoryModelForCausalLM, full: MemoryState, ids: list[int], top: int
) -> tuple[Tensor, Tensor]:
    out = model(torch.tensor([ids], device=model.device), cache=full.clone(), remember=False)
    best = out.logits[0, :-1].float().log_softmax(-1).topk(top, -1)
    return best.indices, best.values


@torch.no_grad()
def nats_of(model: MemoryModelForCausalLM, state: MemoryState, talk: Talk) -> float:
    """Compute the loss of a talk's answer behind a state, per token."""
    ids = torch.tensor([talk.ids], device=model.device)
    labels = ids.clone()
    labels[:, : talk.answer] = -100
    given = {"cache": state.clone(), "remember": False, "output_router_logits": False}
    return float(model(ids, labels=labels, **given).loss)


# Training


def _followed(
    model: MemoryModelForCausalLM, start: MemoryState, talks: list[Talk], settings: Cartridge,
    note: Callable[[str], None],
) -> tuple[MemoryState, list[float]]:  # fmt: skip
    """Train the slots of a state; its sinks and the model stay as they are."""
    trees = start.memories["compact"]["layers"]
    trained = {
        (layer, name): tree[name].detach().float().clone().requires_grad_()
        for layer, tree in trees.items()
        for name in TRAINED
        if tree["slot_count"].any() and (name != "slot_bias" or _with_bias(model))
    }
    optimizer = torch.optim.Adam(trained.values(), lr=settings.learning_rate)
    needed = [(p, p.requires_grad) for p in model.parameters()]
    draw, losses, order = random.Random(settings.seed), list[float](), list[int]()
    began, seconds = time.perf_counter(), 60 * settings.minutes
    for parameter, _ in needed:
        parameter.requires_grad_(False)
    try:
        while (gone := time.perf_counter() - began) < seconds:
            if settings.steps is not None and len(losses) >= settings.steps:
                break
            if len(order) < settings.batch:
                order += draw.sample(range(len(talks)), len(talks))
            batch = [talks[order.pop(0)] for _ in range(min(settings.batch, len(order)))]
            # Of the steps where they are given: a clock's rates would differ from run to run.
            part = gone / seconds if settings.steps is None else len(losses) / settings.steps
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * (1 - part)
            loss = _divergence(model, _with(start, trained, len(batch)), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if len(losses) % 20 == 0:
                note(f"step {len(losses)}: {statistics.mean(losses[-20:]):.4f}")
    finally:
        for parameter, was in needed:
            parameter.requires_grad_(was)
    with torch.no_grad():
        return _with(start, trained, 1).detach(), losses


def _with_bias(model: MemoryModelForCausalLM) -> bool:
    config: Any = model.memories["compact"].config
    return config.bias_bound > 0


def _with(start: MemoryState, trained: dict[tuple[str, str], Tensor], rows: int) -> MemoryState:
    """Put trained slots into `rows` rows of a state."""
    state = start.clone() if rows == 1 else start.repeat(rows)
    layers = {layer: dict(tree) for layer, tree in state.memories["compact"]["layers"].items()}
    for (layer, name), tensor in trained.items():
        old = layers[layer][name]
        layers[layer][name] = tensor.to(old.dtype).expand(rows, *tensor.shape[1:])
    state.memories = {"compact": {**state.memories["compact"], "layers": layers}}
    return state


def _divergence(model: MemoryModelForCausalLM, state: MemoryState, batch: list[Talk]) -> Tensor:
    """Compute the cross entropy with the full context's likeliest tokens, the mean over places."""
    width = max(len(talk.ids) for talk in batch)
    ids = torch.tensor([t.ids + [0] * (width - len(t.ids)) for t in batch], device=model.device)
    mask = torch.tensor([[1] * len(t.ids) + [0] * (width - len(t.ids)) for t in batch])
    out = model(ids, attention_mask=mask.to(model.device), cache=state, remember=False)
    logs = out.logits.float().log_softmax(-1)
    terms = []
    for row, talk in enumerate(batch):
        index, teacher = talk.best
        log_probs = logs[row, : len(index)].gather(-1, index)
        terms.append(-(teacher.exp() * log_probs).sum(-1))
    return torch.cat(terms).mean()


__all__ = ["Cartridge", "Talk", "Trained", "train_cartridge"]
