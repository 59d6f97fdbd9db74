"""Forgeries: files with right checksums and seals, as only somebody who means harm makes them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attacks import Attack, clear
from forged_stores import disk_stores, exact_stores, libraries, recipes
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from memwrap.io.checksums import checksums
from memwrap.model.weight_files import seal

NAN, HUGE = float("nan"), 2**62


def forgeries(target: str, whole: Path, port: int) -> list[Attack]:
    kind = target.partition("-")[0]
    if kind == "state":
        return states(whole / "state.safetensors")
    if kind == "server":
        return [*states(whole / "first.safetensors"), *strangers()]
    if kind in ("model", "export"):
        return models(target, whole, port)
    if target == "store-torch":
        return exact_stores(whole)
    if kind == "store":
        return disk_stores(whole, port)
    if kind == "library":
        return libraries(whole)
    return recipes(port)


# States

Tensors = dict[str, Tensor]


def forged_state(folder: Path, file: str, edit: Callable[[Tensors, dict[str, Any]], None]) -> None:
    path = folder / file
    with safe_open(path, framework="pt") as opened:
        metadata = dict(opened.metadata())
    tensors, about = load_file(path), json.loads(metadata["about"])
    edit(tensors, about)
    metadata["about"] = json.dumps(about)
    metadata |= checksums(tensors, about=metadata["about"])
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata=metadata)


def shapes_of(tensor: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Changes of a tensor's shape and dtype, each dimension's among them."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "another dtype": _other_dtype,
        "a dimension more": lambda t: t[None],
        "a row more": lambda t: torch.cat([t, t[:1]]),
        "no dimension": lambda t: t.flatten()[0],
        "complex numbers": lambda t: t.float().to(torch.complex64),
        "a flat tensor": lambda t: t.flatten()[None],
    }
    for place in range(tensor.dim()):
        changes |= {
            f"dimension {place} shorter": lambda t, d=place: t.narrow(d, 0, t.shape[d] - 1),
            f"the first of dimension {place} gone": lambda t, d=place: t.narrow(
                d, 1, t.shape[d] - 1
            ),
            f"dimension {place} empty": lambda t, d=place: t.narrow(d, 0, 0),
            f"dimension {place} gone": lambda t, d=place: t.select(d, 0),
            f"a dimension behind {place}": lambda t, d=place: t.unsqueeze(d + 1),
        }
    return changes


def states(path: Path) -> list[Attack]:
    """Attacks on a state: on each of its tensors, and on what they say together."""
    found, file = [], path.name

    def forge(name: str, edit: Callable[[Tensors, dict[str, Any], random.Random], None]) -> None:
        def apply(folder: Path, other: Path, outside: Path, chance: random.Random) -> None:
            forged_state(folder, file, lambda tensors, about: edit(tensors, about, chance))

        found.append(Attack(f"{file}, forged: {name}", apply))

    for name, tensor in sorted(load_file(path).items()):
        for what, change in shapes_of(tensor).items() if tensor.numel() else ():
            forge(f"{name}: {what}", lambda t, a, c, n=name, f=change: t.update({n: f(t[n])}))
        forge(f"{name}: not there", lambda t, a, c, n=name: t.pop(n))
    for value in (NAN, float("inf")):
        forge(f"{value} in every float", lambda t, a, c, v=value: t.update(
            {n: torch.full_like(x, v) for n, x in t.items() if x.is_floating_point()}))  # fmt: skip
    for number in (-1, -HUGE, HUGE, 1000):
        for name in ("fill", "segments", "tokens_seen", "open_positions"):
            forge(f"{name} {number}", lambda t, a, c, n=name, v=number: t.update(
                {f"rows.{n}": torch.full_like(t[f"rows.{n}"], v)}))  # fmt: skip
        forge(f"every whole number of the memory {number}", lambda t, a, c, v=number: t.update(
            {n: torch.full_like(x, v) for n, x in t.items()
             if n.startswith("memories.") and x.dtype == torch.long} or {"strange": torch.ones(1)}
        ))  # fmt: skip
        if number != 1000:  # so much padding can have been read
            forge(f"columns {number}", lambda t, a, c, v=number: a.update(columns=v))
    for key, value in {
        "columns": "7",
        "hold_open": 1,
        "signature": {},
        "memories": {},
        "weights": {"x": "y"},
    }.items():
        forge(f"{key} is {value!r}", lambda t, a, c, k=key, v=value: a.update({k: v}))
    long = "x" * 10**6
    for name, edit in {
        "no backbone in the signature": lambda s: s.pop("backbone"),
        "a memory's name without end": lambda s: s["memories"][0].update(name=long),
        "a setting without end": lambda s: s["memories"][0].update(segment_size=long),
        "a backbone without end": lambda s: s["backbone"].update(model_type=long),
        "adapters without end": lambda s: s.update(adapters=[long]),
        "a memory twice": lambda s: s["memories"].append(s["memories"][0]),
    }.items():
        forge(name, lambda t, a, c, f=edit: f(a["signature"]))
    forge("columns is 1e400", lambda t, a, c: a.update(columns=10**400))
    forge("another memory's name", lambda t, a, c: a.update(
        memories={"../../x": 1}, signature={"memories": [{"name": "../../x"}]}))  # fmt: skip
    for name in ("memories.strange.x", "open.strange", "rows.strange", "elsewhere.x", "memories"):
        forge(f"the tensor {name} more", lambda t, a, c, n=name: t.update({n: torch.ones(1, 2)}))
    forge("nothing at all", lambda t, a, c: t.clear())
    forge("half of the open segment not there", lambda t, a, c: t.update(
        {"rows.open_valid": torch.zeros_like(t["rows.open_valid"])}))  # fmt: skip
    return found


def strangers() -> list[Attack]:
    """Things in a server's folder that are no states: what it serves stays the same."""

    def beside(name: str, make: Callable[[Path], Any]) -> Attack:
        def apply(folder: Path, other: Path, outside: Path, chance: random.Random) -> None:
            make(folder / name)

        return Attack(f"{name}: beside the states", apply)

    return [
        *(beside(name, lambda p: p.write_bytes(b"x" * 99)) for name in (
            ".hidden.safetensors", "-dash.safetensors", "a b.safetensors", "index.json",
            "x" * 200 + ".safetensors", "first.safetensors.json", "\u202efirst.safetensors",
            "first.SAFETENSORS",
        )),
        beside("third.safetensors", Path.mkdir),
        beside("pipe.safetensors", lambda p: os.mkfifo(p)),
        beside("link.safetensors", lambda p: p.symlink_to("nowhere.safetensors")),
        beside(".first.safetensors.0.tmp", Path.mkdir),
    ]  # fmt: skip


