"""Calls by a cell's state: read in the model, in the linear view, without genes, on a page."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_transcoders
from three_types import TYPES, gene_corpus, gene_model

from scfm_circuits.circuits import attribution, knock_out
from scfm_circuits.circuits import direct_effects as direct
from scfm_circuits.circuits.attribution import closure, contributions, one_by_one
from scfm_circuits.circuits.calls import StateCalls, calls_of, trace_call
from scfm_circuits.circuits.case_study import case_study
from scfm_circuits.circuits.circuit import node_table
from scfm_circuits.circuits.direct_effects import all_paths, direct_effects, sources_of
from scfm_circuits.circuits.exports import Output, neuronpedia_graph
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.graph import Target, attribution_graph
from scfm_circuits.circuits.task_circuit import output_gradients, task_circuit
from scfm_circuits.models.mlp_sites import decoder_layers
from scfm_circuits.models.states import embeddings, find_states

OPTIONS = {"circuit_branches": 40, "circuit_depth": 3, "circuit_nodes": 120}


@pytest.fixture(scope="module", params=["maxtoki", "geneformer_v2", "geneformer_v1"])
def parts(request, tmp_path_factory) -> Any:
    """The calls of a tiny model of gene tokens, and transcoders of it."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCFM_RESULTS", str(folder / "results"))
        profile, corpus = gene_corpus(folder, request.param, **OPTIONS)
        model = gene_model(request.param, corpus)
        yield calls_of(model, corpus, profile), tiny_transcoders(model)


@pytest.fixture(scope="module")
def case(parts) -> Any:
    """A cell, its prompt, call and run."""
    calls, transcoders = parts
    cell = int(np.flatnonzero(calls.corpus.held_out)[1])
    prompt = calls.prompt(cell)
    call = calls.call(prompt, str(calls.corpus.labels[cell]))
    return cell, prompt, call, freeze(calls.model, transcoders, prompt.encoded.tokens)


def state_call(calls: Any, tokens: np.ndarray, genes: np.ndarray, label: str) -> float:
    """The call of a text, from transformers' hidden states and plain means."""
    states = find_states(calls.model, calls.corpus, 3)
    own = states.types == label
    to, away = states.places[own][0], states.places[~own].mean(axis=0)
    with torch.no_grad():
        last = calls.model(input_ids=torch.as_tensor(tokens)[None], output_hidden_states=True
                           ).hidden_states[-1][0]
    point = last[torch.as_tensor(genes)].mean(dim=0).numpy()
    # Where the foot of the point's perpendicular lies on the line, from -1 to 1.
    along = (point - (to + away) / 2) @ (to - away) / np.linalg.norm(to - away)
    return float(along / (np.linalg.norm(to - away) / 2))


def test_a_call_is_where_the_cell_lies_on_the_line_between_types(parts, case):
    calls, _ = parts
    cell, prompt, call, frozen = case
    wanted = state_call(calls, prompt.encoded.tokens, prompt.encoded.gene >= 0,
                        str(calls.corpus.labels[cell]))
    _, reading = call.start(frozen)
    assert isinstance(calls, StateCalls)
    assert float(reading.value) == pytest.approx(wanted, abs=1e-6)
    assert calls.sureness(np.array([cell]))[0] == pytest.approx(wanted, abs=1e-6)
    assert calls.own_calls(np.array([cell]))[0].places == call.places
    found = embeddings(calls.model, calls.corpus, np.array([cell]), 1)
    assert calls.said(np.array([cell])) == calls.states.nearest(found)


def test_a_call_is_the_sum_of_what_was_written(parts, case):
    """Hop by hop, through all paths, and on a page by gene; to the last digits of float64."""
    calls, _ = parts
    _, prompt, call, frozen = case
    _, reading = call.start(frozen)
    value = float(reading.value)
    parts_of = [contributions(frozen, one) for one in one_by_one(reading)]
    assert float(sum(one.total() for one in parts_of)) == pytest.approx(value, abs=1e-10)
    assert closure(frozen, reading) < 1e-10
    sources = sources_of(frozen, [reading])
    effects, constant = direct_effects(frozen, sources, [reading])
    assert float(effects.sum() + constant.sum()) == pytest.approx(value, abs=1e-10)
    table = calls.by_gene(frozen, call, prompt.genes)
    assert set(table["gene"]) == {gene for gene in prompt.genes if gene}
    assert table["contribution"].is_monotonic_decreasing
    kinds = [name for name in table if name not in ("gene", "contribution")]
    assert kinds == ["identity", *(["rank"] if not frozen.causal else []), "features", "errors"]
    np.testing.assert_allclose(table[kinds].sum(axis=1), table["contribution"], atol=1e-12)
    sums = calls.sums(frozen, call, table)
    assert sum(sums.values()) == pytest.approx(value, abs=1e-10)
    assert calls.parts(sums).startswith(f"{table['identity'].sum():.2g} come from which genes")


