"""Figures show what they are given, and are the same on every run."""

import io
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import tiny_model, tiny_transcoders, tokens
from matplotlib.collections import PathCollection

from scfm_circuits.circuits.circuit import Node
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.search import strongest_features, trace_feature
from scfm_circuits.report.plots import circuits as plots
from scfm_circuits.report.plots.cells_and_training import (
    MOST_TYPES,
    cells_per_type,
    confusion_matrix,
)
from scfm_circuits.report.plots.features import l0_per_layer
from scfm_circuits.report.plots.sentence import MOST_GENES, ON_A_PHONE, call_sentence
from scfm_circuits.report.plots.style import narrow


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def drawn(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50, metadata={"Software": None})
    return buffer.getvalue()


def effects() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        [(kind, name) for kind in ("circuit", "same token", "same size")
         for name in ("ablation", "doubling", "alone") for _ in range(5)]
        + [("none", "alone")] * 5, columns=["features", "intervention"])
    measured = rng.normal(size=len(frame))
    return frame.assign(predicted=rng.normal(size=len(frame)), measured=measured,
                        lowest=measured - 0.1, highest=measured + 0.1)


def test_the_same_data_gives_the_same_picture_whatever_the_global_generator():
    first = drawn(plots.faithfulness(effects()))
    np.random.rand(7)  # moves the global generator
    assert drawn(plots.faithfulness(effects())) == first


def test_labels_of_a_sum_have_a_minus_sign_and_stand_within_their_frame():
    figure = plots.contribution_kinds({
        "attention to genes": 6.117, "attention to other tokens": -0.018, "biases": -0.548})
    (axis,) = figure.axes
    assert {one.get_text() for one in axis.texts} == {"6.117", "−0.018",
                                                      "−0.548"}
    for change in (lambda one: True, narrow):  # as it is, and as a phone has it
        assert change(figure)
        figure.draw_without_rendering()
        frame = axis.get_window_extent()
        for one in axis.texts:
            box = one.get_window_extent()
            assert frame.x0 < box.x0 and box.x1 < frame.x1


def test_every_circuit_node_that_is_drawn_has_a_place_and_the_target_is_among_them(monkeypatch):
    model = tiny_model()
    run = freeze(model, tiny_transcoders(model), tokens(7))
    target = strongest_features(run, 2, 6, 1)[0]
    circuit = trace_feature(run, 2, target, 6, branches=6, depth=3, max_nodes=40)
    texts, genes = [f"t{i}" for i in range(7)], ["A", None, "$B$", None, None, None, None]
    few = plots.circuit_picture(circuit, texts, genes, 3, max_edges=5)
    many = plots.circuit_picture(circuit, texts, genes, 3, max_edges=500)

    def lines(figure):
        return sum(len(line.get_xdata()) == 2 for line in figure.axes[0].lines)

    def marks(figure):
        return sum(len(points.get_offsets()) for points in figure.axes[0].collections)

    assert lines(few) == 5 and lines(many) == len(circuit.edges)  # at one token there is room
    monkeypatch.setattr(plots, "_SIDE_BY_SIDE", 1)
    few = plots.circuit_picture(circuit, texts, genes, 3, max_edges=5)
    many = plots.circuit_picture(circuit, texts, genes, 3, max_edges=500)
    # Nodes of one kind, layer and token are one supernode now, and so are edges between two.
    place = {node.id: (node.kind, node.layer, node.source) for node in circuit.nodes.values()}
    merged = {(place[edge.source], place[edge.target], edge.weight > 0) for edge in circuit.edges}
    assert 0 < lines(few) <= lines(many) == len(merged) < len(circuit.edges)
    assert marks(many) == len(set(place.values())) < len(place)
    largest = max(Counter(place.values()).items(), key=lambda pair: pair[1])
    assert f"×{largest[1]}" in [text.get_text() for text in many.axes[0].texts]
    drawn(many)  # a dollar sign in a gene is not mathematics


