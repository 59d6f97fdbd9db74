"""Tries one memory of every place on every causal LM of the installed transformers, tiny, and
writes docs/backbones.md.

    python benchmarks/backbones_table.py            # those not tried yet; the rest stay
    python benchmarks/backbones_table.py all        # all, some 30 minutes on one core
    python benchmarks/backbones_table.py llama glm  # these alone
    python benchmarks/backbones_table.py none       # writes the page alone
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
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, logging
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from memwrap.cli.small_models import small_model
from memwrap.cli.trying import QUICK, builder, try_memory

# The first memory of every place, and what it stands for.
PLACES = {
    "rmt": "prompt", "armt": "layer", "window": "attention, keys and values",
    "infini": "attention, a sum", "landmark": "attention, tokens inserted", "knnlm": "logits",
}  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "backbones.json"
PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
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
    """List the model types with the auto class that builds each: those of text first."""
    text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    seeing = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    found: dict[str, Any] = dict.fromkeys(text, AutoModelForCausalLM)
    return found | {name: AutoModelForImageTextToText for name in seeing if name not in text}


def class_names() -> dict[str, str]:
    """Name the class of every model type, as the installed transformers says."""
    text = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) | text


def tried(name: str, auto: Any) -> dict[str, Any]:
    """Try the memories on one architecture."""
    try:
        config = CONFIG_MAPPING[name](**OWN.get(name, {}))
        if auto is AutoModelForCausalLM and "is_decoder" in vars(config):
            config.is_decoder = True  # encoders of text are read as causal LMs with this alone
        build = builder(lambda: small_model(config, auto=auto))
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
    lines = []
    for name, kind in sorted(class_names().items()):
        row = rows.get(name, {"problem": "not tried with this transformers"})
        cells = []
        for memory in PLACES:
            trial = row.get("trials", {}).get(memory)
            result = "not tried" if trial is None else trial["result"]
            reason = row["problem"] if trial is None else trial["problem"]
            reason = reason.replace(kind, "The model")
            counts[result] += 1
            note = f" [{notes.setdefault(reason, len(notes) + 1)}]" if reason else ""
            cells.append(f"{result}{note}")
        same = len(set(cells)) == 1
        shown = [cells[0], *["\u2033"] * (len(cells) - 1)] if same and len(cells[0]) > 5 else cells
        lines.append(f"| `{name}` | {kind} | " + " | ".join(shown) + " |")
    total = ", ".join(f"{n} {result}" for result, n in counts.most_common())
    head = " | ".join(f"`{memory}` ({place})" for memory, place in PLACES.items())
    described = (
        f"{len(lines)} model types of transformers {transformers.__version__}, {len(PLACES)} "
        f"memories each: {total}."
    )
    listed = [f"{number}. {_plain(reason)}" for reason, number in notes.items()]
    return "\n".join(
        [
            *_HEAD, described, "", f"| type | class | {head} |",
            "|---|---|" + "---|" * len(PLACES), *lines, "", "## Notes", "", *listed, "",
        ]
    )  # fmt: skip


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
""".splitlines()


def main(wanted: list[str]) -> None:
    """Try what is wanted, and write the page."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name, auto in names().items():
        if name in rows if not wanted else not {name, "all"} & set(wanted):
            continue
        start = time.perf_counter()
        rows[name] = tried(name, auto)
        print(f"{name} {time.perf_counter() - start:.1f} s", flush=True)
        for memory, trial in rows[name].get("trials", {}).items():
            print(f"    {memory:9} {trial['result']:8} {trial['problem'][:230]}", flush=True)
        if "problem" in rows[name]:
            print("    ", rows[name]["problem"], flush=True)
        RESULTS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
