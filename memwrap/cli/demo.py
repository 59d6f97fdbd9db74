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
from memwrap.cli import demo_texts as texts
from memwrap.cli.demo_readers import BaseReader, MemoryReader, Reader, nats
from memwrap.evaluation.plots import plot_depths
from memwrap.io.atomic_files import write_text
from memwrap.io.plotting import COLOURS, MARKERS, _figure, _save

MODEL = "smollm2"
MEMORY, SETTINGS = "extended_mind", {"segment_size": 512}
WINDOW = 1024
"""Tokens that the truncated base and the window with sinks see."""
CONTEXT = 8192 - 128
"""Tokens of a document that the base's trained context holds beside a question."""
SEGMENT, ROWS = 256, 512
"""Of the memories whose nats are measured: tokens at once, and entries that each may keep."""
MEASURED = (4_096, 2_048, 1_024)
"""Tokens that nats are measured on, the first that time allows."""
LENGTHS = (2_000, 7_600, 15_600)
DOCUMENTS = (24_600, 16_400, 8_200)
MARKS = ("<!-- demo:begin -->", "<!-- demo:end -->")
CURVES = ("memory", "base, truncated", "base, whole", "window + sinks")
# What a reading costs beside the base's own, which is measured first.
_COST = {"memory": 2.0, "base, truncated": 0.0, "base, whole": 1.3, "window + sinks": 2.2}


@dataclass
class Run:
    """A run of the demo: its clock, and what was measured.

    Attributes:
        folder: for files.
        minutes: how long it may take.
        speed: tokens that the base reads in a second here.
        results: everything measured.
    """

    folder: Path
    minutes: float
    speed: float = 0.0
    begun: float = field(default_factory=time.monotonic)
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.minutes * 60 - (time.monotonic() - self.begun)

    def fits(self, tokens: float, share: float = 1.0) -> bool:
        """Tell whether reading so many tokens at the base's speed fits a share of what is left."""
        return tokens / self.speed <= self.left * share


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
    run = Run(output, minutes)
    base: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    run.speed = _speed(base, tokenizer)
    say(f"{MODEL}: SmolLM2-135M-Instruct; it reads {run.speed:.0f} tokens a second here.")
    _ask(run, base, tokenizer)
    _find(run, base, tokenizer)
    _measure(run, base, tokenizer)
    run.results["seconds"] = round(time.monotonic() - run.begun, 1)
    write_text(output / "results.json", json.dumps(run.results, indent=2) + "\n")
    _conclude(run)
    return run.results


def _speed(base: Any, tokenizer: Any) -> float:
    ids = torch.tensor([tokenizer(texts.prose()[:8000], verbose=False)["input_ids"][:512]])
    with torch.no_grad():
        base(ids[:, :64], logits_to_keep=1)
        start = time.monotonic()
        base(ids, logits_to_keep=1)
    return ids.shape[1] / (time.monotonic() - start)


def _ask(run: Run, base: Any, tokenizer: Any) -> None:
    """Read a document once, save and load what it left, ask, beside the base alone."""
    cost = _COST["memory"]
    length: int = next((n for n in DOCUMENTS if run.fits(n * cost + CONTEXT, 0.45)), DOCUMENTS[-1])
    document = texts.document(tokenizer, length, texts.STORY, texts.STORY_DEPTHS)
    say(f"\n=== 1. Read {length:,} tokens once (its context: 8,192), ask later\n")
    model = memwrap.wrap(base, MEMORY, **SETTINGS).eval()
    start = time.monotonic()
    state = MemoryReader(model, tokenizer, document, progress=True).state
    seconds = time.monotonic() - start
    path = run.folder / "document.safetensors"
    state.save(path)
    reader = MemoryReader(model, tokenizer, memwrap.MemoryState.load(path, model))
    size = path.stat().st_size
    say(f"{MEMORY}, no training: {int(state.tokens_seen[0]):,} tokens in {seconds:.0f} s; "
        f"{path} ({size / 1e6:,.0f} MB), saved and loaded")  # fmt: skip
    answers = [reader.ask(texts.question(fact)) for fact in texts.STORY]
    memwrap.unwrap(model)
    short = BaseReader(base, tokenizer, document, WINDOW)
    whole = BaseReader(base, tokenizer, document, CONTEXT)
    rows = []
    for fact, depth, answer in zip(texts.STORY, texts.STORY_DEPTHS, answers, strict=True):
        asked = texts.question(fact)
        given = {"memory": answer, f"base, last {short.length:,} tokens": short.ask(asked),
                 f"base, last {whole.length:,} tokens": whole.ask(asked)}  # fmt: skip
        say(f"\n{fact.question} (told at {depth:.0%}: {fact.answer})")
        for name, text in given.items():
            mark = "found" if texts.found(fact, text) else "-"
            say(f"  {name:<26}{mark:<7}{' '.join(text.split())}")
        rows.append({"question": fact.question, "depth": depth, "answers": given,
                     "found": [texts.found(fact, text) for text in given.values()]})  # fmt: skip
    run.results["document"] = {
        "tokens": length, "seconds": round(seconds, 1), "bytes": size, "questions": rows,
    }  # fmt: skip


