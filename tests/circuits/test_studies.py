"""What is said of several circuits is what each of them says, counted and averaged."""


import numpy as np
import pandas as pd
import pytest
from helpers import tiny_profile, tiny_transcoders

from scfm_circuits import InputError
from scfm_circuits.cells.prompts import answered_prompt
from scfm_circuits.circuits import studies
from scfm_circuits.circuits.attribution import contributions, feature_direction
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.interventions import FeatureAt, frozen_change, written_by
from scfm_circuits.circuits.search import strongest_features, trace_feature
from scfm_circuits.circuits.structure import (
    circuit_features,
    flow_table,
    inhibition,
    jaccard,
    path_ends,
)
from scfm_circuits.features.statistics import count_features

OPTIONS = {"circuit_branches": 8, "circuit_depth": 3, "circuit_nodes": 30}


@pytest.fixture(scope="module")
def study(parts, tmp_path_factory) -> studies.CircuitStudy:
    with pytest.MonkeyPatch.context() as patch:
        profile = tiny_profile(patch, tmp_path_factory.mktemp("results"), **OPTIONS)
    return studies.circuit_study(*parts, profile)


# --- the cells -----------------------------------------------------------------------------------


def test_every_type_has_its_first_cells(parts):
    corpus = parts[2]
    held_out = np.flatnonzero(corpus.held_out)
    labels = np.unique(corpus.labels[held_out])
    cells = studies.studied_cells(corpus, per_type=1)
    assert corpus.labels[cells].tolist() == labels.tolist()
    for cell in cells:
        assert cell == held_out[corpus.labels[held_out] == corpus.labels[cell]][0]
    # Every type's first before any type's second.
    more = studies.studied_cells(corpus, per_type=9, most=len(labels))
    assert more.tolist() == cells.tolist()
    assert set(studies.studied_cells(corpus, per_type=99, most=99)) == set(held_out)


def test_a_cell_has_its_own_circuit(parts, study, monkeypatch, tmp_path):
    model, transcoders, corpus = parts
    profile = tiny_profile(monkeypatch, tmp_path, **OPTIONS)
    keys, circuit = study.circuits[-1]
    cell = int(np.flatnonzero(corpus.cell_ids == keys["cell"])[0])
    case = answered_prompt(corpus, profile, cell, str(corpus.labels[cell]))
    frozen = freeze(model, transcoders, case.encoded.tokens)
    (feature,) = strongest_features(frozen, 1, case.position, 1)
    again = trace_feature(frozen, 1, feature, case.position, branches=8, depth=3, max_nodes=30)
    assert (keys["cell_type"], keys["target"]) == (case_type(corpus, cell), feature)
    assert again == circuit
    own = study.flow[study.flow["cell"] == keys["cell"]].drop(columns=studies.KEYS)
    reading = feature_direction(frozen, 1, feature, case.position)
    pd.testing.assert_frame_equal(own.reset_index(drop=True),
                                  flow_table(circuit, contributions(frozen, reading)))
    row = study.inside.iloc[-1]
    assert row["negative"] == inhibition(circuit)["negative"]
    assert row[list(path_ends(circuit))].sum() == pytest.approx(1)
    singles = study.singles[study.singles["cell"] == keys["cell"]]
    nodes = {(node.layer, node.index, node.position) for node in circuit.nodes.values()
             if node.kind == "feature" and node.id != circuit.target}
    for name, sign in (("ablation", -1), ("doubling", 1)):
        some = singles[singles["intervention"] == name]
        assert set(some[["layer", "feature", "position"]].itertuples(index=False, name=None)
                   ) == nodes
        first = FeatureAt(*some[["layer", "feature", "position"]].iloc[0])
        written = written_by(frozen, [first])
        assert some["predicted"].iloc[0] == pytest.approx(
            sign * frozen_change(frozen, written, reading) / float(reading.value))
    assert len(study.effects) == 12 * len(study.circuits) and study.mean_cells == (
        ~corpus.held_out).sum()


def case_type(corpus, cell: int) -> str:
    return str(corpus.labels[cell])


def test_without_an_active_feature_there_is_no_circuit(parts, monkeypatch, tmp_path):
    model, _, corpus = parts
    silent = tiny_transcoders(model)
    silent.b_enc[1] = -1e6
    with pytest.raises(InputError, match="No feature of the last layer"):
        studies.circuit_study(model, silent, corpus, tiny_profile(monkeypatch, tmp_path, **OPTIONS))


# --- is it what the model uses? ------------------------------------------------------------------


def with_effects(rows: list[tuple[str, str, str, float, float, float]]) -> studies.CircuitStudy:
    """A study of effects only: cell, intervention, features, predicted, measured, lowest."""
    effects = pd.DataFrame(rows, columns=["cell", "intervention", "features", "predicted",
                                          "measured", "lowest"])
    effects = effects.assign(cell_type=effects["cell"].str[0], target=7, n_features=4.0, size=2.0)
    nothing = pd.DataFrame()
    return studies.CircuitStudy((), effects, nothing, nothing, nothing, nothing, 9)


