"""AHN checkpoints as they are published: names, shapes and config keys, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import refused
from torch import Tensor

import memwrap
from memwrap.testing.families import build
from memwrap.testing.helpers import assert_close, assert_same_states, ids

FORMS = {"GatedDeltaNet": "gated_delta", "DeltaNet": "delta", "Mamba2": "gated"}
OURS = {
    "b_proj.weight": "write", "dt_proj.weight": "write", "a_proj.weight": "forget",
    "A_log": "rate", "dt_bias": "bias", "g_proj.weight": "read", "g_proj.bias": "read_bias",
    "o_norm.weight": "norm", "norm.weight": "norm", "o_proj.weight": "out",
}  # fmt: skip


def published(form: str, heads: int, width: int, hidden: int) -> dict[str, Tensor]:
    """The tensors of one layer, in bfloat16 as they are saved, but for those of the decay."""
    make = torch.Generator().manual_seed(hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "g_proj.weight": (heads, hidden), "o_proj.weight": (heads, width, width),
    }  # fmt: skip
    if form == "Mamba2":
        shapes |= {
            "dt_proj.weight": (heads, hidden), "dt_proj.bias": (heads,), "g_proj.bias": (heads,),
            "norm.weight": (heads * width,),
        }  # fmt: skip
    else:
        shapes |= {"b_proj.weight": (heads, hidden), "o_norm.weight": (width,)}
    if form == "GatedDeltaNet":
        shapes |= {"a_proj.weight": (heads, hidden), "D": (heads,)}
    made = {n: torch.randn(s, generator=make).bfloat16() for n, s in shapes.items()}
    if form != "DeltaNet":
        made |= {n: torch.rand(heads, generator=make) for n in ("A_log", "dt_bias")}
    return made


def make_folder(folder: Path, base: Any, form: str = "GatedDeltaNet", **about: Any) -> Path:
    """A checkpoint for the base as its authors would save it."""
    config = base.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    tensors = {
        f"model.layers.{layer}.ahn.fn.{name}": tensor + layer
        for layer in range(config.num_hidden_layers)
        for name, tensor in published(form, heads, width, config.hidden_size).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
    values = {
        **{name: getattr(config, name) for name in names},
        "architectures": ["Qwen2ForCausalLM"], "_ahn_implementation": form,
        "_layer_implementation": "Qwen2MemDecoderLayer", "sliding_window": 6,
        "fa_layer_ids": "", "use_ahn_router": False, "use_q_proj": False, "loss_type": "kl",
        "ahn_position": "random", "sliding_window_type": "random", "save_ahn_only": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**values, **about}))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_reads_as_its_parameters_do(form: str, tmp_path: Path) -> None:
    """Every tensor arrives where it belongs; what is saved from there is memwrap's own."""
    base = build("llama")
    folder = make_folder(tmp_path, base, form, num_attn_sinks=2)
    model = memwrap.load_ahn(folder, build("llama"), segment_size=8)
    config: Any = model.memory_configs[0]
    assert (config.form, config.window_size, config.num_sinks) == (FORMS[form], 6, 2)
    by_hand = memwrap.wrap(
        base, "ahn", form=FORMS[form], window_size=6, num_sinks=2, segment_size=8
    ).eval()
    networks: Any = by_hand.memories["ahn"].networks
    heads, width = base.config.num_attention_heads, networks["0"].out.shape[-1]
    for number, network in networks.items():
        given = {
            n: (x + int(number)).float()
            for n, x in published(form, heads, width, base.config.hidden_size).items()
        }
        given.pop("D", None)
        with torch.no_grad():
            if "dt_proj.bias" in given:
                given["dt_bias"] += given.pop("dt_proj.bias")
            left = {n for n, _ in network.named_parameters()}
            for name, tensor in given.items():
                getattr(network, OURS[name]).copy_(tensor)
                left.remove(OURS[name])
            assert not left
    text = ids(2, 27)
    want, got = by_hand.read(text), model.read(text)
    assert_same_states(got, want, 0.0)
    with torch.no_grad():
        logits = model(text).logits
        assert_close(logits, by_hand(text).logits, label="logits")
        off = memwrap.wrap(build("llama"), "window", window_size=6, num_sinks=2, segment_size=8)
        assert float((logits - off.eval()(text).logits).abs().max()) > 1e-3
    model.save_pretrained(tmp_path / "own")
    again = memwrap.load(tmp_path / "own", build("llama"))
    assert_same_states(again.read(text), got, 0.0)


