"""Graphs: every row adds up, edges are gradients, scores are those of a dense matrix."""

import numpy as np
import pytest
import torch
from helpers import logit_targets, model_for, tiny_corpus, tiny_model, tiny_transcoders, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_architectures import FAMILIES, LinearModel, tiny

from scfm_circuits.circuits.frozen import Frozen, freeze
from scfm_circuits.circuits.graph import (
    AttributionGraph,
    Target,
    attribution_graph,
    feature_target,
)
from scfm_circuits.circuits.graph_scores import (
    completeness_score,
    cumulative_influence,
    effect_ends,
    graph_study,
    influence,
    prune,
    replacement_score,
)

N_POS, N_LAYERS = 7, 3
WHOLE = {"max_features": 10**6, "edges_per_row": 10**6}


def run(family: str, seed: int = 0, n_pos: int = N_POS, **options) -> tuple[Frozen, LinearModel]:
    """A frozen run and transformers' own forward pass, frozen there (its constants, by zeros)."""
    model = tiny(family, seed=seed, **options)
    transcoders = tiny_transcoders(model, seed=seed + 1)
    frozen = freeze(model, transcoders, tokens(n_pos, seed=seed))
    return frozen, LinearModel(tiny(family, seed=seed, **options), frozen)


def read_all(linear: LinearModel, frozen: Frozen, embeddings, written):
    """(n_layers, n_pos, n_features) pre-activations and (n_pos, vocabulary) logits less their mean,
    where the MLPs write `written` and what the decoder biases add."""
    t = frozen.transcoders
    read = linear(embeddings, written + t.b_dec[:, None])
    return t.pre_activations(read.mlp_in), read.logits - read.logits.mean(-1, keepdim=True)


def value_of(pre, logits, node):
    return (logits[node.position, node.index] if node.kind == "logit"
            else pre[node.layer, node.position, node.index])


def written_by(frozen: Frozen, node):
    """What a source puts into the embeddings and into the MLPs' outputs."""
    embeddings = torch.zeros_like(frozen.residual[0])
    written = torch.zeros_like(frozen.mlp_out)
    if node.kind == "embedding":
        embeddings[node.position] = frozen.residual[0, node.position]
    elif node.kind == "error":
        written[node.layer, node.position] = frozen.error[node.layer, node.position]
    else:
        z = frozen.pre[node.layer, node.position, node.index].relu()
        written[node.layer, node.position] = z * frozen.transcoders.W_dec[node.layer, node.index]
    return embeddings, written


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> tuple[Frozen, LinearModel]:
    return run(request.param)


@pytest.fixture(scope="module")
def frozen(case) -> Frozen:
    return case[0]


@pytest.fixture(scope="module")
def whole(frozen) -> AttributionGraph:
    return attribution_graph(frozen, logit_targets(frozen, N_POS - 1, most=3), **WHOLE)


# --- rows ----------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(family=st.sampled_from(FAMILIES), layers=st.integers(1, 4), n_pos=st.integers(1, 9),
       seed=st.integers(0, 1000), batch=st.integers(1, 40), data=st.data())
def test_every_row_adds_up(family, layers, n_pos, seed, batch, data):
    frozen, _ = run(family, seed, n_pos, layers=layers)
    if data.draw(st.booleans(), "logits"):
        targets = logit_targets(frozen, data.draw(st.integers(0, n_pos - 1)))
    else:
        places = data.draw(st.lists(st.tuples(
            st.integers(0, layers - 1), st.integers(0, 23), st.integers(0, n_pos - 1)),
            min_size=1, max_size=4, unique=True))
        targets = [feature_target(frozen, *place) for place in places]
    graph = attribution_graph(frozen, targets, **WHOLE, batch=batch)
    sums = graph.matrix.sum(axis=1) + graph.dropped + graph.constant
    assert np.abs(sums - graph.value).max() < 1e-10
    assert graph.closure_max_relative < 1e-10
    assert np.abs(graph.dropped_absolute).max() == 0
    rows = graph.of_kind("feature", "logit")
    assert (graph.value[~rows] == 0).all() and (graph.constant[~rows] == 0).all()
    names = [node.id for node in graph.nodes]
    assert len(set(names)) == len(names)
    assert {one.node.id for one in targets} == {
        node.id for node, weight in zip(graph.nodes, graph.weights, strict=True) if weight > 0}
    assert graph.weights.sum() == pytest.approx(1)


