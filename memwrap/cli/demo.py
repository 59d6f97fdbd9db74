"""`memwrap demo`: a real model reads a document longer than its context, and is asked about it.

Everything printed was measured in this run; what does not favour the memory is printed just the
same. How long the texts are is chosen by the machine's speed, so that the run ends in time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets.fetching import fetch
from memwrap.chat import read_document
from memwrap.cli import demo_texts as texts
from memwrap.cli.demo_readers import BaseReader, MemoryReader, Reader, nats
from memwrap.cli.demo_report import (
    CURVES,
    RESULTS,
    TRUNCATED,
    WHOLE,
    conclusions,
    draw_facts,
    draw_nats,
    seconds_of,
)
from memwrap.cli.demo_trained import ADAPTER, said_of, trained, trained_anew
from memwrap.io.atomic_files import write_text

MODEL = "smollm2"
MEMORY = "infllm"
READING: dict[str, Any] = {
    "segment_size": 512, "window_size": 512, "block_size": 16, "num_sinks": 64, "top_k": 2,
    "retrieval_interval": 256,
}  # fmt: skip
ASKING: dict[str, Any] = {"top_k": 128, "retrieval_interval": 8}
"""What a question looks up; nothing in a state depends on it."""
LOOKS = 512 + 128 * 16
"""Tokens that a question sees through the memory, and that the window with sinks keeps."""
CONTEXT = 8_192 - 128
"""Tokens of a document that the base's trained context holds beside a question."""
BASES = {TRUNCATED: 1_024, WHOLE: -CONTEXT}
"""Tokens at the end of a document that the base alone is given, or, negative, at its beginning."""
LENGTHS = (2_000, 8_000, 16_000)
SHOWN = (0, 3, 6)
"""Facts of the longest text that are asked for in words."""
SEGMENT, ROWS = 256, 512
"""Of the memories whose nats are measured: tokens at once, and entries that each may keep."""
MEASURED = (2_048, 1_024)
"""Tokens that nats are measured on, the first that time allows."""
WINDOW_SEGMENT = 1_024
"""Tokens that the window reads at once; its results do not depend on it, only its time."""
COST = 2.0
"""What the memory's reading costs beside the base's own, which is measured first."""
TRAINING, AROUND = 0.75, 25.0
"""Minutes of training from scratch, and seconds of what is done before and after it."""


