"""A `Trainer` for memories: streaming truncated BPTT, a segment curriculum, their own rates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import Trainer
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from memwrap.engine.answering import first_labels
from memwrap.engine.mixer_matching import mixers_matched
from memwrap.memories.config import MemoryConfig
from memwrap.memories.parts.training_progress import training_at
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.training.arguments import MemoryTrainingArguments
from memwrap.training.batches import (
    IGNORED,
    Batch,
    first_tokens,
    has_labels,
    last_segment_only,
    left_aligned,
    pieces,
    shifted_labels,
    unpacked,
)
from memwrap.training.collating import DocumentCollator
from memwrap.training.distillation import teacher_of
from memwrap.training.mixer_stage import check_mixer_matching
from memwrap.training.parameter_groups import memory_groups
from memwrap.training.reducing import average_gradients
from memwrap.training.resuming import check_loss, last_checkpoint
from memwrap.training.watch import LossWatch, NormWatch, any_sums
from memwrap.training.window_dropout import check_window_dropout, windows_dropped

logger = logging.get_logger(__name__)

_SHARDED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}


class MemoryTrainer(Trainer):
    """transformers' `Trainer` for a memwrap model, alone or under `get_peft_model`.

    What it adds: the backward pass of truncated BPTT runs piece by piece (`streaming`), with
    the gradients of the single call; documents are trimmed by `segment_curriculum`; the
    memory's parameters have their own learning rate and weight decay; a resumed run says
    nothing of a frozen backbone that no checkpoint needs to hold.

    Args:
        model: a memwrap model, or a `PeftModel` over one.
        args: `MemoryTrainingArguments`.
        data_collator: default: `DocumentCollator`.
        positional, keywords: as `Trainer` takes them.

    Raises:
        TypeError: for a model without a memory or other training arguments.
        ValueError: for settings that cannot work together; says which and what to do.
    """

    args: MemoryTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: MemoryTrainingArguments | None = None,
        data_collator: Any = None,
        *positional: Any,
        **keywords: Any,
    ) -> None:
        if args is None:
            args = MemoryTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(args, MemoryTrainingArguments):
            raise TypeError(
                f"`args` is a {type(args).__name__}; MemoryTrainer needs MemoryTrainingArguments."
            )
        if args.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {args.label_smoothing_factor}; transformers smooths "
                "unshifted labels for models it does not know. Leave it at 0."
            )
        if data_collator is None:
            data_collator = DocumentCollator()
        super().__init__(model, args, data_collator, *positional, **keywords)
        if not isinstance(self.memory_model, MemoryModelForCausalLM):
            raise TypeError(
                f"`model` is a {type(model).__name__} without a memory; "
                "wrap it first: memwrap.wrap(model, ...)."
            )
        check_window_dropout(self.memory_model, args)
        check_mixer_matching(self.memory_model, args)
        self.watch, self.norms = LossWatch(), NormWatch()
        if args.label_names is None:
            # transformers takes every argument with "label" in its name, and then evaluates
            # only batches that have them all.
            self.label_names = ["labels"]
        if self.compute_metrics is not None and args.prediction_loss_only:
            raise ValueError(
                "`compute_metrics` needs logits, which `prediction_loss_only` drops; "
                "set prediction_loss_only=False."
            )
        if self._stream_window() is not None:
            self._check_streaming()

    def _check_streaming(self) -> None:
        """Refuse what cannot run several backward passes a step."""
        obstacle = None
        if self.accelerator.distributed_type in _SHARDED:
            obstacle = f"{self.accelerator.distributed_type.value} (sharded parameters)"
        elif self.get_cp_size() > 1 or self.get_sp_size() > 1:
            obstacle = "context or sequence parallelism, which cuts documents itself"
        elif self.args.n_gpu > 1:
            obstacle = "DataParallel (one process, several GPUs; torchrun gives each its own)"
        elif self.compute_loss_func is not None:
            obstacle = "`compute_loss_func`, which needs the logits of whole documents"
        elif self.args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
            obstacle = f"`optim={self.args.optim}`, which steps in every backward pass"
        if obstacle:
            raise ValueError(
                f"streaming=True does not go with {obstacle}; set streaming=False "
                "(with activation checkpointing, training memory stays small too)."
            )

    @property
    def memory_model(self) -> MemoryModelForCausalLM:
        """The memwrap model itself, without DDP, torch.compile or PEFT around it."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def _trained(self) -> nn.Module:
        """The model with PEFT around it, if there is any."""
        return self.model  # type: ignore[return-value]

    @property
    def _config(self) -> MemoryConfig:
        """The config that decides segments, truncation and loss, as in the model's own loop."""
        return self.memory_model.memory_configs[0]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """Train as `Trainer.train`; `resume_from_checkpoint=True` takes the last whole checkpoint.

        Raises:
            ValueError: if there is none.
        """
        if resume_from_checkpoint is True:
            checkpoint = last_checkpoint(self.args.output_dir)  # type: ignore[arg-type]
            if checkpoint is None:
                raise ValueError(f"{self.args.output_dir} has no whole checkpoint to resume from.")
            resume_from_checkpoint = str(checkpoint)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self.norms.logged()  # the steps since the last log are the end of the training
        self.memory_model.config.trained_norms = self.norms.largest or None
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as `Trainer`; beside a loss how large the states have become (`NormWatch`)."""
        super().log({**logs, **(self.norms.logged() if "loss" in logs else {})}, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """Compute the loss as `Trainer` does, in training with `window_dropout`; memories know how
        far the run has come."""
        done, memories = self.state.global_step / max(1, self.state.max_steps), self.memory_model
        matching = self.args.mixer_matching and model.training
        with (
            windows_dropped(memories, self.args, done), training_at(done), mixers_matched(matching),
        ):  # fmt: skip
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        cache = getattr(outputs, "cache", None)
        if model.training and cache is not None and not matching:  # nothing is read there
            self.norms.add(memories, cache)
        return (loss, outputs) if return_outputs else loss

    # What a step trains on

    def segments_now(self) -> int | None:
        """Count the segments of each document that the current step trains on; None: all."""
        return self.args.segments_at(self.state.global_step)

    def prepare_batch(self, batch: Batch, trim: bool = True) -> Batch:
        """Return the batch as it is trained on: a row a document, aligned, trimmed; `loss_on` is
        heeded.

        Done before the Trainer counts targets, so that the loss is divided by what is really
        predicted. A batch without labels comes back as it is; preparing twice changes nothing.

        Args:
            batch: what the collator returned.
            trim: apply the segment curriculum.
        """
        if not has_labels(batch):
            return batch
        batch = unpacked(batch)
        config, segments = self._config, self.segments_now() if trim else None
        if not config.count_padding:
            batch = left_aligned(batch)
        if segments is not None:
            batch = first_tokens(batch, segments * config.segment_size)
        if config.loss_on == "last":
            batch = last_segment_only(
                batch, config.segment_size, config.alignment, config.count_padding
            )
        return batch

    def _taught(self, inputs: Batch) -> Batch:
        """Return the batch with its teacher, where there is distillation."""
        args = self.args
        if not args.distillation_weight or not has_labels(inputs):
            return inputs
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            teacher = teacher_of(
                self.memory_model, inputs, args.distillation_weight, args.distillation_temperature,
                args.label_weight,
            )  # fmt: skip
        return {**inputs, "teacher": teacher}

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Return the next `num_batches` batches, prepared, and the number of their targets."""
        if self.state.global_step >= self.state.max_steps:  # resumed behind the last step
            self.control.should_training_stop = True
            return [], None
        batches = map(self.prepare_batch, epoch_iterator)
        return super().get_batch_samples(batches, num_batches, device)

    # Streaming truncated BPTT

    def _stream_window(self) -> int | None:
        """Count the tokens between two backward passes; None where one pass does it.

        Pieces are the windows of the single call only if rows are cut from the left and the
        graph is cut every `bptt_segments` segments.
        """
        config = self._config
        window = config.bptt_segments
        if not self.args.streaming or window is None:
            return None
        if config.alignment != "left" or config.count_padding:
            logger.warning_once(
                f"Streaming is off: it does not go with these settings of {config.name!r} "
                "(alignment, count_padding). Gradients are the same, "
                "training memory grows with the document."
            )
            return None
        return window * config.segment_size

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run one forward and backward over a batch of documents.

        With `streaming` and `bptt_segments=k` the batch is read in pieces of k segments, each
        followed by its backward pass; the state travels on without its graph.

        Args:
            model: the wrapped model.
            inputs: `input_ids (B, T)`, `attention_mask`, `labels` or `shift_labels`.
            num_items_in_batch: targets of the whole accumulation window.

        Returns:
            The loss, detached.
        """
        inputs = self._taught(self.prepare_batch(inputs))
        window = self._stream_window()
        if window is None or not has_labels(inputs):
            # DataParallel (several GPUs) would gather tensors alone.
            if has_labels(inputs) and self.args.n_gpu <= 1 and any_sums(self.memory_model):
                inputs = {**inputs, "use_cache": True}
            loss = super().training_step(model, inputs, num_items_in_batch)
            self._watched(loss)
            return loss
        model.train()
        prepare = getattr(self.optimizer, "train", None)  # schedule-free optimizers have it
        if callable(prepare):
            prepare()
        inputs = self._prepare_inputs(inputs)
        # DDP would reduce in the last backward pass, which a process whose last piece has no
        # target does not make, and may not know a parameter that only an earlier piece used (a
        # memory's first state). So it stays off, and the sum of all pieces is reduced afterwards.
        distributed = isinstance(model, nn.parallel.DistributedDataParallel)
        with self.accelerator.no_sync(model) if distributed else nullcontext():
            loss = self._stream(model, inputs, window, num_items_in_batch)
        self._watched(loss)
        if distributed and self._step_syncs():
            average_gradients(model)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return loss

    def _watched(self, loss: Tensor) -> None:
        """Stop at a loss that is not finite, or that has left the first steps' far behind."""
        step = self.state.global_step
        check_loss(loss, step)
        self.watch.add(float(loss), step)
        if self.watch.lost:
            self.control.should_training_stop = True

    def _step_syncs(self) -> bool:
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        return each or self.accelerator.sync_gradients

    def _answers(self, inputs: Batch) -> Tensor | None:
        """Find where each row's answer begins, `(B,)`, before it is cut into pieces; None if no
        memory reads answers another way."""
        if not any(getattr(m, "tells_answers", False) for m in self.memory_model.memories.values()):
            return None
        targets = shifted_labels(inputs)
        return first_labels(targets, torch.zeros(len(targets), dtype=torch.long))

    def _stream(
        self, model: nn.Module, inputs: Batch, window: int, num_items: Tensor | int | None
    ) -> Tensor:
        """Forward and backward, piece by piece; returns the sum of the losses."""
        teacher = inputs.pop("teacher", None)
        if teacher is not None:  # cut with the tokens
            inputs["teacher_hidden"] = teacher.hidden
        inputs = left_aligned(inputs)
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # transformers 5.17 has none
        if scaled is None:
            scaled = self.model_accepts_loss_kwargs and num_items is not None
        if num_items is None:
            # The mean over this batch: every piece is divided by the targets of all.
            count = (shifted_labels(inputs) != IGNORED).sum().clamp(min=1)
            inputs = {**inputs, "num_items_in_batch": count}
        else:
            num_items = torch.as_tensor(num_items).clamp(min=1)
        total = torch.zeros((), device=self.args.device)
        first = self._answers(inputs)
        state, reading = None, torch.empty(0)
        for rows, piece in pieces(inputs, window):
            if state is not None and len(rows) < len(reading):  # some rows have ended
                state = state.select(torch.isin(reading, rows).nonzero().squeeze(1))
            reading = rows
            # What predicts nothing and is detached afterwards needs no graph.
            trained = bool((piece["shift_labels"] != IGNORED).any())
            if teacher is not None:
                piece["teacher"] = replace(teacher, hidden=piece.pop("teacher_hidden"))
            piece |= {"cache": state, "use_cache": True}
            if first is not None:
                piece["answer_from"] = first[rows]
            with torch.set_grad_enabled(trained), self.compute_loss_context_manager():
                loss, outputs = self.compute_loss(
                    model, piece, return_outputs=True, num_items_in_batch=num_items
                )
            state = outputs.cache.detach()
            del outputs
            if not trained:
                continue
            if not scaled:
                loss = loss / self.current_gradient_accumulation_steps
            self.accelerator.backward(loss)
            total += loss.detach().to(total)
        return total

    # Evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Run one evaluation step over whole documents: no curriculum, no state kept.

        With `prediction_loss_only` no logits are made. The evaluation loss is the mean over
        batches, as transformers takes it.
        """
        if has_labels(inputs):
            inputs = {**self.prepare_batch(inputs, trim=False), "use_cache": False}
            inputs["return_logits"] = not prediction_loss_only
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    # Optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer of transformers, with the memory's parameters in groups of their
        own.

        A memory's `optimizer_groups()` comes first, then `memory_learning_rate` and
        `memory_weight_decay`, then what the other parameters get.
        """
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        trained = model if model is not None else self._trained
        decayed = set() if given else set(self.get_decay_parameter_names(trained))
        groups = [] if given else memory_groups(self.memory_model, trained, self.args, decayed)
        if not groups:
            return optimizer
        if not hasattr(optimizer, "add_param_group"):
            raise ValueError(
                f"`optim={self.args.optim}` takes no parameter groups, which the memory's own "
                "rates need; use another optimizer, such as adamw_torch."
            )
        moved = {id(p) for group in groups for p in group["params"]}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in moved]
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
        for group in groups:
            optimizer.add_param_group(group)
        return optimizer

    # Resuming

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Say what a checkpoint lacks, except a frozen backbone, which it need not hold."""
        trained = {name for name, p in self._trained.named_parameters() if p.requires_grad}
        missing = [name for name in load_result.missing_keys if name in trained]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))


__all__ = ["MemoryTrainer"]
