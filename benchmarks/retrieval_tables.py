"""Put the results of `retrieval.py`, `stores.py` and `reading_retrieval.py` into the docs.

python benchmarks/retrieval_tables.py
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
Rows = list[list[str]]


def load(name: str) -> dict[str, Any]:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def put(page: str, mark: str, text: str) -> None:
    """Replace what stands between a page's marks."""
    path = DOCS / page
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    before, found, rest = path.read_text().partition(begin)
    after = rest.partition(end)[2]
    if not found or not after:
        raise SystemExit(f"{path} has no marks {begin} and {end}.")
    path.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")


def table(rows: Rows) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def difference(one: list[float], other: list[float]) -> tuple[float, float]:
    """Mean of one - other over documents, and its standard error."""
    values = [a - b for a, b in zip(one, other, strict=True)]
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def of_machine(values: dict[str, Any]) -> str:
    return f"{values['cpu']}, {values['cores']} cores, one thread, torch {values['torch']}"


# The tiny LM with retrieval memories


def readings(result: dict[str, Any]) -> list[tuple[str, str, list[float]]]:
    """`(what, entries, nats of each document)` of every row."""
    rows = [
        (f"base, segments of {result['segment_size']}", "-", result["base"]["segments"]),
        (f"base, window of {result['segment_size']} with sinks", "-",
         result["base"]["window_and_sinks"]),
    ]  # fmt: skip
    for one in result["knnlm"]["sizes"]:
        weight, heat = one["tuned"]["interpolation"], one["tuned"]["temperature"]
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


def retrieval_text(result: dict[str, Any]) -> str:
    base = result["base"]["segments"]
    rows: Rows = [["", "entries", "perplexity", "nats a token", "minus the base's"]]
    better, worse = [], []
    for name, entries, nats in readings(result):
        mean, error = difference(nats, base)
        cells = [f"{math.exp(statistics.mean(nats)):.2f}", f"{statistics.mean(nats):.4f}"]
        rows.append([name, entries, *cells, f"{mean:+.4f} ± {error:.4f}" if nats != base else ""])
        if abs(mean) > 2 * error and nats != base:
            label = name if entries == "-" else f"{name} ({entries})"
            (better if mean < 0 else worse).append(label)
    own = result["neurocache"]
    steps = next(o for o in own["overrides"] if "steps" in o).partition("=")[2]
    content = [difference(own[name], own["memory"]) for name in ("off", "shuffled")]
    tuned = result["extended_mind"]["tuning"]
    return f"""Retrieval memories on the shipped tiny LM (context 512): {result["test_documents"]} held-out files
of the standard library, the first {result["tokens_each"]:,} tokens of each, read in segments of
{result["segment_size"]}. The last column is the difference to the base over the same files with its standard
error across files (negative: better).

{table(rows)}

kNN-LM and Extended Mind hold the same documents of the train split, on which the LM was trained:
they look up what it has seen. kNN-LM's $\\lambda$ and $T$ were tuned on {result["validation_documents"]} validation files for each size
($\\lambda$ = 0: tuning switches it off), Extended Mind's layers and threshold with the smallest library
({len(tuned)} settings); its defaults are shown too. Extended Mind also reads what it has read of the file itself.
Neurocache was trained for {steps} steps of 2 x 2,048 tokens by `recipes/{own["recipe"]}.yaml` with segments of
{result["segment_size"]}, together with LoRA, which by itself changes the perplexity: what its cache is worth is cache off
minus trained, {content[0][0]:+.4f} ± {content[0][1]:.4f} nats, and another file's cache minus trained,
{content[1][0]:+.4f} ± {content[1][1]:.4f}.

By more than two standard errors better than the base: {", ".join(better) or "none"}. Worse: {", ".join(worse) or "none"}.

Made by `{result["command"]}` and `python benchmarks/retrieval_tables.py`, seed {result["seed"]}, {result["knnlm"]["machine"]["measured"][:10]},
{of_machine(result["knnlm"]["machine"])} (`benchmarks/results/retrieval.json`). One run."""


# Stores


def store_row(label: str, got: dict[str, Any], recall: float, query: float, k: int) -> list[str]:
    return [label, f"{recall:.3f}", f"{got['load_s']:.0f} s",
            f"{got['index_s']:.0f} s" if got["index_s"] else "-", f"{query:.2f} ms",
            f"{got['bytes_per_vector']:,.0f}"]  # fmt: skip


def store_rows(part: dict[str, Any]) -> Rows:
    """One run: each store as it is, and with other numbers of candidates."""
    k, rows = part["k"], []
    for kind, got in part["stores"].items():
        label = {"torch": "torch, exact"}.get(kind, kind)
        used = 32
        if kind == "faiss":
            used = 64 if got["factory"].startswith("HNSW") else 32
            what = "candidates" if used == 64 else "lists"
            label = f"faiss, `{got['factory']}`, {used} {what}"
        if kind == "pgvector":
            used, what = got["settings"]["ef_search"], "candidates"
            label = f"pgvector, HNSW m {got['settings']['m']}, {used} {what}"
        rows.append(store_row(label, got, got[f"recall_at_{k}"], got["query_ms_in_batches_of_100"], k))
        for effort, own in got.get("by_effort", {}).items():
            if effort in ("8", "128", "256") and int(effort) != used and (kind, effort) != ("faiss", "256"):
                row = [f"the same, {effort} {what}", f"{own['recall']:.3f}", "", ""]
                rows.append([*row, f"{own['query_ms']:.2f} ms", ""])
    return rows


