"""The rating sheet of Table 3, and what raters sent back.

A sheet is one row per sampled feature. Filled sheets are CSV files from elsewhere, so their
columns, values and study are checked and their text is only ever shown escaped.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scfm_circuits import InputError
from scfm_circuits.features import Context, FeatureStatistics, ranked_genes, token_table

if TYPE_CHECKING:
    from scfm_circuits.profile import Profile
    from scfm_circuits.sentences import Corpus

ANSWERS = ("Yes", "No", "Unsure")
COLUMNS = ("study", "feature", "layer", "rater", "interpretable", "label", "note")


def study_name(profile: "Profile", features: np.ndarray, statistics: FeatureStatistics) -> str:
    """A name for the sample: profile, layer and a digest of what was drawn from what.

    Retrained transcoders have other features under the same numbers, so their activations enter.
    """
    content = (profile.human_layer, features.tolist(),
               statistics.fired[profile.human_layer, features].tolist())
    digest = hashlib.sha256(repr(content).encode()).hexdigest()[:10]
    return f"{profile.name}-layer{profile.human_layer}-{digest}"


def rating_sheet(study: str, layer: int, features: np.ndarray, statistics: FeatureStatistics,
                 contexts: Sequence[Sequence[Context]], corpus: "Corpus", rule: str
                 ) -> pd.DataFrame:
    """The sheet: what there is to see of each feature, and empty columns for the rater.

    Columns beside those of `COLUMNS`: log10_E_f, activating_tokens and genes (most often first),
    contexts (the token in brackets, strongest first).
    """
    genes = ranked_genes(statistics, layer, features, len(corpus.symbols), rule)
    rows = []
    for feature, (ranked, _), shown in zip(features, genes, contexts, strict=True):
        tokens = token_table(statistics, layer, int(feature), corpus).head(5)
        rows.append({
            "study": study, "feature": int(feature), "layer": layer,
            "log10_E_f": statistics.log10_frequency[layer, feature],
            "activating_tokens": "; ".join(
                f"{token} ({share:.0%})" for token, share in
                zip(tokens["token"], tokens["share"], strict=True)),
            "genes": " ".join(corpus.symbols[ranked[:12]].tolist()),
            "contexts": " | ".join(f"{c.before}[{c.token}]{c.after}" for c in shown),
            "rater": "", "interpretable": "", "label": "", "note": "",
        })
    return pd.DataFrame(rows)


def read_ratings(folder: Path, study: str, features: np.ndarray) -> pd.DataFrame:
    """All ratings of a study from the folder's CSV files, columns as in `COLUMNS`.

    Rows without an answer are passed over, as are those of other studies. Raises InputError for a
    file that is not such a sheet, an unknown answer or feature, or a rater who rated one twice.
    """
    parts = []
    for path in sorted(folder.glob("*.csv")):
        try:
            sheet = pd.read_csv(path, dtype=str, keep_default_na=False)
        except (ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:
            raise InputError(f"The rating sheet {path} is not readable CSV ({error}); export it "
                             "again.") from None
        missing = [column for column in COLUMNS if column not in sheet.columns]
        if missing:
            raise InputError(f"The rating sheet {path} lacks the columns {', '.join(missing)}; "
                             "use the sheet that the chapter wrote.")
        sheet = sheet[(sheet["study"] == study) & (sheet["interpretable"].str.strip() != "")]
        parts.append(_checked(sheet[list(COLUMNS)].copy(), path, features))
    ratings = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(COLUMNS))
    double = ratings[ratings.duplicated(["feature", "rater"])]
    if len(double):
        row = double.iloc[0]
        raise InputError(f"Rater {row['rater']!r} rated feature {row['feature']} twice in "
                         f"{folder}; keep one of the two rows.")
    return ratings


def feature_verdicts(ratings: pd.DataFrame) -> pd.Series:
    """Per rated feature, whether more than half of its ratings are Yes; indexed by feature.

    The rate is a share of features: two raters of one feature are not two features.
    """
    return (ratings["interpretable"] == "Yes").groupby(ratings["feature"]).mean() > 0.5


def foreign_rows(folder: Path, study: str) -> int:
    """Answered rows in the folder's sheets that belong to another study and are not counted."""
    sheets = (pd.read_csv(path, dtype=str, keep_default_na=False) for path in folder.glob("*.csv"))
    return sum(int(((sheet["study"] != study) & (sheet["interpretable"].str.strip() != "")).sum())
               for sheet in sheets)


def _checked(sheet: pd.DataFrame, path: Path, features: np.ndarray) -> pd.DataFrame:
    """Answers in one spelling and features as numbers, or InputError naming the first bad row."""
    spelled = {answer.lower(): answer for answer in ANSWERS}
    answers = sheet["interpretable"].str.strip().str.lower().map(spelled)
    if answers.isna().any():
        bad = sheet.loc[answers.isna(), "interpretable"].iloc[0]
        raise InputError(f"The rating sheet {path} has the answer {bad[:40]!r}; allowed are "
                         f"{', '.join(ANSWERS)}.")
    numbers = pd.to_numeric(sheet["feature"], errors="coerce")
    unknown = ~numbers.isin(features)
    if unknown.any():
        bad = sheet.loc[unknown, "feature"].iloc[0]
        raise InputError(f"The rating sheet {path} rates feature {bad[:40]!r}, which was not drawn "
                         "in this study; check that the sheet belongs to this run.")
    return sheet.assign(interpretable=answers, feature=numbers.astype(int))
