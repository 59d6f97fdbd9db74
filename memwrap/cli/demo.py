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
from memwrap.cli.demo_trained import ADAPTER, trained
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
TRUNCATED = 1_024
CONTEXT = 8_192 - 128
"""Tokens of a document that the base's trained context holds beside a question."""
LENGTHS = (2_000, 8_000, 16_000)
SHOWN = (0, 4, 8)
"""Facts that are asked for in words, in the longest text."""
SEGMENT, ROWS = 256, 512
"""Of the memories whose nats are measured: tokens at once, and entries that each may keep."""
MEASURED = (4_096, 2_048, 1_024)
"""Tokens that nats are measured on, the first that time allows."""
RESULTS = "results.json"
MARKS = ("<!-- demo:begin -->", "<!-- demo:end -->")
CURVES = ("memory", "base, truncated", "base, whole", "window + sinks")
# What a reading costs beside the base's own, which is measured first.
_COST = {"memory": 2.0, "base, truncated": 0.0, "base, whole": 1.3, "window + sinks": 1.7}


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

    def take_up(self, earlier: dict[str, Any]) -> None:
        """Go on from the results of an earlier run.

        Raises:
            ValueError: if it had other settings.
        """
        if earlier.get("settings") != self.results["settings"]:
            raise ValueError(f"{self.folder} holds a run with other settings; give another folder.")
        self.results = earlier
        self.begun -= earlier["seconds"]
        self.processor -= earlier["processor_seconds"]

    def known(self, curve: str, length: int) -> dict[str, Any] | None:
        """Find what was counted already."""
        return next((c for c in self.results["facts"] if _key(c) == (curve, length)), None)


def say(text: str = "") -> None:
    """Print a line at once."""
    print(text, flush=True)


def main(output: Path, minutes: float = 6.0, resume: bool = False) -> dict[str, Any]:
    """Run the demo.

    Args:
        output: folder for the state, pictures and results.
        minutes: how long it may take.
        resume: go on where an earlier run into this folder ended.

    Returns:
        What was measured, as in `results.json`.
    """
    torch.manual_seed(0)
    output.mkdir(parents=True, exist_ok=True)
    place = fetch(MODEL)
    base: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    run = Run(output, minutes, base, tokenizer, _speed(base, tokenizer))
    settings = {"reading": READING, "asking": ASKING, "lengths": LENGTHS}
    run.results |= {"settings": json.loads(json.dumps(settings)), "facts": []}
    if resume and (output / RESULTS).is_file():
        run.take_up(json.loads((output / RESULTS).read_text(encoding="utf-8")))
    say(f"{MODEL}: SmolLM2-135M-Instruct; it reads {run.speed:.0f} tokens a second here.")
    fitting = [n for n in LENGTHS[1:] if run.fits(n * _COST["memory"], 0.35)]
    longest = max(fitting, default=LENGTHS[1])
    _read(run, longest)
    _find(run, longest)
    _measure(run)
    _show_trained(run)
    run.results["done"] = True
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


def _read(run: Run, length: int) -> None:
    """Read a document once, save and load what it left, ask, beside the base alone."""
    say(f"\n=== 1. Read {length:,} tokens once (the model was trained on 8,192), ask later\n")
    if "document" not in run.results:
        run.results["document"] = _read_and_ask(run, length)
        run.write()
    document = run.results["document"]
    say(f"{MEMORY}, no training: {document['tokens']:,} tokens in {document['seconds']:.0f} s; "
        f"{document['bytes'] / 1e6:,.0f} MB, saved and loaded")  # fmt: skip
    for row in document["questions"]:
        say(f"\n{row['question']} (told at {row['depth']:.0%}: {row['answer']})")
        for name, text in row["answers"].items():
            say(f"  {name:<40}{text}")


def _read_and_ask(run: Run, length: int) -> dict[str, Any]:
    """Read with the memory, save, load; ask it and the base for the facts that are shown, and
    count all of them."""
    document = texts.document(run.tokenizer, length)
    model = memwrap.wrap(run.base, MEMORY, **READING).eval()
    start = time.monotonic()
    state = MemoryReader(model, run.tokenizer, document, progress=True).state
    seconds = time.monotonic() - start
    path = run.folder / "document.safetensors"
    state.save(path)
    count = int(state.tokens_seen[0])
    state = memwrap.MemoryState.load(path, model)
    model.memory_settings(MEMORY, **ASKING)
    shown = [texts.FACTS[place] for place in SHOWN]
    answers: dict[str, list[str]] = {}

    def ask(name: str, reader: Any, curve: str) -> None:
        _count(run, reader, curve, length)
        run.write()
        answers[name] = [" ".join(reader.ask(texts.question(f)).split()) for f in shown]

    ask("memory", MemoryReader(model, run.tokenizer, state), "memory")
    memwrap.unwrap(model)
    del state, model  # hundreds of MB
    for curve in ("base, truncated", "base, whole"):
        reader: Any = _reader(run, document, curve)
        ask(f"{curve} (last {reader.length:,} tokens)", reader, curve)
    rows = [
        {"question": fact.question, "answer": fact.answer, "depth": texts.DEPTHS[place],
         "answers": {name: all_of[index] for name, all_of in answers.items()}}
        for index, (place, fact) in enumerate(zip(SHOWN, shown, strict=True))
    ]  # fmt: skip
    return {
        "tokens": count, "seconds": round(seconds, 1), "bytes": path.stat().st_size,
        "questions": rows,
    }  # fmt: skip


