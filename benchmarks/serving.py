"""The server as its users meet it: a process, a document of 16,000 tokens, many clients.

    python benchmarks/serving.py [--only clients|document] [--tokens 16000] [--state FILE]

1. 8 clients x 20 requests about one state of 1,500 tokens and forks of it, every second one
   streamed: each answer is compared with that of `generate` alone on a copy of the state.
2. `memwrap read` reads a document (`--state`: the demo's `document.safetensors` instead), `memwrap
   serve` serves its state, and `curl` asks twice: what each request ran is in its usage.
3. The server is killed with SIGKILL, once idle and once while it writes a state, and started again:
   the saved state answers as before, and `memwrap chat` over the file answers the same.

Writes benchmarks/results/serving.json, a part at a time, and what was typed and printed in the
second into docs/howto/serve.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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

import memwrap
from memwrap.cli import demo
from memwrap.cli import demo_texts as texts
from memwrap.evaluation.measure import machine
from memwrap.model.opening import open_model, open_tokenizer
from memwrap.serving.prompts import chat_ids, ends_of

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "serve.md"
MARKS = ("<!-- serving:begin -->", "<!-- serving:end -->")
MODEL = ["smollm2", "--memory", demo.MEMORY]
CLIENTS, REQUESTS = 8, 20
SHORT = 1500  # tokens of the text that the many requests are about
ASKED = {"max_tokens": 16, "temperature": 0}
BRIEF = {"max_tokens": 8, "temperature": 0}


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

    def chat(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        answer = self.post("/chat/completions", body)
        return text_of(answer), answer["usage"]

    def stream(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + "/chat/completions", data, kind)
        text, usage = "", {}
        with urllib.request.urlopen(request, timeout=3600) as lines:
            for line in lines:
                event = line.decode().strip().removeprefix("data: ")
                if not event or event == "[DONE]":
                    continue
                piece = json.loads(event)
                usage = piece.get("usage") or usage
                text += "".join(c["delta"].get("content", "") for c in piece["choices"])
        return text, usage

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


def words_of(settings: dict[str, Any]) -> list[str]:
    """Write settings of the memory as the command line takes them."""
    return [f"{name}={value}" for name, value in settings.items()]


def long_document(asked: Any, folder: Path, spoken: Transcript, tokenizer: Any) -> dict:
    """Ask about one long document by `curl` and `memwrap chat`; kill the server twice."""
    states, parts = folder / "states", texts.parts(tokenizer, (asked.tokens,))
    states.mkdir()
    file = states / "report.safetensors"
    command = [sys.executable, "-m", "memwrap"]
    reading = [*MODEL, *words_of(demo.READING)]
    if asked.state is None:
        report = folder / "report.md"
        report.write_text(parts.texts[0])
        shown = f"memwrap read {' '.join(reading)} report.md -o states/report.safetensors"
        spoken.run(shown, [*command, "read", *reading, str(report), "-o", str(file)])
    else:
        shutil.copy(asked.state, file)
    words = [*MODEL, *words_of({**demo.READING, **demo.ASKING})]
    serving = [*words, "--states", str(states)]
    log, facts = folder / "serve.log", texts.FACTS[2::3]
    questions = [texts.question(facts[place]) for place in (0, 3)]
    server = Server(serving, log)
    spoken.lines += [f"$ memwrap serve {' '.join(words)} --states states &", ""]
    head = ["curl", "-s", "-H", "Content-Type: application/json"]
    made = json.loads(spoken.run("curl -s $url/states/report",
                                 ["curl", "-s", f"{server.url}/states/report"]))  # fmt: skip
    answers = []
    for question in questions:
        request = {"state": "report", "messages": [{"role": "user", "content": question}], **ASKED}
        sent = json.dumps(request)
        shown = f"curl -s $url/chat/completions -H 'Content-Type: application/json' -d '{sent}'"
        post = [*head, f"{server.url}/chat/completions", "-d", "@-"]
        answers.append(json.loads(spoken.run(shown, post, sent)))
    asked_again = server.ask("report", questions[0])
    server.kill()  # idle
    server = Server(serving, log)
    said, after = (
        [text_of(answer) for answer in answers],
        text_of(server.ask("report", questions[0])),
    )
    server.post("/states", {"name": "second", "text": "The rain went on. " * 50})
    with ThreadPoolExecutor(1) as pool:  # while it writes a state
        saving = pool.submit(server.post, "/states/second/save", {})
        time.sleep(0.005)
        server.kill()
        saving.exception()
    server = Server(serving, log)
    names = [state["name"] for state in server.get("/states")["data"]]
    last = text_of(server.ask("report", questions[1]))
    if "second" in names:
        server.ask("second", "What went on?")  # whole, or there would be an error
    server.kill()
    shown = f"memwrap chat {' '.join(words)} --state states/report.safetensors"
    shown += f" --max-new-tokens {ASKED['max_tokens']} --ask '{questions[0]}'"
    chat = spoken.run(shown, [*command, "chat", *words, "--max-new-tokens",
                              str(ASKED["max_tokens"]), "--state", str(file), "--ask",
                              questions[0]])  # fmt: skip
    return {
        "tokens": made["tokens"], "bytes": made["bytes"], "answers": said,
        "usage": [answer["usage"] for answer in answers], "asked_again": asked_again["usage"],
        "same_again": text_of(asked_again) == said[0], "after_kill": after == said[0],
        "after_kill_while_saving": last == said[1], "states_after": names,
        "chat_same": said[0].strip() in chat,
    }  # fmt: skip


def many_clients(folder: Path, model: Any, tokenizer: Any) -> dict:
    """Let 8 clients send 20 requests each; compare with `generate`."""
    questions, text = (
        [texts.question(fact) for fact in texts.FACTS],
        texts.parts(tokenizer, (SHORT,)).texts[0],
    )
    words = [*MODEL, *words_of({**demo.READING, **demo.ASKING})]
    states = folder / "shared"
    server = Server(
        [*words, "--batch", str(CLIENTS), "--states", str(states), "--state-gb", "1"],
        folder / "serve.log",
    )
    made = server.post("/states", {"name": "short", "text": text, "save": True})
    state = memwrap.MemoryState.load(states / "short.safetensors", model)
    wanted = {question: alone(model, tokenizer, state, question) for question in questions}
    for number in range(0, CLIENTS, 2):
        server.post("/states/short/fork", {"to": f"fork-{number}"})
    start, used = time.monotonic(), cpu_seconds(server)

    def client(number: int) -> list[dict[str, Any]]:
        name, answers = "short" if number % 2 else f"fork-{number}", []
        for request in range(REQUESTS):
            question = questions[(number * 3 + request) % len(questions)]
            said = {"state": name, "messages": [{"role": "user", "content": question}], **BRIEF}
            began = time.monotonic()
            got, usage = (server.stream if request % 2 else server.chat)(said)
            answers.append({"right": got == wanted[question], "seconds": time.monotonic() - began,
                            "new": _new(usage), "cached": _cached(usage)})  # fmt: skip
        return answers

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [answer for found in pool.map(client, range(CLIENTS)) for answer in found]
    seconds, used = time.monotonic() - start, cpu_seconds(server) - used
    server.kill()
    times = sorted(answer["seconds"] for answer in answers)
    return {
        "clients": CLIENTS, "requests": len(answers),
        "wrong": sum(not answer["right"] for answer in answers),
        "different_answers": len(set(wanted.values())), "state_tokens": made["tokens"],
        "fewest_cached": min(answer["cached"] for answer in answers),
        "most_new": max(answer["new"] for answer in answers), "seconds": round(seconds, 1),
        "cpu_seconds": round(used, 1), "median_seconds": round(times[len(times) // 2], 2),
        "examples": dict(list(wanted.items())[:3]),
    }  # fmt: skip


@torch.no_grad()
def alone(model: Any, tokenizer: Any, state: Any, question: str) -> str:
    """Answer by `generate`, one question at a time, on a copy of the state."""
    ids = torch.tensor([chat_ids(tokenizer, [{"role": "user", "content": question}], state)])
    ends = list(ends_of(model, tokenizer))
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), cache=state.clone(), do_sample=False,
        max_new_tokens=BRIEF["max_tokens"], eos_token_id=ends, pad_token_id=ends[0],
    )  # fmt: skip
    return tokenizer.decode(
        out[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def cpu_seconds(server: Server) -> float:
    """CPU seconds of a server's process so far."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def publish(found: dict[str, Any]) -> None:
    """Write results and transcript into the page."""
    document, clients = found["document"], found["clients"]
    first, second = document["asked_again"], document["usage"][1]
    kept = ("after_kill", "after_kill_while_saving", "same_again", "chat_same")
    same = "yes" if all(document[name] for name in kept) else "**no**"
    text = "\n".join(map(_folded, found["transcript"])).strip()
    cpu = found["machine"]["cpu"]
    body = f"""`python benchmarks/serving.py` ({cpu}, a thread of a busy machine):

```console
{text}
```

- The state holds {document["tokens"]:,} tokens in {document["bytes"] / 1e6:,.0f} MB. Of the second
  question's prompt {_cached(second):,} tokens were cached and {_new(second)} were run; of the first
  question, asked again, {_new(first)}.
- After `kill -9`, idle and while a state was being written, a new server gave the same answers from
  the saved state, and so did `memwrap chat`: {same}.
- {clients["clients"]} clients sent {clients["requests"]} requests about {clients["state_tokens"]:,}
  tokens, to a state and forks of it, every second one streamed ({clients["cpu_seconds"]:.0f} s of a
  processor); {clients["wrong"]} answers differed from those of `generate`."""
    begin, end = MARKS
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    PAGE.write_text(f"{before}{begin}\n\n{body}\n\n{end}{after}", encoding="utf-8")


