"""The configs of all memories: what the types of their fields hold, and what goes together."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Annotated, Any, Literal, get_args

import pytest
import typed_values
from support import MEMORIES

import memwrap
from memwrap.memories.settings import (
    LayerList,
    NonNegativeInt,
    PositiveInt,
    Range,
    Settings,
    describe,
)
from memwrap.testing.helpers import tiny


def refusal(make: Any, *arguments: Any, **settings: Any) -> str:
    """The text of the error: one line, a ValueError and nothing behind it."""
    with pytest.raises(ValueError) as caught:
        make(*arguments, **settings)
    assert caught.value.__cause__ is None and "\n" not in str(caught.value)
    return str(caught.value)


def words_of(hint: Any) -> list[str]:
    """What an error must say of a type, limits and options, found without `describe`."""
    words = [re.escape(repr(option)) for option in get_args(hint) if isinstance(option, str)]
    for option in get_args(hint):
        words += words_of(option) if get_args(option) else []
        words += ["None"] if option is type(None) else []
    for rule in getattr(hint, "__metadata__", ()):
        if isinstance(rule, Range):
            limits = (rule.least, rule.most, rule.above, rule.below)
            words += [f"{n:g}" for n in limits if n is not None and abs(n) < float("inf")]
    return words + (["true", "false"] if hint is bool else [])


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_field_refuses_what_its_type_does_not_hold(memory: str) -> None:
    """When it is made, when it is read from a file, and when it is assigned to."""
    config = tiny(memory)
    before = config.to_dict()
    for name, hint in type(config).types().items():
        values = typed_values.outside(hint)
        assert len(values) >= 8
        for value in values:
            text = refusal(dataclasses.replace, config, **{name: value})
            got = f"{type(config).__name__}.{name} is {value!r}; it must be "
            assert text.startswith(got) and text.endswith(".")
            for word in words_of(hint):
                assert word in text[len(got) :], (word, text)
            assert refusal(type(config).from_dict, {**before, name: value}) == text
            assert refusal(setattr, config, name, value) == text
    assert config.to_dict() == before


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_field_takes_what_its_type_holds(memory: str) -> None:
    config = tiny(memory)
    for name, hint in type(config).types().items():
        for value in typed_values.inside(hint):
            setattr(config, name, value)  # what it has to do with other fields is not asked here
            assert getattr(config, name) is value
            assert json.loads(json.dumps(config.to_dict()))[name] == value


# Written by hand: the cases above follow a type wherever it goes.
WRONG: dict[str, dict[str, Any]] = {
    "ahn": {"form": "gla", "window_size": 0, "num_sinks": -1, "states": "head", "rotate": 1,
            "train_windows": [0]},
    "armt": {"num_memory_tokens": 0, "d_mem": 0, "nu": 0, "n_heads": 0, "value_init": "one",
             "layers": "early", "read_scale": "unit", "gate_init": "1", "written_tokens": 0,
             "tokens_read": 1, "train_tokens": 0, "state_decay": 0, "read_cap": 0, "token_gate": 1},
    "autocompressor": {"num_memory_tokens": 0, "memory_size": 0, "length_spread": 1.01,
                       "accumulate": 1, "bptt_segments": 0, "independent": 1, "reader": "base"},
    "compact": {"slots": 0, "memory_size": 0, "num_sinks": -1, "merge": "sum", "selection": "rank",
                "bias_bound": -1.0, "ridge": -1.0, "similarity": 1.1, "reference_every": 0,
                "max_distance": 0, "budgets": [0.5]},
    "compressive": {"memory_size": 0, "compressed_size": 0, "compression_rate": 0, "store": "q",
                    "compression": "sum", "loss_weight": -1e-9, "bptt_segments": 0},
    "dms": {"window_size": 0, "compression": 0.9, "decisions": "head", "temperature": 0.0,
            "noise": 1},
    "extended_mind": {"segment_size": 0, "cache_size": 0, "top_k": 0, "positions": "near",
                      "similarity_threshold": 1.01},
    "hmt": {"num_sensory": -1, "cache_size": 0, "d_mem": 0, "summary_fraction": 0.0,
            "write_token": "both"},
    "infini": {"state_decay": 1.01, "update": "sum", "gate_init": 20.1, "gate_learning_rate": -1e-9,
               "first_segment": "none"},
    "infllm": {"window_size": 0, "num_sinks": -1, "block_size": 0, "top_k": 0, "cache_size": 0,
               "num_representatives": 0, "retrieval_interval": 0, "score": "dot",
               "selection": "token", "window_mask": "none"},
    "knnlm": {"top_k": 0, "interpolation": 1.0, "temperature": 0, "distance_scale": 0,
              "key": "value", "store": "", "cache_size": -1, "metric": "cosine"},
    "lact": {"window_size": 0, "num_sinks": -1, "network": "deep", "inner_width": 0, "step": "adam",
             "momentum": 1, "row_norm": "none", "base_rate": 0.0,
             "first_segment": "none", "layers": [0, 0]},
    "landmark": {"block_size": 0, "top_k": 0, "cache_size": 0, "landmark_id": 0,
                 "retrieval": "head"},
    "liger": {"form": "mamba", "window_size": -1, "num_sinks": -1, "window_weight": -1e-9,
              "recurrent_weight": -1e-9, "feature_map": "relu", "normaliser": "yes",
              "gate_divisor": 0, "num_slots": 0, "layers": [0, 0], "other_window_size": 0,
              "num_memories": -1, "top_k": 0, "shared": 1, "balance_weight": -1e-9},
    "lolcats": {"window_size": 0, "feature_size": 0, "key_maps": "head", "window_weight": 0,
                "stage": "first", "loss_weight": -1e-9, "other_window_size": 0},
    "memorizing": {"cache_size": 0, "top_k": 0, "combine": "sum", "gate_init": -20.1,
                   "gate_learning_rate": -1e-9, "layers": []},
    "memory_decoder": {"interpolation": 1.0, "temperature": 0, "num_layers": 0, "hidden_size": 0,
                       "num_heads": 0, "num_kv_heads": 0, "inner_size": 0, "window_size": 0,
                       "rope_theta": 1, "norm_eps": 0},
    "memoryprompt": {"num_memory_tokens": 0, "memory_size": 0, "mlp_size": 0, "pooling": "max"},
    "neurocache": {"cache_size": 0, "compression_factor": 0, "top_k": 0, "neighborhood_size": 0,
                   "context_size": 0, "similarity": "cosine", "head_layout": "mixed",
                   "layers": [-1], "attention_layers": [1, 1]},
    "rmt": {"num_memory_tokens": 0, "length_spread": 1.01, "segment_size": 0,
            "bptt_segments": 0, "loss_on": "first", "alignment": "middle", "count_padding": 1,
            "gate": "gru", "gate_init": 21},
    "window": {"window_size": 0, "num_sinks": -1},
}  # fmt: skip


@pytest.mark.parametrize("memory", MEMORIES)
def test_limits_are_those_of_the_methods(memory: str) -> None:
    config = memwrap.config_class(memory)
    for name, value in WRONG[memory].items():
        start = f"{config.__name__}.{name} is {value!r}; it must be "
        assert refusal(config, **{name: value}).startswith(start)


RELATIONS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    # the check, what it refuses, what it just lets pass, the error
    ("ahn.validate_train_windows", {"window_size": 8, "train_windows": [4, 9]},
     {"window_size": 9, "train_windows": [4, 9]},
     "train_windows is [4, 9]; it must be None or a list of sizes from 1 to 8."),
    ("autocompressor.validate_reader", {"reader": "frozen"},
     {"reader": "frozen", "independent": True},
     'reader is \'frozen\'; it must be "adapted" without `independent`: one pass reads and '
     "summarises."),
    ("armt.validate_heads", {"d_mem": 8, "n_heads": 3}, {"d_mem": 9, "n_heads": 3},
     "n_heads is 3; it must be a divisor of d_mem (8)."),
    ("armt.validate_denominator", {"use_denom": False}, {"use_denom": False, "feature_norm": True},
     "use_denom is False; it must be true unless `feature_norm` is true: raw features overflow."),
    ("armt.validate_written", {"num_memory_tokens": 2, "written_tokens": 3},
     {"num_memory_tokens": 3, "written_tokens": 3},
     "written_tokens is 3; it must be at most num_memory_tokens (2)."),
    ("armt.validate_identity", {"value_init": "identity", "input_norm": False},
     {"value_init": "identity"},
     "value_init is 'identity'; it must be another one without input_norm: values would not be "
     "bounded."),
    ("armt.validate_token_gate", {"token_gate": True, "read_scale": "raw"}, {"token_gate": True},
     'token_gate is True; it must be false with read_scale="raw": there is no gate.'),
    ("autocompressor.validate_memory_size", {"num_memory_tokens": 4, "memory_size": 3},
     {"num_memory_tokens": 4, "memory_size": 4},
     "memory_size is 3; it must be at least num_memory_tokens (4)."),
    ("infllm.validate_window", {"segment_size": 17}, {"segment_size": 16},
     "segment_size is 17; it must be at most `window_size` (16)."),
    ("infllm.validate_representatives", {"num_representatives": 3}, {"num_representatives": 2},
     "num_representatives is 3; it must be at most `block_size` (2)."),
    ("knnlm.validate_distances", {"adaptive": True, "metric": "ip"},
     {"adaptive": False, "metric": "ip"},
     "adaptive is True; it must be False where `metric` is 'ip': it needs distances."),
    ("lact.validate_window_size", {"segment_size": 8, "window_size": 7},
     {"segment_size": 8, "window_size": 8},
     "window_size is 7; it must be None or at least `segment_size` (8)."),
    ("landmark.validate_landmark", {"landmark_in_loss": True},
     {"landmark_in_loss": True, "landmark_id": 3},
     "landmark_in_loss is True; it must be false without `landmark_id`: no id could be predicted."),
    ("liger.validate_feature_map", {"form": "gla", "feature_map": "taylor"},
     {"form": "linear", "feature_map": "taylor"},
     "feature_map is 'taylor'; it must be for 'gla' one of softmax, elu, hedgehog, none."),
    ("liger.validate_feature_map", {"form": "gsa", "feature_map": "hedgehog"},
     {"form": "gsa", "feature_map": "elu"},
     "feature_map is 'hedgehog'; it must be for 'gsa' one of softmax, elu, none."),
    ("liger.validate_normaliser", {"form": "delta", "normaliser": True},
     {"form": "delta", "normaliser": False},
     "normaliser is True; it must be false for 'delta', whose reads need none."),
    ("liger.validate_feature_map", {"form": "kda", "feature_map": "taylor"},
     {"form": "kda", "feature_map": "hedgehog"},
     "feature_map is 'taylor'; it must be for 'kda' one of softmax, elu, hedgehog, none."),
    ("liger.validate_top_k", {"num_memories": 2, "top_k": 3}, {"num_memories": 2, "top_k": 2},
     "top_k is 3; it must be at most num_memories (2)."),
    ("liger.validate_read_cap", {"read_cap": 1.0, "window_size": 0},
     {"read_cap": 1.0, "window_size": 1},
     "read_cap is 1.0; it must be None without a window, beside which a read would be capped."),
    ("liger.validate_shared", {"shared": False}, {"shared": False, "num_memories": 2},
     "shared is False; it must be true without num_memories: nothing else would be left."),
    ("memory_decoder.validate_heads", {"hidden_size": 12}, {"hidden_size": 16},
     "num_heads is 4; it must be so many that 2 num_heads divide 12."),
    ("memory_decoder.validate_groups", {"num_kv_heads": 3}, {"num_kv_heads": 4},
     "num_kv_heads is 3; it must be a divisor of num_heads (4)."),
    ("neurocache.validate_neighborhood", {"neighborhood_size": 3}, {"neighborhood_size": 1},
     "neighborhood_size is 3; it must be 1 or an even number."),
    ("neurocache.validate_buckets", {"compat": True, "cache_size": 700},
     {"compat": True, "cache_size": 1024},
     "cache_size is 700; it must be a multiple of 512 and at least top_k with `compat`."),
    ("neurocache.validate_buckets", {"compat": True, "cache_size": 5, "top_k": 6},
     {"compat": True, "cache_size": 6, "top_k": 6},
     "cache_size is 5; it must be a multiple of 5 and at least top_k with `compat`."),
]  # fmt: skip


@pytest.mark.parametrize(("check", "wrong", "right", "text"), RELATIONS)
def test_fields_that_must_go_together(check: str, wrong: dict, right: dict, text: str) -> None:
    memory = check.partition(".")[0]
    config = tiny(memory, **right)
    assert refusal(tiny, memory, **wrong) == f"{type(config).__name__}.{text}"


def test_every_relation_has_its_case() -> None:
    found = {
        f"{memory}.{name}"
        for memory in MEMORIES
        for name in dir(memwrap.config_class(memory))
        if name.startswith("validate_")
    }
    assert found == {check for check, *_ in RELATIONS}


# What configs are made of


def test_words_of_types() -> None:
    for hint, words in (
        (PositiveInt, "an integer of at least 1"),
        (NonNegativeInt | None, "an integer of at least 0 or None"),
        (float, "a number"),
        (Annotated[float, Range(0, 1)], "a number from 0 to 1"),
        (Annotated[float, Range(above=0, most=1)], "a number above 0 and at most 1"),
        (Annotated[float, Range(above=0, below=1)], "a number above 0 and below 1"),
        (Annotated[float, Range(0, below=1)], "a number of at least 0 and below 1"),
        (Annotated[float, Range(above=0)], "a number above 0"),
        (Annotated[float, Range(below=0)], "a number below 0"),
        (Annotated[int, Range(most=3)], "an integer at most 3"),
        (Literal["a"], "'a'"),
        (Literal["a", "b"] | None, "'a', 'b' or None"),
        (bool, "true or false"),
        (bool | None, "true, false or None"),
        (LayerList | None, "a list of layer numbers (from 0, none twice) or None"),
        (list[PositiveInt], "a list of one or more (each an integer of at least 1)"),
        (str | None, "text or None"),
        (dict[str, Any], "a mapping of keys"),
    ):
        assert describe(hint) == words


def test_a_subclass_keeps_adds_and_replaces_checks() -> None:
    class Parent(Settings):
        width: PositiveInt = 4
        heads: PositiveInt = 2

        def validate_heads(self) -> None:
            if self.width % self.heads:
                self.refuse("heads", "a divisor of width")

    class Child(Parent):
        width: NonNegativeInt = 8
        sizes: list[PositiveInt] = dataclasses.field(default_factory=lambda: [1])

        def validate_sizes(self) -> None:
            if sum(self.sizes) > 9:
                self.refuse("sizes", "small")

    assert Child(width=0) == Child(width=0, heads=2, sizes=[1]) != Child()
    assert refusal(Parent, width=0) == "Parent.width is 0; it must be an integer of at least 1."
    assert refusal(Child, width=-1) == "Child.width is -1; it must be an integer of at least 0."
    assert refusal(Child, heads=3) == "Child.heads is 3; it must be a divisor of width."
    assert refusal(Child, sizes=[10]) == "Child.sizes is [10]; it must be small."
    assert Child().sizes is not Child().sizes
    made = Child()
    made.width = 9  # fields change one by one; what they have to do with each other is asked for
    assert refusal(made.validate) == "Child.heads is 2; it must be a divisor of width."
    with pytest.raises(TypeError, match="positional"):
        Child(3)  # type: ignore[misc]


def test_types_need_not_be_text() -> None:
    """As in a module without `from __future__ import annotations`."""
    body = {"rate": 1, "__annotations__": {"rate": Annotated[float, Range(above=0)]}}
    made = type("Made", (Settings,), {**body, "__module__": __name__})
    assert made().rate == 1 and made(rate=2).rate == 2  # type: ignore[attr-defined]
    assert refusal(made, rate=0) == "Made.rate is 0; it must be a number above 0."
