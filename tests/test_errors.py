"""What a user does wrong gives an error of a line or two: what was got, needed, what to do."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import MEMORIES, refused
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import memwrap
from memwrap.io.checksums import checksums
from memwrap.memories.protocol import SoftPrompt
from memwrap.state.memory_state import VERSION
from memwrap.testing.families import build
from memwrap.testing.helpers import SEGMENT, assert_same_states, ids, randomise, tiny, wrapped

# Configs


@pytest.mark.parametrize("memory", MEMORIES)
def test_an_unknown_key_suggests_the_nearest(memory: str) -> None:
    with refused("segmentsize", "segment_size"):
        memwrap.wrap(build("llama"), memory, segmentsize=8)
    with refused("losson", "loss_on"):
        memwrap.config_class(memory).from_dict({"losson": "all"})
    with refused("zzz", "allowed", "segment_size"):
        memwrap.config_class(memory).from_dict({"zzz": 1})
    with refused("other", memory):
        memwrap.config_class(memory).from_dict({"name": "other"})


def test_an_unknown_memory_suggests_the_nearest() -> None:
    with refused("artm", "armt", "available"):
        memwrap.wrap(build("llama"), "artm")
    with refused("rmtt", "rmt"):
        memwrap.config_class("rmtt")


def test_settings_that_do_not_go_together() -> None:
    armt = memwrap.ARMTConfig
    with refused("n_heads", "32", "hidden size"):
        memwrap.wrap(build("llama"), armt(d_mem=24, n_heads=3))
    with refused("layer 7", "0 to 1"):
        memwrap.wrap(build("llama"), armt(layers=[0, 7]))
    base = build("llama")
    with refused("infini", "window", "both attach at the attention"):
        memwrap.wrap(base, "infini", "window")
    with refused("No memory"):
        memwrap.wrap(base)
    with refused("segment_size", "config"):
        memwrap.wrap(base, memwrap.RMTConfig(), segment_size=8)
    with refused("dict", "name or a config"):
        memwrap.wrap(base, {"name": "rmt"})  # type: ignore[arg-type]
    model = memwrap.wrap(base, "rmt")
    with refused("wrapped already", "unwrap"):
        memwrap.wrap(model, "rmt")
    with refused("LlamaForCausalLM", "memwrap model"):
        memwrap.unwrap(base)  # type: ignore[arg-type]


# Models

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}


def no_models() -> dict[str, Any]:
    bert = BertConfig(**SMALL, num_attention_heads=4, intermediate_size=32)
    t5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    return {
        "Linear": nn.Linear(2, 2),
        "LlamaModel": build("llama").model,
        "encoder-decoder": T5ForConditionalGeneration(t5),
        "no attention layers": MambaForCausalLM(MambaConfig(**SMALL, state_size=4)),
        "Bert": BertForMaskedLM(bert),
        "NoneType": None,
    }


@pytest.mark.long
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(
    "kind", ["Linear", "LlamaModel", "encoder-decoder", "no attention layers", "Bert", "NoneType"]
)
def test_a_model_without_what_is_needed(memory: str, kind: str) -> None:
    with refused(kind):
        memwrap.wrap(no_models()[kind], tiny(memory))


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_model_whose_attention_takes_no_mask(memory: str) -> None:
    with refused("flex_attention", "sdpa"):
        memwrap.wrap(build("llama", attention="flex_attention"), tiny(memory))


def test_a_model_without_a_list_of_layers() -> None:
    """Layer memories need the decoder's layers; token memories do not."""

    class Hidden(LlamaForCausalLM):
        pass

    base = build("llama")
    base.__class__ = Hidden
    base.model.layers = nn.ModuleList([*base.model.layers, nn.Identity()])
    with refused("Hidden", "decoder layers"):
        memwrap.wrap(base, tiny("armt"))
    memwrap.wrap(base, tiny("rmt"))


def test_a_failing_wrap_leaves_the_model_as_it_was() -> None:
    base = build("llama")
    classes = [type(m) for m in base.modules()]
    with refused("layer 7"):
        memwrap.wrap(base, memwrap.ARMTConfig(layers=[7]))
    assert [type(m) for m in base.modules()] == classes
    assert base.model.gradient_checkpointing is False


