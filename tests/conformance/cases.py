"""Reference vectors: where they are, how a case's model is built, how numbers are compared."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import memwrap
from memwrap.engine.plan import segment_lengths

FOLDER = Path(os.environ.get("MEMWRAP_CONFORMANCE_DIR") or Path(__file__).parent / "data")
BACKBONE = (
    "Backbone: HF LlamaForCausalLM", "vocab 128, hidden 64, 2 layers, 4 heads, 2 kv heads, "
    "head_dim 16, intermediate 128 (SwiGLU, silu), RMSNorm eps 1e-6, RoPE theta 10000",
    "untied lm_head, no biases",
)  # fmt: skip
ALIGNMENTS = {"left (None)": "left", "left": "left", "right": "right", "center": "center"}


@dataclass
class Case:
    """One case: its description, its tensors, and which of them were compared."""

    method: str
    name: str
    about: dict[str, Any]
    tensors: dict[str, Tensor]
    outputs: frozenset[str] = frozenset()

    @property
    def settings(self) -> dict[str, Any]:
        return self.about["hyperparameters"]

    @property
    def expected(self) -> set[str]:
        """Names of the tensors that a run must reproduce."""
        marked = {n for n in self.tensors if n.startswith(("out.", "grad.", "gen."))}
        return marked | (self.outputs & self.tensors.keys())

    def known(self, *names: str) -> None:
        """Fail if a hyperparameter is there that the runner would ignore."""
        unknown = sorted(self.settings.keys() - set(names))
        assert not unknown, f"{self.name}: hyperparameters {unknown} are not understood"

    def given(self, *names: str) -> None:
        """Fail if a tensor is there that is neither expected nor among the inputs `names`."""
        rest = {n for n in self.tensors if not n.startswith("base.")} - self.expected
        assert rest <= set(names), f"{self.name}: tensors {sorted(rest - set(names))}"


def names_of(method: str) -> list[str]:
    """Every case of a method. None at all is an error, not an empty test."""
    folder = FOLDER / method
    found = {f.stem for f in folder.glob("*") if f.suffix in (".json", ".safetensors")}
    return sorted(found) or ["no case found"]


def read_case(method: str, name: str, outputs: Iterable[str] = ()) -> Case:
    """Read a case; `outputs` are the results whose names do not say so themselves."""
    path = FOLDER / method / name
    assert path.with_suffix(".json").is_file(), f"{path}.json is missing"
    assert path.with_suffix(".safetensors").is_file(), f"{path}.safetensors is missing"
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert about["method"] == method and about["case"] == name
    tensors = load_file(path.with_suffix(".safetensors"))
    for key, entry in about["tensors"].items():
        assert list(tensors[key].shape) == entry["shape"], key
    assert tensors.keys() == about["tensors"].keys(), "tensors and their description disagree"
    return Case(method, name, about, tensors, frozenset(outputs))


def backbone_of(case: Case) -> LlamaForCausalLM:
    """The backbone that the description states, with the case's weights."""
    for words in BACKBONE:
        assert words in case.about["semantics"], f"{case.name}: another backbone than {words!r}"
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=128, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    prefix = "base."
    weights = {n[len(prefix) :]: t for n, t in case.tensors.items() if n.startswith(prefix)}
    model.load_state_dict(weights, strict=True)
    return model.eval()


def described_backbone(case: Case) -> Any:
    """The backbone of `hyperparameters.base`: a Llama, or an OPT where positions are learned."""
    base = dict(case.settings["base"])
    sizes: dict[str, Any] = {
        "vocab_size": base.pop("vocab"), "hidden_size": base.pop("hidden"),
        "num_hidden_layers": base.pop("layers"), "num_attention_heads": base.pop("heads"),
        "tie_word_embeddings": base.pop("tied"),
    }  # fmt: skip
    kv_heads, width = base.pop("kv_heads"), base.pop("intermediate")
    epsilon = base.pop("rms_eps", None) or base.pop("norm_eps")
    theta, limit = base.pop("rope_theta"), base.pop("max_positions", None)
    assert not base, f"{case.name}: {sorted(base)} of the backbone is not understood"
    if theta is None:
        assert (epsilon, kv_heads) == (1e-5, sizes["num_attention_heads"])
        sizes |= {"ffn_dim": width, "word_embed_proj_dim": sizes["hidden_size"]}
        config: Any = OPTConfig(
            **sizes, max_position_embeddings=limit, dropout=0.0, attention_dropout=0.0
        )
        model: Any = OPTForCausalLM._from_config(config, attn_implementation="eager")
    else:
        config = LlamaConfig(
            **sizes, intermediate_size=width, num_key_value_heads=kv_heads, rms_norm_eps=epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": float(theta)},
        )  # fmt: skip
        model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    prefix = "base."
    weights = {n[len(prefix) :]: t for n, t in case.tensors.items() if n.startswith(prefix)}
    missing, foreign = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if sizes["tie_word_embeddings"] else set()
    assert set(missing) <= tied and not foreign, f"{case.name}: {missing}, {foreign}"
    model.tie_weights()
    return model.eval()


