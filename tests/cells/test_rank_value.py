"""Rank-value encoding: the reference's ids on real cells, and what is refused."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from gene_tokens import GENES, NAMES, cells, counts, dictionaries, profile_of
from helpers import TRAINING
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_architectures import tiny

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import load_corpus
from scfm_circuits.cells.dictionaries import read_gene_tokens
from scfm_circuits.cells.packaged import open_packaged
from scfm_circuits.cells.prompts import answered_prompt
from scfm_circuits.cells.rank_value import as_ranks
from scfm_circuits.circuits.attribution import closure, feature_direction, logit_direction
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.common.encodings import RANK_VALUE
from scfm_circuits.common.profile import load_profile
from scfm_circuits.models.loading import get_model
from scfm_circuits.transcoders.training.run import TrainingRun

ENCODINGS = sorted(RANK_VALUE)


@pytest.fixture(autouse=True)
def _results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCFM_RESULTS", str(tmp_path / "results"))


def plain_ids(row: np.ndarray, names: list[str], tokens: dict[str, int], medians: dict[str, float],
              before: list[int], after: list[int], most: int) -> list[int]:
    """Geneformer's own arithmetic, written out: counts over the total, times 10,000, over medians,
    in falling order."""
    total = row.sum()
    found = [(-(value / total * 10_000 / medians[name]), tokens[name])
             for name, value in zip(names, row, strict=True) if value > 0 and name in tokens]
    ids = [token for _, token in sorted(found)]
    return before + ids[: most - len(before) - len(after)] + after


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_ids_are_those_of_the_arithmetic_written_out(tmp_path, encoding):
    fields, values = dictionaries(tmp_path, encoding), counts()
    corpus = load_corpus(profile_of(cells(tmp_path, values), fields))
    tokens = json.loads(Path(fields["token_dictionary"]).read_text())
    medians = json.loads(Path(fields["gene_medians"]).read_text())
    way = RANK_VALUE[encoding]
    before, after = ([tokens[one] for one in names] for names in (way.before, way.after))
    for cell, row in enumerate(values):
        wanted = plain_ids(row, GENES, tokens, medians, before, after, way.most)
        assert corpus.tokens[cell][corpus.mask[cell]].tolist() == wanted
        assert (corpus.tokens[cell][~corpus.mask[cell]] == tokens["<pad>"]).all()
    assert corpus.symbols.tolist() == NAMES and not corpus.has_answers


def test_every_token_knows_its_gene_and_special_tokens_none(tmp_path):
    corpus = load_corpus(profile_of(cells(tmp_path, counts()), dictionaries(tmp_path)))
    special = np.isin(corpus.tokens, range(4))
    assert np.array_equal(special, corpus.gene < 0) and np.array_equal(special, corpus.place < 0)
    texts = corpus.tokenizer.convert_ids_to_tokens(corpus.tokens[~special].tolist())
    assert texts == corpus.symbols[corpus.gene[~special]].tolist()
    assert corpus.pieces(0) == ["<cls>", *corpus.genes_of(0), "<eos>"]
    assert len(corpus.tokenizer) == 12


def test_columns_of_one_gene_are_added_up(tmp_path):
    """A symbol and its alias are one gene; so are two versions of an identifier."""
    values = counts()
    split = np.column_stack([values, values[:, 0]])
    fields = dictionaries(tmp_path)
    whole = values.copy()
    whole[:, 0] *= 2
    wanted = load_corpus(profile_of(cells(tmp_path, whole), fields))
    for names, columns, own in (
            ([*NAMES, "F8VWF"], {}, {}),
            ([*NAMES, "OTHER"], {"id": [f"{one}.3" for one in (*GENES, GENES[0])]},
             {"ensembl_column": "id"})):
        path = cells(tmp_path, split, names, **columns)
        found = load_corpus(profile_of(path, fields, **own))
        assert np.array_equal(found.tokens, wanted.tokens)
        assert any("1 share the token of another" in one for one in found.decisions)


def test_a_gene_without_a_token_is_left_out(tmp_path):
    values, fields = counts(), dictionaries(tmp_path)
    wanted = load_corpus(profile_of(cells(tmp_path, values), fields))
    more = np.column_stack([values, np.full(len(values), 99)])
    found = load_corpus(profile_of(cells(tmp_path, more, [*NAMES, "NOVEL"]), fields))
    assert np.array_equal(found.tokens, wanted.tokens)
    assert any(one.startswith("8 of 9 genes have a token") for one in found.decisions)


def test_a_file_of_identifiers_alone_is_read(tmp_path):
    """Genes are called by the only name that the dictionary of names has, or by the identifier."""
    values, versions = counts(), [f"{gene}.{i}" for i, gene in enumerate(GENES)]
    fields = dictionaries(tmp_path)
    wanted = load_corpus(profile_of(cells(tmp_path, values), fields))
    path = cells(tmp_path, values, versions)
    found = load_corpus(profile_of(path, fields))
    assert np.array_equal(found.tokens, wanted.tokens)
    assert found.symbols.tolist() == [GENES[0], *NAMES[1:]]  # the first has an alias
    [told] = [one for one in found.decisions if "identifiers alone" in one]
    assert "and 7 are called by their names" in told and "1 are called by their identifiers" in told
    bare = load_corpus(profile_of(path, {key: value for key, value in fields.items()
                                         if key != "gene_mapping"}))
    assert np.array_equal(bare.tokens, wanted.tokens) and bare.symbols.tolist() == GENES
    [told] = [one for one in bare.decisions if "identifiers alone" in one]
    assert "8 are called by their identifiers" in told and "gene_name_id_dict" in told


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 6), genes=st.integers(1, 9), seed=st.integers(0, 1000))
def test_ranks_order_as_quotients_do(n, genes, seed):
    rng = np.random.default_rng(seed)
    dense = rng.integers(0, 4, (n, genes))
    medians = rng.choice([0.1, 0.3, 1.0, 2.0], genes)
    found = as_ranks(sp.csr_matrix(dense.astype(np.float32)), medians).toarray()
    for row, ranks in zip(dense, found, strict=True):
        quotients = row / medians
        kinds = np.unique(quotients[row > 0])
        assert np.array_equal(ranks[row > 0], np.searchsorted(kinds, quotients[row > 0]) + 1)
        assert (ranks[row == 0] == 0).all()


def test_a_corpus_is_read_as_it_was_stored(tmp_path):
    profile = profile_of(cells(tmp_path, counts()), dictionaries(tmp_path, "maxtoki"))
    corpus, again = load_corpus(profile), load_corpus(profile)
    assert np.array_equal(again.tokens, corpus.tokens) and again.pieces(1) == corpus.pieces(1)
    assert again.tokenizer.get_vocab() == corpus.tokenizer.get_vocab()


def test_nothing_is_asked_in_words_so_the_cell_stands_alone(tmp_path):
    profile = profile_of(cells(tmp_path, counts()), dictionaries(tmp_path))
    corpus = load_corpus(profile)
    prompt = answered_prompt(corpus, profile, 0, "a")
    assert prompt.encoded.tokens.tolist() == corpus.tokens[0][corpus.mask[0]].tolist()
    assert prompt.genes == [None, *corpus.genes_of(0), None]
    assert prompt.answer_start == len(prompt.texts) == prompt.position + 1


@pytest.mark.parametrize(("encoding", "family"), [("geneformer_v2", "bert"), ("maxtoki", "llama")])
def test_transcoders_and_exact_circuits_of_a_model_of_gene_tokens(tmp_path, encoding, family):
    """From counts to a closed sum, with a model of the family that the encoding belongs to."""
    tiny(family, vocabulary=12, dtype=torch.float32, native_norms=True).save_pretrained(
        tmp_path / "hub" / "small")
    profile = profile_of(cells(tmp_path, counts()), dictionaries(tmp_path, encoding),
                         model=str(tmp_path / "hub"), model_subfolder="small", model_layers=3,
                         human_layer=1, **TRAINING)
    corpus = load_corpus(profile)
    model, _ = get_model(profile, corpus)
    run = TrainingRun(model, corpus, profile)
    run.run(progress=False)
    frozen = freeze(model, run.transcoders, corpus.tokens[0][corpus.mask[0]])
    for reading in (feature_direction(frozen, 2, 3, 2), logit_direction(frozen, 5, 2)):
        assert closure(frozen, reading) < 1e-5
    assert frozen.causal == (family == "llama")


# --- a dictionary of the training cells -----------------------------------------------------------

OWN = {"encoding": "geneformer_v2", "token_dictionary": "train"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_own_tokens_and_medians_are_geneformers_on_the_training_cells(tmp_path, encoding):
    """Written out with pandas: shares of a cell's counts, medians over the training cells that
    express a gene, all genes in the order of their quotients."""
    values = counts(12, seed=1)
    profile = profile_of(cells(tmp_path, values), OWN | {"encoding": encoding}, genes_per_cell=5)
    corpus = load_corpus(profile)
    shares = pd.DataFrame(values, columns=NAMES)
    shares = 1e4 * shares.div(shares.sum(axis=1), axis=0)
    train = shares[~corpus.held_out]
    medians = train.where(train > 0).median()
    way = RANK_VALUE[encoding]
    for cell in range(12):
        quotients = (shares.loc[cell] / medians).loc[lambda x: x > 0].sort_values(ascending=False)
        assert corpus.genes_of(cell) == quotients.index[:5].tolist()
        assert corpus.pieces(cell) == [*way.before, *quotients.index[:5], *way.after]
    assert corpus.tokenizer.get_vocab() == dict(zip((*way.special, *corpus.symbols), range(99),
                                                    strict=False))
    assert any("8 of 8 genes have a token" in one for one in corpus.decisions)


def test_held_out_cells_enter_neither_medians_nor_tokens(tmp_path):
    values, many = counts(12, seed=1), [f"G{i}" for i in range(8)]
    values = np.column_stack([values, np.zeros((12, 8), int)])
    profile = profile_of(cells(tmp_path, values, [*NAMES, *many]), OWN)
    corpus = load_corpus(profile)
    out = corpus.held_out
    values[out] = np.random.default_rng(5).integers(1, 90, (out.sum(), 16))
    other = load_corpus(profile_of(cells(tmp_path, values, [*NAMES, *many]), OWN))
    assert np.array_equal(other.held_out, out) and other.symbols.tolist() == NAMES
    length = corpus.tokens.shape[1]
    assert np.array_equal(other.tokens[~out][:, :length], corpus.tokens[~out])


def test_genes_that_stand_first_most_often_have_the_tokens(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.poisson(rng.gamma(0.5, 4, 500), (40, 500))
    names = [f"G{i}" for i in range(500)]
    few, all_of_them = (load_corpus(profile_of(
        cells(tmp_path, values, names), OWN, genes_per_cell=60, vocabulary_size=size))
        for size in (300, 504))
    train = ~all_of_them.held_out
    often = pd.Series(all_of_them.gene[train].ravel()).loc[lambda x: x >= 0].map(
        lambda i: all_of_them.symbols[i]).value_counts()
    assert len(few.symbols) == 296 and len(few.tokenizer) == 300
    assert often[few.symbols].min() >= often.drop(few.symbols).max()
    assert few.symbols.tolist() == [name for name in names if name in {*few.symbols}]


def test_a_cell_without_any_gene_that_has_a_token_is_told_of(tmp_path):
    values = np.zeros((8, 9), int)
    values[:, :8] = counts()
    alone = np.flatnonzero(load_corpus(profile_of(
        cells(tmp_path, values, [*NAMES, "RARE"]), OWN)).held_out)[0]
    values[alone] = [0] * 8 + [7]
    told = refusal(cells(tmp_path, values, [*NAMES, "RARE"]), OWN)
    assert f"(the first is row {alone})" in told and "raise `vocabulary_size`" in told


def test_own_medians_need_counts(tmp_path):
    assert "rank-value encoding divides raw counts" in refusal(
        cells(tmp_path, np.log1p(counts())), OWN)


# --- the reference ------------------------------------------------------------------------------


@pytest.fixture
def geneformer() -> Path:
    folder = os.environ.get("SCFM_GENEFORMER")
    if not folder:
        pytest.skip("SCFM_GENEFORMER names no folder with Geneformer's dictionaries")
    return Path(folder)


def _ties(values: np.ndarray) -> list[set[int]]:
    """Places of equal neighbours in a falling row, as sets."""
    groups: list[set[int]] = []
    for i, value in enumerate(values):
        if i and value == values[i - 1]:
            groups[-1].add(i)
        else:
            groups.append({i})
    return groups


@pytest.mark.parametrize("by", ["identifiers", "symbols"])
def test_the_references_ids_for_real_cells(tmp_path, geneformer, by):
    """Four endothelial cells of the packaged pancreas: the ids that the reference gives, but for
    the order of equal quotients. By symbols, 0.3 % of the genes have another identifier."""
    oracle = json.loads((geneformer / "oracle_v2_4cells.json").read_text())
    fields = {"encoding": "geneformer_v2", "genes_per_cell": 4094, "case_type": "endothelial",
              "token_dictionary": str(geneformer / "v2_token_dictionary.json"),
              "gene_medians": str(geneformer / "maxtoki_gene_median_dictionary_v1.json")}
    opened = open_packaged()
    matrix, variables = opened.matrices["X"]
    rows = [opened.obs.index.get_loc(one) for one in oracle["cells"]]
    part = sp.csr_matrix(np.vstack([matrix[row : row + 1].toarray() for row in rows]))
    names = list(variables.index)
    opened.close()
    columns = {"id": oracle["genes_v2"]} if by == "identifiers" else {}
    path = cells(tmp_path, part.toarray(), names, **columns)
    more = {"ensembl_column": "id"} if by == "identifiers" else {
        "gene_mapping": str(geneformer / "v2_ensembl_mapping_of_tokens.json"),
        "symbol_rule": "r_names"}
    corpus = load_corpus(profile_of(path, fields | {"case_type": "a"}, **more))
    medians = json.loads(Path(fields["gene_medians"]).read_text())
    tokens = json.loads(Path(fields["token_dictionary"]).read_text())
    name_of = {token: name for name, token in tokens.items()}
    for row, wanted in enumerate(oracle["v2"]):
        found = corpus.tokens[row][corpus.mask[row]].tolist()
        if by == "symbols":
            assert len(set(found) ^ set(wanted)) < 0.01 * len(wanted)
            continue
        assert len(found) == len(wanted) and (found[0], found[-1]) == (wanted[0], wanted[-1])
        count: dict[str, float] = {}
        for name, value in zip(oracle["genes_v2"], part[[row]].toarray()[0], strict=True):
            count[name] = count.get(name, 0.0) + value
        quotient = np.array([count[name_of[one]] / medians[name_of[one]] for one in wanted[1:-1]])
        for places in _ties(quotient):
            here = [1 + place for place in places]
            assert {found[i] for i in here} == {wanted[i] for i in here}


def test_version_1_on_real_cells_by_an_independent_recomputation(tmp_path, geneformer):
    """Eight cells, without special tokens, cut at 2,048; version 1's vocabulary is stood in for by
    a shuffled one of the same genes."""
    known = json.loads((geneformer / "v2_token_dictionary.json").read_text())
    medians = json.loads((geneformer / "maxtoki_gene_median_dictionary_v1.json").read_text())
    genes = np.array([name for name in known if name.startswith("ENSG")])
    np.random.default_rng(0).shuffle(genes)
    tokens = {"<pad>": 0, "<mask>": 1} | {str(name): i + 2 for i, name in enumerate(genes)}
    (tmp_path / "tokens.json").write_text(json.dumps(tokens))
    oracle = json.loads((geneformer / "oracle_v2_4cells.json").read_text())
    opened = open_packaged()
    matrix, variables = opened.matrices["X"]
    rows = np.flatnonzero((opened.obs["cell_type"] == "endothelial").to_numpy())[:8]
    part = np.vstack([matrix[int(row) : int(row) + 1].toarray() for row in rows])
    names = list(variables.index)
    opened.close()
    path = cells(tmp_path, part, names, id=oracle["genes_v2"])
    corpus = load_corpus(profile_of(path, {
        "encoding": "geneformer_v1", "token_dictionary": str(tmp_path / "tokens.json"),
        "gene_medians": str(geneformer / "maxtoki_gene_median_dictionary_v1.json"),
        "ensembl_column": "id"}, genes_per_cell=2048))
    frame = pd.DataFrame(part.T).groupby(oracle["genes_v2"]).sum()
    frame = frame[frame.index.isin(tokens)]
    over = frame.div(pd.Series(medians).reindex(frame.index), axis=0)
    longest = 0
    for row in range(len(rows)):
        own = over[row][frame[row] > 0].sort_values(ascending=False)
        found = corpus.tokens[row][corpus.mask[row]]
        assert len(found) == min(2048, len(own))
        longest = max(longest, len(own))
        name_of = np.array(["", "", *genes])
        assert np.array_equal(own[name_of[found]].to_numpy(), own.to_numpy()[: len(found)])
    assert longest > 2048  # so that something was cut


# --- what is refused -----------------------------------------------------------------------------


def refusal(path: str, fields: dict[str, str], **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_corpus(profile_of(path, fields, **more))
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and caught.value.__cause__ is None
    return message


def test_log_values_are_refused(tmp_path):
    path = cells(tmp_path, np.log1p(counts()))
    assert "rank-value encoding divides raw counts" in refusal(path, dictionaries(tmp_path))


@pytest.mark.parametrize(("encoding", "own", "told"), [
    ("geneformer_v1", "geneformer_v2", "has no token <cls>"),
    ("geneformer_v2", "geneformer_v1", "a token <cls>, which none"),
    ("maxtoki", "geneformer_v2", "has no token <cls>")])
def test_a_dictionary_of_another_version(tmp_path, encoding, own, told):
    fields = dictionaries(tmp_path, encoding) | {"encoding": own}
    found = refusal(cells(tmp_path, counts()), fields)
    assert told in found and f"set `encoding: {encoding}`" in found


def test_medians_of_another_version(tmp_path):
    fields = dictionaries(tmp_path, gene_medians={gene: 1.0 for gene in GENES[1:]})
    assert "1 of the 8 genes that have a token, such as ENSG00000000001, have no median" in \
        refusal(cells(tmp_path, counts()), fields)


def test_no_gene_has_a_token(tmp_path):
    path = cells(tmp_path, counts(), [f"NOVEL{i}" for i in range(8)])
    assert "No gene of" in refusal(path, dictionaries(tmp_path))


def test_symbols_where_identifiers_are_expected(tmp_path):
    fields = dictionaries(tmp_path)
    path = cells(tmp_path, counts(), name=NAMES)
    assert "holds VWF and the like, not Ensembl identifiers" in refusal(
        path, fields, ensembl_column="name")
    del fields["gene_mapping"]
    assert "names its genes by symbols" in refusal(path, fields)
    assert "no var column 'id'" in refusal(path, fields, ensembl_column="id")


@pytest.mark.parametrize(("field", "content", "told"), [
    ("token_dictionary", [1], "holds no dictionary"),
    ("token_dictionary", {"VWF": 0, "<pad>": 1}, "names no gene by an Ensembl identifier"),
    ("token_dictionary", {GENES[0]: 0, "<pad>": 2}, "are not the numbers from 0 to 1"),
    ("token_dictionary", {GENES[0]: "x"}, "whole numbers"),
    ("token_dictionary", {GENES[0]: True}, "whole numbers"),
    ("gene_medians", {GENES[0]: None}, "numbers"),
    ("gene_medians", {GENES[0]: float("nan")}, "numbers"),
    ("gene_mapping", {"VWF": 3}, "texts")])
def test_a_dictionary_of_something_else(tmp_path, field, content, told):
    fields = dictionaries(tmp_path, **{field: content})
    found = refusal(cells(tmp_path, counts()), fields)
    assert told in found and f"`{field}`" in found


def test_a_dictionary_that_is_not_there_or_broken(tmp_path):
    fields, path = dictionaries(tmp_path), cells(tmp_path, counts())
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        Path(fields["gene_medians"]).write_bytes(content)
        assert "cannot be read" in refusal(path, fields)
    Path(fields["gene_medians"]).unlink()
    assert "there is no file" in refusal(path, fields)


@pytest.mark.parametrize(("changed", "told"), [
    ({"encoding": "geneformer_v1"}, "token_dictionary"),
    ({"gene_medians": "x"}, "cell sentences need none"),
    ({"encoding": "maxtoki", "token_dictionary": "x", "gene_medians": "x", "genes_per_cell": 4095},
     "4,094 genes at most"),
    ({"encoding": "maxtoki", "token_dictionary": "x", "gene_medians": "x", "model_thinning": 0.5},
     "thinned"),
    (OWN | {"gene_medians": "x"}, "gene_medians.*makes its medians"),
    (OWN | {"ensembl_column": "x"}, "ensembl_column.*calls genes as the cells do"),
    (OWN | {"model": "some/model"}, "a loaded model needs its own, not `train`"),
    ({"token_dictionary": "train"}, "cell sentences need none")])
def test_profiles_that_do_not_fit(changed, told):
    with pytest.raises(InputError, match=told):
        load_profile("smoke", {"model_thinning": 1.0, **changed})


# --- pickles -------------------------------------------------------------------------------------


class Evil:
    """A pickle of it would run a command when it is read."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch harm",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_texts_and_numbers_are_read_and_others_refused(tmp_path, protocol, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = dictionaries(tmp_path)
    wanted = read_gene_tokens(profile_of("x", fields))
    kinds = {"token_dictionary": np.int16, "gene_medians": np.float64, "gene_mapping": str}
    for field, kind in kinds.items():
        content = json.loads(Path(fields[field]).read_text())
        path = tmp_path / f"{field}.pkl"
        path.write_bytes(pickle.dumps({key: kind(value) for key, value in content.items()},
                                      protocol))
        fields[field] = str(path)
    assert read_gene_tokens(profile_of("x", fields)) == wanted
    for bad in ({"a": Evil()}, {"a": np.array([1])}, {"a": np.datetime64("2020-01-01")}, Evil(),
                {"a": pd.Timestamp(0)}, {"a": (1,)}, {"a": {"b": 1}}, {"a": b"1"},
                {"a": np.str_("x")}):
        Path(fields["gene_medians"]).write_bytes(pickle.dumps(bad, protocol))
        with pytest.raises(InputError, match="`gene_medians` in the profile"):
            read_gene_tokens(profile_of("x", fields))
    whole = pickle.dumps({"a": np.float64(1)}, protocol)
    for cut in range(1, len(whole), 5):
        Path(fields["gene_medians"]).write_bytes(whole[:cut])
        with pytest.raises(InputError):
            read_gene_tokens(profile_of("x", fields))
    assert not (tmp_path / "harm").exists()
