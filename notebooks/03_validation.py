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
overrides: dict = {}

# %%
from scfm_circuits.report.chapter import open_chapter
from scfm_circuits.report.plots.cells_and_training import layer_alone, loss_comparison
from scfm_circuits.transcoders import validation

chapter = open_chapter("03_validation", profile, overrides)
chapter.not_comparable()

# %%
asked = (chapter.model, chapter.transcoders, chapter.corpus, chapter.held_out,
         chapter.profile.forward_cells)
scores = validation.compare_configurations(*asked)
fvu = validation.fraction_of_variance_unexplained(*asked)

# %% [markdown]
# ## Table 1: validation loss
#
# Mean cross-entropy of the next token in nats, over every prediction of the held-out cells that is
# not padding, prompt and answer included. "No MLP" means that the MLPs write nothing (zero
# ablation); a model so crippled can do worse than a uniform guess, as the paper's 12.67 does
# ($\ln 50304 = 10.83$).

# %% tags=["hide-input"]
table1 = validation.table1(scores, chapter.paper.loss)
loss, printed = (table1.set_index("configuration")[name] for name in ("validation_loss", "paper"))
chapter.values(dict(zip(validation.NAMES, loss, strict=True)), prefix="table1.")
chapter.table("table1", table1, caption="Table 1: validation loss (standard error over cells)")

# %% mystnb={"image": {"alt": "Two bar charts of validation loss for original, transcoders and no MLP: this run and the paper."}, "figure": {"caption": "Table 1 as a picture. The two panels have different models and data and are not to be compared bar by bar.", "name": "fig-table1"}} tags=["hide-input"]
chapter.figure("table1", loss_comparison(table1))

# %% tags=["remove-input"]
chapter.percent("table1.recovered", validation.recovered(loss), 1)
chapter.percent("table1.paper_recovered", validation.recovered(printed), 1)
order = loss["Original"] < loss["Transcoder"] < loss["No MLP"]
chapter.value("table1.order", order, "holds" if order else "does not hold")

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
table2 = validation.table2(scores, chapter.paper.kl)
chapter.values(dict(zip(("transcoder", "no_mlp"), table2["mean_kl"], strict=True)), "table2.")
chapter.table("table2", table2, caption="Table 2: KL(original || modified) in nats per token")

# %% [markdown]
# ## Beyond the paper: one layer at a time
#
# Errors of early layers are fed to later ones, so the tables above do not say which transcoders are
# good. Replacing one layer alone does, and so does each layer's fraction of variance unexplained
# (FVU), measured on the original model's activations.

# %% mystnb={"image": {"alt": "Left: KL against layer when one layer is replaced or removed. Right: bars of fraction of variance unexplained per layer."}, "figure": {"caption": "Each layer alone: what replacing or removing it does to the predictions, and how much of its output its transcoder leaves unexplained.", "name": "fig-layers"}} tags=["hide-input"]
chapter.figure("validation_layers", layer_alone(scores, fvu))

# %% tags=["hide-input"]
chapter.table("validation_layers", validation.each_layer(scores, fvu), caption="Each layer alone")

# %% [markdown]
# ```{admonition} Key points
# - The order of the three losses says that transcoders are better than nothing. The share of the gap
#   they close says how good they are.
# - Replacing one layer alone separates a transcoder's own error from what earlier layers pass on.
# ```
