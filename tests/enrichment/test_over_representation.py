"""Over-representation against gseapy, decoupler, scipy and exact arithmetic."""

import math
import os
import tracemalloc
from collections.abc import Collection
from fractions import Fraction
from pathlib import Path

import gseapy
import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain_enrichment import plain_over_representation
from scipy.stats import binomtest, false_discovery_control, hypergeom

from scfm_circuits import InputError
from scfm_circuits.common.compiled import compiled
from scfm_circuits.enrichment import over_representation as e
from scfm_circuits.enrichment.background import (
    Family,
    encode_ids,
    encode_lists,
    gene_ids,
    prepare_background,
)
from scfm_circuits.enrichment.gene_sets import GeneSets, gene_sets_from_dict, load_library
from scfm_circuits.enrichment.kernels import log_factorial_table, log_upper_tails
from scfm_circuits.enrichment.null_lists import ragged, uniform_null
from scfm_circuits.enrichment.rules import RULES
from scfm_circuits.enrichment.terms import term_table

REAL = os.environ.get("SCFM_GENE_SETS")
needs_libraries = pytest.mark.skipif(
    not REAL, reason="SCFM_GENE_SETS is not set: needs the real gene-set libraries"
)

NINE_GENES = ["VWF", "PTPRB", "ANKRD13C", "KHDRBS1", "LPAR6", "ST6GALNAC3", "ART4", "DIAPH2"]
NINE_GENES += ["MT-ND4"]


def small_library(seed: int = 0, n_terms: int = 40, n_genes: int = 300) -> GeneSets:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 40, n_terms)
    return gene_sets_from_dict(
        "small",
        {
            f"T{i}": [f"G{j}" for j in rng.choice(n_genes, size, replace=False)]
            for i, size in enumerate(sizes)
        },
    )


