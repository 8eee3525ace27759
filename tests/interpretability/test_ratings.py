"""The rating sheet and what comes back: counted right, refused clearly, nothing lost."""

import numpy as np
import pandas as pd
import pytest
from helpers import model_for, tiny_corpus, tiny_transcoders

from scfm_circuits import InputError
from scfm_circuits.features.contexts import draw_features, feature_contexts
from scfm_circuits.features.gene_lists import check_live
from scfm_circuits.features.statistics import count_features
from scfm_circuits.interpretability.ratings import (
    COLUMNS,
    RATING_COLUMNS,
    card_verdicts,
    rating_sheet,
    read_ratings,
    read_sheets,
)

KEY = pd.DataFrame({"card": ["c01", "c02", "c03", "c04"],
                    "source": ["feature", "random tokens", "feature", "untrained encoder"],
                    "layer": 1, "feature": [5, -1, 9, 5]})


def export(**changes) -> pd.DataFrame:
    frame = pd.DataFrame({"study": "s", "card": ["c01", "c02", "c03"], "rater": "ann",
                          "interpretable": ["Yes", "no", " UNSURE "], "label": "x", "note": ""})
    return frame.assign(**changes)


def by_feature(**changes) -> pd.DataFrame:
    """A sheet as the chapter wrote it before there were cards."""
    frame = pd.DataFrame({"study": "s", "feature": [5, 9], "layer": 1, "rater": "cy",
                          "interpretable": ["No", "Yes"], "label": "", "note": ""})
    return frame.assign(**changes)


def test_filled_sheets_come_back(tmp_path):
    export().to_csv(tmp_path / "ann.csv", index=False)
    export(rater="bob", interpretable=["Yes", "Yes", ""]).to_csv(tmp_path / "b.csv", index=False)
    export(study="other").to_csv(tmp_path / "c.csv", index=False)
    by_feature().to_csv(tmp_path / "d.csv", index=False)
    ratings = read_ratings(tmp_path, "s", KEY)
    assert list(ratings.table.columns) == list(RATING_COLUMNS)
    assert ratings.table["interpretable"].tolist() == [
        "Yes", "No", "Unsure", "Yes", "Yes", "No", "Yes"]
    assert ratings.table["card"].tolist() == ["c01", "c02", "c03", "c01", "c02", "c01", "c03"]
    assert ratings.table["source"].tolist()[:3] == ["feature", "random tokens", "feature"]
    # Card 2 is split one to one, which is not more than half.
    assert card_verdicts(ratings.table).to_dict() == {"c01": True, "c02": False, "c03": False}
    assert (ratings.foreign, ratings.repeated) == (3, 0)


def test_no_sheet_is_no_rating(tmp_path):
    ratings = read_ratings(tmp_path, "s", KEY)
    assert len(ratings.table) == 0
    assert len(card_verdicts(ratings.table)) == 0
    assert len(read_ratings(tmp_path / "nowhere", "s", KEY).table) == 0


def test_an_export_saved_twice_counts_once(tmp_path):
    export().to_csv(tmp_path / "ratings.csv", index=False)
    export().to_csv(tmp_path / "ratings (1).csv", index=False)
    ratings = read_ratings(tmp_path, "s", KEY)
    assert (len(ratings.table), ratings.repeated) == (3, 3)


def test_two_raters_of_one_name_are_told(tmp_path):
    export().to_csv(tmp_path / "a.csv", index=False)
    export(interpretable=["Yes", "Yes", "Unsure"]).to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(InputError, match=r"'ann' rated c02 twice.*No in a\.csv, line 3.*Yes in b"):
        read_ratings(tmp_path, "s", KEY)


def test_markup_commas_and_quotes_stay_text(tmp_path):
    label = '<script>alert("x")</script>, =1+1'
    export(label=label, note="line one\nline two").to_csv(tmp_path / "a.csv", index=False)
    table = read_ratings(tmp_path, "s", KEY).table
    assert table["label"].tolist() == [label] * 3
    assert table["note"].tolist() == ["line one\nline two"] * 3


@pytest.mark.parametrize("options", [{"encoding": "utf-8-sig"}, {"sep": ";"},
                                     {"lineterminator": "\r\n"}])
