"""Two processes on CPU (gloo): DDP and FSDP2 give what one process gives."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from small import SETTINGS, documents, losses_of, wrapped
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

import memwrap
from memwrap.training.arguments import MemoryTrainingArguments
from memwrap.training.batches import shifted_labels
from memwrap.training.collating import DocumentCollator
from memwrap.training.trainer import MemoryTrainer

LENGTHS = [40, 12, 33, 9]


def run_two(worker: Any, folder: Path) -> list[dict[str, Any]]:
    """What each of two processes writes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_start, (worker, port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def _start(rank: int, worker: Any, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.save(worker(rank, Path(folder)), Path(folder) / f"{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def trained(folder: Path, **settings: Any) -> MemoryTrainer:
    args = MemoryTrainingArguments(
        output_dir=str(folder),
        **SETTINGS | {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0} | settings,
    )
    trainer = MemoryTrainer(wrapped("rmt", bptt_segments=1), args, train_dataset=documents(LENGTHS))
    trainer.train()
    return trainer


def ddp(rank: int, folder: Path) -> dict[str, Any]:
    """Rows of different lengths give the processes different numbers of backward passes."""
    trainer = trained(
        folder / "run",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        ddp_backend="gloo",
    )
    return {"parameters": trainer.memory_model.state_dict(), "losses": losses_of(trainer)}


@pytest.mark.proof("accelerate DDP, two CPU processes: the losses of one", "accelerate")
@pytest.mark.slow
def test_ddp_gives_the_losses_of_one_process(tmp_path: Path) -> None:
    ranks = run_two(ddp, tmp_path)
    one = trained(tmp_path / "one", per_device_train_batch_size=4)
    fresh = wrapped("rmt").state_dict()
    name = "memory_modules.rmt.tokens"
    for key, want in one.model.state_dict().items():
        assert torch.equal(ranks[0]["parameters"][key], ranks[1]["parameters"][key]), key
        assert torch.allclose(ranks[0]["parameters"][key], want, atol=1e-6), key
    assert not torch.equal(one.model.state_dict()[name], fresh[name])
    assert ranks[0]["losses"] == pytest.approx(losses_of(one), rel=1e-4)


def batches(rank: int | None) -> dict[str, Tensor]:
    """The rows of one of two processes, or all. Sharded layers are gathered wherever they run, so
    that the processes must run them equally often: as many segments in each."""
    batch = DocumentCollator()(documents([40, 12, 40, 12]))
    return batch if rank is None else {k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()}


STEPS = 3


def fsdp2(rank: int, folder: Path) -> dict[str, Any]:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
        transformer_cls_names_to_wrap=["MemoryLlamaDecoderLayer"],
        state_dict_type="FULL_STATE_DICT",
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    # accelerate itself chooses FSDP only where there is an accelerator; its way to shard, wrap
    # and step is the same everywhere.
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    model = wrapped("armt", value_init="normal").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model, optimizer = accelerator.prepare(model, optimizer)
    sharded = sum(isinstance(p, DTensor) for p in model.parameters())
    total = (shifted_labels(batches(None)) != -100).sum()
    losses = []
    for _ in range(STEPS):
        # FSDP averages gradients over processes.
        loss = model(**batches(rank), num_items_in_batch=total).loss * 2
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    parameters = {
        n: p.full_tensor() if isinstance(p, DTensor) else p.detach().clone()
        for n, p in model.named_parameters()
    }
    inner = accelerator.unwrap_model(model)
    with pytest.raises(ValueError, match="get_model_state_dict"):
        inner.save_pretrained(folder / "parts")
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    inner.save_pretrained(folder / "saved", state_dict=whole, is_main_process=rank == 0)
    return {"losses": losses, "sharded": sharded, "parameters": parameters}


@pytest.mark.proof("accelerate FSDP2, two CPU processes: the losses of one", "accelerate")
@pytest.mark.slow
def test_fsdp2_gives_the_losses_of_one_process(tmp_path: Path) -> None:
    ranks = run_two(fsdp2, tmp_path)
    model = wrapped("armt", value_init="normal").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(STEPS):
        loss = model(**batches(None)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert ranks[0]["sharded"] == len(list(model.parameters()))
    for rank in ranks:
        assert rank["losses"] == pytest.approx(losses, rel=1e-5)
        for name, want in model.named_parameters():
            assert torch.allclose(rank["parameters"][name], want, atol=1e-5), name
    assert losses[-1] < losses[0]
    saved = memwrap.load(tmp_path / "saved")  # with its base, which was trained too
    assert saved.config.architectures == ["MemoryModelForCausalLM"]
    text = batches(None)["input_ids"]
    with torch.no_grad():
        want = model.eval()(text).logits
        assert torch.allclose(saved(text).logits, want, atol=1e-4)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Any:
    """accelerate's singletons are of this process alone."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
