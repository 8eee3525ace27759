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
#     after: [05_human_evaluation, 06_enrichment, 07_endothelial_case_study, 08_controls]
#     produces: [feature_pages/manifest.js, feature_pages/index_*.js, feature_pages/panels_*.js]
#     page: features
#     exhibits: "beyond the paper"
#     modules: [report/boxes/features, report/boxes/feature_files]
# ---

# %% [markdown]
# # Explore the features
#
# Every live feature of this run, and every feature of a circuit. Start with those that rules have
# chosen, or search for a gene, a token, a term or a name such as `L1.F20`; sort by a column, and open
# a feature by its name. An address such as `features.html#L1.F20` leads to one feature.
#
# <!-- generated: features -->
#
# ## Where the columns come from
#
# {doc}`05_human_evaluation` has the score, {doc}`06_enrichment` terms and controls,
# {doc}`07_endothelial_case_study` and {doc}`08_controls` the circuits. Two things are added here that
# ask the weights alone:
#
# - **nearest features**: the features, of any layer, whose decoder rows point the same way;
# - **logits**: the tokens that a feature's decoder row raises and lowers if it is read by the
#   unembedding at once. The final norm's gain is applied; its division by the size of the residual and
#   everything that later layers do are left out.

# %% tags=["parameters"]
profile = "demo"
overrides: dict = {}

# %%
import numpy as np
import pandas as pd

from scfm_circuits.report.boxes.features import make_pages
from scfm_circuits.report.chapter import open_chapter

chapter = open_chapter("11_features", profile, overrides)

# %%
index, panels = make_pages(chapter.model, chapter.transcoders, chapter.statistics, chapter.corpus,
                           chapter.profile)

# %% tags=["remove-input"]
chapter.values({"features": len(index), "in_circuits": (index["circuits"] > 0).sum()},
               prefix="feature_pages.")

# %% [markdown]
# The index has {glue:text}`feature_pages.features` features, of which
# {glue:text}`feature_pages.in_circuits` are in a circuit of {doc}`07_endothelial_case_study` or
# {doc}`08_controls`.

# %% tags=["hide-input"]
nearest = np.array([panel["nearest"][0] for panel in panels])
layers = index["layer"].to_numpy()
distance = pd.Series(np.abs(nearest[:, 0] - layers))
chapter.show(pd.DataFrame([{
    "layer": layer, "features": int(own.sum()),
    "median cosine of the nearest": float(np.median(nearest[own, 2])),
    "% with the nearest in the same layer": float(100 * (distance[own] == 0).mean()),
    "in a circuit": int((index.loc[own, "circuits"] > 0).sum()),
} for layer in np.unique(layers) for own in [layers == layer]]), digits=3,
    caption="Features by layer, and how near the nearest other feature's decoder row is")
