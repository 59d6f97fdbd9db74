"""Damages of any file, as disks, downloads and other programs make them."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as save_numpy

Damage = Callable[[bytes, random.Random], bytes]


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def flipped(data: bytes, chance: random.Random) -> bytes:
    """One bit, anywhere."""
    new = bytearray(data)
    new[chance.randrange(len(new))] ^= 1 << chance.randrange(8)
    return bytes(new)


def zeroed(data: bytes, chance: random.Random) -> bytes:
    """A block of zeros, as a disk that lost a page gives."""
    first = chance.randrange(len(data))
    new = data[:first] + bytes(len(data) - first)
    return new if new != data else bytes(len(data))


def garbage(data: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(len(data))


def pickled(data: bytes, chance: random.Random) -> bytes:
    return pickle.dumps({"weights": list(range(chance.randrange(1, 50)))})


def torch_file(data: bytes, chance: random.Random) -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": torch.ones(chance.randrange(1, 5))}, buffer)
    return buffer.getvalue()


def archive(data: bytes, chance: random.Random) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("../../escaped.bin", data[:100])
    return buffer.getvalue()


def numpy_file(data: bytes, chance: random.Random) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(chance.randrange(1, 9)))
    return buffer.getvalue()


def web_page(data: bytes, chance: random.Random) -> bytes:
    return b"<!DOCTYPE html><html><body>404: not found</body></html>"


def git_pointer(data: bytes, chance: random.Random) -> bytes:
    """What a clone without git-lfs leaves."""
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def empty(data: bytes, chance: random.Random) -> bytes:
    return b""


def other_tensors(data: bytes, chance: random.Random) -> bytes:
    return save_numpy({"x": np.ones(chance.randrange(1, 5), np.float32)}, {"format": "pt"})


def head_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a safetensors file into its head and its contents."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_head(head: dict[str, Any] | bytes, rest: bytes) -> bytes:
    """Join the head and the contents of a safetensors file; the head may be text of any kind."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + rest
