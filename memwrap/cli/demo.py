"""`memwrap demo`: a real model reads a document longer than its context, and is asked about it.

Everything printed was measured in this run; what does not favour the memory is printed just the
same. How long the texts are is chosen by the machine's speed, so that the run ends in time.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets.fetching import fetch
from memwrap.chat import read_document
from memwrap.cli import demo_texts as texts
from memwrap.cli.demo_readers import BaseReader, MemoryReader, Reader, nats
from memwrap.cli.demo_trained import ADAPTER, said_of, trained, trained_anew
from memwrap.evaluation.plots import plot_depths
from memwrap.io.atomic_files import write_text
from memwrap.io.plotting import COLOURS, MARKERS, _figure, _save

MODEL = "smollm2"
MEMORY = "infllm"
READING: dict[str, Any] = {
    "segment_size": 512, "window_size": 512, "block_size": 16, "num_sinks": 64, "top_k": 2,
    "retrieval_interval": 256,
}  # fmt: skip
ASKING: dict[str, Any] = {"top_k": 256, "retrieval_interval": 1}
"""What a question looks up; nothing in a state depends on it."""
LOOKS = 512 + 256 * 16
"""Tokens that a question sees through the memory, and that the window with sinks keeps."""
CONTEXT = 8_192 - 128
"""Tokens of a document that the base's trained context holds beside a question."""
BASES = {"base, truncated": 1_024, "base, whole": CONTEXT}
"""Tokens at the end of a document that the base alone is given."""
LENGTHS = (2_000, 8_000, 16_000)
SHOWN = (0, 3, 6)
"""Facts of the longest text that are asked for in words."""
SEGMENT, ROWS = 256, 512
"""Of the memories whose nats are measured: tokens at once, and entries that each may keep."""
MEASURED = (2_048, 1_024)
"""Tokens that nats are measured on, the first that time allows."""
RESULTS = "results.json"
MARKS = ("<!-- demo:begin -->", "<!-- demo:end -->")
CURVES = ("memory", "base, truncated", "base, whole", "window + sinks")
WINDOW_SEGMENT = 2_048
"""Tokens that the window reads at once; its results do not depend on it, only its time."""
COST = 2.0
"""What the memory's reading costs beside the base's own, which is measured first."""


@dataclass
class Run:
    """A run of the demo: its clock, and what was measured.

    Attributes:
        folder: for files.
        minutes: how long it may take.
        base, tokenizer: the model.
        speed: tokens that the base reads in a second here.
        begun, processor: when it began, and the processor's seconds until then.
        results: everything measured.
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
        left = self.minutes * 60 - (time.monotonic() - self.begun)
        return tokens / self.speed <= left * share

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
    output.mkdir(parents=True, exist_ok=True)
    place = fetch(MODEL)
    base: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    run = Run(output, minutes, base, tokenizer, _speed(base, tokenizer))
    settings = {"memory": MEMORY, "reading": READING, "asking": ASKING}
    run.results |= {"settings": settings, "facts": [], "skipped": []}
    say(f"{MODEL}: SmolLM2-135M-Instruct; it reads {run.speed:.0f} tokens a second here.")
    count = max(2, sum(run.fits(n * COST, 0.45) for n in LENGTHS))
    parts = texts.parts(tokenizer, LENGTHS[:count])
    run.results["skipped"] += [[curve, n] for n in LENGTHS[count:] for curve in CURVES]
    for part in (_read, _find):
        part(run, parts)
        run.write()
    _measure(run)
    _show_trained(run)
    run.write()
    _conclude(run)
    return run.results


def _speed(base: Any, tokenizer: Any) -> float:
    ids = torch.tensor([tokenizer(texts.prose()[:8000], verbose=False)["input_ids"][:512]])
    with torch.no_grad():
        base(ids[:, :64], logits_to_keep=1)
        start = time.monotonic()
        base(ids, logits_to_keep=1)
    return ids.shape[1] / (time.monotonic() - start)


def _read(run: Run, parts: texts.Parts) -> None:
    """Read the document once, ask on the way, save and load what it left, ask in words."""
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
        answers[f"{curve} (last {reader.length:,} tokens)"] = _words(reader, shown)
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


def _find(run: Run, parts: texts.Parts) -> None:
    """Ask the controls for the same facts, and show which were found by whom."""
    say(f"\n=== 2. {len(parts.facts[0])} facts at each of several lengths: which are found\n")
    for index, (length, facts) in enumerate(zip(parts.lengths, parts.facts, strict=True)):
        if length == parts.lengths[-1]:
            continue  # counted already
        text = "\n\n".join(parts.texts[: index + 1])
        for curve, most in BASES.items():
            _count(run, BaseReader(run.base, run.tokenizer, text, most), curve, length, facts)
    if parts.lengths[-1] > LOOKS:
        config = memwrap.WindowConfig(
            segment_size=WINDOW_SEGMENT, window_size=LOOKS - 4, num_sinks=4
        )
        model = memwrap.wrap(run.base, config).eval()
        _in_parts(run, parts, "window + sinks", model)
        memwrap.unwrap(model)
    cells = _draw_facts(run.results, run.folder / "facts.png")
    for cell in cells:
        marks = " ".join("x" if hit else "." for hit in cell["depth"])
        say(f"  {cell['curve']:<18}{cell['length']:>6,} tokens  {sum(cell['depth']):.0f} of "
            f"{len(cell['depth'])}   by depth: {marks}")  # fmt: skip
    if run.results["skipped"]:
        names = "; ".join(f"{curve} at {length:,}" for curve, length in run.results["skipped"])
        say(f"  (left out, as the time is short here: {names})")


def _draw_facts(results: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Draw which facts were found; returns the cells in the picture's order."""
    cells = sorted(results["facts"], key=lambda c: (CURVES.index(c["curve"]), c["length"]))
    plot_depths([SimpleNamespace(**cell) for cell in cells], path)
    return cells


