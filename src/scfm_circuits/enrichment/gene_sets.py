"""Gene-set libraries: read from GMT files, checked, cached, downloaded once if need be.

A library is a list of named terms, each a set of gene symbols. Symbols are upper-cased once, here,
because the published libraries are upper case while atlases mix (`C1orf112`).

Where `load_library` looks, in this order; the network is never touched when a file is there:
1. the folder the profile names, 2. the folder in the environment variable SCFM_GENE_SETS,
3. the cache (SCFM_CACHE or ~/.cache/scfm-circuits, subfolder gene-sets), 4. Enrichr's own server
(unless offline), 5. the small library of marker sets bundled with this project, with a warning.
"""

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from urllib.parse import quote

import numpy as np

from scfm_circuits import InputError
from scfm_circuits.common import manifest
from scfm_circuits.common.fetch import Remote, Unreachable, fetch
from scfm_circuits.common.files import write_atomic
from scfm_circuits.common.profile import ROOT
from scfm_circuits.enrichment import gmt
from scfm_circuits.enrichment.significance import IntArray

DATA_FOLDER = ROOT / "data"
BUNDLED_LIBRARY = "bundled_markers"
ENRICHR_URL = "https://maayanlab.cloud/Enrichr/geneSetLibrary"
DOWNLOAD_TRIES = 3

# Why a download failed, so that the second and third library of a run do not wait again. The key
# "" stands for the whole server (no connection), a library's name for that library alone.
_failed_downloads: dict[str, str] = {}


@dataclass(frozen=True, eq=False)
class GeneSets:
    """One gene-set library, with genes as integer ids.

    Names of terms and symbols come from outside: escape them wherever they meet HTML.
    """

    name: str
    """Name of the library, e.g. "GO_Biological_Process_2025"."""
    terms: tuple[str, ...]
    """Term names, in the order of the file."""
    genes: tuple[str, ...]
    """Union of all terms' symbols, upper case, sorted; a gene's id is its place here."""
    term_indptr: IntArray
    """Where each term starts in `term_genes`, (n_terms + 1,)."""
    term_genes: IntArray
    """Gene ids of each term, sorted and unique within the term, (n_terms' sizes summed,)."""
    source: str
    """Where it came from: "file", "download", "bundled" or "memory"."""
    sha256: str
    """SHA-256 of the file's bytes; of the content for a library built in memory."""
    warning: str | None = None
    """What a reader should know about this copy, e.g. that it is another version; None if fine."""
    missing: tuple[str, str] | None = None
    """Of the bundled library where it stands in for another: that one's name, and why it is not
    there."""

    def __len__(self) -> int:
        return len(self.terms)

    @property
    def title(self) -> str:
        """Its name as people read it: `KEGG_2021_Human` without the underscores."""
        return self.name.replace("_", " ")

    @cached_property
    def sizes(self) -> IntArray:
        """Number of genes of each term, (n_terms,)."""
        return np.diff(self.term_indptr)

    @cached_property
    def index(self) -> dict[str, int]:
        """Gene id of each (upper-case) symbol."""
        return {symbol: i for i, symbol in enumerate(self.genes)}

    @cached_property
    def content_sha256(self) -> str:
        """SHA-256 of terms and members, blind to line endings, descriptions and order."""
        lines = sorted(
            "\t".join((term, *self.term_members(i))) for i, term in enumerate(self.terms)
        )
        return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()

    def term_members(self, i: int) -> tuple[str, ...]:
        """Symbols of term `i`, sorted."""
        ids = self.term_genes[self.term_indptr[i] : self.term_indptr[i + 1]]
        return tuple(self.genes[j] for j in ids)

    def within(self, genes: Container[str], smallest: int, largest: int) -> dict[str, list[str]]:
        """The terms' symbols among some genes (upper case), of terms with so many of them."""
        found = {term: [gene for gene in self.term_members(i) if gene in genes]
                 for i, term in enumerate(self.terms)}
        return {term: own for term, own in found.items() if smallest <= len(own) <= largest}


def _build(
    name: str, members: Mapping[str, set[str]], source: str, sha256: str, warning: str | None
) -> GeneSets:
    """Turn term -> symbols (upper case, no empty term) into the integer form."""
    genes = tuple(sorted(set().union(*members.values())))
    index = {symbol: i for i, symbol in enumerate(genes)}
    ids = [sorted(index[symbol] for symbol in symbols) for symbols in members.values()]
    indptr = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(term) for term in ids], out=indptr[1:])
    flat = np.fromiter((i for term in ids for i in term), dtype=np.int32, count=int(indptr[-1]))
    return GeneSets(name, tuple(members), genes, indptr, flat, source, sha256, warning)


