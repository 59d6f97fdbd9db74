"""Put the results of `retrieval.py`, `stores.py` and `reading_retrieval.py` into the docs.

python benchmarks/retrieval_tables.py
"""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

from pages import HERE, Rows, load, of_machine, put, table


def difference(one: list[float], other: list[float]) -> tuple[float, float]:
    """Mean of one - other over documents, and its standard error."""
    values = [a - b for a, b in zip(one, other, strict=True)]
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


# The tiny LM with retrieval memories


def readings(result: dict[str, Any]) -> list[tuple[str, str, list[float]]]:
    """`(what, entries, nats of each document)` of every row."""
    rows = [
        (f"base, segments of {result['segment_size']}", "-", result["base"]["segments"]),
        (f"base, window of {result['segment_size']} with sinks", "-",
         result["base"]["window_and_sinks"]),
    ]  # fmt: skip
    for one in result["knnlm"]["sizes"]:
        weight, heat = (one["tuned"][n] for n in ("interpolation", "temperature"))
        settings = f"$\\lambda$ = {weight:g}" + (f", $T$ = {heat:g}" if weight else "")
        rows.append((f"kNN-LM, {settings}", f"{one['entries']:,}", one["nats"]))
    for kind in result["extended_mind"]["settings"]:
        layers, limit = kind["settings"]["layers"], kind["settings"]["similarity_threshold"]
        name = "Extended Mind, " + ("all layers" if layers is None else f"layers {layers}")
        name += "" if limit is None else f", similarity > {limit:g}"
        rows.append((name, "only the file itself", kind["document_alone"]))
        rows += [(name, f"{one['entries']:,}", one["nats"]) for one in kind["sizes"]]
    own = result["neurocache"]
    rows += [
        ("Neurocache and LoRA, trained", "only the file itself", own["memory"]),
        ("the same, cache off", "-", own["off"]),
        ("the same, another file's cache", "the other file's", own["shuffled"]),
    ]
    return rows


RETRIEVAL = """Retrieval memories on the shipped tiny LM (context 512): {documents} held-out files
of the standard library, the first {tokens:,} tokens of each, read in segments of {segment}. The
last column is the difference to the base over the same files, with its standard error across files
(negative: better).

{table}

kNN-LM and Extended Mind hold the same documents of the train split, on which the LM was
trained: they look up what it has seen. kNN-LM's $\\lambda$ and $T$ were tuned on {validation}
validation files for each size ($\\lambda$ = 0: tuning switches it off), Extended Mind's layers
and threshold with the smallest library ({tried} settings); its defaults are shown with that
library too. It also reads what it has read of the file itself.{missing} Neurocache was trained
for {steps} steps of 2 x 2,048 tokens by `recipes/{recipe}.yaml` with segments of {segment},
together with LoRA, which by itself changes the perplexity. What its cache is worth: cache off
minus trained {off} nats, another file's cache minus trained {shuffled}.

By more than two standard errors better than the base: {better}. Worse: {worse}.

Made by `{command}` and `python benchmarks/retrieval_tables.py`, one run, seed {seed}, {day},
{machine} (`benchmarks/results/retrieval.json`)."""


def retrieval_text(result: dict[str, Any]) -> str:
    base = result["base"]["segments"]
    rows: Rows = [["", "entries", "perplexity", "nats a token", "minus the base's"]]
    better, worse = [], []
    for name, entries, nats in readings(result):
        mean, error = difference(nats, base)
        cells = [f"{math.exp(statistics.mean(nats)):.2f}", f"{statistics.mean(nats):.4f}"]
        rows.append([name, entries, *cells, "" if nats == base else plus_minus(mean, error)])
        if abs(mean) > 2 * error and nats != base:
            label = name if entries == "-" else f"{name} ({entries})"
            (better if mean < 0 else worse).append(label)
    own, machine = result["neurocache"], result["knnlm"]["machine"]
    worth = {n: plus_minus(*difference(own[n], own["memory"])) for n in ("off", "shuffled")}
    steps = next(o for o in own["overrides"] if "steps" in o).partition("=")[2]
    sizes = [len(kind["sizes"]) for kind in result["extended_mind"]["settings"]]
    missing = len(result["knnlm"]["sizes"]) - max(sizes)
    return RETRIEVAL.format(
        missing=" Its largest library is not measured yet." if missing else "",
        documents=result["test_documents"], tokens=result["tokens_each"],
        segment=result["segment_size"], table=table(rows),
        validation=result["validation_documents"], tried=len(result["extended_mind"]["tuning"]),
        steps=steps, recipe=own["recipe"], **worth, better="; ".join(better) or "none",
        worse="; ".join(worse) or "none", command=result["command"], seed=result["seed"],
        day=machine["measured"][:10], machine=of_machine(machine),
    )  # fmt: skip


