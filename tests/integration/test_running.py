"""A wrapped model where transformers, torch and torchao have their own ways to run a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from small import SETTINGS, documents, llama, losses_of, word_tokenizer, wrapped
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, pipeline

import memwrap
from memwrap.model.memory_model import MEMORY_CHILD
from memwrap.testing.helpers import assert_same_states, randomise
from memwrap.training.arguments import MemoryTrainingArguments
from memwrap.training.trainer import MemoryTrainer

TEXT = documents([30])[0]["input_ids"][None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


# device_map with offload

PLACES = {
    "model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


@pytest.mark.proof("`device_map` with parts on disk", "accelerate")
@pytest.mark.parametrize("memory", ["rmt", "armt", "infini", "hmt"])
def test_device_map_with_offload(base: Path, tmp_path: Path, memory: str) -> None:
    """Embeddings, a layer and the head lie on disk: logits, states and answers are the same."""
    options: dict[str, Any] = {"device_map": PLACES, "offload_folder": str(tmp_path / "off")}
    loaded = AutoModelForCausalLM.from_pretrained(base, **options)
    assert loaded.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    model = randomise(wrapped(memory, base=loaded)).eval()
    plain = randomise(wrapped(memory, base=AutoModelForCausalLM.from_pretrained(base))).eval()
    assert model.config.base_fingerprint == plain.config.base_fingerprint
    with torch.no_grad():
        assert torch.equal(model(TEXT).logits, plain(TEXT).logits)
    asked = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(TEXT, **asked), plain.generate(TEXT, **asked))
    model.read(TEXT).save(tmp_path / "state.safetensors")
    state = memwrap.MemoryState.load(tmp_path / "state.safetensors", plain)
    question = TEXT[:, :5]
    want = plain(question, cache=state).logits
    state = memwrap.MemoryState.load(tmp_path / "state.safetensors", model)
    assert torch.equal(model(question, cache=state).logits, want)
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "whole", include_base=True)
    with torch.no_grad():
        for again in (
            memwrap.load(tmp_path / "saved", **options), memwrap.load(tmp_path / "whole")
        ):  # fmt: skip
            assert torch.equal(again(TEXT).logits, plain(TEXT).logits)


def test_a_saved_base_goes_to_one_device(tmp_path: Path) -> None:
    wrapped("rmt").save_pretrained(tmp_path, include_base=True)
    assert memwrap.load(tmp_path, device_map="cpu", dtype="auto").device.type == "cpu"
    model = memwrap.load(tmp_path, device_map={"": "meta"})
    assert {p.device.type for p in model.parameters()} == {"meta"}
    for wrong in ({"device_map": PLACES}, {"quantization_config": BitsAndBytesConfig()}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` does not go with it"):
            memwrap.load(tmp_path, **wrong)


# torch.compile


@pytest.mark.proof("`torch.compile` (aot_eager)")
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_torch_compile(backend: str) -> None:
    torch._dynamo.reset()
    model = randomise(wrapped("rmt")).eval()
    text = TEXT[:, :20]
    with torch.no_grad():
        want = model(text, use_cache=False).logits
        model.compile(backend=backend)
        assert torch.allclose(model(text, use_cache=False).logits, want, atol=1e-5)
        assert torch.allclose(model(text, use_cache=False).logits, want, atol=1e-5)
        # Noting the weights' fingerprint in a state is no work for the compiler: it says so.
        state = model(text, use_cache=True).cache
    plain = randomise(wrapped("rmt")).eval()
    assert_same_states(state, plain.read(text))


# pipeline


@pytest.mark.proof('`pipeline("text-generation")`')
@pytest.mark.parametrize("memory", ["armt", "infini"])
def test_text_generation_pipeline(memory: str) -> None:
    """A batch of texts of unequal length: each answer is that of generate alone."""
    model = randomise(wrapped(memory)).eval()
    tokenizer = word_tokenizer()
    asked = {"max_new_tokens": 6, "do_sample": False}
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts = ["w3 w4 w5 " * 9, "w7 w1", "w9 w2 w8 w30 " * 5]
    answers = generator(texts, batch_size=3, return_full_text=False, **asked)
    for text, answer in zip(texts, answers, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        new = model.generate(ids, **asked)[0, ids.shape[1] :]
        want = tokenizer.decode(new, skip_special_tokens=True)
        assert answer[0]["generated_text"].split() == want.split()


# A quantised base


def test_a_base_that_was_quantised_in_memory_comes_back_so_or_is_asked_for(
    base: Path, tmp_path: Path
) -> None:
    def quantised(model: Any) -> Any:
        quantize_(model, Int8WeightOnlyConfig())
        return model

    def plain() -> Any:
        return AutoModelForCausalLM.from_pretrained(base)

    before = wrapped("armt", base=quantised(plain())).eval()
    after = wrapped("armt", base=plain()).eval()
    quantised(after.backbone)
    norm = wrapped("armt", base=AutoModelForCausalLM.from_pretrained(base, **eight_bits())).eval()
    with torch.no_grad():
        norm.backbone.model.norm.weight.mul_(1.5)
    for number, model in enumerate((before, after, norm)):
        with pytest.raises(ValueError, match="leave include_base out"):
            model.save_pretrained(tmp_path / "no", include_base=True)
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        with pytest.raises(ValueError, match="does not name its base"):
            memwrap.load(folder)
        want = model(TEXT).logits
        again = memwrap.load(folder, memwrap.unwrap(model))
        assert torch.equal(again(TEXT).logits, want)


def four_bits() -> dict[str, Any]:
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return {"quantization_config": quantisation, "device_map": {"": 0}}


def eight_bits() -> dict[str, Any]:
    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}


# bitsandbytes' 4-bit layers need a GPU.
QUANTISED = [eight_bits, *([four_bits] if torch.cuda.is_available() else [])]


@pytest.mark.proof("LoRA and memory on a base in torchao's int8", "torchao", "peft")
@pytest.mark.parametrize("options", QUANTISED, ids=lambda options: options.__name__)
def test_quantised_base_trains_lora_and_memory(base: Path, tmp_path: Path, options: Any) -> None:
    def quantised() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, **options())

    model = wrapped("armt", base=quantised(), bptt_segments=2, value_init="normal")
    projection = model.backbone.model.layers[0].mlp.up_proj
    assert type(projection.weight) is not torch.nn.Parameter or projection.weight.dtype.itemsize < 4
    model.add_lora(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    trainable = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or MEMORY_CHILD in n for n in trainable)
    settings = SETTINGS | {"max_steps": 4, "use_cpu": model.device.type == "cpu"}
    args = MemoryTrainingArguments(output_dir=str(tmp_path / "run"), **settings)
    trainer = MemoryTrainer(model, args, train_dataset=documents([40, 21]))
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]
    parameters = dict(model.named_parameters())
    assert {n for n in trainable if not torch.equal(parameters[n], trainable[n])} == set(trainable)
    model.save_pretrained(tmp_path / "saved")  # the base did not change: it is not in there
    weights = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert weights < 6 * sum(p.numel() for p in trainable.values()) + 20_000
    text = TEXT.to(model.device)
    with torch.no_grad():
        want = model.eval()(text).logits
        by_name = memwrap.load(tmp_path / "saved", **options())
        assert torch.equal(by_name(text).logits, want)
        if options is eight_bits:  # quantised again without being asked
            assert torch.equal(memwrap.load(tmp_path / "saved")(text).logits, want)
        assert torch.equal(memwrap.load(tmp_path / "saved", quantised())(text).logits, want)
    state = by_name.read(text)
    state.save(tmp_path / "state.safetensors")
    assert memwrap.MemoryState.load(tmp_path / "state.safetensors", model).nbytes == state.nbytes