def test_faithfulness_by_hand():
    rows = []
    for cell, measured in (("a1", -0.9), ("a2", -0.5), ("b1", -0.1)):
        for name, share in (("ablation", 1.0), ("doubling", -1.0)):
            rows.append((cell, name, "circuit", 1.1 * share * measured, share * measured, 0.0))
            # Among the same tokens one random circuit comes near; of the same size none does.
            rows += [(cell, name, "same token", 0.0, -0.2, -0.3),
                     (cell, name, "same size", 0.0, 0.0, -0.6)]
        for kind in ("circuit", "none", "same token", "same size"):
            rows.append((cell, "alone", kind, measured, measured / 2, 0.0))
        for kind in ("circuit", "none"):
            rows.append((cell, "alone, own kind", kind, -measured, measured / 4, 0.0))
    found = studies.faithfulness(with_effects(rows))
    assert found.numbers["cells_beyond_random"] == 1  # a1: -0.9 is below -0.3 and -0.6
    assert [found.numbers[name] for name in ("cells", "types", "mean_cells")] == [3, 2, 9]
    assert found.numbers["circuit"] == -0.5 and found.numbers["doubling_circuit"] == 0.5
    assert found.numbers["random"] == -0.2 and found.numbers["random_size"] == 0
    assert found.ratios["alone_same_token"] == 0.75 and found.ratios["own_kind_none"] == 0.875
    assert found.ratios["size_same_size"] == 2
    first = found.by_type.iloc[0]
    assert first[["cells", "smallest", "largest", "same token"]].tolist() == [2, -0.5, -0.9, -0.2]
    assert first["measured"] == pytest.approx(-0.7)
    assert len(found.medians) == 3 * 2 + 4 + 2


# --- what are they made of? ----------------------------------------------------------------------


def test_shares_are_means_over_cells(study):
    shares = studies.flow_shares(study)
    assert sum(share for name, share in shares.items() if name.startswith("direct_")) == (
        pytest.approx(1))
    ends = studies.end_table(study)
    assert ends["share"].sum() == pytest.approx(1)
    each = [path_ends(circuit)["errors"] for _, circuit in study.circuits]
    assert shares["ends_errors"] == pytest.approx(np.mean(each))
    negative = [inhibition(circuit) for _, circuit in study.circuits]
    assert shares["negative_edges"] == pytest.approx(
        np.mean([one["negative"] / one["edges"] for one in negative]))


def test_the_head_that_brings_most_by_hand(study):
    rows = [("c1", "A", 0, 1, 0.5), ("c1", "A", 1, 0, 0.1), ("c1", "", 1, 0, 0.4),
            ("c2", "A", 0, 1, 0.1), ("c2", "B", 1, 0, 0.3)]
    heads = pd.DataFrame(rows, columns=["cell", "gene", "layer", "head", "share"])
    found = studies.head_summary(study._replace(heads=heads))
    assert found.top == "0.1" and found.top_cells == 1
    assert found.to_genes == pytest.approx(1.0 / 1.4) and found.top_share == pytest.approx(0.6)
    assert found.listed["gene"].tolist() == ["A", "A", "A", "B"]


def test_supernodes_hold_every_feature_of_their_circuit(parts, study):
    model, transcoders, corpus = parts
    statistics = count_features(model, transcoders, corpus, 8, progress=False)
    found = studies.supernode_table(study, statistics, corpus)
    sizes = found.table.groupby("cell", sort=False)["n_features"].sum()
    assert sizes.tolist() == [len(circuit_features(circuit)) for _, circuit in study.circuits]
    assert found.features == np.median(sizes) and 0 < found.largest <= 1
    kind = study.types[-1]
    first = study.types.index(kind)
    assert found.of_one(kind)["n_features"].sum() == sizes.iloc[first]
    assert found.of_one("no such type")["n_features"].sum() == sizes.iloc[0]


# --- what have they in common? -------------------------------------------------------------------


def test_overlap_is_that_of_every_pair(study):
    found = studies.overlap_study(study, seed=0)
    sets, types = study.sets, study.types
    pair = found.pairs.iloc[0]
    assert pair["overlap"] == found.overlap[0, 1] == jaccard(sets[0], sets[1])
    assert pair["same_type"] == (types[0] == types[1])
    counts = found.counts()
    assert counts["all_features"] == len(set().union(*sets))
    assert counts["in_every_circuit"] == len(set.intersection(*sets))
    alone = [one for one in set().union(*sets) if len(
        {kind for some, kind in zip(sets, types, strict=True) if one in some}) == 1
        and sum(one in some for some in sets) > 1]
    assert counts["one_type_only"] == len(alone)
    apart = found._replace(pairs=found.pairs.assign(same_target=False))
    assert apart.tests()["pairs"].tolist() == ["all pairs", "pairs with the same target"]
    together = found._replace(pairs=found.pairs.assign(same_target=True))
    assert together.tests()["pairs"].tolist() == ["all pairs"]
    tests = found.tests()
    assert tests["n_within"][0] + tests["n_between"][0] == len(found.pairs)