@pytest.mark.parametrize(
    ("memory", "family"),
    [*((name, "gpt2") for name in MEMORIES), *((n, "opt") for n in ("rmt", "infini", "landmark"))],
)
def test_segments_and_the_position_table(memory: str, family: str) -> None:
    found = wrapped(memory).memories[memory]
    prompt = isinstance(found, SoftPrompt) and not found.zero_positions
    longest = 64 - (found.num_prefix + found.num_suffix if prompt else 0)
    names = {field.name for field in dataclasses.fields(memwrap.config_class(memory))}
    wide = {"window_size": 80} if "window_size" in names else {}  # some need room for a segment
    with refused("segment_size", str(longest + 1), "64", f"at most {longest}"):
        wrapped(memory, family, segment_size=longest + 1, **wide)
    model = wrapped(memory, family, segment_size=longest, **wide)
    with torch.no_grad():
        assert bool(model(ids(1, 2 * longest + 1)).logits.isfinite().all())
    # An open segment that generation lets grow reaches the end of the table too.
    with refused("position", "remember"):
        model.generate(
            ids(1, longest - 2), remember=False, max_new_tokens=12, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip


# Calls


@pytest.fixture(scope="module", params=MEMORIES)
def model(request: pytest.FixtureRequest) -> Any:
    return wrapped(request.param)


def test_missing_double_and_empty_inputs(model: Any) -> None:
    embeds = torch.zeros(1, 3, 32)
    with refused("input_ids", "inputs_embeds", "neither"):
        model()
    with refused("input_ids", "inputs_embeds", "both"):
        model(ids(1, 3), inputs_embeds=embeds)
    for shape in ((1, 0), (0, 5)):
        with refused("input_ids", "empty", re.escape(str(shape))):
            model(torch.zeros(shape, dtype=torch.long))
    with refused("input_ids", r"\(5,\)", "2 dimensions"):
        model(ids(5))
    with refused("inputs_embeds", r"\(1, 3\)", "3 dimensions"):
        model(inputs_embeds=embeds[..., 0])
    for text in ([], [[]]):
        with refused("empty"):
            model.read(text)


def test_ids_and_embeddings_of_another_model(model: Any) -> None:
    with pytest.raises(ValueError, match=r"holds 128; the vocabulary has ids from 0 to 127"):
        model(torch.tensor([[3, 128]]))
    with pytest.raises(ValueError, match="holds -1"):
        model.read(torch.tensor([[3, -1]]))
    with pytest.raises(ValueError, match=r"torch.float32; they must be integers"):
        model(torch.ones(1, 3))
    with pytest.raises(ValueError, match="width 7; the backbone's is 32"):
        model(inputs_embeds=torch.ones(1, 3, 7))
    with pytest.raises(ValueError, match="give a `tokenizer`"):
        model.read("some text")


def test_misspelt_arguments(model: Any) -> None:
    with pytest.raises(ValueError, match=r"`label` is no argument.*`labels`"):
        model(torch.tensor([[3, 4]]), label=torch.tensor([[3, 4]]))
    with pytest.raises(ValueError, match=r"`atention_mask`.*`attention_mask`"):
        model(torch.tensor([[3, 4]]), atention_mask=torch.ones(1, 2))
    model(torch.tensor([[3, 4]]), output_router_logits=False)


def test_labels_of_another_shape(model: Any) -> None:
    for name in ("labels", "shift_labels"):
        with refused("labels", r"\(1, 4\)", r"\(1, 5\)"):
            model(ids(1, 5), **{name: ids(1, 4)})
    with refused("labels", r"\(2, 5\)", r"\(1, 5\)"):
        model(ids(1, 5), labels=ids(2, 5))


def test_masks(model: Any) -> None:
    text = ids(2, 5)
    with refused("attention_mask", "row 1", "hole"):
        model(text, attention_mask=torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 1, 1]]))
    with refused("attention_mask", "3", "5"):
        model(text, attention_mask=torch.ones(2, 3))
    with refused("attention_mask", r"\(3, 5\)", r"\(2, 5\)"):
        model(text, attention_mask=torch.ones(3, 5))
    with refused("attention_mask", r"\(2, 1, 5, 5\)"):
        model(text, attention_mask=torch.ones(2, 1, 5, 5))


