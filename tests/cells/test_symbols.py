"""Symbols that went through R, with hyphens again."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scfm_circuits.cells.symbols import hyphens_restored


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


HYPHENATED = st.from_regex(r"[A-Z]{2,4}[0-9]?(-[A-Z0-9]{1,3}){0,2}", fullmatch=True)


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
