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
#     produces: [tables/table1.csv, tables/table2.csv, tables/validation_layers.csv, figures/*.png, figures/*.svg]
#     exhibits: "Tables 1 and 2"
#     modules: [transcoders/validation]
# ---

# %% [markdown]
# # What replacing the MLPs costs
#
# Tables 1 and 2 of the paper: the loss on held-out cells of the original model, of the model with
# every MLP replaced by its transcoder, and of the model without MLPs; and how far the two move the
# model's predictions.

# %% tags=["parameters"]
profile = "demo"

# %%
import numpy as np
import pandas as pd

from scfm_circuits.cells.corpus import load_corpus
from scfm_circuits.common.profile import ROOT, from_notebook
from scfm_circuits.models.loading import get_model
from scfm_circuits.report.plots.cells_and_training import layer_alone, loss_comparison
from scfm_circuits.report.report import Report
from scfm_circuits.transcoders.training.run import get_transcoders
from scfm_circuits.transcoders.validation import (
    compare_configurations,
    fraction_of_variance_unexplained,
)

run = from_notebook(globals())
report = Report(run, "03_validation")
corpus = load_corpus(run)
model, _ = get_model(run, corpus)
transcoders, _ = get_transcoders(model, corpus, run)
report.not_comparable(run)

# %%
held_out = np.flatnonzero(corpus.held_out)
scores = compare_configurations(model, transcoders, corpus, held_out, run.forward_cells)
fvu = fraction_of_variance_unexplained(model, transcoders, corpus, held_out, run.forward_cells)

# %% [markdown]
# ## Table 1: validation loss
#
# Mean cross-entropy of the next token in nats, over every prediction of the held-out cells that is
# not padding, prompt and answer included. "No MLP" means that the MLPs write nothing (zero
# ablation); a model so crippled can do worse than a uniform guess, as the paper's 12.67 does
# ($\ln 50304 = 10.83$).

# %% tags=["hide-input"]
names = {"original": "Original", "transcoder": "Transcoder", "no_mlp": "No MLP"}
whole = scores[scores["layer"] == -1].set_index("configuration")
printed = pd.read_csv(ROOT / "data" / "paper" / "table1.csv").set_index("configuration")
printed = printed["validation_loss"]
table1 = pd.DataFrame({
    "configuration": list(names.values()),
    "validation_loss": [whole.loc[key, "loss"] for key in names],
    "standard_error": [whole.loc[key, "loss_se"] for key in names],
    "paper": [printed[name] for name in names.values()],
})
report.values({key: whole.loc[key, "loss"] for key in names}, prefix="table1.")
report.table("table1", table1, caption="Table 1: validation loss (standard error over cells)")

# %% mystnb={"image": {"alt": "Two bar charts of validation loss for original, transcoders and no MLP: this run and the paper."}, "figure": {"caption": "Table 1 as a picture. The two panels have different models and data and are not to be compared bar by bar.", "name": "fig-table1"}} tags=["hide-input"]
report.figure("table1", loss_comparison(
    scores, {key: float(printed[name]) for key, name in names.items()}))

# %% tags=["remove-input"]
loss = whole["loss"]
recovered = (loss["no_mlp"] - loss["transcoder"]) / (loss["no_mlp"] - loss["original"])
theirs = (printed["No MLP"] - printed["Transcoder"]) / (printed["No MLP"] - printed["Original"])
report.value("table1.recovered", float(recovered), f"{100 * recovered:.1f} %")
report.value("table1.paper_recovered", float(theirs), f"{100 * theirs:.1f} %")
order = loss["original"] < loss["transcoder"] < loss["no_mlp"]
report.value("table1.order", bool(order), "holds" if order else "does not hold")

# %% [markdown]
# The order original < transcoder < no MLP {glue:text}`table1.order` here. Of the loss that removing
# the MLPs costs, the transcoders recover {glue:text}`table1.recovered`; by the same arithmetic the
# paper's recover {glue:text}`table1.paper_recovered`. That is the number to look at: a replaced
# model whose loss is 4.63 where the original's is 2.48 has lost much of what the model knew.
#
# ## Table 2: KL divergence
#
# KL(original || modified) of the next-token distributions, in float32 log-softmax over the same
# tokens.

# %% tags=["hide-input"]
printed_kl = pd.read_csv(ROOT / "data" / "paper" / "table2.csv").set_index("configuration")
table2 = pd.DataFrame({
    "configuration": [names[key] for key in ("transcoder", "no_mlp")],
    "mean_kl": [whole.loc[key, "kl"] for key in ("transcoder", "no_mlp")],
    "standard_error": [whole.loc[key, "kl_se"] for key in ("transcoder", "no_mlp")],
    "paper": [printed_kl.loc[names[key], "mean_kl"] for key in ("transcoder", "no_mlp")],
})
report.values({key: whole.loc[key, "kl"] for key in ("transcoder", "no_mlp")}, prefix="table2.")
report.table("table2", table2, caption="Table 2: KL(original || modified) in nats per token")

# %% [markdown]
# ## Beyond the paper: one layer at a time
#
# Errors of early layers are fed to later ones, so the tables above do not say which transcoders are
# good. Replacing one layer alone does, and so does each layer's fraction of variance unexplained
# (FVU), measured on the original model's activations.

# %% mystnb={"image": {"alt": "Left: KL against layer when one layer is replaced or removed. Right: bars of fraction of variance unexplained per layer."}, "figure": {"caption": "Each layer alone: what replacing or removing it does to the predictions, and how much of its output its transcoder leaves unexplained.", "name": "fig-layers"}} tags=["hide-input"]
report.figure("validation_layers", layer_alone(scores, fvu))

# %% tags=["hide-input"]
single = scores[scores["layer"] >= 0].pivot(index="layer", columns="configuration",
                                            values=["loss", "kl"])
layers = pd.DataFrame({
    "layer": single.index, "fvu": fvu,
    "loss_replaced": single["loss", "transcoder"], "loss_removed": single["loss", "no_mlp"],
    "kl_replaced": single["kl", "transcoder"], "kl_removed": single["kl", "no_mlp"],
})
report.table("validation_layers", layers, caption="Each layer alone")

# %% [markdown]
# ```{admonition} Key points
# - The order of the three losses says that transcoders are better than nothing. The share of the gap
#   they close says how good they are.
# - Replacing one layer alone separates a transcoder's own error from what earlier layers pass on.
# ```