def _folded(line: str) -> str:
    """Break what was typed where it may be broken, and leave out most of a long answer."""
    if line.startswith("{") and '"choices"' in line:
        said = json.loads(line)
        content = json.dumps(said["choices"][0]["message"]["content"])
        usage = json.dumps(said["usage"]).replace(', "prompt_tokens_d', ',\n  "prompt_tokens_d')
        return f'{{... "content":{content} ...\n "usage":{usage}}}'
    for place in (" -d ", " --memory ", " num_sinks", " --state", " --ask"):
        line = line.replace(place, f" \\\n   {place}", 1)
    return line.replace('"messages": ', '"messages":\n    ').replace(', "max', ',\n    "max')


def _cached(usage: dict[str, Any]) -> int:
    return usage["prompt_tokens_details"]["cached_tokens"]


def _new(usage: dict[str, Any]) -> int:
    return usage["prompt_tokens"] - _cached(usage)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=("clients", "document"))
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--state", type=Path, help="a state that was read with the demo's settings")
    asked = parser.parse_args()
    os.environ["PYTHONUNBUFFERED"] = "1"
    model = open_model(MODEL[0], MODEL[2], {**demo.READING, **demo.ASKING}, dtype=torch.float32)
    tokenizer = open_tokenizer(MODEL[0], model)
    path = RESULTS / "serving.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found["machine"], spoken = machine(), Transcript()
    with tempfile.TemporaryDirectory() as folder:
        if asked.only != "document":
            found["clients"] = many_clients(Path(folder), model, tokenizer)
            print(json.dumps(found["clients"]), flush=True)
        if asked.only != "clients":
            found["document"] = long_document(asked, Path(folder), spoken, tokenizer)
            found["transcript"] = spoken.lines
            print(json.dumps(found["document"]), flush=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if "document" in found and "clients" in found:
        publish(found)


if __name__ == "__main__":
    main()