def test_the_constant_is_what_the_frozen_model_gives_for_nothing(case, whole):
    frozen, linear = case
    pre, logits = read_all(linear, frozen, torch.zeros_like(frozen.residual[0]),
                           torch.zeros_like(frozen.mlp_out))
    checked = 0
    for row in np.flatnonzero(whole.of_kind("feature", "logit")):
        assert abs(float(value_of(pre, logits, whole.nodes[row])) - whole.constant[row]) < 1e-10
        checked += abs(whole.constant[row]) > 1e-3
    assert checked > 10


def test_doubling_a_source_moves_every_node_by_its_edge(case, whole):
    """transformers' own forward pass is the oracle; nodes that have no edge do not move."""
    frozen, linear = case
    nothing = read_all(linear, frozen, torch.zeros_like(frozen.residual[0]),
                       torch.zeros_like(frozen.mlp_out))
    rng, dense = np.random.default_rng(0), whole.matrix.toarray()
    rows = np.flatnonzero(whole.of_kind("feature", "logit"))
    for kind in ("feature", "error", "embedding"):
        for column in rng.permutation(np.flatnonzero(whole.of_kind(kind)))[:12]:
            source = whole.nodes[column]
            moved = read_all(linear, frozen, *written_by(frozen, source))
            for row in rows:
                node = whole.nodes[row]
                change = value_of(*moved, node) - value_of(*nothing, node)
                assert abs(float(change) - dense[row, column]) < 1e-10


def test_edges_are_gradients(case, whole):
    frozen, linear = case
    written = (frozen.mlp_out - frozen.transcoders.b_dec[:, None]).requires_grad_()
    with torch.enable_grad():
        pre, logits = read_all(linear, frozen, frozen.residual[0], written)
    dense, rng = whole.matrix.toarray(), np.random.default_rng(1)
    columns = np.flatnonzero(whole.of_kind("feature", "error"))
    for row in rng.permutation(np.flatnonzero(whole.of_kind("feature", "logit")))[:8]:
        node = whole.nodes[row]
        value = value_of(pre, logits, node)
        assert float(value.detach()) == pytest.approx(whole.value[row], abs=1e-10)
        gradient, = torch.autograd.grad(value, written, retain_graph=True)
        for column in columns:
            at = whole.nodes[column]
            write = written_by(frozen, at)[1][at.layer, at.position]
            expected = float(gradient[at.layer, at.position] @ write)
            assert abs(expected - dense[row, column]) < 1e-10


def test_nothing_comes_from_the_same_or_a_later_layer_or_a_later_token(whole):
    edges = whole.matrix.tocoo()
    for target, source in zip(edges.row, edges.col, strict=True):
        assert whole.nodes[source].layer < whole.nodes[target].layer
        assert whole.nodes[source].position <= whole.nodes[target].position


def test_a_batch_gives_what_single_rows_give(frozen):
    targets = [feature_target(frozen, layer, feature, position) for layer, feature, position in
               ((2, 3, 6), (0, 1, 2), (1, 5, 4), (2, 0, 1))]
    together = attribution_graph(frozen, targets, max_features=0, edges_per_row=10**6)
    names = [node.id for node in together.nodes]
    for target in targets:
        alone = attribution_graph(frozen, [target], max_features=0, edges_per_row=10**6)
        row, single = names.index(target.node.id), int(alone.weights.argmax())
        assert alone.constant[single] == pytest.approx(together.constant[row], abs=1e-12)
        assert (alone.matrix[[single]].sum() + alone.dropped[single] ==
                pytest.approx(together.matrix[[row]].sum() + together.dropped[row], abs=1e-10))