def _other_dtype(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64 if tensor.dtype != torch.float64 else torch.float32)


# Models


def on_config(name: str, edit: Callable[[dict[str, Any]], Any], *, sealed: bool = True) -> Attack:
    def apply(folder: Path, other: Path, outside: Path, chance: random.Random) -> None:
        clear(outside)
        path = folder / "config.json"
        values = json.loads(path.read_text())
        before = values.pop("sealed", None)
        edit(values)
        path.write_text(json.dumps(values))
        if sealed and before is not None:
            seal(folder, before["marks"])

    return Attack(f"config.json, forged: {name}", apply)


def nested(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        values = values[int(key)] if isinstance(values, list) else values.setdefault(key, {})
    values[last] = value


BOMBS = ("(a+)+$", "(.*)*x", "^(([a-z_])+.)+[A-Z]([a-z])+$", "(q_proj|q_proj)+", ".*" * 20)
CONFIGS: dict[str, list[Any]] = {
    "memories.0.segment_size": [-8, 2**62, 0, 8.5, "8", None, True],
    "memories.0.name": ["../x", "armt\u202e", "", 3, None, "__init__", "os.system", "nonesuch"],
    "memories.0.layers": [[10**9], [-3], "all", [0.5], {"0": 1}],
    "memories.0.strange": [1],
    "memories": [[], 3, {}, [[]], ["rmt"], None, [{"name": "rmt"}] * 3],
    "backbone": [None, {}, 3, {"model_type": "hal9000"}, {"model_type": ["llama"]}],
    "backbone.model_type": ["../llama", "gpt2", "memwrap", "t5", "\u0000"],
    "backbone.vocab_size": [2**40, 10**9, -1, 0, "64", 3],
    "backbone.hidden_size": [2**40, 10**6, -32, 0, None],
    "backbone.num_hidden_layers": [10**9, 10**6, -1, 5000],
    "backbone.intermediate_size": [2**40, -1],
    "backbone.num_attention_heads": [0, -4, 10**9, 3],
    "backbone.num_key_value_heads": [0, 10**9, 3],
    "backbone.max_position_embeddings": [2**50],
    "backbone.head_dim": [2**40, -8],
    "backbone.layer_types": [["x"] * 10, "full_attention"],
    "backbone.dtype": ["float1000", "os", 3, "int8"],
    "backbone.rope_parameters": [3, {"rope_type": "x"}],
    "backbone.attn_implementation": ["kernels-community/flash-attn", "flash_attention_2"],
    "backbone._attn_implementation": ["kernels-community/evil"],
    "backbone.quantization_config": [{"quant_method": "bitsandbytes"}, {"quant_method": "x"}],
    "backbone.rms_norm_eps": ["x"],
    "backbone.sliding_window": [-5, "x"],
    "backbone.pad_token_id": [10**9, -7],
    "backbone.hidden_act": ["../x", "os.system", 3],
    "backbone.attention_dropout": [7.0, -1.0],
    "backbone.initializer_range": ["x"],
    "backbone.num_labels": [10**9],
    "backbone.id2label": [3, {"x": [1]}],
    "backbone.auto_map": [{"AutoConfig": "evil/repo--x.Y"}],
    "backbone.is_encoder_decoder": [True],
    "backbone.text_config": [{"model_type": "llama", "vocab_size": 2**40}],
    "backbone.tie_word_embeddings": [True, "x"],
    "backbone.pretraining_tp": [0],
    "auto_map": [{"AutoModelForCausalLM": "evil/repo--x.Y"}],
    "adapter_switches": [3, {"strange": 1}, {"merged": ["x"]}, {"active": [[]]}],
    "base_fingerprint": [3, ["x"]],
    "sealed_again": [1],
    "attn_implementation": ["kernels-community/evil"],
    "model_type": ["llama", None, "MEMWRAP", 3],
    "adapters": [3, [], {"default": 3}, {"default": {}}, {"default": {"peft_type": "NONE"}}],
    "base_included": ["yes"],
}  # fmt: skip
ADAPTER = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]}


