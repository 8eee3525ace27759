"""What the controls say, as tables: shares per layer, Table 4, and a row for every feature."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from scfm_circuits.common.intervals import wilson_interval
from scfm_circuits.common.profile import Profile
from scfm_circuits.enrichment.controls.layer_counts import NULLS, LayerControls, rules_shown
from scfm_circuits.enrichment.significance import benjamini_hochberg, empirical_p
from scfm_circuits.features.baselines import DIRECTIONS

FEATURES = "features"
"""How the tables call the trained features' own lists."""


def share_table(layers: Sequence[LayerControls], baselines: Sequence[str], profile: Profile
                ) -> pd.DataFrame:
    """Share of lists called interpretable, by rule, kind of lists and layer.

    Columns: rule, lists, layer, tested, called, percentage, lower_95, upper_95. For features and
    baselines the interval is Wilson's; for null lists it is the band that holds the middle 95 % of
    the draws: where the layer's percentage would be if its features were such lists.
    """
    rows = []
    for r, rule in enumerate(rules_shown(profile)):
        for layer, one in enumerate(layers):
            rows.append([rule, FEATURES, layer, *_wilson_row(one.called[r])])
            for kind, called in zip(NULLS, one.null_called[r], strict=True):
                rows.append([rule, kind, layer, *_band_row(called, len(one.features))])
            for kind, baseline in zip(baselines, one.baseline_called, strict=True):
                rows.append([rule, kind, layer, *_wilson_row(baseline[r])])
    return pd.DataFrame(rows, columns=["rule", "lists", "layer", "tested", "called", "percentage",
                                       "lower_95", "upper_95"])


def _wilson_row(called: np.ndarray) -> tuple[float, ...]:
    n, k = called.size, int(called.sum())
    low, high = wilson_interval(k, n) if n else (np.nan, np.nan)
    return n, k, 100 * k / n if n else np.nan, 100 * low, 100 * high


def _band_row(called: np.ndarray, n: int) -> tuple[float, ...]:
    if not n:
        return 0, 0, np.nan, np.nan, np.nan
    low, high = np.quantile(called / n, [0.025, 0.975])
    return n * called.size, int(called.sum()), 100 * called.mean() / n, 100 * low, 100 * high


def pooled(shares: pd.DataFrame) -> pd.DataFrame:
    """`share_table` with all layers together: rule, lists, tested, called, percentage.

    The percentage is the mean of the layers', so that kinds with other numbers of live features in
    each layer are compared layer by layer.
    """
    return shares.groupby(["rule", "lists"], sort=False).agg(
        {"tested": "sum", "called": "sum", "percentage": "mean"}).reset_index()


def verdict_table(layers: Sequence[LayerControls], baselines: Sequence[str], profile: Profile
                  ) -> pd.DataFrame:
    """Every live feature against every control.

    Columns: layer, feature, n_genes, interpretable_<rule>, p (smallest, rule `corpus`), q_<rule>
    (BH over terms), p_<control> for each control, p_controls (the largest of these, or 1 for a
    feature without a significant term under the rule `corpus`), q_controls (BH over all features of
    all layers), beyond_all_controls (q_controls below the profile's FDR).

    Against null lists the p-value is each feature's own; against a baseline it is the share of the
    baseline's features in that layer that do as well, whatever the lengths of their lists. A
    baseline without a live feature in a layer says nothing there (missing). The largest p tests
    "no better than at least one of the controls" (intersection-union), so each has to be beaten.
    The model's own directions are no control of this kind: they may know what the model knows.
    """
    frames = []
    rules = rules_shown(profile)
    corpus_rule = rules.index("corpus")
    for layer, one in enumerate(layers):
        p = one.min_p[corpus_rule]
        against = dict(zip(NULLS, one.null_p, strict=True))
        for name, null in zip(baselines, one.baseline_min_p, strict=True):
            if name in DIRECTIONS:
                continue
            against[name] = empirical_p(p, null) if null.size else np.full(p.size, np.nan)
        frames.append(pd.DataFrame({
            "layer": layer, "feature": one.features, "n_genes": one.lengths,
            **{f"interpretable_{rule}": one.called[r] for r, rule in enumerate(rules)},
            "p": p, **{f"q_{rule}": one.min_q[r] for r, rule in enumerate(rules)},
            **{f"p_{column_name(name)}": values for name, values in against.items()},
            # Decided before the correction, which would not hold over a later choice.
            "p_controls": np.where(one.called[corpus_rule], np.nanmax(
                np.stack(list(against.values())), axis=0), 1.0) if p.size else p,
        }))
    table = pd.concat(frames, ignore_index=True)
    table["q_controls"] = benjamini_hochberg(table["p_controls"])
    table["beyond_all_controls"] = table["q_controls"] < profile.fdr
    return table


