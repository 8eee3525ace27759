"""Known genes are ranked as they should be, and found where they are planted."""

import dataclasses
import json
import re
from typing import Any

import jupytext
import numpy as np
import pandas as pd
import pytest
import torch
from chapter_code import executed
from helpers import GENES, LABELS, tiny_profile
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import roc_auc_score

from scfm_circuits import InputError
from scfm_circuits.cells.prompts import answered_prompt
from scfm_circuits.circuits import knock_out, known_response
from scfm_circuits.circuits.attribution import contributions
from scfm_circuits.circuits.contrast import contrast_of
from scfm_circuits.circuits.direct_effects import all_paths
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.known_response import (
    CIRCUIT,
    MEASURED,
    SCORES,
    ResponseStudy,
    best_rival,
    best_terms,
    enriched,
    known_ranks,
    numbers,
    presence_difference,
    ranks_said,
    response_study,
    telling_features,
    terms_shown,
)
from scfm_circuits.common.profile import ROOT
from scfm_circuits.enrichment.gene_sets import gene_sets_from_dict
from scfm_circuits.features.statistics import count_features
from scfm_circuits.models.mlp_sites import mlp_sites

LABEL = LABELS[0]


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield tiny_profile(patch, tmp_path_factory.mktemp("results"), case_type=LABEL,
                           forward_cells=3, known_response=["LYZ", "CD3D", "NONE"], list_size=4)


@pytest.fixture(scope="module")
def study(parts, profile) -> ResponseStudy:
    model, transcoders, corpus = parts
    return response_study(model, transcoders, corpus, profile, most=6)


def test_scores_and_effects_are_of_one_question(parts, profile, study):
    model, transcoders, corpus = parts
    assert set(study.genes["cell"]) <= set(corpus.cell_ids[corpus.held_out])
    assert [name.removeprefix("score_") for name in study.genes if name.startswith("score_")] == [
        *SCORES] and set(CIRCUIT) < set(SCORES)
    more_often = dict(zip(corpus.symbols, presence_difference(corpus, LABEL), strict=True))
    for cell, part in study.genes.groupby("cell"):
        index = int(np.flatnonzero(corpus.cell_ids == cell)[0])
        prompt = answered_prompt(corpus, profile, index, LABEL)
        contrast = contrast_of(corpus, prompt)
        run = freeze(model, transcoders, prompt.encoded.tokens)
        paths = all_paths(run, contrast.start(run)[1]).numpy()
        assert part["score_paths"].to_numpy() == pytest.approx(
            [paths[prompt.encoded.gene == gene].sum() for gene in corpus.gene_ids_of(index)])
        assert part["score_difference"].tolist() == [more_often[gene] for gene in part["gene"]]
    assert set(study.summary["truth"]) == {"effect", "own"}
    assert len(study.summary) == 2 * len(SCORES)
    said = numbers(study, profile.seed)
    assert said["cells"] == 6 and said["in_all"] == study.genes["gene"].nunique()
    by = study.summary[study.summary["truth"] == "own"].set_index("score")["spearman"]
    assert said["own_circuit"] == SCORES[by[list(CIRCUIT)].idxmax()]
    assert str(said["own_rival_spearman"]).startswith(f"{by.drop(list(CIRCUIT)).max():.2f} (")
    within = np.mean([spearmanr(part["position"], part["effect"]).statistic
                      for _, part in study.genes.groupby("cell")])
    assert str(said["position_spearman"]).startswith(f"{within:.2f} (")
    centred = study.genes[["own", "position", "effect"]] - study.genes.groupby("cell")[
        ["own", "position", "effect"]].transform("mean")
    for part in ("own", "position"):
        share = (centred[part] * centred["effect"]).sum() / (centred["effect"] ** 2).sum()
        assert str(said[f"{part}_share"]).startswith(f"{100 * share:.0f} % (")
    assert (study.summary["spearman_both_low"] <= study.summary["spearman"]).all()


def test_features_contributions_are_means_over_cells(parts, profile, study):
    model, transcoders, corpus = parts
    for label, part in study.contributions.groupby("cell_type"):
        cells = study.genes.loc[study.genes["cell_type"] == label, "cell"].unique()
        total = np.zeros((transcoders.n_layers, transcoders.n_features))
        at_end = np.zeros_like(total)
        for cell in cells:
            index = int(np.flatnonzero(corpus.cell_ids == cell)[0])
            prompt = answered_prompt(corpus, profile, index, LABEL)
            contrast = contrast_of(corpus, prompt)
            run = freeze(model, transcoders, prompt.encoded.tokens)
            at_end += contributions(run, contrast.start(run)[1]).features.numpy() / len(cells)
        total[part["layer"], part["feature"]] = part["contribution"]
        # In the last layer nothing moves to another token, so all is written where it is read.
        assert total[-1] == pytest.approx(at_end[-1], abs=1e-9)
        assert np.abs(total[0] - at_end[0]).max() > 1e-3


