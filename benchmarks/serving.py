"""The server as its users meet it: a process, a document of 16,000 tokens, many clients.

    python benchmarks/serving.py [--model smollm2] [--memory infllm] [--tokens 16000] [KEY=VALUE]...

1. `memwrap serve` reads a document into a state, and `curl` asks twice: what each request ran is in
   its usage. `memwrap chat` asks the state's file.
2. The server is killed with SIGKILL, once idle and once while it writes a state, and started again:
   the saved states answer as before.
3. 8 clients x 20 requests: every answer is compared with that of `generate` alone.

Writes benchmarks/results/serving.json, and what was typed and printed into
docs/howto/serve.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import RESULTS

from memwrap.chat import Conversation, read_document
from memwrap.cli import demo_texts as texts
from memwrap.evaluation.measure import machine
from memwrap.model.opening import open_model, open_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "serve.md"
MARKS = ("<!-- serving:begin -->", "<!-- serving:end -->")
CLIENTS, REQUESTS = 8, 20
SHORT = 300  # tokens of the text that the many requests are about
ASKED = {"max_tokens": 12, "temperature": 0}


class Server:
    """`memwrap serve` as a process.

    Args:
        words: of the command, behind `memwrap serve`.
        log: file for what it prints.
    """

    def __init__(self, words: list[str], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        command = [sys.executable, "-m", "memwrap", "serve", *words, "--port", str(self.port)]
        self.words = words
        with log.open("a") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)
        while True:
            try:
                self.get("/models")
                return
            except urllib.error.URLError:
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server ended; see {log}") from None
                time.sleep(0.2)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=600) as answer:
            return json.loads(answer.read())

    def post(self, path: str, body: dict[str, Any]) -> Any:
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, kind)
        with urllib.request.urlopen(request, timeout=3600) as answer:
            return json.loads(answer.read())

    def ask(self, state: str, question: str) -> dict[str, Any]:
        said = [{"role": "user", "content": question}]
        return self.post("/chat/completions", {"state": state, "messages": said, **ASKED})

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


class Transcript:
    """What was typed and what came back."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def run(self, shown: str, command: list[str], given: str | None = None) -> str:
        start = time.monotonic()
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
        out = done.stdout.strip()
        self.lines += [f"$ {shown}", out, f"[{time.monotonic() - start:.1f} s]", ""]
        print("\n".join(self.lines[-4:]), flush=True)
        return out


def long_document(
    asked: Any, words: list[str], folder: Path, spoken: Transcript, tokenizer: Any
) -> dict:
    """Talk about one long document, by `memwrap chat` and by `curl`; kill the server twice."""
    states, report = folder / "states", folder / "report.md"
    report.write_text(texts.document(tokenizer, asked.tokens))
    questions = [texts.question(texts.FACTS[place]) for place in (6, 8)]
    log = folder / "serve.log"
    server = Server([*words, "--states", str(states)], log)
    body = json.dumps({"name": "report", "save": True, "text": report.read_text()})
    head = ["curl", "-s", "-H", "Content-Type: application/json"]
    made = json.loads(spoken.run(
        "jq -Rs '{name: \"report\", save: true, text: .}' report.md | curl -s $url/states "
        "-H 'Content-Type: application/json' -d @-",
        [*head, f"{server.url}/states", "-d", "@-"], body))  # fmt: skip
    answers = []
    for question in questions:
        request = {"state": "report", "messages": [{"role": "user", "content": question}], **ASKED}
        sent = json.dumps(request)
        shown = f"curl -s $url/chat/completions -H 'Content-Type: application/json' -d '{sent}'"
        command = [*head, f"{server.url}/chat/completions", "-d", "@-"]
        answers.append(json.loads(spoken.run(shown, command, sent)))
    asked_again = server.ask("report", questions[0])
    server.kill()  # idle
    server = Server([*words, "--states", str(states)], log)
    after = [text_of(server.ask("report", q)) for q in questions]
    with ThreadPoolExecutor(1) as pool:  # while it writes a state
        name = "second"
        reading = pool.submit(server.post, "/states", {"name": name, "text": "A. " * 50})
        reading.result()
        saving = pool.submit(server.post, f"/states/{name}/save", {})
        time.sleep(0.005)
        server.kill()
        saving.exception()
    server = Server([*words, "--states", str(states)], log)
    names = [state["name"] for state in server.get("/states")["data"]]
    last = [text_of(server.ask("report", q)) for q in questions]
    if name in names:
        server.ask(name, "What is it?")  # whole, or there would be an error
    server.kill()
    shown = (
        f"memwrap chat {' '.join(words)} --state states/report.safetensors --ask '{questions[0]}'"
    )
    command = [sys.executable, "-m", "memwrap", "chat", *words, "--max-new-tokens", "12",
               "--state", str(states / "report.safetensors"), "--ask", questions[0]]  # fmt: skip
    chat = spoken.run(shown, command)
    said = [text_of(answer) for answer in answers]
    return {
        "tokens": made["tokens"], "bytes": made["bytes"], "seconds": made["seconds"],
        "answers": said, "usage": [answer["usage"] for answer in answers],
        "asked_again": asked_again["usage"], "same_again": text_of(asked_again) == said[0],
        "after_kill": after == said, "after_kill_while_saving": last == said,
        "states_after": names, "chat_same": said[0].strip() in chat,
    }  # fmt: skip


