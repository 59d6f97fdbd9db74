"""Neurocache: what the shared invariants do not ask."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support import assert_pieces_and_padding, crossed
from torch import Tensor

import memwrap
from memwrap.testing.families import build
from memwrap.testing.helpers import (
    SEGMENT,
    assert_close,
    error_of,
    gradients,
    ids,
    randomise,
    wrapped,
)

COMPAT: dict[str, Any] = {"compat": True, "head_layout": "published"}
VARIANTS: list[dict[str, Any]] = [
    {"similarity": "dot", "context_size": 3, "neighborhood_size": 4, "cache_size": 13},
    {"layers": [0, 1], "attention_layers": [1], "neighborhood_size": 1, "context_size": 1},
    COMPAT,
    {"compression_factor": 1, "top_k": 50},
    {"eviction": "lru", "cache_size": 13},
    {"eviction": "lru", "cache_size": 6, "layers": [0, 1], "neighborhood_size": 4},
    {"eviction": "lru", "cache_size": 16, **COMPAT},
]


def layer(state: Any, number: int = 0) -> dict[str, Tensor]:
    return state.memories["neurocache"]["layers"][str(number)]


@pytest.mark.parametrize(
    ("variant", "family"), crossed(VARIANTS, ["llama", "gemma3", "gpt2", "phi3"], 2)
)
def test_pieces_and_padding(family: str, variant: dict) -> None:
    assert_pieces_and_padding(wrapped("neurocache", family, **variant))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_an_untrained_cache_changes_nothing(family: str) -> None:
    """The output projections start at zero, also with a memory that is not empty."""
    base, text = build(family), ids(2, 4 * SEGMENT)
    with torch.no_grad():
        model = memwrap.wrap(base, "infini", segment_size=SEGMENT, gate_init=-20.0)
        want = model(text).logits
        model = memwrap.wrap(memwrap.unwrap(model), "neurocache", segment_size=SEGMENT)
        assert_close(model(text).logits, want, 1e-5)


def test_what_is_added_is_behind_the_output_projection() -> None:
    """The module's output moves by what the memory adds, with and without a tuple."""
    model, text = wrapped("neurocache", layers=[0], attention_layers=[0]), ids(1, 2 * SEGMENT)
    attention = model.backbone.model.layers[0].self_attn
    memory = model.memories["neurocache"]
    outs: list[Tensor] = []
    attention.register_forward_hook(lambda _m, _a, out: outs.append(out[0]))
    added: list[Tensor] = []
    own = memory.cache_attns["0"]
    own.register_forward_hook(lambda _m, _a, out: added.append(out))
    with torch.no_grad():
        model(text)
        own.o_proj.weight.zero_()
        model(text)
    assert float(added[1].abs().max()) > 0.1 and not added[2].any()
    assert_close(outs[1] - outs[3], added[1], 1e-4)
    assert not hasattr(attention, "_memwrap_added")


