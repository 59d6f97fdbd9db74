"""The engine alone: nobody waits for an answer that nobody writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.serving.answers import Answer, Sampling
from memwrap.serving.engine import Engine, Stopped

PROMPT = list(range(5, 25))
SHORT = Sampling(max_tokens=3)


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32)
    model = memwrap.wrap(base, "window", segment_size=32).eval()
    return model, AutoTokenizer.from_pretrained(asset("tiny-lm"))


def test_a_stopped_engine_takes_nothing(parts: tuple[Any, Any]) -> None:
    engine = Engine(*parts)
    with pytest.raises(Stopped, match="start it again"):
        engine.submit(Answer(PROMPT, SHORT))
    with engine:
        want = engine.submit(Answer(PROMPT, SHORT)).wait()
    with pytest.raises(Stopped, match="start it again"):
        engine.submit(Answer(PROMPT, SHORT))
    with engine:  # started again
        assert engine.submit(Answer(PROMPT, SHORT)).wait() == want


def test_what_runs_or_waits_when_it_stops_is_told(parts: tuple[Any, Any]) -> None:
    engine = Engine(*parts)
    with engine:
        answers = [engine.submit(Answer(PROMPT, Sampling(max_tokens=4000))) for _ in range(12)]
    for answer in answers:
        with pytest.raises(Stopped):
            answer.wait()
    assert engine._count == 0


def test_an_answer_that_fails_fails_alone(
    parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that no draw takes, and a draw that fails."""
    with Engine(*parts) as engine:
        want = engine.submit(Answer(PROMPT, SHORT)).wait()
        with pytest.raises(ValueError, match="top_p"):
            engine.submit(Answer(PROMPT, Sampling(temperature=0.5, top_p=-1.0))).wait()
        bad = Answer(PROMPT, Sampling(max_tokens=3, stop=(7,)))  # type: ignore[arg-type]
        answers = [engine.submit(a) for a in (bad, Answer(PROMPT, SHORT))]
        with pytest.raises(TypeError):
            answers[0].wait()
        assert answers[1].wait() == want
        assert engine._count == 0


def test_an_engine_that_fails_says_so(
    parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its thread meets: those who wait are told, and later ones refused."""
    engine = Engine(*parts)

    def fail(*_: Any) -> Any:
        raise MemoryError("no memory left")

    monkeypatch.setattr(engine.prefixes, "longest", fail)
    with engine:
        with pytest.raises(MemoryError, match="no memory left"):
            engine.submit(Answer(PROMPT, SHORT)).wait()
        engine._thread.join()  # type: ignore[union-attr]
        with pytest.raises(Stopped):
            engine.submit(Answer(PROMPT, SHORT))
