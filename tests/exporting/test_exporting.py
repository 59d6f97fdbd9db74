"""Exported checkpoints: code that needs no memwrap, merged adapters, files that appear whole."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

import memwrap
from memwrap import exporting
from memwrap.assets import asset
from memwrap.exporting import check
from memwrap.exporting.card import about_run, card
from memwrap.exporting.flat import flat_files, rewritten
from memwrap.memories.registry import memory_class
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.testing.families import build
from memwrap.testing.helpers import PEFT_EXPERTS, assert_close, error_of, ids, wrapped

ALLOWED = {"torch", "transformers", "safetensors", "huggingface_hub", "tqdm", "numpy"}
# Stores of vectors lie outside the model, behind packages of their own.
REFUSED = {"knnlm": "faiss|psycopg"}


def small(name: str = "infini", **settings: object) -> MemoryModelForCausalLM:
    return memwrap.wrap(build("llama"), name, segment_size=8, **settings).eval()


def test_the_code_of_every_memory_stands_alone() -> None:
    """Each file names what it imports, so that all memories at once show it of each."""
    modules = {name: memory_class(name).__module__ for name in memwrap.available()}
    for name, package in REFUSED.items():
        with pytest.raises(ValueError, match=f"needs the package ({package})"):
            flat_files([modules.pop(name)])
    files = flat_files([*modules.values()])
    for file, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in files, (file, node.module)
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
                roots = {str(n).partition(".")[0] for n in names or [a.name for a in node.names]}
                assert roots <= ALLOWED | set(sys.stdlib_module_names), (file, roots)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["armt", pytest.param("infini", marks=pytest.mark.full)])
def test_loads_without_memwrap(name: str, tmp_path: Path) -> None:
    """`export` itself runs the check in a fresh process; here with adapters."""
    model = small(name)
    model.add_lora(LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value += 0.05 * torch.randn_like(value)
    text = torch.randint(0, 99, (2, 30))
    before = model(input_ids=text).logits
    found = exporting.export(model, tmp_path / "out")
    assert found is not None
    assert found.generates
    assert found.difference < 1e-5
    assert torch.equal(model(input_ids=text).logits, before)
    again = memwrap.load(tmp_path / "out")
    scale = before.abs().max()
    assert (again(input_ids=text).logits - before).abs().max() < 1e-5 * scale
    assert not again.adapters()


def experts() -> Any:
    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@PEFT_EXPERTS
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("order", ["inside", "before"])
def test_adapters_of_experts_are_merged(order: str) -> None:
    """PEFT adapts two tensors of one module, one adapter inside the other."""
    settings = LoraConfig(r=2, target_parameters=["gate_up_proj", "down_proj"])
    before = order == "before"
    model = wrapped(base=get_peft_model(experts(), settings) if before else experts())
    if not before:
        model.add_lora(settings)
    adapters = [n for n, _ in model.named_parameters() if "lora_B" in n]
    assert any(".experts.base_layer.lora_B" in n for n in adapters), adapters
    text = ids(2, 20)
    with torch.no_grad():
        for key in adapters:
            model.get_parameter(key).normal_(std=0.1)
        want = model(text).logits
        plain = wrapped(base=experts())
        assert error_of(plain(text).logits, want) > 1e-2
        plain.load_state_dict(exporting.merged(model), strict=False)
        assert_close(plain(text).logits, want, 1e-5)


TRAINS = """
import json, runpy, sys
check, folder, again = sys.argv[1:]
sys.meta_path.insert(0, runpy.run_path(check)["Blocker"]())
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

def load(place):
    return AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)

torch.set_num_threads(1)
torch.manual_seed(0)
ids = torch.randint(0, 99, (2, 30))
model = load(folder).train()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
losses = []
for _ in range(4):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
model.eval().save_pretrained(again)
with torch.no_grad():
    own, other = (m.eval()(input_ids=ids).logits for m in (model, load(again)))
adapted = get_peft_model(load(folder), LoraConfig(r=2, target_modules=["q_proj"]))
adapted(input_ids=ids, labels=ids).loss.backward()
lora = [float(p.grad.abs().sum()) for n, p in adapted.named_parameters() if "lora_B" in n]
print(json.dumps({"losses": losses, "apart": float((own - other).abs().max()), "lora": lora,
                  "clean": "memwrap" not in sys.modules}))