def smallest_possible_p(layers: Sequence[LayerControls], baselines: Sequence[str], draws: int
                        ) -> float:
    """The smallest p_controls that `verdict_table` can have, in the layer that allows the smallest.

    draws: null lists of each kind. In a layer the control with the fewest of them decides.
    """
    return min(1 / (1 + min([draws, *(
        null.size for name, null in zip(baselines, one.baseline_min_p, strict=True)
        if null.size and name not in DIRECTIONS)])) for one in layers if len(one.features))


def single_controls(verdicts: pd.DataFrame, fdr: float) -> pd.DataFrame:
    """How many features are ahead of each control by itself: control, features (that it can judge),
    ahead (p below `fdr`, uncorrected), percentage; last the largest p of all controls.

    A feature that is no better than a control is ahead of it with probability `fdr`. Ahead of all
    at once it is far more rarely, unless the controls are equally strong, so a share below `fdr` of
    all together says nothing of each.
    """
    names = [str(name) for name in verdicts if str(name).startswith("p_")]
    # Only some of a column's underscores are spaces.
    heading_of = {kind.replace("-", "_").replace(" ", "_"): kind
                  for kind in (*NULLS, "re-initialised model")}
    rows = []
    for name in sorted(names, key=lambda one: one == "p_controls"):
        p = verdicts[name].dropna()
        shown = ("all of them" if name == "p_controls" else
                 heading_of.get(name[2:], name[2:].replace("_", " ")))
        rows.append({"control": shown, "features": len(p), "ahead": int((p < fdr).sum()),
                     "percentage": 100 * float((p < fdr).mean()) if len(p) else np.nan})
    return pd.DataFrame(rows)


def detectable(verdicts: pd.DataFrame, p: float, fdr: float) -> int | None:
    """How many more features with p_controls = p the table would need for these to be beyond all
    controls after correction; None if even as many as there are would not do."""
    ranked = np.sort(verdicts["p_controls"].to_numpy())
    better = int(np.searchsorted(ranked, p, side="right"))
    for k in range(1, len(ranked) + 1):
        if p * (len(ranked) + k) / (better + k) < fdr:
            return k
    return None


def column_name(control: str) -> str:
    """A control's name in the head of a column."""
    return control.replace(" ", "_").replace("-", "_")


def table4(shares: pd.DataFrame, verdicts: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Table 4 as it is kept: one row per layer.

    Columns: rule and gene_rule (the profile's), layer, live, interpretable and percentage under
    them; beyond_all_controls and its percentage (rule `corpus`, gene rule `occurrence`, as
    `verdicts` has it); then, under the profile's gene rule, for each rule interpretable_<rule>,
    percentage_<rule> with <..>_lower_95 and <..>_upper_95, and the same percentage and limits for
    each control as <control>_<rule>.
    """
    rule = profile.enrichment_rule
    own = shares[(shares["rule"] == rule) & (shares["lists"] == FEATURES)].set_index("layer")
    beyond = verdicts.groupby("layer")["beyond_all_controls"].sum()
    beaten = beyond.reindex(own.index, fill_value=0).astype(int)
    columns: dict[str, Any] = {
        "rule": rule, "gene_rule": profile.gene_rule, "live": own["tested"],
        "interpretable": own["called"], "percentage": own["percentage"],
        "beyond_all_controls": beaten,
        "percentage_beyond_all_controls": 100 * beaten / own["tested"].replace(0, np.nan)}
    for (name, lists), part in shares.groupby(["rule", "lists"], sort=False):
        rows = part.set_index("layer")
        key = f"percentage_{name}" if lists == FEATURES else f"{column_name(str(lists))}_{name}"
        if lists == FEATURES:
            columns[f"interpretable_{name}"] = rows["called"]
        columns |= {key: rows["percentage"], f"{key}_lower_95": rows["lower_95"],
                    f"{key}_upper_95": rows["upper_95"]}
    table = pd.DataFrame(columns, index=own.index).reset_index()
    first = ["rule", "gene_rule", "layer"]
    return table[[*first, *[name for name in table if name not in first]]]
