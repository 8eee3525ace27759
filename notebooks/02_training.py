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
#     after: [01_cells_and_model]
#     produces: [transcoders/config.yaml, transcoders/layer_*.safetensors, tables/training.csv]
#     exhibits: "Training of the transcoders"
#     modules: [transcoders/transcoder, transcoders/training/run, transcoders/training/gradients, transcoders/training/activation_buffer, transcoders/training/cost, transcoders/training/history]
# ---

# %% [markdown]
# # Training a transcoder on every MLP layer
#
# ```{admonition} In short
# :class: in-short
# - **Question.** Can a sparse, wide layer learn what each MLP of the model does?
# - **The paper says.** It trains one {term}`transcoder` per layer with the loss of its Equation 4, a squared error
#   and an L1 penalty {cite:p}`dunefsky2024transcoders`.
# - **We find.** After {glue:text}`training.tokens` tokens the transcoders leave
#   {glue:text}`training.final_fvu` of the variance of the last batch's outputs unexplained ({term}`FVU`), with
#   {glue:text}`training.final_l0` of {glue:text}`training.width` features active on a token ({term}`L0`).
# - **What it is worth.** A coefficient without its loss says nothing. The paper's hyperparameters match those
#   of a published script that uses a different loss. In this run's loss $\lambda$ weighs
#   {glue:text}`training.units_least` to {glue:text}`training.units_most` times, layer by layer, what it
#   would in the paper's formula.
# ```
#
# A transcoder reads what an MLP reads and writes an estimate of what it writes, through a wide layer
# of features of which few are active {cite:p}`dunefsky2024transcoders`:
#
# ```{math}
# \mathbf{z} = \mathrm{ReLU}(\mathbf{W}_\text{enc}(\mathbf{x} - \mathbf{b}_\text{in})
# + \mathbf{b}_\text{enc}), \qquad \hat{\mathbf{y}} = \mathbf{W}_\text{dec}\mathbf{z}
# + \mathbf{b}_\text{dec}
# ```
#
# The layer's input is the second LayerNorm's output, and the target is what the MLP adds to the
# {term}`residual stream`. One forward pass of the model feeds the transcoders of all layers.

# %% tags=["parameters"]
profile = "demo"
overrides: dict = {}

# %%
import numpy as np
import pandas as pd

from scfm_circuits.report.benchmarks import cost_table, shown_benchmark
from scfm_circuits.report.chapter import open_chapter
from scfm_circuits.report.live_curves import watcher
from scfm_circuits.report.plots.cells_and_training import transcoder_curves
from scfm_circuits.report.report import readable
from scfm_circuits.transcoders.training.cost import paper_cost, training_cost
from scfm_circuits.transcoders.training.history import known_mean
from scfm_circuits.transcoders.training.run import get_transcoders
from scfm_circuits.transcoders.training.settings import loss_units, settings_table

chapter = open_chapter("02_training", profile, overrides)
model, corpus, settings = chapter.model, chapter.corpus, chapter.profile
chapter.not_comparable()

# %% [markdown]
# ## Two losses that share a coefficient
#
# The paper's Equation 4 is
#
# ```{math}
# \mathcal{L} = \lVert\hat{\mathbf{y}} - \mathbf{y}\rVert_2^2 + \lambda\lVert\mathbf{z}\rVert_1
# ```
#
# The paper's hyperparameters match those of a published script, `train_transcoder.py` of
# {cite:t}`dunefsky2024transcoders`, which uses a different loss: there the squared error is averaged over
# the $d$ dimensions and divided by the target's norm. The penalty of the same $\lambda$ then weighs
# $d\,\lVert\mathbf{y}\rVert$ times more. A profile chooses one of the two losses by name (`equation4`,
# `normalized`); this run uses {glue:text}`training.loss`.

# %% tags=["fold:What the coefficient means in the units of Equation 4"]
chapter.value("training.loss", settings.loss)
units = pd.DataFrame(loss_units(model, corpus, settings))
chapter.rounded("training.units_least", units["times_equation_4"].min())
chapter.rounded("training.units_most", units["times_equation_4"].max())
chapter.table("loss_units", units,
              caption="What the L1 coefficient of this run would be in the paper's Equation 4")

# %% [markdown]
# ## Settings
#
# Adam has betas 0.9 and 0.999; the learning rate rises
# linearly over {glue:text}`training.warmup` steps and then stays, unless the profile lets it fall. After
# each step the features' writing directions are brought back to norm 1; the part of the gradient
# that would only change the norm is removed first. The input bias is the mean input, and the output
# bias starts at the mean output.

