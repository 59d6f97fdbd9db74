"""Conformance of Neurocache: every case in the folder, through the ops or a wrapped model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, compare, described_backbone, names_of, read_case
from torch import Tensor, nn

import memwrap
from memwrap.ops import backend, neurocache, retrieve
from memwrap.ops.buffers import ring

# float32 against the original code in float32.
TOLERANCES = {"": 2e-5, "grad.": 5e-5}
COMMON = ("cache_size", "compression_factor", "topk", "neighborhood_size", "context_size",
          "similarity_fn", "cache_type", "batch", "segment_lengths", "mode")  # fmt: skip
MODES = {"eval": False, "train (re-encode)": True}


def parameters(case: Case) -> dict[str, Tensor]:
    own = {n.removeprefix("param."): t for n, t in case.tensors.items() if n.startswith("param.")}
    return {n: t.clone().requires_grad_() for n, t in own.items()}


class Cache:
    """One ring as the memory keeps it in its compatible form, with rows that start anew."""

    def __init__(self, case: Case) -> None:
        settings = case.settings
        self.size, batch = settings["cache_size"], settings["batch"]
        self.states = torch.zeros(batch, 1, 0, settings["cache_dim"])
        self.raw = torch.zeros(batch, 1, 0, settings["hidden_size"])
        self.count = torch.zeros(batch, dtype=torch.long)

    def full(self, name: str) -> Tensor:
        """With all its places, empty ones zero."""
        ring = getattr(self, name)
        return F.pad(ring, (0, 0, 0, self.size - ring.shape[2]))

    def reset(self, rows: Tensor) -> None:
        self.count = self.count.masked_fill(rows, 0)
        self.states, self.raw = (x * ~rows[:, None, None, None] for x in (self.states, self.raw))

    def add(self, states: Tensor, raw: Tensor) -> None:
        valid = torch.ones(states.shape[:2], dtype=torch.bool)
        place = ring.slots(self.count, valid, self.size)
        self.count = self.count + valid.sum(1)
        capacity = ring.capacity(self.count, self.states.shape[2], self.size)
        self.states = ring.store(self.states, place, states[:, None], capacity)
        self.raw = ring.store(self.raw, place, raw[:, None], capacity)


def run_op(case: Case) -> dict[str, Tensor]:
    """Retrieve, attend, store, segment by segment; gradients of the loss."""
    case.known(*COMMON, "hidden_size", "num_heads", "num_kv_heads", "head_dim", "cache_dim",
               "layer_norm_eps", "loss")  # fmt: skip
    settings, t, own = case.settings, case.tensors, parameters(case)
    assert settings["cache_type"] == "FIFO" and settings["layer_norm_eps"] == 1e-5
    heads, groups, width = settings["num_heads"], settings["num_kv_heads"], settings["head_dim"]
    training, cache, results = MODES[settings["mode"]], Cache(case), {}

    def compress(x: Tensor) -> Tensor:
        weights = own["h_norm.weight"], own["h_norm.bias"]
        return F.layer_norm(x @ own["h_proj.weight"].T, (settings["cache_dim"],), *weights)

    loss, inputs = torch.zeros(()), {}
    for s, length in enumerate(settings["segment_lengths"]):
        x = t[f"seg{s}.hidden_states"].clone().requires_grad_()
        inputs[f"grad.seg{s}.hidden_states"] = x
        if s:
            cache.reset(t[f"seg{s}.start_of_sequence"].bool())
        with torch.no_grad():
            states = compress(x)
        full = cache.full("states")
        index = neurocache.search_buckets(
            states, full[:, 0], settings["topk"], settings["similarity_fn"]
        )
        place = neurocache.neighbours(index, settings["neighborhood_size"])
        place = place.clamp(0, settings["cache_size"] - 1)
        found = retrieve.gather(full, place[:, None])[:, 0]
        if training:
            found = compress(retrieve.gather(cache.full("raw"), place[:, None])[:, 0])
        there = torch.ones(settings["batch"], length, dtype=torch.bool)
        order = torch.arange(length).expand(settings["batch"], -1)
        context = neurocache.context(order, order, there, settings["context_size"], clamp=True)
        query = (x @ own["cache_attns.0.q_proj.weight"].T).unflatten(-1, (heads, width))
        weights = [
            own[f"cache_attns.0.{n}_proj.weight"].unflatten(0, (groups, width)) for n in "kv"
        ]
        out = neurocache.attend(
            query * width**-0.5, found, torch.ones(found.shape[:3], dtype=torch.bool), *context,
            *weights, layout="published",
        )  # fmt: skip
        out = out.flatten(2) @ own["cache_attns.0.o_proj.weight"].T
        loss = loss + (out * t[f"seg{s}.loss_weight"]).sum()
        cache.add(states, x.detach())
        results |= {
            f"seg{s}.compressed_states": states, f"seg{s}.cache_attention_output": out,
            f"seg{s}.db_index_after": cache.count,
        }  # fmt: skip
        if f"seg{s}.retrieved_states" in t:  # left out of the copy kept with the tests
            results[f"seg{s}.retrieved_states"] = found
    loss.backward()
    results |= {"loss": loss[None], "cache_keys_final": cache.full("states")[:, 0]}
    results |= {n: x.grad for n, x in inputs.items()}
    return results | {f"grad.{n}": p.grad for n, p in own.items() if p.grad is not None}


def run_model(case: Case) -> dict[str, Tensor]:
    """A wrapped model segment by segment, rows starting anew where the case says so."""
    case.known(*COMMON, "retrieval_map", "attention_layers", "base", "decode_steps")
    settings, t = case.settings, case.tensors
    assert settings["cache_type"] == "FIFO" and settings["decode_steps"] == 0
    assert all(int(a) == b for a, b in settings["retrieval_map"].items())
    base = dict(settings["base"])
    assert base.pop("positions") == "each segment restarts at position 0"
    described = Case(case.method, case.name,
                     {"hyperparameters": {"base": {**base, "tied": False}}}, t)  # fmt: skip
    (size,) = set(settings["segment_lengths"])
    config = memwrap.NeurocacheConfig(
        segment_size=size, cache_size=settings["cache_size"], top_k=settings["topk"],
        compression_factor=settings["compression_factor"],
        neighborhood_size=settings["neighborhood_size"], context_size=settings["context_size"],
        similarity=settings["similarity_fn"], layers=[int(n) for n in settings["retrieval_map"]],
        attention_layers=settings["attention_layers"], head_layout="published", compat=True,
    )  # fmt: skip
    model: Any = memwrap.wrap(described_backbone(described), config)
    memory = model.memories["neurocache"]
    names = {f"cache_attns.{i}.": f"cache_attns.{n}." for i, n in enumerate(memory.reading)}
    own = {}
    for name, value in parameters(case).items():
        start = next((p for p in names if name.startswith(p)), "")
        target = memory.get_parameter(names.get(start, "") + name[len(start) :])
        with torch.no_grad():
            target.copy_(value)
        own[name] = target
    found: list[Tensor] = []
    compute = memory._published
    memory._published = lambda *args: found.append(compute(*args)[0]) or compute(*args)
    model.train(MODES[settings["mode"]])
    state, results, total = model.new_state(settings["batch"]), {}, torch.zeros(())
    for s in range(len(settings["segment_lengths"])):
        ids, fresh = t[f"seg{s}.input_ids"], t[f"seg{s}.start_of_sequence"].bool()
        rows = [state.select(torch.tensor([i])) for i in range(len(ids))]
        state = memwrap.MemoryState.cat(
            [model.new_state(1) if bool(new) else row for new, row in zip(fresh, rows, strict=True)]
        )
        out = model(ids, cache=state.detach())
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        state, total = out.cache, total + loss
        results |= {f"seg{s}.logits": out.logits, f"seg{s}.loss": loss[None]}
        results[f"seg{s}.retrieved_states_last"] = found[-1]
    ring = state.memories["neurocache"]["layers"][str(memory.storing[0])]
    missing = settings["cache_size"] - ring["states"].shape[2]
    results["cache0.keys_final"] = F.pad(ring["states"][:, 0], (0, 0, 0, missing))
    results |= {"cache0.db_index_final": ring["count"], "total_loss": total[None]}
    gradients = [n for n in t if n.startswith("grad.")]
    if gradients:
        total.backward()
    weights = dict(model.backbone.named_parameters())
    for name in gradients:
        plain = name.removeprefix("grad.")
        source: nn.Parameter = (
            weights[plain.removeprefix("base.")] if plain.startswith("base.") else own[plain]
        )
        results[name] = source.grad
    return results


def run(case: Case) -> dict[str, Tensor]:
    if case.about["level"] == "op" and "cache_keys_final" in case.tensors:
        return run_op(case)
    if case.about["level"] == "model" and "total_loss" in case.tensors:
        return run_model(case)
    pytest.fail(f"{case.name}: not understood; it holds {sorted(case.tensors)}")


def is_input(name: str) -> bool:
    ends = (".hidden_states", ".start_of_sequence", ".loss_weight", ".input_ids")
    return name.startswith(("param.", "base.")) or (name.startswith("seg") and name.endswith(ends))


@pytest.mark.parametrize("name", names_of("neurocache"))
def test_neurocache(name: str) -> None:
    case = read_case("neurocache", name)
    results = frozenset(n for n in case.tensors if not is_input(n))
    case = Case(case.method, case.name, case.about, case.tensors, results)
    compare(case, run(case), TOLERANCES)


def test_a_case_in_the_naive_implementation() -> None:
    name = names_of("neurocache")[-1]
    case = read_case("neurocache", name)
    results = frozenset(n for n in case.tensors if not is_input(n))
    case = Case(case.method, case.name, case.about, case.tensors, results)
    with backend("naive"):
        compare(case, run(case), TOLERANCES)


def test_a_case_that_is_not_understood_fails() -> None:
    about = {"level": "op", "hyperparameters": {}}
    with pytest.raises(pytest.fail.Exception, match="not understood"):
        run(Case("neurocache", "strange", about, {"out": torch.ones(1)}))
