"""Gene-set libraries: the traps of GMT files, and where a library comes from."""

import os
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm_circuits import InputError
from scfm_circuits.common import fetch
from scfm_circuits.enrichment import gene_sets
from scfm_circuits.enrichment.gene_sets import (
    commonest_sets,
    gene_sets_from_dict,
    genes_of_terms,
    load_library,
    local_copy,
    parse_gmt,
    read_gmt,
)

KEGG = "KEGG_2021_Human"
GMT = b"Term one\tnote\tVWF\tKDR\nTerm two\t\tTIE1\n"


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine, no cache of the user, no earlier failure, no network."""
    monkeypatch.delenv("SCFM_GENE_SETS", raising=False)
    monkeypatch.delenv("SCFM_OFFLINE", raising=False)
    monkeypatch.setenv("SCFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gene_sets, "_failed_downloads", {})
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(requests, "get", _forbidden)


def _forbidden(*args: Any, **kwargs: Any) -> requests.Response:
    raise AssertionError("the network was touched although a file is there")


class Server:
    """Stands in for requests.get, counting the calls."""

    def __init__(self, *answers: bytes | int | Exception) -> None:
        self.answers = list(answers)
        self.calls: list[dict[str, Any]] = []

    def __call__(self, url: str, **kwargs: Any) -> requests.Response:
        self.calls.append({"url": url, **kwargs})
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        response = requests.Response()
        response.status_code = answer if isinstance(answer, int) else 200
        response._content = answer if isinstance(answer, bytes) else b""
        response._content_consumed = True  # type: ignore[attr-defined]
        return response


def write(path: Path, content: bytes = GMT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_reads_terms_genes_and_members(tmp_path: Path) -> None:
    library = read_gmt(write(tmp_path / "mine.gmt"))
    assert library.name == "mine" and library.source == "file" and library.warning is None
    assert library.terms == ("Term one", "Term two") and len(library) == 2
    assert library.genes == ("KDR", "TIE1", "VWF")
    assert [library.term_members(i) for i in range(2)] == [("KDR", "VWF"), ("TIE1",)]
    assert library.sizes.tolist() == [2, 1] and library.index["VWF"] == 2
    assert len(library.sha256) == 64


@pytest.mark.parametrize(
    "line",
    [
        b"T\td\tVWF\tKDR\t\n",
        b"T\td\tVWF\tKDR\t\t\t\r\n",
        b"T\td\tVWF,1.0\tKDR,0.25\n",
        b"T\td\tvwf\tKDR\tVWF\t Kdr \n",
        b"\xef\xbb\xbfT\td\tVWF\tKDR",
        b"\n\nT\t\t\tVWF\tKDR\n\n",
        b"T\td\tVWF\tKDR\r\r",
        b'"T"\t"d"\t"VWF"\t"KDR"\n',
        b"T\td\tVWF,1e-3\tKDR,-2\n",
        b"T\td\tVWF\tKDR\nT\td\tKDR\tVWF\n",
    ],
    ids=["trailing tab", "tabs and CRLF", "weights", "case and repeats", "BOM", "empty places",
         "CR", "quotes", "other weights", "a term twice, the same"],
)
def test_harmless_oddities_give_the_same_sets(tmp_path: Path, line: bytes) -> None:
    library = read_gmt(write(tmp_path / "a.gmt", line))
    assert library.terms == ("T",) and library.term_members(0) == ("KDR", "VWF")


def test_line_ends_of_an_old_mac_part_terms(tmp_path: Path) -> None:
    library = read_gmt(write(tmp_path / "a.gmt", b"T\td\tVWF\rU\t\tKDR\r"))
    assert library.terms == ("T", "U") and library.term_members(1) == ("KDR",)
    # A character that only looks like a line end is part of a name.
    odd = "T\u2028x\td\tVWF\n".encode()
    assert read_gmt(write(tmp_path / "b.gmt", odd)).terms == ("T\u2028x",)


def test_quotes_within_a_name_are_its_own(tmp_path: Path) -> None:
    library = read_gmt(write(tmp_path / "a.gmt", b'"A ""B"" cell"\t\tVWF\n\'De Novo\' x\t\tKDR\n'))
    assert library.terms == ('A "B" cell', "'De Novo' x")


@pytest.mark.parametrize("content", [
    b"T cell\tCD3D\tCD3E\tCD2\nB cell\tMS4A1\tCD79A\tCD19\n",
    b"T cell\tcd3d\tCD3E\tCD2\nB cell\tMs4a1\tCD79A\nMine\tX1\tX2\nYours\tX2\tX1\n",
    b"T cell\tCD3D\tCD3E\n",
])
def test_a_file_without_descriptions_keeps_its_first_genes(tmp_path: Path, content: bytes) -> None:
    library = read_gmt(write(tmp_path / "a.gmt", content))
    assert library.term_members(0)[:2] == ("CD2", "CD3D") or library.term_members(0) == (
        "CD3D", "CD3E")
    assert library.warning is not None and "no column of descriptions" in library.warning


@pytest.mark.parametrize("content", [
    b"FOXO1\tFOXO1\tCD3D\tVWF\nVWF targets\tVWF\tFOXO1\tKDR\n",  # named like the term
    b"T\tWikiPathways\tCD3D\nB\tWikiPathways\tMS4A1\n",
    b"T\thttps://x.org/T\tCD3D\nB\tNA\tMS4A1\nC\tM12345\tCD4\n",
])
def test_descriptions_are_no_genes(tmp_path: Path, content: bytes) -> None:
    library = read_gmt(write(tmp_path / "a.gmt", content))
    assert library.warning is None and max(library.sizes) <= 2


def test_some_descriptions_that_are_genes_are_told(tmp_path: Path) -> None:
    lines = [f"T{i}\tnote {i}\tCD3D\tCD3E" for i in range(4)]
    lines += ["U\tCD3D\tVWF"]
    library = read_gmt(write(tmp_path / "a.gmt", "\n".join(lines).encode()))
    assert library.term_members(4) == ("VWF",)
    assert library.warning is not None and "1 description(s)" in library.warning
    assert "'CD3D'" in library.warning


@pytest.mark.parametrize("cell", [b"VWF,KDR", b"VWF, KDR", b"VWF;KDR", b"VWF KDR", b"VWF|KDR"])
def test_several_genes_in_one_place_are_parted(tmp_path: Path, cell: bytes) -> None:
    library = read_gmt(write(tmp_path / "a.gmt", b"T\td\t" + cell + b"\nU\td\tTIE1\n"))
    assert library.term_members(0) == ("KDR", "VWF")
    assert library.warning is not None and "1 place(s) held several genes" in library.warning


@pytest.mark.parametrize("genes", [b"ENSG00000110799\tENSG00000128052.3\tVWF", b"7450\t3791"])
def test_identifiers_instead_of_symbols_are_told(tmp_path: Path, genes: bytes) -> None:
    library = read_gmt(write(tmp_path / "a.gmt", b"T\td\t" + genes + b"\n"))
    assert library.warning is not None and "identifiers" in library.warning


# Single quotes around a whole name are read as quotation marks.
CELL = st.text(st.sampled_from(" abcXYZ0-.:/()'\u00fc"), max_size=6).map(str.strip).filter(
    lambda name: len(name) < 2 or not name[0] == name[-1] == "'")


@given(st.dictionaries(CELL.filter(bool), st.lists(st.sampled_from(["VWF", "KDR", "TIE1", "G-1"]),
                                                   min_size=1, unique=True), min_size=1),
       st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=60)
def test_any_way_of_writing_gives_the_same_sets(
    terms: dict[str, list[str]], end: str, quoted: bool, mark: bool, lower: bool
) -> None:
    def cell(text: str) -> str:
        return f'"{text}"' if quoted else text

    lines = ["\t".join(map(cell, (name, "", *(gene.lower() if lower else gene for gene in genes))))
             + "\t" * lower for name, genes in terms.items()]
    content = ("\ufeff" * mark + end.join(lines) + end).encode()
    library = parse_gmt(content, "mine", "file", "The file")
    assert library.terms == tuple(terms) and library.warning is None
    assert [set(library.term_members(i)) for i in range(len(terms))] == [
        set(genes) for genes in terms.values()]


def test_term_without_genes_is_dropped_and_counted(tmp_path: Path) -> None:
    library = read_gmt(write(tmp_path / "a.gmt", b"Empty\td\nAlso empty\td\t\t\nT\td\tVWF\n"))
    assert library.terms == ("T",)
    assert library.warning is not None and library.warning.startswith("2 term(s) without a gene")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no term with a gene"),
        (b"T\td\n", "no term with a gene"),
        (b"T\td\tVWF\nT\td\tKDR\n", "twice .again in line 2"),
        (b"<!DOCTYPE html>\n<html>\n", "not a GMT file: line 1"),
        (b"\t\t<div>page</div>\n", "not a GMT file: line 1"),
        (b"T\td\tVWF\ngene,weight\n", "not a GMT file: line 2"),
        (b"T\td\tVW\0F\n", "not a GMT file"),
        (b"T\td\tVWF\xff\xfe\n", "not UTF-8"),
        (b"\x1f\x8b\x08\x00packed", "not UTF-8"),
    ],
)
def test_unusable_files_say_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path / "bad.gmt", content)
    with pytest.raises(InputError, match=message) as caught:
        read_gmt(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_gmt(tmp_path / "nowhere.gmt")


def test_from_dict() -> None:
    library = gene_sets_from_dict("planted", {"A": ["vwf", "VWF", "KDR"], "none": []})
    assert library.source == "memory" and library.term_members(0) == ("KDR", "VWF")
    assert library.warning is not None and "1 term(s)" in library.warning
    assert library.sha256 == library.content_sha256
    with pytest.raises(InputError, match="one string"):
        gene_sets_from_dict("planted", {"A": "VWF"})
    with pytest.raises(InputError, match="no term with a gene"):
        gene_sets_from_dict("planted", {"A": [" "]})


def test_content_hash_is_blind_to_layout_but_not_to_genes(tmp_path: Path) -> None:
    plain = read_gmt(write(tmp_path / "a.gmt"))
    other = read_gmt(write(tmp_path / "b.gmt", b"Term two\tx\tTIE1\t\r\nTerm one\t\tkdr\tVWF\r\n"))
    fewer = read_gmt(write(tmp_path / "c.gmt", b"Term one\tnote\tVWF\nTerm two\t\tTIE1\n"))
    assert plain.sha256 != other.sha256 and plain.content_sha256 == other.content_sha256
    assert plain.content_sha256 != fewer.content_sha256


def test_order_is_folder_then_environment_then_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [tmp_path / "profile", tmp_path / "environment", tmp_path / "cache" / "gene-sets"]
    for i, place in enumerate(places):
        write(place / "Mine.gmt", b"place%d\td\tVWF\n" % i)
    monkeypatch.setenv("SCFM_GENE_SETS", str(places[1]))
    found = [load_library("Mine", places[0]).terms[0]]
    (places[0] / "Mine.gmt").unlink()
    found.append(load_library("Mine", places[0]).terms[0])
    (places[1] / "Mine.gmt").unlink()
    found.append(load_library("Mine", places[0]).terms[0])
    assert found == ["place0", "place1", "place2"]


def test_named_folder_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="named by the profile does not exist"):
        load_library(KEGG, tmp_path / "none")
    monkeypatch.setenv("SCFM_GENE_SETS", str(tmp_path / "none"))
    with pytest.raises(InputError, match="named by SCFM_GENE_SETS does not exist"):
        load_library(KEGG)


@pytest.mark.parametrize("name", ["../secrets", "", "a/b", "a b", ".hidden", "x\n"])
def test_library_name_cannot_leave_the_folder(name: str) -> None:
    with pytest.raises(InputError, match="not the name of a gene-set library"):
        load_library(name)


def test_download_is_cached_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(503, GMT)
    monkeypatch.setattr(requests, "get", server)
    assert load_library("Mine").source == "download"
    assert len(server.calls) == 2 and server.calls[0]["timeout"] == fetch.TIMEOUTS
    assert server.calls[0]["url"] == f"{gene_sets.ENRICHR_URL}?mode=text&libraryName=Mine"
    assert "Downloading Mine" in capsys.readouterr().err
    monkeypatch.setattr(requests, "get", _forbidden)
    assert load_library("Mine").source == "file"
    assert (tmp_path / "cache" / "gene-sets" / "Mine.gmt").read_bytes() == GMT


@pytest.mark.parametrize("answer", [b"<html>\n<p>Not found</p>\n", b"", b"\xff\xfe\x00"])
def test_an_error_page_is_never_cached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: bytes
) -> None:
    monkeypatch.setattr(requests, "get", Server(answer))
    library = load_library(KEGG)
    assert library.source == "bundled"
    assert library.warning is not None and "The answer of the server" in library.warning
    assert not list((tmp_path / "cache").rglob("*"))


def test_no_connection_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(requests.ConnectionError("unreachable"))
    monkeypatch.setattr(requests, "get", server)
    libraries = [load_library(name) for name in (KEGG, "GO_Biological_Process_2025", "Other")]
    assert len(server.calls) == gene_sets.DOWNLOAD_TRIES
    for library in libraries:
        assert library.source == "bundled" and library.name == gene_sets.BUNDLED_LIBRARY
        assert library.warning is not None and "(Enrichr's server cannot be reached from here)" in (
            library.warning
        )


def test_unknown_library_is_asked_for_once_and_others_still_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(404, GMT)
    monkeypatch.setattr(requests, "get", server)
    warning = load_library("No_Such_Library").warning
    assert warning is not None
    assert "the server answers 404" in warning and "No_Such_Library" in warning
    assert load_library("Mine").source == "download"
    load_library("No_Such_Library")
    assert len(server.calls) == 2


@pytest.mark.parametrize("name", ["KEGG_2021_human", "kegg_2021_HUMAN", "Mine"])
def test_a_name_in_other_letters_is_no_missing_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """Whoever misspells one would have the bundled sets in its place."""
    monkeypatch.setenv("SCFM_OFFLINE", "1")
    (tmp_path / "mine.gmt").write_bytes(GMT)
    with pytest.raises(InputError, match=r"did you mean (KEGG_2021_Human|mine), which"):
        load_library(name, tmp_path)
    assert load_library("mine", tmp_path).name == "mine"
    assert load_library("KEGG_2021_Mouse", tmp_path).source == "bundled"


def test_offline_falls_back_on_the_bundled_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCFM_OFFLINE", "1")
    library = load_library(KEGG)
    assert library.source == "bundled"
    assert library.warning is not None and "not comparable" in library.warning
    assert "SCFM_GENE_SETS" in library.warning


def test_cache_that_cannot_be_written_still_gives_the_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setattr(requests, "get", Server(GMT))
    library = load_library("Mine")
    assert library.source == "download"
    assert library.warning is not None and "could not be kept" in library.warning


def test_other_version_is_a_warning(tmp_path: Path) -> None:
    write(tmp_path / f"{KEGG}.gmt")
    library = load_library(KEGG, tmp_path)
    assert library.warning is not None
    assert "not the version recorded in data/manifest.yml (320 terms" in library.warning


def test_bundled_library_is_sound() -> None:
    library = load_library(gene_sets.BUNDLED_LIBRARY)
    assert library.source == "bundled" and library.warning is None
    assert len(library) >= 40
    assert library.sizes.min() >= 8 and library.sizes.max() <= 25
    assert "VWF" in library.term_members(library.terms.index("Endothelial cell"))
    # Each term is a set of its own, so that a hit names one kind of cell or process.
    members = [library.term_members(i) for i in range(len(library))]
    assert len(set(members)) == len(members)


def test_manifest_entries_are_complete() -> None:
    entries = yaml.safe_load((gene_sets.DATA_FOLDER / "manifest.yml").read_text())["gene_sets"]
    assert {entry["name"] for entry in entries} == {
        "GO_Biological_Process_2025",
        "KEGG_2021_Human",
        "CellMarker_Augmented_2021",
    }
    for entry in entries:
        assert entry["url"].startswith(gene_sets.ENRICHR_URL) and entry["url"].endswith(
            entry["name"]
        )
        assert len(entry["sha256"]) == len(entry["content_sha256"]) == 64
        assert entry["licence"] and entry["citation"]


REAL = os.environ.get("SCFM_GENE_SETS")


@pytest.mark.skipif(not REAL, reason="SCFM_GENE_SETS is not set: needs the real libraries")
def test_real_libraries_are_the_manifest_versions() -> None:
    for entry in yaml.safe_load((gene_sets.DATA_FOLDER / "manifest.yml").read_text())["gene_sets"]:
        path = Path(str(REAL)) / f"{entry['name']}.gmt"
        library = load_library(entry["name"], REAL)
        assert library.warning is None and library.source == "file"
        assert (len(library), len(library.genes)) == (entry["terms"], entry["genes"])
        assert path.stat().st_size == entry["bytes"] and library.sha256 == entry["sha256"]


def test_terms_are_found_by_name_and_by_how_often_their_genes_occur() -> None:
    one = gene_sets_from_dict("one", {"a": ["G1", "g2"], "b": ["G3"], "c": ["G4", "G5", "G6"]})
    other = gene_sets_from_dict("other", {"a": ["G9"], "d": ["G1"]})
    assert genes_of_terms([one, other], ["a", "d", "not there"]) == {"G1", "G2", "G9"}
    times = {"G1": 5, "G2": 1, "G3": 100, "G4": 2, "G5": 2, "G6": 2}
    assert commonest_sets(one, times, 2, smallest=2, largest=3) == {
        "a": {"G1", "G2"}, "c": {"G4", "G5", "G6"}}
    assert list(commonest_sets(one, times, 2, smallest=1, largest=2)) == ["b", "a"]
    assert commonest_sets(one, {"G3": 1}, 2, smallest=2) == {}


def test_single_quotes_are_no_part_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "Own.gmt"
    path.write_text("'T''s'\t''\t'CD3D'\t'CD4'\n5' end\tx\tLYZ\n", encoding="utf-8")
    library = read_gmt(path)
    assert library.terms == ("T's", "5' end") and library.genes == ("CD3D", "CD4", "LYZ")
    assert library.warning is None


@pytest.mark.parametrize("name", ["../Own", "my sets", ""])
def test_what_is_no_name_of_a_library_is_told_where_it_is_looked_for(tmp_path: Path, name: str
                                                                    ) -> None:
    """It was told by the chapter that read it, after training."""
    with pytest.raises(InputError, match="is not the name of a gene-set library"):
        local_copy(name, tmp_path)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "Own.gmt").write_text("T\t\tCD3D\n", encoding="utf-8")
    with pytest.raises(InputError, match="named by the profile is no folder"):
        local_copy("Own", tmp_path / "Own.gmt")
