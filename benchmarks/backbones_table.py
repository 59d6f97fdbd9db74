"""Tries one memory of every place on every causal LM of the installed transformers, tiny, and
writes docs/backbones.md.

    python benchmarks/backbones_table.py            # those not tried yet; the rest stay
    python benchmarks/backbones_table.py all        # all, some 30 minutes on one core
    python benchmarks/backbones_table.py llama glm  # these alone
    python benchmarks/backbones_table.py none       # writes the page alone

Some models that see are built only where timm and torchvision are installed.
"""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import logging
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from memwrap.backbones.auto_classes import OneClass
from memwrap.cli.small_models import small_model
from memwrap.cli.trying import QUICK, builder, try_memory

# The first memory of every place, and what it stands for.
PLACES = {
    "rmt": "prompt", "armt": "layer", "window": "attention, keys and values",
    "infini": "attention, a sum", "landmark": "attention, tokens inserted", "knnlm": "logits",
}  # fmt: skip
# Those that people fine-tune most, and their types.
THIRTY = {
    "Llama 2 and 3, SmolLM2, Yi, R1-Distill": "llama", "Llama 4": "llama4 llama4_text",
    "Mistral, Nemo": "mistral", "Mixtral": "mixtral",
    "Mistral Small 3, Ministral": "mistral3 ministral3",
    "Qwen 2 and 2.5": "qwen2 qwen2_moe", "Qwen 3": "qwen3 qwen3_moe", "Qwen3-Next": "qwen3_next",
    "Qwen 3.5": "qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text",
    "Qwen2-VL, 2.5-VL, 3-VL": "qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe",
    "Gemma, Gemma 2": "gemma gemma2", "Gemma 3": "gemma3 gemma3_text",
    "Gemma 3n": "gemma3n gemma3n_text", "Gemma 4": "gemma4 gemma4_text",
    "Phi-3, Phi-3.5, Phi-4": "phi3", "Phi-4 multimodal": "phi4_multimodal", "gpt-oss": "gpt_oss",
    "DeepSeek V2": "deepseek_v2", "DeepSeek V3, R1": "deepseek_v3",
    "GLM-4": "glm glm4", "GLM-4.5 and 4.7": "glm4_moe glm4_moe_lite",
    "Command-R, Command A": "cohere cohere2",
    "Granite 3 and 4": "granite granitemoe granitemoehybrid", "Falcon-H1": "falcon_h1",
    "Nemotron": "nemotron nemotron_h", "SmolLM3, SmolVLM": "smollm3 smolvlm",
    "OLMo 2 and 3": "olmo2 olmo3", "LFM2": "lfm2 lfm2_moe lfm2_vl",
    "Llava, InternVL, PaliGemma": "llava llava_next internvl paligemma",
    "GPT-2, Pythia": "gpt2 gpt_neox",
}  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "backbones.json"
PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
_UNTRIED = "not tried with this transformers"
_MIXED = ["linear_attention", "full_attention"] * 2


def _axes(*section: int) -> dict[str, Any]:
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)}
    return {"text_config": {"rope_parameters": rotary, "head_dim": 128}}


_ROTARY = {"rope_type": "default", "rope_theta": 1e4}
_BY_KIND = {"full_attention": _ROTARY, "sliding_attention": _ROTARY}
_INDEXED = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}  # fmt: skip
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
    "zamba": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "n_mamba_heads": 2,
        "mamba_d_state": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
    },
    "zamba2": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "n_mamba_heads": 8,
        "mamba_d_state": 8,
        "num_attention_heads": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
    },
    "rwkv": {"hidden_size": 64, "attention_hidden_size": 64},
    "xlstm": {"hidden_size": 64, "num_heads": 4, "num_hidden_layers": 2},
    "xmod": {"default_language": "en_XX"},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "chameleon": {"vocabulary_map": {"<image>": 250, "IMGIMGBS": 251}},
    "cohere_compass_text": {"rope_parameters": _BY_KIND},
    "cohere_compass": {"text_config": {"rope_parameters": _BY_KIND}},
    "hunyuan_vl": _axes(16, 24, 24),
    "granite4_vision": {"deepstack_layer_map": [], "downsample_rate": "1/2"},
    "qwen4_exp_text": _INDEXED,
    "qwen4_exp": {"text_config": _INDEXED},
    "glm5_next": {"text_config": {"index_kpool": 1}},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "perception_lm": {
        "vision_config": {"architecture": "test_vit", "model_args": {"embed_dim": 64, "depth": 2}}
    },
    "step3p7": {"text_config": {"sliding_window": 512}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] * 12}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    },
}


def class_names() -> dict[str, str]:
    """Name the class of every model type, as the installed transformers says: that of text, where
    it has one."""
    text = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) | text


def tried(name: str, kind_name: str) -> dict[str, Any]:
    """Try the memories on one architecture."""
    text = name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    try:
        config, kind = CONFIG_MAPPING[name](**OWN.get(name, {})), getattr(transformers, kind_name)
        part = config.get_text_config(decoder=True)
        if not isinstance(config, kind.config_class) and isinstance(part, kind.config_class):
            config = part  # the class is that of the text alone
        if text and "is_decoder" in vars(config):
            config.is_decoder = True  # encoders of text are read as causal LMs with this alone
        build = builder(lambda: small_model(config, auto=OneClass(kind)))
        row: dict[str, Any] = {"class": type(build()).__name__}
    except Exception as error:  # of a foreign architecture, of every kind
        return {"problem": _one_line(str(error))}
    row["trials"] = {}
    for memory in PLACES:
        # Generation and files know no memory by its place: two of them are enough.
        checks = None if memory in ("rmt", "window") else QUICK
        trial = asdict(try_memory(memory, build, checks))
        trial["problem"] = _one_line(trial["problem"])
        row["trials"][trial.pop("memory")] = trial
    return row


