"""What is kept is read only while it is current."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from scfm_circuits.common import kept
from scfm_circuits.common.files import write_atomic
from scfm_circuits.common.profile import load_profile


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("__init__", "common/files", "cells/reading", "cells/deep/er/x", "book/cli"):
        path = tmp_path / "package" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    monkeypatch.setattr(kept, "PACKAGE", tmp_path / "package")
    kept.room_hash.cache_clear()
    yield tmp_path / "package"
    kept.room_hash.cache_clear()


def test_a_room_is_all_that_is_in_it(package: Path) -> None:
    def now(room: str = "cells") -> str:
        kept.room_hash.cache_clear()
        return kept.room_hash(room)

    seen = {now()}
    (package / "book" / "cli.py").write_text("x = 1")
    (package / "common" / "files.py").write_text("x = 1")
    assert {now()} == seen
    deep = {now("cells/deep"), now("cells/deep/er/x")}
    for name in ("cells/deep/er/x", "cells/new"):
        (package / f"{name}.py").write_text("x = 1")
        seen.add(now())
    assert not deep & {now("cells/deep"), now("cells/deep/er/x")}
    (package / "cells" / "new.py").rename(package / "cells" / "newer.py")
    seen.add(now())
    assert len(seen) == 4
    with pytest.raises(KeyError):
        kept.room_hash("no such room")


def test_what_lies_beside_the_rooms_is_common(package: Path) -> None:
    before = kept.room_hash("common")
    (package / "__init__.py").write_text("x = 1")
    kept.room_hash.cache_clear()
    assert kept.room_hash("common") != before
    assert kept.room_of(package / "__main__.py") == "book"  # it only calls what others do


def test_a_stamp_names_what_a_result_is_made_from(tmp_path: Path) -> None:
    profile = load_profile("smoke")
    found = kept.stamp_of(profile, ("seed", "libraries"), ("cells",), layers=(1, 2))
    assert found["fields"] == {"seed": profile.seed, "libraries": list(profile.libraries)}
    assert found["sources"] == {room: kept.room_hash(room) for room in ("cells", "common")}
    assert "torch" in found["versions"] and found["layers"] == [1, 2]
    # What was written is what it is held against, whatever its types were.
    record = tmp_path / "record.json"
    kept.write_record(record, {"stamp": found, "steps": 3})
    assert kept.read_record(record, found) == {"stamp": found, "steps": 3, "files": {}}
    assert kept.read_record(record, kept.stamp_of(profile, ("seed",), ("cells",))) is None


WHOLE = bytes(range(256)) * 40


@pytest.mark.parametrize(("file", "content", "reason"), [
    ("a.bin", None, "a.bin is missing"), ("a.bin", b"", "a.bin is not as it was written"),
    ("deep/b.bin", WHOLE[:-1], "deep/b.bin is not as it was written"),
    ("a.bin", WHOLE[:-1] + b"x", "a.bin is not as it was written"),  # of the same size
    ("record.json", None, "record.json cannot be read"),
    ("record.json", b'{"stamp"', "record.json cannot be read"),
])
def test_a_kept_folder_counts_only_if_it_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes | None,
    reason: str,
) -> None:
    folder, stamp = tmp_path / "kept", {"fields": {"seed": 1}}
    for name in ("a.bin", "deep/b.bin"):
        write_atomic(folder / name, WHOLE)
    kept.write_record(folder / "record.json", {"stamp": stamp})
    assert kept.read_record(folder / "record.json", stamp) is not None
    (folder / "beside").touch()  # is nobody's
    assert kept.read_record(folder / "record.json", stamp) is not None
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    assert capsys.readouterr().out == ""
    assert kept.read_record(folder / "record.json", stamp) is None
    assert capsys.readouterr().out == (
        f"{os.path.relpath(folder)} is not whole ({reason}); it is made again.\n")


def test_what_was_never_there_or_is_not_current_is_no_news(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kept.read_record(tmp_path / "none" / "record.json", {}) is None
    assert kept.read_arrays(tmp_path / "none.npz", {}) is None
    kept.write_record(tmp_path / "record.json", {"stamp": {"a": 1}})
    kept.write_arrays(tmp_path / "x.npz", {"a": 1}, {"x": np.zeros(3)})
    assert kept.read_record(tmp_path / "record.json", {"a": 2}) is None
    assert kept.read_arrays(tmp_path / "x.npz", {"a": 2}) is None
    assert capsys.readouterr().out == ""


def test_arrays_are_made_once_and_again_when_they_are_not_current(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, made = tmp_path / "folder" / "x.npz", []

    def get(name: str) -> int:
        def make() -> int:
            made.append(name)
            return len(made)

        return kept.kept_arrays(path, {"name": name}, make, lambda one: {"x": np.array(one)},
                                lambda arrays: int(arrays["x"]))

    assert [get("a"), get("a"), get("b"), get("b")] == [1, 1, 2, 2] and made == ["a", "b"]
    path.write_bytes(path.read_bytes()[:100])
    assert capsys.readouterr().out == "" and get("b") == 3
    assert capsys.readouterr().out.startswith(f"{os.path.relpath(path)} is not whole (")
    kept.write_arrays(path, {"name": "b"}, {"another": np.zeros(3)})
    assert get("b") == 4 and get("b") == 4