"""


@pytest.mark.slow
def test_trains_and_saves_itself_without_memwrap(tmp_path: Path) -> None:
    exporting.export(small("armt"), tmp_path / "out", check=False)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRAINS, check.__file__, tmp_path / "out",
         tmp_path / "again"],
        capture_output=True, text=True, timeout=580, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["clean"] and found["apart"] == 0.0
    assert found["losses"] == sorted(found["losses"], reverse=True)
    assert found["losses"][-1] < found["losses"][0] - 0.01
    assert len(found["lora"]) == 2 and min(found["lora"]) > 0


TOKENIZES = """
import json, runpy, sys
check, folder = sys.argv[1:]
sys.meta_path.insert(0, runpy.run_path(check)["Blocker"]())
from transformers import AutoTokenizer

ids = [AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)("def main(): pass").input_ids
       for trust in (False, True)]
print(json.dumps(ids))
print()
print("\\n" + json.dumps(AutoTokenizer.from_pretrained(folder)("def main(): pass").input_ids))
"""


@pytest.mark.slow
def test_the_tokenizer_loads_without_a_question(tmp_path: Path) -> None:
    """In a process without memwrap, and with nobody there to answer."""
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    exporting.export(small("rmt"), tmp_path / "out", tokenizer=tokenizer, check=False)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TOKENIZES, check.__file__, tmp_path / "out"],
        capture_output=True, text=True, timeout=580, stdin=subprocess.DEVNULL, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Nothing but the ids: a question would stand in front of them.
    answered, _, asked = done.stdout.partition("\n\n")
    wanted = tokenizer("def main(): pass").input_ids
    assert json.loads(answered) == [wanted] * 2
    # Left open, transformers asks (docs/decisions.md says why); nobody there is a no, and enough.
    assert "[y/N]" in asked and json.loads(asked.splitlines()[-1]) == wanted
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'AutoTokenizer.from_pretrained("out", trust_remote_code=True)' in card


def test_merging_leaves_the_model_as_it_is() -> None:
    model = small()
    model.add_lora(LoraConfig(r=2, target_modules=["q_proj"]))
    layer = model.backbone.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight += 1.0
    weight = layer.base_layer.weight.clone()
    merged = exporting.merged(model)["backbone.model.layers.0.self_attn.q_proj.weight"]
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(merged, weight + delta * layer.scaling["default"])
    assert torch.equal(layer.base_layer.weight, weight)
    assert not any("lora" in key for key in exporting.merged(model))


@pytest.mark.slow
def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        exporting.export(small(), tmp_path / "full")
    monkeypatch.setattr(exporting, "flat_files", lambda memories: {"modeling_memwrap.py": "1/0"})
    with pytest.raises(ValueError, match="does not load without memwrap"):
        exporting.export(small(), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_rewriting() -> None:
    text = (
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING\n"
        "from memwrap.ops import infini, EPS\n"
        "if TYPE_CHECKING:\n    from memwrap.model.memory_model import Model\n"
        "def f():\n    from memwrap_kernels import infini as kernels\n"
    )
    new, needed = rewritten(text)
    assert new.splitlines()[2:] == [
        "from .memwrap_ops_infini import THIS_MODULE as infini",
        "from .memwrap_ops import EPS as EPS",
        "def f():",
        '    kernels = __import__("importlib").import_module("memwrap_kernels.infini")',
    ]
    assert needed == ["memwrap.ops.infini", "memwrap.ops"]
    with pytest.raises(ValueError, match="cannot be exported"):
        rewritten("import memwrap\n")


def test_card(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"steps": 10, "command": "memwrap train x"}))
    (tmp_path / "recipe.yaml").write_text(
        "data: {source: stdlib, split: train, max_tokens: 64}\ntrainer: {batch_size: 2}\n"
    )
    text = card(small(), about_run(tmp_path) | {"licence": "mit"}, "mine")
    assert "license: mit" in text
    assert "stdlib (train), 1,280 tokens" in text
    assert "| `infini` | `segment_size` | `8` |" in text
    assert "Trained by `memwrap train x`." in text
    assert "import AutoModelForCausalLM, AutoTokenizer\n" in text
    plain = card(small(), {}, "mine", tokenizer=False)
    assert "unknown data" in plain and "okenizer" not in plain