def test_a_call_is_split_in_one_sweep_and_a_few_tokens_at_a_time(parts, case, monkeypatch):
    """A pull for each gene would hold genes x tokens x width, which no machine has for a cell of
    thousands of genes; the circuit is the same however few tokens are looked at together."""
    calls, _ = parts
    _, prompt, call, frozen = case
    whole, pulls = trace_call(frozen, call, calls.profile), []
    real = direct._pull_through_attention
    monkeypatch.setattr(direct, "_pull_through_attention", lambda frozen, layer, pull, constant: (
        pulls.append(len(pull)), real(frozen, layer, pull, constant)))
    calls.sums(frozen, call, calls.by_gene(frozen, call, prompt.genes))
    assert set(pulls) == {1}
    monkeypatch.setattr(attribution, "AT_ONCE", 2)
    assert len([*attribution.in_parts(call.start(frozen)[1])]) == (len(call.places) + 1) // 2
    again = trace_call(frozen, call, calls.profile)
    assert [*again.nodes] == [*whole.nodes]
    np.testing.assert_allclose([edge.weight for edge in again.edges],
                               [edge.weight for edge in whole.edges], atol=1e-12)


def test_the_circuit_of_a_call_closes_and_tells_identity_from_rank(parts, case):
    calls, _ = parts
    cell, prompt, call, frozen = case
    circuit = trace_call(frozen, call, calls.profile)
    assert circuit.closure_max_relative < 1e-10
    first = circuit.expansions[circuit.target]
    assert len(circuit.expansions) > 3 and abs(first.residual) < 1e-10
    assert {circuit.nodes[edge.source].position for edge in circuit.edges
            if edge.target == circuit.target} <= {*call.places}
    table = node_table(circuit, prompt.texts, prompt.genes)
    assert ("rank" in set(table["kind"])) == (not frozen.causal)
    assert "embedding" in set(table["kind"])
    output = {circuit.target: Output(str(calls.corpus.labels[cell]),
                                     calls.probability(frozen, call))}
    graph = neuronpedia_graph(circuit, prompt.texts, slug="a", scan="b", outputs=output)
    assert len({one["node_id"] for one in graph["nodes"]}) == len(graph["nodes"])
    assert [one for one in graph["nodes"] if one.get("is_target_logit")]
    whole = attribution_graph(frozen, [Target(*call.start(frozen), 1.0)], max_features=50)
    assert whole.closure_max_relative < 1e-10
    per_token = 1 if frozen.causal else 2
    last = max(call.places) + 1 if frozen.causal else len(frozen.tokens)
    assert whole.of_kind("embedding").sum() == per_token * last


def test_a_gene_taken_out_is_gone_from_the_text_and_those_behind_it_move_up(parts, case):
    calls, _ = parts
    cell, prompt, _, _ = case
    label, tokens = str(calls.corpus.labels[cell]), prompt.encoded.tokens
    of_gene = prompt.encoded.gene >= 0
    whole = state_call(calls, tokens, of_gene, label)
    wanted = [whole - state_call(calls, np.delete(tokens, at), np.delete(of_gene, at), label)
              for at in np.flatnonzero(of_gene)]
    assert knock_out.knock_outs(
        calls.model, calls.corpus, calls.profile, cell) == pytest.approx(wanted, abs=1e-5)
    assert np.ptp(wanted) > 1e-3


def test_the_scores_of_genes_are_the_models_own_where_they_claim_it(parts, case):
    """Input times gradient against finite differences of the embeddings; all that is written adds
    up with what stands beside the genes."""
    calls, _ = parts
    cell, prompt, call, frozen = case
    circuit = trace_call(frozen, call, calls.profile)
    scores = knock_out.gene_scores(calls.model, frozen, prompt, call, circuit,
                                   calls.corpus.gene_ids_of(cell))
    table = calls.by_gene(frozen, call, prompt.genes).set_index("gene")["contribution"]
    names = calls.corpus.genes_of(cell)
    np.testing.assert_allclose(scores["written"], table[names], atol=1e-10)
    _, reading = call.start(frozen)
    at = [np.flatnonzero(prompt.encoded.gene == gene)[0] for gene in calls.corpus.gene_ids_of(cell)]
    np.testing.assert_allclose(scores["paths"], all_paths(frozen, reading)[at], atol=1e-12)
    embedded = calls.model.get_input_embeddings()(frozen.tokens)

    def read(size: float, place: int) -> float:
        moved = embedded.clone()
        moved[place] *= 1 + size
        with torch.no_grad():
            hidden = calls.model.base_model(inputs_embeds=moved[None]).last_hidden_state
        mask = torch.zeros(1, len(moved), dtype=torch.bool)
        mask[0, call.places] = True
        return float(call.read(calls.model, hidden, mask))

    step = 1e-3
    slopes = [(read(step, place) - read(-step, place)) / (2 * step) for place in at]
    np.testing.assert_allclose(scores["input_x_gradient"], slopes, rtol=2e-2, atol=1e-3)


