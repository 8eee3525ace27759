"""Symbols: those that cannot stand in a sentence, that R wrote, or that match no human gene."""

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scfm_circuits import InputError
from scfm_circuits.cells.reading import describe_cells
from scfm_circuits.cells.symbols import (
    gene_symbols,
    hyphens_missing,
    hyphens_restored,
    merge_duplicates,
    possible_symbols,
)
from scfm_circuits.common.profile import load_profile


@pytest.mark.parametrize(("written", "meant"), [
    ("HLA.DQA1", "HLA-DQA1"), ("MT.CO1", "MT-CO1"), ("NKX2.1", "NKX2-1"), ("ERVW.1", "ERVW-1"),
    ("DTX2P1.UPK3BP1.PMS2P11", "DTX2P1-UPK3BP1-PMS2P11"), ("IGHV1.69.2", "IGHV1-69-2"),
    ("RP11.291B21.2", "RP11-291B21.2"), ("CTD.2528L19.6", "CTD-2528L19.6"),
    ("AC012345.1", "AC012345.1"), ("Z98742.10", "Z98742.10"), ("RP11.291B21", "RP11-291B21"),
    ("CD14", "CD14"), ("A.B", "A-B"),
])
def test_points_of_r_become_hyphens(written: str, meant: str) -> None:
    # IGHV1.69.2 is a gene of its own beside IGHV1.69, not a second column of it.
    assert hyphens_restored(["IGHV1.69", written])[0] == ["IGHV1-69", meant]


def test_a_number_that_r_gave_a_repeated_symbol_stays() -> None:
    assert hyphens_restored(["MATR3", "MATR3.1", "TBCE.1"])[0] == ["MATR3", "MATR3.1", "TBCE-1"]


def test_symbols_that_r_wrote_are_told_where_no_rule_says_so() -> None:
    """They were read without a word, and no gene set has them."""
    (told,) = hyphens_missing(["CD3D", "HLA.A", "MT.ND1", "NKX2.5", "KRTAP5.1"])
    assert told.startswith("Warning: 4 gene symbols") and "HLA.A" in told and "r_names" in told
    assert hyphens_missing(["HLA-A", "MT-ND1", "AC012345.1", "RP11-291B21.2", "MTOR", "MATR3.1",
                            "HLA", "NKX2-5"]) == []
    demo = load_profile("demo")
    assert not [one for one in describe_cells(demo).decisions if "Warning" in one]
    as_written = demo.model_copy(update={"symbol_rule": "as_written"})
    assert [one for one in describe_cells(as_written).decisions if "r_names" in one]


# No part is the address of a clone (0A0), whose version keeps its point.
HYPHENATED = st.from_regex(r"[A-Z]{2,4}[0-9]?(-([A-Z]{1,2}[0-9]?|[0-9]{1,3})){0,2}", fullmatch=True)


@given(st.lists(HYPHENATED, max_size=5))
def test_what_r_wrote_is_undone(symbols: list[str]) -> None:
    written = [re.sub(r"[^A-Za-z0-9._]", ".", symbol) for symbol in symbols]  # make.names
    found, (told,) = hyphens_restored(written)
    whole = {symbol for symbol in symbols if "-" not in symbol}
    for symbol, one in zip(symbols, found, strict=True):
        head, _, tail = symbol.rpartition("-")
        if not (tail.isdigit() and head in whole):  # else R may have numbered a repeated symbol
            assert one == symbol
    n_changed = sum(one != name for one, name in zip(found, written, strict=True))
    assert told.startswith(f"In {n_changed} symbols")


# --- genes that are left out ---------------------------------------------------------------------


def table(names: list[Any], column: str | None = None) -> pd.DataFrame:
    """A var table with these names in its index, or in a column beside Ensembl identifiers."""
    if column is None:
        return pd.DataFrame(index=pd.Index(names, dtype=object))
    return pd.DataFrame({column: pd.Series(names, dtype=object).array},
                        index=[f"ENSG{i:011d}" for i in range(len(names))])


