"""Tries one memory of every place on every causal LM of the installed transformers, tiny, and
writes docs/backbones.md.

    python benchmarks/backbones_table.py            # all, some 20 minutes on one core
    python benchmarks/backbones_table.py llama glm  # these alone; the other rows stay
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from memwrap.cli.small_models import small_model
from memwrap.cli.trying import builder, try_memory

MEMORIES = ("rmt", "armt", "window", "infini", "landmark", "knnlm")
RESULTS = Path(__file__).parent / "results" / "backbones.json"
_MIXED = ["linear_attention", "full_attention"] * 2


def _axes(*section: int) -> dict[str, Any]:
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)}
    return {"text_config": {"rope_parameters": rotary, "head_dim": 128}}


# What default configs lack.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": _MIXED, "num_hidden_layers": 4},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 8},
    **dict.fromkeys(("glm4v", "glm46v", "glm_ocr", "glmga"), _axes(16, 24, 24)),
    "glm4v_moe": _axes(8, 12, 12),
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
}


def names() -> dict[str, Any]:
    """List the model types with the auto class that builds each."""
    from transformers.models.auto import modeling_auto as auto

    text = dict.fromkeys(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM)
    return (
        dict.fromkeys(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText)
        | text
    )


def tried(name: str, auto: Any) -> dict[str, Any]:
    """Try the memories on one architecture."""
    try:
        config = CONFIG_MAPPING[name](**OWN.get(name, {}))
        if auto is AutoModelForCausalLM and "is_decoder" in vars(config):
            config.is_decoder = True  # encoders of text are read as causal LMs with this alone
        build = builder(lambda: small_model(config, auto=auto))
        row: dict[str, Any] = {"class": type(build()).__name__}
    except Exception as error:
        return {"class": "", "problem": " ".join(str(error).split())[:300]}
    row["trials"] = {}
    for memory in MEMORIES:
        trial = asdict(try_memory(memory, build))
        row["trials"][trial.pop("memory")] = trial
    return row


def main(wanted: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name, auto in names().items():
        if wanted and name not in wanted:
            continue
        start = time.perf_counter()
        rows[name] = tried(name, auto)
        print(f"{name} {time.perf_counter() - start:.1f} s", flush=True)
        for memory, trial in rows[name].get("trials", {}).items():
            print(f"    {memory:9} {trial['result']:8} {trial['problem'][:230]}", flush=True)
        if "problem" in rows[name]:
            print("    ", rows[name]["problem"], flush=True)
        RESULTS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
