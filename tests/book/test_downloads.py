"""Downloads from a host on this machine that behaves as badly as the real ones do."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from scfm_circuits import InputError
from scfm_circuits.book import downloads
from scfm_circuits.book.downloads import Remote, fetch, fetch_cells, fetch_model, main
from scfm_circuits.common import manifest
from scfm_circuits.common.profile import ROOT, cells_path, load_profile

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA = hashlib.sha256(CONTENT).hexdigest()


class Host(ThreadingHTTPServer):
    """Serves `content` at any path. faults: for each request in turn what goes wrong, or "".

    `cut:n`: the connection ends after n bytes of the body; a number: that status; `whole`: a range
    is answered with the whole file; `shifted`: with another part; `old`: the ETag is left as it is.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.etag = CONTENT, '"one"'
        self.faults: list[str] = []
        self.seen: list[str | None] = []
        self.files: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """A client that leaves is no news."""


class Answer(BaseHTTPRequestHandler):
    server: Host
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        host = self.server
        host.seen.append(self.headers.get("Range"))
        fault = host.faults.pop(0) if host.faults else ""
        if fault.isdigit():
            self.send_response(int(fault))
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = self.headers.get("Range")
        ranged = asked and self.headers.get("If-Range") == host.etag and fault != "whole"
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and ranged else 0
        start += 7 if fault == "shifted" else 0
        body = host.content[start:]
        self.send_response(206 if ranged else 200)
        if host.etag:
            self.send_header("ETag", host.etag)
        if ranged:
            self.send_header("Content-Range",
                             f"bytes {start}-{len(host.content) - 1}/{len(host.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault.startswith("cut:"):
            self.wfile.write(body[: int(fault[4:])])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(body)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    waits: list[float] = []
    monkeypatch.setattr(downloads.time, "sleep", waits.append)
    server = Host()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def remote(host: Host, **other: Any) -> Remote:
    return Remote(**{"url": f"{host.url}/cells.h5ad", "bytes": len(CONTENT), "sha256": SHA,
                     "instead": "Or name a file.", **other})


def got(host: Host, folder: Path, **other: Any) -> bytes:
    return fetch(remote(host, **other), folder / "cells.h5ad", progress=False).read_bytes()


def leftovers(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))


def test_a_file_is_fetched_once_and_hashed_once(host, tmp_path, monkeypatch):
    assert got(host, tmp_path) == CONTENT and leftovers(tmp_path) == ["cells.h5ad"]
    monkeypatch.setattr(downloads, "sha256_of_file", None)
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


def test_an_earlier_run_is_taken_up_unless_the_file_has_changed(host, tmp_path):
    for etag in ('"one"', '"two"'):
        host.etag, host.faults, host.seen = '"one"', ["cut:100000", *["cut:0"] * 9], []
        with pytest.raises(InputError, match=r"cannot be fetched.*run the same command.*Or name"):
            got(host, tmp_path)
        assert leftovers(tmp_path) == ["cells.h5ad.part", "cells.h5ad.part.json"]
        host.etag, host.faults, host.seen = etag, [], []
        kept = (tmp_path / "cells.h5ad.part").stat().st_size
        assert got(host, tmp_path) == CONTENT and host.seen == [f"bytes={kept}-"] and kept
        (tmp_path / "cells.h5ad").unlink()


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_version_it_begins_anew(host, tmp_path, etag):
    host.etag, host.faults = etag, ["cut:100000"]
    assert got(host, tmp_path) == CONTENT and host.seen == [None, None]


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
    usage = shutil.disk_usage(tmp_path)._replace(free=downloads.MARGIN + 299_999)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"GB free.*SCFM_DATA"):
        got(host, tmp_path)
    assert host.seen == []
    # What is there already needs no room.
    (tmp_path / "cells.h5ad.part").write_bytes(b"x")
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
    from scfm_circuits.common.files import only_one

    with only_one(tmp_path, "downloading into"), pytest.raises(InputError, match="Another run"):
        got(host, tmp_path)


# --- a profile's cells ---------------------------------------------------------------------------


def test_the_papers_cells_are_those_of_the_manifest(monkeypatch, tmp_path):
    profile = load_profile("paper")
    monkeypatch.delenv("SCFM_DATA", raising=False)
    assert cells_path(profile) == ROOT / "data" / "atlas" / "Global_raw.h5ad"
    monkeypatch.setenv("SCFM_DATA", str(tmp_path))
    assert cells_path(profile) == tmp_path / "Global_raw.h5ad"
    assert cells_path(load_profile("paper", {"cells": "/mine.h5ad"})) == Path("/mine.h5ad")
    listed = manifest.entry("models", profile.model)
    assert listed is not None and listed["config"]["num_hidden_layers"] == profile.model_layers


