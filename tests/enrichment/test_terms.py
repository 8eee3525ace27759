"""The best terms of many lists and one term's FDR, against the table of one list and scipy."""

import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control, hypergeom

from scfm_circuits import InputError
from scfm_circuits.enrichment import over_representation as e
from scfm_circuits.enrichment.background import Family, encode_lists, prepare_background
from scfm_circuits.enrichment.gene_sets import GeneSets, gene_sets_from_dict, load_library
from scfm_circuits.enrichment.rules import RULES
from scfm_circuits.enrichment.terms import term_fdr, term_table, top_terms

REAL = os.environ.get("SCFM_GENE_SETS")
needs_libraries = pytest.mark.skipif(
    not REAL, reason="SCFM_GENE_SETS is not set: needs the real gene-set libraries"
)
LIBRARY = gene_sets_from_dict("small", {
    f"T{i}": [f"G{j}" for j in np.random.default_rng(i).choice(60, 3 + i % 9, replace=False)]
    for i in range(25)
})


def one_by_one(lists: list[list[str]], library: GeneSets, k: int, **options: object
               ) -> pd.DataFrame:
    """The oracle: the head of each list's own table."""
    tables = []
    for i, genes in enumerate(lists):
        head = term_table(genes, library, **options).head(k)  # type: ignore[arg-type]
        head.insert(0, "list", i)
        head.insert(1, "rank", np.arange(1, len(head) + 1))
        tables.append(head)
    return pd.concat(tables, ignore_index=True)


@given(st.lists(st.lists(st.sampled_from([*LIBRARY.genes, "nope", "g1"]), max_size=20),
                min_size=1, max_size=6),
       st.sampled_from([100, None, LIBRARY.genes[:40]]), st.sampled_from(["hit", "all"]),
       st.sampled_from(["gseapy", "enrichr"]), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_top_terms_are_the_heads_of_the_tables(
    lists: list[list[str]], background: int | list[str] | None, family: Family, odds: str, k: int
) -> None:
    options = {"background": background, "family": family, "odds": odds}
    ours = top_terms(lists, LIBRARY, k=k, **options)  # type: ignore[arg-type]
    expected = one_by_one(lists, LIBRARY, k, **options)
    pd.testing.assert_frame_equal(ours, expected, check_exact=True, check_dtype=len(ours) > 0)
    encoded = encode_lists(lists, LIBRARY, background)
    again = top_terms(encoded, LIBRARY, k=k, **options)  # type: ignore[arg-type]
    pd.testing.assert_frame_equal(again, ours, check_exact=True)


@needs_libraries
@pytest.mark.parametrize("name", ["KEGG_2021_Human", "GO_Biological_Process_2025"])
def test_top_terms_of_the_real_libraries(name: str) -> None:
    library = load_library(name, REAL)
    rng = np.random.default_rng(0)
    # Planted genes, random genes and repeats, of many lengths; ties abound in the short ones.
    lists = [[*library.term_members(int(rng.integers(len(library))))[:10],
              *rng.choice(library.genes, rng.integers(0, 120), replace=False)] for _ in range(40)]
    for rule in (RULES["enrichr"], RULES["gseapy"]):
        options = {"background": prepare_background(library, rule.background_for()),
                   "family": rule.family, "odds": rule.odds}
        ours = top_terms(lists, library, **options)  # type: ignore[arg-type]
        assert len(ours) > 150 and ours.groupby("list").size().max() == 5
        pd.testing.assert_frame_equal(ours, one_by_one(lists, library, 5, **options),
                                      check_exact=True)
        summary = e.over_representation(lists, library, background=options["background"],  # type: ignore[arg-type]
                                        family=rule.family)
        first = ours[ours["rank"] == 1]
        assert first["Term"].tolist() == [library.terms[i] for i in summary.best_term]
        assert np.allclose(first["Adjusted P-value"], summary.min_q, rtol=1e-10, atol=0)


def test_ties_keep_the_order_of_the_library_and_lists_without_a_hit_have_no_row() -> None:
    library = gene_sets_from_dict(
        "ties", {"Z": ["A", "B"], "Y": ["B", "A"], "X": ["A", "B", "C"], "W": ["A", "B"]})
    table = top_terms([["nope"], ["B", "A"], []], library, background=100, family="hit",
                        odds="gseapy", k=3)
    assert table["list"].tolist() == [1, 1, 1] and table["rank"].tolist() == [1, 2, 3]
    assert table["Term"].tolist() == ["Z", "Y", "W"]
    assert table["Genes"].tolist() == ["B;A"] * 3
    empty = top_terms([], library, background=100, family="hit", odds="gseapy")
    assert empty.empty and empty.columns.tolist() == table.columns.tolist()


@pytest.mark.parametrize("family", ["hit", "all"])
@pytest.mark.parametrize("background", [120, None])
def test_fdr_of_one_term_is_that_of_the_table_and_of_scipy(
    family: Family, background: int | None
) -> None:
    rng = np.random.default_rng(1)
    pool = np.array([*LIBRARY.genes, "nope", "nada"])
    lists = [rng.choice(pool, rng.integers(0, 15), replace=False).tolist() for _ in range(200)]
    fdr = term_fdr(lists, LIBRARY, "T7", background=background, family=family)
    sets = [set(LIBRARY.term_members(i)) for i in range(len(LIBRARY))]
    total = background or len(LIBRARY.genes)
    n_hit = 0
    for genes, q in zip(lists, fdr, strict=True):
        table = term_table(genes, LIBRARY, background=background, family=family)
        row = table.loc[table["Term"] == "T7", "Adjusted P-value"]
        n_hit += len(row)
        assert q == (row.iloc[0] if len(row) else 1)
        drawn = set(genes) if background else set(genes) & set(LIBRARY.genes)
        x = np.array([len(members & drawn) for members in sets])
        p = np.asarray(hypergeom.sf(x - 1, total, [len(m) for m in sets], len(drawn)))
        tested = np.flatnonzero(x > 0) if family == "hit" else np.arange(len(sets))
        if x[7]:
            adjusted = false_discovery_control(p[tested])[tested.tolist().index(7)]
            assert q == pytest.approx(adjusted, rel=1e-9)
    assert 30 < n_hit < 200


def test_wrong_requests_are_errors() -> None:
    options = {"background": 100, "family": "hit", "odds": "gseapy"}
    with pytest.raises(InputError, match="terms per list is 0"):
        top_terms([["G1"]], LIBRARY, k=0, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="odds ratio is 'fisher'"):
        top_terms([["G1"]], LIBRARY, background=100, family="hit", odds="fisher")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="BH family is 'some'"):
        top_terms([["G1"]], LIBRARY, background=100, family="some", odds="gseapy")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has no term 'T99'"):
        term_fdr([["G1"]], LIBRARY, "T99", background=100, family="hit")
    encoded = encode_lists([list(LIBRARY.genes[:20])], LIBRARY, 100)
    with pytest.raises(InputError, match="encoded with another background"):
        top_terms(encoded, LIBRARY, background=LIBRARY.genes[10:], family="hit", odds="gseapy")
    big = gene_sets_from_dict("big", {"Big": [f"G{i}" for i in range(40)]})
    lists = [["G0"], ["G0", *(f"X{i}" for i in range(20))]]
    with pytest.raises(InputError, match="too small: list 1"):
        top_terms(lists, big, background=50, family="hit", odds="gseapy")
