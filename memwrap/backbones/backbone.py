"""The parts of a causal LM that memwrap needs, found without naming a family."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from memwrap.backbones import attention as attention_place
from memwrap.backbones import feedforward as feed_forward_place
from memwrap.backbones import layers as layer_place
from memwrap.backbones import reading_probe
from memwrap.backbones import recurrence as recurrent_place
from memwrap.backbones import token_ids as token_ids_place
from memwrap.backbones.attention_probe import AttentionSizes, probe
from memwrap.backbones.cache_names import find_cache_name
from memwrap.backbones.class_swaps import LOCK, give_back, is_lent
from memwrap.backbones.contexts import reaching
from memwrap.backbones.decoders import find_decoder, head_logits, modules_within
from memwrap.backbones.expert_balance import OPTION as BALANCE
from memwrap.backbones.masks import (
    build_masks,
    layer_kinds,
    layers_without_attention,
    recurrent_layers,
)
from memwrap.backbones.offloaded import hooks_of, loaded
from memwrap.backbones.position_limits import PositionLimit, angle_limit
from memwrap.backbones.recurrence import Recurrence
from memwrap.backbones.rotary import Rotary
from memwrap.state.trees import Tree, tree_map

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")
_SPARE_ROWS = 8
_KINDS = (
    layer_place.KIND, recurrent_place.KIND, feed_forward_place.KIND, token_ids_place.KIND,
)  # fmt: skip


class Backbone:
    """A view of a `PreTrainedModel`: embeddings, decoder, layers, head, masks, limits.

    Raises:
        ValueError: if the model lacks a part that every memory needs; the error names it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"The backbone is a {type(model).__name__}; memwrap needs a transformers causal LM "
                "(AutoModelForCausalLM.from_pretrained(...))."
            )
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(f"{type(model).__name__} is an encoder-decoder, not a causal LM.")
        if not model.can_generate():
            raise ValueError(
                f"{type(model).__name__} cannot generate; memwrap needs a causal LM "
                "(AutoModelForCausalLM.from_pretrained(...))."
            )
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        decoder = self.decoder = find_decoder(model)
        if model.get_input_embeddings() is None or model.get_output_embeddings() is None:
            raise ValueError(
                f"{type(model).__name__} offers no input or no output embeddings; memwrap needs a "
                "causal LM with both."
            )
        if not hasattr(model.get_input_embeddings(), "weight"):
            raise ValueError(
                f"{type(model).__name__} reads several ids at once, each from a table of its own "
                "(codes of sound); memwrap needs a causal LM of text, with one table."
            )
        layer_kinds(self.config)
        self.recurrent = recurrent_layers(self.config)
        if self.recurrent and not recurrent_place.SUPPORTED:
            raise ValueError(
                f"{type(model).__name__} has recurrent layers of its own, whose state memwrap can "
                "carry from transformers 5.21 on; install it, or take another backbone."
            )
        self._remembered: Tree = {}
        name = attention_place.implementation(self.config)
        if name not in ATTENTION_IMPLEMENTATIONS:
            raise ValueError(
                f"The backbone's attention is {name!r}; segments need explicit masks: "
                "load it with attn_implementation='sdpa' (or 'eager')."
            )
        self.rotary = Rotary(limit=angle_limit(self.config))
        self._sizes: dict[int, AttentionSizes] | None = None
        self.ids_matter = False
        with reading_probe.explained(type(model).__name__):
            self.ids_matter = self._looks_at_ids()
        self.cache_name = find_cache_name(self._one_token, self.config, type(model).__name__)
        self._path = next(n for n, m in model.named_modules() if m is decoder).split(".")

    @property
    def embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    @property
    def embedding_weight(self) -> Tensor:
        weight: Any = self.embeddings.weight
        return weight

    @property
    def device(self) -> torch.device:
        """Where the embeddings are looked up, also where a device map keeps them elsewhere."""
        places = [getattr(hook, "execution_device", None) for hook in hooks_of(self.embeddings)]
        place = next((p for p in places if p is not None), self.embedding_weight.device)
        return torch.device(place)

    @property
    def embedding_size(self) -> int:
        return self.embedding_weight.shape[1]

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers.

        Raises:
            ValueError: if they cannot be found; layer-level memories need them.
        """
        count = self.config.num_hidden_layers
        # A tower inside the decoder may have as many; a few decoders keep theirs in such a part.
        for module in itertools.chain(modules_within(self.decoder), self.decoder.modules()):
            if (
                isinstance(module, nn.ModuleList)
                and len(module) == count
                and all(isinstance(item, GradientCheckpointingLayer) for item in module)
            ):
                return module
        raise ValueError(
            f"{type(self.model).__name__} offers no list of {count} decoder layers; memories at "
            "the layer place need one. Token-level memories (rmt) work without."
        )

    @property
    def max_positions(self) -> int | None:
        """Rows of a learned position table, or None where positions have no hard end."""
        table = self._position_table
        return None if table is None else self.config.max_position_embeddings

    @property
    def position_limit(self) -> PositionLimit | None:
        """The most positions that a segment may take, and why; None for any number."""
        limit = self.max_positions
        if limit is not None:
            return PositionLimit(limit, f"the backbone's table has {limit}")
        return angle_limit(self.config)

    @property
    def _position_table(self) -> nn.Embedding | None:
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is None:
            return None
        tables = (m for m in modules_within(self.decoder) if isinstance(m, nn.Embedding))
        # An adapter holds the table that it wraps. Some have a few rows more, for padding.
        tables = (m for m in tables if 0 <= m.num_embeddings - limit <= _SPARE_ROWS)
        return next((m for m in tables if m not in set(self.embeddings.modules())), None)

    def first_position(self) -> Tensor:
        """Return the vector `(D,)` that a learned position table adds at position 0.

        Raises:
            ValueError: if it is not added to the input embeddings themselves.
        """
        table = self._position_table
        if table is None or table.embedding_dim != self.embedding_size:
            raise ValueError(
                f"{type(self.model).__name__} adds positions to something other than its input "
                "embeddings; `zero_positions` must be false here."
            )
        # Rows before that of position 0 (padding) are what the table has beyond its positions.
        return loaded(table, "weight")[table.num_embeddings - self.config.max_position_embeddings]

    @property
    def attached(self) -> bool:
        """Whether a memory model holds this backbone's layers or attention."""
        modules = list(self.decoder.modules())
        return any(is_lent(m, kind) for m in modules for kind in (*_KINDS, attention_place.KIND))

    def attach(self, points: Collection[str]) -> None:
        """Let the layers ("layer") and their attention ("attention") meet a memory, the last
        feed-forward block ("feed_forward") note its input, and recurrent layers meet what they
        remember.

        Raises:
            ValueError: if the model lacks what a place needs, or its recurrent layers cannot go on
                from what they remember.
        """
        if "feed_forward" in points:
            feed_forward_place.attach(self._feed_forward())
        if "attention" in points:
            attention_place.attach(self.model, self.attention_modules.values())
        try:
            self._attach_own()
            if "layer" in points:
                layer_place.attach(self.layers)
                self._check_layers()
        except ValueError:
            self.detach()
            raise

    def _attach_own(self) -> None:
        """Let the parts of which every memory model needs to know more than their inputs meet
        it."""
        if self.ids_matter:
            token_ids_place.attach(self.embeddings)
        if self.recurrent:
            self._remembered = self._carry_on()

    def check(self) -> None:
        """Refuse a model that memwrap would read segments with wrongly, by reading a row of tokens.

        Raises:
            ValueError: says what it does otherwise.
        """
        try:
            self._attach_own()
            with self._quiet(), reading_probe.explained(type(self.model).__name__):
                reading_probe.check_reading(self)
        finally:
            self.detach()

    def _check_layers(self) -> None:
        """Refuse layers that are given something else than hidden states `(B, T, D)`."""
        probe = layer_place.LayerProbe()
        with self._quiet():
            self.run(self._noise(2), torch.arange(2)[None], context=probe)
        name, width = type(self.model).__name__, self.config.hidden_size
        if len(probe.shapes) != len(self.layers):
            raise ValueError(
                f"{name} calls {len(probe.shapes)} of its {len(self.layers)} decoder layers; "
                "memories at the layer place need all. Use one at another place (rmt)."
            )
        other = next((shape for shape in probe.shapes.values() if shape != (1, 2, width)), None)
        if other is not None:
            raise ValueError(
                f"{name} hands its layers hidden states of shape {other}, not (1, 2, {width}); use "
                "a memory at another place than the layers (rmt, infini)."
            )

    def _carry_on(self) -> Tree:
        """Let recurrent layers carry their states; what they remember of a row without tokens."""
        recurrent_place.attach([self.layers[n] for n in self.recurrent])
        recurrence, name = recurrent_place.Probe(), type(self.model).__name__
        try:
            self._probe(recurrence.TOKENS, recurrence=recurrence)
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"{name} keeps what its recurrent layers remember in another way than "
                f"transformers' LinearAttentionLayer; memwrap cannot carry it ({error})."
            ) from error
        return recurrence.empty(len(self.recurrent), name)

    def detach(self) -> None:
        """Give every layer and attention its own class and function back."""
        for module in self.decoder.modules():
            for kind in _KINDS:
                give_back(module, kind)
        if self._attending:
            attention_place.detach(self.model, self.attention_modules.values())

    @property
    def attention_modules(self) -> dict[int, nn.Module]:
        """The attention module of every layer that has one.

        Raises:
            ValueError: if a layer's cannot be found.
        """
        without = layers_without_attention(self.config)
        return attention_place.attention_modules(self.layers, without)

    def remembered(self, batch_size: int) -> Tree:
        """Make what the recurrent layers remember of `batch_size` rows that have read nothing: a
        tree for each layer by its number; empty for a backbone without such layers."""
        return tree_map(lambda t: t.new_zeros(batch_size, *t.shape[1:]), self._remembered)

    @property
    def _attending(self) -> bool:
        return str(self.config._attn_implementation).startswith(attention_place.PREFIX)

    @contextmanager
    def attention_lent(self) -> Iterator[None]:
        """Let the attention meet a memory inside the block, whoever holds the backbone."""
        modules = self.attention_modules.values()
        attention_place.attach(self.model, modules)
        try:
            yield
        finally:
            attention_place.detach(self.model, modules)

    def attention_sizes(self) -> dict[int, AttentionSizes]:
        """Find heads and widths of every layer's attention by running a few tokens, once.

        Raises:
            ValueError: if the model does not offer what the attention place needs.
        """

        def run(positions: Tensor, context: Any) -> None:
            self._probe(positions.shape[1], positions, context=context)

        with LOCK:  # a second look would run, and watch, modules that other threads are in
            if self._sizes is None:
                name, number = type(self.model).__name__, len(self.attention_modules)
                with self.attention_lent(), reading_probe.explained(name):
                    self._sizes = probe(run, self.decoder, self.layers, number, self.rotary, name)
            return self._sizes

    def _probe(self, tokens: int, positions: Tensor | None = None, **passed: Any) -> None:
        """Run one row of noise through the decoder, in evaluation mode."""
        where = torch.arange(tokens)[None] if positions is None else positions
        with self._quiet():
            self.run(self._noise(tokens), where, **passed)

    def _one_token(self, **passed: Any) -> None:
        """Run one token of noise through the decoder with the given keywords."""
        where = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        noise = self._noise(1)
        with self._quiet():
            self.decoder(**self._given(noise, None), position_ids=where, **passed)

    def _looks_at_ids(self) -> bool:
        ids = reading_probe.sample_ids(self.embedding_weight.shape[0]).to(self.device)
        with self._quiet():
            return reading_probe.looks_at_ids(
                self.decoder, ids, self.embed(ids), self._noise(ids.shape[1])
            )

    def _given(self, embeds: Tensor, ids: Tensor | None) -> dict[str, Tensor]:
        """Choose what the decoder is given of a step's columns."""
        if self.ids_matter:
            return {"input_ids": token_ids_place.filled(ids, embeds, self.config)}
        return {"inputs_embeds": embeds}

    def _noise(self, tokens: int) -> Tensor:
        """Draw embeddings `(1, tokens, D)` at the scale of the model's own."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, tokens, self.embedding_size, generator=generator)
        return (noise * (self.embedding_std() or 1.0)).to(self.device, self.embedding_weight.dtype)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Run the block without gradients, with the model in evaluation mode and embeddings that
        give way to a run's where ids matter."""
        lent = self.ids_matter
        if lent:
            token_ids_place.attach(self.embeddings)
        try:
            with reading_probe.evaluating(self.model), torch.no_grad():
                yield
        finally:
            if lent:
                give_back(self.embeddings, token_ids_place.KIND)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Turn ids `(B, T)` into embeddings `(B, T, D)`."""
        return self.embeddings(input_ids)

    def _feed_forward(self) -> nn.Module:
        """Find the last layer's feed-forward block.

        Raises:
            ValueError: if the model's layers or their parts cannot be found.
        """
        last = len(self.layers) - 1
        mixers = [module for n, module in self.attention_modules.items() if n == last]
        if last in self.recurrent:
            mixers.append(recurrent_place.recurrent_module(self.layers[last]))
        return feed_forward_place.feed_forward(self.layers[last], mixers)

    def run(
        self,
        embeds: Tensor,
        positions: Tensor,
        *,
        key_positions: Tensor | None = None,
        key_valid: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        context: Any = None,
        recurrence: Recurrence | None = None,
        feed_forward: list[Tensor] | None = None,
        ids: Tensor | None = None,
        routed: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the decoder over embeddings. Several may run at once.

        Args:
            embeds: `(B, T, D)`.
            positions: `(B, T)`.
            key_positions, key_valid: `(B, K)`, of the cached keys and the new ones; `None` means
                plain causal attention over T contiguous positions, without a mask tensor.
            position_ids: `(B, T)`, where what the backbone is told differs from `positions`,
                the order that masks are made of.
            cache: holds the keys and values of the open segment and takes up the new ones.
            context: read and written by the layers (`LayerReader`, `AttentionReader`).
            recurrence: what recurrent layers remember of the rows, and will.
            feed_forward: takes up what the last feed-forward block is given, if it is attached.
            ids: `(B, T)` the tokens' own, -1 elsewhere; for a backbone where they matter.
            routed: takes up the logits of the layers' routers.

        Returns:
            The last hidden states `(B, T, D)`, after the final norm.
        """
        mask = None
        if key_positions is not None and key_valid is not None:
            mask = build_masks(
                self.config, positions, key_positions, key_valid,
                dtype=embeds.dtype, device=embeds.device,
            )  # fmt: skip
        position_ids = positions if position_ids is None else position_ids
        noted = feed_forward_place.inputs_noted_in(feed_forward)
        given: dict[str, Any] = {**self._given(embeds, ids), self.cache_name: cache}
        given |= {BALANCE: True} if routed is not None else {}
        embeddings = token_ids_place.embeddings_given(embeds if self.ids_matter else None)
        with reaching(context), recurrent_place.carried(recurrence), noted, embeddings:
            out = self.decoder(
                attention_mask=mask, position_ids=position_ids.to(embeds.device),
                use_cache=cache is not None, **given,
            )  # fmt: skip
        if routed is not None:
            routed.extend(out.router_logits)
        return out.last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Compute the logits `(B, T, V)` of last hidden states, through the model's own forward."""
        return head_logits(self.model, self._path, hidden)

    def embedding_std(self) -> float:
        """Compute the standard deviation of the input embedding weights."""
        return float(loaded(self.embeddings, "weight").detach().float().std())

    @torch.no_grad()
    def embedding_mean(self) -> Tensor:
        """Compute the mean `(D,)` of the embeddings of all ids, in float32."""
        ids = torch.arange(self.embedding_weight.shape[0], device=self.device)
        return sum(self.embed(part).float().sum(0) for part in ids.split(8192)) / len(ids)  # type: ignore[return-value]


def memory_dtype(model: PreTrainedModel) -> torch.dtype:
    """Choose the dtype of memory parameters: float32 whatever the backbone's is, float64 for
    float64."""
    return torch.promote_types(next(model.parameters()).dtype, torch.float32)
