"""What a run is told to cost, what is refused, and that the advice given helps."""

import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import tiny_model, tiny_profile
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from test_speed_probe import sizes_of

from scfm_circuits import InputError
from scfm_circuits.book import cli as book
from scfm_circuits.book import execution, run_memory, run_plan
from scfm_circuits.book.chapters import NOTEBOOKS, load_run, read_notebooks
from scfm_circuits.book.run_memory import FIELDS, memory_problems, memory_stages
from scfm_circuits.book.run_sizes import run_sizes
from scfm_circuits.common.profile import Profile, load_profile
from scfm_circuits.transcoders.training.settings import memory_needed

CPU = torch.device("cpu")
ENDLESS = sizes_of(tiny_model(vocabulary=3000))._replace(cells=10**8, held_out=10**6)
CHAPTERS = [one.name for one in read_notebooks(NOTEBOOKS)]


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which nothing has been fetched or made, without a network."""
    for name in ("RESULTS", "DATA", "CACHE", "GENE_SETS"):
        monkeypatch.setenv(f"SCFM_{name}", str(tmp_path / name.lower()))
    monkeypatch.delenv(run_plan.ANYWAY, raising=False)
    monkeypatch.delenv("SCFM_OFFLINE", raising=False)
    (tmp_path / "gene_sets").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


# --- downloads and disk --------------------------------------------------------------------------


def test_what_the_paper_fetches(empty: Path) -> None:
    profile = load_profile("paper")
    sizes = run_sizes(profile)
    found = {one.what: one for one in run_plan.downloads(profile, sizes)}
    assert list(found) == ["Global_raw.h5ad", profile.model, "GO_Biological_Process_2025",
                           "KEGG_2021_Human", "CellMarker_Augmented_2021"]
    assert found["Global_raw.h5ad"].bytes == 9_125_578_296
    assert found[profile.model].bytes == 4 * sizes.parameters and not found[profile.model].exact
    (empty / "data").mkdir()
    (empty / "data" / "Global_raw.h5ad.part").write_bytes(bytes(1000))
    (empty / "gene_sets" / "KEGG_2021_Human.gmt").write_text("a\t\tB\n")
    found = {one.what: one for one in run_plan.downloads(profile, sizes)}
    assert found["Global_raw.h5ad"].bytes == 9_125_578_296 - 1000
    assert "KEGG_2021_Human" not in found


def test_what_is_here_is_not_fetched(empty: Path) -> None:
    tiny_model().save_pretrained(empty / "model")
    profile = load_profile("smoke", {"model": str(empty / "model"), "model_layers": None,
                                     "tokenizer": str(empty / "model")})
    names = [one.what for one in run_plan.downloads(profile, sizes_of(tiny_model()))]
    assert names == [*profile.libraries, profile.case_library]


def test_a_full_disk_is_told_before_anything_is_done(empty: Path, monkeypatch: pytest.MonkeyPatch
                                                     ) -> None:
    profile = load_profile("paper")

    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 5 * 10**9))
    monkeypatch.setattr(run_memory, "memory_available", lambda device: 2**50)
    monkeypatch.setattr(run_plan, "measure_speeds", pytest.fail)
    plan = run_plan.plan_run(profile, CHAPTERS)
    (problem,) = plan.problems  # all folders are on one disk
    assert str(empty / "data") in problem and "has 5.0 GB free" in problem
    assert "SCFM_RESULTS" in problem and "`max_cells`" in problem
    needed = float(re.search(r"up to ([\d.]+) GB", problem)[1])  # type: ignore[index]
    assert needed == pytest.approx(sum(plan.disk.values()) / 1e9, abs=0.06)
    assert run_plan.refusal(plan).splitlines() == [
        problem, "(To try all the same, set SCFM_ANYWAY=1.)"]
    monkeypatch.setenv(run_plan.ANYWAY, "1")
    assert run_plan.refusal(plan) == ""


def test_what_is_there_already_is_not_written_again(empty: Path) -> None:
    profile = load_profile("smoke")
    sizes = sizes_of(tiny_model())

    def needed(*stale: str) -> int:
        return run_plan.disk_needed(profile, sizes, [], stale)[profile.results]

    before, alone = needed(*CHAPTERS), needed("09_variants")
    assert before > alone > needed("11_claims")
    size = run_memory.transcoder_bytes(profile, sizes)
    (profile.results / "transcoders").mkdir(parents=True)
    (profile.results / "transcoders" / "layer_0.safetensors").write_bytes(bytes(size - 1000))
    assert needed(*CHAPTERS) == before - size + 1000 and needed("09_variants") == alone
    (profile.results / "transcoders" / "of another width").write_bytes(bytes(10 * size))
    assert needed(*CHAPTERS) == before - size  # what is too much is no room for others


def test_a_cache_with_a_configuration_alone_lacks_the_model(empty: Path) -> None:
    snapshot = empty / "hub" / "models--some--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    refs = empty / "hub" / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    assert not run_plan._is_here("some/model", None, weights=True)
    (snapshot / "model.safetensors").write_bytes(b"")
    assert run_plan._is_here("some/model", None, weights=True)
    assert not run_plan._is_here("some/model", None, weights=False)
    (snapshot / "tokenizer.json").write_text("{}")
    assert run_plan._is_here("some/model", None, weights=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_told(empty: Path) -> None:
    (empty / "results").mkdir(mode=0o500)
    with pytest.raises(InputError, match=r"Nothing can be written into .*results; name other"):
        run_plan.plan_run(load_profile("smoke"), CHAPTERS)


def test_a_broken_file_of_the_manifest_is_no_obstacle(empty: Path) -> None:
    (empty / "data").mkdir()
    (empty / "data" / "Global_raw.h5ad").write_bytes(b"broken")
    assert run_sizes(load_profile("paper")).cells_in_file == 704_296


# --- memory --------------------------------------------------------------------------------------


def test_the_papers_memory_on_a_gpu(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = load_profile("paper")
    sizes = run_sizes(profile)
    stages = {one.name: one for one in memory_stages(profile, sizes, torch.device("cuda"))}
    training = stages["training"].parts
    # By hand: 131,072 tokens of 24 layers, read and written, 1,024 wide, in bfloat16.
    assert training["buffer"] == 131_072 * 24 * 2 * 1024 * 2
    assert training["model in the type of training"] == 2 * sizes.parameters
    assert training["parameters and Adam"] == pytest.approx(24 * 2 * 8192 * 1024 * 12, rel=0.01)
    assert stages["validation"].parts["logits"] == 16 * 32 * round(sizes.length) * 50_304
    assert stages["validation"].parts["attention"] == 12 * 32 * 16 * sizes.padded**2
    both = [one for one in memory_stages(profile, sizes, torch.device("cuda"))
            if one.name == "counting features"]
    assert {one.on_device for one in both} == {True, False}
    assert max(one.bytes for one in stages.values() if one.on_device) < 40 * 2**30
    held = [one.bytes for one in memory_stages(profile, sizes, CPU)]
    assert held == sorted(held, reverse=True)


def test_no_control_needs_no_memory_for_it(empty: Path) -> None:
    profile = load_profile("smoke", {"reinitialised_control": False})
    names = [one.name for one in memory_stages(profile, sizes_of(tiny_model()), CPU)]
    assert "the control's training" not in names and "training" in names


def test_every_field_that_is_named_scales_its_part(empty: Path, monkeypatch: pytest.MonkeyPatch
                                                   ) -> None:
    profile = tiny_profile(monkeypatch, empty, batch_tokens=32, buffer_tokens=64, expansion=4,
                           forward_cells=2)
    sizes = sizes_of(tiny_model())
    assert sizes.training_tokens == 86 and memory_needed(profile, 86, 3, 16)["buffer"]

    def parts(other: Profile) -> dict[tuple[str, str], int]:
        return {(one.name, part): size for one in memory_stages(other, sizes, CPU)
                for part, size in one.parts.items()}

    for field, some in FIELDS.items():
        halved = parts(profile.model_copy(update={field: getattr(profile, field) // 2}))
        for (stage, part), size in parts(profile).items():
            if part == "freed and kept":
                assert halved[stage, part] <= size
            elif part == "feature counts" and field == "expansion":
                assert halved[stage, part] < size  # tokens are the limit of these few
            elif part in some:
                assert halved[stage, part] == pytest.approx(size / 2, rel=0.1), (stage, part)
            else:
                assert halved[stage, part] == size, (field, stage, part)


@given(share=st.floats(0.2, 0.999), name=st.sampled_from(["buffer", "expansion", "logits"]))
def test_the_advice_helps(share: float, name: str) -> None:
    large: dict[str, dict[str, Any]] = {
        "buffer": {"buffer_tokens": 10**9}, "expansion": {"expansion": 10**7},
        "logits": {"forward_cells": 10**9}}
    profile, sizes = load_profile("smoke", large[name]), ENDLESS
    stages = memory_stages(profile, sizes, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_memory, "memory_available", lambda device: int(share * stages[0].bytes))
        problem, *_ = memory_problems(profile, sizes, stages, CPU)
        assert "this machine has" in problem
        told = re.search(r"lower `(\w+)` in the profile.*; ([\d,]+) would fit", problem)
        if told is None:  # nothing alone is enough
            assert f"{stages[0].name[1:]} needs" in problem and "alone is enough" in problem
            return
        helped = profile.model_copy(update={told[1]: int(told[2].replace(",", ""))})
        Profile.model_validate({**dict(helped), "name": "n"})  # a value that the profile takes
        again = memory_stages(helped, sizes, CPU)
        assert next(one.bytes for one in again if one.name == stages[0].name
                    ) <= share * stages[0].bytes


@pytest.mark.parametrize(("lines", "files", "left"), [
    ("0::/job/step", {"job": ("9000", "5000", "file 700\nanon 1"),
                      "job/step": ("max", "10", "file 0\n")}, [4700]),
    ("0::/", {"": ("9000", "5000", "file 700\n")}, [4700]),
    ("4:memory:/job\n3:cpu:/other", {"memory/job": ("9000", "5000", "total_cache 300\n"),
                                     "memory": ("99000", "5000", "total_cache 0\n")},
     [4300, 94000]),
    ("0::/gone", {}, []),
])
def test_limits_of_containers_and_jobs(tmp_path: Path, lines: str, files: dict[str, Any],
                                       left: list[int]) -> None:
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    second = ("memory.max", "memory.current", "memory.stat")
    for folder, contents in files.items():
        (tmp_path / "group" / folder).mkdir(parents=True, exist_ok=True)
        names = first if folder.startswith("memory") else second
        for name, content in zip(names, contents, strict=True):
            (tmp_path / "group" / folder / name).write_text(content)
    (tmp_path / "own").write_text(lines)
    assert run_memory._group_limits(tmp_path / "group", tmp_path / "own") == left


def test_each_field_is_named_once_with_a_value_for_all(empty: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    profile = load_profile("smoke", {"buffer_tokens": 10**9, "training_tokens": 10**9})
    sizes = ENDLESS
    stages = memory_stages(profile, sizes, CPU)
    monkeypatch.setattr(run_memory, "memory_available", lambda device: 50 * 2**30)
    (problem,) = memory_problems(profile, sizes, stages, CPU)
    helped = profile.model_copy(update={"buffer_tokens": int(
        re.search(r"; ([\d,]+) would fit", problem)[1].replace(",", ""))})  # type: ignore[index]
    assert memory_problems(helped, sizes, memory_stages(helped, sizes, CPU), CPU) == []
    # Chapters that are fresh need nothing.
    assert {one.name for one in stages if one.serves(["03_validation", "11_claims"])} == {
        "validation"}


# --- the command ---------------------------------------------------------------------------------


def test_make_plan_says_everything_and_does_nothing(empty: Path, capsys: pytest.CaptureFixture[str]
                                                    ) -> None:
    assert book.main(["plan", "--profile", "smoke"]) == 0
    told = capsys.readouterr().out
    for word in ("smoke: 120 of 700 cells, about ", "disk  ", "memory  ", "time  ",
                 "download  1.4 MB: GO_Biological_Process_2025", "tokens/s through the model",
                 "03_validation  ", "11_claims: not executed yet"):
        assert word in told, word
    assert not (empty / "results").exists() and not (empty / "cache").exists()


@pytest.mark.parametrize(("changes", "told"), [
    ({"case_sentence": "none.csv"}, "check `case_sentence`"),
    ({"gene_sets": "nowhere"}, "nowhere named by the profile does not exist"),
    ({"case_type": "nobody"}, "No held-out cell has the type 'nobody'"),
    ({"site": "sae"}, "set `site: transcoder`"),
])
def test_what_will_fail_is_told_before_any_work(empty: Path, changes: dict[str, Any], told: str
                                                ) -> None:
    with pytest.raises(InputError, match=told):
        run_plan.plan_run(load_profile("smoke", changes), CHAPTERS)


def test_what_does_not_fit_is_refused_before_anything_is_executed(
        empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert book.main(["execute", "--profile", "smoke", "-p", "expansion=10000000"]) == 1
    printed, error = capsys.readouterr()
    assert "memory    about" in printed and "time  " not in printed
    assert "lower `expansion` in the profile" in error and "Traceback" not in error
    assert not (empty / "results").exists()


def test_gene_sets_that_will_be_missed_are_told(empty: Path, monkeypatch: pytest.MonkeyPatch
                                                ) -> None:
    monkeypatch.setenv("SCFM_OFFLINE", "1")
    monkeypatch.setattr(run_plan, "measure_speeds", lambda *_: None)
    profile = load_profile("smoke")
    told = run_plan.describe_plan(profile, run_plan.plan_run(profile, CHAPTERS))
    assert "download " not in told
    assert "CellMarker_Augmented_2021 are not here and downloads are off" in told


def test_a_cell_may_take_several_times_what_its_chapter_is_expected_to(
        empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    def executed(run: Any, notebook: Any, limit: int) -> float:
        limits.append(limit)
        raise KeyboardInterrupt

    monkeypatch.setattr(execution, "_execute_one", executed)
    monkeypatch.setattr(book, "_announce", lambda run: 10_000.0)
    monkeypatch.delenv("SCFM_CELL_SECONDS", raising=False)
    assert book.main(["execute", "--profile", "smoke"]) == 130
    monkeypatch.setattr(book, "_announce", lambda run: 1.0)
    assert book.main(["execute", "--profile", "smoke"]) == 130
    monkeypatch.setenv("SCFM_CELL_SECONDS", "77")
    assert book.main(["execute", "--profile", "smoke"]) == 130
    assert limits == [execution.TIMES_EXPECTED * 10_000, execution.CELL_SECONDS, 77]


def test_an_estimate_that_fails_keeps_nobody_from_work(
        empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(book.sys, "executable", "/bin/false")
    assert book._announce(load_run("smoke")) == 0.0
    assert "cannot be told (no answer)" in capsys.readouterr().out