def models(target: str, whole: Path, port: int) -> list[Attack]:
    found = [
        on_config(f"{key} = {str(value)[:30]}", lambda c, k=key, v=value: nested(c, k, v), sealed=s)
        for key, values in CONFIGS.items() for value in values for s in (True, False)
    ]  # fmt: skip
    places = ("/etc", "/nonesuch/model", "../../outside", f"http://127.0.0.1:{port}/model",
              f"file:///etc#{port}", "~/model", "a/b/c", "\\\\server\\share", ".", "")  # fmt: skip
    if target in ("model", "model-with-store"):
        found += [
            on_config(f"an adapter for {bomb}", lambda c, b=bomb: c.update(
                adapters={"default": ADAPTER | {"target_modules": b}})) for bomb in BOMBS
        ]  # fmt: skip
        for key, value in {
            "r": 10**9,
            "lora_alpha": "x",
            "rank_pattern": {"(a+)+$": 3},
            "exclude_modules": "(a+)+$",
            "layers_pattern": "(a+)+$",
            "init_lora_weights": "pissa",
            "megatron_core": "os",
            "megatron_config": {"a": 1},
            "modules_to_save": ["lm_head"] * 9,
            "target_parameters": ["a.b"],
            "strange": 3,
            "peft_type": "PROMPT_TUNING",
            "auto_mapping": {"parent_library": "os", "base_model_class": "x"},
        }.items():
            found.append(on_config(f"an adapter with {key} = {value}", lambda c, k=key, v=value: (
                c.update(adapters={"default": ADAPTER | {k: v}}))))  # fmt: skip
    if target == "model-with-store":
        urls = [f"postgresql://u:secret@127.0.0.1:{port}/x", f"postgres://127.0.0.1:{port}/x",
                f"redis://127.0.0.1:{port}", f"https://127.0.0.1:{port}/"]  # fmt: skip
        for place in (*places[:3], *urls, "knnlm_store/../../outside", "./../..", 7):
            found.append(on_config(f"the store {place}", lambda c, p=place: nested(
                c, "memories.0.store", p)))  # fmt: skip
        found.append(Attack("knnlm_store: a link out", _store_link))
    found += [forged_weights(name, edit) for name, edit in WEIGHTS.items()]
    for name, tensor in sorted(load_file(sorted(whole.glob("model*.safetensors"))[0]).items()):
        for what, change in shapes_of(tensor).items():
            found.append(forged_weights(f"{name}: {what}", lambda t, n=name, f=change: t.update(
                {n: f(t[n])})))  # fmt: skip
        found.append(forged_weights(f"{name}: not there", lambda t, n=name: t.pop(n)))
    if target == "model-in-shards":
        for name in ("../outside/x.safetensors", "/etc/passwd", "x\u0000", "sub/../../x", 3, None,
                     "model.safetensors", f"http://127.0.0.1:{port}/x.safetensors"):  # fmt: skip
            found.append(forged_index(name))
    found.append(Attack("code beside it, and auto_map", _code))
    return found