def plus_minus(mean: float, error: float) -> str:
    return f"{mean:+.4f} ± {error:.4f}"


# Stores


SHOWN = {"faiss": ("8", "128"), "pgvector": ("128", "256")}


def store_rows(part: dict[str, Any]) -> Rows:
    """One run: each store as it is, and with other numbers of candidates."""
    k = part["k"]
    rows: Rows = [["store", f"recall@{k}", "loaded in", "index built in",
                   "a query, in batches of 100", "bytes a vector"]]  # fmt: skip
    for kind, got in part["stores"].items():
        label, what = "torch, exact", ""
        if kind == "faiss":
            label, what = f"faiss, `{got['factory']}`, 32 lists", "lists"
        if kind == "pgvector":
            used = got["settings"]["ef_search"]
            label, what = f"pgvector, HNSW, `ef_search` {used}", "candidates"
        built = f"{got['index_s']:.0f} s" if got["index_s"] else "-"
        query = f"{got['query_ms_in_batches_of_100']:.2f} ms"
        rows.append([label, f"{got[f'recall_at_{k}']:.3f}", f"{got['load_s']:.0f} s", built, query,
                     f"{got['bytes_per_vector']:,.0f}"])  # fmt: skip
        for effort in SHOWN.get(kind, ()):
            own = got["by_effort"][effort]
            cells = [f"{own['recall']:.3f}", "", "", f"{own['query_ms']:.2f} ms", ""]
            rows.append([f"the same, {effort} {what}", *cells])
    return rows


STORES = """{entries:,} vectors of width {dim}, {k} neighbours, {queries:,} queries; all of one run
({measured}), one store after the other:

{million}

Rows "the same" ask all queries at once. memwrap's faiss store takes {ratio} of the time of faiss
called directly on the same index. Bytes are those in memory, or the server's table and index; on
disk a faiss store has {disk:,.0f} a vector, the vectors in float16 among them. The server:
PostgreSQL {postgresql}, pgvector {pgvector}, `maintenance_work_mem` {memory}, {processes} processes
at the build. memwrap asks for `ef_search` 128 where the URL says nothing. faiss has as many lists
here as the vectors have clusters, which suits it.

Which index for how many vectors, on two kinds of data, in processor time of one thread; a query of
a batch of {queries:,}:

{kinds}

{islands}

The vectors: {vectors}.

Where exact search with torch stops being the fastest on a CPU; milliseconds of processor time for
one query / for a batch of {batch}:

{crossover}

So `new_store` takes faiss from {start:,} entries on. {gpu}

Made by `python benchmarks/stores.py` and `python benchmarks/retrieval_tables.py` on {machine};
other work ran beside, so that times are up to several times those of an idle machine
(`benchmarks/results/stores.json`). The vectors are synthetic; yours decide."""


def stores_text(result: dict[str, Any]) -> str:
    part, found = result["million"], result["crossover"]
    faiss, server = part["stores"]["faiss"], part["stores"]["pgvector"]
    own = faiss["store_over_faiss"]
    return STORES.format(
        **{n: part[n] for n in ("entries", "dim", "k", "queries", "measured", "vectors")},
        million=table(store_rows(part)), disk=faiss["disk_bytes_per_vector"],
        ratio=f"{own['median']:.3f} (quartiles {own['q1']:.3f} and {own['q3']:.3f})",
        **server["versions"], memory=server["maintenance_work_mem"],
        processes=server["workers_beside_the_leader"] + 1, kinds=table(kind_rows(result["kinds"])),
        islands=million_islands(result), batch=found["batch"], start=found["from_entries"],
        crossover=table(crossover_rows(found)), gpu=gpu_text(),
        machine=of_machine(result["machine"]),
    )  # fmt: skip


