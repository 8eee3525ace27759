"""The rating sheet and what comes back: counted right, refused clearly."""

import numpy as np
import pandas as pd
import pytest
from helpers import model_for, tiny_corpus, tiny_transcoders

from scfm_circuits import InputError
from scfm_circuits.features import check_live, count_features, draw_features, feature_contexts
from scfm_circuits.human_evaluation import (
    COLUMNS,
    feature_verdicts,
    foreign_rows,
    rating_sheet,
    read_ratings,
)

DRAWN = np.array([1, 5, 9])


def sheet(**changes) -> pd.DataFrame:
    frame = pd.DataFrame({"study": "s", "feature": DRAWN, "layer": 1, "rater": "ann",
                          "interpretable": ["Yes", "no", " UNSURE "], "label": "x", "note": ""})
    return frame.assign(**changes)


def test_a_filled_sheet_comes_back(tmp_path):
    sheet().to_csv(tmp_path / "ann.csv", index=False)
    sheet(rater="bob", interpretable=["Yes", "Yes", ""]).to_csv(tmp_path / "b.csv", index=False)
    sheet(study="other").to_csv(tmp_path / "c.csv", index=False)
    ratings = read_ratings(tmp_path, "s", DRAWN)
    assert list(ratings.columns) == list(COLUMNS)
    assert ratings["interpretable"].tolist() == ["Yes", "No", "Unsure", "Yes", "Yes"]
    # Feature 5 is split one to one, which is not more than half.
    assert feature_verdicts(ratings).to_dict() == {1: True, 5: False, 9: False}
    assert foreign_rows(tmp_path, "s") == 3


def test_no_sheet_is_no_rating(tmp_path):
    ratings = read_ratings(tmp_path, "s", DRAWN)
    assert len(ratings) == 0
    assert len(feature_verdicts(ratings)) == 0


@pytest.mark.parametrize(("frame", "message"), [
    (sheet(interpretable=["Yes", "maybe", "No"]), "maybe"),
    (sheet(feature=[1, 5, 7]), "7"),
    (sheet(feature=["1", "five", "9"]), "five"),
    (sheet().drop(columns="rater"), "rater"),
    (pd.concat([sheet(), sheet()]), "twice"),
])
def test_a_sheet_that_cannot_be_used_is_refused(tmp_path, frame, message):
    frame.to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(InputError, match=message):
        read_ratings(tmp_path, "s", DRAWN)


def test_a_file_that_is_no_csv_is_refused(tmp_path):
    (tmp_path / "bad.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match=r"bad\.csv"):
        read_ratings(tmp_path, "s", DRAWN)


def test_the_sheet_has_a_row_per_feature_and_empty_answers():
    corpus = tiny_corpus(20)
    model = model_for(corpus).float()
    transcoders = tiny_transcoders(model)
    statistics = count_features(model, transcoders, corpus, 8, progress=False)
    drawn = draw_features(statistics, 1, 4, -4.0, 0)
    contexts = feature_contexts(statistics, corpus, 1, drawn, 2)
    made = rating_sheet("s", 1, drawn, statistics, contexts, corpus, "token")
    assert made["feature"].tolist() == drawn.tolist()
    assert set(COLUMNS) <= set(made.columns)
    assert (made[["rater", "interpretable", "label", "note"]] == "").all(axis=None)
    assert made["contexts"].str.contains(r"\[").all()


def test_a_layer_without_live_features_is_told():
    corpus = tiny_corpus(8)
    model = model_for(corpus).float()
    transcoders = tiny_transcoders(model)
    transcoders.b_enc[1] = -1e6
    statistics = count_features(model, transcoders, corpus, 8, progress=False)
    check_live(statistics, 0, -4.0)
    with pytest.raises(InputError, match="Layer 1 has no feature"):
        check_live(statistics, 1, -4.0)
