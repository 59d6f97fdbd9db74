"""Every memory on one backbone with one budget: perplexity by position, recall, what it costs.

A memory goes through two recipes of a plan (`memwrap/assets/comparison.yaml`), each with the same
data, seed and tokens seen for all: long documents, and associative recall. What came out is one
file a memory in a folder, so that a run that was stopped goes on; `comparison_tables` reads them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import memwrap
from memwrap.assets import ROOT
from memwrap.assets.places import find_model
from memwrap.evaluation import run
from memwrap.evaluation.controls import MEMORY, OFF, SHUFFLED, TRUNCATED
from memwrap.evaluation.measure import machine
from memwrap.evaluation.perplexity import Reading, perplexity_by_position
from memwrap.evaluation.recall import RecallResult, evaluate_recall
from memwrap.io.atomic_files import write_text
from memwrap.io.reading import read_json
from memwrap.io.yaml_files import read_yaml
from memwrap.training.finetune import run_recipe
from memwrap.training.recall import recall_tasks
from memwrap.training.recipe import Recipe, load_recipe

FORMAT, VERSION = "memwrap-comparison", 1
PLAN = ROOT / "comparison.yaml"
PARTS = ("documents", "recall")
BASE = "base"
CHARACTERS = "0123456789abcdef=?;"
PROMPT, DECODED = 512, 32
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """A budget and the settings that every memory goes through with.

    Attributes:
        model: backbone: folder, shipped name or repo.
        values: the YAML file's content; see `memwrap/assets/comparison.yaml`.
    """

    model: str
    values: dict[str, Any]

    @classmethod
    def load(
        cls,
        model: str = "tiny-lm",
        path: str | Path | None = None,
        *,
        budget: int | None = None,
        recall_budget: int | None = None,
    ) -> Plan:
        """Read a plan (default: the shipped one).

        Args:
            model: the backbone.
            path: of a YAML file.
            budget, recall_budget: tokens seen on documents and on recall, instead of the plan's.

        Raises:
            ValueError: for a file that is no plan, unknown memories, or a budget below one step.
        """
        path = Path(path or PLAN)
        values = read_yaml(path)
        needed = {*PARTS, "memories", "seed"}
        if not isinstance(values, dict) or needed - values.keys():
            raise ValueError(f"{path} is no plan of a comparison; it needs {sorted(needed)}.")
        for name in values["memories"]:
            memwrap.config_class(name)
        for part, tokens in zip(PARTS, (budget, recall_budget), strict=True):
            values[part]["budget"] = values[part]["budget"] if tokens is None else tokens
        plan = cls(model, values)
        for part in PARTS:
            if plan.steps(part) < 1:
                raise ValueError(
                    f"{values[part]['budget']} tokens are less than one step on {part}, which sees "
                    f"{plan.tokens_a_step(part)}."
                )
        return plan

    def tokens_a_step(self, part: str) -> int:
        """Count the most tokens that a training step sees."""
        recipe = self.values[part]["recipe"]
        if part == "documents":
            tokens = recipe["data"]["max_tokens"]
        else:
            section = recipe["recall"]
            pair = section["key_size"] + section["value_size"] + 2
            tokens = (section["num_pairs"] + section["num_queries"]) * pair
        return int(recipe["trainer"]["batch_size"] * tokens)

    def steps(self, part: str) -> int:
        """Count the training steps of a part's budget."""
        return int(self.values[part]["budget"] // self.tokens_a_step(part))

    def memory(self, name: str, part: str) -> dict[str, Any]:
        """Collect the settings of a memory: what all share, then its own."""
        settings = (self.values["memories"].get(name) or {}).get(part) or {}
        return {**self.values[part]["memory"], **settings}

    def note(self, name: str) -> str:
        """Give the remark on a memory that belongs beside its figures."""
        return str((self.values["memories"].get(name) or {}).get("note", ""))

    def recipe(self, name: str, part: str, folder: Path) -> dict[str, Any]:
        """Make the recipe by which a memory is trained into `folder`."""
        recipe: dict[str, Any] = json.loads(json.dumps(self.values[part]["recipe"]))
        settings = self.values["memories"].get(name) or {}
        if "lora" in settings:
            recipe["lora"] = settings["lora"]
        recipe["model"] = {"name": self.model, "dtype": "float32"}
        recipe["memory"] = {"name": name, **self.memory(name, part)}
        recipe["output"] = str(folder)
        recipe["trainer"] = {
            "schedule": "constant_with_warmup", "precision": "fp32", "log_every": 10,
            "save_every": None, **recipe["trainer"],
            "steps": self.steps(part), "seed": self.values["seed"],
        }  # fmt: skip
        return recipe


def symbols(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Find the ids of 16 hexadecimal digits and three marks; None where they are not 19 tokens."""
    ids = [tokenizer(c, add_special_tokens=False)["input_ids"][-1] for c in CHARACTERS]
    return ids if len(set(ids)) == len(CHARACTERS) else None


def tokenizer_of(plan: Plan) -> PreTrainedTokenizerBase:
    """Load the backbone's tokenizer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(find_model(plan.model))
    return tokenizer


def backbone_of(plan: Plan) -> Any:
    """Load the backbone, in float32 and evaluation mode."""
    place = find_model(plan.model)
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


def _train(plan: Plan, name: str, part: str, scratch: Path) -> tuple[Any, dict[str, Any]]:
    """Train a model; also gives what is known of its training."""
    folder = scratch / f"{name}-{part}"
    recipe = plan.recipe(name, part, folder)
    recipe["overwrite"] = True
    if part == "recall":
        recipe["recall"].setdefault("ids", symbols(tokenizer_of(plan)))
    path = scratch / f"{name}-{part}.yaml"
    write_text(path, yaml.safe_dump(recipe))
    run_recipe(load_recipe(path))
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return memwrap.load(folder), facts


def _documents(plan: Plan) -> list[Tensor]:
    wanted, source = (
        plan.values["documents"]["held_out"],
        plan.values["documents"]["recipe"]["data"],
    )
    split = "test" if source.get("split") else None
    return run.documents(
        source["source"], split, tokenizer_of(plan), wanted["tokens"], wanted["count"]
    )


def _recall(
    plan: Plan, recipe: Recipe, model: Any, controls: tuple[str, ...], pairs: int | None = None
) -> dict[str, dict[str, Any]]:
    """Recall by distance on both tasks, at most at `pairs` pairs."""
    settings = plan.values["memories"].get((recipe.memory or {})["name"]) or {}
    wanted, results = {**plan.values["recall"]["held_out"], **settings.get("held_out", {})}, {}
    for task in recall_tasks(recipe.recall, model.config.vocab_size):
        # Distinct keys end somewhere; keys that may come again do not.
        most = min(pairs or 10**9, 10**9 if task.rewrite else task.num_keys)
        result: RecallResult = evaluate_recall(
            model, task, distances=tuple(d for d in wanted["distances"] if d <= most),
            samples=wanted["samples"], controls=controls, seed=plan.values["seed"],
        )  # fmt: skip
        results["rewrite" if task.rewrite else "remember"] = result.to_dict()
    return results


def measure(
    plan: Plan, name: str, scratch: Path, base: dict[str, Reading] | None = None
) -> dict[str, Any]:
    """Train and measure one memory.

    Args:
        plan: what it goes through.
        name: of the memory.
        scratch: folder for what is trained.
        base: as in `perplexity_by_position`: what the base alone gives is measured once.
    """
    model, facts = _train(plan, name, "documents", scratch)
    rows = _documents(plan)
    curves = perplexity_by_position(model, rows, base=base)
    costs = {
        "added_parameters": sum(p.numel() for p in model.memory_parameters()),
        "state_bytes": model.close_segment(model.read(rows[0][None])).nbytes,
        "state_after_tokens": len(rows[0]),
    }
    model, recall_facts = _train(plan, name, "recall", scratch)
    recipe = load_recipe(scratch / f"{name}-recall.yaml")
    return {
        "format": FORMAT,
        "version": VERSION,
        "memory": name,
        "note": plan.note(name),
        "model": plan.model,
        "seed": plan.values["seed"],
        "settings": {part: plan.memory(name, part) for part in PARTS},
        "lora": plan.recipe(name, "documents", scratch).get("lora"),
        "budget": {part: plan.values[part]["budget"] for part in PARTS},
        "steps": {part: plan.steps(part) for part in PARTS},
        "training_seconds": {"documents": facts["seconds"], "recall": recall_facts["seconds"]},
        "training_loss": {"documents": facts["loss"], "recall": recall_facts["loss"]},
        "costs": costs,
        "perplexity": curves.to_dict(),
        "recall": _recall(plan, recipe, model, (OFF, SHUFFLED)),
        "machine": machine(),
    }


def measure_base(plan: Plan, scratch: Path) -> dict[str, Any]:
    """Recall of the backbone alone, which sees all the pairs, up to as many as in training."""
    name = "window"  # any memory: it is switched off
    recipe = plan.recipe(name, "recall", scratch)
    recipe["recall"].setdefault("ids", symbols(tokenizer_of(plan)))
    path = scratch / "base-recall.yaml"
    write_text(path, yaml.safe_dump(recipe))
    model = memwrap.wrap(backbone_of(plan), name, **plan.memory(name, "recall"))
    pairs = recipe["recall"]["num_pairs"]
    results = _recall(plan, load_recipe(path), model, (TRUNCATED,), pairs)
    for values in results.values():
        del values["accuracy"][MEMORY]
    return {"format": FORMAT, "version": VERSION, "memory": BASE, "recall": results}


@torch.no_grad()
def measure_speed(
    plan: Plan, names: Iterable[str], *, tokens: int = 4096, rounds: int = 3
) -> dict[str, dict[str, float]]:
    """Measure seconds a token of reading and of decoding, in turns in one run on one thread.

    The memories are untrained, since weights do not change the time. `"base"` reads windows as long
    as a segment, and decodes after the same prompt with its cache of keys and values.

    Returns:
        By memory `read` and `decode`, the best of the rounds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, tokenizer_of(plan).vocab_size - 1, (1, tokens), generator=generator)
    best: dict[str, dict[str, float]] = {}
    try:
        for _ in range(rounds):
            for name in (BASE, *names):
                for kind, seconds in _speed(plan, name, ids).items():
                    known = best.setdefault(name, {})
                    known[kind] = min(seconds, known.get(kind, seconds))
    finally:
        torch.set_num_threads(threads)
    return best


def _speed(plan: Plan, name: str, ids: Tensor) -> dict[str, float]:
    model = backbone_of(plan)
    if name != BASE:
        model = memwrap.wrap(model, name, **plan.memory(name, "documents")).eval()
    start = time.perf_counter()
    if name == BASE:
        for part in ids.split(plan.values["documents"]["memory"]["segment_size"], 1):
            model.base_model(input_ids=part, use_cache=False)
    else:
        model.read(ids)
    read = time.perf_counter() - start
    prompt, took = ids[:, :PROMPT], []
    for new in (1, 1 + DECODED):
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        took.append(time.perf_counter() - start)
    return {"read": read / ids.shape[1], "decode": (took[1] - took[0]) / DECODED}


def read_results(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Read the results in a folder, by memory; `"base"` is the backbone's recall.

    Raises:
        ValueError: for a file that is no result of a comparison.
    """
    results = {}
    for path in sorted(Path(folder).glob("*.json")):
        values = read_json(path)
        about = values if isinstance(values, dict) else {}
        if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"{path} is no result of a comparison (version {VERSION}).")
        results[values["memory"]] = values
    return results


def compare(
    plan: Plan, folder: str | Path, scratch: str | Path, names: list[str], say: Say = print
) -> None:
    """Measure memories into `folder`, those that are there already left out; then the speed of all.

    Args:
        plan: what every memory goes through.
        folder: for the results, one file a memory.
        scratch: folder for what is trained.
        names: of memories.
        say: told of each result.

    Raises:
        ValueError: for results in `folder` of another backbone, budget or seed.
    """
    folder, scratch = Path(folder), Path(scratch)
    for path in (folder, scratch):
        path.mkdir(parents=True, exist_ok=True)
    results = read_results(folder)
    for name, values in results.items():
        _belongs(plan, folder / f"{name}.json", values)
    base: dict[str, Reading] = {}
    if BASE not in results:
        _write(folder, measure_base(plan, scratch))
    for name in (n for n in names if n not in results):
        start = time.perf_counter()
        _write(folder, measure(plan, name, scratch, base))
        say(f"{name}: {time.perf_counter() - start:.0f} s, {folder / name}.json")
    results = read_results(folder)
    memories = [n for n in results if n != BASE]
    for name, speed in measure_speed(plan, memories, **plan.values.get("speed", {})).items():
        results[name]["speed"] = speed
        _write(folder, results[name])


def _belongs(plan: Plan, path: Path, values: dict[str, Any]) -> None:
    wanted = {
        "model": plan.model, "seed": plan.values["seed"],
        "budget": {part: plan.values[part]["budget"] for part in PARTS},
    }  # fmt: skip
    for key, value in wanted.items():
        if values.get(key, value) != value:
            raise ValueError(
                f"{path} was measured with {key} {values[key]}, not {value}; take another folder."
            )


def _write(folder: Path, values: dict[str, Any]) -> None:
    write_text(folder / f"{values['memory']}.json", json.dumps(values, indent=1) + "\n")


__all__ = ["BASE", "Plan", "compare", "measure", "measure_base", "measure_speed", "read_results"]