def test_what_spreadsheets_make_of_it_is_read(tmp_path, options):
    export(label="größer").to_csv(tmp_path / "a.csv", index=False, **options)
    assert read_ratings(tmp_path, "s", KEY).table["label"].tolist() == ["größer"] * 3


@pytest.mark.parametrize(("frame", "message"), [
    (export(interpretable=["Yes", "maybe", "No"]), r"Line 3.*maybe"),
    (export(card=["c01", "c02", "c77"]), "'c77', which is not in this study"),
    (by_feature(feature=[5, 7]), "'7' of layer '1', which was not drawn"),
    (by_feature(feature=["5", "five"]), "'five'"),
    (by_feature(feature=["5", "inf"]), "'inf'"),
    (by_feature(layer=2), "layer '2'"),
    (export(rater=""), "no rater"),
    (export(card=""), "neither a card nor a feature"),
    (export(feature=[9, "", ""], layer=1), "names the card c01, but its feature is on the card"),
    (export().drop(columns="rater"), "lacks the columns rater"),
    (export().drop(columns="card"), "lacks the columns card"),
])
def test_a_sheet_that_cannot_be_used_is_refused(tmp_path, frame, message):
    frame.to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(InputError, match=message):
        read_ratings(tmp_path, "s", KEY)
    assert (tmp_path / "bad.csv").read_text() == frame.to_csv(index=False)


@pytest.mark.parametrize(("content", "message"), [
    (b"\xff\xfe\x00\x01", "not readable CSV"),
    (b"", "lacks the columns"),
    (b'study,card,rater,interpretable\ns,c01,ann,"Yes\n', "not readable CSV"),
    (b"study,card,rater,interpretable,note\ns,c01,ann,Yes,TNNI3, TNNC1\n", "Line 2"),
    (b"study,card,rater,interpretable,note\ns,c01,ann\n", "Line 2"),
])
def test_a_file_that_is_no_sheet_is_refused(tmp_path, content, message):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(InputError, match=message) as told:
        read_sheets(tmp_path)
    assert "bad.csv" in str(told.value)


def test_foreign_rows_need_not_be_known(tmp_path):
    export(study="other", card=["x", "y", "z"]).to_csv(tmp_path / "a.csv", index=False)
    assert read_ratings(tmp_path, "s", KEY).foreign == 3


def test_the_sheet_has_a_row_per_feature_and_empty_answers(tmp_path):
    corpus = tiny_corpus(20)
    model = model_for(corpus).float()
    transcoders = tiny_transcoders(model)
    statistics = count_features(model, transcoders, corpus, 8, progress=False)
    drawn = draw_features(statistics, 1, 4, -4.0, 0)
    contexts = feature_contexts(statistics, corpus, 1, drawn, 2)
    key = pd.DataFrame({"card": ["c01", "c02", "c03", "c04", "c05"],
                        "source": ["feature"] * 4 + ["untrained encoder"], "layer": 1,
                        "feature": [*drawn[::-1], drawn[0]]})
    made = rating_sheet("s", 1, drawn, statistics, contexts, corpus, "token", key)
    assert made["feature"].tolist() == drawn.tolist()
    assert made["card"].tolist() == ["c04", "c03", "c02", "c01"]
    assert set(COLUMNS) <= set(made.columns)
    assert (made[["rater", "interpretable", "label", "note"]] == "").all(axis=None)
    assert made["contexts"].str.contains(r"\[").all()
    # Filled in and put back, it is counted.
    made.assign(rater="ann", interpretable="Yes").to_csv(tmp_path / "a.csv", index=False)
    assert read_ratings(tmp_path, "s", key).table["feature"].tolist() == drawn.tolist()


def test_a_layer_without_live_features_is_told():
    corpus = tiny_corpus(8)
    model = model_for(corpus).float()
    transcoders = tiny_transcoders(model)
    transcoders.b_enc[1] = -1e6
    statistics = count_features(model, transcoders, corpus, 8, progress=False)
    check_live(statistics, 0, -4.0)
    with pytest.raises(InputError, match="Layer 1 has no feature"):
        check_live(statistics, 1, -4.0)
    assert np.isfinite(statistics.l0).all()
