"""`make demo`: a small LM, fine-tuned with a memory, measured beside its controls.

Everything printed was measured in this run. A result that does not favour the memory is
printed just the same.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

import memwrap
from memwrap.assets import ROOT, asset
from memwrap.evaluation import (
    AssociativeTask,
    evaluate_recall,
    perplexity_by_position,
    plot_perplexity,
    plot_recall,
)
from memwrap.files import write_text
from memwrap.training.corpus import stdlib_corpus
from memwrap.training.data import long_documents
from memwrap.training.finetune import run_recipe
from memwrap.training.recipe import load_recipe

DOCUMENT_TOKENS = 30_720
README_MARKS = ("<!-- demo:begin -->", "<!-- demo:end -->")


def _title(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def train_briefly(output: Path, minutes: float) -> memwrap.MemoryModelForCausalLM:
    """Fine-tune the shipped LM with ARMT and LoRA, save what was trained, load it again."""
    recipe = load_recipe(
        "armt_lora_tiny", [f"output={output}", f"trainer.max_minutes={minutes}", "overwrite=true"]
    )
    folder = run_recipe(recipe)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    print(f"saved {folder} ({size / 1e6:.1f} MB of weights, without the base) and loaded it again")
    return memwrap.load(folder)


def held_out(tokenizer, count: int) -> list[torch.Tensor]:
    """Held-out documents of at least `DOCUMENT_TOKENS` tokens, cut to that length."""
    documents = long_documents(stdlib_corpus("test"), tokenizer, DOCUMENT_TOKENS)[:count]
    for document in documents:
        print(f"  {document.name}: {len(document.text):,} characters")
    rows = [tokenizer(d.text, verbose=False).input_ids[:DOCUMENT_TOKENS] for d in documents]
    return [torch.tensor(row) for row in rows]


def perplexity(models: dict[str, memwrap.MemoryModelForCausalLM], output: Path) -> dict:
    """Perplexity by position of each adapter beside its controls."""
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    documents = held_out(tokenizer, 3)
    results = {}
    for name, model in models.items():
        print(f"\n--- {name}")
        result = perplexity_by_position(model, documents)
        print(result.table())
        plot_perplexity(result, output / f"perplexity_{name}.png")
        results[name] = result.to_dict()
    return results


def recall(output: Path) -> dict:
    """Associative recall by distance with the shipped recall adapter."""
    model = memwrap.load("armt-recall")
    results = {}
    for name, rewrite in (("remember", False), ("rewrite", True)):
        task = AssociativeTask.from_pretrained(asset("armt-recall"), rewrite=rewrite)
        result = evaluate_recall(model, task)
        print(f"\n--- {name}")
        print(result.table())
        plot_recall(result, output / f"recall_{name}.png")
        results[name] = result.to_dict()
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
    out = model.generate(prompt, past_key_values=state, max_new_tokens=48, do_sample=False)
    print("the text went on:", repr(tokenizer.decode(prompt[0])))
    print("the model goes on:", repr(tokenizer.decode(out[0, prompt.shape[1] :])))


def main(output: str = "demo-output", minutes: float = 2.0) -> None:
    """Run the demo.

    Args:
        output: folder for adapters, plots and results.
        minutes: how long to fine-tune.
    """
    torch.manual_seed(0)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    _title(f"Fine-tune the shipped LM with ARMT and LoRA for {minutes:g} minutes")
    brief = train_briefly(folder / "armt", minutes)
    shipped = memwrap.load("armt-lm")
    _title("Perplexity by position on held-out documents, beside its controls")
    results = {"perplexity": perplexity({"this-run": brief, "shipped": shipped}, folder)}
    _title("Associative recall by distance (shipped adapter)")
    results["recall"] = recall(folder)
    _title("Read once, ask later")
    read_once_ask_later(shipped, folder)
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    print(f"\nresults and plots: {folder.resolve()}")


__all__ = ["ROOT", "main"]
