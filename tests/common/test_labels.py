"""Labels: one way of writing each, and those that name no type."""

import unicodedata

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scfm_circuits.common.labels import (
    doubtful_labels,
    listed,
    names_no_type,
    normal_label,
    normal_labels,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT)
def test_a_label_is_one_visible_line(text: str) -> None:
    label = normal_label(text)
    assert label == normal_label(label) == unicodedata.normalize("NFC", label)
    assert label == " ".join(label.split())
    assert not any(unicodedata.category(one) in ("Cc", "Cf", "Zl", "Zp") for one in label)
    # Nothing that can be seen is lost.
    seen = "".join(one for one in unicodedata.normalize("NFC", text)
                   if unicodedata.category(one)[0] not in "CZ")
    assert unicodedata.normalize("NFC", seen) == unicodedata.normalize("NFC", "".join(
        one for one in label if unicodedata.category(one)[0] not in "CZ"))


@pytest.mark.parametrize(("text", "label"), [
    ("CD19+ B ", "CD19+ B"), ("\tT\u00a0cell\r\n", "T cell"), ("a  b", "a b"),
    ("Mu\u0308ller glia", "M\u00fcller glia"), ("B\u200b cell\ufeff", "B cell"),
    ("end\x85\x07", "end"), ("CD4$+$ T | x", "CD4$+$ T | x"), ("  ", "")])
def test_how_odd_labels_are_written(text: str, label: str) -> None:
    assert normal_label(text) == label


def test_labels_that_become_equal_are_named() -> None:
    found, said = normal_labels(["B", "B ", "T", " T", "T\u200b", "NK  x", "C"])
    assert found.tolist() == ["B", "B", "T", "T", "T", "NK x", "C"] and found.dtype.kind == "U"
    assert len(said) == 1 and "4 of 7" in said[0]
    assert "'B' and 'B ' are one type, 'B'" in said[0]
    assert "' T', 'T' and 'T\\u200b' are one type, 'T'" in said[0]
    assert "NK" not in said[0]


def test_labels_in_order_are_left_alone_and_nothing_is_said() -> None:
    column = pd.Series(pd.Categorical(["a b", "c"] * 3, ["never ", "a b", "c"]))
    found, said = normal_labels(column)
    assert found.tolist() == ["a b", "c"] * 3 and said == []
    assert normal_labels([])[0].shape == (0,)


def test_labels_that_may_be_one_or_none_are_told() -> None:
    labels = np.array(
        ["T cell", "t cell", "T_cell", "Tcell", "CD4+ T", "CD4- T", "nan", "", "B", "B"])
    untold, alike = doubtful_labels(labels)
    assert untold.startswith("2 of 10 cells") and "('', 'nan')" in untold
    assert "('T cell' and 'T_cell' and 'Tcell' and 't cell')" in alike and "CD4" not in alike
    assert doubtful_labels(np.array(["a b", "c"])) == []
    many = np.array([f"{case}{n}" for n in range(30) for case in "aA"])
    assert "and 25 more" in doubtful_labels(many)[0]


def test_many_merged_labels_are_counted() -> None:
    names = [f"type {number}" for number in range(30)]
    _, said = normal_labels([*names, *(f"{name} " for name in names)])
    assert "and 25 more" in said[0] and len(said[0]) < 900


@pytest.mark.parametrize("label", ["", "nan", "NaN", "NA", "n/a", "<NA>", "None", "null", "Unknown",
                                   "unassigned", "Not available", "?", "-", "--", "."])
def test_what_names_no_type(label: str) -> None:
    assert names_no_type(label)


@pytest.mark.parametrize("label", ["B", "NK", "Naive B", "NaN cell", "0", "CD4-", "細胞",
                                   "Unknown 2 T"])
def test_what_names_one(label: str) -> None:
    assert not names_no_type(label)


def test_an_array_of_labels_is_read_as_a_column_is() -> None:
    assert normal_labels(np.array(["a ", "b"]))[0].tolist() == ["a", "b"]


@given(st.lists(TEXT))
def test_names_in_a_sentence_are_on_one_line_and_few(names: list[str]) -> None:
    said = listed(names, most=3)
    assert not any(unicodedata.category(one) in ("Cc", "Cf", "Zl", "Zp") for one in said)
    assert len(said) < 300
    assert ("more" in said) >= (len(names) > 3)
    assert listed([]) == "none" and listed(["a\nb", 1]) == "a b, 1"
