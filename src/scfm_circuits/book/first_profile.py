"""A first profile for somebody's own `.h5ad`, from a look into the file (`make profile`).

Only `obs`, `var` and samples of the values are read, so a file of any size takes seconds; one of an
anndata before 0.7 is read whole. Each choice is written with what was seen and what else could be
chosen. Column names and labels come from the file: fields are quoted, and comments hold them as
Python literals, so none can end a line.
"""

import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml

from scfm_circuits import InputError
from scfm_circuits.cells.h5ad import open_h5ad, unreadable
from scfm_circuits.cells.ranking import values_kind
from scfm_circuits.cells.symbols import possible_symbols, symbol_columns
from scfm_circuits.common.encodings import CELL_SENTENCE, ENSEMBL, OWN_DICTIONARY, RANK_VALUE
from scfm_circuits.common.files import write_atomic
from scfm_circuits.common.labels import names_no_type, normal_label, normal_labels
from scfm_circuits.common.profile import PROFILES, Name, Profile, load_profile, profile_path

if TYPE_CHECKING:
    import pandas as pd

LARGE = 5_000
"""Cells above which the profile draws some: `demo` is made for few."""
EXPECTED_HELD_OUT = 10
"""Held-out cells of the traced type that a draw should leave on average."""
IDENTIFIERS = "ensembl_column", "gene_mapping"
"""Fields that say how a rank-value encoding finds genes."""

_MOST_LABELS = 200
# Compared without case, spaces, points and underscores.
_TYPE_COLUMNS = ("celltype", "celltypes", "celltypelabel", "cellontologyclass", "bulklabels",
                 "majorityvoting", "annotation", "annotations", "celllabel", "label", "labels")
_TYPE_HINTS = ("annot", "type", "label")
_CLUSTERS = ("louvain", "leiden", "cluster", "seurat")
_NO_TYPES = ("donor", "patient", "subject", "individual", "batch", "sample", "sex", "gender",
             "assay", "tissue", "organ", "disease", "phase", "stage", "ethnicity", "library",
             "suspension", "barcode", "chemistry", "platform", "dataset", "study", "doublet")
_COUNT_LAYERS = ("counts", "count", "rawcounts", "rawcount", "umi", "umis", "raw")


class Choice(NamedTuple):
    """A field's value, the comment beside it, and what whoever asked should be told at once."""

    value: Any
    why: str
    warning: str | None = None


class Peek(NamedTuple):
    """What a look into the file tells.

    kinds: by place (`X`, `raw`, a layer) `counts`, `normalised`, `zeros and ones` or why
    it is unusable.
    observations: the table of cells. variables: by place the table of its genes. aside: as in
    `h5ad.Opened`.
    """

    kinds: dict[str, str]
    observations: "pd.DataFrame"
    variables: "dict[str, pd.DataFrame]"
    aside: Mapping[str, str]


# --- the file ------------------------------------------------------------------------------------


def peek(path: Path) -> Peek:
    """Look into an `.h5ad`; InputError if it cannot be read as one."""
    with (closing(open_h5ad(path, "give the path of an .h5ad file as H5AD")) as data,
          unreadable(path)):
        kinds = {name: values_kind(matrix) for name, (matrix, _) in data.matrices.items()}
    genes = {name: variables for name, (_, variables) in data.matrices.items()}
    return Peek(kinds, data.obs, genes, data.aside)


# --- the choices ---------------------------------------------------------------------------------


def _plain(name: str) -> str:
    return re.sub(r"[\s._-]", "", str(name)).lower()


