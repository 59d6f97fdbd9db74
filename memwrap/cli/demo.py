"""`memwrap demo`: a real model reads a document longer than its context, and is asked about it.

Everything printed was measured in this run; what does not favour the memory is printed just the
same. How long the texts are is chosen by the machine's speed, so that the run ends in time.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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
from memwrap.cli.demo_trained import ADAPTER, said_of, shipped, trained, trained_anew
from memwrap.cli.side_by_side import SideBySide
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
LONGER, PATIENT = (32_000, 64_000), 30.0
"""Lengths for who gives at least so many minutes."""
SHOWN = (0, 3, 6)
"""Facts of the longest text that are asked for in words."""
SEGMENT, ROWS = 256, 512
"""Of the memories whose nats are measured: tokens at once, and entries that each may keep."""
MEASURED = (2_048, 1_024)
"""Tokens that nats are measured on, the first that time allows."""
WINDOW_SEGMENT = 1_024
"""Tokens that the window reads at once; its results do not depend on it, only its time."""
COST, NATS_COST = 8.0, 4.0
"""What a token of the longest text, and one that nats are measured on, costs in all parts together
beside the base's reading it, which is measured first."""
TRAINING, BEHIND = 2.0, 150.0
"""Minutes of training from scratch, and seconds of what its worker does behind its steps."""


