"""The namespace of this package's torch ops: the name under which the package was loaded.

Two copies can live in one process then (versions of a kernel from the Hub do), each with ops of its
own. kernel-builder asks for `torch.ops.<id>`, and `kernels.get_kernel` loads a build as `<id>`.
"""

from __future__ import annotations


def add_op_namespace_prefix(op_name: str) -> str:
    """Give an op's full name. Its own name is the one that kernel-builder's checks look for."""
    return f"{__name__.rpartition('.')[0].replace('.', '_')}::{op_name}"