def test_settings_of_the_folder_and_the_callers(tmp_path: Path) -> None:
    base = build("llama")
    folder = make_folder(tmp_path, base)
    (folder / "modeling.py").write_text("raise SystemExit('this ran')\n")
    about = json.loads((folder / "config.json").read_text())
    about["auto_map"] = {"AutoModelForCausalLM": "modeling.Anything"}
    (folder / "config.json").write_text(json.dumps(about))
    model = memwrap.load_ahn(folder, base, num_sinks=3, window_size=9)
    config: Any = model.memory_configs[0]
    assert (config.num_sinks, config.window_size) == (3, 9) and not model.training


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"_ahn_implementation": None}, "no AHN checkpoint.*known: GatedDeltaNet"),
        ({"_ahn_implementation": ["x"]}, "no AHN checkpoint"),
        ({"use_ahn_router": True}, "use_ahn_router"),
        ({"use_q_proj": True}, "use_q_proj"),
        ({"fa_layer_ids": "0,1"}, "fa_layer_ids"),
        ({"sliding_window": None}, "no `sliding_window`"),
        ({"sliding_window": "many"}, "window_size"),
        ({"hidden_size": 31}, "hidden_size 31.*Give the base it was trained on"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"_ahn_implementation": "Mamba2"}, "lacks 'dt_proj.bias'"),
    ],
)
def test_a_config_that_does_not_fit(about: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = build("llama")
    folder = make_folder(tmp_path, base, **about)
    with refused(said):
        memwrap.load_ahn(folder, base)
    assert memwrap.wrap(base, "rmt")  # the base is as it was


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"model.layers.0.ahn.fn.o_proj.weight": None}, "layer 0: it lacks 'o_proj.weight'"),
        ({"model.layers.0.ahn.fn.q_proj.weight": (2, 2)}, "has the unknown 'q_proj.weight'"),
        ({"model.layers.0.ahn.ahn_router.alpha": (4,)}, "ahn_router.alpha.*no part of a recur"),
        ({"model.embed_tokens.weight": (4,)}, "embed_tokens.*weights of the base are not read"),
        ({"model.layers.0.ahn.fn.A_log": (9,)}, r"'A_log' is of shape \(9,\)"),
        ({"model.layers.7.ahn.fn.A_log": (4,)}, r"in layers \[0, 1, 7\], the model in \[0, 1\]"),
        ({"model.layers.0.ahn.fn.dt_bias": (float("nan"),)}, "not finite"),
    ],
)
def test_tensors_that_do_not_fit(names: dict[str, Any], said: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = build("llama")
    folder = make_folder(tmp_path, base)
    tensors = load_file(folder / "model.safetensors")
    for name, shape in names.items():
        tensors.pop(name, None)
        if shape is not None:
            whole = all(isinstance(n, int) for n in shape)
            tensors[name] = torch.zeros(shape) if whole else torch.tensor(shape)
    save_file(tensors, folder / "model.safetensors")
    with refused(said):
        memwrap.load_ahn(folder, base)


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    base = build("llama")
    folder = make_folder(tmp_path, base)
    with refused("There is no folder"):
        memwrap.load_ahn(tmp_path / "nowhere", base)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with refused("damaged"):
        memwrap.load_ahn(folder, base)
    (folder / "model.safetensors").unlink()
    with refused("model.safetensors is missing"):
        memwrap.load_ahn(folder, base)
