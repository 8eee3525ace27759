"""Files appear whole or not at all."""

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from scfm_circuits.common import files
from scfm_circuits.common.files import (
    atomic_folder,
    atomic_path,
    read_json,
    sha256_of_file,
    sweep,
    write_atomic,
    write_json,
)


def test_text_and_bytes_are_written_and_folders_made(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "a" / "b.txt", "λ\n")
    assert path.read_bytes() == "λ\n".encode()
    assert write_atomic(path, b"\x00\xff").read_bytes() == b"\x00\xff"
    assert os.listdir(path.parent) == ["b.txt"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "table.csv", "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        assert temporary.suffix == ".csv" and temporary.parent == tmp_path
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["table.csv"]


def test_nobody_sees_half_a_file(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "table.csv", "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    written = write_atomic(tmp_path / "written", "")
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with atomic_folder(folder) as fresh:
        (fresh / "old").write_text("1")
        assert not folder.exists()
    with atomic_folder(folder) as fresh:
        (fresh / "new").write_text("2")
        assert os.listdir(folder) == ["old"]
    assert os.listdir(folder) == ["new"] and os.listdir(tmp_path) == ["model"]


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_atomic(folder / "old", "1")
    with pytest.raises(RuntimeError), atomic_folder(folder) as fresh:
        (fresh / "new").write_text("2")
        raise RuntimeError
    assert os.listdir(folder) == ["old"] and os.listdir(tmp_path) == ["model"]


def test_a_failed_rename_leaves_the_old_folder(tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    write_atomic(folder / "old", "1")
    rename = Path.rename

    def full_disk(self: Path, target: Path) -> Path:
        if (self / "new").exists():
            raise OSError("no space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(OSError, match="no space"), atomic_folder(folder) as fresh:
        (fresh / "new").write_text("2")
    assert os.listdir(folder) == ["old"] and os.listdir(tmp_path) == ["model"]


def test_what_is_written_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a", "")  # where nobody asks, nothing happens
    monkeypatch.setenv(files.NOTES, str(tmp_path / "notes"))
    write_atomic(tmp_path / "b", "")
    with atomic_folder(tmp_path / "c") as fresh:
        (fresh / "d").touch()
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "e"):
        raise RuntimeError
    assert (tmp_path / "notes").read_text() == f"{tmp_path / 'b'}\n{tmp_path / 'c'}\n"


def test_what_takes_a_name_is_on_the_disk_before(tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    seen, fsync = [], os.fsync

    def noted(handle: int) -> None:
        seen.append((Path(os.readlink(f"/proc/self/fd/{handle}")).name,
                     (tmp_path / "folder").exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    with atomic_folder(tmp_path / "folder") as fresh:
        (fresh / "deep").mkdir()
        for name in ("a", "deep/b"):
            (fresh / name).write_text("1")
    assert seen == [("a", False), ("b", False)]


def test_what_a_killed_process_was_writing_goes_after_an_hour(tmp_path: Path) -> None:
    writing = [atomic_path(tmp_path / "deep" / "a.csv"), atomic_path(tmp_path / "b"),
               atomic_folder(tmp_path / "model")]
    left = [one.__enter__() for one in writing]
    (left[2] / "half").touch()
    mine = [tmp_path / ".lock", tmp_path / "deep" / ".a-settings.txt", tmp_path / "a-12345678.csv"]
    for path in mine:
        path.touch()
        os.utime(path, (0, 0))
    sweep(tmp_path)
    assert all(path.exists() for path in (*left, *mine))  # nobody can tell yet
    for path in left:
        os.utime(path, (0, 0))
    sweep(tmp_path)
    assert not any(path.exists() for path in left) and all(path.exists() for path in mine)


def test_json_is_sorted_and_refuses_nan(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", {"b": 1, "a": [1.5]})
    assert list(json.loads(path.read_text())) == ["a", "b"]
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"b": 1, "a": [1.5]}


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff\xfe"])
def test_what_is_no_json_object_reads_as_empty(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content.encode("latin-1"))
    assert read_json(path) == {}
    assert read_json(tmp_path / "none.json") == {}


def test_sha256(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "a", b"abc" * 100_000)
    assert sha256_of_file(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()
