"""`memwrap demo`: a small LM, fine-tuned with a memory, measured beside its controls.

Everything printed was measured in this run. A result that does not favour the memory is
printed just the same.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.data.stdlib_corpus import stdlib_corpus
from memwrap.evaluation import run
from memwrap.evaluation.perplexity import PerplexityResult
from memwrap.evaluation.recall import RecallResult
from memwrap.io.atomic_files import write_text
from memwrap.training.finetune import run_recipe
from memwrap.training.recipe import load_recipe

DOCUMENT_TOKENS = 30_720
DOCUMENTS = 2
README_MARKS = ("<!-- demo:begin -->", "<!-- demo:end -->")


def _title(text: str) -> None:
    print(f"\n=== {text}\n", flush=True)


def train_briefly(output: Path, minutes: float) -> memwrap.MemoryModelForCausalLM:
    """Fine-tune the shipped LM with ARMT and LoRA, save what was trained, load it again."""
    limits = [f"trainer.max_minutes={minutes}", "trainer.eval_every=null", "data.eval_split=null"]
    recipe = load_recipe("armt_lora_tiny", [f"output={output}", "overwrite=true", *limits])
    folder = run_recipe(recipe)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    print(f"saved {folder}: {size / 1e6:.1f} MB of weights without the base; loaded it again")
    return memwrap.load(folder)


def perplexity(models: dict[str, Any], output: Path) -> dict[str, PerplexityResult]:
    """Measure perplexity by position of each adapter beside its controls."""
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    rows = run.documents("stdlib", "test", tokenizer, DOCUMENT_TOKENS, DOCUMENTS)
    results = {}
    base: dict[str, Any] = {}  # the same for all models
    for name, model in models.items():
        print(f"\n--- {name}: nats per token by segment of {model.segment_size} tokens\n")
        measured = run.perplexity(model, rows, base)
        results[name] = measured["perplexity"]
        print(results[name].table())
        run.write(measured, output / name)
    return results


def read_once_ask_later(model: memwrap.MemoryModelForCausalLM, output: Path) -> None:
    """Read a document into a file, load the file, continue the text from it."""
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    text = max(stdlib_corpus("test"), key=lambda d: len(d.text)).text
    ids = torch.tensor([tokenizer(text, verbose=False).input_ids[:DOCUMENT_TOKENS]])
    start = time.time()
    state = model.read(ids[:, :-32], progress=True)
    path = output / "document.safetensors"
    state.save(path)
    print(
        f"read {int(state.tokens_seen[0]):,} tokens in {time.time() - start:.1f} s into {path} "
        f"({path.stat().st_size / 1e6:.1f} MB)"
    )
    state = memwrap.MemoryState.load(path, model)
    prompt = ids[:, -32:]
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), cache=state,
        max_new_tokens=48, do_sample=False,
    )  # fmt: skip
    print("the document goes on:", repr(tokenizer.decode(prompt[0])))
    print("the model goes on:", repr(tokenizer.decode(out[0, prompt.shape[1] :])))


def update_readme(path: Path, text: str) -> None:
    """Put the demo's tables between the README's marks."""
    begin, end = README_MARKS
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    write_text(path, f"{before}{begin}\n\n{text}\n\n{end}{after}")


def main(output: str = "demo-output", minutes: float = 2.0, readme: Path | None = None) -> None:
    """Run the demo.

    Args:
        output: folder for adapters, plots and results.
        minutes: how long to fine-tune.
        readme: also put the tables into this file and the figures into docs/figures beside it.
    """
    torch.manual_seed(0)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    _title(f"Fine-tune the shipped LM with ARMT and LoRA for {minutes:g} minutes")
    brief = train_briefly(folder / "armt", minutes)
    shipped = memwrap.load("armt-lm")
    _title("Perplexity by position on held-out documents, beside its controls")
    results = perplexity({"this-run": brief, "shipped": shipped}, folder)
    _title("Associative recall by distance (shipped armt-recall), beside its controls")
    recall = run.recall(memwrap.load("armt-recall"), asset("armt-recall") or Path(), samples=64)
    print(run.table(recall))
    run.write(recall, folder)
    _title("Read once, ask later")
    read_once_ask_later(shipped, folder)
    numbers: dict[str, Any] = {"perplexity": {n: r.to_dict() for n, r in results.items()}}
    numbers |= {
        "recall": {n: r.to_dict() for n, r in recall.items()},
        "seconds": round(time.time() - begun, 1),
    }
    write_text(folder / "results.json", json.dumps(numbers, indent=2) + "\n")
    print(f"\nresults and plots are in {folder} ({time.time() - begun:.0f} s in all)")
    if readme is not None:
        _publish(readme, folder, results["shipped"], recall)


def _publish(
    readme: Path, folder: Path, perplexity: PerplexityResult, recall: dict[str, RecallResult]
) -> None:
    figures = readme.parent / "docs" / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for source, name in (("shipped/perplexity", "demo_perplexity"), ("recall", "demo_recall")):
        (figures / f"{name}.png").write_bytes((folder / f"{source}.png").read_bytes())
    tables = (
        f"Nats per token by segment of {perplexity.segment_size} tokens, "
        f"{perplexity.documents} held-out documents of {DOCUMENT_TOKENS:,} tokens, shipped "
        f"adapter (base window {perplexity.window}):\n\n{perplexity.table()}\n\n"
        f"Associative recall by distance (shipped armt-recall):\n\n{run.table(recall)}"
    )
    update_readme(readme, tables)


if __name__ == "__main__":
    import typer

    typer.run(main)