def test_presence_is_counted_in_training_cells(parts):
    corpus = parts[2]
    found = presence_difference(corpus, LABEL)
    for symbol in ("LYZ", "FOXO1"):
        own, others = ([symbol in corpus.genes_of(cell) for cell in range(len(corpus))
                        if not corpus.held_out[cell] and (corpus.labels[cell] == LABEL) == side]
                       for side in (True, False))
        assert found[list(corpus.symbols).index(symbol)] == pytest.approx(
            np.mean(own) - np.mean(others))
    assert not presence_difference(corpus, "no such label").any()


def planted(n_cells: int = 20, n_genes: int = 60, strong: int = 6, seed: int = 0) -> ResponseStudy:
    """Every cell has the strong genes G0, G1, ... with an effect of 1, and others with less."""
    rng = np.random.default_rng(seed)
    rows = []
    for cell in range(n_cells):
        others = rng.permutation(np.arange(strong, n_genes))[:30]
        for rank, gene in enumerate([*range(strong), *others]):
            effect = rng.normal() * 0.2 + (gene < strong)
            rows.append((f"c{cell}", "a", f"G{gene}", rank + 1, effect, 0.9 * effect, 0.1 * effect,
                         *(effect if name == "paths" else rng.normal() for name in SCORES)))
    genes = pd.DataFrame(rows, columns=["cell", "cell_type", "gene", "rank", "effect", "own",
                                        "position", *(f"score_{name}" for name in SCORES)])
    table = known_response.by_gene(genes, 0, [f"score_{name}" for name in SCORES])
    return ResponseStudy(genes, table, *[pd.DataFrame()] * 3)


def test_planted_genes_come_first_and_a_score_of_chance_does_not():
    study, known = planted(), [f"G{i}" for i in range(6)]
    ranks = known_ranks(study, [*known, "NONE"], 0)
    by = ranks.summary.set_index("by")
    for name in ("effect", "paths"):
        assert by.loc[name, "median_rank"] == 4 and by.loc[name, "p"] < 0.001  # NONE is the last
        assert by.loc[name, "null_low"] > 6
    own = ranks.genes[(ranks.genes["by"] == "effect")].set_index("gene")
    totals = study.by_gene.set_index("gene")["total"]
    assert own.loc[known, "rank"].tolist() == pytest.approx(
        (len(totals) + 1 - rankdata(totals))[totals.index.get_indexer(pd.Index(known))])
    assert own.loc["NONE", ["cells", "value", "rank"]].tolist() == [0, 0, len(totals)]
    assert set(by.index) == {*MEASURED, *SCORES}
    first = study.by_gene["gene"].iloc[0]
    assert ranks_said(ranks, "effect").startswith(f"{first} (1), G")
    assert ranks_said(ranks, "effect").endswith(f"NONE ({len(totals)})")
    assert best_rival(ranks) == by.loc[[one for one in SCORES if one not in CIRCUIT],
                                       "median_rank"].idxmin()
    pd.testing.assert_frame_equal(known_ranks(study, known, 0).genes,
                                  ranks.genes[ranks.genes["gene"] != "NONE"].reset_index(drop=True))
    # Genes as frequent as the known ones that are as strong: no news.
    rest = [f"G{i}" for i in range(10, 60)]
    ps = [known_ranks(study, list(some), 0).summary.set_index("by").loc["effect", "p"]
          for some in np.random.default_rng(1).permutation(rest).reshape(10, 5)]
    assert min(ps) > 0.005 and np.mean(ps) == pytest.approx(0.5, abs=0.25)
    with pytest.raises(InputError, match="correct its symbols"):
        known_ranks(study, ["NONE"], 0)


def test_no_order_of_genes_chooses_those_as_frequent():
    """All that are as near as the last are among them."""
    cells = np.array([5, 5, 5, 5, 4, 6, 9, *[7] * 30])
    [found] = known_response._as_frequent(cells, np.array([0]))
    assert found.tolist() == [1, 2, 3, 4, 5, *range(7, 37)]  # 9 cells are farther than 7
    shuffled = np.random.default_rng(0).permutation(np.arange(1, len(cells)))
    order = np.array([0, *shuffled])
    [again] = known_response._as_frequent(cells[order], np.array([0]))
    assert sorted(order[again]) == sorted(found)


