"""Cells are kept one by one, and tests hold at their level where nothing is to be found."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import tiny_profile
from scipy import stats

from scfm_circuits.circuits import perturbed_cells
from scfm_circuits.circuits.knock_out import knock_outs
from scfm_circuits.circuits.perturbation import deletions, encoder_of, of_call, responses
from scfm_circuits.circuits.perturbed_cells import (
    LEAST,
    by_gene,
    called_of_shuffled,
    changed_together,
    cost_of,
    perturbed,
    together_by_type,
    twice,
)
from scfm_circuits.enrichment.significance import benjamini_hochberg


@pytest.fixture
def profile(monkeypatch, tmp_path) -> Any:
    return tiny_profile(monkeypatch, tmp_path, forward_cells=3)


def test_all_cells_are_asked_for_one_label(parts, profile):
    model, _, corpus = parts
    label = str(corpus.labels[5])
    cells = [int(cell) for cell in np.flatnonzero(corpus.labels == label)[:2]] + [6]
    found = perturbed(model, corpus, profile, cells, label)
    for cell in cells:
        part = found[found["cell"] == corpus.cell_ids[cell]]
        assert part["gene"].tolist() == corpus.genes_of(cell)
        assert part["rank"].tolist() == list(range(1, len(part) + 1))
        own_label = str(corpus.labels[cell]) == label
        same = part["effect"].to_numpy() == pytest.approx(
            knock_outs(model, corpus, profile, cell), abs=1e-6)
        assert same == own_label
    assert (found["own"] + found["position"]).to_numpy() == pytest.approx(found["effect"])


def test_a_run_that_was_cut_off_goes_on(parts, profile, monkeypatch):
    model, _, corpus = parts
    done: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return deletions(*args, **options)

    monkeypatch.setattr(perturbed_cells, "deletions", counted)
    cells, label = [4, 5, 6], str(corpus.labels[4])
    with pytest.raises(KeyboardInterrupt):
        perturbed(model, corpus, profile, cells, label)
    monkeypatch.setattr(perturbed_cells, "deletions", lambda *args, **options: (
        done.append(1), deletions(*args, **options))[1])
    first = perturbed(model, corpus, profile, cells, label)
    assert len(done) == 3
    pd.testing.assert_frame_equal(perturbed(model, corpus, profile, cells, label), first)
    assert len(done) == 3
    # Another label is another question.
    other = next(one for one in corpus.labels if one != label)
    assert not perturbed(model, corpus, profile, cells, str(other)).equals(first)
    assert len(done) == 6


def test_the_cost_is_what_is_passed_through_the_model(parts, profile, monkeypatch):
    model, _, corpus = parts
    passed = []
    responses = perturbed_cells.deletions.__globals__["responses"]
    monkeypatch.setitem(perturbed_cells.deletions.__globals__, "responses",
                        lambda model, texts, *rest: (
                            passed.extend(texts), responses(model, texts, *rest))[1])
    said = cost_of(corpus, [4, 5])
    perturbed(model, corpus, profile, [4, 5], str(corpus.labels[4]))
    assert said.texts == len(passed)
    # An upper bound: without a gene, and without the end of the text, a text is shorter.
    assert 0.5 * said.tokens < sum(len(one.tokens) for one in passed) <= said.tokens
    assert str(said) == f"{said.texts:,} texts, 0.0 M tokens"


def test_known_genes_are_changed_together_and_random_ones_beside(parts, profile, monkeypatch):
    model, _, corpus = parts
    monkeypatch.setattr(perturbed_cells, "NEAR", 2)
    known, label = ["LYZ", "CD3D", "NONE"], str(corpus.labels[0])
    cells = [cell for cell in range(24) if len(corpus.genes_of(cell)) == 6][:6]
    found = changed_together(model, corpus, profile, cells, label, known)
    ids = [list(corpus.symbols).index(gene) for gene in known[:2]]
    for cell in cells:
        own = corpus.gene_ids_of(cell)
        rows = found[found["cell"] == corpus.cell_ids[cell]]
        front = rows[rows["how"] == "front"]
        assert front["draw"].tolist() == [-1, 0, 1, 2, 3, 4] and (front["genes"] == 2).all()
        encoder = encoder_of(corpus, profile, cell, label)

        def read(genes: Any, encoder: Any = encoder) -> float:
            return float(responses(model, [encoder.encode(np.array(genes))],
                                   of_call(encoder.contrast), 1)[0])

        assert front["before"].to_numpy() == pytest.approx(read(own), abs=1e-6)
        to_front = [*ids, *(gene for gene in own if gene not in ids)][:6]
        assert front["after"].iloc[0] == pytest.approx(read(to_front), abs=1e-6)
        deleted = rows[rows["how"] == "delete"]
        have = [gene for gene in own if gene in ids]
        assert len(deleted) == (6 if have else 0)
        if have:
            left = [gene for gene in own if gene not in ids]
            assert deleted["after"].iloc[0] == pytest.approx(read(left), abs=1e-6)
            assert (deleted["genes"] == len(have)).all()
    by = together_by_type(found, 0).set_index(["how", "cell_type", "which"])
    for (how, kind, which), row in by.iterrows():
        some = found[(found["how"] == how) & (found["cell_type"] == kind)
                     & ((found["draw"] < 0) == (which == "known"))]
        change = (some["after"] - some["before"]).groupby(some["cell"]).mean()
        assert row["cells"] == len(change) and row["change"] == pytest.approx(change.mean())
        assert row["called_after"] == pytest.approx((some["after"] > 0).mean())
        assert row["low"] <= row["change"] <= row["high"]
    pd.testing.assert_frame_equal(
        changed_together(model, corpus, profile, cells[2:], label, known),
        found[found["cell"].isin(corpus.cell_ids[cells[2:]])].reset_index(drop=True))


def made_up(n_cells: int = 30, n_genes: int = 20, seed: int = 0, scale: float = 0.0
            ) -> pd.DataFrame:
    """Effects at random; scale: how much cells differ in size and level of all their effects."""
    rng = np.random.default_rng(seed)
    rows = []
    for cell in range(n_cells):
        size, level = np.exp(scale * rng.normal(size=2)) - [0, 1]
        # Genes of a pool of 60: which a cell has depends on its level, as in cells of two kinds.
        first = 20 if level > 0 else 0
        for rank, gene in enumerate(rng.permutation(40)[:n_genes] + first):
            rows.append((f"c{cell}", "a", f"G{gene}", rank + 1, 3 * level + size * rng.normal()))
    table = pd.DataFrame(rows, columns=["cell", "cell_type", "gene", "rank", "effect"])
    return table.assign(own=0.75 * table["effect"], position=0.25 * table["effect"])


def test_what_stands_for_each_gene():
    table = made_up().assign(score=lambda one: 2 * one["effect"])
    table.loc[table["gene"] == "G5", "effect"] += 6.0
    found = by_gene(table, 0, ["score"]).set_index("gene")
    assert found.index[0] == "G5" and found.loc["G5", "q"] < 0.05 < found["q"].median()
    assert found["total"].is_monotonic_decreasing
    for gene, row in found.iterrows():
        part = table[table["gene"] == gene]
        assert row["cells"] == len(part)
        assert row["effect"] == pytest.approx(part["effect"].mean())
        assert row["total"] == pytest.approx(part["effect"].sum() / 30)
        assert row["own"] == pytest.approx(part["own"].mean())
        assert row["score"] == pytest.approx(part["score"].mean())
        if len(part) > 1:
            assert row["low"] <= row["effect"] <= row["high"]
        if len(part) >= LEAST:
            others = table.loc[table["gene"] != gene, "effect"]
            assert row["pooled_p"] == pytest.approx(
                stats.ranksums(part["effect"], others).pvalue)
            for name, values in (("p", table["effect"]), ("own_p", table["own"])):
                middle = values.groupby(table["cell"]).transform("median")
                assert row[name] == pytest.approx(stats.wilcoxon(
                    (values - middle)[part.index], correction=True, method="approx").pvalue)
        else:
            assert np.isnan(row["p"]) and np.isnan(row["pooled_q"])
    tested = found["cells"] >= LEAST
    assert found.loc[tested, "q"].to_numpy() == pytest.approx(
        benjamini_hochberg(found.loc[tested, "p"]))
    pd.testing.assert_frame_equal(by_gene(table, 0, ["score"]), found.reset_index())


def test_cells_that_differ_mislead_the_pooled_test_alone():
    """Effects that differ by cell and not by gene: the paired test calls next to nothing, the
    pooled one most genes, also when the effects are dealt out at random."""
    table = made_up(n_cells=60, scale=1.5, seed=1)
    found = by_gene(table, 0)
    tested = found["q"].notna()
    assert (found.loc[tested, "q"] < 0.05).sum() <= 1
    assert (found.loc[tested, "pooled_q"] < 0.05).mean() > 0.3
    paired, pooled = called_of_shuffled(table, 0)
    assert paired < 0.5 and pooled > 0.3 * tested.sum()
    # Cells alike: neither.
    assert max(called_of_shuffled(made_up(seed=2), 0)) < 0.5


def shared(n_cells: int = 12, n_genes: int = 40, own: float = 0.3, seed: int = 0) -> pd.DataFrame:
    """Cells with some of the genes each; two values that are independent, and much the same of a
    gene in all cells."""
    rng = np.random.default_rng(seed)
    of_gene, rows = rng.normal(size=(n_genes, 2)), []
    for cell in range(n_cells):
        for gene in rng.permutation(n_genes)[: n_genes // 2]:
            rows.append((f"c{cell}", f"G{gene}", *(of_gene[gene] + own * rng.normal(size=2))))
    return pd.DataFrame(rows, columns=["cell", "gene", "x", "y"]).sample(frac=1, random_state=seed)


def test_a_resample_counts_a_gene_and_a_cell_as_often_as_they_are_drawn():
    """Each resample written out, row by row; the first is the table as it is."""
    table = shared()
    both, (x, y) = twice(table, 0, draws=4), table[["x", "y"]].to_numpy().T
    correlation, share = both.correlation(x, y), both.share(x, x + y)
    assert share + both.share(y, x + y) == pytest.approx(np.ones(5))
    cells = pd.factorize(table["cell"].to_numpy()[both.order])[1]
    for draw in range(5):
        found, part, whole = [], 0.0, 0.0
        for at, cell in enumerate(cells):
            rows = np.flatnonzero(table["cell"].to_numpy()[both.order] == cell)
            some = np.repeat(both.order[rows], both.rows[draw, rows].astype(int))
            times = both.cells[draw, at]
            found += [np.corrcoef(x[some], y[some])[0, 1]] * int(times)
            sums = [(one - one.mean()) @ (x + y)[some] for one in (x[some], (x + y)[some])]
            part, whole = part + times * sums[0], whole + times * sums[1]
        assert correlation[draw] == pytest.approx(np.mean(found))
        assert share[draw] == pytest.approx(part / whole)
    assert (both.rows[0] == 1).all() and (both.cells[0] == 1).all()
    names = table["gene"].to_numpy()[both.order]
    assert all(len(set(both.rows[2, names == gene])) == 1 for gene in set(names))


def test_cells_that_share_genes_do_not_make_chance_a_finding():
    """Nothing relates the two values, but each is its gene's: over cells alone most intervals
    leave 0 out, over cells and genes few do."""
    alone = together = 0
    for seed in range(20):
        table = shared(seed=seed)
        both = twice(table, seed, draws=200)
        x, y = (table.groupby("cell")[one].rank().to_numpy() for one in "xy")
        low, high = np.percentile(both.correlation(x, y)[1:], [2.5, 97.5])
        together += not low <= 0 <= high
        over_cells = both._replace(rows=np.ones_like(both.rows)).correlation(x, y)[1:]
        low, high = np.percentile(over_cells, [2.5, 97.5])
        alone += not low <= 0 <= high
    assert together <= 3 < 8 <= alone