def _find(run: Run, base: Any, tokenizer: Any) -> None:
    """Ask for facts at five depths of texts of several lengths."""
    depths = tuple((i + 0.5) / len(texts.PLANTED) for i in range(len(texts.PLANTED)))
    say(f"\n=== 2. {len(depths)} facts in texts of several lengths: how many are found\n")
    cells: list[SimpleNamespace] = []
    skipped: list[int] = []
    for length in LENGTHS:
        needed = [name for name in CURVES if name != "base, whole" or length <= CONTEXT]
        if cells and not run.fits(length * sum(_COST[name] for name in needed) + 2000, 0.7):
            skipped.append(length)
            continue
        document = texts.document(tokenizer, length, texts.PLANTED, depths)
        for curve in needed:
            model = _of_curve(base, curve)
            reader: Reader = (
                MemoryReader(model, tokenizer, document) if model is not None
                else BaseReader(base, tokenizer, document, WINDOW if "trunc" in curve else CONTEXT)
            )  # fmt: skip
            hits = [float(texts.found(f, reader.ask(texts.question(f)))) for f in texts.PLANTED]
            if model is not None:
                memwrap.unwrap(model)
            cells.append(SimpleNamespace(curve=curve, length=length, depth=hits))
            say(f"  {length:>6,} tokens  {curve:<18}{sum(hits):.0f} of {len(hits)}   "
                f"by depth: {' '.join('x' if h else '.' for h in hits)}")  # fmt: skip
    plot_depths(cells, run.folder / "facts.png")
    run.results["facts"] = [vars(cell) for cell in cells]
    run.results["skipped"] = skipped
    if skipped:
        say(f"  (left out, as the time is short here: {', '.join(f'{n:,}' for n in skipped)})")