def test_other_arguments(model: Any) -> None:
    with refused("output_attentions"):
        model(ids(1, 3), output_attentions=True)
    with refused("output_hidden_states"):
        model(ids(1, 3), output_hidden_states=True)
    with refused("memory_control", "of", "shuffled"):
        model(ids(1, 3), memory_control="of")
    with refused("shuffled", "two rows"):
        model(ids(1, 3), memory_control="shuffled")
    with refused("memory_control", "close_segment"):
        model(ids(1, 3), cache=model.read(ids(1, 3)), memory_control="off")
    with refused("rows"):
        model(ids(2, 3), memory_control=model.new_state(3))
    with refused("backend|Unknown", "cuda"):
        import memwrap.ops

        with memwrap.ops.backend("cuda"):
            pass


@pytest.mark.long
def test_states_that_do_not_fit(model: Any) -> None:
    memory = model.memory_configs[0].name
    state = model.read(ids(1, 11))
    with refused("2", "1", "rows"):
        model(ids(2, 3), cache=state)
    with refused("dict", "MemoryState"):
        model(ids(1, 3), cache={})
    before = state.clone()
    other = wrapped(memory, segment_size=9)
    with refused("another model", "segment_size", "9"):
        other(ids(1, 3), cache=state)
    with refused("another model", "segment_size"):
        other.generate(ids(1, 3), cache=state, max_new_tokens=2)
    with refused("another model", "segment_size"):
        other.read(ids(1, 3), state=state)
    # How a model is trained leaves no trace in a state.
    trained = wrapped(memory, bptt_segments=3, loss_on="last")
    trained(ids(1, 3), cache=state.clone())
    with refused("another model", "model_type", "qwen3"):
        wrapped(memory, "qwen3")(ids(1, 3), cache=state)
    foreign = MEMORIES[MEMORIES.index(memory) - 1]
    with refused("another model", memory, foreign):
        wrapped(foreign)(ids(1, 3), cache=state)
    assert_same_states(state, before, 0.0)
    with refused("empty list"):
        memwrap.MemoryState.cat([])
    with refused("different models"):
        memwrap.MemoryState.cat([state, wrapped(memory, segment_size=9).new_state(1)])
    for count in (-4, 1, -20):
        with refused("taken back" if count == -4 else "take back"):
            state.crop(count)


@pytest.mark.long
def test_counted_padding_cannot_continue_an_open_segment(model: Any) -> None:
    memory = model.memory_configs[0].name
    other = wrapped(memory, count_padding=True)
    state = other.read(ids(1, 3))
    with refused("count_padding", "close_segment"):
        other(ids(1, 3), cache=state)


# State files


@pytest.fixture
def state_file(model: Any, tmp_path: Path) -> Path:
    path = tmp_path / "state.safetensors"
    model.read(ids(1, 11)).save(path)
    return path


@pytest.mark.long
def test_a_state_of_other_weights(model: Any, state_file: Path) -> None:
    memory = model.memory_configs[0].name
    other = randomise(wrapped(memory), seed=99)
    checks = (
        lambda: memwrap.MemoryState.load(state_file, other),
        lambda: other(ids(1, 3), cache=memwrap.MemoryState.load(state_file)),
    )
    for check in checks if list(other.memory_parameters()) else ():
        with refused("other weights", "memories", "read the text again"):
            check()
    with refused("other weights", "backbone"):
        memwrap.MemoryState.load(state_file, wrapped(memory, seed=5))
    with refused("another model", "segment_size"):
        memwrap.MemoryState.load(state_file, wrapped(memory, segment_size=9))


