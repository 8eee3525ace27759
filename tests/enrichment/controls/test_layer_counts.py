"""Controls keep what they are said to keep, and their p-values are what they are said to be."""

import numpy as np
import pytest
from helpers import tiny_profile
from plain_enrichment import plain_over_representation

from scfm_circuits import InputError
from scfm_circuits.enrichment.background import gene_ids, prepare_background
from scfm_circuits.enrichment.controls import layer_counts
from scfm_circuits.enrichment.controls.layer_counts import (
    ENOUGH,
    NULLS,
    Race,
    get_controls,
    layer_controls,
    null_source,
    rules_shown,
)
from scfm_circuits.enrichment.gene_sets import gene_sets_from_dict
from scfm_circuits.enrichment.null_lists import ragged
from scfm_circuits.enrichment.rules import RULES
from scfm_circuits.features.gene_lists import gene_list_ids


@pytest.fixture
def profile(monkeypatch, tmp_path):
    return tiny_profile(monkeypatch, tmp_path, live_cut_table4=-4.0, list_size=5, null_draws=19,
                        fdr=0.3)


def source_of(parts, profile, layer=0):
    corpus, statistics, _, _ = parts
    features = np.flatnonzero(statistics.live(profile.live_cut_table4)[layer])
    own = ragged(gene_list_ids(statistics, layer, features, corpus, profile))
    return own, null_source(statistics, layer, features, own, corpus, profile)


def test_null_lists_have_the_features_lengths_and_only_genes_of_the_corpus(parts, profile):
    corpus = parts[0]
    own, source = source_of(parts, profile)
    used = set(corpus.gene[corpus.gene >= 0].tolist())
    for kind in NULLS:
        null = source.draw(kind, np.random.default_rng(0), 3)
        assert len(null.lengths) == 3 * len(own.lengths)
        # Random tokens may have fewer genes than the feature lists, never more are taken.
        assert (null.lengths <= np.tile(own.lengths, 3)).all()
        assert kind == "token-preserving" or null.lengths.tolist() == own.lengths.tolist() * 3
        assert set(null.ids.tolist()) <= used, kind
        for start, end in zip(null.indptr[:-1], null.indptr[1:], strict=True):
            assert len(set(null.ids[start:end].tolist())) == end - start, kind


def test_genes_are_counted_by_cells_not_by_tokens(parts, profile):
    corpus = parts[0]
    _, source = source_of(parts, profile)
    in_cells = [sum(gene in corpus.gene_ids_of(cell) for cell in range(len(corpus)))
                for gene in source.used]
    assert source.occurrences.tolist() == in_cells
    pieces = np.bincount(corpus.gene[corpus.gene >= 0], minlength=len(corpus.symbols))[source.used]
    assert (pieces > source.occurrences).any()  # some names have several tokens


def test_an_impossible_overlap_is_an_error_whatever_term_comes_next(parts, profile):
    """A list that cannot come from so few background genes must not count as a chance result."""
    genes = [f"G{i}" for i in range(25)]
    library = gene_sets_from_dict("l", {"large": genes[:20], "small": genes[:3]})
    universe = prepare_background(library, 22)
    tester = layer_counts.Tester("enrichr", "hit", 0.05, (gene_ids(genes, universe),))
    with pytest.raises(InputError, match="does not fit the background"):
        tester.counted(ragged([[*range(3), *range(5, 25)][:22]]))


def test_part_of_a_source_draws_for_those_features_only(parts, profile):
    own, source = source_of(parts, profile)
    chosen = np.array([1, 4])
    part = source.part(chosen)
    assert part.own.lengths.tolist() == own.lengths[chosen].tolist()
    for i, feature in enumerate(chosen):
        a, b = source.fired.indptr[feature : feature + 2]
        start, end = part.fired.indptr[i : i + 2]
        assert part.fired.indices[start:end].tolist() == source.fired.indices[a:b].tolist()
        assert part.fired.data[start:end].tolist() == source.fired.data[a:b].tolist()


def test_the_quick_count_agrees_with_the_full_test(parts, profile):
    corpus, _, _, libraries = parts
    rng = np.random.default_rng(1)
    lists = ragged([rng.permutation(len(corpus.symbols))[: rng.integers(0, 9)] for _ in range(80)])
    for tester in layer_counts.testers(libraries, corpus, profile):
        called, smallest = tester.counted(lists)
        symbols = [corpus.symbols[ids].tolist() for ids in np.split(lists.ids, lists.indptr[1:-1])]
        full = [plain_over_representation(
            symbols, library,
            background=RULES[tester.rule].background_for(
                corpus.symbols[np.unique(corpus.gene[corpus.gene >= 0])].tolist()),
            family=RULES[tester.rule].family, alpha=profile.fdr)
            for library in libraries]
        assert called.tolist() == np.any([one.n_significant > 0 for one in full], axis=0).tolist()
        assert smallest == pytest.approx(np.min([one.min_p for one in full], axis=0), rel=1e-12)
    assert called.any() and not called.all()


