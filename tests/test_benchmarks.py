"""Benchmarks say what they do, and leave out what the processor cannot do."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).with_name("benchmarks")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import machine

    return machine


@pytest.fixture
def training(machine: ModuleType) -> ModuleType:
    import bench_training

    return bench_training


@pytest.mark.parametrize(("key", "flags", "able"), [
    ("flags", "fpu avx2 avx512f avx512_bf16", True), ("flags", "fpu avx2 amx_bf16", True),
    ("Features", "fp asimd bf16", True), ("flags", "fpu avx2 avx512f", False),
    ("Features", "fp asimd", False), ("none", "", False),
])
def test_what_the_processor_says_of_bfloat16(machine: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                             key: str, flags: str, able: bool) -> None:
    monkeypatch.setattr(machine, "_cpu_line", lambda name: flags if name == key else "")
    assert machine.multiplies_bfloat16() is able


@pytest.mark.parametrize("able", [True, False])
def test_products_that_would_be_emulated_are_left_out_and_said(
        training: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        able: bool) -> None:
    monkeypatch.setattr(training, "multiplies_bfloat16", lambda: able)
    size = training.Size("cpu", 1, 1, 16, 8, 32)
    found = training.step_figures(size, 1)
    assert found["seconds_step"] > 0
    assert any("bfloat16" in name for name in found) == able
    assert ("Left out: steps in bfloat16" in capsys.readouterr().out) != able


def test_a_part_is_named_before_it_starts(training: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    def work(*given: Any) -> dict[str, float]:
        assert capsys.readouterr().out == "memory_figure topk ...\n"
        return {"seconds": 1.0}

    monkeypatch.setattr(training, "_apart", work)

    def memory_figure() -> dict[str, float]:
        raise AssertionError("it runs in a process of its own")

    assert training.apart(1, 0.0, memory_figure, "topk") == {"seconds": 1.0}
    assert re.fullmatch(r"\(memory_figure topk took \d+ seconds\)\nseconds: 1\n",
                        capsys.readouterr().out)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("bench_*.py")), ids=lambda path: path.stem)
def test_every_benchmark_names_its_parts(path: Path) -> None:
    assert re.search(r"^ +with part\(", path.read_text(encoding="utf-8"), re.MULTILINE)
