"""GSEA of whole rankings: planted truth, calibration, and what must not change the numbers."""

import os
import socket
from collections.abc import Hashable
from pathlib import Path

import gseapy
import numpy as np
import pandas as pd
import pytest

from scfm_circuits import InputError
from scfm_circuits.enrichment.gene_sets import GeneSets, gene_sets_from_dict, load_library
from scfm_circuits.enrichment.prerank import COLUMNS, prerank_called, prerank_table

GENES = [f"G{i}" for i in range(600)]


def scores(seed: int = 0, active: int = 60) -> pd.Series:
    """Activation counts with most genes silent, as a feature's are."""
    rng = np.random.default_rng(seed)
    values = np.zeros(len(GENES))
    values[rng.choice(len(GENES), active, replace=False)] = rng.integers(1, 40, active)
    return pd.Series(values, index=GENES)


def planted(ranking: pd.Series, terms: int = 30) -> GeneSets:
    """Random terms, and PLANTED: 15 active genes and 10 others."""
    rng = np.random.default_rng(99)
    active = ranking.index[ranking > 0]
    sets = {f"T{i}": rng.choice(GENES, 20, replace=False) for i in range(terms)}
    sets["PLANTED"] = [*rng.choice(active, 15, replace=False),  # type: ignore[assignment]
                       *rng.choice(GENES, 10, replace=False)]
    return gene_sets_from_dict("planted", sets)


def test_a_planted_term_is_found_and_in_shuffled_labels_it_is_not() -> None:
    truth = scores()
    library = planted(truth)
    rankings: dict[Hashable, pd.Series] = {"real": truth}
    for i in range(4):
        shuffled = np.random.default_rng(i).permutation(truth.to_numpy())
        rankings[f"shuffled {i}"] = pd.Series(shuffled, index=GENES)
    table = prerank_table(rankings, [library], seed=1, permutations=300)
    assert tuple(table.columns) == COLUMNS
    assert not table.isna().any().any()
    first = table.groupby("ranking", sort=False).head(1).set_index("ranking")
    assert first.loc["real", "Term"] == "PLANTED"
    assert first.loc["real", "FDR"] < 0.05 and first.loc["real", "NES"] > 2
    leading = set(str(first.loc["real", "Leading edge"]).split(";"))
    assert leading <= set(library.term_members(library.terms.index("PLANTED")))
    assert len(leading & set(truth.index[truth > 0])) >= 15
    called = prerank_called(table, list(rankings))
    assert called["real"] and called.sum() <= 2
    of_planted = table[(table["Term"] == "PLANTED") & (table["ranking"] != "real")]
    assert (of_planted["FDR"] > 0.05).all()


def test_why_unweighted() -> None:
    """The default weight does not find the very term that the unweighted sum finds."""
    truth = scores()
    library = planted(truth)
    sets = {term: list(library.term_members(i)) for i, term in enumerate(library.terms)}
    ours = prerank_table({0: truth}, [library], seed=1, permutations=300).set_index("Term")
    weighted = gseapy.prerank(truth.sort_values(ascending=False, kind="stable"), sets, outdir=None,
                              seed=1, permutation_num=300, no_plot=True, threads=1)
    weighted = weighted.res2d.set_index("Term")
    assert ours.loc["PLANTED", "FDR"] < 0.01 < 0.5 < weighted.loc["PLANTED", "FDR q-val"]


def running_sum(order: list[str], members: set[str]) -> float:
    """Enrichment score by its definition (Subramanian et al. 2005, exponent 0)."""
    hits = np.array([gene in members for gene in order])
    walk = np.cumsum(np.where(hits, 1 / hits.sum(), -1 / (~hits).sum()))
    return float(walk[np.abs(walk).argmax()])


def test_enrichment_score_and_leading_edge_by_their_definition() -> None:
    distinct = pd.Series(np.random.default_rng(3).permutation(len(GENES)), index=GENES)
    library = planted(scores(3))
    table = prerank_table({0: distinct}, [library], seed=0, permutations=20).set_index("Term")
    order = distinct.sort_values(ascending=False).index.tolist()
    for i, term in enumerate(library.terms):
        members = set(library.term_members(i))
        assert table.loc[term, "ES"] == pytest.approx(running_sum(order, members), abs=1e-9)
        assert table.loc[term, "n_genes"] == len(members)