def test_the_cache_is_the_compressed_inputs() -> None:
    model, text = wrapped("neurocache", cache_size=200), ids(1, 3 * SEGMENT)
    attention = model.backbone.model.layers[0].self_attn
    inputs: list[Tensor] = []
    attention.register_forward_pre_hook(
        lambda _m, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        state = model(text).cache
        want = model.memories["neurocache"].compress(torch.cat(inputs, 1))
    assert_close(layer(state)["states"][:, 0], want, 1e-5)
    assert layer(state)["count"].tolist() == layer(state, 1)["count"].tolist() == [24]
    assert "states" not in layer(state, 1)


def test_neighbours_cross_the_seam_of_the_ring() -> None:
    """Hits at the ring's last place have the entry after them, not the oldest one."""
    model = wrapped("neurocache", cache_size=5, top_k=5, segment_size=SEGMENT)
    memory, state = model.memories["neurocache"], model.read(ids(1, SEGMENT))
    tree = layer(state)
    states, valid, _ = memory._found(tree["states"][:, 0], tree)
    assert valid.sum(-1).tolist() == [[9] * 5]  # the newest of five hits has nothing behind it
    ring = tree["states"][0, 0]
    for column in range(5):
        pairs = zip(states[0, column].split(2), valid[0, column].split(2), strict=True)
        for pair, there in pairs:
            place = int((ring - pair[0]).abs().sum(-1).argmin())
            newest = (SEGMENT - 1) % 5
            assert there.tolist() == [True, place != newest]
            if place != newest:
                assert_close(pair[1], ring[(place + 1) % 5], 1e-6)


def test_what_is_retrieved_stays_longer() -> None:
    """Of a full cache the newest segment is kept, and of the rest what was retrieved last: with
    the same text not simply the newest entries, as where the oldest go."""
    kept = {}
    for eviction in ("fifo", "lru"):
        model = wrapped("neurocache", layers=[0], attention_layers=[0], cache_size=28, top_k=1,
                        neighborhood_size=1, eviction=eviction)  # fmt: skip
        text = ids(1, 6 * SEGMENT)
        tree = layer(model.read(text))
        everything = model.memories["neurocache"].compress(
            model.backbone.model.layers[0].input_layernorm(model.get_input_embeddings()(text))
        )[0]
        same = (everything[:, None] - tree["states"][0, 0]).abs().amax(-1) < 1e-5
        kept[eviction] = same.any(1).nonzero().squeeze(1).tolist()
        assert set(range(5 * SEGMENT, 6 * SEGMENT)) <= set(kept[eviction])
    assert set(range(6 * SEGMENT - 28, 6 * SEGMENT)) <= set(kept["fifo"])
    assert not set(range(6 * SEGMENT - 28, 6 * SEGMENT)) <= set(kept["lru"])
    assert tree["last_used"].shape == (1, 28) and int(tree["last_used"].max()) == 6 * SEGMENT


def test_real_states_that_sum_to_zero_are_kept() -> None:
    """A fresh LayerNorm's outputs sum to about zero; the public code takes some for empty."""
    model = memwrap.wrap(build("llama"), "neurocache", segment_size=SEGMENT, compression_factor=2)
    state = model.read(ids(1, 8 * SEGMENT))
    states = layer(state, 1)["states"][:, 0]
    assert float(states.sum(-1).abs().max()) < 1e-5
    found, valid, _ = model.memories["neurocache"]._found(states, layer(state, 1))
    assert_close(found[:, :, 0], states, 1e-6)  # every state finds itself first
    assert bool(valid[:, :, 0].all())


def test_one_retrieval_serves_all_cache_attentions() -> None:
    model = wrapped("neurocache", base=build("llama", num_hidden_layers=4), layers=[1],
                    attention_layers=None)  # fmt: skip
    memory = model.memories["neurocache"]
    assert memory.reading == [1, 2, 3]
    calls: list[int] = []
    plain = memory._found
    memory._found = lambda *args: calls.append(1) or plain(*args)
    model.read(ids(1, 3 * SEGMENT))
    assert len(calls) == 3


def test_gradients_reach_the_compression_through_the_cache() -> None:
    found = {}
    for window, settings in ((None, {}), (1, {}), (1, COMPAT)):
        model = wrapped("neurocache", bptt_segments=window, **settings)
        text = ids(1, 3 * SEGMENT)
        model.train()(text, labels=text).loss.backward()
        found[window, bool(settings)] = "memory_modules" in " ".join(
            n for n, g in gradients(model).items() if "h_proj" in n and bool(g.any())
        )
    # Published code cuts after every segment and compresses what it retrieves anew in training.
    assert found == {(None, False): True, (1, False): False, (1, True): True}


def test_rows_start_anew_by_themselves() -> None:
    model = wrapped("neurocache")
    states = model.read(ids(2, 3 * SEGMENT))
    both = memwrap.MemoryState.cat([states.select(torch.tensor([1])), model.new_state(1)])
    text = ids(2, SEGMENT, seed=4)
    with torch.no_grad():
        got = model(text, cache=both).logits
        assert_close(got[1], model(text[1:]).logits[0])
        assert error_of(got[0], model(text[:1]).logits[0]) > 1e-3


def test_growth_is_the_declared_bytes_until_the_cache_is_full() -> None:
    for settings, width in (({}, 8), (COMPAT, 8 + 32)):
        model = memwrap.wrap(
            build("llama"), "neurocache", segment_size=8, cache_size=16, **settings
        )
        declared = model.memories["neurocache"].bytes_per_token
        assert declared == width * 4
        sizes = [model.read(ids(1, n * SEGMENT)).nbytes for n in range(1, 5)]
        steps = [after - before for before, after in pairwise(sizes)]
        assert steps == [declared * SEGMENT, 0, 0]


def test_trained_with_lora_or_alone() -> None:
    text = ids(1, 4 * SEGMENT)
    for lora in (False, True):
        model = wrapped("neurocache")
        model.backbone.requires_grad_(False)
        if lora:
            model.add_lora(LoraConfig(r=2, target_modules="all-linear"))
        model.train()(text, labels=text).loss.backward()
        names = gradients(model)
        assert any("lora_" in n for n in names) == lora
        assert {n for n, _ in model.named_parameters() if n.startswith("memory_modules")} <= set(
            names
        )


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"layers": [1], "attention_layers": [0]}, "attention_layers"),
     ({"attention_layers": [2]}, "attention_layers"), ({"layers": [2]}, "layers names"),
     ({"compression_factor": 5}, "compression_factor")],
)  # fmt: skip
def test_settings_that_do_not_fit_the_backbone(settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        memwrap.wrap(build("llama"), "neurocache", **settings)


def test_two_builds_are_one_model() -> None:
    one, other = (randomise(memwrap.wrap(build("llama"), "neurocache")) for _ in range(2))
    assert one.fingerprint() == other.fingerprint()
