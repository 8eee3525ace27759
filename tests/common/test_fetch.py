"""Downloads from a host on this machine that behaves as badly as the real ones do."""

import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import CONTENT, SHA, Host, serving

from scfm_circuits import InputError
from scfm_circuits.common import fetch as fetching
from scfm_circuits.common.fetch import Remote, Unreachable, fetch
from scfm_circuits.common.files import only_one


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from serving(monkeypatch)


def remote(host: Host, **other: Any) -> Remote:
    return Remote(**{"url": f"{host.url}/cells.h5ad", "bytes": len(CONTENT), "sha256": SHA,
                     "instead": "Or name a file.", **other})


def got(host: Host, folder: Path, **other: Any) -> bytes:
    return fetch(remote(host, **other), folder / "cells.h5ad", progress=False).read_bytes()


def leftovers(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))


def test_a_file_is_fetched_once_and_hashed_once(host, tmp_path, monkeypatch):
    assert got(host, tmp_path) == CONTENT and leftovers(tmp_path) == ["cells.h5ad"]
    monkeypatch.setattr(fetching, "sha256_of_file", None)
    assert got(host, tmp_path) == CONTENT and len(host.seen) == 1


@pytest.mark.parametrize("faults", [
    ["cut:1000"], ["cut:0", "cut:200000", "503"], ["429", "500", "cut:299999"],
    ["cut:100000", "whole"], ["cut:100000", "shifted"], ["cut:100000", "416"]])
def test_whatever_goes_wrong_on_the_way_the_file_is_right(host, tmp_path, faults):
    host.faults = list(faults)
    assert got(host, tmp_path) == CONTENT and leftovers(tmp_path) == ["cells.h5ad"]
    assert len(host.seen) >= len(faults) and host.faults == []


def test_a_cut_connection_is_taken_up_where_it_broke(host, tmp_path):
    host.faults = ["cut:100000"]
    got(host, tmp_path)
    start = int(host.seen[1].removeprefix("bytes=").rstrip("-"))
    assert 100_000 - 2**16 < start <= 100_000


def test_an_earlier_run_is_taken_up_and_a_changed_file_is_never_kept(host, tmp_path):
    def cut() -> int:
        host.faults, host.seen = ["cut:100000", *["cut:0"] * 9], []
        with pytest.raises(Unreachable, match=r"cannot be fetched.*run the same command.*Or name"):
            got(host, tmp_path)
        assert leftovers(tmp_path) == ["cells.h5ad.part"]
        host.faults, host.seen = [], []
        return (tmp_path / "cells.h5ad.part").stat().st_size

    kept = cut()
    assert got(host, tmp_path) == CONTENT and host.seen == [f"bytes={kept}-"] and kept
    (tmp_path / "cells.h5ad").unlink()
    host.content = bytes(len(CONTENT))
    cut()
    host.content = CONTENT  # half of it is now of another file
    with pytest.raises(InputError, match=r"another checksum.*set aside.*Fetch it again"):
        got(host, tmp_path)
    assert leftovers(tmp_path) == ["cells.h5ad.wrong"]
    assert got(host, tmp_path) == CONTENT


def test_what_cannot_be_checked_is_not_put_together_from_parts(host, tmp_path):
    host.faults = ["cut:100000"]
    assert got(host, tmp_path, bytes=0, sha256="") == CONTENT and host.seen == [None, None]


@pytest.mark.parametrize("change, said", [
    (lambda content: bytes([content[0] ^ 1]) + content[1:], "another checksum"),
    (lambda content: content + b"more", "bytes instead of 300,000"),
    (lambda content: content[:-5], "299,995 bytes instead of 300,000")])
def test_a_wrong_file_is_set_aside(host, tmp_path, change, said):
    host.content = change(CONTENT)
    with pytest.raises(InputError, match=rf"(?s){said}.*cells.h5ad.wrong.*Or name a file"):
        got(host, tmp_path)
    assert "cells.h5ad" not in leftovers(tmp_path) and "cells.h5ad.wrong" in leftovers(tmp_path)
    host.content = CONTENT
    assert got(host, tmp_path) == CONTENT


def test_a_file_that_was_put_there_is_checked_too(host, tmp_path):
    path = tmp_path / "cells.h5ad"
    path.write_bytes(CONTENT)
    assert got(host, tmp_path) == CONTENT and host.seen == []
    path.write_bytes(CONTENT[:-1] + b"?")
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match="another checksum"):
        got(host, tmp_path)
    assert not path.exists()


def test_no_room_is_said_before_anything_is_fetched(host, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=fetching.MARGIN + 299_999)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"GB free.*SCFM_DATA"):
        got(host, tmp_path)
    assert host.seen == []
    # What is there already needs no room.
    (tmp_path / "cells.h5ad.part").write_bytes(CONTENT[:1])
    assert got(host, tmp_path) == CONTENT


def test_no_network_and_no_such_file(host, tmp_path):
    host.faults = ["404"]
    with pytest.raises(InputError, match=r"the server answers 404. Or name a file"):
        got(host, tmp_path)
    assert len(host.seen) == 1
    host.shutdown()
    host.server_close()
    with pytest.raises(InputError, match=r"cannot be fetched .*network is back. Or name a file"):
        got(host, tmp_path)


def test_two_processes_do_not_write_one_file(host, tmp_path):
    with only_one(tmp_path, "downloading into"), pytest.raises(InputError, match="Another run"):
        got(host, tmp_path)


# --- a package's wheel ---------------------------------------------------------------------------

WHEEL = "carrier-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel, the only place where pip looks. It needs a package that is nowhere.
    """
    wheel = tmp_path / "index" / WHEEL
    wheel.parent.mkdir()
    about = "carrier-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as content:
        content.writestr("carrier/cells.h5ad", b"cells")
        content.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: carrier\n"
                         "Version: 1.0\nRequires-Dist: nowhere-to-be-found\n")
        content.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\n"
                         "Root-Is-Purelib: true\nTag: py3-none-any\n")
        content.writestr(f"{about}/RECORD", "")
    for name in [one for one in os.environ if one.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel


def wheel_of(index: Path, package: str = "carrier==1.0", sha256: str = "") -> Remote:
    content = index.read_bytes()
    return Remote(f"pip:{package}", len(content), sha256 or hashlib.sha256(content).hexdigest(),
                  "Or put it there.")


def test_a_wheel_is_fetched_by_pip_without_what_it_needs(index, tmp_path):
    path = tmp_path / "cache" / WHEEL
    path.parent.mkdir()
    assert fetch(wheel_of(index), path).read_bytes() == index.read_bytes()
    assert leftovers(path.parent) == [WHEEL]


def test_a_wheel_that_cannot_be_had_or_is_another(index, tmp_path):
    path = tmp_path / "cache" / WHEEL
    path.parent.mkdir()
    with pytest.raises(Unreachable, match=r"The package carrier==2.0 cannot be fetched by pip "
                       r"\(.*2\.0.*\). Or put it there.$"):
        fetch(wheel_of(index, "carrier==2.0"), path)
    assert leftovers(path.parent) == []
    with pytest.raises(InputError, match="another checksum"):
        fetch(wheel_of(index, sha256="0" * 64), path)
    assert leftovers(path.parent) == [f"{WHEEL}.wrong"]