@dataclass
class Run:
    """A run of the demo: its clock, and what was measured.

    Attributes:
        folder: for files.
        minutes: how long it may take.
        tokenizer: of the model.
        speed: tokens that the base reads in a second here, all workers together.
        begun, processor: when it began, and the processor's seconds until then.
        results: everything measured; `parts`, the seconds of each part, too.
        writing: held while results are changed, as two parts may be at work.
    """

    folder: Path
    minutes: float
    tokenizer: Any
    speed: float
    begun: float = field(default_factory=time.monotonic)
    processor: float = field(default_factory=time.process_time)
    results: dict[str, Any] = field(default_factory=dict)
    writing: Any = field(default_factory=threading.Lock)

    def fits(self, tokens: float, share: float = 1.0) -> bool:
        """Tell whether reading so many tokens at the base's speed fits a share of what is left."""
        return tokens / self.speed <= self.left * share

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.minutes * 60 - (time.monotonic() - self.begun)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Note the seconds that a part of the run takes."""
        start = time.monotonic()
        yield
        with self.writing:
            self.results["parts"][name] = round(time.monotonic() - start, 1)
        self.write()

    def write(self) -> None:
        """Write what was measured so far."""
        with self.writing:
            self.results["seconds"] = round(time.monotonic() - self.begun, 1)
            self.results["processor_seconds"] = round(time.process_time() - self.processor, 1)
            write_text(self.folder / RESULTS, json.dumps(self.results, indent=2) + "\n")


def say(text: str = "") -> None:
    """Print a line at once."""
    print(text, flush=True)


def main(output: Path, minutes: float = 5.8) -> dict[str, Any]:
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
    tokenizer = AutoTokenizer.from_pretrained(place)
    workers = SideBySide(
        lambda: AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    )
    speeds = [workers.begin(partial(_speed, tokenizer)) for _ in range(workers.count)]
    run = Run(output, minutes, tokenizer, sum(speed.result() for speed in speeds), begun)
    settings = {
        "memory": MEMORY, "reading": READING, "asking": ASKING, "looks": LOOKS, "context": CONTEXT,
        "truncated": BASES[TRUNCATED], "entries": ROWS,
    }  # fmt: skip
    run.results |= {"settings": settings, "facts": [], "skipped": [], "parts": {}}
    run.results["threads"] = torch.get_num_threads()
    say(f"{MODEL}: SmolLM2-135M-Instruct; it reads {run.speed:.0f} tokens a second here.")
    try:
        _measure(run, workers)
    finally:
        workers.end()
    _conclude(run)
    return run.results


def _measure(run: Run, workers: SideBySide) -> None:
    """Do all parts: as many at a time as there are workers, told in order."""
    count = max(2, sum(run.fits(n * COST, 0.8) for n in LENGTHS))
    lengths = LENGTHS[:count]
    if run.minutes >= PATIENT:
        lengths += tuple(n for n in LONGER if run.fits(n * COST, 0.8))
    parts = texts.parts(run.tokenizer, lengths)
    run.results["skipped"] += [[curve, n] for n in LENGTHS[count:] for curve in CURVES]
    fitting = (n for n in MEASURED if run.fits(lengths[-1] * COST + n * NATS_COST, 0.8))
    tokens = next(fitting, MEASURED[-1])
    memory = workers.begin(partial(_read, run, parts))
    bases = workers.begin(partial(_ask_bases, run, parts))
    train = partial(_train, run)
    training = workers.begin(train) if workers.count > 1 else None  # else it comes last
    window = workers.begin(partial(_ask_window, run, parts))
    adapter = workers.begin(partial(_measure_trained, run))
    curves = workers.begin(partial(_measure_nats, run, tokens))
    training = training or workers.begin(train)
    length = parts.lengths[-1]
    say(f"\n=== 1. Read {length:,} tokens once (the model was trained on 8,192), ask later\n")
    _tell_answers(run, parts, memory.result() | bases.result())
    window.result()
    _tell_found(run, parts)
    curves.result()
    _tell_nats(run)
    adapter.result()
    _tell_trained(run)
    training.result()
    _tell_training(run)


def _speed(tokenizer: Any, base: Any) -> float:
    """Measure tokens a second: the best of three, as a process that was just begun is slow."""
    ids = torch.tensor([tokenizer(texts.prose()[:8000], verbose=False)["input_ids"][:512]])
    seconds = []
    with torch.no_grad():
        for _ in range(3):
            start = time.monotonic()
            base(ids, logits_to_keep=1)
            seconds.append(time.monotonic() - start)
    return ids.shape[1] / min(seconds)


def _read(run: Run, parts: texts.Parts, base: Any) -> dict[str, list[str]]:
    """Read the document once, ask on the way, save and load what it left, ask in words."""
    with run.part("memory"):
        model = memwrap.wrap(base, MEMORY, **READING).eval()
        state, seconds = _in_parts(run, parts, "memory", model)
        path = run.folder / "document.safetensors"
        state.save(path)
        size, count = path.stat().st_size, int(state.tokens_seen[0])
        say(f"{MEMORY}, no training: {count:,} tokens in {seconds:.0f} s; {path} "
            f"({size / 1e6:,.0f} MB), saved and loaded")  # fmt: skip
        run.results["document"] = {"tokens": count, "seconds": round(seconds, 1), "bytes": size}
        state = memwrap.MemoryState.load(path, model)
        model.memory_settings(MEMORY, **ASKING)
        answers = _words(MemoryReader(model, run.tokenizer, state), parts)
        memwrap.unwrap(model)
    return {"memory": answers}


def _ask_bases(run: Run, parts: texts.Parts, base: Any) -> dict[str, list[str]]:
    """Ask the base with what is at the end of each length, and with all that its context holds."""
    answers: dict[str, list[str]] = {}
    wholes = ["\n\n".join(parts.texts[: n + 1]) for n in range(len(parts.texts))]
    with run.part("base"):
        for curve, most in BASES.items():
            reader = BaseReader(base, run.tokenizer, wholes[-1], most)
            end = "first" if most < 0 else "last"
            answers[f"{curve} ({end} {reader.length:,} tokens)"] = _words(reader, parts)
            for index in reversed(range(len(wholes))):
                longest = index == len(wholes) - 1
                if curve == WHOLE and not longest:  # begins alike, and is read already
                    reader.shorten(wholes[index])
                elif not longest:
                    reader = BaseReader(base, run.tokenizer, wholes[index], most)
                _count(run, reader, curve, parts.lengths[index], parts.facts[index])
    return answers


def _ask_window(run: Run, parts: texts.Parts, base: Any) -> None:
    """Ask a window with sinks, which sees as much as a question does through the memory."""
    if parts.lengths[-1] <= LOOKS:
        return
    config = memwrap.WindowConfig(segment_size=WINDOW_SEGMENT, window_size=LOOKS - 4, num_sinks=4)
    with run.part("window"):
        model = memwrap.wrap(base, config).eval()
        _in_parts(run, parts, "window + sinks", model)
        memwrap.unwrap(model)


def _shown(parts: texts.Parts) -> list[tuple[texts.Fact, float]]:
    facts = parts.facts[-1]
    return [(facts[n], texts.depths(len(facts))[n]) for n in SHOWN]


def _words(reader: Reader, parts: texts.Parts) -> list[str]:
    return [" ".join(reader.ask(texts.question(fact)).split()) for fact, _ in _shown(parts)]


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


def _count(
    run: Run, reader: Reader, curve: str, length: int, facts: tuple[texts.Fact, ...]
) -> None:
    """Ask a reader for facts and note which it knows."""
    hits = [float(reader.knows(fact)) for fact in facts]
    with run.writing:
        run.results["facts"].append({"curve": curve, "length": length, "depth": hits})
    run.write()


def _tell_answers(run: Run, parts: texts.Parts, answers: dict[str, list[str]]) -> None:
    rows = []
    for index, (fact, depth) in enumerate(_shown(parts)):
        say(f"\n{fact.question} (told at {depth:.0%}: {fact.answer})")
        given = {name: all_of[index] for name, all_of in answers.items()}
        for name, text in given.items():
            say(f"  {name:<40}{text}")
        rows.append({"question": fact.question, "answer": fact.answer, "answers": given})
    run.results["document"]["questions"] = rows


def _tell_found(run: Run, parts: texts.Parts) -> None:
    say(f"\n=== 2. {len(parts.facts[0])} facts at each of several lengths: which are found\n")
    cells = draw_facts(run.results, run.folder / "facts.png")
    for cell in cells:
        marks = " ".join("x" if hit else "." for hit in cell["depth"])
        say(f"  {cell['curve']:<18}{cell['length']:>6,} tokens  {sum(cell['depth']):.0f} of "
            f"{len(cell['depth'])}   by depth: {marks}")  # fmt: skip
    if run.results["skipped"]:
        names = "; ".join(f"{curve} at {length:,}" for curve, length in run.results["skipped"])
        say(f"  (left out, as the time is short here: {names})")


def _measure_nats(run: Run, length: int, base: Any) -> None:
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
    ids = run.tokenizer(texts.prose(), add_special_tokens=False, verbose=False)["input_ids"]
    step = length // 4
    costs: dict[str, dict[str, Any]] = {}
    with run.part("nats"):
        for name, config in configs.items():
            model = memwrap.wrap(base, config).eval()
            values, sizes = nats(model, ids[:length], SEGMENT)
            memwrap.unwrap(model)
            means = [sum(values[a : a + step]) / len(values[a : a + step])
                     for a in range(0, length - 1, step)]  # fmt: skip
            costs[name] = {"nats": means, "mean": sum(values) / len(values), "bytes": max(sizes)}
    run.results["nats"] = {"tokens": length, "step": step, "memories": costs}


def _tell_nats(run: Run) -> None:
    about = run.results["nats"]
    count = about["tokens"]
    say(f"\n=== 3. Nats per token of {count:,} tokens, with {ROWS} entries a layer each\n")
    for name, cost in about["memories"].items():
        means = "  ".join(f"{mean:.3f}" for mean in cost["nats"])
        say(f"  {name:<20}{cost['bytes'] / 1e6:>5.0f} MB   {means}   mean {cost['mean']:.3f}")
    draw_nats(run.results, run.folder / "nats.png")


def _measure_trained(run: Run, base: Any) -> None:
    """Measure the shipped trained memory, where there is one."""
    with run.part("trained memory"):
        result = trained(base, run.tokenizer)
    if result is not None:
        run.results["trained"] = result


def _tell_trained(run: Run) -> None:
    if (result := run.results.get("trained")) is None:
        return
    say(f"\n=== 4. {ADAPTER}, a trained memory: share of facts known, by tokens of text "
        f"({result['samples']} texts each)\n")  # fmt: skip
    for curve, shares in result["curves"].items():
        row = "   ".join(f"{int(n):>5,}: {share:.2f}" for n, share in shares.items())
        say(f"  {curve:<22}{row}")


def _train(run: Run, base: Any) -> None:
    """Begin the shipped memory's training anew, for as long as there is time."""
    minutes = min(TRAINING, (run.left - BEHIND) / 60)
    if shipped() is None or minutes < TRAINING / 8:
        return
    with run.part("training"):
        folder = run.folder / "training"
        run.results["training"] = trained_anew(base, run.tokenizer, folder, minutes)


def _tell_training(run: Run) -> None:
    if "training" in run.results:
        say("\n" + said_of(run.results["training"]))
    elif "trained" in run.results:
        say("\nThe time is short here: no training from scratch.")


def _conclude(run: Run) -> None:
    run.write()
    say("\n=== What this run shows\n")
    for sentence in conclusions(run.results):
        say(sentence)
    say(f"\n{seconds_of(run.results)} Pictures and numbers are in {run.folder}.")


__all__ = ["Run", "main"]
