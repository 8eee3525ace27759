"""Enrichment of every feature against gseapy's loop; run by hand or by `make bench`.

    SCFM_GENE_SETS=<folder of GMT files> python tests/benchmarks/bench_enrichment.py

Draws as many gene lists as Table 4 has live features (lengths log-uniform from 50 to 300, a quarter
with genes of one term planted), tests them against the real GO and KEGG libraries, times
`gseapy.enrich` on some of the same lists side by side, and writes results/bench/enrichment.json.
Times of ours start from gene symbols and include encoding; compilation is timed apart. The nulls
are timed on some replicates and scaled to 1,000, both numbers of replicates being in the file.
"""

import argparse
import os
import platform
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import gseapy
import numba
import numpy as np
from machine import cpu_model, part

from scfm_circuits.common.files import write_json
from scfm_circuits.enrichment import over_representation as e
from scfm_circuits.enrichment.background import encode_lists, gene_ids, prepare_background
from scfm_circuits.enrichment.controls.layer_counts import Tester
from scfm_circuits.enrichment.gene_sets import GeneSets, load_library
from scfm_circuits.enrichment.null_lists import uniform_null
from scfm_circuits.enrichment.terms import term_table

FEATURES_TABLE_4 = 17_216
GO, KEGG = "GO_Biological_Process_2025", "KEGG_2021_Human"
BACKGROUND = 20_000


def draw_lists(
    libraries: list[GeneSets], n_lists: int, rng: np.random.Generator
) -> list[list[str]]:
    """Random lists of 50-300 genes; every fourth takes up to half its genes from one GO term."""
    genes = np.array(sorted(set().union(*(library.genes for library in libraries))))
    go = libraries[0]
    terms = np.flatnonzero(go.sizes >= 10)
    lists = []
    for i, length in enumerate(np.exp(rng.uniform(np.log(50), np.log(300), n_lists)).astype(int)):
        members = rng.choice(genes, length, replace=False).tolist()
        if i % 4 == 0:
            planted = rng.permutation(go.term_members(int(rng.choice(terms))))[: length // 2]
            members = [*planted.tolist(), *members[len(planted) :]]
        lists.append(members)
    return lists


def time_ours(
    lists: list[list[str]], library: GeneSets, threads: int | None = None
) -> tuple[float, float]:
    """Seconds from symbols to result, and the part of it after encoding."""
    start = time.perf_counter()
    universe = prepare_background(library, BACKGROUND)
    encoded = encode_lists(lists, library, universe)
    middle = time.perf_counter()
    e.over_representation(encoded, library, background=universe, threads=threads)
    end = time.perf_counter()
    return end - start, end - middle


def compare_with_gseapy(lists: list[list[str]], library: GeneSets) -> dict[str, float]:
    """Time gseapy.enrich on each list and compare p and q of every term it returns."""
    sets = {term: list(library.term_members(i)) for i, term in enumerate(library.terms)}
    seconds, p_diff, q_diff, rows = 0.0, 0.0, 0.0, 0
    for genes in lists:
        start = time.perf_counter()
        result = gseapy.enrich(genes, gene_sets=sets, background=BACKGROUND, outdir=None)
        seconds += time.perf_counter() - start
        theirs = result.res2d.set_index("Term")
        ours = term_table(genes, library, background=BACKGROUND).set_index("Term")
        if set(ours.index) != set(theirs.index):
            raise SystemExit(f"{library.name}: gseapy returns other terms than ours")
        theirs = theirs.loc[ours.index]
        differences = [
            float(np.abs(ours[column] - theirs[column].astype(float)).max())
            for column in ("P-value", "Adjusted P-value")
        ]
        p_diff, q_diff = max(p_diff, differences[0]), max(q_diff, differences[1])
        rows += len(ours)
    return {
        "seconds_per_list": seconds / len(lists), "max_abs_p_diff": p_diff,
        "max_abs_q_diff": q_diff, "rows": rows,
    }  # fmt: skip


def time_nulls(
    lists: list[list[str]], libraries: list[GeneSets], replicates: int, rng: np.random.Generator
) -> float:
    """Seconds for one replicate: a uniform null list per feature, drawn and tested, in threads."""
    genes = sorted(set().union(*(library.genes for library in libraries)))
    tester = Tester("corpus", "all", 0.05, tuple(
        gene_ids(genes, prepare_background(library, genes)) for library in libraries))
    lengths = [len(members) for members in lists]

    def replicate(seed: int) -> None:
        tester.counted(uniform_null(lengths, len(genes), np.random.default_rng(seed)))

    replicate(0)  # compiles
    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(replicate, rng.integers(0, 2**31, replicates)))
    return (time.perf_counter() - start) / replicates