def many_clients(asked: Any, words: list[str], folder: Path, model: Any, tokenizer: Any) -> dict:
    """Let 8 clients send 20 requests each; compare with `generate`."""
    facts, text = texts.FACTS, texts.document(tokenizer, SHORT)
    state = read_document(model, tokenizer, text)
    settings = {"max_new_tokens": ASKED["max_tokens"], "do_sample": False}
    wanted = {}
    for fact in facts:
        wanted[fact.question] = Conversation(model, tokenizer, state, **settings).ask(fact.question)
    server = Server([*words, "--batch", str(CLIENTS)], folder / "serve.log")
    server.post("/states", {"name": "short", "text": text})
    start = time.monotonic()

    def client(number: int) -> list[bool]:
        right = []
        for request in range(REQUESTS):
            question = facts[(number + request) % len(facts)].question
            right.append(text_of(server.ask("short", question)) == wanted[question])
        return right

    with ThreadPoolExecutor(CLIENTS) as pool:
        right = [good for found in pool.map(client, range(CLIENTS)) for good in found]
    seconds = time.monotonic() - start
    server.kill()
    return {
        "clients": CLIENTS, "requests": len(right), "wrong": right.count(False),
        "different_answers": len(set(wanted.values())), "seconds": round(seconds, 1),
    }  # fmt: skip


def publish(found: dict[str, Any], lines: list[str]) -> None:
    """Write results and transcript into the page."""
    document, clients = found["document"], found["clients"]
    first, second = document["asked_again"], document["usage"][1]
    kept = ("after_kill", "after_kill_while_saving", "same_again", "chat_same")
    same = "yes" if all(document[name] for name in kept) else "**no**"
    text = "\n".join(lines).strip()
    body = f"""`python benchmarks/serving.py`, {found["model"]} with {found["memory"]}
({found["machine"]["cpu"]}, one thread on a busy machine):

```console
{text}
```

- {document["tokens"]:,} tokens were read once, in {document["seconds"]:.0f} s, into
  {document["bytes"] / 1e6:,.0f} MB. Of the second question's prompt {_cached(second):,} tokens were
  cached and {_new(second)} were run; of the first question, asked again, {_new(first)}.
- After `kill -9`, idle and while a state was being written, a new server gave the same answers
  from the saved state, and so did `memwrap chat`: {same}.
- {clients["clients"]} clients sent {clients["requests"]} requests about a short text in
  {clients["seconds"]:.0f} s; {clients["wrong"]} answers differed from those of `generate`."""
    begin, end = MARKS
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    PAGE.write_text(f"{before}{begin}\n\n{body}\n\n{end}{after}", encoding="utf-8")


def _cached(usage: dict[str, Any]) -> int:
    return usage["prompt_tokens_details"]["cached_tokens"]


def _new(usage: dict[str, Any]) -> int:
    return usage["prompt_tokens"] - _cached(usage)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--memory", default="infllm")
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("settings", nargs="*")
    asked = parser.parse_args()
    os.environ["PYTHONUNBUFFERED"] = "1"
    words = [asked.model, "--memory", asked.memory, *asked.settings]
    settings = {key: json.loads(value) for key, value in (s.split("=") for s in asked.settings)}
    model = open_model(asked.model, asked.memory, settings, dtype=torch.float32)
    tokenizer = open_tokenizer(asked.model, model)
    spoken, path = Transcript(), RESULTS / "serving.json"
    found: dict[str, Any] = {
        "model": asked.model,
        "memory": " ".join(words[2:]),
        "machine": machine(),
    }
    with tempfile.TemporaryDirectory() as folder:
        found["clients"] = many_clients(asked, words, Path(folder), model, tokenizer)
        print(json.dumps(found["clients"]), flush=True)
        found["document"] = long_document(asked, words, Path(folder), spoken, tokenizer)
    found["transcript"] = spoken.lines
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    publish(found, spoken.lines)
    print(json.dumps(found["document"]))


if __name__ == "__main__":
    main()