def _find(run: Run, longest: int) -> None:
    """Count the facts that are found in texts of several lengths."""
    say(f"\n=== 2. {len(texts.FACTS)} facts in each of several texts: which are found\n")
    skipped: list[tuple[str, int]] = [(c, n) for n in LENGTHS if n > longest for c in CURVES]
    for length in (n for n in LENGTHS if n <= longest):
        for curve in CURVES:
            if curve == "window + sinks" and length <= LOOKS:
                continue  # it would hold the whole text, as the base does
            known = run.known(curve, length)
            if known is not None:
                _print(known)
            elif run.fits(length * _COST[curve] + 1500, 0.8):
                reader = _reader(run, texts.document(run.tokenizer, length), curve)
                _print(_count(run, reader, curve, length))
                if isinstance(reader, MemoryReader):
                    memwrap.unwrap(reader.model)
                run.write()
            else:
                skipped.append((curve, length))
    cells = sorted(run.results["facts"], key=lambda cell: CURVES.index(cell["curve"]))
    plot_depths([SimpleNamespace(**cell) for cell in cells], run.folder / "facts.png")
    run.results["skipped"] = skipped
    if skipped:
        names = "; ".join(f"{curve} at {length:,}" for curve, length in skipped)
        say(f"  (left out, as the time is short here: {names})")


def _key(cell: dict[str, Any]) -> tuple[str, int]:
    return cell["curve"], cell["length"]


def _print(cell: dict[str, Any]) -> None:
    marks = " ".join("x" if hit else "." for hit in cell["depth"])
    say(f"  {cell['length']:>6,} tokens  {cell['curve']:<18}{sum(cell['depth']):>2.0f} of "
        f"{len(cell['depth'])}   by depth: {marks}")  # fmt: skip


def _count(run: Run, reader: Reader, curve: str, length: int) -> dict[str, Any]:
    """Ask a reader for all facts and note what it knows, once."""
    if (cell := run.known(curve, length)) is not None:
        return cell
    hits = [float(reader.knows(fact)) for fact in texts.FACTS]
    cell = {"curve": curve, "length": length, "depth": hits}
    run.results["facts"].append(cell)
    return cell


def _reader(run: Run, document: str, curve: str) -> Reader:
    if curve.startswith("base"):
        most = TRUNCATED if curve == "base, truncated" else CONTEXT
        return BaseReader(run.base, run.tokenizer, document, most)
    if curve == "memory":
        model = memwrap.wrap(run.base, MEMORY, **READING).eval()
        reader = MemoryReader(model, run.tokenizer, document)
        model.memory_settings(MEMORY, **ASKING)
        return reader
    config = memwrap.WindowConfig(segment_size=512, window_size=LOOKS - 4, num_sinks=4)
    return MemoryReader(memwrap.wrap(run.base, config).eval(), run.tokenizer, document)


def _measure(run: Run) -> None:
    """Compare nats per token of memories whose states have the same size."""
    if "nats" in run.results:
        return
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
    found: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        model = memwrap.wrap(run.base, config).eval()
        values, sizes = nats(model, ids[:length], SEGMENT)
        memwrap.unwrap(model)
        means = [sum(values[a : a + step]) / len(values[a : a + step])
                 for a in range(0, length - 1, step)]  # fmt: skip
        found[name] = {"nats": means, "mean": sum(values) / len(values), "bytes": max(sizes)}
        say(f"  {name:<20}{max(sizes) / 1e6:>5.0f} MB   "
            f"{'  '.join(f'{m:.3f}' for m in means)}   mean {found[name]['mean']:.3f}")  # fmt: skip
    run.results["nats"] = {"tokens": length, "step": step, "memories": found}
    figure, (panel,) = _figure(1)
    for index, (name, of) in enumerate(found.items()):
        places = [step * (i + 0.5) for i in range(len(of["nats"]))]
        panel.plot(places, of["nats"], label=f"{name}, {of['bytes'] / 1e6:.0f} MB",
                   color=COLOURS[index], marker=MARKERS[index], markersize=4)  # fmt: skip
    panel.set_xlabel("token")
    panel.set_ylabel("nats per token")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    _save(figure, run.folder / "nats.png")


def _show_trained(run: Run) -> None:
    """Measure the shipped trained memory, where there is one."""
    found = run.results.get("trained") or trained(run.base, run.tokenizer)
    if found is None:
        return
    run.results["trained"] = found
    say(f"\n=== 4. {ADAPTER}, a trained memory: share of facts known, by tokens of text\n")
    for curve, shares in found["curves"].items():
        parts = "   ".join(f"{int(n):>5,}: {share:.2f}" for n, share in shares.items())
        say(f"  {curve:<22}{parts}")


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
        f"{counts['base, whole', longest]}, with the last {TRUNCATED:,} tokens "
        f"{counts['base, truncated', longest]}."
    )
    second = f"By length of the text the memory found {row('memory')} tokens, the base with the "
    second += f"whole text or its last {CONTEXT:,} tokens {row('base, whole')}"
    if row("window + sinks"):
        second += f", a window of {LOOKS:,} with sinks {row('window + sinks')}"
    if ("memory", lengths[0]) in counts:
        lost = counts["memory", lengths[0]] - counts["memory", longest]
        second += f"; from the shortest to the longest the memory lost {max(lost, 0)}"
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
    return [first, second + ".", third]


def publish(folder: Path, readme: Path) -> None:
    """Put what a run found between the marks of README.md, and its pictures into docs/figures.

    Args:
        folder: of the run.
        readme: the page.
    """
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    figures = readme.parent / "docs" / "figures"
    for name in ("facts", "nats"):
        (figures / f"demo_{name}.png").write_bytes((folder / f"{name}.png").read_bytes())
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
    picture = "![Facts found by depth and length](docs/figures/demo_facts.png)"
    begin, end = MARKS
    before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    write_text(readme, f"{before}{begin}\n\n{table}\n\n{picture}\n\n{text}\n\n{end}{after}")


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