def test_gradients_in_mlp_outputs_are_those_of_the_model(parts, case):
    calls, transcoders = parts
    _, _, call, frozen = case
    gradients = output_gradients(calls.model, frozen.tokens, call)
    assert gradients.shape == (2, len(frozen.tokens), transcoders.d_model)
    direction, place = torch.arange(transcoders.d_model, dtype=torch.float64) / 16, call.places[1]
    mlp = decoder_layers(calls.model)[0]
    mlp = mlp.mlp if hasattr(mlp, "mlp") else mlp.output.dense

    def read(size: float) -> float:
        def hook(module, args, output):
            output = output.clone()
            output[0, place] += size * direction
            return output

        handle = mlp.register_forward_hook(hook)
        try:
            with torch.no_grad():
                hidden = calls.model.base_model(input_ids=frozen.tokens[None]).last_hidden_state
        finally:
            handle.remove()
        mask = torch.zeros(1, len(frozen.tokens), dtype=torch.bool)
        mask[0, call.places] = True
        return float(call.read(calls.model, hidden, mask))

    step = 3e-3
    slope = (read(step) - read(-step)) / (2 * step)
    assert float(gradients[0, place] @ direction) == pytest.approx(slope, rel=1e-2, abs=1e-4)


def test_studies_of_several_cells_run_on_states(parts):
    """The case, knock-outs of cells of each type, and one circuit for the task."""
    calls, transcoders = parts
    given = calls.model, transcoders, calls.corpus, calls.profile
    study = case_study(calls)
    assert study.truth == "beta" and ("nearest" in study.origin or "median" in study.origin)
    found = knock_out.knock_out_study(*given, most=3)
    assert set(found.kept["cell_type"]) == set(TYPES)
    numbers = knock_out.numbers(found, 0)
    assert np.isfinite(found.summary["spearman"]).all() and numbers["cells"] == 3
    task = task_circuit(*given)
    original = calls.said(task.cells) == calls.corpus.labels[task.cells]
    assert task.right[0].tolist() == original.tolist()
    np.testing.assert_allclose(task.contrast[0], calls.sureness(task.cells), atol=1e-6)


def test_cells_of_a_type_without_training_cells_are_not_called(parts):
    calls, _ = parts
    corpus = calls.corpus
    cells = np.flatnonzero(corpus.held_out)
    assert calls.callable(cells).tolist() == cells.tolist()
    other = StateCalls.__new__(StateCalls)
    other.corpus, other.states = corpus, calls.states._replace(
        types=calls.states.types[:2], places=calls.states.places[:2])
    assert set(corpus.labels[other.callable(cells)]) == set(TYPES[:2])
    other.states = calls.states._replace(types=calls.states.types[:1],
                                         places=calls.states.places[:1])
    assert len(other.callable(cells)) == 0


def test_a_gene_is_asked_where_the_model_predicts_it(parts, case):
    """Its log-odds are those of transformers' logits, its circuit closes, and the rule takes the
    first marker."""
    calls, transcoders = parts
    _, prompt, _, frozen = case
    names = [gene for gene in prompt.genes if gene]
    found = calls.gene_call(prompt, {names[2], names[4]})
    at = prompt.genes.index(names[2])
    assert found is not None and found.gene == names[2]
    first = calls.gene_call(prompt, set())
    assert first is not None and first.gene == names[int(frozen.causal)]
    ids = torch.as_tensor(prompt.encoded.tokens).clone()
    token = int(ids[at])
    if not frozen.causal:
        ids[at] = calls.corpus.tokenizer.convert_tokens_to_ids("<mask>")
        assert found.prompt.genes[at] is None and found.prompt.texts[at] == "<mask>"
    assert found.prompt.encoded.tokens.tolist() == ids.tolist()
    with torch.no_grad():
        logits = calls.model(input_ids=ids[None]).logits[0, at - 1 if frozen.causal else at]
    others = [one for one in np.unique(calls.corpus.tokens[calls.corpus.gene >= 0]) if one != token]
    wanted = float(logits[token] - logits[others].logsumexp(0))
    run = freeze(calls.model, transcoders, found.prompt.encoded.tokens)
    _, reading = found.call.start(run)
    assert float(reading.value) == pytest.approx(wanted, abs=1e-9)
    assert trace_call(run, found.call, calls.profile).closure_max_relative < 1e-10
    hidden = calls.model.base_model(input_ids=ids[None]).last_hidden_state
    mask = torch.zeros(1, len(ids), dtype=torch.bool)
    mask[0, found.call.places] = True
    assert float(found.call.read(calls.model, hidden, mask)) == pytest.approx(wanted, abs=1e-9)