def gene_sets_from_dict(name: str, mapping: Mapping[str, Iterable[str]]) -> GeneSets:
    """Library from a mapping of term name to symbols, e.g. planted programs or a user's own sets.

    Symbols are upper-cased and de-duplicated; terms without a gene are dropped and counted in the
    warning.

    Raises:
        InputError: no term has a gene, or a term is given as one string instead of a list.
    """
    members: dict[str, set[str]] = {}
    for term, symbols in mapping.items():
        if isinstance(symbols, str):
            raise InputError(
                f"Term {term!r} of library {name} is one string; give a list of gene symbols."
            )
        members[term] = {symbol.strip().upper() for symbol in symbols if symbol.strip()}
    kept = {term: symbols for term, symbols in members.items() if symbols}
    if not kept:
        raise InputError(f"Library {name} has no term with a gene; give at least one gene set.")
    library = _build(name, kept, "memory", "", _dropped(len(members) - len(kept)))
    return replace(library, sha256=library.content_sha256)


def _dropped(n_empty: int) -> str | None:
    return f"{n_empty} term(s) without a gene were left out." if n_empty else None


def genes_of_terms(libraries: Iterable[GeneSets], terms: Iterable[str]) -> set[str]:
    """The genes of all these terms together, upper case; terms that no library has give none."""
    wanted = set(terms)
    return {gene for library in libraries for i, term in enumerate(library.terms)
            if term in wanted for gene in library.term_members(i)}


def commonest_sets(library: GeneSets, times: Mapping[str, int], n: int, *, smallest: int = 10,
                   largest: int = 100) -> dict[str, set[str]]:
    """The `n` terms whose genes occur most often, of those with a middling number that occur.

    times: how often each gene (upper case) occurs. Of equal terms the first of the library's. Each
    with its genes that occur.
    """
    found = library.within({gene for gene, n in times.items() if n}, smallest, largest)
    ranked = sorted(found, key=lambda term: -sum(times[gene] for gene in found[term]))
    return {term: set(found[term]) for term in ranked[:n]}


def read_gmt(path: str | Path) -> GeneSets:
    """Read a GMT file: one term a line, as `term <tab> description <tab> gene <tab> gene ...`.

    Quotes, a byte-order mark, any line ends and tabs at the end of a line are harmless; a weight
    behind a comma (`GENE,1.0`) is dropped, so are repeated genes and lines. The warning counts
    terms without any gene, which are dropped, and says what else was not read as it stands
    (`gmt.members`: no column of descriptions, several genes in one place, identifiers).

    The library's name is the file's stem.

    Raises:
        InputError: no such file, not UTF-8 text, not GMT, one term with two sets of genes, or no
            term left.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(
            f"The gene-set file {path} cannot be read ({reason}); check the path, or remove it "
            "from the profile to use another source."
        ) from error
    return parse_gmt(content, path.stem, source="file", where=f"The gene-set file {path}")


def parse_gmt(content: bytes, name: str, source: str, where: str) -> GeneSets:
    """Parse the bytes of a GMT file; `where` opens each error message ("The gene-set file x").

    Raises:
        InputError: as `read_gmt`.
    """
    members, said = gmt.members(gmt.read_lines(content, where), _bundled_genes, where)
    kept = {term: symbols for term, symbols in members.items() if symbols}
    if not kept:
        raise InputError(f"{where} holds no term with a gene; replace the file.")
    warning = " ".join(filter(None, (_dropped(len(members) - len(kept)), *said))) or None
    return _build(name, kept, source, hashlib.sha256(content).hexdigest(), warning)


@cache
def _bundled_genes() -> frozenset[str]:
    """Genes of the bundled library, which tell a column of genes from one of descriptions."""
    lines = gmt.read_lines(_bundled_path().read_bytes(), "The bundled library")
    return frozenset(cell for line in lines for cell in line.cells[1:])


def load_library(name: str, folder: str | Path | None = None) -> GeneSets:
    """Find the library `name` (file `<name>.gmt`); the module docstring gives the order.

    A copy whose content differs from data/manifest.yml carries a warning, not an error. If nothing
    else is to be had, the bundled marker library is returned: its `source` is "bundled" and its
    `warning` says why. Two libraries asked for can then both be the bundled one.

    Args:
        name: Enrichr's name of the library, e.g. "KEGG_2021_Human".
        folder: folder of GMT files, searched first.

    Raises:
        InputError: a named folder does not exist, or a file that is there cannot be used.
    """
    here = local_copy(name, folder)
    if here is not None:
        return _with_manifest_warning(read_gmt(here))
    if name == BUNDLED_LIBRARY:
        return replace(read_gmt(_bundled_path()), source="bundled")
    if downloads_are_off():
        return _bundled(name, "downloads are switched off")
    try:
        return _with_manifest_warning(_download(name))
    except InputError as error:
        return _bundled(name, str(error).rstrip("."))


def local_copy(name: str, folder: str | Path | None = None) -> Path | None:
    """The library's file in the folder given, in $SCFM_GENE_SETS or in the cache, if it is there.

    Raises InputError for what is no library's name, or differs from one in capitals alone, and for
    a named folder that is none.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name, flags=re.ASCII):
        raise InputError(
            f"{name[:80]!r} is not the name of a gene-set library; use letters, digits, '_', '-' "
            "and '.', as in 'KEGG_2021_Human'."
        )
    folders = manifest.gene_set_folders(folder)
    for place, origin in folders.items():
        if not place.is_dir():
            wrong = "is no folder" if place.exists() else "does not exist"
            raise InputError(f"The gene-set folder {place} named by {origin} {wrong}; correct the "
                             "path or remove the setting.")
    places = [*folders, manifest.gene_set_cache()]
    found = next((path for place in places if (path := place / f"{name}.gmt").is_file()), None)
    known = {*manifest.names("gene_sets"), BUNDLED_LIBRARY}
    if found is None and name not in known:
        known |= {path.stem for place in places for path in place.glob("*.gmt")}
        meant = sorted(one for one in known if one.casefold() == name.casefold())
        if meant:
            raise InputError(f"There is no gene-set library {name}; did you mean {meant[0]}, which "
                             "differs in capitals?")
    return found


