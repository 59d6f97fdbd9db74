"""Conformance of Neurocache: every case in the folder, through the ops or a wrapped model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backbones import backbone_of, base_gradients, sizes_of
from cases import (
    Case,
    Entries,
    Got,
    Tolerances,
    both_precisions,
    compare,
    gradients_of,
    names_of,
    read_case,
)
from torch import Tensor

import memwrap
from memwrap.ops import backend, neurocache, retrieve
from memwrap.ops.buffers import least_used, ring

OP = Tolerances(reference={"": 1e-5}, float32={"": 1e-5, "grad.": 2e-5})
MODEL = Tolerances(reference={"": 1e-5, "grad.": 2e-5}, float32={"": 1e-5, "grad.": 2e-5})
MODES = {"eval": False, "train (re-encode)": True}
EVICTIONS = {"FIFO": "fifo", "LRU": "lru"}


def parameters(case: Case) -> dict[str, Tensor]:
    return {n: t.clone().requires_grad_() for n, t in case.starting("param.").items()}


class Cache:
    """One cache as the memory keeps it in its compatible form, with rows that start anew."""

    def __init__(self, case: Case) -> None:
        settings = case.settings
        self.size, batch = settings["cache_size"], settings["batch"]
        self.states = torch.zeros(batch, 1, 0, settings["cache_dim"], dtype=case.dtype)
        self.raw = torch.zeros(batch, 1, 0, settings["hidden_size"], dtype=case.dtype)
        self.count = torch.zeros(batch, dtype=torch.long)
        self.by_use = case.among("cache_type", EVICTIONS) == "lru"
        self.last_used = torch.full((batch, self.size), -1)

    def full(self, name: str) -> Tensor:
        """With all its places, empty ones zero."""
        rows = getattr(self, name)
        return F.pad(rows, (0, 0, 0, self.size - rows.shape[2]))

    def reset(self, rows: Tensor) -> None:
        self.count = self.count.masked_fill(rows, 0)
        self.last_used = self.last_used.masked_fill(rows[:, None], -1)
        self.states, self.raw = (x * ~rows[:, None, None, None] for x in (self.states, self.raw))

    def note(self, place: Tensor) -> None:
        there = torch.ones_like(place, dtype=torch.bool)
        self.last_used = least_used.mark(self.last_used, place, there, self.count)

    def add(self, states: Tensor, raw: Tensor) -> None:
        valid = torch.ones(states.shape[:2], dtype=torch.bool)
        total = self.count + valid.sum(1)
        capacity = ring.capacity(total, self.states.shape[2], self.size)
        new = {"states": states[:, None], "raw": raw[:, None]}
        if self.by_use:
            old, place, self.last_used = least_used.replace(self.last_used, self.count, valid)
            for name, rows in new.items():
                kept = least_used.store(getattr(self, name), old, place, rows, capacity)
                setattr(self, name, kept)
        else:
            place = ring.slots(self.count, valid, self.size)
            for name, rows in new.items():
                setattr(self, name, ring.store(getattr(self, name), place, rows, capacity))
        self.count = total


class Op:
    """The case's layer: its cache, and its weights as leaves."""

    def __init__(self, case: Case) -> None:
        settings = self.settings = case.settings
        self.own, self.cache = parameters(case), Cache(case)
        self.training = case.among("mode", MODES)
        self.similarity = case.among("similarity_fn", {"l2": "l2", "dot": "dot"})
        width = settings["hidden_size"]
        case.holds(
            layer_norm_eps=1e-5, cache_dim=width // settings["compression_factor"],
            loss="sum over segments of sum(cache_attention_output*loss_weight)",
        )  # fmt: skip
        assert settings["num_heads"] * settings["head_dim"] == width

    def compress(self, x: Tensor) -> Tensor:
        if self.settings["compression_factor"] == 1:
            return x
        weights = self.own["h_norm.weight"], self.own["h_norm.bias"]
        return F.layer_norm(x @ self.own["h_proj.weight"].T, weights[0].shape, *weights)

    def retrieve(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Retrieved states `(B, T, N, d)` and their places."""
        settings, cache = self.settings, self.cache
        full = cache.full("states")
        index = neurocache.search_buckets(states, full[:, 0], settings["topk"], self.similarity)
        place = neurocache.neighbours(index, settings["neighborhood_size"])
        place = place.clamp(0, cache.size - 1)
        if self.training and settings["compression_factor"] > 1:
            raw = retrieve.gather(cache.full("raw"), place[:, None])[:, 0]
            return self.compress(raw), place
        return retrieve.gather(full, place[:, None])[:, 0], place

    def attend(self, x: Tensor, found: Tensor) -> Tensor:
        settings, (batch, length, _) = self.settings, x.shape
        there = torch.ones(batch, length, dtype=torch.bool)
        order = torch.arange(length).expand(batch, -1)
        context = neurocache.context(order, order, there, settings["context_size"], clamp=True)
        width = settings["head_dim"]
        q, k, v = (self.own[f"cache_attns.0.{n}_proj.weight"] for n in "qkv")
        query = (x @ q.T).unflatten(-1, (settings["num_heads"], width)) * width**-0.5
        weights = [w.unflatten(0, (settings["num_kv_heads"], width)) for w in (k, v)]
        everything = torch.ones(found.shape[:3], dtype=torch.bool)
        out = neurocache.attend(query, found, everything, *context, *weights, layout="published")
        return out.flatten(2) @ self.own["cache_attns.0.o_proj.weight"].T


def run_op(case: Case) -> Got:
    """Retrieve, attend, store, segment by segment; gradients of the loss."""
    op, t, results = Op(case), case.tensors, {}
    cache, loss, leaves = op.cache, torch.zeros((), dtype=case.dtype), dict[str, Tensor]()
    for s, length in enumerate(case.settings["segment_lengths"]):
        x = leaves[f"seg{s}.hidden_states"] = t[f"seg{s}.hidden_states"].clone().requires_grad_()
        assert x.shape[:2] == (case.settings["batch"], length)
        start = t[f"seg{s}.start_of_sequence"].bool()
        if s:
            cache.reset(start)
        with torch.no_grad():
            states = op.compress(x)
        found, place = op.retrieve(states)
        if s:  # the published cache is made in the first segment, behind the retrieval
            cache.note(place)
        out = op.attend(x, found)
        loss = loss + (out * t[f"seg{s}.loss_weight"]).sum()
        cache.add(states, x.detach())
        results |= {
            f"seg{s}.compressed_states": states, f"seg{s}.cache_attention_output": out,
            f"seg{s}.retrieved_states": found, f"seg{s}.db_index_after": cache.count,
            f"seg{s}.last_used_after": cache.last_used,
        }  # fmt: skip
    loss.backward()
    results |= {"loss": loss, "cache_keys_final": cache.full("states")[:, 0]}
    results |= gradients_of(leaves)
    # Nothing reaches a weight that the case has no gradient of.
    return results | gradients_of(op.own)


class Model:
    """A wrapped model whose segments are closed by request, and what its layers retrieve.

    The public code writes into the cache after every call, also between tokens that are decoded,
    while memwrap's cache changes where segments end. So in decoding the cache is given what it
    would have if the segment ended, and tokens of earlier calls keep what they retrieved then.
    """

    def __init__(self, case: Case) -> None:
        settings, lengths = case.settings, case.settings["segment_lengths"]
        for retrieving, storing in settings["retrieval_map"].items():
            case.settings["retrieval_map"].used.add(retrieving)
            assert int(retrieving) == storing, f"{case.name}: retrieval_map, another layer's cache"
        decoded = case.want("decode.input_ids").shape[1] if settings["decode_steps"] else 0
        base: Entries = settings["base"]
        assert base["positions"] == "each segment restarts at position 0"
        config = memwrap.NeurocacheConfig(
            segment_size=max(*lengths, decoded) + 1,
            cache_size=settings["cache_size"],
            top_k=settings["topk"],
            compression_factor=settings["compression_factor"],
            neighborhood_size=settings["neighborhood_size"],
            context_size=settings["context_size"],
            similarity=settings["similarity_fn"],
            eviction=case.among("cache_type", EVICTIONS),
            layers=[int(n) for n in settings["retrieval_map"]],
            attention_layers=settings["attention_layers"],
            head_layout="published",
            compat=True,
        )
        self.model: Any = memwrap.wrap(backbone_of(case, sizes_of(base)), config)
        self.memory = self.model.memories["neurocache"]
        self.own = self.load(case)
        self.found: list[Tensor] = []
        self.history: list[tuple[Tensor, ...]] | None = None
        self.compute, self.memory._published = self.memory._published, self.look_up
        self.model.train(case.among("mode", MODES))

    def load(self, case: Case) -> dict[str, Tensor]:
        """The memory's parameters by the case's names, set to its values."""
        names = {
            f"cache_attns.{i}.": f"cache_attns.{n}." for i, n in enumerate(self.memory.reading)
        }
        own = {}
        for name, value in case.starting("param.").items():
            start = next((p for p in names if name.startswith(p)), "")
            own[name] = self.memory.get_parameter(names.get(start, "") + name[len(start) :])
            with torch.no_grad():
                own[name].copy_(value)
        return own

    def look_up(self, query: Tensor, state: Any) -> tuple[Tensor, ...]:
        """Retrieve for a call's columns; for those of earlier calls what they retrieved then."""
        new = self.compute(query, state)
        layer, history = len(self.found), self.history
        self.found.append(new[0])
        if history is None:
            return new
        if layer == len(history):  # the prompt
            history.append(new)
            return new
        back = query.shape[1] - 1  # one token is new
        pairs = list(zip(history[layer], new, strict=True))
        history[layer] = tuple(torch.cat([old, x[:, back:]], 1) for old, x in pairs)
        return tuple(torch.cat([old[:, old.shape[1] - back :], x[:, back:]], 1) for old, x in pairs)

    def segment(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        self.found = []
        out = self.model(ids, cache=state.detach())
        return out.logits, self.model.close_segment(out.cache)

    @torch.no_grad()
    def decode(self, ids: Tensor, prompt: int, state: Any) -> tuple[Tensor, Any]:
        """A prompt in one call, then token by token."""
        logits, start = [], state.memories
        self.history = []
        for piece in (ids[:, :prompt], *ids[:, prompt:].split(1, 1)):
            now = state.clone()
            if logits:
                now.memories = self.model.close_segment(state).memories
            self.found = []
            out = self.model(piece, cache=now)
            logits.append(out.logits)
            state = out.cache
            state.memories = start
        return torch.cat(logits, 1), self.model.close_segment(state)


def run_model(case: Case) -> Got:
    """A wrapped model segment by segment, rows starting anew where the case says so."""
    settings, t = case.settings, case.tensors
    ours = Model(case)
    model, state, results = ours.model, ours.model.new_state(settings["batch"]), {}
    total = torch.zeros((), dtype=case.dtype)
    for s, length in enumerate(settings["segment_lengths"]):
        ids, fresh = t[f"seg{s}.input_ids"], t[f"seg{s}.start_of_sequence"].bool()
        assert ids.shape == (settings["batch"], length)
        rows = [state.select(torch.tensor([i])) for i in range(len(ids))]
        state = memwrap.MemoryState.cat(
            [model.new_state(1) if bool(new) else row for new, row in zip(fresh, rows, strict=True)]
        )
        logits, state = ours.segment(ids, state)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        total = total + loss
        results |= {f"seg{s}.logits": logits, f"seg{s}.loss": loss}
        results[f"seg{s}.retrieved_states_last"] = ours.found[-1]
    if settings["decode_steps"]:
        assert settings["cache_type"] == "FIFO", f"{case.name}: cache_type LRU while decoding"
        ids = t["decode.input_ids"]
        prompt = ids.shape[1] - settings["decode_steps"]
        results["decode.logits"], state = ours.decode(ids, prompt, state)
    for number, layer in enumerate(ours.memory.storing):
        kept = state.memories["neurocache"]["layers"][str(layer)]
        missing = settings["cache_size"] - kept["states"].shape[2]
        results[f"cache{number}.keys_final"] = F.pad(kept["states"][:, 0], (0, 0, 0, missing))
        results[f"cache{number}.db_index_final"] = kept["count"]
    results["total_loss"] = total
    if any(n.startswith("grad.") for n in t):
        total.backward()
    results |= gradients_of(ours.own)
    return results | base_gradients(model, case)


def check(case: Case, ops: str = "torch") -> None:
    with backend(ops):
        if case.level == "op" and "cache_keys_final" in case.tensors:
            compare(case, run_op(case), OP)
        elif case.level == "model" and "total_loss" in case.tensors:
            compare(case, run_model(case), MODEL)
        else:
            case.not_understood()


@both_precisions
@pytest.mark.parametrize("name", names_of("neurocache"))
def test_neurocache(name: str, dtype: torch.dtype) -> None:
    check(read_case("neurocache", name, dtype))


def test_a_case_in_the_naive_implementation() -> None:
    check(read_case("neurocache", names_of("neurocache")[-1]), "naive")