def _one_line(problem: str) -> str:
    return " ".join(re.sub(r"/\S*/", "", problem).split())[:300]


def page(rows: dict[str, Any]) -> str:
    """Write the page of what was tried."""
    counts: Counter[str] = Counter()
    notes: dict[str, int] = {}
    kinds, cells = class_names(), {}
    for name, kind in sorted(kinds.items()):
        cells[name] = [_cell(rows.get(name, {}), kind, memory, notes) for memory in PLACES]
        counts.update(cell.partition(" [")[0] for cell in cells[name])
    lines = [
        f"| `{n}` | {kinds[n]} | " + " | ".join(_short(own)) + " |" for n, own in cells.items()
    ]
    most = []
    for family, names in THIRTY.items():
        each = zip(*(cells[name] for name in names.split()), strict=True)
        of_all = [own[0] if len(set(own)) == 1 else _differing(names.split(), own) for own in each]
        shown = ", ".join(f"`{name}`" for name in names.split())
        most.append(f"| {family} | {shown} | " + " | ".join(_short(of_all)) + " |")
    total = ", ".join(f"{n} {result}" for result, n in counts.most_common())
    head = " | ".join(f"`{memory}` ({place})" for memory, place in PLACES.items())
    described = (
        f"{len(lines)} model types of transformers {transformers.__version__}, {len(PLACES)} "
        f"memories each: {total}."
    )
    listed = [f"{number}. {_plain(reason)}" for reason, number in notes.items()]
    line = "|---|---|" + "---|" * len(PLACES)
    return "\n".join(
        [
            *_HEAD, "## The thirty that are fine-tuned most", "",
            f"| family | types | {head} |", line, *most, "", "## All", "", described, "",
            f"| type | class | {head} |", line, *lines, "", "## Notes", "", *listed, "",
        ]
    )  # fmt: skip


def _cell(row: dict[str, Any], kind: str, memory: str, notes: dict[str, int]) -> str:
    """Write the result of a memory on a type, with the number of what is to be said."""
    trial = row.get("trials", {}).get(memory)
    result = "not tried" if trial is None else trial["result"]
    reason = row.get("problem", _UNTRIED) if trial is None else trial["problem"]
    reason = reason.replace(kind, "The model")
    return f"{result} [{notes.setdefault(reason, len(notes) + 1)}]" if reason else result


def _short(cells: list[str]) -> list[str]:
    same = len(set(cells)) == 1 and len(cells[0]) > 5
    return [cells[0], *["\u2033"] * (len(cells) - 1)] if same else cells


def _differing(names: list[str], cells: tuple[str, ...]) -> str:
    """Name the types whose results are others than right."""
    others = [f"`{n}` {cell}" for n, cell in zip(names, cells, strict=True) if cell != "right"]
    return "right, but " + ", ".join(others)


def _plain(reason: str) -> str:
    return reason.replace("|", "/").replace("<", "‹").replace(">", "›").replace("_", "\\_")


_HEAD = """# Backbones

Every causal LM of transformers, and every class that reads pictures and writes text, is built tiny
and random from its default config. One memory of every place is put on it: its logits against the
base's, a text whole against in pieces, padded on the left against alone, gradients, and with `rmt`
and `window` generation, and saving and loading. Written by `python benchmarks/backbones_table.py`;
`memwrap doctor --model NAME` tries all memories on the architecture of a config.

- **right**: all of these agree, within a thousandth of the logits' scale.
- **limit**: right, and what the note says is to be known.
- **refused**: `wrap` says so, as in the note.
- **wrong**: what the note says goes wrong.
- **not tried**: no tiny model of the default config reads text, or the class was not built yet.

Of models that see and hear, text is read; pictures and sound are refused. Where a model looks at
the ids of what it reads beside their embeddings (Gemma 3n and 4: embeddings of every layer), memory
tokens count as padding there, as pictures do. What differs in float32 is tried in float64, too.
A wrapped Gemma 3, Gemma 4, gpt-oss, DeepSeek V3, GLM-4, Command-R, Granite 4 H, Bamba, Falcon-H1,
Nemotron-H, Qwen3-Next, Qwen 3.5 and a model with code of its own are trained, generate, and load in
a fresh process in `tests/integration/test_show.py`.

""".splitlines()


def main(wanted: list[str]) -> None:
    """Try what is wanted, and write the page."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name, kind_name in class_names().items():
        if name in rows if not wanted else not {name, "all"} & set(wanted):
            continue
        start = time.perf_counter()
        rows[name] = tried(name, kind_name)
        print(f"{name} {time.perf_counter() - start:.1f} s", flush=True)
        for memory, trial in rows[name].get("trials", {}).items():
            print(f"    {memory:9} {trial['result']:8} {trial['problem'][:230]}", flush=True)
        if "problem" in rows[name]:
            print("    ", rows[name]["problem"], flush=True)
        RESULTS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
