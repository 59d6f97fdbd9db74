"""What somebody meets who tries the commands: odd files, odd folders, pipes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run
from pypdf import PdfWriter

from memwrap.cli.chat_commands import _converse
from memwrap.data.documents import load_documents
from memwrap.data.readers import files_in, read_files

ROOT = Path(__file__).resolve().parents[2]
MEMORY = ("--memory", "infllm", "segment_size=16", "window_size=32", "block_size=8", "top_k=2")
ODD = {
    "bom.txt": b"\xef\xbb\xbfWith a mark.", "crlf.md": b"One.\r\nTwo.\r\n",
    "code.py": b"x = 1\n", "one.txt": b"a", "page.html": b"<p>Text" + b"<b>" * 3000,
}  # fmt: skip
BAD = {
    "empty.txt": (b"", "no text"), "blank.md": (b" \n\n", "no text"),
    "latin.txt": ("caf\xe9 au lait".encode("cp1252"), "convert it to UTF-8"),
    "photo.md": (b"\x89PNG\r\n\x1a\n\x00\x00", "convert it to UTF-8"),
    "noise.pdf": (b"\x07\xd1d" * 500, "cannot be read as a PDF"),
}  # fmt: skip


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder with documents of every kind, broken ones among them, and what is none."""
    folder = tmp_path / "my  \u6587\u66f8 d\xf6cs"
    (folder / ".git").mkdir(parents=True)
    for name in (".hidden.md", ".git/config.py", "data.json", "picture.png"):
        (folder / name).write_text("no document")
    for name, content in (ODD | {name: bad for name, (bad, _) in BAD.items()}).items():
        (folder / name).write_bytes(content)
    locked = PdfWriter()
    locked.add_blank_page(100, 100)
    locked.encrypt("secret", algorithm="RC4-128")
    locked.write(folder / "locked.pdf")
    return folder


def test_a_bad_file_is_named_and_nothing_else_is_said(
    odd: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts, problems = read_files(files_in(odd))
    assert {p.name for p in texts} == set(ODD)
    assert texts[odd / "bom.txt"] == "With a mark." and texts[odd / "page.html"] == "Text"
    assert texts[odd / "crlf.md"] == "One.\nTwo.\n"
    assert {p.name for p in problems} == {*BAD, "locked.pdf"}
    for name, (_, reason) in BAD.items():
        assert reason in problems[odd / name] and "\n" not in problems[odd / name]
    assert not caplog.records
    with pytest.warns(UserWarning, match="left out"):
        assert {d.name for d in load_documents(odd)} == set(ODD)


def test_paths_with_spaces_and_other_letters(base: Path, odd: Path) -> None:
    """Nor is anything written into the model's folder, which may be read-only."""
    model = odd.parent / "mo del \u043c"
    shutil.copytree(base, model)
    for path in (*model.iterdir(), model):
        path.chmod(0o555 if path.is_dir() else 0o444)
    state = odd.parent / "st ate \xe9.safetensors"
    before = sorted(model.rglob("*"))
    result = run("read", model, odd, "-o", state, *MEMORY)
    assert "5 files, 6 left out" in result.stderr
    words = ("chat", model, *MEMORY, "--max-new-tokens", "2", "--ask", "Text?")
    assert run(*words, "--state", state).stdout
    run(*words, "--read", odd / "one.txt")
    assert sorted(model.rglob("*")) == before
    model.chmod(0o755)


def test_questions_from_a_pipe(base: Path, odd: Path) -> None:
    """They are shown before their answers, and what a command did is said."""
    lines = "/undo\nWhat?\n/undo\nWhat?\n/reset\n/udno\n"
    words = ("--read", odd / "crlf.md", *MEMORY, "--max-new-tokens", "3")
    result = run("chat", base, *words, stdin=lines)
    asked = [line for line in result.stdout.splitlines() if line.startswith("> ")]
    assert asked == ["> /undo", "> What?", "> /undo", "> What?", "> /reset", "> /udno", "> "]
    said = result.stdout.splitlines()
    assert said[said.index("> What?") + 1] == said[said.index("> What?", 4) + 1]
    assert "taken back" in result.stdout and "back to what was read" in result.stdout
    assert "no question to take back" in result.stderr and "no command /udno" in result.stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """`memwrap list | head -1`: nothing is said."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "memwrap", "list"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == "" and done.returncode == 1


@pytest.mark.slow
def test_what_is_left_out_is_a_line(base: Path, odd: Path) -> None:
    """A warning without the code that gave it; one text has no error of its mean."""
    code = (
        "import sys, warnings; warnings.simplefilter('default')\n"
        "from memwrap.cli.shared import plain_errors\n"
        "from memwrap.data.documents import load_documents\n"
        "plain_errors(lambda: print(len(load_documents(sys.argv[1]))))()\n"
    )
    command = [sys.executable, "-c", code, str(odd)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.stdout == "5\n" and len(lines) == 6, done.stderr
    assert all(line.startswith("note: left out: ") for line in lines)
    words = ("--documents", odd / "crlf.md", "--split", "all", "--tokens", "8", "--count", "1")
    output = run("eval", base, *words, *MEMORY, "-o", odd.parent / "found").stdout
    assert "nats a token, 1 text in segments of 16 tokens" in output and "nan" not in output


def test_a_port_that_is_taken_is_said_at_once(base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run("serve", base, *MEMORY, "--port", port, expect=2)
    assert f"port {port}" in result.stderr and "give another --port" in result.stderr


def test_a_chat_goes_on_after_a_refused_or_stopped_question(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = []

    class Talk:
        state = None

        def ask(self, text: str, streamer: object) -> None:
            asked.append(text)
            if text == "long":
                raise KeyboardInterrupt
            if text == "wrong":
                raise ValueError("the template says no")

    class Streamer:
        def end(self) -> None:
            print("-- cut --")

    lines = iter(("wrong", "long", "good", "/quit"))
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    _converse(Talk(), Streamer())
    said = capsys.readouterr()
    assert asked == ["wrong", "long", "good"] and "-- cut --" in said.out
    assert "the template says no" in said.err and "nothing of it is kept" in said.err