def _of_curve(base: Any, curve: str) -> Any:
    if curve == "memory":
        return memwrap.wrap(base, MEMORY, **SETTINGS).eval()
    if curve == "window + sinks":
        config = memwrap.WindowConfig(segment_size=WINDOW // 2, window_size=WINDOW - 4, num_sinks=4)
        return memwrap.wrap(base, config).eval()
    return None


def _measure(run: Run, base: Any, tokenizer: Any) -> None:
    """Compare nats per token of memories whose states have the same size."""
    configs: dict[str, memwrap.MemoryConfig] = {
        "window + sinks": memwrap.WindowConfig(
            segment_size=SEGMENT, window_size=ROWS - 4, num_sinks=4
        ),
        "compressive (mean)": memwrap.CompressiveConfig(
            segment_size=SEGMENT, memory_size=ROWS // 2, compressed_size=ROWS // 2
        ),
        "extended_mind": memwrap.ExtendedMindConfig(segment_size=SEGMENT, cache_size=ROWS),
    }
    fitting = (n for n in MEASURED if run.fits(n * 2.2 * len(configs), 0.9))
    length = next(fitting, MEASURED[-1])
    say(f"\n=== 3. Nats per token of {length:,} tokens, with {ROWS} entries a layer each\n")
    ids = tokenizer(texts.prose(), add_special_tokens=False, verbose=False)["input_ids"][:length]
    step = length // 4
    costs: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        model = memwrap.wrap(base, config).eval()
        values, sizes = nats(model, ids, SEGMENT)
        memwrap.unwrap(model)
        means = [sum(values[a : a + step]) / len(values[a : a + step])
                 for a in range(0, length - 1, step)]  # fmt: skip
        costs[name] = {"nats": means, "mean": sum(values) / len(values), "bytes": max(sizes)}
        say(f"  {name:<20}{max(sizes) / 1e6:>5.0f} MB   "
            f"{'  '.join(f'{m:.3f}' for m in means)}   mean {costs[name]['mean']:.3f}")  # fmt: skip
    run.results["nats"] = {"tokens": length, "step": step, "memories": costs}
    figure, (panel,) = _figure(1)
    for index, (name, of) in enumerate(costs.items()):
        places = [step * (i + 0.5) for i in range(len(of["nats"]))]
        panel.plot(places, of["nats"], label=f"{name}, {of['bytes'] / 1e6:.0f} MB",
                   color=COLOURS[index], marker=MARKERS[index], markersize=4)  # fmt: skip
    panel.set_xlabel("token")
    panel.set_ylabel("nats per token")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    _save(figure, run.folder / "nats.png")


def conclusions(results: dict[str, Any]) -> list[str]:
    """Say in three sentences what the numbers of a run show."""
    document, cells = results["document"], results["facts"]
    told = [row["found"] for row in document["questions"]]
    memory, short, whole = (sum(column) for column in zip(*told, strict=True))
    first = (
        f"Of {len(told)} facts in {document['tokens']:,} tokens the memory found {memory}, the "
        f"base with the last {WINDOW:,} tokens {short}, with all its context holds {whole}; it "
        f"was read once, in {document['seconds']:.0f} s, into {document['bytes'] / 1e6:,.0f} MB."
    )
    longest = max(cell["length"] for cell in cells)
    counts = {c["curve"]: int(sum(c["depth"])) for c in cells if c["length"] == longest}
    parts = ", ".join(f"{name} {count}" for name, count in counts.items())
    second = f"At {longest:,} tokens {len(cells[0]['depth'])} facts were asked for: {parts}."
    means = {name: values["mean"] for name, values in results["nats"]["memories"].items()}
    best = min(means, key=lambda name: means[name])
    gap = means["window + sinks"] - means[best]
    third = (
        "With states of the same size the plain window with sinks predicts the next word best: "
        "take a memory to find what is far back, not to lower the loss."
        if best == "window + sinks"
        else f"With states of the same size {best} predicts the next word best, by {gap:.3f} nats "
        "a token over the window with sinks."
    )
    return [first, second, third]


def publish(folder: Path, readme: Path) -> None:
    """Put what a run found between the marks of README.md, and its pictures into docs/figures.

    Args:
        folder: of the run.
        readme: the page.
    """
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    figures = readme.parent / "docs" / "figures"
    for name in ("facts", "nats"):
        (figures / f"demo_{name}.png").write_bytes((folder / f"{name}.png").read_bytes())
    depths = len(results["facts"][0]["depth"])
    lengths = sorted({cell["length"] for cell in results["facts"]})
    counts = {(c["curve"], c["length"]): f"{sum(c['depth']):.0f}" for c in results["facts"]}
    rows = [
        ["of " + str(depths), *(f"{n:,} tokens" for n in lengths)],
        ["---"] * (1 + len(lengths)),
    ]
    rows += [[curve, *(counts.get((curve, n), "-") for n in lengths)] for curve in CURVES]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = "\n".join(f"- {sentence}" for sentence in conclusions(results))
    begin, end = MARKS
    before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    write_text(readme, f"{before}{begin}\n\n{table}\n\n{text}\n\n{end}{after}")


def _conclude(run: Run) -> None:
    say("\n=== What this run shows\n")
    for sentence in conclusions(run.results):
        say(sentence)
    seconds = run.results["seconds"]
    say(f"\n{seconds:.0f} s in all; pictures and numbers are in {run.folder}")


__all__ = ["Run", "conclusions", "main", "publish"]


if __name__ == "__main__":  # python -m memwrap.cli.demo FOLDER README.md
    import sys

    publish(Path(sys.argv[1]), Path(sys.argv[2]))