# %% [markdown] tags=["fold:Settings of the paper and of this run"]
# Each is a profile field, set as in `make book PARAMS="activation=topk"`.

# %%
rows = settings_table(model, settings, chapter.paper.settings)
short = {"training_tokens": "tokens", "l1_coefficient": "l1", "learning_rate": "lr"}
chapter.values({short.get(one.name, one.name): one.ours for one in rows[:7]}, prefix="training.")
chapter.value("training.warmup", settings.warmup_steps)
chapter.show(pd.DataFrame(rows, columns=["setting", "what it is", "paper", "this run"])
             .map(readable), caption="Settings of the paper and of this run")

# %% [markdown]
# ### What the paper leaves open
#
# The paper does not say how it treats features that never fire, whether the input bias is trained, in
# which precision it computes, in which order tokens are seen, or whether texts are cut.

# %% [markdown] tags=["fold:What the published script and this book do"]
# The script's way need not be the authors': the paper does not name it. This book does what the last
# column says.
#
# | | the script | this book |
# | --- | --- | --- |
# | features that do not fire | ghost gradients, after 5,000 steps without firing (`use_ghost_grads`, `dead_feature_window`) | none, or `resample_steps` |
# | input bias | trained, from the mean input | the mean input, not trained |
# | products | float32 | `precision`: bfloat16 on a GPU unless it says otherwise, else float32 |
# | buffer of activations | 524,288 tokens, half of them exchanged at a time | `buffer_tokens`, used up before it is filled again |
# | texts | cut to 128 tokens | whole prompts |
#
# Ghost gradients act on features that would otherwise stay dead, and by Table 4 fewer than one feature
# in ten is live on average over layers, so this may matter for its counts. It has not been measured here.

# %% [markdown]
# ## The run
#
# All layers are trained at once, for {glue:text}`training.tokens` tokens. A run that is stopped goes on
# from its checkpoint.

# %%
transcoders, history = get_transcoders(model, corpus, settings, logged=watcher(settings))

# %% mystnb={"image": {"alt": "Four panels against training tokens, one line per layer: reconstruction loss, active features per token, fraction of variance unexplained, share of dead features."}, "figure": {"caption": "Training of all layers at once: each line is a layer.", "name": "fig-training"}}
chapter.figure("training_curves", transcoder_curves(history))

# %% tags=["fold:The last training batch per layer"]
last = history[-1]
chapter.table("training", pd.DataFrame({
    "layer": np.arange(transcoders.n_layers),
    **{key: last[key] for key in ("reconstruction", "sparsity", "l0", "fvu", "dead")},
}), caption="The last training batch, per layer")

# %%
chapter.value("training.final_l0", known_mean(last["l0"]))
chapter.value("training.dead_after", settings.dead_after_tokens)
for key, name in (("dead_share", "dead"), ("final_fvu", "fvu")):
    chapter.percent(f"training.{key}", known_mean(last[name]), 1)

# %% [markdown] tags=["unfold"]
# In the last batch {glue:text}`training.final_l0` features are active per token on average over layers,
# {glue:text}`training.final_fvu` of the outputs' variance is left unexplained, and
# {glue:text}`training.dead_share` of the features are {term}`dead <dead feature>` (they have not fired for
# {glue:text}`training.dead_after` tokens).

# %% [markdown]
# ## What it costs
#
# Training all layers at the paper's size takes about {glue:text}`training.paper_operations`
# floating-point operations.

# %% [markdown] tags=["fold:Cost of this run and of one of the paper's size"]
# For each token and layer, a step multiplies five times by a matrix of a transcoder's size (twice
# forward, three times backward, as nothing is differentiated in the input), and the token passes the
# model once. All layers share that pass; layer by layer it would be repeated.

# %%
cost = training_cost(model, corpus, settings)
projected = paper_cost(chapter.paper.settings, cost)
chapter.value("training.paper_operations", projected.operations, f"{projected.operations:.3g}")
chapter.show(cost_table(cost, projected),
             caption="Cost of this run, and what its rate would mean for the paper's size")

# %% [markdown]
# The projected time is the paper's number of operations over this run's operations per second. It is too
# long where this run's layers are smaller than the paper's: small products do not fill a processor, and
# the rest of a step weighs more. The benchmark measures the paper's layer size on the machine at hand.
#
# In a notebook that is run by hand the curves are drawn while it trains; with `tensorboard: true` in
# the profile, `tensorboard --logdir results` shows them too.

# %%
shown_benchmark(chapter)