def machine() -> dict[str, float | str | None]:
    """Where and with what the figures were taken."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numba": numba.__version__,
        "numpy": np.__version__,
    }


def main() -> None:
    """Read the options, run the benchmark, print and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lists", type=int, default=FEATURES_TABLE_4)
    parser.add_argument("--gseapy-lists", type=int, default=20)
    parser.add_argument("--replicates", type=int, default=10, help="null lists per feature timed")
    parser.add_argument("--output", default="results/bench/enrichment.json")
    options = parser.parse_args()
    folder = os.environ.get("SCFM_GENE_SETS")
    if not folder:
        sys.exit("Set SCFM_GENE_SETS to the folder that holds the real gene-set libraries.")
    libraries = [load_library(name, folder) for name in (GO, KEGG)]
    if any(library.source == "bundled" for library in libraries):
        sys.exit(f"{folder} does not hold {GO}.gmt and {KEGG}.gmt.")
    figures = measure(libraries, options.lists, options.gseapy_lists, options.replicates)
    for name, value in figures.items():
        print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
    write_json(options.output, figures)


def measure(
    libraries: list[GeneSets], n_lists: int, n_gseapy: int, replicates: int
) -> dict[str, float | str | None]:
    """All figures, units in their names."""
    rng = np.random.default_rng(0)
    lists = draw_lists(libraries, n_lists, rng)

    with part("compiling"):
        start = time.perf_counter()
        e.over_representation(lists[:4], libraries[0], background=BACKGROUND)
        compile_seconds = time.perf_counter() - start
        term_table(lists[0], libraries[0], background=BACKGROUND)
        uniform_null([5], 10, rng)

    sample = lists[:n_gseapy]
    with part(f"{len(lists)} lists in both libraries, and in one thread"):
        go, kegg = (time_ours(lists, library) for library in libraries)
        single, _ = time_ours(lists, libraries[0], threads=1)
    with part(f"gseapy on {len(sample)} of them"):
        peers = [compare_with_gseapy(sample, library) for library in libraries]
    with part(f"{replicates} null lists for each"):
        null_seconds = time_nulls(lists, libraries, replicates, rng)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    per_mib = 1024 if sys.platform == "linux" else 1024**2
    peer_go = peers[0]["seconds_per_list"]
    return {
        "n_lists": len(lists),
        "n_lists_timed_with_gseapy": len(sample),
        "ratio_vs_gseapy": peer_go * len(lists) / go[0],
        "ratio_vs_gseapy_one_thread": peer_go * len(lists) / single,
        "ratio_vs_gseapy_kegg": peers[1]["seconds_per_list"] * len(lists) / kegg[0],
        "gseapy_milliseconds_per_list_go": 1000 * peer_go,
        "gseapy_milliseconds_per_list_kegg": 1000 * peers[1]["seconds_per_list"],
        "milliseconds_per_list_go": 1000 * go[0] / len(lists),
        "seconds_go": go[0],
        "seconds_go_after_encoding": go[1],
        "seconds_go_one_thread": single,
        "seconds_kegg": kegg[0],
        "seconds_table4": go[0] + kegg[0],
        "seconds_compile_or_load_machine_code": compile_seconds,
        "seconds_1000_nulls_per_feature": 1000 * null_seconds,
        "null_replicates_timed": replicates,
        "null_replicates_scaled_to": 1000,
        "max_abs_p_diff": max(peer["max_abs_p_diff"] for peer in peers),
        "max_abs_q_diff": max(peer["max_abs_q_diff"] for peer in peers),
        "rows_compared": sum(peer["rows"] for peer in peers),
        "peak_rss_mib": peak / per_mib,
        "background_genes": BACKGROUND,
        "peer": f"gseapy {gseapy.__version__} enrich(background={BACKGROUND}), one list a call",
        **machine(),
    }


if __name__ == "__main__":
    main()
