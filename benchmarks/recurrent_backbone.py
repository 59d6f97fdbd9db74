"""What it is worth that a backbone's own recurrent layers go on from segment to segment.

python benchmarks/recurrent_backbone.py [STEPS]

Trains a small language model with recurrent layers (three gated delta rules, one attention) on the
Python standard library, 8 rows of 512 tokens a step, seed 0, and reads held-out documents: with the
attention bounded and the recurrent layers carried on, with both cut, and as the base reads them.
A quarter of an hour of one core. `--table` only writes the recorded result into the docs.
"""

from __future__ import annotations

import random
import sys
from itertools import pairwise
from typing import Any

import torch
from common import save
from pages import load, of_machine, put, table
from tqdm.auto import tqdm
from transformers import AutoTokenizer, Qwen3_5ForCausalLM, Qwen3_5TextConfig

import memwrap
from memwrap.assets import asset
from memwrap.data.stdlib_corpus import stdlib_corpus
from memwrap.evaluation.perplexity import perplexity_by_position

ROWS, CONTEXT, RATE = 8, 512, 2e-3
SEGMENT, WINDOW, LENGTH, DOCUMENTS = 128, 128, 4_096, 16


def build(tokenizer: Any) -> Qwen3_5ForCausalLM:
    config = Qwen3_5TextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, linear_num_key_heads=4,
        linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True, initializer_range=128**-0.5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return Qwen3_5ForCausalLM(config)


def train(model: Qwen3_5ForCausalLM, ids: torch.Tensor, steps: int) -> list[float]:
    """The mean loss of every fifty steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.1
    )
    losses: list[float] = []
    for _ in (bar := tqdm(range(steps))):
        starts = [random.randrange(len(ids) - CONTEXT) for _ in range(ROWS)]
        rows = torch.stack([ids[s : s + CONTEXT] for s in starts])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return [sum(part) / len(part) for part in (losses[i : i + 50] for i in range(0, steps, 50))]


def page() -> None:
    """Put the recorded result into the docs."""
    own = load("recurrent_backbone")
    curves = {name: curve["mean"] for name, curve in own["perplexity"]["curves"].items()}
    edges = own["perplexity"]["edges"]
    spans = [f"{a:,} to {b - 1:,}" for a, b in pairwise(edges)]
    named = {
        "base, full context": "the base, all of the text at once",
        "memory": f"window of {own['window']}, recurrent layers carried on",
        "memory off": f"segments of {own['segment_size']} alone, recurrent layers carried on",
        "base, truncated": f"windows of {own['window']} alone, everything begun anew",
    }
    rows = [["read", *spans, "all"]]
    for name, title in named.items():
        overall = own["perplexity"]["curves"][name]["overall"]
        rows.append([title, *(f"{v:.3f}" for v in curves[name]), f"{overall:.3f}"])
    found = own["perplexity"]["curves"]
    anew = found["base, truncated"]
    carried = anew["overall"] - found["memory off"]["overall"]
    trained = f"{own['steps']} steps on {own['tokens'] / 1e6:.1f} million tokens"
    read = f"{own['documents']} held-out documents of {own['length']:,} tokens"
    text = (
        f"A model of {own['parameters'] / 1e6:.1f} million parameters (three gated delta rules, "
        f"one layer that attends), trained for {trained} of the Python standard library in rows of "
        f"{CONTEXT}, one run, seed 0; nats a token of {read}, by position:\n\n{table(rows)}\n\n"
        f"Beginning everything anew costs {anew['gain']:.4f} ± {anew['gain_error']:.4f} against "
        f"the window that carries on (standard error over documents); {carried:.4f} of it is due "
        "to the recurrent layers (third row against fourth). The model is small and was trained "
        "for minutes: what it shows is that carrying on is worth something, not how much a real "
        "model gains. Trained on short rows, it reads all of a text at once worse than through a "
        "window."
        "\n\nMade by `python benchmarks/recurrent_backbone.py` on "
        f"{of_machine(own['machine'])}."
    )
    put("howto/recurrent_backbones.md", "recurrent", text)


def main() -> None:
    if sys.argv[1:] == ["--table"]:
        return page()
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))

    def encoded(split: str) -> list[list[int]]:
        texts = [document.text for document in stdlib_corpus(split)]
        return [[*tokenizer(t, verbose=False).input_ids, tokenizer.eos_token_id] for t in texts]

    base = build(tokenizer)
    losses = train(base, torch.tensor([i for text in encoded("train") for i in text]), steps)
    documents = [torch.tensor(t[:LENGTH]) for t in encoded("test") if len(t) >= LENGTH][:DOCUMENTS]
    model = memwrap.wrap(
        base.eval(), memwrap.WindowConfig(segment_size=SEGMENT, window_size=WINDOW - 4, num_sinks=4)
    )
    found = perplexity_by_position(
        model, documents, window=WINDOW, full_context_tokens=LENGTH, piece_tokens=1_024
    )
    print(found.table())
    result = {
        "parameters": base.num_parameters(), "steps": steps, "losses": losses,
        "tokens": steps * ROWS * CONTEXT, "documents": len(documents), "length": LENGTH,
        "segment_size": SEGMENT, "window": WINDOW, "perplexity": found.to_dict(),
    }  # fmt: skip
    save("recurrent_backbone", result)
    page()


if __name__ == "__main__":
    main()