def test_a_target_that_is_a_source_of_another_is_one_node(frozen):
    active = torch.nonzero(frozen.pre[0, :5] > 0)
    position, feature = (int(i) for i in active[0])
    lower = feature_target(frozen, 0, feature, position)
    graph = attribution_graph(frozen, [feature_target(frozen, 2, 3, 6), lower], **WHOLE)
    names = [node.id for node in graph.nodes]
    assert names.count(lower.node.id) == 1
    place = names.index(lower.node.id)
    assert graph.weights[place] == 0.5
    assert graph.matrix[:, [place]].nnz > 0 and graph.matrix[[place]].nnz > 0


def test_logit_targets_are_the_likeliest_tokens(frozen):
    probability = frozen.logits[4].softmax(-1)
    for share, most in ((0.5, 10), (0.999, 3), (0.0, 5)):
        targets = logit_targets(frozen, 4, share=share, most=most)
        weights = [one.weight for one in targets]
        order = probability.argsort(descending=True)[: len(targets)]
        assert [one.node.index for one in targets] == order.tolist()
        assert weights == pytest.approx(probability[order].tolist())
        assert len(targets) == most or sum(weights) >= share
        assert len(targets) == 1 or sum(weights[:-1]) < share


# --- bounded -------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [0, 1, 5, 30])
@pytest.mark.parametrize("edges", [1, 6, 10**6])
def test_what_is_not_kept_is_accounted_for(frozen, features, edges):
    targets = logit_targets(frozen, N_POS - 1, most=2)
    graph = attribution_graph(frozen, targets, max_features=features, edges_per_row=edges, batch=4)
    assert graph.of_kind("feature").sum() <= features
    if edges == 10**6:
        assert graph.of_kind("feature").sum() == features
    assert np.diff(graph.matrix.indptr).max() <= edges
    assert graph.closure_max_relative < 1e-10
    assert (np.abs(graph.dropped) <= graph.dropped_absolute + 1e-12).all()
    # The absolute sum of a row does not depend on what of it was kept.
    full = attribution_graph(frozen, targets, **WHOLE)
    absolute = dict(zip([node.id for node in full.nodes], full.absolute, strict=True))
    for node, size in zip(graph.nodes, graph.absolute, strict=True):
        assert size == pytest.approx(absolute[node.id])


def test_the_most_influential_features_get_a_row_first(frozen):
    """One at a time: each next feature is the one that the graph so far leads to most."""
    targets = [feature_target(frozen, 2, 3, N_POS - 1)]
    full = attribution_graph(frozen, targets, **WHOLE)
    share = np.abs(full.matrix.toarray())
    share /= np.maximum(share.sum(axis=1, keepdims=True), 1e-30)
    names = [node.id for node in full.nodes]
    row = names.index(targets[0].node.id)
    chosen: list[int] = []
    for _ in range(6):
        known = np.zeros_like(share)
        known[[row, *chosen]] = share[[row, *chosen]]
        reached = (np.linalg.inv(np.eye(len(names)) - known) - np.eye(len(names)))[row]
        reached[~full.of_kind("feature")] = 0
        reached[[row, *chosen]] = 0
        chosen.append(int(reached.argmax()))
        graph = attribution_graph(frozen, targets, max_features=len(chosen), batch=1)
        found = {node.id for node in graph.nodes if node.kind == "feature"}
        assert found == {names[row], *(names[i] for i in chosen)}


def test_a_real_sentence_in_float32():
    corpus = tiny_corpus()
    model = model_for(corpus, layers=3, dtype=torch.float32)
    ids = corpus.tokens[0][: corpus.answer_end[0] + 1]
    frozen = freeze(model, tiny_transcoders(model), ids)
    graph = attribution_graph(frozen, logit_targets(frozen, len(ids) - 1), max_features=50)
    assert graph.matrix.dtype == np.float32
    assert graph.closure_max_relative < 1e-5
    assert graph.n_active == int((frozen.pre > 0).sum())


# --- scores --------------------------------------------------------------------------------------


def dense_shares(graph: AttributionGraph) -> np.ndarray:
    size = np.abs(graph.matrix.toarray())
    return size / np.maximum(size.sum(axis=1, keepdims=True), 1e-10)