def test_the_command_fetches_and_says_what(host, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SCFM_DATA", str(tmp_path / "data"))
    entry = {"file": "a.h5ad", "url": f"{host.url}/a", "bytes": len(CONTENT), "sha256": SHA}
    monkeypatch.setattr(manifest, "entry", lambda kind, *_: entry if kind == "cells" else None)
    given = ["--profile", "smoke", "-p", "cells=heart_cell_atlas_v2"]
    assert main(given) == 0
    assert f"Cells: {tmp_path / 'data' / 'a.h5ad'}" in capsys.readouterr().out
    host.content = b"wrong"
    (tmp_path / "data" / "a.h5ad").unlink()
    assert main(given) == 1
    said = capsys.readouterr().err
    last = said.splitlines()[-1]
    assert "a.h5ad.wrong" in last and "under `cells`" in last


def test_profiles_that_need_nothing_fetch_nothing(monkeypatch):
    monkeypatch.setattr(downloads, "fetch", None)
    for name in ("demo", "smoke", "planted"):
        assert fetch_cells(load_profile(name)) is None and fetch_model(load_profile(name)) == []


def test_a_model_that_is_another_is_refused():
    class Config:
        model_type, num_hidden_layers, hidden_size, num_attention_heads = "gpt_neox", 23, 1024, 16
        intermediate_size, use_parallel_residual, vocab_size = 4096, False, 50304

    name = load_profile("paper").model
    with pytest.raises(InputError, match=r"`num_hidden_layers` is 23 instead of 24; "
                       r"`use_parallel_residual` is False instead of True. Check"):
        manifest.check_model(name, Config(), 50277)
    Config.num_hidden_layers, Config.use_parallel_residual = 24, True
    manifest.check_model(name, Config(), 50277)
    with pytest.raises(InputError, match="1,000 entries instead of 50,277"):
        manifest.check_model(name, Config(), 1000)
    manifest.check_model("somebody/else", object(), 1)


# --- Hugging Face --------------------------------------------------------------------------------

COMMIT = "5a4dc3b949b5868ca63752b37bc22e3b0216e435"


class Hub(Answer):
    """A stand-in for huggingface.co with one model repository."""

    def do_HEAD(self) -> None:
        self._give(head=True)

    def do_GET(self) -> None:
        self._give(head=False)

    def _give(self, head: bool) -> None:
        host, path = self.server, self.path.split("?")[0]
        host.seen.append(path)
        status, body, kind = 404, b"{}", "application/json"
        if path.startswith("/api/models/some/model/tree/"):
            status, body = 200, json.dumps([{
                "type": "file", "path": name, "size": len(one),
                "oid": hashlib.sha1(one).hexdigest()} for name, one in host.files.items()]).encode()
        elif path.startswith("/api/models/some/model"):
            status, body = 200, json.dumps({
                "id": "some/model", "modelId": "some/model", "sha": COMMIT, "private": False,
                "siblings": [{"rfilename": name} for name in host.files]}).encode()
        elif path.startswith(f"/some/model/resolve/{COMMIT}/"):
            name = path.rsplit("/", 1)[1]
            if name in host.files:
                status, body, kind = 200, host.files[name], "application/octet-stream"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not head:
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Host]:
    from helpers import tiny_corpus, tiny_model

    folder = tmp_path / "model"
    corpus = tiny_corpus()
    tiny_model(vocabulary=len(corpus.tokenizer)).save_pretrained(folder)
    corpus.tokenizer.save_pretrained(folder)
    server = Host()
    server.RequestHandlerClass = Hub
    server.files = {one.name: one.read_bytes() for one in folder.iterdir()}
    server.files["pytorch_model.bin"] = b"never fetched"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def in_process(hub: Host, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Fetch and load in a process of its own: huggingface_hub reads its settings at import."""
    code = ("from scfm_circuits.book.downloads import fetch_model\n"
            "from scfm_circuits.language_model import load_model\n"
            "from scfm_circuits.sentences import load_tokenizer\n"
            "from scfm_circuits.profile import load_profile\n"
            "from scfm_circuits import InputError\n"
            f"run = load_profile('smoke', dict(model='some/model', tokenizer='some/model',"
            f" model_revision='{COMMIT}', model_layers=None))\n"
            "try:\n"
            "    folders = fetch_model(run)\n"
            "    print(sorted(one.name for one in folders[0].iterdir()))\n"
            "    print(load_model(run.model, run.model_revision).config.num_hidden_layers,"
            " len(load_tokenizer(run.tokenizer, run.model_revision)))\n"
            "except InputError as error:\n"
            "    print('refused:', error)\n")
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": hub.url,
                               "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **more})


def test_a_model_is_fetched_at_its_revision_and_then_needs_no_network(hub, tmp_path):
    done = in_process(hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "model.safetensors" in done.stdout and ".bin" not in done.stdout, done.stdout
    assert not any(path.endswith(".bin") for path in map(str, hub.seen))
    hub.seen.clear()
    again = in_process(hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert again.stdout == done.stdout and hub.seen == []


def test_a_model_of_pickles_is_refused(hub, tmp_path):
    del hub.files["model.safetensors"]
    done = in_process(hub, tmp_path / "home")
    assert "refused:" in done.stdout and "no safetensors weights" in done.stdout, done.stderr
    assert not any(str(path).endswith(".bin") for path in hub.seen)


def test_a_model_that_cannot_be_had(hub, tmp_path):
    done = in_process(hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert "refused: 'some/model' cannot be fetched" in done.stdout
    assert "name a folder that holds it" in done.stdout


def test_the_manifest_names_a_licence_and_a_citation_for_everything():
    content = yaml.safe_load((ROOT / "data" / "manifest.yml").read_text())
    assert set(content) == {"cells", "models", "gene_sets"}
    for entries in content.values():
        for one in entries:
            assert one["name"] and one["licence"] and one["citation"]
