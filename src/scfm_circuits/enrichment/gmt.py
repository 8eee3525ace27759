"""The text of a GMT file as terms and their genes, however it was written.

A line is `term <tab> description <tab> gene <tab> gene ...`. Spreadsheets, R and people write it
with quotes, other line ends, tabs at the end, weights, or without the column of descriptions.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from scfm_circuits import InputError

_IDENTIFIER = re.compile(r"ENS[A-Z]*[GTP]\d{6,}|\d+")
_BETWEEN = re.compile(r"[\s,;|]+")
_WEIGHT = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")


class Line(NamedTuple):
    """One term: its line's number, from 1, its name, and the cells after it as they are written."""

    number: int
    term: str
    cells: list[str]


def read_lines(content: bytes, where: str) -> list[Line]:
    """The lines of a GMT file, without quotes, a byte-order mark and empty lines.

    Raises InputError, which begins with `where`, for what is not UTF-8 text or no GMT.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8 text (byte {error.start}); give a plain, unpacked GMT file."
        ) from error
    found = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if not line.strip():
            continue
        term, *cells = map(_unquoted, line.split("\t"))
        if not cells or not term or "\0" in line:
            raise InputError(
                f"{where} is not a GMT file: line {number} is not "
                "'term <tab> description <tab> genes'; replace the file."
            )
        found.append(Line(number, term, cells))
    return found


def _unquoted(cell: str) -> str:
    cell = cell.strip()
    mark = cell[:1]
    quoted = len(cell) > 1 and mark in ('"', "'") and cell[-1] == mark
    return cell[1:-1].replace(2 * mark, mark).strip() if quoted else cell


def genes_of(cell: str) -> list[str]:
    """The symbols in a cell, upper case: one, perhaps with a weight behind a comma, or several."""
    if not _BETWEEN.search(cell):
        return [cell.upper()] if cell else []
    symbol, _, weight = cell.partition(",")
    if _WEIGHT.fullmatch(weight):
        cell = symbol
    return [one.upper() for one in _BETWEEN.split(cell) if one]


def members(lines: Sequence[Line], known: Callable[[], Collection[str]], where: str
            ) -> tuple[dict[str, set[str]], list[str]]:
    """Each term's symbols, and a sentence for all that was not read as it stands.

    known: gives symbols that are genes beside the file's own; asked if there are descriptions.
    Raises InputError, which begins with `where`, for a term that is there twice with other genes.
    """
    first, said = _first_gene(lines, known)
    found: dict[str, set[str]] = {}
    several = 0
    for line in lines:
        parts = list(map(genes_of, line.cells[first:]))
        several += sum(len(part) > 1 for part in parts)
        genes = {gene for part in parts for gene in part}
        if found.setdefault(line.term, genes) != genes:
            raise InputError(f"{where} names the term {line.term[:80]!r} twice (again in line "
                             f"{line.number}); rename or merge the two.")
    if several:
        said.append(f"{several:,} place(s) held several genes, which were parted.")
    genes = set().union(*found.values())
    odd = sorted(gene for gene in genes if _IDENTIFIER.match(gene))
    if 2 * len(odd) > len(genes):
        said.append(f"Its genes are identifiers, such as {odd[0]!r}, and not symbols, so hardly a "
                    "gene of the cells is in its terms; give a file with gene symbols.")
    return found, said


def _first_gene(lines: Sequence[Line], known: Callable[[], Collection[str]]
                ) -> tuple[int, list[str]]:
    """The column after the term where genes start, and what there is to say of it.

    Descriptions of which half or more are genes, and not those that the term is named by, are no
    descriptions.
    """
    given = list(_descriptions(lines))
    if not given:
        return 1, []
    genes = {gene for line in lines for cell in line.cells[1:] for gene in genes_of(cell)}
    genes.update(known())
    such = [text for text in given if text in genes]
    if 2 * len(such) >= len(given):
        return 0, [f"The file has no column of descriptions: the one after the terms holds genes, "
                   f"such as {such[0]!r}, and was read as such."]
    if 10 * len(such) >= len(given):
        return 1, [f"{len(such):,} description(s) are a gene's symbol, such as {such[0]!r}; the "
                   "column after the terms is taken for descriptions all the same, as in every GMT "
                   "file."]
    return 1, []


def _descriptions(lines: Sequence[Line]) -> Iterator[str]:
    """What stands after each term, upper case, if it is one word that is not in the term's name."""
    for line in lines:
        text = ",".join(genes_of(line.cells[0]))
        if text and text not in re.findall(r"[\w.-]+", line.term.upper()):
            yield text