def _count(
    run: Run, reader: Reader, curve: str, length: int, facts: tuple[texts.Fact, ...]
) -> None:
    """Ask a reader for facts and note which it knows."""
    hits = [float(reader.knows(fact)) for fact in facts]
    run.results["facts"].append({"curve": curve, "length": length, "depth": hits})
    run.write()


def _key(cell: dict[str, Any]) -> tuple[str, int]:
    return cell["curve"], cell["length"]


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
        "compressive (mean)": memwrap.CompressiveConfig(
            segment_size=SEGMENT, memory_size=ROWS // 2, compressed_size=ROWS // 2
        ),
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
    _draw_nats(run.results, run.folder / "nats.png")


def _draw_nats(results: dict[str, Any], path: Path) -> None:
    step, costs = results["nats"]["step"], results["nats"]["memories"]
    figure, (panel,) = _figure(1)
    for index, (name, of) in enumerate(costs.items()):
        places = [step * (i + 0.5) for i in range(len(of["nats"]))]
        panel.plot(places, of["nats"], label=f"{name}, {of['bytes'] / 1e6:.0f} MB",
                   color=COLOURS[index], marker=MARKERS[index], markersize=4)  # fmt: skip
    panel.set_xlabel("token")
    panel.set_ylabel("nats per token")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    _save(figure, path)


def _show_trained(run: Run) -> None:
    """Measure the shipped trained memory, where there is one, and begin its training anew."""
    result = trained(run.base, run.tokenizer)
    if result is None:
        return
    run.results["trained"] = result
    say(f"\n=== 4. {ADAPTER}, a trained memory: share of facts known, by tokens of text\n")
    for curve, shares in result["curves"].items():
        parts = "   ".join(f"{int(n):>5,}: {share:.2f}" for n, share in shares.items())
        say(f"  {curve:<22}{parts}")
    run.results["training"] = trained_anew(run.base, run.tokenizer, run.folder / "training")
    say("\n" + said_of(run.results["training"]))