def test_damaged_and_foreign_state_files(model: Any, state_file: Path) -> None:
    load = memwrap.MemoryState.load
    folder, whole = state_file.parent, state_file.read_bytes()
    with refused("no state file", "nowhere"):
        load(folder / "nowhere.safetensors")
    bad = folder / "bad.safetensors"
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:size])
        with refused("bad.safetensors", "damaged|not a"):
            load(bad)
    for garbage in (b"hello world, this is no state", bytes(1000), b"\xff" * 500):
        bad.write_bytes(garbage)
        with refused("bad.safetensors", "damaged|not a"):
            load(bad)
    tensors = load_file(state_file)
    about = json.loads(read_metadata(state_file)["about"])

    def write(tensors: dict, **metadata: Any) -> None:
        """As one who knows of the checksums would."""
        texts = {k: str(v) for k, v in metadata.items()}
        if "about" in texts:
            texts |= checksums(tensors, about=texts["about"])
        save_file(tensors, bad, metadata=texts)

    whole_about = {"format": "memwrap-state", "version": VERSION, "about": json.dumps(about)}
    write(tensors, **whole_about)
    assert_same_states(load(bad, model), load(state_file, model), 0.0)
    save_file(tensors, bad, metadata={k: str(v) for k, v in whole_about.items()})
    with refused("bad.safetensors", "damaged: its checksums"):
        load(bad)
    write({"x": torch.ones(2)})
    with refused("bad.safetensors", "not a memwrap state"):
        load(bad)
    write(tensors, format="pt")
    with refused("bad.safetensors", "not a memwrap state"):
        load(bad)
    write(tensors, **{**whole_about, "version": 99})
    with refused("bad.safetensors", "99", "format"):
        load(bad)
    write(tensors, **{**whole_about, "about": "{"})
    with refused("bad.safetensors", "damaged"):
        load(bad)
    for missing in ("rows.fill", "rows.open_valid", "memories"):
        write({k: v for k, v in tensors.items() if not k.startswith(missing)}, **whole_about)
        with refused("bad.safetensors", "damaged"):
            load(bad)
    for key in ("signature", "weights", "columns"):
        short = {k: v for k, v in about.items() if k != key}
        write(tensors, **{**whole_about, "about": json.dumps(short)})
        with refused("bad.safetensors", "damaged"):
            load(bad)


def read_metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_a_state_file_with_tensors_of_other_shapes(model: Any, state_file: Path) -> None:
    """A file that was tampered with or written by a broken program does not crash a model."""
    tensors, metadata = load_file(state_file), read_metadata(state_file)
    own = (n for n in tensors if n.startswith("memories"))
    name = next(n for n in own if tensors[n].dim() > 1 and tensors[n].shape[-1] > 1)
    bad = state_file.with_name("bad.safetensors")
    for value in (tensors[name][..., :1].clone(), tensors[name][:0].clone()):
        save_file({**tensors, name: value}, bad, metadata=metadata)
        with refused("bad.safetensors|state", name.split(".")[1]):
            model(ids(1, 3), cache=memwrap.MemoryState.load(bad, model))
    lost = {n: t for n, t in tensors.items() if n != name}
    save_file(lost, bad, metadata=metadata)
    with refused("bad.safetensors|state", "damaged", name.split(".")[1]):
        model(ids(1, 3), cache=memwrap.MemoryState.load(bad, model))