def downloads_are_off() -> bool:
    """Whether the environment says SCFM_OFFLINE."""
    return os.environ.get("SCFM_OFFLINE", "").lower() in {"1", "true", "yes"}


def _bundled_path() -> Path:
    return DATA_FOLDER / "gene-sets" / f"{BUNDLED_LIBRARY}.gmt"


def _bundled(wanted: str, reason: str) -> GeneSets:
    library = replace(read_gmt(_bundled_path()), source="bundled", missing=(wanted, reason))
    return replace(library, warning=warnings_of([library])[0])


def warnings_of(libraries: Iterable[GeneSets]) -> list[str]:
    """What a reader should know about the libraries: one sentence for all that are not there."""
    libraries = list(libraries)
    missing = dict(one.missing for one in libraries if one.missing is not None)
    said = [one.warning for one in libraries if one.missing is None and one.warning]
    if not missing:
        return list(dict.fromkeys(said))
    size = next(len(one) for one in libraries if one.missing is not None)

    def joined(end: str) -> str:
        each = [f"{name}{end}" for name in missing]
        return " and ".join([", ".join(each[:-1]), each[-1]] if len(each) > 1 else each)

    names, files = joined(""), joined(".gmt")
    them, are = ("it", "is") if len(missing) == 1 else ("them", "are")
    return list(dict.fromkeys([
        f"{names} {are} not available ({next(iter(missing.values()))}). The {size} marker sets "
        f"bundled with this project stand in for {them}: their results are not comparable with the "
        f"paper's and do not stand beside them, and what these sets cannot test is left out. Put "
        f"{files} into a folder and name that folder in SCFM_GENE_SETS, or run `make data` with a "
        f"network.", *said]))


def _with_manifest_warning(library: GeneSets) -> GeneSets:
    """Add a warning if the library's content is not the version the manifest records."""
    entry = manifest.entry("gene_sets", library.name)
    # Enrichr's server and its mirrors end lines differently, so equal content is the same version.
    if entry is None or library.sha256 == entry["sha256"]:
        return library
    if library.content_sha256 == entry["content_sha256"]:
        return library
    note = (
        f"This copy of {library.name} ({len(library)} terms, sha256 {library.sha256[:12]}...) is "
        f"not the version recorded in data/manifest.yml ({entry['terms']} terms, sha256 "
        f"{entry['sha256'][:12]}...); figures can differ."
    )
    return replace(library, warning=" ".join(filter(None, (library.warning, note))))


def _download(name: str) -> GeneSets:
    """Fetch a library from Enrichr, check that it is one, and only then put it into the cache.

    Raises InputError, as it did the first time, for one that cannot be had.
    """
    earlier = _failed_downloads.get("") or _failed_downloads.get(name)
    if earlier:
        raise InputError(earlier)
    target = manifest.gene_set_cache() / f"{name}.gmt"
    print(f"Downloading {name} from {ENRICHR_URL} (once; kept in {target})", file=sys.stderr)
    remote = Remote(f"{ENRICHR_URL}?mode=text&libraryName={quote(name)}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            content = fetch(remote, Path(folder) / target.name, progress=False,
                            attempts=DOWNLOAD_TRIES).read_bytes()
        library = parse_gmt(content, name, source="download", where="The answer of the server")
    except InputError as error:
        if not isinstance(error, Unreachable):
            _failed_downloads[name] = str(error)
            raise
        # The next library would wait for nothing. The connection's own words are long and say no
        # more to a reader.
        _failed_downloads[""] = "Enrichr's server cannot be reached from here"
        raise Unreachable(_failed_downloads[""]) from error
    try:
        write_atomic(target, content)
    except OSError as error:
        note = f"It could not be kept in {target} ({error.strerror}) and is fetched every time."
        library = replace(library, warning=" ".join(filter(None, (library.warning, note))))
    return library