def test_a_race_stops_at_the_twentieth_and_counts_draws_exactly():
    rng = np.random.default_rng(2)
    as_good = rng.random((300, 40)) < rng.random(40)
    as_good[:, 0], as_good[:, 1] = True, False
    race, start = Race(40), 0
    for size in (7, 50, 143, 100):
        # Chunks of one stage are drawn for the features that were running at its start.
        running = race.running
        half = size // 2
        race.add(running, as_good[start : start + half][:, running])
        race.add(running, as_good[start + half : start + size][:, running])
        start += size
    for i in range(40):
        hits = np.flatnonzero(as_good[:, i])
        expected = (ENOUGH / (hits[ENOUGH - 1] + 1) if len(hits) >= ENOUGH
                    else (1 + len(hits)) / 301)
        assert race.p[i] == pytest.approx(expected)
    assert race.p[0] == 1.0 and race.p[1] == 1 / 301


def test_a_race_of_null_features_gives_uniform_p():
    rng = np.random.default_rng(3)
    own = rng.random(4000)
    race = Race(4000)
    for _ in range(20):
        running = race.running
        race.add(running, rng.random((50, len(running))) <= own[running])
    # Valid: never more small p-values than their level allows, and not far fewer.
    for level in (0.01, 0.05, 0.2, 0.5):
        assert (race.p <= level).mean() == pytest.approx(level, abs=3 * (level / 4000) ** 0.5)


def test_layer_controls_count_what_they_say(parts, profile):
    corpus, statistics, other, libraries = parts
    ready = layer_counts.testers(libraries, corpus, profile)
    one = layer_controls(statistics, {"other": other}, 1, corpus, profile, ready)
    n, n_rules = len(one.features), len(rules_shown(profile))
    assert one.called.shape == one.min_p.shape == one.min_q.shape == (n_rules, n)
    assert ((one.min_q < profile.fdr) == one.called).all()
    assert one.null_called.shape == (n_rules, 3, 19) and (one.null_called <= n).all()
    assert one.null_p.shape == (3, n) and (one.null_p >= 1 / 20).all() and (one.null_p <= 1).all()
    m = other.live(-4.0)[1].sum()
    assert one.baseline_called[0].shape == (n_rules, m) and one.baseline_min_p[0].shape == (m,)


def test_numbers_do_not_depend_on_threads_and_seeds_matter(parts, profile, monkeypatch):
    corpus, statistics, _, libraries = parts
    ready = layer_counts.testers(libraries, corpus, profile)
    monkeypatch.setattr(layer_counts, "_IDS_AT_ONCE", 500)

    def run(threads, used):
        monkeypatch.setattr(layer_counts, "n_threads", lambda: threads)
        return layer_controls(statistics, {}, 0, corpus, used, ready)

    first, second = run(1, profile), run(4, profile)
    assert np.array_equal(first.null_p, second.null_p)
    assert np.array_equal(first.null_called, second.null_called)
    other = run(1, profile.model_copy(update={"seed": 5}))
    assert not np.array_equal(first.null_called, other.null_called)


def test_controls_are_kept_and_made_again_when_something_changes(parts, profile, monkeypatch):
    corpus, statistics, other, libraries = parts
    computed = []
    original = layer_counts.layer_controls
    monkeypatch.setattr(layer_counts, "layer_controls",
                        lambda *a, **k: computed.append(a[2]) or original(*a, **k))

    def run(used=profile, sets=libraries):
        return get_controls(statistics, {"other": other}, corpus, used, sets)

    first, second = run(), run()
    assert computed == [0, 1]
    for one, two in zip(first, second, strict=True):
        for a, b in zip(one, two, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    # Two numbers of draws stand side by side.
    run(used=profile.model_copy(update={"null_draws": 25}))
    run()
    assert computed == [0, 1] * 2
    run(sets=libraries[:1])
    assert computed == [0, 1] * 3
    (profile.results / "controls" / "token-19" / "layer_1.npz").write_bytes(b"broken")
    run(sets=libraries[:1])
    assert computed == [*[0, 1] * 3, 1]


def test_a_layer_without_live_features_has_empty_counts(parts, profile):
    corpus, statistics, other, libraries = parts
    none = profile.model_copy(update={"live_cut_table4": 0.0})
    one = layer_controls(statistics, {"other": other}, 0, corpus, none,
                         layer_counts.testers(libraries, corpus, none))
    assert one.features.size == 0 and one.null_p.shape == (3, 0)
    assert (one.null_called == 0).all()
