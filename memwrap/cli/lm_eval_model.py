"""EleutherAI's evaluation harness (lm-eval) with saved memory models as a model type of its own.

Importing this module registers the type: `simple_evaluate(model="memwrap", ...)` then knows it.
Releases of the harness after 0.4.13 find it by themselves, as an entry point of `lm_eval.models`.
Up to there its command imports nothing of others: `memwrap lm_eval` is that command with this
module imported first.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import memwrap
from memwrap.cli.lm_eval_presets import expanded
from memwrap.cli.shared import load_tokenizer
from memwrap.memories.registry import config_class
from memwrap.model.opening import open_model

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(f"The harness is missing ({error}); pip install 'memwrap[eval]'.") from error


@register_model("memwrap")
class MemwrapLM(HFLM):
    """A saved memory model in the harness: `--model memwrap --model_args pretrained=DIR`.

    Texts of any length are read whole: there is no position limit to cut them at, unless
    `max_length` sets one. With `batch_size=1` only the logits of what is scored are computed; else
    those of a whole batch `(B, T, V)` are held at once, as the harness asks.

    Args:
        pretrained: a saved model: folder, shipped name or repo; with `memory`, a model without one.
        memory: the memory to attach, such as "infllm"; fields of its config stand in `settings`.
        tokenizer: name or folder; default the one saved with the model, else its base's.
        device: where the model goes; default an accelerator if there is one.
        dtype: of the backbone, as "float32"; default as saved.
        batch_size, max_batch_size: texts read at once; as for the harness's own models.
        revision: of a repo on the Hub.
        settings: fields of the memory's config, and what `HFLM` takes for a model that is given to
            it (`max_length`, `add_bos_token`, `prefix_token_id`, `logits_cache`, ...).

    Raises:
        FileNotFoundError, ValueError: as `memwrap.load`; also for what goes by another way here.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        memory: str | None = None,
        tokenizer: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = 64,
        revision: str | None = None,
        **settings: Any,
    ) -> None:
        refused = sorted(settings.keys() & _NOT_HERE)
        if refused:
            raise ValueError(
                f"model_args has {refused[0]!r}, which the model type memwrap does not take; load "
                "such a model in Python and pass it on: HFLM(pretrained=model, tokenizer=...)."
            )
        if str(batch_size).startswith("auto") and not settings.get("max_length"):
            raise ValueError(
                "`batch_size=auto` tries rows of the longest text, which has no limit here; add "
                "max_length to model_args, or give a number."
            )
        options: dict[str, Any] = {"dtype": dtype} if dtype not in (None, "auto") else {}
        fields = {} if memory is None else config_class(memory).__dataclass_fields__
        chosen = {name: settings.pop(name) for name in fields.keys() & settings.keys()}
        _check_names(settings, memory, list(fields))
        model: Any
        if memory is None:
            model = memwrap.load(pretrained, revision=revision, **options)
        else:
            model = open_model(pretrained, memory, chosen, **options)
        if device is not None:
            model.to(device)
        elif torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        super().__init__(
            model,
            backend="causal",
            tokenizer=load_tokenizer(tokenizer or pretrained, model),
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            **settings,
        )
        self._scored = 1
        # The harness notes them beside its results.
        self.pretrained, self.revision = pretrained, revision or "main"

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        self._scored = max((len(continuation) for *_, continuation in requests), default=1)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(inps) > 1 or args or kwargs or getattr(self, "mixed_precision_dtype", None):
            return super()._model_call(inps, *args, **kwargs)
        keep = min(self._scored, inps.shape[1])
        with torch.no_grad():
            return self.model(inps, logits_to_keep=keep).logits

    def _select_cont_toks(
        self, logits: Tensor, contlen: int | None = None, inplen: int | None = None
    ) -> Tensor:
        # Of a text alone the last logits are there, and nothing stands behind it.
        inplen = None if inplen is None else min(inplen, len(logits))
        return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)


def _check_names(settings: Mapping[str, Any], memory: str | None, fields: list[str]) -> None:
    """Refuse what neither the memory nor `HFLM` takes: the harness's own class lets it pass."""
    known = [*inspect.signature(HFLM.__init__).parameters, *fields]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out."
            owner = memory or "a saved model (its memory has its settings)"
            raise ValueError(
                f"model_args has {name!r}, which neither {owner} nor HFLM takes; {hint}"
            )


# Arguments of HFLM that say how it would load or spread a model.
_NOT_HERE = {
    "autogptq", "delta", "device_map", "gguf_file", "gptqmodel", "load_in_4bit", "load_in_8bit",
    "parallelize", "peft", "subfolder", "tp_plan",
}  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Run the harness's command line; `arguments` are those of `lm_eval`, and `--preset` and
    `--lengths` (`memwrap.cli.lm_eval_presets`).

    Raises:
        ValueError: for an unknown preset, or lengths that it does not have.
    """
    before = sys.argv
    with expanded(arguments) as words:
        sys.argv = ["lm_eval", *words]
        try:
            cli_evaluate()
        finally:
            sys.argv = before