def _store_link(folder: Path, other: Path, outside: Path, chance: random.Random) -> None:
    clear(outside)
    (folder / "knnlm_store").rename(outside / "store")
    (folder / "knnlm_store").symlink_to(outside / "store")


def _code(folder: Path, other: Path, outside: Path, chance: random.Random) -> None:
    """Files of code that the config names, as an export has; nobody asked to trust them."""
    clear(outside)
    evil = f"import os\nos.mkdir({str(outside / 'CODE-RAN')!r})\n"
    for name in ("modeling_memwrap.py", "configuration_memwrap.py", "sitecustomize.py"):
        (folder / name).write_text(evil)


def forged_index(place: Any) -> Attack:
    def apply(folder: Path, other: Path, outside: Path, chance: random.Random) -> None:
        path = folder / "model.safetensors.index.json"
        values = json.loads(path.read_text())
        values["weight_map"][sorted(values["weight_map"])[0]] = place
        path.write_text(json.dumps(values))

    return Attack(f"index, forged: a tensor in {place!r}", apply)


def _first(tensors: Tensors, prefix: str) -> str:
    names = sorted(n for n in tensors if n.startswith(prefix)) or sorted(tensors)
    return names[0]


def _change(prefix: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        if name := (_first(tensors, prefix) if tensors else ""):
            tensors[name] = change(tensors[name])
        else:
            tensors["strange"] = torch.ones(1)

    return edit


WEIGHTS: dict[str, Callable[[Tensors], None]] = {
    "nan in a memory": _change("memory_modules.", lambda t: torch.full_like(t, NAN)),
    "infinite numbers": _change("backbone.", lambda t: torch.full_like(t, float("inf"))),
    "whole numbers": _change("", lambda t: t.long()),
    "complex numbers": _change("", lambda t: t.to(torch.complex64)),
    "another shape": _change("memory_modules.", lambda t: t[None]),
    "a shape that would spread": _change("", lambda t: t.flatten()[:1]),
    "a tensor more": lambda t: t.update(strange=torch.ones(1)),
    "a tensor too few": lambda t: t.pop(_first(t, ""), None) if t else t.update(x=torch.ones(1)),
    "none at all": lambda t: t.clear() if t else t.update(x=torch.ones(1)),
    "a hidden name": lambda t: t.update({"backbone.__class__": torch.ones(1)}),
}


def forged_weights(name: str, edit: Callable[[Tensors], None]) -> Attack:
    def apply(folder: Path, other: Path, outside: Path, chance: random.Random) -> None:
        path = sorted(folder.glob("model*.safetensors"))[0]
        tensors = load_file(path)
        edit(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, path,
                  metadata={"format": "pt"} | checksums(tensors))  # fmt: skip
        values = json.loads((folder / "config.json").read_text())
        if "sealed" in values:
            seal(folder, values["sealed"]["marks"])

    return Attack(f"weights, forged: {name}", apply)
