"""Compile every kernel launch ahead of time for a GPU that is not there.

python aot.py TARGET CASE...   (without TRITON_INTERPRET)

The host functions run on small CPU tensors with the kernels replaced by recorders, so that what
is compiled is what would be launched: signature, tiles, warps. Prints one JSON line a compiled
kernel: its name and constants, shared memory, and bytes of spilled registers a thread.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memwrap_kernels import (
    armt,
    armt_kernels,
    delta,
    delta_kernels,
    gla,
    gla_bwd_kernels,
    gla_kernels,
    infini,
    infini_kernels,
    infini_scan,
    infini_scan_kernels,
    landmark,
    landmark_bwd_kernels,
    landmark_decode_kernels,
    landmark_kernels,
)
from memwrap_kernels import launch as launching

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32), "gfx942": GPUTarget("hip", "gfx942", 64),
}  # fmt: skip
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in TYPES.items()}


MODULES = (
    infini_kernels, armt_kernels, landmark_kernels, landmark_bwd_kernels, gla_kernels,
    gla_bwd_kernels, delta_kernels, landmark_decode_kernels, infini_scan_kernels,
)  # fmt: skip
# Compiled for any strides; the others for those that are given.
OLD = (infini_kernels, armt_kernels)


class Recorder:
    """Stands in for a kernel: notes each launch instead of running it."""

    def __init__(self, kernel: Any, launches: dict[str, tuple[Any, ...]], aligned: bool) -> None:
        self.kernel, self.launches, self.aligned = kernel, launches, aligned

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *args: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
        signature: dict[str, str] = {}
        attributes: dict[tuple[int], Any] = {}
        values: dict[tuple[int], Any] = {}
        for number, parameter in enumerate(self.kernel.params):
            if parameter.name in constants:
                signature[parameter.name] = "constexpr"
                values[(number,)] = constants[parameter.name]
            elif isinstance(args[number], torch.Tensor):
                signature[parameter.name] = "*" + TYPES[args[number].dtype]
                attributes[(number,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32" if isinstance(args[number], float) else "i32"
                # As Triton does at a launch: strides that are multiples of 16 load in wide pieces.
                if self.aligned and isinstance(args[number], int) and args[number] % 16 == 0:
                    attributes[(number,)] = [["tt.divisibility", 16]]
        options = {"num_warps": num_warps, "num_stages": num_stages}
        key = f"{self.kernel.__name__} {sorted(constants.items())} {signature} {options}"
        self.launches[key] = (self.kernel, signature, values, attributes, options, constants)


def launches_of(cases: list[str], hip: bool) -> dict[str, tuple[Any, ...]]:
    """What the cases would launch: `infini:DTYPE:HEAD_DIM`, `infini_scan:DTYPE:HEAD_DIM`,
    `armt:DTYPE:WIDTH`, `landmark:DTYPE:HEAD_DIM:BLOCK_SIZE`, `gla:DTYPE:KEYS:VALUES` or
    `delta:DTYPE:KEYS:VALUES`."""
    launches: dict[str, tuple[Any, ...]] = {}
    for module in MODULES:
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            setattr(module, name, Recorder(getattr(module, name), launches, module not in OLD))
    launching.interpreted = lambda: False  # the recorders are no kernels either
    for module in (infini, infini_scan, armt, landmark, gla, delta):
        module.is_hip = lambda: hip
    for case in cases:
        memory, dtype, *sizes = case.split(":")
        run = {"infini": run_infini, "infini_scan": run_infini_scan, "armt": run_armt,
               "landmark": run_landmark, "gla": run_gla, "delta": run_delta}[memory]  # fmt: skip
        run(DTYPES[dtype], *map(int, sizes))
    return launches


def run_infini(dtype: torch.dtype, size: int) -> None:
    q, k, v = (torch.zeros(1, h, 3, size, dtype=dtype, requires_grad=True) for h in (2, 1, 1))
    M, z = torch.zeros(1, 1, size, size), torch.zeros(1, 1, size)
    for by_delta in (False, True):
        for mask in (None, torch.ones(1, 3, dtype=torch.bool)):
            states, zs = infini.states(k, v, M, z, mask, 2, by_delta, 1e-10)
            infini.lookup(q, states, zs, 2, 1e-10).sum().backward()


def run_infini_scan(dtype: torch.dtype, size: int) -> None:
    q, k, v = (torch.zeros(1, h, 3, size, dtype=dtype, requires_grad=True) for h in (2, 1, 1))
    M, z = torch.zeros(1, 1, size, size), torch.zeros(1, 1, size)
    infini_scan.path = "fused"
    for by_delta in (False, True):
        for mask in (None, torch.ones(1, 3, dtype=torch.bool)):
            infini_scan.scan(q, k, v, M, z, mask, 2, by_delta, 1e-10)[0].sum().backward()
            with torch.no_grad():
                infini_scan.scan(q, k, v, M, z, mask, 2, by_delta, 1e-10)


def run_armt(dtype: torch.dtype, width: int) -> None:
    values, nu = 128, 3
    x = torch.zeros(1, 1, 2, width, dtype=dtype, requires_grad=True)
    v = torch.zeros(1, 1, 2, values, dtype=dtype, requires_grad=True)
    beta, written = torch.zeros(1, 1, 2, 1), torch.ones(1, dtype=torch.bool)
    A = torch.zeros(1, 1, 2 * nu * width, values, requires_grad=True)
    for z in (None, A[..., 0].detach()):
        for normalize in (False, True):
            out = armt.read(x, A, z, nu, normalize, 1e-5)
            new_A, _ = armt.write(x, v, beta, A, z, written, nu, normalize, True, 0.0, 1e-5)
            (out.sum() + new_A.sum()).backward()


def run_landmark(dtype: torch.dtype, size: int, block_size: int) -> None:
    q, k, v = (torch.zeros(1, h, 3, size, dtype=dtype, requires_grad=True) for h in (2, 1, 1))
    documents, valid = torch.zeros(1, 3, dtype=torch.int32), torch.ones(1, 3, dtype=torch.bool)
    marks = torch.zeros(1, 3, dtype=torch.bool)
    for more in ({}, {"documents": documents, "landmark": marks, "valid": valid}):
        landmark.attention(q, k, v, block_size, **more)[0].sum().backward()
    chosen, blocks = torch.zeros(1, 2, 1, 2, size, dtype=dtype), k.detach()[:, :, None].clone()
    for softcap in (None, 30.0):
        landmark.retrieved(
            chosen, blocks, blocks, blocks[:, :, :, 0], valid[:, None],
            torch.zeros(1, 2, 1, 2, dtype=torch.long), 1.0, softcap,
        )  # fmt: skip


def run_gla(dtype: torch.dtype, keys: int, values: int) -> None:
    tokens = 64  # a whole chunk
    q, k = (torch.zeros(1, h, tokens, keys, dtype=dtype, requires_grad=True) for h in (2, 1))
    v = torch.zeros(1, 1, tokens, values, dtype=dtype)
    state, cu = torch.zeros(1, 1, keys, values), torch.tensor([0, tokens])
    for g in (None, torch.zeros(1, 1, tokens), torch.zeros(1, 1, tokens, keys)):
        for joined in (None, cu) if g is not None and g.dim() == 4 else (None,):
            gla.scan(q, k, v, g, state, 1.0, joined)[0].sum().backward()


def run_delta(dtype: torch.dtype, keys: int, values: int) -> None:
    tokens = 64
    q, k = (torch.zeros(1, h, tokens, keys, dtype=dtype, requires_grad=True) for h in (2, 1))
    v, beta = torch.zeros(1, 1, tokens, values, dtype=dtype), torch.zeros(1, 1, tokens)
    state = torch.zeros(1, 1, keys, values)
    for g in (None, beta):
        delta.scan(q, k, v, beta, g, state, 1.0)[0].sum().backward()
        for strength in (None, beta, torch.zeros(v.shape)):
            delta.step(q, k, v, g, strength, state, 1.0)
    gates = torch.zeros(k.shape)
    delta.step(q, k, v, gates, None, state, 1.0)


def spilled(compiled: Any, target: GPUTarget) -> int:
    """Bytes of registers that a thread keeps in memory."""
    if target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        return 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly).group(1))  # type: ignore[union-attr]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return int(re.search(r"STACK:(\d+)", told).group(1))  # type: ignore[union-attr]


def main() -> None:
    target = TARGETS[sys.argv[1]]
    for launch in launches_of(sys.argv[2:], target.backend == "hip").values():
        kernel, signature, values, attributes, options, constants = launch
        source = ASTSource(kernel, signature, values, attributes)
        compiled = triton.compile(source, target=target, options=options)
        about = {
            "kernel": kernel.__name__, "constants": constants, "options": options,
            "shared": compiled.metadata.shared, "keys": signature.get("k", ""),
            "spilled": spilled(compiled, target),
            "fences": barriers_wait(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else True,
            "counts": counts_last(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else True,
        }  # fmt: skip
        print(json.dumps(about), flush=True)


def barriers_wait(assembly: str) -> bool:
    """Whether stores to memory are waited for before each barrier (AMD)."""
    lines = [
        x.strip() for x in assembly.splitlines() if x.strip() and not x.strip().startswith(";")
    ]
    pending = False
    for line in lines:
        if line.startswith(("global_store", "buffer_store", "flat_store")):
            pending = True
        elif line.startswith("s_waitcnt") and "vmcnt(0)" in line:
            pending = False
        elif line.startswith("s_barrier") and pending:
            return False
    return True


def counts_last(assembly: str) -> bool:
    """Whether stores to memory are waited for before the barrier that precedes an atomic (AMD)."""
    pending = before = False
    atomics = 0
    for line in map(str.strip, assembly.splitlines()):
        if line.startswith(("global_atomic", "buffer_atomic", "flat_atomic")):
            atomics += 1
            if before:
                return False
        elif line.startswith(("global_store", "buffer_store", "flat_store")):
            pending = True
        elif line.startswith("s_waitcnt") and "vmcnt(0)" in line:
            pending = False
        elif line.startswith("s_barrier"):
            before = pending
    return atomics > 0


if __name__ == "__main__":
    main()
