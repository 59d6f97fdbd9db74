"""Families whose decoder is reached otherwise than most: inside models that see, with ids that
matter, with layers that get no keyword, with angles that depend on the length fed."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from support import assert_pieces_and_padding, crossed, refused
from transformers import (
    CONFIG_MAPPING,
    Apertus1p5Config,
    AutoModelForCausalLM,
    EvollaConfig,
    FalconConfig,
    Gemma3Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    ModernBertDecoderConfig,
    MoshiConfig,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    PaliGemmaConfig,
    Phi3Config,
    PreTrainedConfig,
    RemBertConfig,
    StableLmConfig,
)

import memwrap
from memwrap.backbones import Backbone
from memwrap.cli.small_models import VOCABULARY, reduced, small_model
from memwrap.cli.trying import LIMIT, QUICK, REFUSED, RIGHT, builder, try_memory
from memwrap.testing.helpers import assert_close, ids, tiny

PLACES = ("rmt", "armt", "window", "landmark", "knnlm")


@cache
def architecture(name: str) -> Any:
    configs: dict[str, PreTrainedConfig] = {
        "gemma3": Gemma3Config(),
        "llava": LlavaConfig(),
        # Ids that matter; of four layers two share the keys of others.
        "gemma4": Gemma4TextConfig(num_kv_shared_layers=18),
        "gemma3n": Gemma3nTextConfig(),
        "stablelm": StableLmConfig(),
    }
    return builder(lambda: small_model(configs[name]))


# All places in a decoder inside a model that sees, with ids that matter, of half-turned heads.
@pytest.mark.parametrize(("memory", "name"), crossed(PLACES, ["gemma3", "gemma4", "stablelm"], 2))
def test_right_at_every_place(name: str, memory: str) -> None:
    trial = try_memory(memory, architecture(name))
    assert trial.result == RIGHT, trial.problem


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_models_that_see_read_text_and_refuse_pictures(name: str) -> None:
    model = memwrap.wrap(architecture(name)(), tiny("armt"))
    text, pixels = ids(1, 20), torch.zeros(1, 3, 8, 8)
    with refused("pixel_values", "text alone"):
        model(input_ids=text, pixel_values=pixels)
    with refused("pixel_values", "text alone"):
        model.generate(text, pixel_values=pixels, max_new_tokens=1)


@torch.no_grad()
def test_ids_that_matter_travel_along() -> None:
    base = architecture("gemma4")()
    text = ids(2, 20)
    want = base(text).logits
    table = base.get_decoder().embed_tokens_per_layer.weight
    model = memwrap.wrap(base, memwrap.WindowConfig(segment_size=8, window_size=64, num_sinks=0))
    assert model.parts.ids_matter and model.parts.max_positions is None
    assert_close(model(text).logits, want, 1e-5)
    with refused("looks at the ids", "input_ids"):
        model(inputs_embeds=base.get_input_embeddings()(text))
    table.mul_(-1)
    other = base(text).logits
    assert float((other - want).abs().max()) > 0.1 * float(want.abs().max()), "ids do not matter"
    assert_close(model(text).logits, other, 1e-5)
    # A segment that closes without tokens: layers that share keys find them.
    state = model.close_segment(model.read(text[:, :5]))
    assert state.segments.tolist() == [1, 1]


def test_layers_of_more_than_one_stream_are_refused_by_shape() -> None:
    with refused("hidden states of shape", "at another place"):
        memwrap.wrap(architecture("gemma3n")(), tiny("armt"))


@torch.no_grad()
def test_layers_in_chunks() -> None:
    base = small_model(Llama4TextConfig())
    text = ids(1, 8)
    model = memwrap.wrap(base, tiny("infini"))
    assert_close(model(text).logits, base(text).logits, 1e-5)
    assert_pieces_and_padding(model)


def test_a_window_over_layers_in_chunks_is_said_to_be_limited() -> None:
    trial = try_memory("window", builder(lambda: small_model(Llama4TextConfig())))
    assert trial.result == LIMIT and "in chunks" in trial.problem, trial


def test_what_cannot_be_read_is_refused_when_it_is_wrapped() -> None:
    with refused("see those behind them", "causal"):
        memwrap.wrap(small_model(PaliGemmaConfig()), tiny("rmt"))
    falcon = small_model(FalconConfig(alibi=True))
    with refused("FalconForCausalLM"):
        memwrap.wrap(falcon, tiny("rmt"))
    plain = small_model(FalconConfig())
    with refused("transformers' attention functions", "another place"):
        memwrap.wrap(plain, tiny("window"))
    assert try_memory("armt", builder(lambda: small_model(FalconConfig()))).result == RIGHT


WITHOUT_IDS = {
    "blip": "offers no input or no output embeddings",
    "dots3_note_text": "has layers of type indexed_attention",  # heads that differ by layer
    "xlstm": "cannot carry the cache",
}


@pytest.mark.parametrize("kind", [n for n in WITHOUT_IDS if n in CONFIG_MAPPING])
def test_what_no_ids_suffice_for_is_refused_too(kind: str) -> None:
    """A small model is built of every config, and wrapping says what it lacks."""
    with refused(WITHOUT_IDS[kind]):
        memwrap.wrap(small_model(CONFIG_MAPPING[kind]()), tiny("rmt"))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_angles_that_depend_on_the_length_fed_limit_segments(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 48, "long_factor": [4.0] * 48}
        config: PreTrainedConfig = Phi3Config(
            rope_parameters=rope, max_position_embeddings=128, original_max_position_embeddings=32
        )
    else:
        config = LlamaConfig(rope_parameters=rope, max_position_embeddings=32)
    base = small_model(config)
    assert Backbone(base).position_limit.positions == 32  # type: ignore[union-attr]
    with refused("beyond 32", kind, "at most 26"):
        memwrap.wrap(base, memwrap.RMTConfig(segment_size=27, num_memory_tokens=3))
    with refused("beyond 32", "Use fewer memory tokens"):
        memwrap.wrap(base, memwrap.RMTConfig(segment_size=8, num_memory_tokens=16))
    model = memwrap.wrap(base, memwrap.RMTConfig(segment_size=26, num_memory_tokens=3))
    assert_pieces_and_padding(model)
    memwrap.unwrap(model)
    with pytest.warns(UserWarning, match=f"'ahn' counts positions.*{kind}"):
        counting = memwrap.wrap(base, tiny("ahn"))
    with refused("reads at position", "beyond 32"):
        counting(ids(1, 60))
    memwrap.unwrap(counting)
    for name, settings, near in (
        ("window", {"window_size": 32, "num_sinks": 2}, {"window_size": 30}),
        ("lact", {"window_size": 32, "num_sinks": 2}, {"num_sinks": 0}),
        ("liger", {"window_size": 32, "num_sinks": 2}, {"num_sinks": 0}),
    ):
        with pytest.warns(UserWarning, match=f"'{name}' counts positions.*up to 33.*{kind}"):
            far = memwrap.wrap(base, name, segment_size=8, **settings)
        with refused("reads at position", "beyond 32"):
            far(ids(1, 60))
        memwrap.unwrap(far)
        model = memwrap.wrap(base, name, segment_size=8, **{**settings, **near})
        assert_pieces_and_padding(model)
        memwrap.unwrap(model)
    # What holds nothing yet stands nowhere.
    assert_pieces_and_padding(memwrap.wrap(base, "compact", segment_size=8))


def test_a_tower_inside_the_decoder_has_layers_of_its_own() -> None:
    """As many as the decoder, before them, with a table of positions."""
    base: Any = small_model(EvollaConfig(architectures=["EvollaForProteinText2Text"]))
    tower, parts = base.model.protein_encoder.model, Backbone(base)
    assert len(tower.encoder.layer) == len(base.model.layers) == 2
    assert parts.layers is base.model.layers and parts.max_positions is None
    assert try_memory("window", builder(lambda: base), checks=QUICK).result == RIGHT


def test_towers_keep_their_own_attention() -> None:
    base: Any = architecture("llava")()
    base.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    model = memwrap.wrap(base, tiny("window"))
    assert base.config.text_config._attn_implementation == "memwrap_sdpa"
    assert base.config.vision_config._attn_implementation == "eager"
    memwrap.unwrap(model)
    assert base.config.text_config._attn_implementation == "sdpa"
    assert base.config.vision_config._attn_implementation == "eager"


def test_codes_of_sound_are_refused() -> None:
    config = MusicgenDecoderConfig(num_hidden_layers=1, hidden_size=32, ffn_dim=32, vocab_size=64)
    with refused("MusicgenForCausalLM reads several ids at once", "with one table"):
        memwrap.wrap(MusicgenForCausalLM(config), tiny("rmt"))


def test_towers_that_cannot_be_narrowed_stay_as_they_are() -> None:
    """Their widths depend on each other, and the vocabulary holds theirs."""
    config = Apertus1p5Config()
    with pytest.raises(StrictDataclassClassValidationError, match="WavTokenizer"):
        reduced(config)
    small = reduced(config, towers=True)
    assert small.text_config.hidden_size == 64
    assert small.text_config.vocab_size == config.text_config.vocab_size > VOCABULARY
    assert small.audio_config.hidden_size == config.audio_config.hidden_size == 512
    assert small.vision_config.base_channels == 32


def test_a_window_that_the_model_does_not_have_is_noticed() -> None:
    """Its config names one and its masks have none: its cache would forget what it sees."""
    with refused("MoshiForCausalLM", "sees beyond .*`sliding_window`"):
        memwrap.wrap(small_model(MoshiConfig(), auto=AutoModelForCausalLM), tiny("rmt"))


def test_hidden_states_of_another_width_than_embeddings_are_refused() -> None:
    config = RemBertConfig(is_decoder=True, hidden_size=64, num_hidden_layers=2, vocab_size=256)
    with refused("embeds tokens in 256 numbers", "hidden states of 64"):
        memwrap.wrap(small_model(config, auto=AutoModelForCausalLM), tiny("rmt"))


def test_a_head_that_is_named_decoder_is_none() -> None:
    trial = try_memory("window", builder(lambda: small_model(ModernBertDecoderConfig())))
    assert trial.result == RIGHT, trial.problem


def test_refused_is_what_is_said_of_a_model_that_is_no_text_model() -> None:
    trial = try_memory("rmt", builder(lambda: small_model(MambaConfig())))
    assert trial.result == REFUSED and "no attention layers" in trial.problem
