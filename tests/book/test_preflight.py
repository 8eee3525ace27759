"""What a run is told to cost, what is refused, and that the advice given helps."""

import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse as sp
import torch
from gene_tokens import cells, counts, dictionaries, profile_of, scgpt
from helpers import tiny_model, tiny_profile
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_architectures import tiny
from tokenizers.processors import TemplateProcessing
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForMaskedLM

from scfm_circuits import InputError
from scfm_circuits.__main__ import main
from scfm_circuits.book import cli as book
from scfm_circuits.book import downloads, execution, preflight, side_by_side
from scfm_circuits.book.chapters import NOTEBOOKS, load_run, read_notebooks
from scfm_circuits.book.preflight import (
    FIELDS,
    memory_problems,
    memory_stages,
    run_cost,
    run_seconds,
)
from scfm_circuits.book.sizes import (
    CONTROLS,
    COUNTED,
    KINDS,
    KNOCKED_OUT,
    PERTURBED,
    SCORED,
    TRAINED,
    VALIDATED,
    Sizes,
    model_config,
    run_sizes,
    works,
)
from scfm_circuits.cells.corpus import load_corpus, rare_types
from scfm_circuits.cells.packaged import open_packaged
from scfm_circuits.common import manifest
from scfm_circuits.common.encodings import BINNED, GENE_TOKENS, RANK_VALUE
from scfm_circuits.common.profile import Profile, load_profile
from scfm_circuits.models.loading import get_model
from scfm_circuits.models.small_models import build_small_model

CPU = torch.device("cpu")
PYTHIA_410M = 405_334_016
"""Parameters of EleutherAI/pythia-410m, as its authors count them (embeddings included)."""
TINY = Sizes(12, 12, 16, 114, 86, 12, False, 3, 16, 2, 40, 12_000, 30_000, 50_000)
WHOLE = [*read_notebooks(NOTEBOOKS)]
EVERYTHING = {file for one in WHOLE for file in one.produces}


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> Path:
    """A machine on which nothing has been fetched or made, without a network.

    But for the demo's cells, which are read from their package once for all tests."""
    open_packaged().close()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cells").symlink_to(cache / "cells")
    for name in ("RESULTS", "DATA", "CACHE", "GENE_SETS"):
        monkeypatch.setenv(f"SCFM_{name}", str(tmp_path / name.lower()))
    monkeypatch.delenv(preflight.ANYWAY, raising=False)
    monkeypatch.delenv("SCFM_OFFLINE", raising=False)
    (tmp_path / "gene_sets").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(preflight, "matrix_rate", lambda *_: 1e11)
    return tmp_path


def test_every_work_is_that_of_one_chapter() -> None:
    profile = load_profile("smoke")
    stages = memory_stages(profile, TINY, torch.device("cuda"))
    known = [file for one in read_notebooks(NOTEBOOKS) for file in one.produces]
    for file in {*works(profile, TINY), *(file for one in stages for file in one.leaves)}:
        assert known.count(file) == 1, file


# --- sizes ---------------------------------------------------------------------------------------


def test_the_papers_size_is_known_before_anything_is_fetched(empty: Path) -> None:
    (empty / "data").mkdir()
    (empty / "data" / "Global_raw.h5ad").write_bytes(b"broken: it will be set aside")
    found = run_sizes(load_profile("paper"))
    assert (found.cells, found.cells_in_file, found.genes) == (316_000, 704_296, 32_732)
    assert (found.layers, found.width, found.vocabulary) == (24, 1024, 50_304)
    assert found.parameters == PYTHIA_410M and not found.measured
    # Figure 4's prompt has 219 tokens: 64 genes of 3.3 and the question; the run needs 60 M.
    assert found.tokens / found.cells == pytest.approx(225, rel=0.1)
    assert 60_000_000 < found.training_tokens == pytest.approx(0.9 * found.tokens, rel=1e-3)