def stores_text(result: dict[str, Any]) -> str:
    part = result["million"]
    k, own = part["k"], part["stores"]["faiss"]["store_over_faiss"]
    head = ["store", f"recall@{k}", "loaded in", "index built in", "a query, in batches of 100",
            "bytes a vector"]  # fmt: skip
    server = part["stores"]["pgvector"]
    versions = server["versions"]
    text = f"""{part["entries"]:,} vectors of width {part["dim"]}, {k} neighbours, {part["queries"]:,} queries; all of
one run ({part["measured"]}), one store after the other:

{table([head, *store_rows(part)])}

Rows "the same" ask all queries at once. memwrap's faiss store takes {own["median"]:.3f} of the time of faiss
called directly on the same index (median; quartiles {own["q1"]:.3f} and {own["q3"]:.3f}). Bytes are those in memory, or the
server's table and index; on disk a faiss store has {part["stores"]["faiss"]["disk_bytes_per_vector"]:,.0f} a vector, the vectors in float16 among
them. The server: PostgreSQL {versions["postgresql"]}, pgvector {versions["pgvector"]}, `maintenance_work_mem` {server["maintenance_work_mem"]}, {server["workers_beside_the_leader"] + 1}
processes at the build.

Which index for how many vectors, on two kinds of data ("clusters overlap" and "clusters are
islands"; recall@{k}, milliseconds a query one thread, seconds to build):

{table(kind_rows(result["kinds"]))}

{million_islands(result)}

The vectors: {part["vectors"]}.

Where exact search with torch stops being the fastest, on a CPU, milliseconds for one query and for a
batch of {result["crossover"]["batch"]}:

{table(crossover_rows(result["crossover"]))}

So `new_store` takes faiss from {result["crossover"]["from_entries"]:,} entries on. {gpu_text()}

Made by `python benchmarks/stores.py` and `python benchmarks/retrieval_tables.py` on {of_machine(result["machine"])};
other work ran beside, so that times are up to several times those of an idle machine
(`benchmarks/results/stores.json`). Vectors are synthetic; `memwrap bench stores` measures on yours."""
    return text


def kind_rows(kinds: dict[str, Any]) -> Rows:
    rows: Rows = [["entries", "data", "index", "recall", "a query", "built in"]]
    for one in kinds["rows"]:
        data = "overlap" if one["apart"] < 0.5 else "islands"
        own = f"`{one['factory']}`" + (", chosen" if one["chosen"] else "")
        rows.append([f"{one['entries']:,}", data, own, f"{one['recall']:.3f}",
                     f"{one['query_ms']:.2f} ms", f"{one['index_s']:.1f} s"])  # fmt: skip
    return rows


def million_islands(result: dict[str, Any]) -> str:
    lists, graph = (result[n]["stores"]["faiss"] for n in ("million_islands", "million_islands_graph"))
    k = result["million_islands"]["k"]
    return (
        f"A million vectors on islands, in runs of their own: `{lists['factory']}` finds "
        f"{lists[f'recall_at_{k}']:.3f}, `{graph['factory']}` {graph[f'recall_at_{k}']:.3f} (with four times the "
        f"candidates {graph['by_effort']['256']['recall']:.3f}): its links stay inside the islands."
    )


def crossover_rows(found: dict[str, Any]) -> Rows:
    batch = found["batch"]
    rows: Rows = [["entries", "torch", "faiss, flat", "faiss, chosen by size", "recall of it"]]
    for one in found["sizes"]:
        cells = [f"{one[f'{n}_ms_1']:.2f} / {one[f'{n}_ms_{batch}']:.1f}" for n in ("torch", "flat", "chosen")]
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
        names.append(f"{own['machine']['gpu']}: " + (f"from {start:,}" if start else "no size measured"))
    return "On a GPU: " + "; ".join(names) + "."


# Reading with memorizing attention


def reading_text(result: dict[str, Any]) -> str:
    rows: Rows = [["cache", "tokens read", "state grown by", "declared", "equal at all lengths"]]
    for name in ("growing", "ring"):
        run = result[name]
        last = run["steps"][-1]
        rows.append([f"{run['cache_size']:,} tokens", f"{last['tokens']:,}", f"{last['grown_bytes']:,} bytes",
                     f"{last['declared_bytes']:,.0f} bytes", "yes" if run["met"] else "no"])  # fmt: skip
    run = result["growing"]
    return (
        f"Reading {result['tokens']:,} tokens in segments of {result['segment_size']} with a random backbone of two layers "
        f"({run['bytes_per_token']:g} bytes a token declared), compared after each of {len(run['steps'])} pieces "
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