# Saved models


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.long
def test_damaged_and_foreign_model_folders(folder: Path) -> None:
    base, weights, config = build("llama"), folder / "model.safetensors", folder / "config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())
    assert memwrap.load(folder, base) is not None
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with refused("model.safetensors", "damaged"):
        memwrap.load(folder, build("llama"))
    save_file({"x": torch.ones(2)}, weights)
    with refused("model.safetensors", "config.json", "sealed"):
        memwrap.load(folder, build("llama"))
    weights.write_bytes(whole)
    config.write_text(json.dumps({**settings, "base_fingerprint": "another"}))
    with refused("config.json", "changed", "sealed"):
        memwrap.load(folder, build("llama"))
    del settings["sealed"]  # as one does who means it
    config.write_text(json.dumps(settings))
    with refused("nowhere"):
        memwrap.load(folder.parent / "nowhere")
    (folder.parent / "empty").mkdir()
    with refused("config.json", "empty"):
        memwrap.load(folder.parent / "empty")
    for data in (b"", b"garbage" * 30, whole[:9], whole[: len(whole) // 2], whole[:-1]):
        weights.write_bytes(data)
        with refused("model.safetensors", "damaged"):
            memwrap.load(folder, build("llama"))
    save_file({"x": torch.ones(2)}, weights)
    with refused("model.safetensors", "does not fit"):
        memwrap.load(folder, build("llama"))
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file({**tensors, "strange": torch.ones(1)}, weights)
    with refused("model.safetensors", "strange"):
        memwrap.load(folder, build("llama"))
    for name in list(tensors)[:1]:
        save_file({k: v for k, v in tensors.items() if k != name}, weights)
        with refused("model.safetensors", re.escape(name)):
            memwrap.load(folder, build("llama"))
        save_file({**tensors, name: torch.ones(3)}, weights)
        with refused("model.safetensors", re.escape(name), r"\(3,\)"):
            memwrap.load(folder, build("llama"))
    weights.unlink()
    with refused("model.safetensors"):
        memwrap.load(folder, build("llama"))
    weights.write_bytes(whole)
    for text in ("", "{", "[]", '"x"'):
        config.write_text(text)
        with refused("config.json|saved", "damaged|not a memwrap"):
            memwrap.load(folder, build("llama"))
    config.write_text(json.dumps({**settings, "model_type": "llama"}))
    with refused("llama", "memwrap"):
        memwrap.load(folder, build("llama"))
    config.write_text(json.dumps({**settings, "memories": [{"name": "artm"}]}))
    with refused("artm", "armt"):
        memwrap.load(folder, build("llama"))
    wrong = [{**settings["memories"][0], "segment_size": -1}]
    config.write_text(json.dumps({**settings, "memories": wrong}))
    with refused("segment_size", "-1"):
        memwrap.load(folder, build("llama"))
    wrong = [{**settings["memories"][0], "segmentsize": 1}]
    config.write_text(json.dumps({**settings, "memories": wrong}))
    with refused("segmentsize", "segment_size"):
        memwrap.load(folder, build("llama"))


@pytest.mark.long
def test_loading_with_another_base(model: Any, folder: Path, tmp_path: Path) -> None:
    with refused("name its base", "memwrap.load"):
        memwrap.load(folder)
    with refused("dtype", "base"):
        memwrap.load(folder, build("llama"), dtype=torch.float32)
    with pytest.warns(UserWarning, match="not the one"):
        memwrap.load(folder, build("llama", seed=5))
    wide = build("llama", hidden_size=64, intermediate_size=96)
    with refused("hidden_size", "32", "64"):
        memwrap.load(folder, wide)
    with refused("model_type", "llama", "gpt2"):
        memwrap.load(folder, build("gpt2"))
    build("llama").save_pretrained(tmp_path / "plain")
    with refused("llama", "memwrap"):
        memwrap.load(tmp_path / "plain")


# Nothing half-written


def listing(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def full_disk(*args: Any, **kwargs: Any) -> None:
    """Write a part of the file that was asked for, then fail."""
    paths = [Path(v) for v in (*args, *kwargs.values()) if isinstance(v, (str, Path))]
    for path in (p for p in paths if p.is_absolute()):  # a size such as "5GB" is none
        (path / "model.safetensors" if path.is_dir() else path).write_bytes(b"half")
    raise OSError("No space left on device")


@pytest.mark.long
def test_a_failing_save_of_a_state_leaves_nothing(
    model: Any, state_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(state_file.parent)
    state = model.read(ids(1, 20))
    monkeypatch.setattr("memwrap.state.memory_state.save_file", full_disk)
    for path in (state_file, state_file.parent / "new.safetensors"):
        with pytest.raises(OSError, match="No space"):
            state.save(path)
        assert listing(state_file.parent) == before


@pytest.mark.long
@pytest.mark.parametrize(
    "broken",
    [
        "huggingface_hub.save_torch_state_dict",
        "memwrap.model.configuration.MemoryModelConfig.save_pretrained",
        "transformers.GenerationConfig.save_pretrained",
    ],
)
def test_a_failing_save_of_a_model_leaves_nothing(
    model: Any, folder: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(folder)
    changed = randomise(wrapped(model.memory_configs[0].name), seed=42)
    with monkeypatch.context() as patch:
        patch.setattr(broken, full_disk)
        if broken.startswith("huggingface_hub"):  # what writes where there are no parameters
            patch.setattr("memwrap.model.weight_files.save_file", full_disk)
        for path in (folder, folder.parent / "new"):
            with pytest.raises(OSError, match="No space"):
                changed.save_pretrained(path)
            assert listing(path) == (before if path == folder else {})
            leftovers = [f for f in path.rglob("*") if f.name not in before]
            assert not leftovers, leftovers
    changed.save_pretrained(folder)
    again = memwrap.load(folder, build("llama"))
    with torch.no_grad():
        text = ids(1, 2 * SEGMENT)
        assert torch.equal(again(text).logits, changed(text).logits)
    shutil.rmtree(folder)