def test_what_is_told_of_the_small_profiles_is_what_they_are(
        empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = tiny_profile(monkeypatch, empty / "results", max_cells=60)
    before = run_sizes(profile)
    assert (before.cells, before.cells_in_file) == (60, 1937)
    corpus = load_corpus(profile)
    found = run_sizes(profile)
    assert found.measured and found.tokens == int(corpus.mask.sum())
    assert found.training_tokens == corpus.lengths[~corpus.held_out].sum()
    assert found.padded == corpus.tokens.shape[1]
    assert before.tokens == pytest.approx(found.tokens, rel=0.5)
    model = build_small_model(profile, len(corpus.tokenizer), found.padded)
    assert found.parameters == sum(one.numel() for one in model.parameters())
    assert found.vocabulary == len(corpus.tokenizer)


@pytest.mark.parametrize("name", ["smoke_encoder", "smoke_decoder"])
def test_cells_of_gene_tokens_are_as_long_as_they_are_told_to_be(empty: Path, name: str) -> None:
    profile = load_profile(name)
    before = run_sizes(profile)
    corpus = load_corpus(profile)
    found = run_sizes(profile)
    assert found.measured and not before.measured
    assert before.tokens == pytest.approx(found.tokens, rel=0.02)
    assert (before.padded, before.genes, before.vocabulary, before.parameters) == (
        found.padded, found.genes, found.vocabulary, found.parameters)
    assert before.vocabulary == len(corpus.tokenizer)
    assert before.counts == pytest.approx(found.counts, rel=0.02)


@pytest.mark.parametrize("stored", ["csr", "dense", "csc"])
@pytest.mark.parametrize("encoding", sorted(GENE_TOKENS))
def test_genes_that_cells_express_are_counted_for_the_estimate(
        empty: Path, encoding: str, stored: str) -> None:
    """So few cells that all are looked at: what is told is what will be."""
    values = counts(12)
    values[::2, 3:] = 0
    path = cells(empty, values)
    data = anndata.read_h5ad(path)
    data.X = {"csr": data.X, "dense": data.X.toarray(), "csc": data.X.tocsc()}[stored]
    data.write_h5ad(path)
    fields = scgpt(empty) if encoding == BINNED else dictionaries(empty, encoding)
    profile = profile_of(path, fields, genes_per_cell=7)
    before, corpus = run_sizes(profile), load_corpus(profile)
    assert before.padded == corpus.tokens.shape[1]
    longest = 12 * corpus.tokens.shape[1]  # csc has no rows to be looked at
    assert before.tokens == (longest if stored == "csc" else corpus.mask.sum())
    assert corpus.mask.sum() < longest


def test_the_longest_cell_is_told_from_what_rows_have_stored(empty: Path) -> None:
    """Cells of a hundred to a thousand genes, of which two in three have a token."""
    rng = np.random.default_rng(0)
    values = (rng.random((200, 3000)) < rng.uniform(0.03, 0.33, (200, 1))).astype(np.float32)
    genes = [f"ENSG{i:011d}" for i in range(3000)]
    anndata.AnnData(sp.csr_matrix(values), pd.DataFrame(
        {"type": ["a", "b"] * 100}, index=[f"c{i}" for i in range(200)]),
        pd.DataFrame(index=genes)).write_h5ad(empty / "mine.h5ad")
    fields = dictionaries(empty, token_dictionary={one: i for i, one in enumerate(
        (*RANK_VALUE["geneformer_v2"].special, *genes[::3], *genes[1::3]))},
        gene_medians=dict.fromkeys(genes, 1.0))
    profile = profile_of(str(empty / "mine.h5ad"), fields, genes_per_cell=4094)
    before, corpus = run_sizes(profile), load_corpus(profile)
    assert before.padded == pytest.approx(corpus.tokens.shape[1], rel=0.15)
    assert before.tokens == pytest.approx(corpus.mask.sum(), rel=0.15)
    assert corpus.mask.sum() < 0.7 * corpus.mask.size


@pytest.mark.parametrize("name", ["geneformer", "geneformer_v1"])
def test_a_pass_takes_as_many_operations_as_torch_counts(empty: Path, name: str) -> None:
    """Of 4,096 and of 2,048 tokens, where attention's products are a third of all."""
    profile = load_profile(name)
    sizes = run_sizes(profile)
    config = model_config(profile, None, sizes.padded)
    with torch.device("meta"):
        model = BertForMaskedLM._from_config(config, attn_implementation="eager").eval()
        tokens = torch.zeros(1, sizes.padded, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=tokens)
    passes = 30 * (1 + 256)  # whole cells, and without each of so many genes
    found = works(profile, sizes)[KNOCKED_OUT].operations["count"] / passes
    assert found == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert 2 * sizes.parameters * sizes.padded < 0.7 * found


def test_cells_are_as_long_before_their_dictionaries_are_fetched(empty: Path) -> None:
    """More genes than a dictionary that is made here would have tokens."""
    data = anndata.AnnData(np.ones((20, 400), np.float32), pd.DataFrame(
        {"type": ["a", "b"] * 10}, index=[f"c{i}" for i in range(20)]), pd.DataFrame(
        index=[f"ENSG{i:011d}" for i in range(400)]))
    data.write_h5ad(empty / "mine.h5ad")
    profile = load_profile("geneformer", {
        "cells": str(empty / "mine.h5ad"), "label_column": "type", "case_type": "a",
        "symbol_column": None, "validation_share": 0.5, "vocabulary_size": 300})
    found = run_sizes(profile)
    assert (found.tokens, found.padded, found.genes) == (20 * 402, 402, 400)


def rare_notes(profile: Profile) -> list[str]:
    return [one for one in run_sizes(profile).notes if "types have fewer" in one]


def test_types_that_are_hardly_learnt_are_told(
        empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is read, and from a stored corpus; not of a model that is loaded."""
    profile = tiny_profile(monkeypatch, empty / "results", max_cells=60)
    (told,) = rare_notes(profile)
    corpus = load_corpus(profile)
    counts = np.unique(corpus.labels, return_counts=True)[1]
    assert rare_notes(profile) == [told]
    assert told.startswith(f"{(counts < 30).sum()} of {len(counts)} types")
    tiny_model(layers=2).save_pretrained(empty / "model")
    loaded = profile.model_copy(update={"model": str(empty / "model")})
    assert not rare_notes(loaded)
    assert main(["plan", "--profile", "smoke", "-p", "max_cells=60"]) == 0
    assert "types have fewer than 30 cells" in capsys.readouterr().out
    assert not rare_types(np.repeat(["a", "b", "c"], [30, 29, 30]), profile)
    assert rare_types(np.repeat(["a", "b"], [30, 29]), profile)


def test_a_model_in_a_folder_is_looked_at(empty: Path) -> None:
    tiny_model(layers=5, width=24).save_pretrained(empty / "model")
    profile = load_profile("smoke", {"model": str(empty / "model"), "model_layers": None,
                                     "tokenizer": str(empty / "model")})
    assert model_config(profile, None, 10).hidden_size == 24
    for changes, told in (({"model_layers": 2}, r"asks for 2 layers.*has 5; set `model_layers: 5`"),
                          ({"human_layer": 5}, "has layers 0 to 4; lower it")):
        with pytest.raises(InputError, match=told):
            model_config(profile.model_copy(update=changes), None, 10)


def test_layers_are_checked_before_weights_are_read(empty: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(layers=3).save_pretrained(empty / "model")
    (empty / "model" / "model.safetensors").write_bytes(b"no weights")
    profile = tiny_profile(monkeypatch, empty / "results")
    corpus = load_corpus(profile.model_copy(update={"max_cells": 60}))
    wrong = profile.model_copy(update={"model": str(empty / "model"), "model_layers": 9})
    with pytest.raises(InputError, match="set `model_layers: 3`"):
        get_model(wrong, corpus)


# --- downloads and disk --------------------------------------------------------------------------


def test_what_the_paper_fetches(empty: Path) -> None:
    profile = load_profile("paper")
    found = {one.what: one for one in downloads.missing(profile, 1000)}
    assert list(found) == ["Global_raw.h5ad", profile.model, "GO_Biological_Process_2025",
                           "KEGG_2021_Human", "CellMarker_Augmented_2021"]
    assert found["Global_raw.h5ad"].bytes == 9_125_578_296
    assert found[profile.model].bytes == 4000 and not found[profile.model].exact
    (empty / "data").mkdir()
    (empty / "data" / "Global_raw.h5ad.part").write_bytes(bytes(1000))
    (empty / "gene_sets" / "KEGG_2021_Human.gmt").write_text("a\t\tB\n")
    found = {one.what: one for one in downloads.missing(profile, 1000)}
    assert found["Global_raw.h5ad"].bytes == 9_125_578_296 - 1000
    assert "KEGG_2021_Human" not in found


def test_a_cache_with_a_configuration_alone_lacks_the_model(empty: Path) -> None:
    snapshot = empty / "hub" / "models--some--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    refs = empty / "hub" / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    for file, model, tokenizer in (("config.json", False, False), ("a.safetensors", True, False),
                                   ("tokenizer.json", True, True)):
        (snapshot / file).write_text("{}")
        assert downloads._is_here("some/model", None, weights=True) == model
        assert downloads._is_here("some/model", None, weights=False) == tokenizer
    # One of several models in a repository, in a folder of its own.
    assert not downloads._is_here("some/model", None, weights=True, inside="small")
    (snapshot / "small").mkdir()
    (snapshot / "small" / "a.safetensors").write_text("{}")
    assert downloads._is_here("some/model", None, weights=True, inside="small")


def test_a_full_disk_is_told_before_anything_is_done(empty: Path, monkeypatch: pytest.MonkeyPatch
                                                     ) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 5 * 10**9))
    monkeypatch.setattr(preflight, "memory_available", lambda device: 2**50)
    profile = load_profile("paper")
    problem, hint = run_cost(profile, WHOLE).refusal.splitlines()
    assert str(empty / "data") in problem and "has 5.0 GB free" in problem  # all on one disk
    assert "SCFM_RESULTS" in problem and "`max_cells`" in problem
    sizes = run_sizes(profile)
    disk = preflight.disk_needed(profile, sizes, downloads.missing(profile, sizes.parameters),
                                 EVERYTHING)
    needed = float(re.search(r"up to ([\d.]+) GB", problem)[1])  # type: ignore[index]
    assert needed == pytest.approx(sum(disk.values()) / 1e9, abs=0.06)
    assert hint == "(To try all the same, set SCFM_ANYWAY=1.)"
    monkeypatch.setenv(preflight.ANYWAY, "1")
    assert run_cost(profile, WHOLE).refusal == ""


def test_what_is_there_already_is_not_written_again(empty: Path) -> None:
    profile = load_profile("smoke")

    def needed(wanted: set[str] = EVERYTHING) -> int:
        return preflight.disk_needed(profile, TINY, [], wanted)[profile.results]

    before, alone = needed(), needed({KINDS})
    assert before > alone > needed({"claims.csv"})
    (profile.results / "transcoders").mkdir(parents=True)
    (profile.results / "transcoders" / "layer_0.safetensors").write_bytes(bytes(29_000))
    assert needed() == before - 29_000 and needed({KINDS}) == alone
    (profile.results / "transcoders" / "of another width").write_bytes(bytes(10**6))
    assert needed() == before - TINY.one_set  # what is too much is no room for others


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_told(empty: Path) -> None:
    (empty / "results").mkdir(mode=0o500)
    with pytest.raises(InputError, match=r"Nothing can be written into .*results; name other"):
        run_cost(load_profile("smoke"), WHOLE)


# --- memory --------------------------------------------------------------------------------------


def test_the_papers_memory_on_a_gpu(empty: Path) -> None:
    profile = load_profile("paper")
    sizes = run_sizes(profile)
    assert sizes.one_set == 4 * 24 * (2 * 8192 * 1024 + 8192 + 2 * 1024)
    stages = memory_stages(profile, sizes, torch.device("cuda"))
    training = stages[0].parts
    # By hand: 131,072 tokens of 24 layers, read and written, 1,024 wide, in bfloat16.
    assert training["buffer"] == 131_072 * 24 * 2 * 1024 * 2
    assert training["model in the type of training"] == 2 * sizes.parameters
    assert training["parameters and Adam"] == pytest.approx(24 * 2 * 8192 * 1024 * 12, rel=0.01)
    per_cell = sizes.tokens / sizes.cells
    assert stages[1].parts["logits"] == 16 * round(32 * per_cell) * 50_304
    assert stages[1].parts["attention"] == 12 * 32 * 16 * sizes.padded**2
    assert {one.device.type for one in stages if one.name == "counting features"} == {"cuda", "cpu"}
    assert max(one.bytes for one in stages if one.device.type == "cuda") < 40 * 2**30


def test_no_control_needs_no_memory_for_it(empty: Path) -> None:
    for control in (True, False):
        profile = load_profile("smoke", {"reinitialised_control": control})
        names = [one.name for one in memory_stages(profile, TINY, CPU)]
        assert ("the control's training" in names) == control and "training" in names


def test_every_field_that_is_named_scales_its_part(empty: Path, monkeypatch: pytest.MonkeyPatch
                                                   ) -> None:
    profile = tiny_profile(monkeypatch, empty, batch_tokens=32, buffer_tokens=64, expansion=4,
                           forward_cells=2, max_cells=60)

    def parts(other: Profile) -> dict[tuple[str, str], int]:
        return {(one.name, part): size for one in memory_stages(other, run_sizes(other), CPU)
                for part, size in one.parts.items()}

    whole = parts(profile)
    for field, some in FIELDS.items():
        halved = parts(profile.model_copy(update={field: getattr(profile, field) // 2}))
        for (stage, part), size in whole.items():
            if part == "feature counts" and field == "expansion":
                assert halved[stage, part] < size  # tokens are the limit of these few
            else:
                expected = size / 2 if part in some else size
                assert halved[stage, part] == pytest.approx(expected, rel=0.1), (stage, part)


@given(share=st.floats(0.2, 0.999), name=st.sampled_from(["buffer", "expansion", "logits"]))
def test_the_advice_helps(share: float, name: str) -> None:
    large: dict[str, dict[str, Any]] = {
        "buffer": {"buffer_tokens": 10**9, "training_tokens": 10**9},
        "expansion": {"expansion": 10**7}, "logits": {"forward_cells": 10**9}}
    profile = load_profile("smoke", large[name])
    sizes = TINY._replace(cells=10**8, tokens=10**9, training_tokens=9 * 10**8)
    stage = max(memory_stages(profile, sizes, CPU), key=lambda one: one.bytes)
    free = int(share * stage.bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "memory_available", lambda device: free)
        (problem,) = memory_problems(profile, sizes, [stage])
        assert f"{stage.name[1:]} needs" in problem and "this machine has" in problem
        told = re.search(r"lower `(\w+)` in the profile.*; ([\d,]+) would fit", problem)
        if told is None:
            assert "alone is enough" in problem
            return
        helped = profile.model_copy(update={told[1]: int(told[2].replace(",", ""))})
        Profile.model_validate({**dict(helped), "name": "n"})  # a value that the profile takes
        again = {one.name: one for one in memory_stages(helped, sizes, CPU)}
        assert again[stage.name].bytes <= free


def test_a_cell_of_too_many_tokens_is_told_before_it_is_traced(monkeypatch: pytest.MonkeyPatch
                                                               ) -> None:
    """4,096 tokens through twelve heads of twelve layers leave 9.7 GB of patterns."""
    profile = load_profile("geneformer")
    sizes = TINY._replace(padded=4096, layers=12, heads=12)
    [stage] = [one for one in memory_stages(profile, sizes, CPU)
               if one.name == "tracing a circuit"]
    assert stage.parts["attention patterns of a cell"] >= 4 * 12 * 12 * 4096**2
    monkeypatch.setattr(preflight, "memory_available", lambda device: 8 * 2**30)
    (problem,) = memory_problems(profile, sizes, [stage])
    assert "square of a cell's tokens: lower `genes_per_cell`." in problem
    shorter = sizes._replace(padded=1024)
    assert memory_problems(profile, shorter, [one for one in memory_stages(
        profile, shorter, CPU) if one.name == stage.name]) == []


def test_each_field_is_named_once_with_a_value_for_all(empty: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    profile = load_profile("smoke", {"buffer_tokens": 10**9, "training_tokens": 10**9})
    sizes = TINY._replace(cells=10**8, tokens=10**9, training_tokens=9 * 10**8)
    stages = memory_stages(profile, sizes, CPU)
    monkeypatch.setattr(preflight, "memory_available", lambda device: 50 * 2**30)
    (problem,) = memory_problems(profile, sizes, stages)
    helped = profile.model_copy(update={"buffer_tokens": int(
        re.search(r"; ([\d,]+) would fit", problem)[1].replace(",", ""))})  # type: ignore[index]
    assert memory_problems(helped, sizes, memory_stages(helped, sizes, CPU)) == []


def test_two_chapters_run_at_once_where_both_fit(empty: Path, monkeypatch: pytest.MonkeyPatch
                                                 ) -> None:
    monkeypatch.setattr(side_by_side, "cores", lambda: 2)
    monkeypatch.setattr(side_by_side, "memory_total", lambda: 64 * 2**30)
    profile = load_profile("smoke")
    stages = memory_stages(profile, run_sizes(profile), CPU)
    both = preflight.meeting(WHOLE, side_by_side.before(WHOLE), stages)[CPU]
    assert max(one.bytes for one in stages) < both <= 2 * max(one.bytes for one in stages)
    # Two chapters of which one follows the other are never there together.
    assert preflight.meeting(WHOLE[:2], side_by_side.before(WHOLE), stages) == {}

    monkeypatch.setattr(preflight, "memory_available", lambda device: both)
    two = run_cost(profile, WHOLE)
    assert two.jobs == 2 and f"two chapters at once {both / 2**30:.1f} GiB" in two.text
    assert f" for {len(WHOLE)} chapters, 2 at once" in two.text
    monkeypatch.setattr(preflight, "memory_available", lambda device: both - 1)
    one = run_cost(profile, WHOLE)
    assert one.jobs == 1 and not one.refusal and "at once 0" not in one.text
    assert run_cost(profile, WHOLE, jobs=2).jobs == 2  # who asks for it gets it


@pytest.mark.parametrize(("lines", "files", "found"), [
    ("0::/job/step", {"job/memory.max": "9000\n", "job/step/memory.max": "max\n"}, [9000]),
    ("0::/", {"memory.max": "9000\n"}, [9000]),
    ("4:memory:/job\n3:cpu:/other", {"memory/job/memory.limit_in_bytes": "9000\n",
                                     "memory/memory.limit_in_bytes": "99000\n"}, [9000, 99000]),
    ("0::/gone", {}, []),
])
def test_limits_of_containers_and_jobs(tmp_path: Path, lines: str, files: dict[str, str],
                                       found: list[int]) -> None:
    for name, content in files.items():
        (tmp_path / "group" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "group" / name).write_text(content)
    (tmp_path / "own").write_text(lines)
    assert side_by_side.group_limits(tmp_path / "group", tmp_path / "own") == found
    assert side_by_side.group_limits(tmp_path / "group", tmp_path / "no such file") == []


# --- time ----------------------------------------------------------------------------------------


def test_time_follows_what_is_done(empty: Path) -> None:
    profile = load_profile("smoke", {"reinitialised_control": False, "buffer_tokens": 1000})
    reached = {"model": 1.0, "train": 0.5, "count": 0.1, "validate": 0.2}

    def seconds(*wanted: str, chapters: int = 0, of: Profile = profile) -> float:
        return run_seconds(of, TINY, set(wanted), chapters, 1e6, reached)

    assert seconds(chapters=3) == 3 * preflight.STARTED
    # By hand: ten operations a weight of a transcoder, and two a weight of the model; of three
    # layers, four more for each of a cell's tokens in the stream's 16 numbers. The buffer holds all
    # tokens, so these pass the model once.
    width, passed = profile.expansion * 16, 2 * 12_000 + 3 * 4 * 16 * 114 / 12
    by_hand = 3 * 10 * profile.training_tokens * 16 * width + 86 * passed
    assert seconds(TRAINED) == pytest.approx(by_hand / 0.5e6)
    assert seconds(preflight.TOKENIZERS) == pytest.approx(
        preflight.TOKENIZERS_SECONDS * profile.model_steps / 300)
    counted = 114 * (passed + 2 * 3 * 16 * width)
    assert seconds(COUNTED) == pytest.approx(counted / 0.1e6)
    # The original, all layers replaced and all removed; each of the three layers replaced, and
    # removed, from where it stands on: half of six passes; three transcoders twice.
    validated = (114 - 86) * (6 * passed + 2 * 3 * 4 * 16 * width)
    assert seconds(VALIDATED) == pytest.approx(validated / 0.2e6)
    control = profile.model_copy(update={"reinitialised_control": True})
    more = seconds(CONTROLS, of=control) - seconds(CONTROLS)
    assert more == pytest.approx(by_hand / 0.5e6 + counted / 0.1e6)


def test_kinds_are_counted_in_the_cells_that_the_profile_says(empty: Path) -> None:
    whole = load_profile("smoke", {"max_cells": None})

    def counted(cells: int | None) -> float:
        of = whole.model_copy(update={"variant_cells": cells})
        return works(of, TINY)[KINDS].operations["count"]

    assert counted(None) == counted(12) == counted(99) == 8 * works(whole, TINY)[
        COUNTED].operations["count"]
    assert counted(3) == pytest.approx(counted(None) / 4)


def test_genes_are_taken_out_where_a_profile_knows_some(empty: Path) -> None:
    def taken_out(file: str, profile: str = "smoke", **fields: Any) -> float:
        return works(load_profile(profile, fields), TINY)[file].operations["count"]

    assert taken_out(PERTURBED) == 0
    # Twelve cells of 16 genes, each gene twice and the cell whole; 114 tokens of 12 cells.
    cell = 114 / 12 * (2 * 12_000 + 3 * 4 * 16 * 114 / 12)
    assert taken_out(PERTURBED, known_response=["ISG15"]) == pytest.approx(12 * 33 * cell)
    # In every book each gene of some cells is taken out once. Where genes are tokens, all tokens
    # but <cls> and <eos> are genes.
    assert taken_out(KNOCKED_OUT) == pytest.approx(12 * 17 * cell)
    assert taken_out(KNOCKED_OUT, "smoke_encoder") == pytest.approx(12 * (1 + 114 / 12 - 2) * cell)


def test_the_time_of_the_small_real_profile_on_two_cores(empty: Path, monkeypatch: Any) -> None:
    """Measured there: 176 GFLOP/s in products, ten minutes for everything."""
    monkeypatch.setattr(side_by_side, "cores", lambda: 2)
    profile = load_profile("pbmc")
    reached = preflight.REACHED["cpu"]
    assert {kind for work in works(profile, TINY).values() for kind in work.operations} == {
        *reached} == {*preflight.REACHED["cuda"]}
    seconds = run_seconds(profile, run_sizes(profile), EVERYTHING, 11, 176e9, reached)
    assert 1 / 1.5 < seconds / 600 < 1.5


def test_the_papers_time_on_one_h200(empty: Path) -> None:
    """Measured there: products 781 TFLOP/s; 5.2 minutes of training; 22 to go through all cells, 21
    for Tables 1 and 2."""
    profile = load_profile("paper")
    sizes, reached = run_sizes(profile), preflight.REACHED["cuda"]

    def minutes(*wanted: str) -> float:
        return run_seconds(profile, sizes, set(wanted), 0, 781e12, reached) / 60

    for file, expected in ((TRAINED, 5.2), (COUNTED, 22), (SCORED, 22), (VALIDATED, 21)):
        assert minutes(file) == pytest.approx(expected, rel=0.15), file
    # A twelfth of the training and a tenth of the cells, eight times.
    assert minutes(KINDS) == pytest.approx(8 * (5.2 / 12 + 2.2), rel=0.2)
    assert 120 < minutes(*EVERYTHING) < 180


def test_the_speed_of_products_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that says how long each product took: the fastest counts.
    clock = iter([0.0, 0.1, 1.0, 3.0, 0.2, 5.0, 5.5, 9.0])
    monkeypatch.setattr(preflight.time, "perf_counter", lambda: next(clock))
    profile = load_profile("smoke")
    found = preflight.matrix_rate(profile, TINY, CPU)
    assert found == pytest.approx(2 * profile.batch_tokens * 16 * 16 * profile.expansion / 0.5)


# --- the command ---------------------------------------------------------------------------------


def test_make_plan_says_everything_and_does_nothing(empty: Path, capsys: pytest.CaptureFixture[str]
                                                    ) -> None:
    assert main(["plan", "--profile", "smoke"]) == 0
    told = capsys.readouterr().out
    for word in ("smoke: 120 of 1,937 cells, about ", "disk  ", "memory  ", "time  ",
                 "download  1.4 MB: GO_Biological_Process_2025", " for 13 chapters",
                 "12_claims: not executed yet"):
        assert word in told, word
    assert not (empty / "results").exists()
    assert [path.name for path in (empty / "cache").iterdir()] == ["cells"]


@pytest.mark.parametrize(("changes", "told"), [
    ({"case_sentence": "none.csv"}, "check `case_sentence`"),
    ({"gene_sets": "nowhere"}, "nowhere named by the profile does not exist"),
    ({"case_type": "nobody"}, "No held-out cell has the type 'nobody'"),
    ({"site": "sae"}, "set `site: transcoder`"),
    # It was a KeyError of pandas in chapter 08.
    ({"model_layers": 1, "human_layer": 0}, "Set `model_layers` to at least 2"),
    ({"model": "some/model", "tokenizer": "some/model"}, "check `model`"),
    ({"cells": "/none.h5ad"}, "do not exist"),
    ({"label_column": "none"}, "set `label_column`"),
    ({"libraries": ["my sets"]}, "'my sets' is not the name of a gene-set library"),
    ({"case_library": "../mine"}, "'../mine' is not the name of a gene-set library"),
    ({"gene_groups": "nowhere.tsv"}, "nowhere.tsv cannot be read"),
    ({"gene_groups": "~nobody-here/groups.tsv"}, "home folder"),
    ({"encoding": "maxtoki", "token_dictionary": "x", "gene_medians": "y", "model_thinning": 1.0},
     "there is no file .*give the path of the model's dictionary"),
])
def test_what_will_fail_is_told_before_any_work(empty: Path, changes: dict[str, Any], told: str
                                                ) -> None:
    with pytest.raises(InputError, match=told):
        run_cost(load_profile("smoke", changes), WHOLE)


@pytest.mark.parametrize(("values", "told"), [
    (np.log1p(counts()), "rank-value encoding divides raw counts"),
    (counts() - 9.0, "has negative expression values"),
    (np.where(counts() > 9, np.nan, 1), "NaN, infinite")])
def test_values_that_cannot_be_used_are_told_before_any_work(empty: Path, values: np.ndarray,
                                                             told: str) -> None:
    """A look at some cells: not when a chapter reads all."""
    profile = profile_of(cells(empty, values), dictionaries(empty))
    with pytest.raises(InputError, match=told):
        run_cost(profile, WHOLE)


@pytest.mark.parametrize("rows", [11, 12, 13, 400])
def test_a_model_of_another_dictionary_is_told_before_any_work(empty: Path, rows: int) -> None:
    tiny("bert", vocabulary=rows).float().save_pretrained(empty / "model")
    profile = profile_of(cells(empty, counts()), dictionaries(empty), model_layers=None,
                         model=str(empty / "model"), tokenizer="train", human_layer=0)
    if rows in (12, 13):  # rows that fill up are no genes
        assert run_sizes(profile).vocabulary == rows
        return
    with pytest.raises(InputError, match=f"has 12 tokens, but the model has {rows} rows"):
        run_cost(profile, WHOLE)


def test_weights_that_are_missing_are_told_before_any_work(empty: Path) -> None:
    tiny("bert", vocabulary=12).float().save_pretrained(empty / "model")
    path = empty / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["bert.encoder.layer.1.intermediate.dense.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    profile = profile_of(cells(empty, counts()), dictionaries(empty), model_layers=None,
                         model=str(empty / "model"), tokenizer="train", human_layer=0)
    with pytest.raises(InputError, match=r"lacks the weights bert.encoder.layer.1.intermediate"):
        run_cost(profile, WHOLE)


@pytest.mark.parametrize("name", ["maxtoki", "geneformer", "geneformer_v1", "c2s_scale_1b",
                                  "c2s_scale_2b", "scgpt"])
def test_other_models_are_planned_before_anything_is_here(empty: Path, name: str) -> None:
    """Sizes, downloads and where they go are known from data/manifest.yml alone."""
    profile = load_profile(name)
    sizes = run_sizes(profile)
    listed = manifest.entry("models", manifest.model_name(profile.model, profile.model_subfolder))
    assert listed is not None and listed.get("revision") == profile.model_revision
    assert (sizes.layers, sizes.cells) == (profile.model_layers, profile.max_cells)
    if not profile.in_words:
        assert any("each counts as " in one for one in sizes.notes)
    found = {one.what: one.bytes for one in downloads.missing(profile, sizes.parameters)}
    if name == "scgpt":
        assert found[f"{profile.model}, by hand"] == sum(
            one["bytes"] for one in listed["files"].values()) > 4 * 51e6
        # Of the 51.86 million that its authors count, those of other heads are left out.
        assert sizes.parameters == 50_804_225
        assert any("in a browser" in one for one in downloads.notes(profile))
        told = run_cost(profile, WHOLE)
        assert "a value and no probability" in told.refusal and "\n" not in told.refusal
        assert "(training: " in told.text  # nothing else is done
        return
    weights = found[manifest.model_name(profile.model, profile.model_subfolder)]
    if "files" in listed:  # of Gemma 2, in half precision; else in single
        assert weights / sizes.parameters == pytest.approx(2 if name == "c2s_scale_2b" else 4,
                                                           rel=0.01)
    else:
        assert weights == 4 * sizes.parameters
    dictionaries = [getattr(profile, field) for field in ("token_dictionary", "gene_medians")]
    for one in filter(None, dictionaries):
        entry = manifest.entry("dictionaries", one)
        assert entry is not None and found[Path(entry["file"]).name] == entry["bytes"]


@pytest.mark.parametrize("field", ["model_layers", "model_width"])
def test_a_model_that_no_machine_holds_is_not_begun(field: str) -> None:
    with pytest.raises(InputError, match=f"`{field}`.* less than or equal to"):
        load_profile("smoke", {field: 10**9})


@pytest.mark.parametrize("field", ["training_tokens", "model_steps", "null_draws"])
def test_a_run_of_years_is_refused(empty: Path, monkeypatch: pytest.MonkeyPatch, field: str
                                   ) -> None:
    profile = load_profile("smoke", {field: 10**13})
    cost = run_cost(profile, WHOLE)
    assert cost.refusal.startswith("The run would take about ") and field in cost.refusal
    monkeypatch.setenv(preflight.ANYWAY, "1")
    cost = run_cost(profile, WHOLE)
    assert not cost.refusal and cost.seconds > preflight.MOST_SECONDS


@pytest.mark.parametrize(("name", "content", "told"), [
    ("KEGG_2021_Human", b"<html>\n", "KEGG_2021_Human.gmt is not a GMT file"),
    ("CellMarker_Augmented_2021", b"T\td\tVWF\nT\td\tKDR\n", "names the term 'T' twice"),
    ("KEGG_2021_Human", b"T\td\tNOGENE1\tNOGENE2\n",
     r"shares a gene with the cells \(its first gene is 'NOGENE1', theirs '[A-Z0-9-]+'\)"),
    ("KEGG_2021_Human", b"T\td\t" + b"\t".join(b"G%d" % i for i in range(20_001)) + b"\tLYZ",
     "smaller than the term 'T'"),
])
@pytest.mark.parametrize("stored", [False, True], ids=["no corpus", "a corpus"])
def test_a_library_that_cannot_be_used_is_told_before_any_work(
        empty: Path, name: str, content: bytes, told: str, stored: bool) -> None:
    profile = load_profile("smoke", {"libraries": ["KEGG_2021_Human"]})
    if stored:
        load_corpus(profile)
    (empty / "gene_sets" / f"{name}.gmt").write_bytes(content)
    with pytest.raises(InputError, match=told):
        run_cost(profile, WHOLE)


def test_a_bad_rating_sheet_is_told_before_any_work(empty: Path, monkeypatch: pytest.MonkeyPatch
                                                    ) -> None:
    monkeypatch.setattr(downloads, "SHEETS", empty)
    (empty / "ab.csv").write_text("card,rater\nc01,ab\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"ab\.csv"):
        run_cost(load_profile("smoke"), WHOLE)


def test_what_is_read_otherwise_than_it_stands_is_told(empty: Path) -> None:
    (empty / "gene_sets" / "Mine.gmt").write_bytes(b"T\tLYZ\tCD3D\nU\tCD3D\tLYZ\n")
    folder = empty / "tokenizer"
    tokenizer = load_corpus(load_profile("smoke")).tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save_pretrained(folder)
    tiny_model(vocabulary=len(tokenizer), dtype=torch.float32).save_pretrained(folder)
    given = {"libraries": ["Mine"], "model": str(folder), "tokenizer": str(folder),
             "model_layers": None, "human_layer": 0}
    told = run_cost(load_profile("smoke", given), WHOLE).text
    assert "Mine: The file has no column of descriptions" in told
    assert "'<|endoftext|>' before each text" in told
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(InputError, match="no token for 'A'"):
        run_cost(load_profile("smoke", given), WHOLE)


def test_what_reading_the_cells_will_leave_out_is_told(empty: Path) -> None:
    cells = scanpy.datasets.pbmc68k_reduced().raw.to_adata()
    cells.var_names = ["1-Mar", "", *cells.var_names[2:]]
    cells.write_h5ad(empty / "cells.h5ad")
    given = {"cells": str(empty / "cells.h5ad"), "matrix": "X", "label_column": "bulk_labels",
             "symbol_rule": "as_written", "case_type": "CD14+ Monocyte"}
    told = run_cost(load_profile("smoke", given), WHOLE)
    assert "  note      1 of 765 genes were left out" in told.text and "'1-Mar'" in told.text
    assert not told.refusal


@pytest.mark.parametrize("kind", [sp.csr_matrix, np.asarray])
@pytest.mark.parametrize(("bare", "genes", "told"), [
    (8, 9, "In at least 8 of 60 cells of .* no gene"), (60, 9, "In none of the 32"),
    (6, 9, ""), (0, 3, "have 3 genes at most")])
def test_cells_of_too_few_genes_are_told_before_any_work(empty: Path, kind: Any, bare: int,
                                                         genes: int, told: str) -> None:
    """Of a dense matrix some cells alone are looked at."""
    symbols = scanpy.datasets.pbmc68k_reduced().raw.var_names[:genes]
    values = np.arange(60 * genes, dtype=np.float32).reshape(60, genes) + 1
    values[:bare] = 0
    data = anndata.AnnData(kind(values), pd.DataFrame(
        {"kind": ["a", "b", "b"] * 20}, map(str, range(60))), pd.DataFrame(index=symbols))
    data.write_h5ad(empty / "cells.h5ad")
    profile = load_profile("smoke", {
        "cells": str(empty / "cells.h5ad"), "matrix": "X", "label_column": "kind",
        "symbol_rule": "as_written", "case_type": "b", "max_cells": None})
    if not told or (bare == 8 and kind is np.asarray):
        run_cost(profile, WHOLE)
        return
    with pytest.raises(InputError, match=told):
        run_cost(profile, WHOLE)


@pytest.mark.parametrize("label", ["nan", "Unknown ", ""])
def test_a_case_that_names_no_type_is_told(empty: Path, label: str) -> None:
    cells = scanpy.datasets.pbmc68k_reduced().raw.to_adata()
    kinds = cells.obs["bulk_labels"].astype(str)
    cells.obs["bulk_labels"] = kinds.where(kinds != "CD14+ Monocyte", label)
    cells.write_h5ad(empty / "cells.h5ad")
    given = {"cells": str(empty / "cells.h5ad"), "matrix": "X", "label_column": "bulk_labels",
             "case_type": label}
    told = run_cost(load_profile("smoke", given), WHOLE)
    assert f"`case_type` is {label.strip()!r}, which names no type" in told.text
    assert not told.refusal
    assert "names no type" not in run_cost(load_profile("smoke"), WHOLE).text


def test_what_does_not_fit_is_refused_before_anything_is_executed(
        empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["book", "execute", "--profile", "smoke", "-p", "expansion=10000000"]) == 1
    printed, error = capsys.readouterr()
    assert "memory    about" in printed and "time  " not in printed
    assert "lower `expansion` in the profile" in error and "Traceback" not in error
    assert not (empty / "results").exists()


def test_gene_sets_that_will_be_missed_are_told(empty: Path, monkeypatch: pytest.MonkeyPatch
                                                ) -> None:
    monkeypatch.setenv("SCFM_OFFLINE", "1")
    told = run_cost(load_profile("smoke"), WHOLE, ["06_enrichment"]).text
    assert "download " not in told and "for 1 chapter," in told
    assert "CellMarker_Augmented_2021 are not here and downloads are off" in told


def test_a_cell_may_take_several_times_what_the_run_is_expected_to(
        empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    def executed(run: Any, notebook: Any, limit: int, kernel: Any) -> float:
        limits.append(limit)
        raise KeyboardInterrupt

    monkeypatch.setattr(execution, "_execute_one", executed)
    monkeypatch.delenv("SCFM_CELL_SECONDS", raising=False)
    monkeypatch.setenv("SCFM_OFFLINE", "1")
    for seconds in (10_000.0, 1.0):
        monkeypatch.setattr(book, "announce", lambda run, jobs, told=seconds: (
            {"01_a": 0.4 * told, "02_b": 0.6 * told}, jobs))
        assert main(["book", "execute", "--profile", "smoke"]) == 130
    monkeypatch.setenv("SCFM_CELL_SECONDS", "77")
    assert main(["book", "execute", "--profile", "smoke"]) == 130
    assert limits == [execution.TIMES_EXPECTED * 10_000, execution.CELL_SECONDS, 77]


def test_an_estimate_that_fails_keeps_nobody_from_work(
        empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(book.sys, "executable", "/bin/false")
    assert book.announce(load_run("smoke")) == ({}, None)
    assert "cannot be told (no answer)" in capsys.readouterr().out
