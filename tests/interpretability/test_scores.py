"""The automatic score: right on features whose explanation is known, and on the paper's rows."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import model_for, tiny_corpus, tiny_profile, tiny_transcoders

from scfm_circuits.cells.tokens import token_texts
from scfm_circuits.common.profile import ROOT
from scfm_circuits.enrichment.gene_sets import load_library
from scfm_circuits.features.statistics import corpus_pairs, count_features, get_statistics
from scfm_circuits.interpretability import scores as feature_scores
from scfm_circuits.interpretability.mentions import (
    SplitPairs,
    count_held_out,
    get_held_out_counts,
    mentions_fired,
    split_pairs,
)
from scfm_circuits.interpretability.score_checks import (
    READING,
    Checks,
    check_scores,
    known_feature_table,
    made_features,
    program_shares,
    read_reading,
    table3_check,
    table3_summary,
)
from scfm_circuits.interpretability.scores import (
    EITHER,
    FAMILY,
    GENE,
    NONE,
    RARE,
    SUB_WORD,
    Kinds,
    draw_tokens,
    gene_kinds,
    level_shares,
    margin_table,
    random_token_counts,
    score_counts,
    verdict_shares,
    verdicts,
)
from scfm_circuits.report.plots import features as score_figures

# Each gene's tokens, by hand: "A" and "1" stand in several families, "Q" in one family alone.
SPELLED = {"ABCA1": "_AB C A 1", "ABCA2": "_AB C A 2", "ZZTA1": "_ZZ T A 1", "ZZTA3": "_ZZ T A 3",
           "QUO1": "_Q U 1", "QUO2": "_Q U 2", "SOLO": "_S OLO", "XXA1": "_XX A 1"}


def spelled_world(n_train: int = 40, n_held: int = 10) -> tuple[Kinds, list[str], np.ndarray]:
    symbols = np.array(list(SPELLED))
    texts = sorted({text for one in SPELLED.values() for text in one.split()})
    rows = [(g, texts.index(text)) for g, one in enumerate(SPELLED.values())
            for text in one.split()]
    gene, token = np.array(rows).T
    pairs = SplitPairs(np.arange(len(rows)), token, gene, np.full(len(rows), n_train),
                       np.full(len(rows), n_held), np.full(len(symbols), n_train),
                       np.full(len(symbols), n_held))
    return Kinds(gene_kinds(pairs, symbols, texts), pairs), texts, symbols


@pytest.mark.parametrize(("tokens", "genes", "verdict", "named"), [
    (["A"], ["ABCA1"], GENE, "ABCA1"),
    (["_AB", "C", "A", "1"], ["ABCA1"], GENE, "ABCA1"),
    (["A"], ["ABCA1", "ABCA2"], EITHER, "ABCA1; ABCA2"),  # "_AB" stands in these two alone
    # One sub-word, and three families just as well.
    (["A"], ["ABCA1", "ABCA2", "ZZTA1", "ZZTA3", "XXA1"], EITHER, None),
    (["1"], ["ABCA1", "ZZTA1", "QUO1", "XXA1"], SUB_WORD, None),
    (["_Q"], ["QUO1", "QUO2"], EITHER, "QUO1; QUO2"),
    (["OLO"], ["SOLO"], EITHER, "SOLO"),
])
def test_a_feature_that_fires_as_said_is_told(tokens, genes, verdict, named):
    kinds, texts, symbols = spelled_world()
    fires = np.array([[texts[t] in tokens and symbols[g] in genes for t, g in
                       zip(kinds.pairs.token, kinds.pairs.gene, strict=True)]])
    scores = score_counts(sp.csr_matrix(fires * kinds.pairs.train_count),
                          sp.csr_matrix(fires * kinds.pairs.held_out_count), kinds).iloc[0]
    assert scores["verdict"] == verdict
    assert scores["held_out_fired"] == 10 * len(genes)
    if named:
        assert scores["gene_items"] == named
        assert scores[["gene_precision", "gene_recall", "gene_f1", "gene_auroc"]].eq(1).all()


@pytest.mark.parametrize(("genes", "verdict"), [
    (["ABCA1"], GENE), (["SOLO", "QUO1"], GENE), (["ABCA1", "ZZTA3", "QUO2"], GENE),
    (["ABCA1", "ABCA2", "ZZTA1", "ZZTA3", "QUO1", "QUO2"], FAMILY)])
def test_where_genes_are_tokens_no_sub_word_competes(genes, verdict):
    symbols, n = np.array(list(SPELLED)), len(SPELLED)
    pairs = SplitPairs(np.arange(n), np.arange(n)[::-1], np.arange(n),
                       *(np.full(n, count) for count in (40, 10, 40, 10)))
    kinds = Kinds(gene_kinds(pairs, symbols, [f"_{one}" for one in symbols[::-1]]), pairs)
    assert len(kinds.items["token"].names) == 0
    fires = np.isin(symbols, genes)[None]
    scores = score_counts(sp.csr_matrix(fires * 40), sp.csr_matrix(fires * 10), kinds).iloc[0]
    assert scores["verdict"] == verdict and scores["token_items"] == ""
    assert np.isnan(scores["token_f1"])
    assert "token" not in set(known_feature_table(kinds, seed=0, n=3)["fires_on"])


def frame(**columns) -> pd.DataFrame:
    base = {"gene_f1": 0.0, "family_f1": 0.0, "token_f1": 0.0, "held_out_fired": 50,
            "held_out_rate": 0.05}
    return pd.DataFrame([{**base, **columns}])


@pytest.mark.parametrize(("columns", "verdict"), [
    ({"gene_f1": 0.8, "token_f1": 0.6}, GENE),
    ({"gene_f1": 0.6, "family_f1": 0.8, "token_f1": 0.6}, FAMILY),
    ({"gene_f1": 0.75, "family_f1": 0.8, "token_f1": 0.6}, GENE),
    ({"gene_f1": 0.6, "token_f1": 0.8}, SUB_WORD),
    ({"gene_f1": 0.78, "token_f1": 0.8}, EITHER),
    ({"gene_f1": 0.45, "token_f1": 0.1}, NONE),
    ({"gene_f1": 0.9, "held_out_fired": 4}, RARE),
    # "Fires on every gene" has an F1 of 0.75 for a feature that fires on 60 % of them.
    ({"token_f1": 0.8, "held_out_rate": 0.6}, NONE),
    ({"token_f1": 0.9, "held_out_rate": 0.6}, SUB_WORD),
    ({"gene_f1": np.nan, "family_f1": np.nan, "token_f1": np.nan}, NONE),
])
def test_verdicts(columns, verdict):
    assert verdicts(frame(**columns)).tolist() == [verdict]


def test_mentions_are_counted_on_the_token_that_fires_most():
    gene = np.array([0, 0, 1, 1])
    counts = sp.csr_matrix([[3, 5, 0, 0], [0, 0, 9, 2], [0, 0, 0, 0]])
    found = mentions_fired(counts, gene, np.array([6, 4]))
    dense = sp.csr_matrix((found.fired, found.gene, found.indptr), (3, 2)).toarray()
    # The second feature fires nine times on a token that stands in four mentions, twice in some.
    assert dense.tolist() == [[5, 0], [0, 4], [0, 0]]


def test_held_out_counts_are_the_counts_of_the_held_out_cells():
    corpus = tiny_corpus(24)
    model = model_for(corpus).float()
    transcoders = tiny_transcoders(model)
    everything = count_features(model, transcoders, corpus, 8, progress=False)
    _, _, _, index = corpus_pairs(corpus)
    part = count_held_out(model, transcoders, corpus, 5, index, len(everything.pair_count))
    corpus.held_out[:] = ~corpus.held_out
    rest = count_held_out(model, transcoders, corpus, 7, index, len(everything.pair_count))
    for whole, one, other in zip(everything.counts, part, rest, strict=True):
        assert abs(whole - one - other).sum() == 0
        assert one.sum() > 0
    pairs = split_pairs(everything, corpus)
    assert (np.diff(pairs.gene) >= 0).all()
    np.testing.assert_array_equal(pairs.train_count + pairs.held_out_count,
                                  everything.pair_count[pairs.pair])
    cells = [set(corpus.gene_ids_of(i).tolist()) for i in range(len(corpus))]
    for g in range(len(corpus.symbols)):
        held = sum(g in cell for cell, out in zip(cells, corpus.held_out, strict=True) if out)
        assert pairs.held_out_mentions[g] == held


def test_held_out_counts_are_kept(tmp_path, monkeypatch):
    run = tiny_profile(monkeypatch, tmp_path)
    corpus = tiny_corpus(16)
    model = model_for(corpus).float()
    transcoders = tiny_transcoders(model)
    first = get_held_out_counts(model, transcoders, corpus, run)
    monkeypatch.setattr("scfm_circuits.interpretability.mentions.count_activations", None)
    again = get_held_out_counts(model, transcoders, corpus, run)
    assert all((one != other).nnz == 0 for one, other in zip(first, again, strict=True))
    corpus.gene[corpus.mask & (corpus.gene == 1)] = 0
    with pytest.raises(TypeError):  # other genes, other counts
        get_held_out_counts(model, transcoders, corpus, run)


def test_random_tokens_fire_as_often_as_asked():
    kinds, _, _ = spelled_world(4000, 1000)
    pairs = kinds.pairs
    wanted = np.array([300, 9000, 60000])
    train, held_out = random_token_counts(pairs, wanted, np.random.default_rng(0))
    total = np.asarray((train + held_out).sum(axis=1)).ravel()
    assert total == pytest.approx(wanted, rel=0.15)
    for row in train + held_out:
        assert len(np.unique(pairs.token[row.indices])) >= 3
    assert (held_out.toarray() <= pairs.held_out_count).all()


def test_tokens_are_drawn_until_they_occur_often_enough():
    drawn, rate = draw_tokens(np.array([5, 5, 5, 5, 5]), 22, np.random.default_rng(1))
    assert (len(drawn), rate) == (5, 22 / 25)
    drawn, rate = draw_tokens(np.array([5, 5, 5, 5, 5]), 3, np.random.default_rng(1))
    assert (len(drawn), rate) == (3, 0.2)


@pytest.mark.parametrize("tokenizer", ["train", "genes"])
def test_everything_runs_on_a_small_run(tmp_path, monkeypatch, tokenizer):
    run = tiny_profile(monkeypatch, tmp_path)
    corpus = tiny_corpus(24, tokenizer=tokenizer)
    model = model_for(corpus).float()
    transcoders = tiny_transcoders(model)
    statistics = get_statistics(model, transcoders, corpus, run)
    scores = feature_scores.feature_scores(model, transcoders, statistics, corpus, run,
                                           {"program": {"one": ["CD3D", "nowhere"], "none": []}})
    live = statistics.live(run.live_cut)
    assert len(scores.features) == live.sum()
    assert scores.features["in_genes"].between(0, 1).all()
    assert set(scores.features["program_items"]) <= {"", "one"}
    shares = verdict_shares(scores)
    assert set(shares["source"]) == {"feature", "untrained encoder", "random tokens"}
    told = shares.dropna()
    np.testing.assert_allclose(told[[GENE, FAMILY, SUB_WORD, EITHER, NONE]].sum(axis=1), 1)
    # A layer with no features, and one that is larger than a block.
    monkeypatch.setattr(feature_scores, "_FEATURES_AT_ONCE", 5)
    kinds = feature_scores.corpus_kinds(statistics, corpus, run)
    counted = get_held_out_counts(model, transcoders, corpus, run)
    some = live & (np.arange(len(live)) > 0)[:, None]
    blocks = feature_scores.score_features(statistics, counted, kinds, some)
    whole = scores.features[scores.features["layer"] > 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(blocks, whole[blocks.columns])
    margins = margin_table(scores).set_index(["source", "margin"])
    assert list(margins.index.levels[1]) == [0.05, 0.1, 0.2] and len(margins) == 9
    overall = shares[shares["layer"] == "all"].set_index("source")
    for source in overall.index:
        pd.testing.assert_series_equal(margins.loc[(source, 0.1)], overall.loc[source, [
            *margins]], check_names=False, check_dtype=False)
    levels = level_shares(shares)
    assert len(levels) == 12
    assert sum(levels[f"features.{part}"] for part in (
        "gene_level", "sub_word", "either", "none")) == pytest.approx(1)
    assert (levels["features.sub_word"] == levels["features.either"] == 0
            ) or tokenizer == "train"
    assert levels["random.gene_level"] == pytest.approx(
        overall.loc["random tokens", [GENE, FAMILY]].sum())
    rare = shares.assign(scored=shares["scored"].where(shares["source"] != "random tokens", 0))
    assert level_shares(rare)["random.none"] is None
    assert level_shares(rare)["features.none"] == levels["features.none"]
    assert len(score_figures.explained_per_layer(shares).axes) == 3
    assert len(score_figures.prediction_by_kind(*scores).axes) == 3


def many_families() -> Kinds:
    """30 families of 4 genes; each name holds its family's token and one of 12 that all share."""
    symbols = np.array([f"{a}{b}Q{i}" for a in "ABCDEF" for b in "VWXYZ" for i in range(4)])
    texts = [f"f{i}" for i in range(30)] + [f"s{i}" for i in range(12)]
    rng = np.random.default_rng(5)
    rows = [(g, token) for g in range(120) for token in (g // 4, 30 + int(rng.integers(12)))]
    gene, token = np.array(rows).T
    pairs = SplitPairs(np.arange(240), token, gene, *(np.full(240, n) for n in (90, 20)),
                       *(np.full(120, n) for n in (90, 20)))
    return Kinds(gene_kinds(pairs, symbols, texts), pairs)


def test_features_made_to_be_known_are_told():
    made = known_feature_table(many_families(), seed=0).set_index(["fires_on", "purity"])
    assert made.loc[("gene", 1.0), "gene_or_family"] > 0.95
    assert made.loc[("token", 1.0), "sub_word"] > 0.95
    # A family's own token stands in its genes alone.
    assert made.loc[("family", 1.0), "either"] > 0.95
    assert set(made.index.get_level_values(0)) == {"gene", "family", "token"}


def test_where_no_feature_can_be_made_the_table_is_empty():
    """As where a cell's sentence is one gene, which stands in too few cells."""
    kinds = many_families()
    rare = kinds.pairs._replace(held_out_mentions=np.zeros_like(kinds.pairs.held_out_mentions))
    made = known_feature_table(kinds._replace(pairs=rare), seed=0)
    assert len(made) == 0
    shares = Checks(made, pd.DataFrame(), pd.DataFrame()).made_shares()
    assert set(shares) > {"gene_1", "token_07_either"} and set(shares.values()) == {None}


def test_what_the_checks_say_in_the_prose(tmp_path, monkeypatch):
    run, corpus = tiny_profile(monkeypatch, tmp_path), tiny_corpus(24)
    model = model_for(corpus).float()
    statistics = get_statistics(model, tiny_transcoders(model), corpus, run)
    checks = check_scores(statistics, corpus, run, None, table3()[0])
    assert checks.table3["feature"].tolist() == table3()[0]["feature"].tolist()
    made = pd.DataFrame({"fires_on": ["gene", "gene", "family"], "purity": [1.0, 0.7, 1.0],
                         "gene_or_family": [0.9, 0.6, 0.1], "either": [0.05, 0.2, 0.8]})
    judged = pd.DataFrame({"paper": ["Yes", "No"], GENE: [3, 1], FAMILY: [2, 0], NONE: [1, 4]})
    checks = Checks(made, checks.table3, judged)
    assert checks.made_shares() == {
        "gene_1": 0.9, "gene_1_either": 0.05, "gene_07": 0.6, "gene_07_either": 0.2,
        "family_1": 0.1, "family_1_either": 0.8, "family_07": None, "family_07_either": None,
        "token_1": None, "token_1_either": None, "token_07": None, "token_07_either": None}
    assert checks.called("Yes") == (5, 6) and checks.called("No") == (1, 5)


def test_shares_that_programs_predict():
    share = "program_beyond_sub_words"
    planted = pd.DataFrame(
        [("feature", "known", 10, 0.9), ("feature", "none matches", 5, 0.2),
         ("untrained encoder", "known", 1, 0.5), ("untrained encoder", "none matches", 3, 0.1),
         ("random tokens", "there is none", 4, 0.0)],
        columns=["source", "program", "features", share])
    made = pd.DataFrame({"fires_on": ["program", "program", "gene"], "purity": [1.0, 0.7, 1.0],
                         share: [0.8, 0.3, 0.1]})
    assert program_shares(planted, made) == {
        "feature": 0.9, "untrained encoder": 0.5, "decoys": pytest.approx(0.8 / 8), "made": 0.8}
    few = planted[planted["program"] != "known"]
    assert list(program_shares(few, made)) == ["decoys", "made"]


@pytest.mark.parametrize("purity", [1.0, 0.7, 0.3])
def test_made_features_are_as_pure_as_asked(purity):
    kinds = many_families()
    train, held_out = made_features("gene", kinds, 40, purity, np.random.default_rng(2))
    inside = []
    for row in train + held_out:
        counts = np.bincount(kinds.pairs.gene, row.toarray().ravel(), minlength=120)
        # At most three genes hold what is pure; all of their tokens fire.
        inside.append(np.sort(counts)[-3:].sum() / counts.sum())
    assert np.mean(inside) == pytest.approx(purity, abs=0.06)


def table3() -> tuple[pd.DataFrame, pd.DataFrame]:
    return (pd.read_csv(ROOT / "data" / "paper" / "table3.csv"),
            read_reading(READING))


def test_the_reading_of_table_3_names_its_rows_and_words():
    printed, reading = table3()
    assert reading["feature"].tolist() == printed["feature"].tolist()
    for words, row in zip(printed["activating_tokens"], reading.itertuples(), strict=True):
        assert str(row.token) in words.replace('"', " ").split()[:2]
        for gene in str(row.genes).replace("*", "").split():
            assert gene in words


def test_rows_that_the_corpus_cannot_show_get_no_verdict():
    kinds, texts, symbols = spelled_world()
    printed, reading = table3()
    check = table3_check(printed, reading, kinds, texts, symbols)
    assert check["verdict"].notna().sum() == 1  # "2" at the end of a gene's name
    assert check.set_index("feature").loc[4942, "verdict"] in (SUB_WORD, EITHER)
    assert table3_summary(check).set_index("paper").loc["No"].sum() == 1


@pytest.mark.skipif(not os.environ.get("SCFM_TOKENIZER") or not os.environ.get("SCFM_GENE_SETS"),
                    reason="SCFM_TOKENIZER and SCFM_GENE_SETS name the paper's tokenizer and sets")
def test_the_papers_rows_on_the_papers_tokens():
    from scfm_circuits.cells.tokens import load_tokenizer

    tokenizer = load_tokenizer(os.environ["SCFM_TOKENIZER"])
    folder = Path(os.environ["SCFM_GENE_SETS"])
    library = load_library("GO_Biological_Process_2025", folder=folder)
    symbols = np.array(sorted({gene for i in range(len(library.terms))
                               for gene in library.term_members(i)}))
    encoded = [tokenizer(f" {symbol}", add_special_tokens=False)["input_ids"]
               for symbol in symbols]
    rows = np.unique([(g, token) for g, one in enumerate(encoded) for token in one], axis=0)
    n = len(symbols)
    pairs = SplitPairs(np.arange(len(rows)), rows[:, 1], rows[:, 0], np.full(len(rows), 40),
                       np.full(len(rows), 10), np.full(n, 40), np.full(n, 10))
    texts = token_texts(tokenizer, np.unique(pairs.token))
    check = table3_check(*table3(), Kinds(gene_kinds(pairs, symbols, texts), pairs), texts, symbols)
    told = check.dropna(subset="verdict").set_index("feature")
    assert len(told) >= 15
    # A token in one gene of many that hold it is gene-level, a token everywhere is a sub-word.
    assert told.loc[4942, "verdict"] == SUB_WORD
    assert told.loc[4319, "verdict"] == GENE
    # What the paper calls Yes is gene- or family-level as described; most of its No rows are, too,
    # so its raters must have seen more than what is printed.
    summary = table3_summary(check).set_index("paper")
    level = summary[[GENE, FAMILY]].sum(axis=1)
    assert level["Yes"] == summary.loc["Yes"].sum() >= 6
    assert level["No"] >= 8
