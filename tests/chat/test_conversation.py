"""What a conversation has read is exactly what the chat template makes of all of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from templates import BEGINNINGS, DATED, SPECIAL, TEMPLATES
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import memwrap
from memwrap.assets import asset
from memwrap.chat import Conversation, read_document
from memwrap.chat.turns import SEPARATOR, Turns
from memwrap.serving.prompts import chat_ids

DOCUMENT = "\n\n".join(
    f"Line {n}: the key of room {n} hangs behind door {n * 7 % 11}." for n in range(12)
)
QUESTIONS = ["Where does the key of room 3 hang?", "  - And of room 4?\n", "Thanks, bye."]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    return tokenizer


@pytest.fixture
def model(tokenizer: Any) -> memwrap.MemoryModelForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )  # fmt: skip
    return memwrap.wrap(LlamaForCausalLM(config).eval(), "infllm", segment_size=32)


def with_template(tokenizer: Any, name: str) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATES[name]
    tokenizer.bos_token = BEGINNINGS.get(name, "<s>")
    return tokenizer


def rendered(tokenizer: Any, turns: list[dict], document: str = "", answer: bool = True) -> list:
    turns = copy.deepcopy(turns)
    if document:
        turns[0]["content"] = document + SEPARATOR + turns[0]["content"]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer)
    return tokenizer(text, add_special_tokens=False).input_ids


def hash_of(ids: list[int]) -> Any:
    return memwrap.MemoryState({}, 1).extend_hash(torch.tensor([ids]), len(ids))


def assert_read(state: memwrap.MemoryState | None, ids: list[int], least: int) -> None:
    """What a state has read (by its rolling hash) is the beginning of `ids`, and `least` of it."""
    assert state is not None and least <= state.columns <= len(ids), (least, len(ids))
    assert torch.equal(state.ids_hash, hash_of(ids[: state.columns]))  # type: ignore[arg-type]


def assert_goes_on(
    talk: Conversation, before: list[int], document: str = "", *, drop: int = 0
) -> None:
    """A conversation has read `before`, and then the beginning of what its template makes of all
    turns and another, without its first `drop` ids."""
    turns = [*talk.turns, {"role": "user", "content": "x"}]
    least = len(rendered(talk.tokenizer, talk.turns[:-1], document)) - drop
    ids = before + rendered(talk.tokenizer, turns, document)[drop:]
    assert_read(talk.state, ids, len(before) + least)


@pytest.mark.parametrize("document", ["", DOCUMENT], ids=["nothing", "document"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_read_is_the_template_of_all(
    model: Any, tokenizer: Any, template: str, document: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = with_template(tokenizer, template)
    asked: list[tuple[int, torch.Tensor]] = []  # new ids, and the hash of all before the answer
    generate = model.generate

    def noted(ids: torch.Tensor, cache: Any, **rest: Any) -> Any:
        state = cache.clone() if cache is not None else memwrap.MemoryState({}, 1)
        asked.append((ids.shape[1], state.extend_hash(ids, ids.shape[1])))
        return generate(ids, cache=cache, **rest)

    monkeypatch.setattr(model, "generate", noted)
    state = read_document(model, tokenizer, document) if document else None
    talk = Conversation(model, tokenizer, state, max_new_tokens=5, do_sample=False)
    for question in QUESTIONS:  # every answer is cut by the limit
        talk.ask(question)
        whole = rendered(tokenizer, talk.turns[:-1], document)
        assert torch.equal(asked[-1][1], hash_of(whole))
        if template != "thinking":
            assert_goes_on(talk, [], document)
    if document:  # it was not read again
        assert (
            max(count for count, _ in asked)
            < len(rendered(tokenizer, talk.turns[:1], document)) / 2
        )


@pytest.mark.parametrize("document", ["", DOCUMENT], ids=["nothing", "document"])
@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "thinking"])
def test_turns_with_given_answers_are_read_as_the_template_makes_them(
    model: Any, tokenizer: Any, template: str, document: str
) -> None:
    tokenizer = with_template(tokenizer, template)
    state = read_document(model, tokenizer, document) if document else None
    talk = Conversation(model, tokenizer, state, max_new_tokens=4, do_sample=False)
    talk.tell("The key of room 3 was moved to door 9.", "I see.")
    before = talk.state
    talk.tell("And that of room 4 is lost.", "Noted.")
    assert [turn["content"] for turn in talk.turns[1::2]] == ["I see.", "Noted."]
    assert_goes_on(talk, [], document)
    again = Conversation(model, tokenizer, talk.state, max_new_tokens=4, do_sample=False)
    assert again.turns == talk.turns
    answers = [each.ask(QUESTIONS[0]) for each in (talk, again)]
    assert answers[0] == answers[1]
    assert_goes_on(talk, [], document)
    talk.undo()
    talk.undo()
    assert talk.state is before and len(talk.turns) == 2
    with pytest.raises(ValueError, match="turn or its answer is empty"):
        talk.tell("Something.", " ")


def test_what_would_be_said_is_what_is_generated(model: Any, tokenizer: Any) -> None:
    tokenizer = with_template(tokenizer, "llama3")
    talk = Conversation(model, tokenizer, max_new_tokens=1, do_sample=False)
    talk.tell(DOCUMENT, "Thank you.")
    state = talk.state
    said = talk.ask(QUESTIONS[0])
    talk.undo()
    assert talk.state is state
    assert tokenizer(said, add_special_tokens=False).input_ids, "an empty answer: another seed"
    assert talk.would_say(QUESTIONS[0], said)
    assert not talk.would_say(QUESTIONS[0], " door" if said != " door" else " key")
    assert talk.state is state and len(talk.turns) == 2
    with pytest.raises(ValueError, match="answer is empty"):
        talk.would_say(QUESTIONS[0], "")


def test_a_saved_document_and_a_saved_chat_go_on(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer = with_template(tokenizer, "llama3")
    read_document(model, tokenizer, DOCUMENT).save(tmp_path / "a")
    talk = Conversation(
        model, tokenizer, memwrap.MemoryState.load(tmp_path / "a", model), max_new_tokens=3
    )
    talk.ask(QUESTIONS[0])
    talk.state.save(tmp_path / "b")
    again = Conversation(
        model, tokenizer, memwrap.MemoryState.load(tmp_path / "b", model), max_new_tokens=3
    )
    assert again.turns == talk.turns
    answers = [each.ask(QUESTIONS[1]) for each in (talk, again)]
    assert answers[0] == answers[1] and again.turns == talk.turns
    assert_goes_on(again, [], DOCUMENT)
    again.reset()
    assert len(again.turns) == 2
    with pytest.raises(ValueError, match="before questions"):
        read_document(model, tokenizer, "More.", again.state)


@pytest.mark.parametrize(
    "wrong",
    [{"context": 3}, {"tail": ["x"]}, {"turns": 3}, {"turns": [{"role": "user"}]}, {"strange": 1},
     {"turns": [{"role": "user", "content": 7}]}, {"read": 10**9}, {"read": "x"}, {"lead": -5}],
    ids=str,
)  # fmt: skip
def test_a_state_whose_chat_is_none_is_refused(
    model: Any, tokenizer: Any, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    tokenizer = with_template(tokenizer, "llama3")
    state = read_document(model, tokenizer, DOCUMENT)
    state.chat = {**state.chat, **wrong}
    state.save(tmp_path / "a")
    with pytest.raises(ValueError, match="chat is damaged"):
        Conversation(model, tokenizer, memwrap.MemoryState.load(tmp_path / "a", model))


def test_documents_follow_each_other_in_one_turn(model: Any, tokenizer: Any) -> None:
    tokenizer = with_template(tokenizer, "gemma")
    state = read_document(model, tokenizer, DOCUMENT)
    state = read_document(model, tokenizer, " And the cellar has no key. \n", state)
    both = DOCUMENT + SEPARATOR + "And the cellar has no key."
    talk = Conversation(model, tokenizer, state, max_new_tokens=2)
    talk.ask(QUESTIONS[0])
    assert_goes_on(talk, [], both)


@pytest.mark.parametrize("template", ["llama3", "smollm2"])
def test_behind_other_text_a_chat_has_no_beginning(
    model: Any, tokenizer: Any, template: str
) -> None:
    """A state that was read as plain text stands in front; the text begins once."""
    tokenizer = with_template(tokenizer, template)
    raw = tokenizer(DOCUMENT).input_ids
    state = model.read([raw])
    talk = Conversation(model, tokenizer, state, max_new_tokens=2)
    talk.ask(QUESTIONS[0])
    talk.ask(QUESTIONS[1])
    drop = 1 if template == "llama3" else 0  # <|im_start|> opens a turn and stays
    assert_goes_on(talk, raw, drop=drop)
    other = Conversation(model, tokenizer, talk.state, max_new_tokens=2)
    third = [each.ask(QUESTIONS[2]) for each in (talk, other)]
    assert third[0] == third[1]
    more = read_document(model, tokenizer, "A cellar has no key.", state)
    talk = Conversation(model, tokenizer, more, max_new_tokens=2)
    talk.ask(QUESTIONS[0])
    assert_goes_on(talk, raw, "A cellar has no key.", drop=drop)


def test_a_template_that_names_the_day_reads_on_the_next(model: Any, tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = DATED.replace("DAY", "'1 June'")
    state = read_document(model, tokenizer, DOCUMENT)
    lead = len(Turns(tokenizer).encode("Today: 1 June\n"))
    before = rendered(tokenizer, [{"role": "user", "content": "x"}], DOCUMENT)[:lead]
    tokenizer.chat_template = DATED.replace("DAY", "'the 22nd of September'")
    talk = Conversation(model, tokenizer, state, max_new_tokens=2)
    talk.ask(QUESTIONS[0])
    later = len(Turns(tokenizer).encode("Today: the 22nd of September\n"))
    assert later != lead
    assert_goes_on(talk, before, DOCUMENT, drop=later)


def test_an_answer_ends_as_the_template_ends_it(model: Any, tokenizer: Any) -> None:
    """The token that ends a turn ends the answer, whatever the model's own settings name."""
    for name, end in (("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("phi3", "<|end|>")):
        tokenizer = with_template(tokenizer, name)
        assert Turns(tokenizer).stops() == [tokenizer.convert_tokens_to_ids(end)]
        stops = Turns(tokenizer).stops_for(model)
        assert stops["eos_token_id"][-1] == tokenizer.convert_tokens_to_ids(end)
    tokenizer = with_template(tokenizer, "mistral")
    assert Turns(tokenizer).stops_for(model) == {}


def test_a_turn_is_taken_back(model: Any, tokenizer: Any) -> None:
    talk = Conversation(
        model, with_template(tokenizer, min(TEMPLATES)), do_sample=False, max_new_tokens=5
    )
    talk.read(DOCUMENT)
    first = talk.ask(QUESTIONS[0])
    turns, state = list(talk.turns), talk.state
    second = talk.ask(QUESTIONS[1])
    talk.undo()
    assert talk.turns == turns and torch.equal(talk.state.ids_hash, state.ids_hash)
    assert talk.ask(QUESTIONS[1]) == second
    for _ in range(2):
        talk.undo()
    assert talk.turns == [] and talk.ask(QUESTIONS[0]) == first
    talk.undo()
    with pytest.raises(ValueError, match="no question"):
        talk.undo()


def test_a_question_that_is_stopped_leaves_nothing(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Conversation(
        model, with_template(tokenizer, "smollm2"), do_sample=False, max_new_tokens=5
    )
    talk.read(DOCUMENT)
    talk.ask(QUESTIONS[0])
    turns, state = list(talk.turns), talk.state

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(talk, "_settle", stop)
        with pytest.raises(KeyboardInterrupt):
            talk.ask(QUESTIONS[1])
    assert talk.turns == turns and talk.state is state


@pytest.mark.parametrize("document", ["", DOCUMENT], ids=["nothing", "document"])
@pytest.mark.parametrize("shown", ["[-1:]", "[:1] + messages[1:][-2:]"], ids=["last", "window"])
def test_a_template_that_leaves_out_turns_is_told(
    model: Any, tokenizer: Any, document: str, shown: str
) -> None:
    """What was asked goes on where all of it is shown; the turn that would not see it is refused,
    and nothing is changed by it."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATES["phi3"].replace("in messages %", f"in messages{shown} %")
    talk = Conversation(model, tokenizer, do_sample=False, max_new_tokens=3)
    if document:
        talk.read(document)
    answer, seen = talk.ask(QUESTIONS[0]), 0 if shown == "[-1:]" else 1
    for question in QUESTIONS[1 : 1 + seen]:
        talk.ask(question)
    turns, read = list(talk.turns), talk.state.columns
    with pytest.raises(ValueError, match="leaves out earlier turns"):
        talk.ask(QUESTIONS[2])
    with pytest.raises(ValueError, match="leaves out earlier turns"):
        talk.tell(QUESTIONS[2], "No.")
    assert talk.turns == turns and talk.state.columns == read
    if document:
        message = [{"role": "user", "content": "x"}]
        with pytest.raises(ValueError, match="leaves out earlier turns"):
            chat_ids(tokenizer, message, talk.state)
    talk.reset()
    assert talk.ask(QUESTIONS[0]) == answer


def test_a_library_is_asked_in_a_turn(tokenizer: Any, model: Any) -> None:
    tokenizer = with_template(tokenizer, "smollm2")
    mind = memwrap.wrap(copy.deepcopy(memwrap.unwrap(model)), "extended_mind", segment_size=32)
    library = memwrap.Library.encode(mind, {"rooms": DOCUMENT}, tokenizer=tokenizer)
    answer = library.ask(QUESTIONS[0], tokenizer=tokenizer, max_new_tokens=3)
    ids = torch.tensor(rendered(tokenizer, [{"role": "user", "content": QUESTIONS[0]}]))
    assert answer.ids == library.ask(ids, max_new_tokens=3).ids


def test_a_template_that_changes_what_is_said_is_refused(model: Any, tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="word for word"):
        read_document(model, tokenizer, DOCUMENT)
    with pytest.raises(ValueError, match="empty"):
        read_document(model, tokenizer, " \n")
