"""Two replicas of one model behind Ray Serve, which share a folder of states.

    pip install "memwrap[serve,ray]"
    python examples/ray_serve.py smollm2 --memory infllm --states states

Each replica is what `memwrap serve` runs: OpenAI's endpoints and /v1/states. A document that one of
them has read is written to the folder at once, so that the others, on any machine that sees the
folder, answer about it without reading it again.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve


def deployment(
    model: str, memory: str | None, states: Path, replicas: int, cpus: float, gpus: float
) -> Any:
    """Make an application of so many replicas.

    Args:
        model: a folder, a name such as "smollm2", or a repo id on the Hub.
        memory: for a model without one, the name of a memory.
        states: a folder that all replicas see.
        replicas, cpus, gpus: how many, and what each of them takes.
    """
    folder, key = states.resolve(), os.environ.get("MEMWRAP_API_KEY")

    def build() -> FastAPI:  # in a replica
        from memwrap.model.opening import open_model, open_tokenizer
        from memwrap.serving import Engine, Limits, NamedStates, create_app

        opened, limits = open_model(model, memory, {}).eval(), Limits()
        named = NamedStates(opened, folder, limits.state_bytes, save_all=True)
        engine = Engine(opened, open_tokenizer(model, opened), limits)
        return create_app(engine, named, name=Path(model).name, api_key=key)

    @serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )
    @serve.ingress(build)
    class Memwrap:
        """A replica: the application alone."""

    return Memwrap.bind()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--memory")
    parser.add_argument("--states", type=Path, required=True, help="folder that all replicas see")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=1)
    parser.add_argument("--gpus", type=float, default=0)
    parser.add_argument("--port", type=int, default=8000)
    asked = parser.parse_args()
    serve.start(http_options={"host": "127.0.0.1", "port": asked.port})
    replicas = deployment(
        asked.model, asked.memory, asked.states, asked.replicas, asked.cpus, asked.gpus
    )
    serve.run(replicas, name="memwrap", blocking=True)


if __name__ == "__main__":
    main()