def test_a_name_stands_above_its_own_node():
    model = tiny_model()
    run = freeze(model, tiny_transcoders(model), tokens(7))
    target = strongest_features(run, 2, 6, 1)[0]
    circuit = trace_feature(run, 2, target, 6, branches=6, depth=3, max_nodes=40)
    figure = plots.circuit_picture(circuit, [f"t{i}" for i in range(7)], [None] * 7, 3)
    (axis,) = figure.axes
    assert len(axis.texts) > 1
    for change in (lambda one: True, narrow):  # as it is, and as a phone has it
        assert change(figure)
        figure.draw_without_rendering()
        for text in axis.texts:
            box, (x, y) = text.get_window_extent(), axis.transData.transform(text.xy)
            assert box.x0 < x < box.x1 and y < box.y0


def test_a_name_in_an_outer_column_stands_within_the_frame():
    figure, axis = plt.subplots(figsize=(3.6, 4))
    axis.set(xlim=(-0.6, 11.6), ylim=(0, 4))
    node = Node.of_feature(11, 8191, 0, 1.0)
    ends = [([node], where) for where in ((0.0, 1), (5.0, 2), (11.0, 3))]
    plots._write_names(axis, ends, [1.0] * 3, 12, (0.2, 1.0))
    figure.draw_without_rendering()
    frame = axis.get_window_extent()
    assert len(axis.texts) == 3
    for box in (text.get_window_extent() for text in axis.texts):
        assert frame.x0 < box.x0 and box.x1 < frame.x1


def test_nodes_stand_side_by_side_where_there_is_room():
    nodes = [Node.of_feature(0, feature, 3, 1.0) for feature in range(5)]
    placed, positions = plots._supernodes(nodes, 2)
    assert positions == [3] and [len(members) for members, _ in placed] == [1] * 5
    assert len({where for _, where in placed}) == 5
    apart = [*nodes, *(Node.of_feature(1, 7, position, 1.0) for position in range(9))]
    assert sorted(len(members) for members, _ in plots._supernodes(apart, 2)[0]) == [1] * 9 + [5]


def test_a_layer_axis_of_24_layers_is_not_crowded():
    figure = l0_per_layer(np.arange(24.0), np.ones((24, 3)))
    assert len(figure.axes[0].get_xticks()) == 12


def test_held_out_and_training_cells_add_up():
    labels = np.array(["a", "a", "b", "a"])
    figure = cells_per_type(labels, np.array([True, False, False, False]))
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert sorted(widths) == [0, 1, 1, 2]


@pytest.mark.parametrize("types", [4, 30])
def test_a_confusion_matrix_shows_every_cell_of_the_types_that_it_shows(types):
    """Names are strangers' texts: a dollar sign starts no formula. Few fit on a phone's screen."""
    rng = np.random.default_rng(0)
    names = ["other", *(f"${kind}_{{ cell $ \\frac{'x' * 40}" for kind in range(types - 1))]
    counts = pd.DataFrame(rng.integers(0, 9, (types, types)), names, names)
    counts["other words"] = rng.integers(0, 3, types)
    figure = confusion_matrix(counts)
    axis, = figure.axes
    most = counts.sum(axis=1).sort_values(ascending=False).iloc[:MOST_TYPES]
    numbers = sum(int(text.get_text()) for text in axis.texts)
    assert numbers == most.sum() and len(axis.get_yticklabels()) == min(types, MOST_TYPES)
    assert axis.get_xticklabels()[-1].get_text() == "other"
    assert figure.get_figwidth() <= 6 and min(text.get_fontsize() for text in [
        *axis.texts, *axis.get_xticklabels(), *axis.get_yticklabels()]) >= 8
    assert len(drawn(figure)) > 1000


def test_every_cell_is_drawn_once_for_every_intervention():
    figure = plots.faithfulness(effects())
    left, right = ([len(points.get_offsets()) for points in axis.collections
                    if isinstance(points, PathCollection)]
                   for axis in figure.axes)
    assert sorted(left) == [0] * 4 + [5] * 3  # the empty ones are the legend's
    assert sum(right) == 3 * 3 * 5 + 5