def random_lists(seed: int, n: int, genes: Collection[str], longest: int) -> list[list[str]]:
    """Lists of 1..longest genes, a tenth of them unknown to every library."""
    rng = np.random.default_rng(seed)
    pool = np.array([*genes, *(f"UNKNOWN{i}" for i in range(len(genes) // 10))])
    lengths = rng.integers(1, longest + 1, n)
    return [rng.choice(pool, size, replace=False).tolist() for size in lengths]


def as_dict(library: GeneSets) -> dict[str, list[str]]:
    return {term: list(library.term_members(i)) for i, term in enumerate(library.terms)}


def gseapy_table(
    genes: list[str], sets: dict[str, list[str]], background: int | set[str] | None
) -> pd.DataFrame:
    result = gseapy.enrich(genes, gene_sets=sets, background=background, outdir=None)
    if result.res2d is None:
        return pd.DataFrame({"Term": [], "P-value": []}).set_index("Term")
    return result.res2d.set_index("Term")


def check_against_gseapy(
    lists: list[list[str]], library: GeneSets, background: int | set[str] | None
) -> int:
    """Compare every term of every list; returns the number of terms compared."""
    sets = as_dict(library)
    universe = prepare_background(library, background)
    summary = e.over_representation(lists, library, background=universe)
    compared = 0
    for i, genes in enumerate(lists):
        ours = term_table(genes, library, background=universe).set_index("Term")
        theirs = gseapy_table(genes, sets, background)
        assert set(ours.index) == set(theirs.index)
        assert summary.n_hit[i] == len(theirs)
        if theirs.empty:
            assert summary.min_q[i] == 1
            continue
        theirs = theirs.loc[ours.index]
        for column in ("P-value", "Adjusted P-value"):
            difference = ours[column].to_numpy() - theirs[column].to_numpy(dtype=float)
            assert np.abs(difference).max() <= 1e-9
            assert np.allclose(ours[column], theirs[column].astype(float), rtol=1e-9, atol=0)
        for column in ("Odds Ratio", "Combined Score"):
            assert np.allclose(ours[column], theirs[column].astype(float), rtol=1e-9, atol=0)
        assert ours["Overlap"].tolist() == theirs["Overlap"].tolist()
        assert [set(cell.split(";")) for cell in ours["Genes"]] == [
            set(cell.split(";")) for cell in theirs["Genes"]
        ]
        assert abs(summary.min_p[i] - theirs["P-value"].min()) <= 1e-9
        assert abs(summary.min_q[i] - theirs["Adjusted P-value"].min()) <= 1e-9
        assert summary.n_significant[i] == (theirs["Adjusted P-value"] < 0.05).sum()
        compared += len(ours)
    return compared


@pytest.mark.parametrize("background", [1000, None, "set"])
def test_equals_gseapy_on_50_random_lists(background: int | str | None) -> None:
    library = small_library()
    lists = random_lists(1, 50, library.genes, 60)
    given_set = {*library.genes[::2], *(f"X{i}" for i in range(50))}
    chosen = given_set if background == "set" else background
    assert check_against_gseapy(lists, library, chosen) > 500  # type: ignore[arg-type]


@needs_libraries
@pytest.mark.parametrize(
    ("name", "background", "n_lists"),
    [
        ("KEGG_2021_Human", 20000, 30),
        ("KEGG_2021_Human", None, 15),
        ("GO_Biological_Process_2025", 20000, 6),
        # gseapy copies the union once per term here, a second per list.
        ("GO_Biological_Process_2025", None, 1),
    ],
)
def test_equals_gseapy_on_the_real_libraries(
    name: str, background: int | None, n_lists: int
) -> None:
    library = load_library(name, REAL)
    lists = random_lists(2, n_lists, library.genes, 200)
    assert check_against_gseapy(lists, library, background) > 100


def test_equals_decoupler_with_bh_over_all_terms() -> None:
    decoupler = pytest.importorskip("decoupler", reason="decoupler is not installed (extra: dev)")
    library = small_library(3)
    lists = random_lists(4, 10, library.genes, 40)
    net = pd.DataFrame(
        [(term, gene) for term, genes in as_dict(library).items() for gene in genes],
        columns=["source", "target"],
    )
    for genes in lists:
        theirs = decoupler.mt.query_set(set(genes), net, n_bg=2000, tmin=0).set_index("source")
        ours = term_table(genes, library, background=2000, family="all").set_index("Term")
        theirs = theirs.loc[ours.index]
        assert np.allclose(ours["P-value"], theirs["pval"], rtol=1e-6, atol=1e-9)
        assert np.allclose(ours["Adjusted P-value"], theirs["padj"], rtol=1e-6, atol=1e-9)


def exact_tail(x: int, size: int, n: int, total: int) -> Fraction:
    ways = sum(
        math.comb(size, k) * math.comb(total - size, n - k) for k in range(x, min(size, n) + 1)
    )
    return Fraction(ways, math.comb(total, n))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_tail_is_exact(data: st.DataObject) -> None:
    total = data.draw(st.sampled_from([5, 60, 1000, 20000, 40000]))
    size = data.draw(st.integers(1, min(total, 3000)))
    n = data.draw(st.integers(1, min(total, 600)))
    x = data.draw(st.integers(max(1, n + size - total), min(size, n) + 1))
    assume(x <= min(size, n))
    log_p = log_upper_tails(np.array([x]), np.array([size]), n, total, *log_factorial_table(total))
    exact = exact_tail(x, size, n, total)
    expected = math.log(exact.numerator) - math.log(exact.denominator)
    assert log_p[0] == pytest.approx(expected, abs=1e-11, rel=1e-13)


def test_tail_agrees_with_scipy_over_a_grid() -> None:
    for n in (9, 100, 1000, 10_000):
        size, x = np.meshgrid([5, 96, 2250, 4543], np.arange(1, 200, 7))
        keep = (x <= size) & (x <= n)
        size, x = size[keep], x[keep]
        p = np.exp(log_upper_tails(x, size, n, 20000, *log_factorial_table(20000)))
        expected = hypergeom.sf(x - 1, 20000, size, n)
        assert np.allclose(p, expected, rtol=1e-9, atol=0) and (p <= 1).all()


@st.composite
def cases(draw: st.DrawFn) -> tuple[GeneSets, list[list[str]], int | list[str] | None]:
    """A small library, ragged lists (repeats, unknown symbols, mixed case) and a background."""
    genes = [f"g{i}" for i in range(draw(st.integers(3, 25)))]
    term = st.lists(st.sampled_from(genes), min_size=1, max_size=len(genes))
    terms = draw(st.lists(term, min_size=1, max_size=12))
    library = gene_sets_from_dict("l", {f"T{i}": genes for i, genes in enumerate(terms)})
    symbols = [*genes, *(gene.upper() for gene in genes), "u1", "u2", "U2"]
    lists = draw(st.lists(st.lists(st.sampled_from(symbols), max_size=30), max_size=8))
    some = st.lists(st.sampled_from([*genes, "bg1", "bg2"]), min_size=1, unique=True)
    return library, lists, draw(st.one_of(st.integers(55, 300), st.none(), some))


@given(cases(), st.sampled_from(["hit", "all"]), st.sampled_from([0.01, 0.05, 0.3]))
@settings(max_examples=150, deadline=None)
def test_fused_equals_plain_and_sets(
    case: tuple[GeneSets, list[list[str]], int | list[str] | None], family: Family, alpha: float
) -> None:
    library, lists, background = case
    try:
        universe = prepare_background(library, background)
    except InputError:
        assert isinstance(background, list)
        assert not {gene.upper() for gene in background} & set(library.genes)
        return
    options = {"background": universe, "family": family, "alpha": alpha}
    fused = e.over_representation(lists, library, **options)  # type: ignore[arg-type]
    plain = plain_over_representation(lists, library, **options)  # type: ignore[arg-type]
    for name in ("n_genes", "n_hit"):
        assert getattr(fused, name).tolist() == getattr(plain, name).tolist()
    assert np.allclose(fused.min_p, plain.min_p, rtol=1e-10, atol=0)
    assert np.allclose(fused.min_q, plain.min_q, rtol=1e-10, atol=0)
    for i, genes in enumerate(lists):
        check_one_list(genes, library, background, family, alpha, (fused, plain), i)


def check_one_list(
    genes: list[str],
    library: GeneSets,
    background: int | list[str] | None,
    family: Family,
    alpha: float,
    results: tuple[e.OverRepresentation, e.OverRepresentation],
    i: int,
) -> None:
    """The same list with Python sets, scipy's tail and scipy's BH."""
    query = {gene.upper() for gene in genes}
    terms = [set(library.term_members(j)) for j in range(len(library))]
    total = background if isinstance(background, int) else 0
    if not isinstance(background, int):
        drawn = set(library.genes) if background is None else {g.upper() for g in background}
        query, terms, total = query & drawn, [term & drawn for term in terms], len(drawn)
    tested = [j for j, term in enumerate(terms) if (term & query if family == "hit" else term)]
    x = np.array([len(terms[j] & query) for j in tested], dtype=int)
    sizes = np.array([len(terms[j]) for j in tested], dtype=int)
    p = np.asarray(hypergeom.sf(x - 1, total, sizes, len(query)))
    q = np.asarray(false_discovery_control(p)) if p.size else p
    near_alpha = bool((np.abs(q - alpha) < 1e-9).any())
    for result in results:
        assert result.n_genes[i] == len(query)
        assert result.n_hit[i] == (x > 0).sum()
        assert result.min_q[i] == pytest.approx(min(q, default=1.0), rel=1e-10)
        if not near_alpha:
            assert result.n_significant[i] == np.count_nonzero(q < alpha)
        if result.n_hit[i] == 0:
            assert result.best_term[i] == -1 and result.min_p[i] == result.min_q[i] == 1
            continue
        best = tested.index(int(result.best_term[i]))
        assert x[best] > 0
        assert p[best] == pytest.approx(p[x > 0].min(), rel=1e-9)
        assert result.min_p[i] == pytest.approx(p[best], rel=1e-9)


@pytest.mark.parametrize("family", ["hit", "all"])
def test_fused_equals_plain_on_larger_lists_and_any_thread_count(family: Family) -> None:
    library = small_library(5, n_terms=300, n_genes=900)
    lists = random_lists(6, 400, library.genes, 120)
    arguments = {"background": 1500, "family": family}
    plain = plain_over_representation(lists, library, **arguments)  # type: ignore[arg-type]
    for threads in (1, 3):
        fused = e.over_representation(lists, library, threads=threads, **arguments)  # type: ignore[arg-type]
        for name in ("n_genes", "n_hit", "n_significant", "best_term"):
            assert getattr(fused, name).tolist() == getattr(plain, name).tolist(), name
        assert np.allclose(fused.min_p, plain.min_p, rtol=1e-10, atol=0)
        assert np.allclose(fused.min_q, plain.min_q, rtol=1e-10, atol=0)


def test_ties_go_to_the_first_term_of_the_library() -> None:
    library = gene_sets_from_dict(
        "ties", {"Z": ["A", "B"], "Y": ["B", "A"], "X": ["A", "B", "C"], "W": ["A", "B"]}
    )
    for test in (e.over_representation, plain_over_representation):
        result = test([["A", "B"]], library, background=100)
        assert library.terms[result.best_term[0]] == "Z"
    assert term_table(["A", "B"], library, background=100)["Term"].tolist() == list("ZYWX")


@pytest.mark.parametrize("query", ["ABC", "BAC", "CBA"])
def test_ties_between_terms_of_different_size(query: str) -> None:
    # A list that is the whole background makes every p 1, whatever the term's size.
    library = gene_sets_from_dict("ones", {"T0": ["B"], "T1": ["A", "C"], "T2": ["A"]})
    for test in (e.over_representation, plain_over_representation):
        result = test([[*query]], library, background=None)
        assert (result.min_p[0], result.best_term[0]) == (1, 0)


@needs_libraries
def test_case_study_of_the_paper_under_each_rule() -> None:
    library = load_library("CellMarker_Augmented_2021", REAL)
    enrichr = RULES["enrichr"]
    table = term_table(
        NINE_GENES,
        library,
        background=enrichr.background_for(),
        family=enrichr.family,
        odds=enrichr.odds,
    )
    top = table.iloc[0]
    assert (top["Term"], top["Overlap"], top["Genes"]) == (
        "Endothelial cell:Heart", "2/96", "VWF;PTPRB",
    )  # fmt: skip
    assert top["P-value"] == pytest.approx(8.03e-4, rel=1e-3)
    assert top["Adjusted P-value"] == pytest.approx(0.00292, rel=1e-3)
    assert top["Combined Score"] == pytest.approx(431.03, abs=0.005)
    assert len(table) == 92 and (table["Adjusted P-value"] < 0.05).sum() == 83

    # gseapy's default, all columns; its Combined Score is the 604.44 the chapter quotes.
    assert check_against_gseapy([NINE_GENES], library, None) == 92
    default = term_table(NINE_GENES, library, background=None).iloc[0]
    assert default["Combined Score"] == pytest.approx(604.44, abs=0.005)
    every = term_table(NINE_GENES, library, background=20000, family="all").iloc[0]
    assert every["Adjusted P-value"] == pytest.approx(0.0348, abs=5e-5)


@pytest.mark.parametrize("length", [10, 30, 100, 300])
def test_uniform_lists_stay_at_the_nominal_level_under_the_corpus_rule(length: int) -> None:
    rng = np.random.default_rng(length)
    corpus = [f"C{i}" for i in range(3000)]
    library = gene_sets_from_dict(
        "wide",
        {f"T{i}": rng.choice(corpus, rng.integers(5, 150), replace=False) for i in range(300)},
    )
    null = uniform_null(np.full(2000, length), len(corpus), rng)
    shares = {}
    for name in ("corpus", "enrichr"):
        rule = RULES[name]
        universe = prepare_background(library, rule.background_for(corpus))
        encoded = encode_ids(null, gene_ids(corpus, universe))
        result = e.over_representation(encoded, library, background=universe, family=rule.family)
        shares[name] = int((result.n_significant > 0).sum())
    # P-values of a discrete test are at least as large as uniform ones: at or below 5 %.
    assert binomtest(shares["corpus"], 2000, 0.05, alternative="greater").pvalue > 1e-3
    # The other rule calls far more of the same random lists significant.
    assert shares["enrichr"] > 5 * max(shares["corpus"], 20)


def test_encoding_ids_equals_encoding_symbols() -> None:
    library = small_library(7)
    genes = [*library.genes[::2], "C1orf112", "C1ORF112", "nowhere"]
    ids = [[0, 1, 2], [len(genes) - 3, len(genes) - 2, 5], [len(genes) - 1], []]
    for background in (500, None, library.genes[:50]):
        known = gene_ids(genes, prepare_background(library, background))
        by_id = encode_ids(ragged(ids), known)
        by_symbol = encode_lists([[genes[i] for i in one] for one in ids], library, background)
        for ours, theirs in zip(by_id, by_symbol, strict=True):
            assert ours.tolist() == theirs.tolist()
    with pytest.raises(InputError, match="outside the"):
        encode_ids(ragged([[len(genes)]]), known)


def test_memory_does_not_grow_with_terms_times_lists() -> None:
    library = small_library(8, n_terms=500, n_genes=1000)
    null = uniform_null(np.full(20_000, 20), len(library.genes), np.random.default_rng(0))
    universe = prepare_background(library, 5000)
    encoded = encode_ids(null, gene_ids(library.genes, universe))
    tracemalloc.start()
    e.over_representation(encoded, library, background=universe)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A full table would hold 20,000 x 500 numbers of 8 bytes.
    assert peak < 20_000 * 500 * 8 / 10


# Malformed input: each has a stated result or a clear error.


def test_empty_list_and_no_lists() -> None:
    library = small_library()
    result = e.over_representation([[], ["G1"]], library, background=1000)
    assert result.n_genes.tolist() == [0, 1]
    assert (result.n_hit[0], result.min_p[0], result.min_q[0], result.best_term[0]) == (0, 1, 1, -1)
    assert e.over_representation([], library, background=1000).min_p.shape == (0,)
    table = term_table([], library, background=1000)
    assert table.empty and table.columns.tolist() == [
        "Term", "Overlap", "n_overlap", "term_size", "P-value", "Adjusted P-value", "Odds Ratio",
        "Combined Score", "Genes",
    ]  # fmt: skip


def test_unknown_symbols_only() -> None:
    library = small_library()
    result = e.over_representation([["NOPE", "NADA"]], library, background=1000)
    assert (result.n_genes[0], result.n_hit[0]) == (2, 0)
    assert e.over_representation([["NOPE"]], library, background=None).n_genes[0] == 0
    assert term_table(["NOPE"], library, background=1000).empty


def test_duplicates_and_mixed_case_count_once() -> None:
    library = gene_sets_from_dict("case", {"A": ["C1orf112", "VWF"], "B": ["KDR"]})
    once = e.over_representation([["C1ORF112", "VWF"]], library, background=100)
    many = e.over_representation(
        [["C1orf112", "C1ORF112", "vwf", "VWF", " VWF "]], library, background=100
    )
    for ours, theirs in zip(many, once, strict=True):
        assert ours.tolist() == theirs.tolist()
    table = term_table(["vwf", "C1orf112"], library, background=["Vwf", "c1ORF112", "KDR"])
    assert table["Genes"].tolist() == ["VWF;C1ORF112"] and table["Overlap"].tolist() == ["2/2"]


@pytest.mark.parametrize(
    ("background", "message"),
    [
        (39, "smaller than the term"),
        (0, "makes no sense"),
        (-5, "makes no sense"),
        (10**9, "makes no sense"),
        (True, "give a number of genes"),
        (2.5, "give a number of genes"),
        ("hsapiens_gene_ensembl", "give a number of genes"),
        ([], "holds no gene"),
        (["ENSG00000110799"], "check that both use gene symbols"),
        ([float("nan")], "not a gene symbol"),
    ],
)
def test_impossible_backgrounds(background: object, message: str) -> None:
    library = gene_sets_from_dict("big", {"Big": [f"G{i}" for i in range(40)], "S": ["G1"]})
    with pytest.raises(InputError, match=message):
        e.over_representation([["G1"]], library, background=background)  # type: ignore[arg-type]


def test_background_smaller_than_a_list_or_than_both_together() -> None:
    library = gene_sets_from_dict("big", {"Big": [f"G{i}" for i in range(40)]})
    with pytest.raises(InputError, match="more than the background's 50"):
        e.over_representation([[f"X{i}" for i in range(51)]], library, background=50)
    # 40 genes of the term and 20 others cannot all be among 50; gseapy returns NaN here.
    together = ["G0", *(f"X{i}" for i in range(20))]
    with pytest.raises(InputError, match="too small: list 1"):
        e.over_representation([["G0"], together], library, background=50)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (["VWF", "KDR"], "Gene list 0 is one string"),
        ([[["VWF", "KDR"]]], r"\['VWF', 'KDR'\] is not a gene symbol"),
        ([["VWF", None]], "None is not a gene symbol"),
        ([["VWF", ""]], "'' is not a gene symbol"),
        ([["VWF", float("nan")]], "nan is not a gene symbol"),
    ],
)
def test_lists_that_are_no_lists_of_symbols(lists: list[list[str]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        e.over_representation(lists, small_library(), background=1000)


def test_wrong_options() -> None:
    library = small_library()
    with pytest.raises(InputError, match="BH family"):
        e.over_representation([["G1"]], library, background=1000, family="some")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="alpha is 5"):
        e.over_representation([["G1"]], library, background=1000, alpha=5)
    with pytest.raises(InputError, match="odds ratio"):
        term_table(["G1"], library, background=1000, odds="fisher")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="prepared for library"):
        e.over_representation(
            [["G1"]], library, background=prepare_background(small_library(9), 1000)
        )


def test_lists_encoded_for_another_background_are_refused() -> None:
    library = small_library()
    encoded = encode_lists([list(library.genes[:20])], library, 1000)
    with pytest.raises(InputError, match="encoded with another background"):
        e.over_representation(encoded, library, background=library.genes[10:])


def test_rules_state_background_and_family() -> None:
    assert set(RULES) == {"enrichr", "corpus", "gseapy"}
    assert RULES["enrichr"].background_for() == 20_000
    assert RULES["gseapy"].background_for(["A"]) is None
    assert RULES["corpus"].background_for(["A"]) == ["A"]
    with pytest.raises(InputError, match="needs the genes of the corpus"):
        RULES["corpus"].background_for()
    for name, rule in RULES.items():
        assert rule.name == name
        assert "background" in rule.statement or "against" in rule.statement
        assert "Benjamini-Hochberg over" in rule.statement
    assert ("all terms" in RULES["corpus"].statement) and RULES["corpus"].family == "all"


def test_kernel_works_where_machine_code_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scfm_circuits.common import compiled as module

    attempts = []

    def refuses_to_cache(cache: bool = False, nogil: bool = False) -> object:
        attempts.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(module.numba, "njit", refuses_to_cache)
    assert compiled(exact_tail) is exact_tail
    assert attempts == [True, False]
