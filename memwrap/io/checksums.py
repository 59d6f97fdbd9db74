"""Checksums in a safetensors file's metadata: a flipped bit is found at reading."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import torch
from torch import Tensor

from memwrap.io.reading import parse_json

CHECKSUMS = "crc32"
_MOST_HEAD = 2**27  # safetensors allows 100 MB


def checksums(tensors: dict[str, Tensor], **texts: str) -> dict[str, str]:
    """Make the entry of a safetensors file's metadata that says what its tensors (and `texts`,
    other entries of the metadata) are: a flipped bit is found when they are read."""
    sums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    sums |= {f"__{name}__": zlib.crc32(text.encode()) for name, text in texts.items()}
    return {CHECKSUMS: json.dumps(sums)}


def check_sums(
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None,
    path: Path,
    needed: bool = False,
) -> None:
    """Refuse tensors that are not those the file was written with.

    Args:
        needed: the file must have checksums; else one of another program, without any, passes.

    Raises:
        ValueError: names the file and what in it is damaged.
    """
    text = (metadata or {}).get(CHECKSUMS)
    if text is None and not needed:
        return
    try:
        sums = dict(parse_json(text or "null", path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: its checksums cannot be read.") from error
    for name, tensor in tensors.items():
        if sums.get(name) != _checksum(tensor):
            raise ValueError(f"{path} is damaged: {name[:80]} does not have its checksum.")
    texts = sums.keys() - tensors.keys()
    if not needed:  # those of a file's other parts are among them
        texts = {key for key in texts if key.startswith("__")}
    for key in texts:
        name = key.strip("_")
        if zlib.crc32((metadata or {}).get(name, "").encode()) != sums[key]:
            raise ValueError(f"{path} is damaged: its {name} does not have its checksum.")


def head_digest(path: Path) -> str:
    """Hash what the head of a safetensors file says: names, shapes, metadata and with them the
    checksums, which `check_sums` compares with the contents."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return hashlib.sha256(file.read(min(length, _MOST_HEAD))).hexdigest()[:32]


def _checksum(tensor: Tensor) -> int:
    start = zlib.crc32(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    whole = tensor.detach().cpu().contiguous()
    flat = whole.as_strided((whole.numel(),), (1,))  # a single number may have any stride
    return zlib.crc32(flat.view(torch.uint8).numpy().data, start) if flat.numel() else start