@pytest.mark.parametrize("column", [None, "feature_name"])
@pytest.mark.parametrize(("odd", "why"), [
    (np.nan, "1 without a name"), (None, "1 without a name"), ("", "1 without a name"),
    (" ", "1 without a name"), ("NA", "1 without a name"), (pd.NA, "1 without a name"),
    ("MS4A1 (CD20)", "1 with a space in it, such as 'MS4A1 (CD20)'"),
])
def test_a_gene_without_a_symbol_is_left_out(column: str | None, odd: Any, why: str) -> None:
    names = [f"GENE{i}" for i in range(20)]
    names[3] = odd
    symbols, decisions = gene_symbols(table(names, column), column, "mine.h5ad")
    assert symbols == [*names[:3], "", *names[4:]]
    told = [one for one in decisions if "left out" in one]
    assert len(told) == 1 and told[0].startswith("1 of 20 genes were left out") and why in told[0]
    # `make profile` finds them at the same place, without those that are left out.
    assert possible_symbols(table(names, column), column) == names[:3] + names[4:]


def test_of_many_genes_without_a_symbol_none_is_left_out() -> None:
    names = [*(f"GENE{i}" for i in range(17)), "", "A B", "NAN"]
    with pytest.raises(InputError, match=r"3 of 20 genes without a symbol of one word in the var "
                                         r"index \(2 without a name and 1 with a space"):
        gene_symbols(table(names), None, "mine.h5ad")
    assert possible_symbols(table(names), None) == []


@given(st.lists(st.sampled_from(["A", "B", "C", "D", ""]), min_size=1, max_size=9),
       st.sampled_from(["sum", "unique", "error"]))
def test_columns_are_left_out_and_joined(symbols: list[str], rule: str) -> None:
    values = np.arange(1, 2 * len(symbols) + 1, dtype=np.float32).reshape(2, -1)
    named = [one for one in symbols if one]
    if rule == "error" and len(set(named)) < len(named):
        with pytest.raises(InputError, match="more than once"):
            merge_duplicates(symbols, rule, "mine.h5ad")
        return
    names, join, decisions = merge_duplicates(symbols, rule, "mine.h5ad")
    assert len(set(names)) == len(names) and (len(decisions) == 1) == (len(set(named)) < len(named))
    joined = values if join is None else values @ join.toarray()
    kept = values[:, [bool(one) for one in symbols]]
    if rule == "sum":
        for name in set(named):
            columns = [one == name for one in named]
            assert (joined[:, names.index(name)] == kept[:, columns].sum(axis=1)).all()
    else:
        assert [one.split("-")[0] for one in names] == named and (joined == kept).all()


# --- symbols that match no human gene ------------------------------------------------------------


def warned(names: list[str]) -> list[str]:
    return [one for one in gene_symbols(table(names), None, "mine.h5ad")[1] if "Warning" in one]


@pytest.mark.parametrize("date", ["1-Mar", "2-Sep", "01-Mar-21", "2021-03-01", "Mar-01", "Dec-01",
                                  "X1.Mar", "2021-03-01 00:00:00", "3/1/2021", "2.31E+13"])
def test_symbols_that_a_spreadsheet_made_dates(date: str) -> None:
    names = [f"GENE{i}" for i in range(40)] + [date, "2-SEP"]
    told = warned(names)
    assert len(told) == 1 and f"2 gene symbols are dates or numbers, such as {date!r}" in told[0]


def test_symbols_of_a_mouse() -> None:
    told = warned(["Hes4", "Cd3d", "mt-Co1", "H2-Aa", "2310009E13Rik", "GFP"])
    assert len(told) == 1 and "5 of 6 gene symbols have small letters, such as 'Hes4'" in told[0]


def test_human_symbols_are_no_cause_for_a_warning() -> None:
    assert not warned(["HES4", "C1orf112", "C10orf99", "HLA-DQA1", "MARCHF1", "SEPTIN2", "DEC1",
                       "SEP15", "RP11-291B21.2", "MT-CO1", "OCT4", "Y_RNA", "1-DEC2"] * 3
                      + ["snoU13", "Metazoa_SRP"])


@pytest.mark.parametrize("name", ["smoke", "demo", "planted"])
def test_the_cells_at_hand_are_no_cause_for_a_warning(name: str) -> None:
    assert not [one for one in describe_cells(load_profile(name)).decisions if "Warning" in one]
