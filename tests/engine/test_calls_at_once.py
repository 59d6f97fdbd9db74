"""Calls at once: what single memories keep, and what changes a model for a while."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support import MEMORIES
from torch import Tensor

from memwrap.backbones.adapters import lora_disabled
from memwrap.evaluation.controls import windowed
from memwrap.memories.registry import memory_class
from memwrap.ops import backend
from memwrap.stores import FaissStore
from memwrap.testing.families import FAMILIES, build
from memwrap.testing.helpers import (
    SEGMENT,
    assert_same_gradients,
    checkpointed,
    error_of,
    gradients,
    ids,
    wrapped,
)
from memwrap.testing.test_concurrency import (
    EXACT,
    Request,
    check_interleaved,
    eager_switching,
    gradients_of,
    meanwhile,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("memory", "settings"),
    [
        ("compressive", {"store": "hidden", "compression": "most_used"}),
        ("infllm", {"offload": True}),
        ("infllm", {"score": "dot_product", "selection": "block"}),
        ("landmark", {"offload": True, "retrieval": "chunk"}),
        ("hmt", {"num_sensory": 2}),
        ("ahn", {"form": "gated", "states": "kv_head"}),
        ("memorizing", {"combine": "joint"}),
        ("knnlm", {"key": "hidden"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_other_settings(memory: str, settings: dict[str, Any], attention: str) -> None:
    base = build("llama", attention=attention)
    check_interleaved(wrapped(memory, base=base, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("store", ["kv", "hidden"])
def test_two_trainings_with_auxiliary_losses(store: str) -> None:
    """Keys are projected again without gradients for the matrices: of this call alone."""
    model = wrapped("compressive", store=store, compression="conv").train()
    text, other_text = ids(2, 4 * SEGMENT, seed=1), ids(1, 4 * SEGMENT, seed=2)
    wanted, other_wanted = gradients_of(model, text), gradients_of(model, other_text)

    def train() -> None:
        assert_same_gradients(gradients_of(model, other_text), other_wanted, EXACT)

    with meanwhile(model, train, 5):
        assert_same_gradients(gradients_of(model, text), wanted, EXACT)


@pytest.mark.parametrize(
    "memory",
    ["armt", "window", *(pytest.param(m, marks=pytest.mark.slow) for m in ("rmt", "infini"))],
)
def test_the_backbone_alone_beside_a_call(memory: str) -> None:
    """Attention is lent and adapters are switched off for one thread alone."""
    model = wrapped(memory)
    model.add_lora(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.eval()
    request, text = Request(model, 0, 1), ids(1, 20)
    classes = [type(m) for m in model.modules()]
    implementation = model.backbone.config._attn_implementation

    @torch.no_grad()
    def alone() -> list[Tensor]:
        with windowed(model, 16, 1) as (feed, _):
            fed = feed(text, None)
        with lora_disabled(model.backbone):
            return [fed, model.backbone(text, use_cache=False).logits]

    wanted = alone()
    with torch.no_grad():
        assert error_of(model.backbone(text, use_cache=False).logits, wanted[1]) > 1e-2

    def check() -> None:
        assert all(error_of(a, b) <= EXACT for a, b in zip(alone(), wanted, strict=True))

    with meanwhile(model, check, 3):
        request.check()
    with meanwhile(model, request.check, 3):
        check()
    with eager_switching(), ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(f) for _ in range(4) for f in (check, request.check)]:
            future.result()
    assert [type(m) for m in model.modules()] == classes
    assert model.backbone.config._attn_implementation == implementation


def test_attention_is_looked_at_once() -> None:
    """A second look would run and watch modules that another thread is in."""
    model = wrapped("rmt")
    found = model.parts.attention_sizes()
    model.parts.decoder.register_forward_hook(lambda *_: pytest.fail("looked again"))
    assert model.parts.attention_sizes() is found


BRANCHED = [m for m in MEMORIES if memory_class(m).branches]


@pytest.mark.parametrize(
    "memory", [BRANCHED[0], *(pytest.param(m, marks=pytest.mark.slow) for m in BRANCHED[1:])]
)
def test_a_branch_alone_beside_a_call(memory: str) -> None:
    model = wrapped(memory)
    request, branch = Request(model, 0, 1), "recurrent"
    with model.memories[memory].only(branch):
        alone = Request(model, 0, 1)
    assert error_of(alone.logits, request.logits) > 1e-3

    def check() -> None:
        with model.memories[memory].only(branch):
            alone.check()

    with meanwhile(model, check):
        request.check()
    with meanwhile(model, request.check), model.memories[memory].only(branch):
        alone.check()


def test_a_store_that_is_indexed_when_it_is_first_searched() -> None:
    """Several threads come at once; the index is built once."""
    model = wrapped("knnlm", cache_size=0, adaptive=False, temperature=1.0)
    vectors = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    texts = [ids(1, 2 * SEGMENT, seed=n) for n in range(4)]

    def store() -> FaissStore:
        new = FaissStore(32, device="cpu")
        new.add(vectors, values=torch.arange(400) % 100)
        return new

    @torch.no_grad()
    def answer(text: Tensor) -> Tensor:
        return model(text).logits

    model.memories["knnlm"].attach(store())
    wanted = [answer(text) for text in texts]
    for _ in range(5):
        model.memories["knnlm"].attach(store())
        with eager_switching(), ThreadPoolExecutor(4) as pool:
            for got, want in zip(pool.map(answer, texts), wanted, strict=True):
                assert error_of(got, want) <= EXACT


@pytest.mark.parametrize(
    ("memory", "family"),
    [
        ("armt", "llama"),
        ("window", "llama"),
        # Recurrent backbones are refused before transformers 5.21.
        *([("knnlm", "qwen3_5")] if "qwen3_5" in FAMILIES else []),
    ],
)
def test_the_backward_pass_in_another_thread(memory: str, family: str) -> None:
    """As on a GPU: it computes again in a thread that has no variables of the forward pass."""
    model, text = checkpointed(wrapped(memory, family)).train(), ids(2, 2 * SEGMENT + 3)
    wanted = gradients_of(model, text)
    with ThreadPoolExecutor(1) as pool:
        loss = model(text, labels=text).loss
        pool.submit(loss.backward).result()
    assert_same_gradients(gradients(model), wanted, EXACT)


def test_the_backward_pass_behind_the_block_that_the_call_was_in() -> None:
    """It computes again what was computed: by the same op, of the same branch."""
    model, text = checkpointed(wrapped("liger")).train(), ids(2, 2 * SEGMENT + 3)

    def loss() -> Tensor:
        with backend("naive"), model.memories["liger"].only("recurrent"):
            return model(text, labels=text).loss

    with backend("naive"), model.memories["liger"].only("recurrent"):
        wanted = gradients_of(model, text)
    loss().backward()
    assert_same_gradients(gradients(model), wanted, EXACT)