@dataclass
class Run:
    """A run of the demo: its clock, and what was measured.

    Attributes:
        folder: for files.
        minutes: how long it may take.
        base, tokenizer: the model.
        speed: tokens that the base reads in a second here.
        begun, processor: when it began, and the processor's seconds until then.
        results: everything measured; `seconds` of each part, too.
    """

    folder: Path
    minutes: float
    base: Any
    tokenizer: Any
    speed: float
    begun: float = field(default_factory=time.monotonic)
    processor: float = field(default_factory=time.process_time)
    results: dict[str, Any] = field(default_factory=dict)

    def fits(self, tokens: float, share: float = 1.0) -> bool:
        """Tell whether reading so many tokens at the base's speed fits a share of what is left."""
        return tokens / self.speed <= self.left * share

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.minutes * 60 - (time.monotonic() - self.begun)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Print and note the seconds that a part of the run takes."""
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        self.results["parts"][name] = round(seconds, 1)
        say(f"({name}: {seconds:.0f} s)")
        self.write()

    def write(self) -> None:
        """Write what was measured so far."""
        self.results["seconds"] = round(time.monotonic() - self.begun, 1)
        self.results["processor_seconds"] = round(time.process_time() - self.processor, 1)
        write_text(self.folder / RESULTS, json.dumps(self.results, indent=2) + "\n")


def say(text: str = "") -> None:
    """Print a line at once."""
    print(text, flush=True)


def main(output: Path, minutes: float = 6.0) -> dict[str, Any]:
    """Run the demo.

    Args:
        output: folder for the state, pictures and results.
        minutes: how long it may take.

    Returns:
        What was measured, as in `results.json`.
    """
    torch.manual_seed(0)
    begun = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    place = fetch(MODEL)
    base: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    run = Run(output, minutes, base, tokenizer, _speed(base, tokenizer), begun)
    settings = {
        "memory": MEMORY, "reading": READING, "asking": ASKING, "looks": LOOKS, "context": CONTEXT,
        "truncated": BASES[TRUNCATED], "entries": ROWS,
    }  # fmt: skip
    run.results |= {"settings": settings, "facts": [], "skipped": [], "parts": {}}
    run.results["threads"] = torch.get_num_threads()
    say(f"{MODEL}: SmolLM2-135M-Instruct; it reads {run.speed:.0f} tokens a second here.")
    count = max(2, sum(run.fits(n * COST, 0.45) for n in LENGTHS))
    parts = texts.parts(tokenizer, LENGTHS[:count])
    run.results["skipped"] += [[curve, n] for n in LENGTHS[count:] for curve in CURVES]
    with run.part("reading and asking"):
        whole = _read(run, parts)
    with run.part("facts and controls"):
        _ask_whole(run, parts, whole)
        del whole  # hundreds of MB
        _find(run, parts)
    with run.part("nats"):
        _measure(run)
    _show_trained(run)
    _conclude(run)
    return run.results


def _speed(base: Any, tokenizer: Any) -> float:
    ids = torch.tensor([tokenizer(texts.prose()[:8000], verbose=False)["input_ids"][:512]])
    with torch.no_grad():
        base(ids[:, :64], logits_to_keep=1)
        start = time.monotonic()
        base(ids, logits_to_keep=1)
    return ids.shape[1] / (time.monotonic() - start)


def _read(run: Run, parts: texts.Parts) -> BaseReader:
    """Read the document once, ask on the way, save and load what it left, ask in words.

    Returns:
        The base that has read as much of the beginning as its context holds.
    """
    length, whole = parts.lengths[-1], "\n\n".join(parts.texts)
    say(f"\n=== 1. Read {length:,} tokens once (the model was trained on 8,192), ask later\n")
    model = memwrap.wrap(run.base, MEMORY, **READING).eval()
    state, seconds = _in_parts(run, parts, "memory", model)
    path = run.folder / "document.safetensors"
    state.save(path)
    size, count = path.stat().st_size, int(state.tokens_seen[0])
    say(f"{MEMORY}, no training: {count:,} tokens in {seconds:.0f} s; {path} "
        f"({size / 1e6:,.0f} MB), saved and loaded")  # fmt: skip
    state = memwrap.MemoryState.load(path, model)
    model.memory_settings(MEMORY, **ASKING)
    shown = [(parts.facts[-1][n], texts.depths(len(parts.facts[-1]))[n]) for n in SHOWN]
    answers = {"memory": _words(MemoryReader(model, run.tokenizer, state), shown)}
    memwrap.unwrap(model)
    del state, model  # hundreds of MB
    for curve, most in BASES.items():
        reader = BaseReader(run.base, run.tokenizer, whole, most)
        end = "first" if most < 0 else "last"
        answers[f"{curve} ({end} {reader.length:,} tokens)"] = _words(reader, shown)
        _count(run, reader, curve, length, parts.facts[-1])
    rows = []
    for index, (fact, depth) in enumerate(shown):
        say(f"\n{fact.question} (told at {depth:.0%}: {fact.answer})")
        given = {name: all_of[index] for name, all_of in answers.items()}
        for name, text in given.items():
            say(f"  {name:<40}{text}")
        rows.append({"question": fact.question, "answer": fact.answer, "answers": given})
    run.results["document"] = {
        "tokens": count, "seconds": round(seconds, 1), "bytes": size, "questions": rows,
    }  # fmt: skip
    return reader


def _words(reader: Reader, shown: list[tuple[texts.Fact, float]]) -> list[str]:
    return [" ".join(reader.ask(texts.question(fact)).split()) for fact, _ in shown]


def _in_parts(
    run: Run, parts: texts.Parts, curve: str, model: Any
) -> tuple[memwrap.MemoryState, float]:
    """Read the document once, and at each of the lengths ask for that length's facts.

    Returns:
        What the whole document left, and the seconds of reading.
    """
    state, seconds = None, 0.0
    for text, length, facts in zip(parts.texts, parts.lengths, parts.facts, strict=True):
        start = time.monotonic()
        state = read_document(model, run.tokenizer, text, state, progress=curve == "memory")
        seconds += time.monotonic() - start
        if curve == "memory":
            before = model.memory_settings(MEMORY, **ASKING)
            _count(run, MemoryReader(model, run.tokenizer, state), curve, length, facts)
            model.memory_settings(MEMORY, **before)
        elif length > LOOKS:  # a shorter text it holds as a whole, as the base does
            _count(run, MemoryReader(model, run.tokenizer, state), curve, length, facts)
    return state, seconds  # type: ignore[return-value]


def _ask_whole(run: Run, parts: texts.Parts, whole: BaseReader) -> None:
    """Ask the base that has read the longest document's beginning at the shorter lengths."""
    say(f"\n=== 2. {len(parts.facts[0])} facts at each of several lengths: which are found\n")
    for index in reversed(range(len(parts.lengths) - 1)):
        whole.shorten("\n\n".join(parts.texts[: index + 1]))
        _count(run, whole, WHOLE, parts.lengths[index], parts.facts[index])


