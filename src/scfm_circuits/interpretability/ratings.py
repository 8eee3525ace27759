"""The rating sheet of Table 3, and what raters sent back.

Ratings come as CSV files from elsewhere: answers to the deck (a row per card), or the
chapter's own sheet, filled in by hand (a row per feature). So their columns, values and study are
checked and their text is only ever shown escaped.
"""

import contextlib
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.profile import ROOT
from scfm_circuits.features.contexts import Context, token_table
from scfm_circuits.features.gene_lists import ranked_genes
from scfm_circuits.features.statistics import FeatureStatistics
from scfm_circuits.interpretability.deck import FEATURE

SHEETS = ROOT / "data" / "human_eval"
"""Where raters' answers are put to be counted."""
ANSWERS = ("Yes", "No", "Unsure")
COLUMNS = ("study", "card", "rater", "interpretable", "label", "note")
"""Columns of an export. A sheet may name a feature and its layer instead of a card."""
RATING_COLUMNS = ("card", "source", "layer", "feature", "rater", "interpretable", "label", "note")
_NEEDED = ("study", "rater", "interpretable")


def rating_sheet(study: str, layer: int, features: np.ndarray, statistics: FeatureStatistics,
                 contexts: Sequence[Sequence[Context]], corpus: Corpus, rule: str,
                 key: pd.DataFrame) -> pd.DataFrame:
    """The sheet: what there is to see of each feature, and empty columns for the rater.

    key: from `deck_key`, for the column card. Columns beside `COLUMNS`: feature, layer, log10_E_f,
    activating_tokens and genes (most often first), contexts (the token in brackets, strongest
    first).
    """
    genes = ranked_genes(statistics, layer, features, len(corpus.symbols), rule)
    card = key[key["source"] == FEATURE].set_index("feature")["card"]
    rows = []
    for feature, (ranked, _), shown in zip(features, genes, contexts, strict=True):
        tokens = token_table(statistics, layer, int(feature), corpus, 5)
        rows.append({
            "study": study, "card": card[int(feature)], "feature": int(feature), "layer": layer,
            "log10_E_f": statistics.log10_frequency[layer, feature],
            "activating_tokens": "; ".join(
                f"{token} ({share:.0%})" for token, share in
                zip(tokens["token"], tokens["share"], strict=True)),
            "genes": " ".join(corpus.symbols[ranked[:12]].tolist()),
            "contexts": " | ".join(f"{c.before}[{c.token}]{c.after}" for c in shown),
            "rater": "", "interpretable": "", "label": "", "note": "",
        })
    return pd.DataFrame(rows)


# --- what comes back -----------------------------------------------------------------------------


class Ratings(NamedTuple):
    """A study's ratings (`RATING_COLUMNS`), and what in the folder was not counted.

    foreign: answered rows of other studies. repeated: rows that say again what another row says,
    as when an export is saved twice.
    """

    table: pd.DataFrame
    foreign: int
    repeated: int


def read_sheets(folder: Path) -> pd.DataFrame:
    """All answered rows of the folder's CSV files, as text, with the columns file and line.

    Empty columns are added where a sheet has none. Cheap, and needs nothing of the run, so a
    chapter can refuse a bad sheet before it computes anything.

    Raises:
        InputError: a file that is not such a sheet, an answer that is none of `ANSWERS`, a row
            without a rater, or one that names neither card nor feature.
    """
    parts = [_read_sheet(path) for path in sorted(folder.glob("*.csv"))]
    columns = ["file", "line", *COLUMNS, "feature", "layer"]
    rows = [row for part in parts for row in part]
    return pd.DataFrame(rows, columns=columns)


