"""The model card of an exported checkpoint."""

from __future__ import annotations

from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from typing import Any

import yaml

from memwrap.evaluation import report
from memwrap.io.reading import read_json
from memwrap.io.yaml_files import read_yaml
from memwrap.model.memory_model import MemoryModelForCausalLM


def about_run(folder: Path) -> dict[str, Any]:
    """Describe a model by its run's folder: the data, the steps, the measured tables.

    Args:
        folder: output of `memwrap train`; files that are not there tell nothing.
    """
    about: dict[str, Any] = {}
    recipe = _read(folder / "recipe.yaml")
    data = recipe.get("data") or {}
    if recipe.get("recall"):
        about["data"] = "associative recall made by memwrap"
    elif data.get("source"):
        about["data"] = f"{data['source']} ({data.get('split') or 'all'})"
    run = _read(folder / "run.json")
    trainer = recipe.get("trainer") or {}
    if run.get("steps") and data.get("max_tokens") and trainer.get("batch_size"):
        rows = run["steps"] * trainer["batch_size"] * (trainer.get("accumulation") or 1)
        about["tokens"] = rows * data["max_tokens"]
        about["notes"] = "\nThe number of tokens is the most that the recipe feeds."
    if run.get("command"):
        about["notes"] = f"\nTrained by `{run['command']}`.{about.get('notes', '')}"
    results = {p.name: report.load_result(p) for p in sorted(folder.glob("eval/*.json"))}
    if results:
        about["results"] = report.markdown(report.rows(results))
    return about


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values = read_json(path) if path.suffix == ".json" else read_yaml(path)
    return values if isinstance(values, dict) else {}


def foreign_packages(model: MemoryModelForCausalLM) -> list[str]:
    """List the top-level packages, other than memwrap, that the model's memories come from."""
    modules = (type(memory).__module__ for memory in model.memories.values())
    return sorted({module.partition(".")[0] for module in modules} - {"memwrap"})


def _licensed(package: str) -> str:
    """Add what the installed metadata says: `ema_memory (ema-memory 0.1, MIT)`."""
    names = packages_distributions().get(package)
    if not names:
        return f"{package} (look up its licence)"
    about = distribution(names[0]).metadata.json
    licence = about.get("license_expression") or about.get("license") or "look up its licence"
    return f"{package} ({about['name']} {about['version']}, {licence})"


def card(
    model: MemoryModelForCausalLM, about: dict[str, Any], name: str, *, tokenizer: bool = True
) -> str:
    """Write Markdown with the Hub's YAML head.

    Args:
        model: what is exported.
        about: `licence`, `data`, `tokens`, `results` (Markdown) and `notes`; what is missing is
            said to be unknown.
        name: of the folder.
        tokenizer: whether one is saved beside the model.
    """
    kinds = ["AutoModelForCausalLM", *(["AutoTokenizer"] if tokenizer else [])]
    loading = "\n".join(
        f'{variable} = {kind}.from_pretrained("{name}", trust_remote_code=True)'
        for variable, kind in zip(("model", "tokenizer"), kinds, strict=False)
    )
    base = model.config.base_model or "unknown"
    licence = about.get("licence")
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if licence:
        head["license"] = licence
    if model.config.base_model:
        head["base_model"] = base
    head["tags"] = ["memwrap", *[c.name for c in model.memory_configs]]
    settings = "\n".join(
        f"| `{config.name}` | `{key}` | `{value}` |"
        for config in model.memory_configs
        for key, value in config.to_dict().items()
        if key != "name"
    )
    code = " and ".join(["memwrap (Apache-2.0)", *map(_licensed, foreign_packages(model))])
    tokens = about.get("tokens")
    trained = f"{tokens:,} tokens" if isinstance(tokens, int) else "an unknown number of tokens"
    return (
        f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {name}

{base} with {", ".join(c.name for c in model.memory_configs)}, exported by memwrap
{model.config.memwrap_version or ""}. It loads with transformers alone:

```python
from transformers import {", ".join(kinds)}

{loading}
```

The Python files beside the weights are modules of {code}, cut to what this
model needs. `memwrap.load("{name}")` loads it too.

- Base model: {base}
- Licence of the weights: {licence or "that of the base model; look it up there"}
- Trained on: {about.get("data", "unknown data")}, {trained}

| memory | setting | value |
| --- | --- | --- |
{settings}

## Measured

{about.get("results") or "Nothing was recorded beside this checkpoint."}
{about.get("notes", "")}""".rstrip()
        + "\n"
    )