def test_predictions_of_circuits_and_of_single_features_stand_on_one_line():
    frame = effects()
    figure = plots.predictions(frame, frame.iloc[:9])
    counts = [[len(points.get_offsets()) for points in axis.collections] for axis in figure.axes]
    assert counts == [[5, 5], [4, 5]]
    for axis in figure.axes:
        line = axis.lines[0]
        assert np.array_equal(line.get_xdata(), line.get_ydata())


def flow() -> pd.DataFrame:
    one = pd.DataFrame({"kind": ["attention", "features", "features", "errors", "embedding",
                                 "biases"],
                        "layer": [0, 0, 1, 1, -1, -1], "share": [0.3, 0.2, 0.1, 0.1, 0.1, 0.2],
                        "passing": [0.5, 0.2, 0.1, 0.0, 0.4, 0.0]})
    return pd.concat([one.assign(cell="a"), one.assign(cell="b", share=one["share"][::-1].values)])


def test_the_bars_of_the_flow_add_up_to_the_whole():
    direct, passing = plots.circuit_flow(flow()).axes
    assert sum(bar.get_height() for bar in direct.patches) == pytest.approx(100)
    assert sum(bar.get_height() for bar in passing.patches) == pytest.approx(120)
    assert [tick.get_text() for tick in direct.get_xticklabels()] == [
        "embedding", "biases", "0", "1"]
    assert [tick.get_text() for tick in passing.get_xticklabels()] == ["embedding", "0", "1"]


def test_the_overlap_map_boxes_the_pairs_of_a_type():
    overlap = np.random.default_rng(0).random((5, 5))
    figure = plots.circuit_overlap(overlap, ["$A$", "$A$", "B", "B", "B"])
    axis = figure.axes[0]
    assert [box.get_width() for box in axis.patches] == [2, 3]
    assert np.isnan(axis.images[0].get_array().filled(np.nan).diagonal()).all()
    drawn(figure)
    drawn(plots.circuit_overlap(np.ones((1, 1)), ["alone"]))


def test_known_genes_stand_in_the_row_that_names_their_way():
    ways = ["measured", "paths", "attention"]
    summary = pd.DataFrame({"by": ways, "what": ways, "median_rank": [1.0, 20.0, 300.0],
                            "null_low": 5.0, "null_high": 50.0, "of": 400})
    genes = pd.DataFrame({"by": np.repeat(ways, 2), "rank": [1.0, 1, 20, 20, 300, 300]})
    axis = plots.known_ranks(genes, summary, ["paths"], ["measured"]).axes[0]
    names = dict(zip(axis.get_yticks(), [one.get_text() for one in axis.get_yticklabels()],
                     strict=True))
    points = [one for one in axis.collections if isinstance(one, PathCollection)]
    found = {(names[y], x) for one in points for x, y in one.get_offsets().tolist()}
    assert found == {("measured", 1), ("paths", 20), ("attention", 300)}
    # The first way is on top.
    assert [names[place] for place in sorted(names, reverse=True)] == ways


@pytest.mark.parametrize("columns", [5, ON_A_PHONE])
def test_what_a_sentence_leaves_out_stands_clear_of_its_legend(columns: int) -> None:
    genes = [f"GENE{i}" for i in range(MOST_GENES + 39)]
    figure = call_sentence(genes, {"GENE0": 1.0}, "B cell", columns=columns)
    figure.canvas.draw()
    legend, rest = ([text.get_window_extent() for text in figure.axes[0].texts
                     if text.get_text().startswith(begins)] for begins in ("speaks", "39 more"))
    assert len(legend) == 2 and len(rest) == 1
    assert not any(rest[0].overlaps(one) for one in legend)


@pytest.mark.parametrize("types", [1, 2, 12])
def test_the_legend_of_cells_covers_no_bar(types: int) -> None:
    labels = np.repeat([f"type {i}" for i in range(types)], 10)
    figure = cells_per_type(labels, np.arange(len(labels)) % 5 == 0)
    figure.canvas.draw()
    [legend] = figure.legends
    assert not legend.get_window_extent().overlaps(figure.axes[0].get_window_extent())
    assert figure.axes[0].get_window_extent().height > 20 * types