def _find(run: Run, parts: texts.Parts) -> None:
    """Ask the other controls for the same facts, and show which were found by whom."""
    for index, length in enumerate(parts.lengths[:-1]):  # the last is counted already
        text = "\n\n".join(parts.texts[: index + 1])
        reader = BaseReader(run.base, run.tokenizer, text, BASES[TRUNCATED])
        _count(run, reader, TRUNCATED, length, parts.facts[index])
    if parts.lengths[-1] > LOOKS:
        config = memwrap.WindowConfig(
            segment_size=WINDOW_SEGMENT, window_size=LOOKS - 4, num_sinks=4
        )
        model = memwrap.wrap(run.base, config).eval()
        _in_parts(run, parts, "window + sinks", model)
        memwrap.unwrap(model)
    cells = draw_facts(run.results, run.folder / "facts.png")
    for cell in cells:
        marks = " ".join("x" if hit else "." for hit in cell["depth"])
        say(f"  {cell['curve']:<18}{cell['length']:>6,} tokens  {sum(cell['depth']):.0f} of "
            f"{len(cell['depth'])}   by depth: {marks}")  # fmt: skip
    if run.results["skipped"]:
        names = "; ".join(f"{curve} at {length:,}" for curve, length in run.results["skipped"])
        say(f"  (left out, as the time is short here: {names})")


def _count(
    run: Run, reader: Reader, curve: str, length: int, facts: tuple[texts.Fact, ...]
) -> None:
    """Ask a reader for facts and note which it knows."""
    hits = [float(reader.knows(fact)) for fact in facts]
    run.results["facts"].append({"curve": curve, "length": length, "depth": hits})
    run.write()


def _measure(run: Run) -> None:
    """Compare nats per token of memories whose states have the same size."""
    slots = ROWS // 4
    configs: dict[str, memwrap.MemoryConfig] = {
        "window + sinks": memwrap.WindowConfig(
            segment_size=SEGMENT, window_size=ROWS - 4, num_sinks=4
        ),
        "compact": memwrap.CompactConfig(
            segment_size=SEGMENT, memory_size=ROWS - slots - 4, slots=slots, num_sinks=4
        ),
        "extended_mind": memwrap.ExtendedMindConfig(segment_size=SEGMENT, cache_size=ROWS),
    }
    fitting = (n for n in MEASURED if run.fits(n * 2.2 * len(configs), 0.9))
    length = next(fitting, MEASURED[-1])
    say(f"\n=== 3. Nats per token of {length:,} tokens, with {ROWS} entries a layer each\n")
    ids = run.tokenizer(texts.prose(), add_special_tokens=False, verbose=False)["input_ids"]
    step = length // 4
    costs: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        model = memwrap.wrap(run.base, config).eval()
        values, sizes = nats(model, ids[:length], SEGMENT)
        memwrap.unwrap(model)
        means = [sum(values[a : a + step]) / len(values[a : a + step])
                 for a in range(0, length - 1, step)]  # fmt: skip
        costs[name] = {"nats": means, "mean": sum(values) / len(values), "bytes": max(sizes)}
        say(f"  {name:<20}{max(sizes) / 1e6:>5.0f} MB   "
            f"{'  '.join(f'{m:.3f}' for m in means)}   mean {costs[name]['mean']:.3f}")  # fmt: skip
    run.results["nats"] = {"tokens": length, "step": step, "memories": costs}
    draw_nats(run.results, run.folder / "nats.png")


def _show_trained(run: Run) -> None:
    """Measure the shipped trained memory, where there is one, and begin its training anew."""
    with run.part("trained memory"):
        result = trained(run.base, run.tokenizer)
        if result is None:
            return
        run.results["trained"] = result
        say(f"\n=== 4. {ADAPTER}, a trained memory: share of facts known, by tokens of text "
            f"({result['samples']} texts each)\n")  # fmt: skip
        for curve, shares in result["curves"].items():
            parts = "   ".join(f"{int(n):>5,}: {share:.2f}" for n, share in shares.items())
            say(f"  {curve:<22}{parts}")
    minutes = min(TRAINING, (run.left - AROUND) / 60)
    if minutes < TRAINING / 3:
        say("\nThe time is short here: no training from scratch.")
        return
    with run.part("training"):
        folder = run.folder / "training"
        run.results["training"] = trained_anew(run.base, run.tokenizer, folder, minutes)
        say("\n" + said_of(run.results["training"]))


def _conclude(run: Run) -> None:
    say("\n=== What this run shows\n")
    for sentence in conclusions(run.results):
        say(sentence)
    say(f"\n{seconds_of(run.results)} Pictures and numbers are in {run.folder}.")


__all__ = ["Run", "main"]