def conclusions(results: dict[str, Any]) -> list[str]:
    """Say in three sentences what the numbers of a run show."""
    document, cells = results["document"], results["facts"]
    counts = {_key(cell): int(sum(cell["depth"])) for cell in cells}
    lengths = sorted({cell["length"] for cell in cells})
    total = len(cells[0]["depth"])

    def row(curve: str) -> str:
        known = [(counts[curve, n], n) for n in lengths if (curve, n) in counts]
        return ", ".join(f"{count} at {n:,}" for count, n in known)

    longest = lengths[-1]
    first = (
        f"A document of {document['tokens']:,} tokens was read once, in {document['seconds']:.0f} "
        f"s, into a file of {document['bytes'] / 1e6:,.0f} MB; of {total} facts in it the memory "
        f"found {counts['memory', longest]}, the base with all that its context holds "
        f"{counts['base, whole', longest]}, with the last {BASES['base, truncated']:,} tokens "
        f"{counts['base, truncated', longest]}."
    )
    second = f"By length of the text the memory found {row('memory')} tokens, the base with the "
    second += f"whole text or its last {CONTEXT:,} tokens {row('base, whole')}"
    if row("window + sinks"):
        second += f", a window of {LOOKS:,} with sinks {row('window + sinks')}"
    if ("memory", lengths[0]) in counts:
        lost = counts["memory", lengths[0]] - counts["memory", longest]
        second += f"; from the shortest to the longest the memory lost {max(lost, 0)}"
    if "nats" not in results:
        third = "The run was cut short: nats per token were not compared."
        return [first, second + ".", third]
    return [first, second + ".", _of_nats(results["nats"]["memories"])]


def _of_nats(memories: dict[str, Any]) -> str:
    """Say which memory predicts best, with the bytes that it takes for it."""
    best = min(memories, key=lambda name: memories[name]["mean"])
    window = memories["window + sinks"]
    if best == "window + sinks":
        return (
            f"With {ROWS} entries a layer the plain window with sinks predicts the next word best: "
            "take a memory to find what is far back, not to lower the loss."
        )
    sizes = [f"{values['bytes'] / 1e6:.0f} MB" for values in (memories[best], window)]
    return (
        f"With {ROWS} entries a layer {best} ({sizes[0]}) predicts the next word of this one text "
        f"best, by {window['mean'] - memories[best]['mean']:.3f} nats a token over the window with "
        f"sinks ({sizes[1]})."
    )


def publish(folder: Path, readme: Path) -> None:
    """Put what a run found between the marks of README.md, and its pictures into docs/figures.

    Args:
        folder: of the run.
        readme: the page.
    """
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    figures = readme.parent / "docs" / "figures"
    _draw_facts(results, figures / "demo_facts.png")
    if "nats" in results:
        _draw_nats(results, figures / "demo_nats.png")
    depths = len(results["facts"][0]["depth"])
    lengths = sorted({cell["length"] for cell in results["facts"]})
    counts = {_key(cell): f"{sum(cell['depth']):.0f}" for cell in results["facts"]}
    rows = [
        [f"found of {depths}", *(f"{n:,} tokens" for n in lengths)],
        ["---"] * (1 + len(lengths)),
    ]
    rows += [[curve, *(counts.get((curve, n), "-") for n in lengths)] for curve in CURVES]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = "\n".join(f"- {sentence}" for sentence in conclusions(results))
    parts = [table, "![Facts found by depth and length](docs/figures/demo_facts.png)"]
    if "nats" in results:
        parts.append("![Nats per token by position](docs/figures/demo_nats.png)")
    if "trained" in results:
        curves = results["trained"]["curves"]
        heads = ["a trained memory: facts known", *(f"{n} tokens" for n in curves["memory"])]
        lines = [heads, ["---"] * len(heads)]
        lines += [[n, *(f"{share:.2f}" for share in c.values())] for n, c in curves.items()]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in lines))
    if "training" in results:
        parts.append(said_of(results["training"]))
    begin, end = MARKS
    before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    whole = "\n\n".join([f"{before}{begin}", *parts, text, f"{end}{rest.partition(end)[2]}"])
    write_text(readme, whole)


def _conclude(run: Run) -> None:
    say("\n=== What this run shows\n")
    for sentence in conclusions(run.results):
        say(sentence)
    seconds, processor = run.results["seconds"], run.results["processor_seconds"]
    say(f"\n{seconds:.0f} s in all, {processor:.0f} s of processors; pictures and numbers are in "
        f"{run.folder}")  # fmt: skip


__all__ = ["Run", "conclusions", "main", "publish"]


if __name__ == "__main__":  # python -m memwrap.cli.demo FOLDER README.md
    import sys

    publish(Path(sys.argv[1]), Path(sys.argv[2]))