def read_ratings(folder: Path, study: str, key: pd.DataFrame) -> Ratings:
    """The ratings of one study in the folder's CSV files; key: its cards, from `deck_key`.

    A row without an answer is passed over. Two rows of a rater for one card are one if they agree.

    Raises:
        InputError: what `read_sheets` refuses, a card or feature that is not of this study, or a
            rater who answered one card in two ways.
    """
    sheets = read_sheets(folder)
    own = sheets[sheets["study"] == study]
    known = key.set_index("card")
    real = key[key["source"] == FEATURE]
    cards = dict(zip(zip(real["layer"].tolist(), real["feature"].tolist(), strict=True),
                     real["card"].tolist(), strict=True))
    answered: list[dict[Any, Any]] = own.to_dict("records")
    named = own.assign(card=[_card_of(row, known.index, cards) for row in answered])
    table = named.drop(columns=["feature", "layer"]).join(known, on="card")
    merged = table.drop_duplicates(["card", "rater", "interpretable", "label", "note"])
    double = merged[merged.duplicated(["card", "rater"], keep=False)]
    if len(double):
        one, other = double[(double["card"] == double["card"].iloc[0])
                            & (double["rater"] == double["rater"].iloc[0])].iloc[:2].to_dict(
                                "records")
        raise InputError(
            f"Rater {one['rater'][:40]!r} rated {one['card']} twice and not alike: "
            f"{one['interpretable']} in {one['file']}, line {one['line']}, and "
            f"{other['interpretable']} in {other['file']}, line {other['line']}; keep one of the "
            "two rows, or give two people two names.")
    return Ratings(merged[list(RATING_COLUMNS)].reset_index(drop=True), len(sheets) - len(own),
                   len(table) - len(merged))


def card_verdicts(ratings: pd.DataFrame) -> pd.Series:
    """Per rated card, whether more than half of its ratings are Yes; indexed by card.

    The rate is a share of cards: two raters of one feature are not two features.
    """
    return (ratings["interpretable"] == "Yes").groupby(ratings["card"]).mean() > 0.5


def _read_sheet(path: Path) -> list[dict[str, Any]]:
    try:
        # Excel puts a byte-order mark in front, and in some countries semicolons between.
        text = path.read_text(encoding="utf-8-sig")
        header = text.split("\n", 1)[0]
        separator = ";" if header.count(";") > header.count(",") else ","
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        rows = [(reader.line_num, row) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"The rating sheet {path} is not readable CSV ({error}); export it "
                         "again.") from None
    columns = [str(name).strip() for name in reader.fieldnames or []]
    missing = [column for column in _NEEDED if column not in columns]
    if "card" not in columns and "feature" not in columns:
        missing.append("card")
    if missing:
        raise InputError(f"The rating sheet {path} lacks the columns {', '.join(missing)}; use the "
                         "rating page's export or the sheet that the chapter wrote.")
    found = []
    for line, row in rows:
        if None in row or None in row.values():
            raise InputError(f"Line {line} of the rating sheet {path} has another number of cells "
                             "than the header; put quotes around text that holds a comma, or "
                             "export it again.")
        cells = {str(name).strip(): str(value).strip() for name, value in row.items()}
        if cells["interpretable"]:
            found.append(_checked(cells, path, line))
    return found


def _checked(cells: dict[str, str], path: Path, line: int) -> dict[str, Any]:
    """The row with its answer in one spelling, or InputError."""
    spelled = {answer.lower(): answer for answer in ANSWERS}
    answer = spelled.get(cells["interpretable"].lower())
    where = f"Line {line} of the rating sheet {path}"
    if answer is None:
        raise InputError(f"{where} has the answer {cells['interpretable'][:40]!r}; allowed are "
                         f"{', '.join(ANSWERS)}.")
    if not cells["rater"]:
        raise InputError(f"{where} has an answer and no rater; fill in the column `rater`.")
    named = {name: cells.get(name, "") for name in (*COLUMNS, "feature", "layer")}
    if not named["card"] and not (named["feature"] and named["layer"]):
        raise InputError(f"{where} names neither a card nor a feature with its layer; use the "
                         "rating page's export or the sheet that the chapter wrote.")
    return {"file": path.name, "line": line, **named, "interpretable": answer}


def _card_of(row: dict[str, Any], known: pd.Index, cards: dict[tuple[int, int], str]) -> str:
    """The card that a row is about; a feature must be the card's own if both are named."""
    where = f"Line {row['line']} of the rating sheet {row['file']}"
    by_feature = None
    if row["feature"] and row["layer"]:
        with contextlib.suppress(ValueError, OverflowError):
            by_feature = cards.get((int(float(row["layer"])), int(float(row["feature"]))))
        if by_feature is None:
            raise InputError(f"{where} rates feature {row['feature'][:40]!r} of layer "
                             f"{row['layer'][:40]!r}, which was not drawn in this study; check "
                             "that the sheet belongs to this run.")
    card = row["card"] or by_feature
    if card not in known:
        raise InputError(f"{where} rates the card {str(card)[:40]!r}, which is not in this study's "
                         "deck; check that the sheet belongs to this run.")
    if by_feature not in (None, card):
        raise InputError(f"{where} names the card {card}, but its feature is on the card "
                         f"{by_feature}; leave one of the two empty.")
    return str(card)
