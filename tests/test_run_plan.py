"""What a run is told to cost, what is refused, and that the advice given helps."""

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

from scfm_circuits import InputError, book, run_memory, run_plan, speed_probe
from scfm_circuits.profile import Profile, load_profile
from scfm_circuits.run_memory import FIELDS, memory_problems, memory_stages
from scfm_circuits.run_sizes import run_sizes
from scfm_circuits.training_plan import memory_needed

CPU = torch.device("cpu")


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
    monkeypatch.setattr(speed_probe, "SECONDS", 0.0)
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
    plan = run_plan.plan_run(profile)
    (problem,) = plan.problems  # all folders are on one disk
    assert str(empty / "data") in problem and "has 5.0 GB free" in problem
    assert "SCFM_RESULTS" in problem and "`max_cells`" in problem
    needed = float(re.search(r"up to ([\d.]+) GB", problem)[1])  # type: ignore[index]
    assert needed == pytest.approx(sum(plan.disk.values()) / 1e9, abs=0.06)
    with pytest.raises(InputError, match=r"has 5.0 GB free[^$]*SCFM_ANYWAY=1"):
        run_plan.check_plan(plan)
    monkeypatch.setenv(run_plan.ANYWAY, "1")
    run_plan.check_plan(plan)


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
    assert not stages["counting features"].on_device
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

    def parts(other: Profile) -> dict[str, int]:
        return {part: size for one in memory_stages(other, sizes, CPU)
                for part, size in one.parts.items()}

    for field, some in FIELDS.items():
        halved = parts(profile.model_copy(update={field: getattr(profile, field) // 2}))
        for part, size in parts(profile).items():
            if part == "feature counts" and field == "expansion":
                assert halved[part] < size  # tokens are the limit of these few
            elif part in some:
                assert halved[part] == pytest.approx(size / 2, rel=0.1), part
            else:
                assert halved[part] == size, part


@given(share=st.floats(0.2, 0.999), name=st.sampled_from(["buffer", "expansion", "logits"]))
def test_the_advice_helps(share: float, name: str) -> None:
    large: dict[str, dict[str, Any]] = {
        "buffer": {"buffer_tokens": 10**9}, "expansion": {"expansion": 10**7},
        "logits": {"forward_cells": 10**9}}
    profile = load_profile("smoke", large[name])
    sizes = sizes_of(tiny_model(vocabulary=3000))._replace(cells=10**8, held_out=10**6)
    stages = memory_stages(profile, sizes, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_memory, "memory_available", lambda device: int(share * stages[0].bytes))
        problem, *_ = memory_problems(profile, sizes, stages, CPU)
        assert "this machine has" in problem
        field, value = re.search(r"lower `(\w+)`.*; ([\d,]+) would fit", problem).groups()  # type: ignore[union-attr]
        helped = profile.model_copy(update={field: int(value.replace(",", ""))})
        again = memory_problems(helped, sizes, memory_stages(helped, sizes, CPU), CPU)
        first = stages[0].name
        assert not any(one.lower().startswith(first.lower()) for one in again)


def test_memory_that_is_free_is_that_of_the_machine() -> None:
    assert 2**27 < run_memory.memory_available(CPU) < 2**50


# --- the command ---------------------------------------------------------------------------------


def test_make_plan_says_everything_and_does_nothing(empty: Path, capsys: pytest.CaptureFixture[str]
                                                    ) -> None:
    assert book.main(["plan", "--profile", "smoke"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("smoke: 120 of 700 cells, about ")
    for word in ("download  1.4 MB: GO_Biological_Process_2025", "disk  ", "memory  ", "time  ",
                 "03_validation", "tokens/s through the model", "11_claims: not executed yet"):
        assert word in told, word
    assert not (empty / "results").exists() and not (empty / "cache").exists()


def test_what_cannot_fit_ends_before_anything_is_executed(
        empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--profile", "smoke", "-p", "expansion=10000000"]
    assert book.main(["execute", *words]) == 1
    error = capsys.readouterr().err
    assert "lower `expansion` in the profile" in error and "SCFM_ANYWAY=1" in error
    assert not (empty / "results").exists()


def test_gene_sets_that_will_be_missed_are_told_first(
        empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SCFM_OFFLINE", "1")
    assert book.main(["plan", "--profile", "smoke"]) == 0
    told = capsys.readouterr().out
    assert "download " not in told
    assert "CellMarker_Augmented_2021 are not here and downloads are off" in told
    assert book.main(["execute", "--profile", "smoke", "-p", "gene_sets=nowhere"]) == 1
    assert "nowhere named by the profile does not exist" in capsys.readouterr().err
    assert not (empty / "results").exists()


def test_a_sentence_that_cannot_be_traced_is_told_first(empty: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--profile", "smoke", "-p", "case_sentence=none.csv"]
    assert book.main(["execute", *words]) == 1
    assert "check `case_sentence`" in capsys.readouterr().err
    assert not (empty / "results").exists()