def test_a_known_gene_that_no_cell_has_counts_as_the_last():
    study = planted()
    whole = known_ranks(study, ["G0", "G1", "NONE", "NADA"], 0).summary.set_index("by")
    of = len(study.by_gene)
    ranks = rankdata(-study.by_gene.set_index("gene")["total"])
    own = [ranks[study.by_gene["gene"].tolist().index(gene)] for gene in ("G0", "G1")]
    assert whole.loc["effect", "median_rank"] == np.median([*own, of, of])
    assert (whole["null_high"] <= of).all() and whole.loc["effect", "null_low"] > of / 2


def test_planted_terms_are_found_by_those_who_see_them():
    study = planted()
    library = gene_sets_from_dict("made", {"response": [f"G{i}" for i in range(6)] + ["ELSE"],
                                  "other": [f"G{i}" for i in range(20, 40)]})
    found = enriched(study, library, ["response", "absent"], 6)
    rows = found.set_index(["list", "term"])
    measured = rows.loc[(MEASURED["effect"], "response")]
    assert (measured["n_overlap"], measured["place"]) == (6, 1) and measured["q"] < 1e-5
    assert measured["best_term"] == "response"
    called = rows.loc[("called by the paired test", "response")]
    assert called["genes"] == 6 and called["n_overlap"] == 6
    assert rows.loc[(MEASURED["effect"], "absent"), "q"] == 1
    assert rows.loc[(SCORES["attention"], "response"), "n_overlap"] < 6
    shown = terms_shown(found, {MEASURED["own"]: "own", MEASURED["effect"]: "whole"})
    assert list(shown) == ["term", "whole", "own"] and set(shown["term"]) == set(found["term"])
    assert shown.set_index("term").loc["response", "whole"] == f"{measured['q']:.2g} (6)"
    best = best_terms(found).set_index("list")
    assert list(best.index) == list(dict.fromkeys(found["list"]))
    assert best.loc[MEASURED["effect"], "q"] == measured["q"]


def test_features_are_chosen_on_training_cells(parts, profile):
    model, transcoders, corpus = parts
    statistics = count_features(model, transcoders, corpus, 3)
    table, gene = telling_features(model, transcoders, statistics, corpus, profile, top=3)
    assert len(table) == 3 and table["training_auroc"].is_monotonic_decreasing
    assert (table["training_auroc"] >= 0.5).all()
    held_out = np.flatnonzero(corpus.held_out)
    truth = corpus.labels[held_out] == LABEL
    for row in table.itertuples():
        values = []
        for cell in held_out:
            end = int(corpus.answer_start[cell])
            tokens = torch.from_numpy(corpus.tokens[[cell], :end])
            inputs = mlp_sites(model, tokens, torch.ones_like(tokens, dtype=torch.bool)).inputs
            z = transcoders.layer_activations(row.layer, inputs[row.layer])[:, row.feature]
            values.append(float({"mean": z.mean(), "largest": z.max(), "last": z[-1]}[row.read]))
        auroc = roc_auc_score(truth, values)
        assert row.held_out_auroc == pytest.approx(
            auroc if row.fires_for == "the response" else 1 - auroc)
    assert corpus.symbols[int(gene["gene"])] in GENES and 0.5 <= gene["training_auroc"] <= 1
    one_label = dataclasses.replace(corpus, labels=np.full(len(corpus), LABEL))
    with pytest.raises(InputError, match="stratified"):
        telling_features(model, transcoders, statistics, one_label, profile)


def test_cells_without_genes_are_refused(parts, profile, monkeypatch):
    monkeypatch.setattr(knock_out, "LEAST", 99)
    with pytest.raises(InputError, match="raise `genes_per_cell`"):
        response_study(*parts, profile)


# --- the chapter ---------------------------------------------------------------------------------

def test_every_cell_of_the_chapter(monkeypatch, tmp_path):
    """Its code, executed on a few of the real cells where they are at hand and on simulated ones
    elsewhere, leaves all tables and every number that its text has."""
    monkeypatch.setenv("SCFM_RESULTS", str(tmp_path))
    monkeypatch.setattr(known_response, "DRAWS", 50)
    monkeypatch.setattr(known_response.response_study, "__defaults__", (6,))
    notebook = jupytext.read(ROOT / "notebooks" / "14_interferon.py")
    names = executed(notebook, max_cells=40)
    results = names["settings"].results
    header = notebook.metadata["jupyter"]["scfm"] if "scfm" in notebook.metadata.get(
        "jupyter", {}) else notebook.metadata["scfm"]
    assert all((results / one).is_file() for one in header["produces"])
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    kept = json.loads((results / "values" / "14_interferon.json").read_text())
    assert set(re.findall(r"\{glue:text\}`([^`]+)`", text)) == set(kept) & set(
        re.findall(r"\{glue:text\}`([^`]+)`", text))
    table = pd.read_csv(results / "tables" / "perturbation.csv")
    assert {"gene", "effect", "low", "high", "own", "position", "predicted"} <= set(table)
