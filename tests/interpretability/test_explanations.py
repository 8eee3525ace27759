"""Genes, families and sub-words as explanations: chosen as promised, scored as by scikit-learn."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score

from scfm_circuits import InputError
from scfm_circuits.interpretability.explanations import (
    description_bits,
    explain,
    family_items,
    family_stem,
    items_from,
    read_gene_groups,
)
from scfm_circuits.interpretability.mentions import Mentions, as_arrays


@pytest.mark.parametrize(("symbol", "stem"), [
    ("ZBTB20", "ZBTB"), ("HLA-DRA", "HLA"), ("HLA-B", "HLA"), ("MT-ND4", "MT"), ("RPS3A", "RPS"),
    ("HSP90AA1", "HSP"), ("CSNK1A1", "CSNK"), ("PTPRC", "PTPR"), ("NKX2-5", "NKX"),
    ("GOLGA8A", "GOLGA"), ("WSB1", "WSB"), ("foxo1", "FOXO"), ("C1orf112", "C1ORF112"),
    ("ABL", "ABL"), ("7SK", "7SK"), ("RP11-291B21.2", "RP"), ("CD3D", "CD"),
])
def test_stems(symbol, stem):
    assert family_stem(symbol) == stem


@given(st.text(max_size=12))
def test_a_stem_is_never_empty_unless_the_symbol_is(symbol):
    stem = family_stem(symbol)
    assert symbol.upper().startswith(stem)
    assert bool(stem) == bool(symbol)


def members(items) -> dict[str, list[int]]:
    return {str(name): items.item_genes[a:b].tolist() for name, a, b in
            zip(items.names, items.item_indptr[:-1], items.item_indptr[1:], strict=True)}


def test_families_are_stems_and_groups():
    symbols = ["FOXO1", "FOXO3", "VWF", "TNNI3", "TNNC1"]
    assert members(family_items(symbols)) == {
        "FOXO*": [0, 1], "VWF": [2], "TNNI3": [3], "TNNC1": [4]}
    groups = {"Troponins": ("tnni3", "TNNC1", "TNNT2"), "Forkheads": ("FOXO1", "FOXO3"),
              "Elsewhere": ("ACTB",)}
    assert members(family_items(symbols, groups)) == {
        "Forkheads": [0, 1], "VWF": [2], "TNNI3": [3], "TNNC1": [4], "Troponins": [3, 4]}


def test_a_table_of_groups_is_read_or_refused(tmp_path):
    (tmp_path / "g.tsv").write_text("Symbol\tGroup\nTNNI3\tTroponins\ntnnc1 \tTroponins\nNA\t\n")
    assert read_gene_groups(tmp_path / "g.tsv") == {"Troponins": ("TNNI3", "TNNC1")}
    (tmp_path / "g.csv").write_text("symbol,group\nNA,Names that look missing\n")
    assert read_gene_groups(tmp_path / "g.csv") == {"Names that look missing": ("NA",)}
    for text, message in (("gene,family\nA,b\n", "needed are"), ("symbol,group\n,\n", "no gene"),
                          ("", "cannot be read")):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            read_gene_groups(tmp_path / "bad.csv")
    with pytest.raises(InputError, match="cannot be read"):
        read_gene_groups(tmp_path / "none.csv")


def mentions(fired: np.ndarray, present: np.ndarray) -> Mentions:
    return Mentions(*as_arrays(sp.csr_matrix(fired)), present.astype(float))


def expanded(score: np.ndarray, fired: np.ndarray, present: np.ndarray
             ) -> tuple[np.ndarray, np.ndarray]:
    """A score and the truth for each mention, one by one."""
    truth = np.concatenate([np.arange(n) < k for k, n in zip(fired, present, strict=True)])
    return np.repeat(score, present), truth


@st.composite
def worlds(draw):
    n_genes, n_items, n = draw(st.integers(2, 8)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    holds = rng.random((n_items, n_genes)) < 0.4
    holds[np.arange(n_items), rng.integers(0, n_genes, n_items)] = True
    present = rng.integers(0, 6, (2, n_genes))
    fired = rng.binomial(present[:, None, :], rng.random((2, n, n_genes)) * (
        rng.random((n, n_genes)) < 0.7))
    return holds, present, fired


def slow_choice(holds, present, fired, at_most) -> list[int]:
    """The rule in words, feature by feature, over sets."""
    chosen, covered, best = [], np.zeros(holds.shape[1], bool), 0.0
    while len(chosen) < at_most:
        f1s = []
        for item in holds:
            union = covered | item
            f1s.append(2 * fired[union].sum() / max(present[union].sum() + fired.sum(), 1))
        if max(f1s) <= best * (1 + 1e-12):
            break
        chosen.append(int(np.argmax(np.array(f1s) >= max(f1s) * (1 - 1e-12))))
        covered, best = covered | holds[chosen[-1]], max(f1s)
    return chosen


@settings(max_examples=150, deadline=None)
@given(worlds())
def test_items_and_scores_are_those_of_the_slow_way(world):
    holds, present, fired = world
    items = items_from([f"i{i}" for i in range(len(holds))], *np.nonzero(holds), holds.shape[1])
    found = explain(mentions(fired[0], present[0]), mentions(fired[1], present[1]), items)
    for f in range(fired.shape[1]):
        chosen = found.items[f][found.items[f] >= 0].tolist()
        assert chosen == slow_choice(holds, present[0], fired[0, f], 3)
        score, left = np.zeros(holds.shape[1]), np.ones(holds.shape[1], bool)
        for item in chosen:
            new = left & holds[item]
            score[new] = fired[0, f, new].sum() / present[0][new].sum()
            left &= ~new
        rest = present[0][left].sum()
        score[left] = fired[0, f, left].sum() / rest if rest else 0
        values, truth = expanded(score, fired[1, f], present[1])
        predicted = np.repeat(~left, present[1])
        if truth.any():
            assert found.f1[f] == pytest.approx(f1_score(truth, predicted, zero_division=0))
            assert found.recall[f] == pytest.approx(recall_score(truth, predicted))
        if predicted.any():
            assert found.precision[f] == pytest.approx(
                precision_score(truth, predicted, zero_division=0))
        if truth.any() and not truth.all():
            assert found.auroc[f] == pytest.approx(roc_auc_score(truth, values))
        else:
            assert np.isnan(found.auroc[f])


def test_description_bits_are_the_logarithm_of_the_choices():
    assert description_bits(np.array([0, 1, 2]), 8) == pytest.approx([0, 3, np.log2(28)])
