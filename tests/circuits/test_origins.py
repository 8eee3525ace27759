"""Parts of a guessed gene and of a state direction: they close, and each is what it is called."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gene_tokens import gene_corpus
from helpers import tiny_transcoders
from tiny_architectures import tiny

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.circuits import origins as module
from scfm_circuits.circuits.attribution import added_up, stream_direction, through_attention
from scfm_circuits.circuits.direct_effects import whole_sums
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.origins import (
    EVERY,
    GENE,
    PARTS,
    STATE,
    SUM,
    Origins,
    frequent_types,
    origins,
    origins_table,
    type_directions,
)
from scfm_circuits.models.mlp_sites import masked_genes

FAMILIES = {"maxtoki": "llama", "geneformer_v2": "bert"}


@pytest.fixture(autouse=True)
def _results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCFM_RESULTS", str(tmp_path / "results"))


def built(folder: Path, encoding: str, **options: Any) -> tuple[Corpus, Any, Any]:
    _, corpus = gene_corpus(folder, encoding, n=12)
    model = tiny(FAMILIES[encoding], vocabulary=len(corpus.tokenizer), **options)
    return corpus, model, tiny_transcoders(model)


def read(model: Any, corpus: Corpus, cell: int, direction: torch.Tensor) -> tuple[float, float]:
    """What the model itself gives, cell by cell: the mean logit of the right genes less the mean
    logit, and the mean embedding of the genes along a direction."""
    ids = torch.from_numpy(corpus.tokens[cell][corpus.mask[cell]])[None]
    chosen = np.flatnonzero(masked_genes(corpus, [cell], 0)[0])
    shown = ids.clone()
    shift = int(model.config.model_type == "llama")
    if not shift:
        shown[0, chosen] = 1
    logits = model(input_ids=shown).logits[0]
    gene = np.mean([float(logits[i - shift, ids[0, i]] - logits[i - shift].mean())
                    for i in chosen])
    stream = model(input_ids=ids, output_hidden_states=True).hidden_states[-2][0]
    inside = corpus.gene[cell][corpus.mask[cell]] >= 0
    return gene, float(stream[torch.from_numpy(inside)].mean(dim=0) @ direction)


@pytest.mark.parametrize("encoding", FAMILIES)
def test_parts_sum_to_what_the_model_gives(tmp_path, encoding):
    corpus, model, transcoders = built(tmp_path, encoding)
    cells, types = np.arange(12), ("a", "b")
    found = origins(model, transcoders, corpus, cells, types, 0, 5)
    assert found.closure < 1e-10
    assert found.genes.shape == (len(PARTS), 12) and found.states.shape == (2, len(PARTS), 12)
    ranks = [PARTS.index("own rank"), PARTS.index("other genes' ranks")]
    assert np.isnan(found.genes[ranks]).all() == (encoding == "maxtoki")
    directions = type_directions(model, corpus, types, 5)
    assert torch.allclose(directions.norm(dim=-1), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(directions[0], -directions[1])
    for cell in cells:
        gene, state = read(model, corpus, cell, directions[0])
        assert np.nansum(found.genes[:, cell]) == pytest.approx(gene, abs=1e-10)
        assert np.nansum(found.states[0, :, cell]) == pytest.approx(state, abs=1e-10)


def test_without_attention_nothing_comes_from_other_genes(tmp_path):
    """And the position embedding of an encoder, once zero, gives nothing."""
    corpus, model, transcoders = built(tmp_path, "geneformer_v2")
    for layer in model.bert.encoder.layer:
        layer.attention.self.value.weight.zero_()
    found = origins(model, transcoders, corpus, np.arange(4), ("a",), 0, 5)
    through = [i for i, name in enumerate(PARTS) if name.startswith(("other", "special"))]
    assert len(through) == 4 and np.abs(found.genes[through]).max() < 1e-12
    assert np.abs(found.genes[PARTS.index("own rank")]).min() > 1e-4
    model.bert.embeddings.position_embeddings.weight.zero_()
    again = origins(model, transcoders, corpus, np.arange(4), ("a",), 0, 5)
    assert np.abs(again.genes[PARTS.index("own rank")]).max() == 0
    assert np.abs(again.states[:, PARTS.index("own rank")]).max() == 0


@pytest.mark.parametrize("encoding", FAMILIES)
def test_own_is_what_never_left_its_token(tmp_path, encoding):
    """A token's embedding alone, sent up through the frozen layers: what attention carries to other
    tokens is dropped on the way, what it carries to the token itself is kept."""
    corpus, model, transcoders = built(tmp_path, encoding)
    tokens = torch.from_numpy(corpus.tokens[0][corpus.mask[0]])
    run = freeze(model, transcoders, tokens)
    layer, vector = len(run.weights) - 1, torch.randn(run.residual.shape[-1], dtype=torch.float64)
    kept = 0.0
    for place in (at := [1, 3]):
        change = torch.zeros_like(run.leaves[0])
        change[place] = run.leaves[0][place]
        if run.entry is not None:
            change = run.entry.onward(change)
        for one in range(layer):
            back = torch.zeros_like(change)
            back[place] = through_attention(run, one, change)[place]
            change = run.across(run.end[one], run.across(run.middle[one], change + back))
        kept += float(change[place] @ vector)
    reading = added_up([stream_direction(run, vector, place, layer) for place in at])
    [own], [whole] = (whole_sums(one, [reading]) for one in (module.staying(run), run))
    assert float(own.leaves[0].sum()) == pytest.approx(kept, abs=1e-10)
    assert abs(float(whole.leaves[0].sum()) - kept) > 1e-6
    assert set(own.leaves[0].nonzero()[:, 0].tolist()) == set(at)


def test_features_that_write_nothing_have_no_part(tmp_path):
    corpus, model, transcoders = built(tmp_path, "maxtoki")
    transcoders.W_dec.zero_()
    found = origins(model, transcoders, corpus, np.arange(4), ("a",), 0, 5)
    features = [i for i, name in enumerate(PARTS) if "features" in name]
    assert len(features) == 2 and np.abs(found.genes[features]).max() < 1e-12
    assert np.abs(found.genes[PARTS.index("errors")]).min() > 1e-6 and found.closure < 1e-10


def made(n: int = 30, seed: int = 0) -> tuple[Origins, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.array(["a", "b", "c"])[rng.integers(0, 3, n)]
    genes = rng.normal(1, 0.1, (len(PARTS), n))
    genes[1] = np.nan
    states = rng.normal(0, 0.1, (2, len(PARTS), n))
    states[0] += 3 * (labels == "a")
    return Origins(genes, states, ("a", "b"), 0.0), labels


def test_the_table_has_means_differences_and_shares_that_add_up():
    found, labels = made()
    table = origins_table(found, labels, 0)
    assert table.equals(origins_table(found, labels, 0))
    rows = table.set_index(["question", "cell_type", "part"])
    assert rows.loc[(GENE, EVERY, PARTS[0]), "contribution"] == pytest.approx(
        found.genes[0].mean())
    assert rows.loc[(GENE, "b", PARTS[2]), "cells"] == (labels == "b").sum()
    wanted = found.states[0, 3, labels == "a"].mean() - found.states[0, 3, labels != "a"].mean()
    assert rows.loc[(STATE, "a", PARTS[3]), "contribution"] == pytest.approx(wanted)
    assert rows.loc[(GENE, EVERY, PARTS[1])].drop("cells").isna().all()
    for key, part in table.groupby(["question", "cell_type"]):
        own = part[part["part"] != SUM]
        total = part.loc[part["part"] == SUM, "contribution"].iloc[0]
        assert own["contribution"].sum() == pytest.approx(total)
        if key == (STATE, "b"):  # a distance that could be zero has no shares
            assert part["share"].isna().all()
        else:
            assert own["share"].sum() == pytest.approx(1)
            told = part.dropna()
            assert (told["lower_95"] <= told["contribution"]).all()
            assert (told["share"] <= told["share_upper"]).all()


def test_what_is_the_same_in_every_cell_is_no_part_of_a_distance():
    found, labels = made()
    more = found._replace(states=found.states + 100)
    one, other = (origins_table(each, labels, 0).query("question == @STATE")
                  for each in (found, more))
    assert np.allclose(one["contribution"], other["contribution"], atol=1e-9)
    assert np.allclose(one["lower_95"], other["lower_95"], atol=1e-9)


def test_types_with_few_held_out_cells_have_no_rows_but_the_case(monkeypatch):
    monkeypatch.setattr(module, "LEAST", 3)
    labels = np.array(["x"] * 5 + ["y"] * 2 + ["z"] * 3 + ["w"])
    assert frequent_types(labels, "y") == ("x", "z", "y")
