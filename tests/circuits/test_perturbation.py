"""A changed cell is the cell encoded anew, and what is read of it is what others read."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from gene_tokens import GENES as TOKENS
from gene_tokens import counts, gene_corpus
from helpers import ranked, tiny_cells, tiny_corpus, tiny_profile
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_architectures import BERT_TYPE, FAMILIES, tiny

from scfm_circuits import InputError
from scfm_circuits.cells.dictionaries import read_gene_tokens
from scfm_circuits.cells.rank_value import as_ranks, encode_ranked
from scfm_circuits.cells.ranking import top_genes
from scfm_circuits.cells.tokens import encode_all, question
from scfm_circuits.circuits import perturbation
from scfm_circuits.circuits.perturbation import (
    along,
    changed,
    deletions,
    encoder_of,
    in_place,
    likeness,
    near,
    of_call,
    of_token,
    responses,
)
from scfm_circuits.common.encodings import RANK_VALUE

ENCODINGS = sorted(RANK_VALUE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("perturbation")


@pytest.fixture(scope="module", autouse=True)
def _results(folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCFM_RESULTS", str(folder / "results"))
        yield


@pytest.fixture(scope="module")
def coded(folder: Path) -> dict[str, Any]:
    """A profile and a corpus of made-up cells under each rank-value encoding."""
    found = {}
    for encoding in ENCODINGS:
        (folder / encoding).mkdir()
        found[encoding] = gene_corpus(folder / encoding, encoding)
    return found


# --- the text ------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(seed=st.integers(0, 50), cell=st.integers(0, 7), place=st.integers(0, 5),
       tokenizer=st.sampled_from(["train", "genes"]))
def test_a_sentence_without_a_gene_is_the_cell_encoded_without_it(seed, cell, place, tokenizer):
    corpus = tiny_corpus(8, seed, tokenizer=tokenizer, genes_per_cell=16)
    with pytest.MonkeyPatch.context() as patch:
        profile = tiny_profile(patch, Path("unused"), genes_per_cell=16)
    ids = corpus.gene_ids_of(cell)
    if len(ids) < 3:
        return
    gene = int(ids[place % len(ids)])
    cells = tiny_cells(8, seed=seed)
    cells.expression[cell, gene] = 0
    cells.expression.eliminate_zeros()
    answers = [profile.response.replace("{label}", label) for label in cells.labels]
    again = encode_all(corpus.tokenizer, question(profile), corpus.symbols,
                       ranked(cells, 16).ranking, answers)
    encoder = encoder_of(corpus, profile, cell)
    for genes in (ids, changed(ids, [gene], "delete", 16)):
        text = encoder.encode(genes)
        expected = corpus if len(genes) == len(ids) else again
        assert text.tokens.tolist() == expected.tokens[cell, : len(text.tokens)].tolist()
        assert text.gene.tolist() == expected.gene[cell, : len(text.tokens)].tolist()
        behind = int(expected.answer_start[cell]) - text.read
        assert behind == int(corpus.answer_start[cell]) - encoder.contrast.position


@settings(max_examples=25)
@given(cell=st.integers(0, 7), place=st.integers(0, 7), encoding=st.sampled_from(ENCODINGS))
def test_ranked_genes_without_one_are_the_cell_encoded_without_it(coded, cell, place, encoding):
    profile, corpus = coded[encoding]
    ids = corpus.gene_ids_of(cell)
    gene = int(ids[place % len(ids)])
    values = counts().astype(np.float32)
    values[1::2, 4:] = 0
    known = read_gene_tokens(profile)
    values[cell, gene] = 0
    medians = np.array([known.medians[one] for one in TOKENS])
    ranking = top_genes(as_ranks(sp.csr_matrix(values), medians), np.arange(8), 8, profile.seed)
    again = encode_ranked(encoding, known, [known.genes[one] for one in TOKENS], ranking)
    encode = encoder_of(corpus, profile, cell).encode
    for genes, expected in ((ids, corpus), (changed(ids, [gene], "delete", 8), again)):
        text = encode(genes)
        assert text.tokens.tolist() == expected.tokens[cell][expected.mask[cell]].tolist()
        assert text.gene.tolist() == expected.gene[cell][expected.mask[cell]].tolist()
        assert text.gene[text.read] == genes[-1]


def test_a_gene_comes_to_the_front_and_the_last_is_cut(coded):
    ids = np.array([5, 2, 7, 1])
    assert changed(ids, [7], "front", 4).tolist() == [7, 5, 2, 1]
    assert changed(ids, [1, 2, 1], "front", 4).tolist() == [1, 2, 5, 7]
    assert changed(ids, [9], "front", 4).tolist() == [9, 5, 2, 7]  # the cell had it not
    assert changed(ids, [9, 2], "delete", 3).tolist() == [5, 7, 1]
    assert [changed(ids, [gene], "front", 4).tolist() for gene in ids] == [
        [5, 2, 7, 1], [2, 5, 7, 1], [7, 5, 2, 1], [1, 5, 2, 7]]
    with pytest.raises(InputError, match="none of the genes"):
        changed(ids, [9], "delete", 4)
    with pytest.raises(InputError, match="delete fewer"):
        changed(ids, ids, "delete", 4)
    with pytest.raises(InputError, match="'Front'; use 'delete' or 'front'"):
        changed(ids, [9], "Front", 4)
    with pytest.raises(InputError, match=r"INS is no gene id; .*corpus\.symbols"):
        changed(ids, ["INS"], "delete", 4)
    profile, corpus = coded["geneformer_v2"]
    other = int(np.setdiff1d(corpus.gene_ids_of(0), corpus.gene_ids_of(1))[0])
    own = corpus.gene_ids_of(1)
    text = encoder_of(corpus, profile, 1).encode(changed(own, [other], "front", 8))
    assert corpus.tokenizer.convert_ids_to_tokens(text.tokens.tolist()) == [
        "<cls>", corpus.symbols[other], *corpus.symbols[own], "<eos>"]


def test_a_gene_that_no_cell_has_has_no_known_token(coded):
    profile, corpus = coded["geneformer_v1"]
    without = dataclasses.replace(corpus, gene=np.where(corpus.gene == 7, -1, corpus.gene))
    with pytest.raises(InputError, match=f"No cell has the gene {corpus.symbols[7]}"):
        encoder_of(without, profile, 1).encode(np.array([7]))


# --- positions -----------------------------------------------------------------------------------


def texts_for(family: str, seed: int) -> tuple[Any, Any, list[int]]:
    """A model of the family, a text of seven genes a token each between two others, its genes."""
    model = tiny(family, layers=2, seed=seed)
    rng = np.random.default_rng(seed)
    tokens = rng.permutation(np.arange(1, 40))[:9]
    gene = np.array([-1, *range(7), -1])
    return model, perturbation.Text(tokens, gene, 8), list(range(7))


@settings(max_examples=40)
@given(family=st.sampled_from([one for one in (*FAMILIES, *BERT_TYPE) if one != "mistral"]),
       seed=st.integers(0, 10_000), gone=st.sets(st.integers(0, 6), min_size=1, max_size=6))
def test_a_gene_gone_with_all_others_in_place_is_a_gene_that_nobody_looks_at(family, seed, gone):
    model, whole, _ = texts_for(family, seed)
    left = ~np.isin(whole.gene, list(gone))
    part = perturbation.Text(whole.tokens[left], whole.gene[left], int(left.sum()) - 1)
    held = in_place(whole, part)
    assert held.positions.tolist() == np.flatnonzero(left).tolist()
    # transformers' own way: the whole text, with no attention to these tokens.
    looked_at = torch.from_numpy(left)[None].long()
    logits = model(input_ids=torch.from_numpy(whole.tokens)[None], attention_mask=looked_at).logits
    expected = float(logits[0, 8, 3] - logits[0, 8].mean())
    # In one batch with another text, whose positions have no gap.
    both = responses(model, [held, whole], of_token(3), 2)
    assert both[0] == pytest.approx(expected, abs=1e-5)
    assert both[1] == pytest.approx(responses(model, [whole], of_token(3), 2)[0], abs=1e-5)


@pytest.mark.parametrize("cell", [0, 5, 7])
def test_own_part_and_position_part_are_the_effect(parts, monkeypatch, tmp_path, cell):
    model, _, corpus = parts
    profile = tiny_profile(monkeypatch, tmp_path)
    encoder, ids = encoder_of(corpus, profile, cell), corpus.gene_ids_of(cell)
    readout = of_call(encoder.contrast)
    effect, own = deletions(model, encoder, ids, readout, 3, split=True)
    plain, none = deletions(model, encoder, ids, readout, 4)
    assert effect == pytest.approx(plain, abs=1e-6) and np.isnan(none).all()
    whole = encoder.encode(ids)
    logits = []
    for place, gene in enumerate(ids[1:], start=1):  # the first is cut otherwise
        looked_at = torch.from_numpy(whole.gene != gene)[None].long()
        logits.append(model(input_ids=torch.from_numpy(whole.tokens)[None],
                            attention_mask=looked_at).logits[0, whole.read])
        before = model(input_ids=torch.from_numpy(whole.tokens)[None]).logits[0, whole.read]
        assert own[place] == pytest.approx(float(encoder.contrast.of(before)
                                                 - encoder.contrast.of(logits[-1])), abs=1e-5)
    # The last gene moves only the words behind it; in general, positions matter.
    assert np.abs(effect - own).max() > 1e-4


def test_the_first_gene_is_cut_otherwise_and_ends_where_it_did(monkeypatch, tmp_path):
    corpus, profile = tiny_corpus(24), tiny_profile(monkeypatch, tmp_path)
    encoder, ids = encoder_of(corpus, profile, 7), corpus.gene_ids_of(7)
    whole, part = encoder.encode(ids), encoder.encode(ids[1:])
    held = in_place(whole, part)
    for gene in ids[1:]:
        assert held.positions[part.gene == gene][-1] == np.flatnonzero(whole.gene == gene)[-1]
    assert held.positions[-1] == len(whole.tokens) - 1
    assert (np.diff(held.positions) > 0).all()


# --- Geneformer's -------------------------------------------------------------------------------


def embedded(model: Any, tokens: np.ndarray) -> torch.Tensor:
    """(n, d_model) what the layer before the last gives, of one text by itself."""
    states = model(input_ids=torch.from_numpy(tokens)[None], output_hidden_states=True)
    return states.hidden_states[model.config.num_hidden_layers - 1][0]


@pytest.mark.parametrize("encoding", ["geneformer_v1", "geneformer_v2"])
def test_cosines_are_geneformers(coded, encoding):
    """in_silico_perturber.py restated, cell by cell: special tokens are left out, the gene's own
    place of the original too, and shifts are towards a state."""
    profile, corpus = coded[encoding]
    model = tiny("bert", layers=3, vocabulary=len(corpus.tokenizer), seed=1)
    goal = torch.randn(model.config.hidden_size, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(0))
    cosine = torch.nn.functional.cosine_similarity
    special = {0, 1} if encoding == "geneformer_v1" else {0, 1, 2, 3}
    for cell in range(4):
        encoder, ids = encoder_of(corpus, profile, cell), corpus.gene_ids_of(cell)
        tokens = corpus.tokens[cell][corpus.mask[cell]]
        genes = [place for place, token in enumerate(tokens) if token not in special]
        original = embedded(model, tokens)
        shifts, cosines = [], []
        for place in genes:
            perturbed = embedded(model, np.delete(tokens, place))
            kept = [one for one in genes if one != place]
            now = [one - (one > place) for one in kept]
            cosines.append(float(cosine(perturbed[now], original[kept], dim=1).mean()))
            shifts.append(float(cosine(perturbed[now].mean(dim=0), goal, dim=0)
                                - cosine(original[genes].mean(dim=0), goal, dim=0)))
        effect, _ = deletions(model, encoder, ids, near(goal), 3)
        assert -effect == pytest.approx(shifts, abs=1e-6)
        like = likeness(model, encoder.encode(ids))
        effect, _ = deletions(model, encoder, ids, like, 3)
        assert 1 - effect == pytest.approx(cosines, abs=1e-6)
        assert np.ptp(cosines) > 1e-4
        # Moved to the front: every gene is in both, at another place.
        front = ids[[2, 0, 1, *range(3, len(ids))]]
        moved = embedded(model, encoder.encode(front).tokens)
        order = [genes[2], genes[0], genes[1], *genes[3:]]
        [read] = responses(model, [encoder.encode(front)], like, 1)
        assert read == pytest.approx(float(cosine(moved[genes], original[order], dim=1).mean()),
                                     abs=1e-6)


def test_readouts_are_what_they_are_called(coded):
    profile, corpus = coded["maxtoki"]
    model = tiny("llama", layers=3, vocabulary=len(corpus.tokenizer), seed=2)
    texts = [encoder_of(corpus, profile, cell).encode(corpus.gene_ids_of(cell))
             for cell in range(3)]
    direction = torch.randn(model.config.hidden_size, dtype=torch.float64)
    for text, next_gene, side in zip(texts, responses(model, texts, of_token(5), 2),
                                     responses(model, texts, along(direction), 2), strict=True):
        output = model(input_ids=torch.from_numpy(text.tokens)[None], output_hidden_states=True)
        logits = output.logits[0, np.flatnonzero(text.gene >= 0)[-1]]
        assert next_gene == pytest.approx(float(logits[5] - logits.mean()), abs=1e-6)
        mean = output.hidden_states[-1][0][torch.from_numpy(text.gene >= 0)].mean(dim=0)
        assert side == pytest.approx(float(mean @ direction), abs=1e-6)


def test_sub_words_have_no_cosine_of_their_own(parts, monkeypatch, tmp_path):
    model, _, corpus = parts
    profile = tiny_profile(monkeypatch, tmp_path)
    text = encoder_of(corpus, profile, 7).encode(corpus.gene_ids_of(7))
    with pytest.raises(InputError, match="tokenizer: genes"):
        likeness(model, text)
