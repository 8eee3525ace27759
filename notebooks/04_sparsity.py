# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   scfm:
#     after: [02_training]
#     produces: [tables/l0.csv, tables/live_features.csv, features.npz]
#     exhibits: "Figure 2"
#     modules: [features/statistics]
# ---

# %% [markdown]
# # How sparse the features are
#
# ```{admonition} In short
# :class: in-short
# - **Question.** How many features are active on a token ({term}`L0`), and how many are {term}`live <live feature>`?
# - **The paper says.** Its Figure 2 has L0 layer by layer, without numbers; its tables imply about
#   {glue:text}`l0.implied` for one layer.
# - **We find.** On average over layers {glue:text}`l0.mean` of {glue:text}`l0.width` features are active on
#   a token. {glue:text}`live.table4` features are live by the cut of Table 4.
# - **What it is worth.** L0 alone says little: any value can be reached by the choice of $\lambda$, so it belongs
#   beside the loss of {doc}`03_validation`. What counts as live depends on the corpus, not only on the
#   features.
# ```
#
# Here and in the chapters that follow, features are counted over every token of all cells.

# %% tags=["parameters"]
profile = "demo"
overrides: dict = {}

# %%
import numpy as np
import pandas as pd

from scfm_circuits.paper.intervals import implied_l0
from scfm_circuits.report.chapter import open_chapter
from scfm_circuits.report.plots.features import l0_per_layer

chapter = open_chapter("04_sparsity", profile, overrides)
statistics, width = chapter.statistics, chapter.transcoders.n_features
chapter.not_comparable()

# %% mystnb={"image": {"alt": "Line of mean active features per token against layer, with a band from the 10 to the 90 percent quantile over tokens; a diamond with its interval is what the paper's tables imply for its layer 12."}, "figure": {"caption": "Mean number of active features per token, as in the paper's Figure 2, with the spread over tokens that the paper does not show. Diamond: what the paper's Tables 3 and 4 imply for its layer 12, at the same relative depth, with a 95 % interval.", "name": "fig-l0"}}
quantiles = statistics.l0_quantiles((0.1, 0.5, 0.9))
printed = chapter.paper.table4.set_index("layer")["total"]
implied = implied_l0(chapter.paper.table3["log10_E_f"].to_numpy(), printed[12], -3)
chapter.figure("figure2_l0", l0_per_layer(statistics.l0, quantiles,
                                          (12 / printed.index.max(), *implied)))

# %% tags=["fold:L0 per layer as a table"]
layers = np.arange(len(statistics.l0))
chapter.table("l0", pd.DataFrame({
    "layer": layers, "l0": statistics.l0, "quantile_10": quantiles[:, 0],
    "median": quantiles[:, 1], "quantile_90": quantiles[:, 2],
    "share_of_width": statistics.l0 / width,
}), caption="L0 per layer")

# %%
chapter.values({f"layer_{i}": value for i, value in enumerate(statistics.l0)}, prefix="l0.")
chapter.values({"mean": statistics.l0.mean(), "width": width}, prefix="l0.")
chapter.rounded("l0.implied", implied.value)
chapter.value("l0.implied_interval", implied.low, f"{implied.low:.0f} to {implied.high:.0f}")

# %% [markdown] tags=["unfold"]
# The paper prints no numbers for its Figure 2, but its tables imply one. L0 is the sum of the
# features' firing rates: Table 4 counts the live features of layer 12, and Table 3 has the rates of a
# random sample of them. That makes about {glue:text}`l0.implied` features a token
# (95 % interval {glue:text}`l0.implied_interval`).
#
# ## Live features
#
# The paper counts a feature as live if it fires often enough: $\log_{10} E(f) \ge -4$ for the human
# evaluation, $-3$ for Table 4. In this corpus of {glue:text}`live.n_tokens` tokens, a feature at the
# cut of $-4$ has fired {glue:text}`live.at_cut` times. All tokens count, also those of the question and the
# answer: {glue:text}`live.outside` of the {glue:text}`live.table4` features above the cut of $-3$ are active
# outside genes more often than in them, and still count in Table 4.

# %%
cut, cut_table4 = chapter.profile.live_cut, chapter.profile.live_cut_table4
chapter.value("live.n_tokens", statistics.n_tokens)
chapter.rounded("live.at_cut", statistics.n_tokens * 10**cut)
live = statistics.live(cut_table4)
outside = live & statistics.mostly_outside_genes
chapter.values({"outside": int(outside.sum()), "table4": int(live.sum())}, prefix="live.")
chapter.table("live_features", pd.DataFrame({
    "layer": layers,
    "features": width,
    "never_fired": (statistics.fired == 0).sum(axis=1),
    "live_human_evaluation": statistics.live(cut).sum(axis=1),
    "live_table4": live.sum(axis=1),
    "mostly_outside_genes": outside.sum(axis=1),
}), caption="Live features per layer, under both of the paper's cuts; of those of Table 4, how "
    "many are active outside genes more often than in them")
