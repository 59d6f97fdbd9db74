"""The server: its answers are those of `generate`, whoever else asks, and states come back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.chat import Conversation, read_document
from memwrap.serving import Engine, Limits, NamedStates, create_app

TEXT = "def add(a, b):\n    return a + b\n" * 30
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' "
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GREEDY = {"temperature": 0, "max_tokens": 12}
# The server knows no memory by name: one shows it.
SLOW = [pytest.param(memory, marks=pytest.mark.slow) for memory in ("infllm", "window")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module", params=["armt", *SLOW])
def model(request: Any) -> Any:
    if request.param == "armt":
        return memwrap.load("armt-lm", dtype=torch.float32)
    # In bfloat16 a batch rounds in another way than a row alone.
    base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32)
    return memwrap.wrap(base, memwrap.config_class(request.param)(segment_size=32)).eval()


@pytest.fixture
def client(model: Any, tokenizer: Any) -> Iterator[TestClient]:
    with opened(model, tokenizer) as client:
        yield client


def opened(
    model: Any, tokenizer: Any, folder: Path | None = None, key: str | None = None, **limits: Any
) -> TestClient:
    engine = Engine(model, tokenizer, Limits(**limits))
    states = NamedStates(model, folder, engine.limits.state_bytes)
    return TestClient(create_app(engine, states, name="tiny", api_key=key))


def generated(model: Any, tokenizer: Any, prompt: str, count: int = 12) -> str:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def streamed(answer: Any) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_many_at_once_get_what_each_gets_alone(client: Any, model: Any, tokenizer: Any) -> None:
    prompts = [TEXT[: 40 + 67 * n] for n in range(5)]
    want = [generated(model, tokenizer, prompt) for prompt in prompts]
    assert len(set(want)) > 3

    def ask(n: int) -> str:
        answer = client.post("/v1/completions", json={"prompt": prompts[n % 5], **GREEDY})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(10))) == want * 2


def test_a_beginning_that_was_read_is_not_read_again(
    client: Any, model: Any, tokenizer: Any
) -> None:
    first = client.post("/v1/completions", json={"prompt": TEXT, **GREEDY}).json()
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    again = client.post("/v1/completions", json={"prompt": TEXT, **GREEDY}).json()
    total = again["usage"]["prompt_tokens"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == total - 1
    assert again["choices"] == first["choices"]
    other = client.post("/v1/completions", json={"prompt": TEXT + "class", **GREEDY}).json()
    assert total - 2 <= other["usage"]["prompt_tokens_details"]["cached_tokens"] <= total
    assert other["choices"][0]["text"] == generated(model, tokenizer, TEXT + "class")


def test_a_stream_is_the_answer_in_pieces(client: Any) -> None:
    for path, given in (
        ("/v1/completions", {"prompt": TEXT}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "import os"}]}),
    ):
        whole = client.post(path, json={**given, **GREEDY}).json()
        chat = "message" in whole["choices"][0]
        text = whole["choices"][0]["message"]["content"] if chat else whole["choices"][0]["text"]
        counted = {"stream": True, "stream_options": {"include_usage": True}}
        *pieces, last = streamed(client.post(path, json={**given, **GREEDY, **counted}))
        parts = [p["choices"][0] for p in pieces]
        assert "".join(p["delta"].get("content", "") if chat else p["text"] for p in parts) == text
        assert parts[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
        assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_a_state_is_read_once_and_asked_often(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    question = [{"role": "user", "content": "What is added?"}]
    talk = Conversation(
        model, tokenizer, read_document(model, tokenizer, TEXT), do_sample=False, max_new_tokens=12
    )
    want = talk.ask("What is added?")
    with opened(model, tokenizer, tmp_path) as client:
        made = client.post("/v1/states", json={"name": "sum", "text": TEXT, "save": True})
        assert made.status_code == 201 and made.json()["saved"], made.text
        assert client.post("/v1/states/sum/fork", json={"to": "copy"}).status_code == 201
        assert [s["name"] for s in client.get("/v1/states").json()["data"]] == ["copy", "sum"]
        for name in ("sum", "copy", "sum"):
            request = {"messages": question, "state": name, **GREEDY}
            answer = client.post("/v1/chat/completions", json=request).json()
            assert answer["choices"][0]["message"]["content"] == want
    # Killed here: what was saved is there again, what was not is gone.
    with opened(model, tokenizer, tmp_path) as client:
        assert [s["name"] for s in client.get("/v1/states").json()["data"]] == ["sum"]
        answer = client.post("/v1/chat/completions", json=request).json()
        assert answer["choices"][0]["message"]["content"] == want
        new = answer["usage"]["prompt_tokens"] - made.json()["tokens"]
        details = answer["usage"]["prompt_tokens_details"]
        assert details["cached_tokens"] == made.json()["tokens"] and 0 < new < 40
        talk = [*question, {"role": "assistant", "content": want}, *question]
        answer = client.post("/v1/chat/completions", json={**request, "messages": talk}).json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > made.json()["tokens"]
        assert client.delete("/v1/states/sum").json() == {"name": "sum", "deleted": True}
        assert client.post("/v1/chat/completions", json=request).status_code == 404
    assert list(tmp_path.iterdir()) == []


def test_states_beyond_the_limit_go_to_files(model: Any, tmp_path: Path) -> None:
    states = NamedStates(model, tmp_path, most_bytes=1)
    read = {str(n): model.read([list(range(n, n + 50))]) for n in range(3)}
    for name, state in read.items():
        states.put(name, state)
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["0", "1"]
    for name, state in read.items():
        got, key = states.get(name)
        assert torch.equal(got.ids_hash, state.ids_hash) and key.startswith(name)
    for name in ("../x", "", ".hidden", "a/b", "x" * 101):
        with pytest.raises(ValueError, match="name for a state"):
            states.put(name, read["0"])


def test_servers_of_one_folder_see_what_each_has_read(model: Any, tmp_path: Path) -> None:
    first, second = (NamedStates(model, tmp_path, 2**30, save_all=True) for _ in range(2))
    for seed in (1, 2):  # the second time instead of the first
        state = model.read([list(range(seed, seed + 50))])
        first.put("report", state)
        assert first.is_saved("report")
        assert torch.equal(second.get("report")[0].ids_hash, state.ids_hash)
    with pytest.raises(ValueError, match="no folder"):
        NamedStates(model, None, 2**30, save_all=True)


@pytest.mark.slow
def test_draws_follow_their_seed(client: Any) -> None:
    drawn = {"prompt": TEXT, "temperature": 1.5, "max_tokens": 20}
    texts = [
        client.post("/v1/completions", json={**drawn, "seed": seed}).json()["choices"][0]["text"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_stops_are_cut(client: Any) -> None:
    whole = client.post("/v1/completions", json={"prompt": TEXT, **GREEDY}).json()
    text = whole["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    request = {"prompt": TEXT, **GREEDY, "stop": [stop, "\u2603"]}
    cut = client.post("/v1/completions", json=request).json()["choices"][0]
    assert cut == {**cut, "text": text[: text.index(stop)], "finish_reason": "stop"}
    pieces = streamed(client.post("/v1/completions", json={**request, "stream": True}))
    assert "".join(p["choices"][0]["text"] for p in pieces) == cut["text"]


def test_what_is_refused(model: Any, tokenizer: Any) -> None:
    with opened(model, tokenizer, key="secret", prompt_tokens=50, body_bytes=4000) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/v1/models").status_code == 401
        client.headers["Authorization"] = "Bearer secret"
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        for status, path, request, words in (
            (400, "completions", {"prompt": TEXT[:900]}, "at most 50"),
            (413, "completions", {"prompt": "x" * 5000}, "4000 bytes"),
            (400, "completions", {"prompt": []}, "empty"),
            (400, "completions", {"prompt": "a", "n": 2}, "`n`"),
            (400, "completions", {"prompt": ["a", "b"]}, "Several prompts"),
            (400, "completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
            (404, "completions", {"prompt": "a", "state": "none"}, "none"),
            (400, "completions", {"prompt": "a", "state": "../x"}, "name"),
            (400, "chat/completions", {"messages": []}, "messages"),
            (400, "states", {"name": "../x", "text": "a"}, "name"),
            (400, "states", {"name": "x", "text": "abc def", "save": True}, "folder"),
            (201, "states", {"name": "x", "text": "abc def"}, None),
            (409, "states", {"name": "x", "text": "abc"}, "already"),
            (400, "states/x/save", None, "folder"),
            (409, "states/x/fork", {"to": "x"}, "already"),
        ):
            answer = client.post(f"/v1/{path}", json=request)
            assert answer.status_code == status, answer.text
            assert words is None or words in answer.json()["error"]["message"], answer.text


def test_too_many_are_told_to_wait(model: Any, tokenizer: Any) -> None:
    with opened(model, tokenizer, waiting=0) as client:
        answer = client.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 429 and "later" in answer.json()["error"]["message"]


def test_errors_have_one_shape(client: TestClient) -> None:
    """Those of the framework too, as OpenAI's clients expect them."""
    tools = {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}
    found = {
        "Not Found": client.get("/v1/nothing"),
        "Method Not Allowed": client.get("/v1/completions"),
        "`tools` = [{}] is not supported here; leave it out": client.post(
            "/v1/chat/completions", json=tools
        ),
        "The body is no JSON; send an object.": client.post(
            "/v1/completions", content="no", headers={"Content-Type": "application/json"}
        ),
    }
    for message, answer in found.items():
        error = answer.json()["error"]
        assert error["message"] == message and error["code"] == answer.status_code