def test_same_seed_same_table_whatever_the_order_and_the_threads(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = scores(4)
    library = planted(truth)
    first = prerank_table({"a": truth, "b": scores(5)}, [library], seed=7, permutations=100)
    monkeypatch.setattr("scfm_circuits.enrichment.prerank.n_threads", lambda: 5)
    threaded = prerank_table({"a": truth, "b": scores(5)}, [library], seed=7, permutations=100)
    pd.testing.assert_frame_equal(first, threaded, check_exact=True)
    reversed_genes = {symbol.lower(): truth[symbol] for symbol in GENES[::-1]}
    alone = prerank_table({"a": reversed_genes}, [library], seed=7, permutations=100)
    pd.testing.assert_frame_equal(alone, first[first["ranking"] == "a"], check_exact=True)
    other = prerank_table({"a": truth}, [library], seed=8, permutations=100)
    # Another seed breaks the ties of the silent genes in another way.
    assert not np.allclose(other.set_index("Term").loc[library.terms[0], "ES"],
                           alone.set_index("Term").loc[library.terms[0], "ES"])


def test_size_limits_count_genes_of_the_ranking_and_nothing_within_them_gives_no_row() -> None:
    library = gene_sets_from_dict("sizes", {
        "half known": [*GENES[:10], *(f"X{i}" for i in range(10))], "ten": GENES[20:30],
        "eleven": GENES[40:51], "everything": GENES})
    options = {"seed": 0, "permutations": 20}
    table = prerank_table({0: scores()}, [library], min_size=10, max_size=10, **options)  # type: ignore[arg-type]
    assert sorted(table["Term"]) == ["half known", "ten"] and set(table["n_genes"]) == {10}
    wide = prerank_table({0: scores()}, [library], min_size=5, max_size=5000, **options)  # type: ignore[arg-type]
    assert "everything" not in set(wide["Term"]) and len(wide) == 3
    none = prerank_table({0: scores()}, [library], min_size=100, **options)  # type: ignore[arg-type]
    assert none.empty and tuple(none.columns) == COLUMNS
    assert not prerank_called(none, [0]).any()
    both = prerank_table({0: scores()}, [library, planted(scores())], min_size=12, **options)  # type: ignore[arg-type]
    assert set(both["library"]) == {"planted"}


def test_only_positive_enrichment_counts() -> None:
    table = pd.DataFrame({"ranking": [1, 1, 2, 3], "FDR": [0.2, 0.01, 0.01, 0.01],
                          "NES": [2.0, -2.0, 1.5, 1.5], "library": ["a", "a", "b", "a"]})
    called = prerank_called(table, [1, 2, 4])
    assert called.index.tolist() == [1, 2, 4] and called.tolist() == [False, True, False]
    with pytest.raises(InputError, match="FDR is 5"):
        prerank_called(table, [1], fdr=5)


def test_no_network_no_file_no_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("touched the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    table = prerank_table({0: scores()}, [planted(scores())], seed=0, permutations=20)
    assert len(table) == 31
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("ranking", "message"), [
    ({}, "has 0 genes, too few"),
    (dict.fromkeys(GENES[:15], 1.0), "has 15 genes, too few for terms of 15"),
    (dict.fromkeys(GENES, 2.0), "all of its 600 genes the score 2"),
    ({**dict.fromkeys(GENES, 2.0), "G1": float("nan")}, "the score of G1 is nan"),
    ({**dict.fromkeys(GENES, 2.0), "G1": float("inf")}, "the score of G1 is inf"),
    ({**dict.fromkeys(GENES, 2.0), "": 1.0}, "'' is not a gene symbol"),
    ({**dict.fromkeys(GENES, 2.0), 7: 1.0}, "7 is not a gene symbol"),
])
def test_rankings_that_rank_nothing(ranking: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prerank_table({"good": scores(), "bad": ranking}, [planted(scores())], seed=0,
                      permutations=20)


def test_wrong_limits_are_errors() -> None:
    for options in ({"min_size": 0}, {"min_size": 20, "max_size": 10}):
        with pytest.raises(InputError, match="make no sense"):
            prerank_table({0: scores()}, [planted(scores())], seed=0, **options)
    with pytest.raises(InputError, match="permutations is 0"):
        prerank_table({0: scores()}, [planted(scores())], seed=0, permutations=0)


def test_two_spellings_are_one_gene_with_its_higher_score() -> None:
    library = gene_sets_from_dict("l", {"T": GENES[:20]})
    spelled = {**scores().to_dict(), "g0": 500.0}
    one = {**scores().to_dict(), "G0": 500.0}
    tables = [prerank_table({0: ranking}, [library], seed=0, permutations=20)
              for ranking in (spelled, one)]
    pd.testing.assert_frame_equal(*tables)


def test_a_real_library() -> None:
    folder = os.environ.get("SCFM_GENE_SETS")
    if not folder:
        pytest.skip("SCFM_GENE_SETS is not set: needs the real gene-set libraries")
    library = load_library("KEGG_2021_Human", folder)
    rng = np.random.default_rng(0)
    genes = sorted({*rng.choice(library.genes, 700, replace=False),
                    *library.term_members(library.terms.index("Ribosome"))[:60]})
    ribosome = set(library.term_members(library.terms.index("Ribosome")))
    ranking = {gene: float(rng.integers(1, 30)) if gene in ribosome and rng.random() < 0.6 else
               float(rng.random() < 0.05) for gene in genes}
    table = prerank_table({"feature": ranking}, [library], seed=0, permutations=200)
    assert table["Term"].iloc[0] == "Ribosome" and table["FDR"].iloc[0] < 0.05
    assert table["n_genes"].between(15, 500).all()