def dense_influence(shares: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """weights ((I - A_hat)^-1 - I), by inverse and not by iteration."""
    identity = np.eye(len(weights))
    return weights @ (np.linalg.inv(identity - shares) - identity)


@pytest.fixture(scope="module", params=[(10**6, 10**6), (40, 10**6), (60, 12)])
def graph(frozen, request) -> AttributionGraph:
    features, edges = request.param
    return attribution_graph(frozen, logit_targets(frozen, N_POS - 1, most=3),
                             max_features=features, edges_per_row=edges, batch=8)


def test_influence_is_that_of_the_inverse(graph):
    assert influence(graph) == pytest.approx(dense_influence(dense_shares(graph), graph.weights),
                                             abs=1e-12)


def test_scores_are_those_of_the_dense_matrix(graph):
    shares = dense_shares(graph)
    found = dense_influence(shares, graph.weights)
    token, error = (found[graph.of_kind(kind)].sum() for kind in ("embedding", "error"))
    assert replacement_score(graph) == pytest.approx(token / (token + error))
    output = found + graph.weights
    not_error = 1 - shares[:, graph.of_kind("error")].sum(axis=1)
    assert completeness_score(graph) == pytest.approx((not_error * output).sum() / output.sum())
    assert 0 < replacement_score(graph) < 1 and 0 < completeness_score(graph) < 1


def test_endings_leave_nothing_out(graph, whole):
    shares = effect_ends(graph)
    assert set(shares) == {"tokens", "errors", "constant", "dropped"}
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
    assert effect_ends(whole)["dropped"] == 0 and effect_ends(whole)["constant"] > 0
    # By absorbing states: a walk from the targets, upwards by absolute share, ends somewhere.
    size = np.abs(graph.matrix.toarray())
    total = size.sum(axis=1) + graph.dropped_absolute + np.abs(graph.constant)
    visits = graph.weights @ np.linalg.inv(
        np.eye(len(size)) - size / np.maximum(total, 1e-30)[:, None])
    assert shares["tokens"] == pytest.approx(visits[graph.of_kind("embedding")].sum())
    rows = total > 0
    assert shares["constant"] == pytest.approx(
        (visits[rows] * np.abs(graph.constant[rows]) / total[rows]).sum())


def test_without_errors_everything_is_replaced():
    """A transcoder that is exact leaves no error, and both scores are 1."""
    model = tiny_model()
    frozen = freeze(model, tiny_transcoders(model), tokens(N_POS))
    frozen = Frozen(**{**vars(frozen), "error": torch.zeros_like(frozen.error)})
    graph = attribution_graph(frozen, logit_targets(frozen, N_POS - 1), **WHOLE)
    assert not graph.of_kind("error").any()
    assert replacement_score(graph) == pytest.approx(1)
    assert completeness_score(graph) == pytest.approx(1)


def test_cumulative_influence_orders_nodes():
    assert cumulative_influence(np.array([1.0, 6.0, 0.0, 3.0])) == pytest.approx([1, 0.6, 1, 0.9])
    assert cumulative_influence(np.zeros(2)).tolist() == [1, 1]


# --- pruning -------------------------------------------------------------------------------------


def dense_prune(graph: AttributionGraph, node_share: float, edge_share: float
                ) -> tuple[set[str], set[tuple[str, str]]]:
    """Pruning written for dense matrices, step by step as in circuit-tracer's description."""
    def threshold(values: np.ndarray, share: float) -> float:
        ordered = np.sort(values.ravel())[::-1]
        reached = np.cumsum(ordered) / max(ordered.sum(), 1e-300)
        return ordered[min(int((reached < share).sum()), len(ordered) - 1)]

    dense, names = graph.matrix.toarray(), [node.id for node in graph.nodes]
    fixed = graph.of_kind("embedding") | (graph.weights > 0)
    found = dense_influence(dense_shares(graph), graph.weights)
    nodes = (found >= threshold(found, node_share)) | fixed
    inner = np.abs(dense) * np.outer(nodes, nodes)
    shares = inner / np.maximum(inner.sum(axis=1, keepdims=True), 1e-10)
    score = shares * (dense_influence(shares, graph.weights) + graph.weights)[:, None]
    edges = (score >= threshold(score, edge_share)) & (score > 0)
    for _ in range(len(nodes)):
        edges &= np.outer(nodes, nodes)
        nodes = nodes & (fixed | (edges.any(0) & (edges.any(1) | ~graph.of_kind("feature"))))
    return ({names[i] for i in np.flatnonzero(nodes)},
            {(names[s], names[t]) for t, s in zip(*np.nonzero(edges), strict=True)})


def edges_of(graph: AttributionGraph) -> dict[tuple[str, str], float]:
    edges = graph.matrix.tocoo()
    return {(graph.nodes[s].id, graph.nodes[t].id): float(weight)
            for t, s, weight in zip(edges.row, edges.col, edges.data, strict=True)}


@pytest.mark.parametrize("node_share, edge_share", [(0.8, 0.98), (0.5, 0.7), (0.99, 0.3), (0, 0)])
def test_pruning_is_that_of_the_dense_matrix(graph, node_share, edge_share):
    pruned = prune(graph, node_share, edge_share)
    nodes, edges = dense_prune(graph, node_share, edge_share)
    assert {node.id for node in pruned.nodes} == nodes
    assert set(edges_of(pruned)) == edges
    before = edges_of(graph)
    assert all(before[pair] == weight for pair, weight in edges_of(pruned).items())
    # Each row still adds up, with what was taken away in `dropped`.
    assert pruned.closure_max_relative < 1e-10
    assert (pruned.weights > 0).sum() == (graph.weights > 0).sum()
    assert pruned.of_kind("embedding").sum() == graph.of_kind("embedding").sum()


def test_pruning_nothing_keeps_all_that_leads_to_a_target(graph):
    pruned = prune(graph, 1.0, 1.0)
    weights = edges_of(pruned)
    lost = set(edges_of(graph)) - set(weights)
    assert len(lost) <= 0.02 * graph.n_edges  # rounding ends the cumulative sum early
    assert effect_ends(pruned)["dropped"] == pytest.approx(effect_ends(graph)["dropped"], abs=1e-6)


def test_pruning_a_graph_without_edges_keeps_targets_and_tokens(frozen):
    target = feature_target(frozen, 2, 3, 4)
    graph = attribution_graph(frozen, [target], max_features=0)
    empty = AttributionGraph(**{**vars(graph), "matrix": graph.matrix * 0,
                                "dropped": graph.value - graph.constant})
    pruned = prune(empty)
    assert {node.kind for node in pruned.nodes} == {"embedding", "feature"}
    assert pruned.n_edges == 0 and np.isnan(replacement_score(pruned))


def test_a_target_may_be_any_reading(frozen):
    """The mean over features is no node of the model, but a reading like any other."""
    one, two = (feature_target(frozen, 2, feature, 5) for feature in (1, 2))
    both = one.reading._replace(vector=(one.reading.vector + two.reading.vector) / 2,
                                constant=(one.reading.constant + two.reading.constant) / 2,
                                value=(one.reading.value + two.reading.value) / 2)
    target = Target(one.node._replace(id="mean", kind="logit"), both, 1.0)
    graph = attribution_graph(frozen, [target], **WHOLE)
    assert graph.closure_max_relative < 1e-10


def test_the_study_is_the_graph_pruned_and_counted():
    frozen, _ = run("gpt_neox")
    layer, position = N_LAYERS - 1, N_POS - 1
    start = [feature_target(frozen, layer, 3, position)]
    study = graph_study(frozen, start[0], max_features=20)
    whole = attribution_graph(frozen, start, max_features=20)
    assert study.whole.nodes == whole.nodes and study.ends == effect_ends(whole)
    table = study.table()
    assert table["edges"].tolist() == [whole.n_edges, prune(whole).n_edges]
    assert table["replacement_score"][0] == study.replacement == replacement_score(whole)
    assert table["completeness_score"][0] == study.completeness == completeness_score(whole)
    assert table.filter(like="ends_in_").sum(axis=1).to_numpy() == pytest.approx(1)
    kept = [node.id for node in study.pruned.nodes if node.kind == "feature"]
    counts = study.counts(greedy={kept[0], "elsewhere"})
    assert (counts["greedy_features"], counts["shared_features"]) == (2, 1)
    assert counts["pruned_features"] == len(kept) - 1 <= counts["rows"] <= 20