def kind_rows(kinds: dict[str, Any]) -> Rows:
    rows: Rows = [["entries", "clusters", "index", f"recall@{kinds['k']}", "a query", "built in"]]
    for one in kinds["rows"]:
        data = "overlap" if one["apart"] < 0.5 else "islands"
        own = f"`{one['factory']}`" + (" (chosen)" if one["chosen"] else "")
        rows.append([f"{one['entries']:,}", data, own, f"{one['recall']:.3f}",
                     f"{one['query_cpu_ms']:.2f} ms", f"{one['build_cpu_s']:.1f} s"])  # fmt: skip
    return rows


def million_islands(result: dict[str, Any]) -> str:
    names = ("million_islands", "million_islands_graph")
    lists, graph = (result[name]["stores"]["faiss"] for name in names)
    own, less, more = lists["by_effort"]["32"], *(graph["by_effort"][n] for n in ("64", "256"))
    return (
        f"A million vectors on islands, measured in runs of their own: `{lists['factory']}` finds "
        f"{own['recall']:.3f} with 32 lists, `{graph['factory']}` {less['recall']:.3f} with 64 "
        f"candidates and {more['recall']:.3f} with 256: its links stay inside the islands."
    )


def crossover_rows(found: dict[str, Any]) -> Rows:
    rows: Rows = [["entries", "torch", "faiss, flat", "faiss, chosen by size", "recall of it"]]
    batch = found["batch"]
    for one in found["sizes"]:
        cells = [
            f"{one[f'{name}_ms_1']:.2f} / {one[f'{name}_ms_{batch}']:.1f}"
            for name in ("torch", "flat", "chosen")
        ]
        cells[2] += f" (`{one['index']}`)"
        rows.append([f"{one['entries']:,}", *cells, f"{one['recall']:.3f}"])
    return rows


def gpu_text() -> str:
    found = sorted((HERE / "results").glob("stores_*.json"))
    if not found:
        return "On a GPU it is not measured yet (`benchmarks/kernels/stores_on_gpu.py` does it)."
    names = []
    for path in found:
        own = json.loads(path.read_text())
        start = own["crossover"]["from_entries"]
        names.append(f"{own['machine']['gpu']} " + (f"{start:,}" if start else "at no size"))
    return f"On a GPU: {'; '.join(names)}."


# Reading with memorizing attention


def reading_text(result: dict[str, Any]) -> str:
    rows: Rows = [["cache", "tokens read", "state grown by", "declared", "equal at all lengths"]]
    for name in ("growing", "ring"):
        run = result[name]
        last = run["steps"][-1]
        grown, declared = (f"{last[f'{n}_bytes']:,.0f} bytes" for n in ("grown", "declared"))
        cells = [f"{last['tokens']:,}", grown, declared, "yes" if run["met"] else "no"]
        rows.append([f"{run['cache_size']:,} tokens", *cells])
    run = result["growing"]
    return (
        f"Reading {result['tokens']:,} tokens in segments of {result['segment_size']} with a "
        f"random backbone of two layers ({run['bytes_per_token']:g} bytes a token declared), "
        f"compared after each of {len(run['steps'])} pieces "
        f"(`python benchmarks/reading_retrieval.py`):\n\n{table(rows)}"
    )


def main() -> None:
    text = retrieval_text(load("retrieval"))
    for name in ("knnlm", "extended_mind", "neurocache"):
        put(f"methods/{name}.md", "retrieval", text)
    put("stores.md", "evidence", stores_text(load("stores")))
    put("methods/memorizing.md", "retrieval", reading_text(load("reading_retrieval")))


if __name__ == "__main__":
    main()