def base_gradients(model: Any, case: Case) -> dict[str, Tensor]:
    """Gradients of the backbone's parameters, those that the case holds."""
    prefix = "grad.base."
    parameters = dict(model.backbone.named_parameters())
    names = [n for n in case.expected if n.startswith(prefix)]
    return {n: parameters[n[len(prefix) :]].grad for n in names}


def shift_labels_of(case: Case) -> Tensor:
    """Targets by predicting position; `labels_mask` chooses among the predicting positions."""
    labels = case.tensors["labels"]
    shifted = torch.full_like(labels, -100)
    shifted[:, :-1] = labels[:, 1:]
    if "labels_mask" in case.tensors:
        shifted = shifted.masked_fill(~case.tensors["labels_mask"].bool(), -100)
    return shifted


def settings_of(case: Case) -> dict[str, Any]:
    """The config fields that every method has, from a model case."""
    alignment = case.settings.get("segment_alignment", "left")
    assert alignment in ALIGNMENTS, f"segment_alignment {alignment!r} is not understood"
    mask = case.tensors.get("attention_mask")
    return {
        "segment_size": case.settings["segment_size"],
        "num_memory_tokens": case.settings["num_mem_tokens"],
        "alignment": ALIGNMENTS[alignment],
        "count_padding": mask is not None and not bool(mask.all()),
    }


def compare(
    case: Case, got: dict[str, Tensor], tolerances: dict[str, float], floor: float = 0.0
) -> None:
    """Every expected tensor must be there and agree.

    Args:
        case: the case.
        got: results by the reference tensor's name; all of `case.expected`.
        tolerances: by the beginning of a name (the longest that fits), in units of the reference
            tensor's largest value.
        floor: a gradient's unit is at least this part of the largest gradient's (some are zero
            but for rounding: that of a key's bias, which moves all scores alike).
    """
    largest = max((float(case.tensors[n].abs().max()) for n in got if n[:5] == "grad."), default=0)
    assert got.keys() == case.expected, (
        f"{case.name}: not compared {sorted(case.expected - got.keys())}, "
        f"not known {sorted(got.keys() - case.expected)}"
    )
    wrong = []
    for name in sorted(case.expected):
        want, value = case.tensors[name], got[name].detach()
        if not want.is_floating_point():
            if not torch.equal(value.to(want.dtype), want):
                wrong.append(f"{name}: {value.tolist()} instead of {want.tolist()}")
            continue
        value = value.reshape(want.shape).to(want.dtype)
        match = max((p for p in tolerances if name.startswith(p)), key=len)
        least = floor * largest if name.startswith("grad.") else 0.0
        scale = max(float(want.abs().max()), least, 1e-12)
        error = float((value - want).abs().max()) / scale
        if not error <= tolerances[match]:
            wrong.append(f"{name}: {error:.2e} > {tolerances[match]:.0e}")
    assert not wrong, f"{case.name}: " + "; ".join(wrong)


def segments_of(case: Case) -> list[slice]:
    """Columns of each segment, by the public rule."""
    settings = settings_of(case)
    total = case.tensors["input_ids"].shape[1]
    cuts, start = [], 0
    for length in segment_lengths(total, settings["segment_size"], settings["alignment"]):
        cuts.append(slice(start, start + length))
        start += length
    return cuts


@torch.no_grad()
def states_by_segment(model: Any, case: Case) -> list[memwrap.MemoryState]:
    """States after each segment, read one at a time; a short one is closed by request."""
    ids, mask = case.tensors["input_ids"], case.tensors.get("attention_mask")
    state, states = model.new_state(ids.shape[0]), []
    for columns in segments_of(case):
        part = None if mask is None else mask[:, columns]
        state = model.read(ids[:, columns], part, state=state)
        state = model.close_segment(state)
        states.append(state)
    return states


def logits_of(model: Any, case: Case) -> Tensor:
    """Logits of the whole text; where the case's mask is 0 the reference's own are put in.

    The original also computes logits at padding; ours are zeros, and nobody reads either.
    """
    mask = case.tensors.get("attention_mask")
    with torch.no_grad():
        logits = model(case.tensors["input_ids"], attention_mask=mask).logits
    if mask is None:
        return logits
    return torch.where(mask[..., None].bool(), logits, case.tensors["out.logits"])


def generated_by(model: Any, case: Case) -> Tensor:
    """Greedy new tokens, the last segment left open, as the published code generates."""
    ids = case.tensors["input_ids"]
    out = model.generate(
        ids, remember=False, do_sample=False, eos_token_id=None, pad_token_id=0,
        max_new_tokens=case.settings["max_new_tokens"],
    )  # fmt: skip
    return out[:, ids.shape[1] :]
