"""What a window and a recurrence beside it cost and give, on the shipped tiny LM.

    python benchmarks/linearized.py [--minutes 8] [--only quality|decoding] [--memories ahn]

Quality: nats per token on held-out documents of the base, of the model without training, and after
training by the shipped recipes (LoLCATs in its two stages), each with its branches alone and beside
the untrained base with a window as long and sinks. Decoding: seconds a token and bytes that are
kept, with so many tokens behind it, beside the base and its cache of keys and values. `--only`
leaves the other part of the recorded result as it is, `--memories` the quality of the others.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, save
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import memwrap
from memwrap.assets import asset
from memwrap.evaluation import run
from memwrap.training.finetune import LOG, run_recipe
from memwrap.training.recipe import load_recipe

DOCUMENTS, TOKENS = 4, 4_096
CONTEXTS = (1_024, 4_096, 16_384, 65_536)
STEPS, ROUNDS = 16, 5
RECIPES = {
    "ahn": [("ahn_tiny", [])],
    "liger": [("liger_gla_lora_tiny", [])],
    "lolcats": [
        ("lolcats_tiny", ["memory.stage=transfer", "lora=null", "trainer.learning_rate=1e-2"]),
        ("lolcats_tiny", []),
    ],
}


def base_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32).eval()


def trained(name: str, minutes: float, scratch: Path) -> tuple[Any, list[dict[str, Any]]]:
    """A memory trained by its recipe, stage after stage, and what each stage was."""
    facts, before = [], None
    for number, (recipe, overrides) in enumerate(RECIPES[name]):
        folder = scratch / f"{name}{number}"
        share = minutes / len(RECIPES[name])
        given = [
            *overrides,
            f"output={folder}",
            f"trainer.max_minutes={share}",
            "data.eval_split=null",
        ]
        if before is not None:
            given.append(f"init_from={before}")
        started = time.perf_counter()
        run_recipe(load_recipe(recipe, given))
        log = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
        facts.append({
            "recipe": recipe, "overrides": overrides, "minutes": share,
            "seconds": time.perf_counter() - started, "steps": log[-1]["step"],
        })  # fmt: skip
        before = folder
    return memwrap.load(before), facts


def quality(minutes: float, names: list[str]) -> dict[str, Any]:
    """Memories untrained and trained."""
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    rows = run.documents("stdlib", "test", tokenizer, TOKENS, DOCUMENTS)
    found: dict[str, Any] = {"documents": DOCUMENTS, "tokens": TOKENS}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            model, facts = trained(name, minutes, Path(scratch))
            config = model.memory_configs[0]
            fresh = memwrap.wrap(base_model(), config).eval()
            found[name] = {
                "settings": config.to_dict(),
                "training": facts,
                "untrained": run.linear_usage(fresh, rows)["linear-usage"].to_dict(),
                "trained": run.linear_usage(model, rows)["linear-usage"].to_dict(),
            }
    return found


def full_cache(model: Any, length: int) -> DynamicCache:
    """Keys and values of `length` tokens; what they say does not change the time."""
    config, cache = model.config, DynamicCache(config=model.config)
    heads = config.num_key_value_heads
    width = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        shape = (1, heads, length, width)
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


@torch.no_grad()
def steps(model: Any, cache: Any) -> list[float]:
    """Seconds of the processor for each of some steps behind what a cache or state holds."""
    took = []
    for _ in range(STEPS):
        token = torch.randint(10, 4000, (1, 1))
        start = time.process_time()
        model(token, cache=cache, use_cache=True)
        took.append(time.process_time() - start)
    return took


def decoding() -> list[dict[str, Any]]:
    """By context: tokens a second and bytes kept, in turns."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = base_model()
    memories = {name: memwrap.wrap(base_model(), name).eval() for name in RECIPES}
    rows = []
    for length in CONTEXTS:
        ids = torch.randint(10, 4000, (1, length))
        states = {name: model.read(ids) for name, model in memories.items()}
        kept = {name: state.nbytes for name, state in states.items()}
        took: dict[str, list[float]] = {name: [] for name in ("base", *memories)}
        for _ in range(ROUNDS):
            cache = full_cache(base, length)
            kept["base"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            took["base"] += steps(base, cache)[1:]
            for name, model in memories.items():
                took[name] += steps(model, states[name].clone())[1:]
            del cache
            gc.collect()
        middle = {name: statistics.median(values) for name, values in took.items()}
        rows.append({
            "tokens": length,
            "tokens_per_second": {name: 1 / seconds for name, seconds in middle.items()},
            "over_base": {name: middle["base"] / seconds for name, seconds in middle.items()},
            "bytes": kept,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="training of each memory")
    parser.add_argument("--only", choices=("quality", "decoding"))
    parser.add_argument("--memories", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    arguments = parser.parse_args()
    path = RESULTS / "linearized.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    found = {part: before[part] for part in ("decoding", "quality") if part in before}
    if arguments.only != "quality":
        found["decoding"] = decoding()
    if arguments.only != "decoding":
        new = quality(arguments.minutes, arguments.memories)
        found["quality"] = found.get("quality", {}) | new
    save("linearized", found)


if __name__ == "__main__":
    main()