def _listed(names: Iterable[Any], most: int = 8) -> str:
    """Names as Python literals on one line: no character of a file ends a comment."""
    names = [repr(str(name)[:60]) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _unread(aside: Mapping[str, str], *parts: str) -> list[str]:
    """What of these parts of a file cannot be read, and why."""
    return [f"{part} cannot be read: {why}" for part, why in aside.items()
            if part.split("[")[0] in parts]


def choose_matrix(found: Peek, where: str, encoding: str = CELL_SENTENCE) -> Choice:
    """Counts if there are any, else log-normalised values, last zeros and ones alone; InputError if
    none can be ranked.

    A layer is taken for the counts by its name too: `unspliced` holds counts, but not of all. A
    rank-value encoding takes nothing but counts.
    """
    counted = [name for name in found.kinds if _plain(name) in _COUNT_LAYERS and name != "raw"]
    order = [(name, "counts") for name in (*counted, "raw", "X")]
    if encoding not in RANK_VALUE:
        order += [(name, "normalised") for name in ("raw", "X")]
    order += [(name, "counts") for name in found.kinds]
    if encoding not in RANK_VALUE:
        order += [(name, "normalised") for name in found.kinds]
    order += [(name, "zeros and ones") for name in found.kinds]
    chosen = next((name for name, kind in order if found.kinds.get(name) == kind), None)
    if chosen is None:
        held = [f"{name} is {kind}" for name, kind in found.kinds.items()]
        held += _unread(found.aside, "X", "raw", "layers")
        wanted = ("counts" if encoding in RANK_VALUE else "counts or log-normalised values")
        raise InputError(f"{where} has no values to rank genes by "
                         f"({'; '.join(held) or 'neither X, raw nor a layer'}); put {wanted} into "
                         "X, raw or a layer.")
    seen = "; ".join(f"{name!r}: {kind}" for name, kind in found.kinds.items())
    return Choice(chosen, f"seen in samples: {seen}")


def _numbered(names: Iterable[Any]) -> bool:
    """Whether most names are one text with a number behind it, such as g12 or gene_12."""
    before = Counter(re.sub(r"\d+$", "", str(name)) for name in names)
    return 2 * max(before.values(), default=0) > before.total()


def choose_symbols(variables: "pd.DataFrame", where: str, table: str = "var"
                   ) -> tuple[Choice, Choice]:
    """Where gene symbols are, and what to do with repeated ones.

    The index, unless it holds Ensembl identifiers or numbers; then a column known to hold symbols,
    else any column that may. Such a column goes before an index of numbered names, too. InputError
    if none may. table: `raw.var` for the genes of `raw`.
    """
    known = symbol_columns(variables)
    first = [*known, None] if _numbered(variables.index) else [None, *known]
    columns = dict.fromkeys((*first, *variables.columns))
    usable = [column for column in columns if (column is None or isinstance(column, str))
              and possible_symbols(variables, column)]
    if not usable:
        found = {column: possible_symbols(variables, column, 1.0) for column in columns
                 if column is None or column in known}
        best = max(found, key=lambda column: len(found[column]))
        if found[best]:
            raise InputError(f"{where} has {len(variables) - len(found[best]):,} of "
                             f"{len(variables):,} genes without a symbol of one word in "
                             f"{best or f'the index of {table}'}, and no other column of {table} "
                             "has more; fill them in.")
        raise InputError(f"{where} has no gene symbols: the index of {table} holds identifiers, "
                         f"such as {str(variables.index[0])!r}, and no other column of it (there "
                         f"are {_listed(variables.columns) or 'none'}) has one word for each gene; "
                         f"add such a column to {table}.")
    chosen = usable[0]
    symbols = possible_symbols(variables, chosen)
    repeated = len(symbols) - len(set(symbols))
    others = _listed(dict.fromkeys(column or "the index (null)" for column in usable[1:]))
    column = Choice(chosen, f"such as {_listed(symbols, 3)}"
                    + (f"; also possible: {others}" if others else ""))
    rule = Choice("sum" if repeated else "error",
                  f"{repeated:,} columns have a symbol that another has too" if repeated
                  else "no symbol is there twice")
    return column, rule


def choose_genes(variables: "pd.DataFrame", where: str, table: str, encoding: str
                 ) -> dict[str, Choice]:
    """The fields of `choose_symbols`; for a rank-value encoding also those by which it finds genes.

    That is a column of Ensembl identifiers, the index before others, or else symbols through the
    model's dictionary of names. With identifiers symbols may be missing: that dictionary has names.
    """
    def identified(column: str | None) -> bool:
        entries = variables.index if column is None else variables[column]
        return 2 * sum(bool(ENSEMBL.match(str(one))) for one in entries) > len(entries)

    coded, named = encoding in RANK_VALUE, True
    found = [one for one in (None, *variables.columns) if coded and identified(one)]
    try:
        symbols = choose_symbols(variables, where, table)
    except InputError:
        if not found:
            raise
        named, symbols = False, (Choice(None, "no column holds symbols"),
                                 Choice("error", "genes are found by their identifiers"))
    fields = dict(zip(("symbol_column", "duplicate_symbols"), symbols, strict=True))
    if not coded:
        return fields
    version = encoding if encoding == "geneformer_v1" else "geneformer_v2"
    if not found:
        return fields | dict(zip(IDENTIFIERS, (
            Choice(None, "no column holds Ensembl identifiers"),
            Choice(f"{version}_mapping", "finds genes by their symbols")), strict=True))
    entry = variables.index[0] if found[0] is None else variables[found[0]].iloc[0]
    return fields | dict(zip(IDENTIFIERS, (
        Choice(found[0], f"Ensembl identifiers, such as {_listed([entry])}"),
        Choice(None, "symbols and identifiers are in the file") if named else
        Choice(f"{version}_names", "calls genes by their names, which the file has not")),
        strict=True))


def choose_labels(observations: "pd.DataFrame", where: str, unread: list[str] | None = None
                  ) -> Choice:
    """The column of cell types: one of 2 to 200 labels, known names first and clusters last.

    Labels are counted as they are read, and one at least must name a type. InputError if there is
    no such column. unread: columns that cannot be read, and why.
    """
    fitting: dict[str, set[str]] = {}
    lacking: list[str] = []
    numbers: list[str] = []
    unfit: list[tuple[int, str]] = []
    for column in observations.columns:
        values = observations[column]
        if not isinstance(column, str):
            continue
        if values.dtype.kind in "biufcmM":
            numbers += [column] if 2 <= values.nunique() <= _MOST_LABELS else []
            continue
        rank, (names, wrong) = _rank(column), _kinds(values)
        if wrong:
            unfit += [(rank, f"{_listed([column])} {wrong}")] if rank is not None else []
            continue
        if values.isna().any():
            lacking.append(column)
        else:
            fitting[column] = names
    ranks = {column: _rank(column) for column in fitting}
    ordered = [column for _, column in
               sorted((rank, column) for column, rank in ranks.items() if rank is not None)]
    if not ordered:
        why = (f"cells without a label in {_listed(lacking)}" if lacking else
               f"no column of obs with 2 to {_MOST_LABELS} types (columns: "
               f"{_listed(observations.columns) or 'none'})")
        why += "".join(f"; {one}" for _, one in sorted(unfit)[:3])
        if numbers:
            why += (f"; if {_listed(numbers)} (numbers or true and false) is meant, name it as "
                    "`label_column` in a profile of your own, or store it as words")
        raise InputError(f"{where} has no usable column of cell types: "
                         f"{'; '.join([why, *(unread or [])])}; give every cell a type in a "
                         "column such as obs['cell_type'].")
    others = f"; also possible: {_listed(ordered[1:])}" if ordered[1:] else ""
    types = [name for name in fitting[ordered[0]] if not names_no_type(name)]
    return Choice(ordered[0], f"{len(types)} types{others}")


def _kinds(values: "pd.Series") -> tuple[set[str], str]:
    """The different labels of a column of words, as they are read, and why they can be no types."""
    written = values.dropna().unique()
    if len(written) > 10 * _MOST_LABELS:
        return set(), f"has {len(written):,} labels"
    names = {normal_label(str(value)) for value in written}
    if all(map(names_no_type, names)):
        return names, "names no type"
    fits = 2 <= len(names) <= _MOST_LABELS
    return names, "" if fits else f"has {len(names):,} label{'s' * (len(names) > 1)}"


def _rank(column: str) -> int | None:
    """A place in the order of columns that may hold cell types; None for one that says it does not.

    An ontology's identifiers come after other types: they say less to a language model than words.
    """
    plain = _plain(column)
    if plain in _TYPE_COLUMNS:
        return _TYPE_COLUMNS.index(plain)
    if any(hint in plain for hint in _TYPE_HINTS):
        return 150 if "ontologyterm" in plain else 100
    if any(word in plain for word in _CLUSTERS):
        return 300
    return None if any(word in plain for word in _NO_TYPES) else 200


def choose_case(labels: np.ndarray, base: Profile) -> tuple[Choice, Choice | None]:
    """The type whose call is traced, and for many cells how many to draw.

    labels: (n_cells,) as they are read; one that names no type (`nan`, `unknown`) is not taken. Of
    the others the most frequent one with three held-out cells among those drawn, or the one with
    most. Unless `base` says how many, of many cells as many are drawn as leave about
    `EXPECTED_HELD_OUT` of the most frequent type held out.
    """
    from scfm_circuits.cells.corpus import rare_types, split_cells
    from scfm_circuits.cells.reading import draw_cells

    names, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    untold = np.array([names_no_type(name) for name in names])
    order = order[~untold[order]]
    most: Choice | None = None
    n_drawn = base.max_cells
    if n_drawn is None and len(labels) > LARGE:
        share = counts[order[0]] / len(labels) * base.validation_share
        n_drawn = max(LARGE, math.ceil(EXPECTED_HELD_OUT / share))
        if n_drawn < len(labels):
            most = Choice(n_drawn, f"of {len(labels):,} cells, drawn at random; null takes all")
    used = labels
    if n_drawn is not None and n_drawn < len(labels):
        used = labels[draw_cells(labels, n_drawn, base.sampling, base.seed)]
    held_out = used[split_cells(len(used), base.validation_share, base.seed)]
    held = np.array([np.sum(held_out == name) for name in names])
    enough = [index for index in order if held[index] >= 3]
    chosen = enough[0] if enough else order[np.argmax(held[order])]
    others = _listed(names[index] for index in order if index != chosen)
    why = f"{counts[chosen]:,} cells; other types: {others or 'none'}"
    if untold.any():
        why += (f"; {counts[untold].sum():,} cells have a label that names no type "
                f"({_listed(names[untold])})")
    return Choice(str(names[chosen]), why, *rare_types(used, base)), most


# --- the profile ---------------------------------------------------------------------------------


def profile_fields(path: Path, base: str = "demo") -> dict[str, Choice]:
    """The fields that the file decides, with a comment for each; InputError if it fits none."""
    where = str(path)
    settings, found = load_profile(base), peek(path)
    matrix = choose_matrix(found, where, settings.encoding)
    genes = found.variables[matrix.value]
    if not len(found.observations) or not len(genes):
        raise InputError(f"{where} holds {len(found.observations)} cells and {len(genes)} genes; "
                         "there is nothing to read.")
    # A dictionary that is made of the cells calls genes as they do, as sentences do.
    own = settings.token_dictionary == OWN_DICTIONARY
    chosen = choose_genes(genes, where, "raw.var" if matrix.value == "raw" else "var",
                          CELL_SENTENCE if own else settings.encoding)
    label = choose_labels(found.observations, where, _unread(found.aside, "obs"))
    labels, _ = normal_labels(found.observations[label.value].astype(str))
    case, most = choose_case(labels, settings)
    fields = {
        "cells": Choice(str(path.resolve()),
                        f"{len(found.observations):,} cells, {len(genes):,} genes"),
        "cells_are": Choice("real", "simulated, if nobody measured them"),
        "cells_name": Choice(f"cells of {path.name}", "what the pages call them"),
        "matrix": matrix, **chosen,
        "label_column": label, "case_type": case,
    }
    return fields | ({"max_cells": most} if most else {})


def profile_text(fields: dict[str, Choice], base: str = "demo") -> str:
    """The profile as YAML: a comment, then its field, in quotes if it is text."""
    lines = ["# Written from a look into the file; change what is wrong. Everything else is as in",
             f"# `{base}`; all fields are explained in src/scfm_circuits/common/profile.py.",
             f"extends: {json.dumps(base, ensure_ascii=False) if os.sep in base else base}"]
    for field, choice in fields.items():
        # In double quotes no text is taken for a number, a date or null, or spans two lines.
        value = yaml.safe_dump(choice.value, allow_unicode=True, width=math.inf,
                               default_style='"' if isinstance(choice.value, str) else None)
        # YAML ends a bare number or null with a line of three points.
        lines += [f"# {text}" for text in (choice.why, choice.warning) if text]
        lines += [f"{field}: {value.removesuffix('...' + chr(10)).rstrip()}"]
    return "\n".join(lines) + "\n"


def write_profile(path: Path, out: Path, base: str = "demo", overwrite: bool = False) -> Profile:
    """Look into `path`, write `out`, print what is odd and return it as it will be read.

    Raises InputError for a file that does not fit, a name that no profile can have, and if `out`
    is there already and `overwrite` is not given.
    """
    _check_out(out, overwrite)
    try:
        path = path.expanduser()
    except RuntimeError:
        raise InputError(f"H5AD is {str(path)!r}, but that home folder is not known; give the "
                         "whole path.") from None
    chosen = profile_fields(path, base)
    for choice in chosen.values():
        if choice.warning:
            print(f"  {choice.warning}")
    try:
        write_atomic(out, profile_text(chosen, base))
    except OSError as error:
        raise InputError(f"The profile {out} cannot be written ({error.strerror}); give another "
                         "path as OUT.") from None
    return load_profile(os.path.abspath(out))


def _check_out(out: Path, overwrite: bool) -> None:
    from pydantic import TypeAdapter, ValidationError

    if out.suffix not in (".yml", ".yaml"):
        raise InputError(f"OUT is {str(out)!r}; a profile's name ends in .yml.")
    try:
        TypeAdapter(Name).validate_python(out.stem)
    except ValidationError:
        raise InputError(f"OUT is {str(out)!r}; a profile's name has letters, digits, points, "
                         "dashes and underscores only, 60 at most.") from None
    if (PROFILES / f"{out.stem}.yml").exists():
        raise InputError(f"OUT is {str(out)!r}, but {out.stem} is a profile of the project, whose "
                         "results would be replaced; choose another name.")
    if out.is_dir() or (out.exists() and not overwrite):
        raise InputError(f"{out} is there already; give another OUT, or OVERWRITE=1 to replace it.")


def first_profile(h5ad: str, out: str, base: str = "demo", overwrite: bool = False) -> None:
    """`write_profile`, and say what was chosen and what reading the cells will do."""
    from scfm_circuits.book.downloads import described

    if not h5ad:
        raise InputError("Give the cells: make profile H5AD=path/to/cells.h5ad.")
    if base.endswith((".yml", ".yaml")):  # as it is found from here
        base = os.path.abspath(profile_path(base))
    there = Path(out).exists()
    written = write_profile(Path(h5ad), Path(out), base, overwrite)
    try:
        decisions = described(written).decisions
    except InputError:
        if not there:  # the file is to be mended first, and may then give another profile
            Path(out).unlink()
        raise
    for field in ("matrix", "symbol_column", "duplicate_symbols", "label_column", "case_type",
                  "max_cells", *IDENTIFIERS[: 2 * (written.encoding in RANK_VALUE)]):
        print(f"  {field}: {getattr(written, field)!r}")
    for note in decisions:
        print(f"  {note}")
    print(f"Wrote {out}; look at it, then: make book PROFILE={shlex.quote(out)}")
