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
#     modules: [transcoder, training]
# ---

# %% [markdown]
# # Training a transcoder on every MLP layer
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
# residual stream. One forward pass of the model feeds the transcoders of all layers.

# %% tags=["parameters"]
profile = "demo"

# %%
import numpy as np
import pandas as pd

from scfm_circuits import figures
from scfm_circuits.language_model import get_model
from scfm_circuits.profile import ROOT, from_notebook
from scfm_circuits.report import Report
from scfm_circuits.sentences import load_corpus
from scfm_circuits.training import ActivationBuffer, get_transcoders

run = from_notebook(globals())
report = Report(run, "02_training")
corpus = load_corpus(run)
model, _ = get_model(run, corpus)
report.not_comparable(run)

# %% [markdown]
# ## Two losses that share a coefficient
#
# The paper's Equation 4 is
#
# ```{math}
# \mathcal{L} = \lVert\hat{\mathbf{y}} - \mathbf{y}\rVert_2^2 + \lambda\lVert\mathbf{z}\rVert_1
# ```
#
# The hyperparameters it lists are those of a published script whose loss is another one: there the
# squared error is averaged over the $d$ dimensions and divided by the target's norm. The penalty of
# the same $\lambda$ then weighs $d\,\lVert\mathbf{y}\rVert$ times more. Both are here by name
# (`equation4`, `normalized`); this run uses {glue:text}`training.loss`. The table says what its
# coefficient means in the units of Equation 4, layer by layer.

# %% tags=["hide-input"]
outputs = ActivationBuffer(model, corpus, run.model_copy(update={
    "buffer_tokens": 8192, "batch_tokens": min(run.batch_tokens, 8192)})).sites(0).outputs
norms = outputs.norm(dim=-1).mean(dim=1).cpu().numpy()
weight = model.config.hidden_size * norms if run.loss == "normalized" else np.ones(len(norms))
report.value("training.loss", run.loss)
report.table("loss_units", pd.DataFrame({
    "layer": np.arange(len(norms)), "mean_norm_of_target": norms,
    "times_equation_4": weight, "lambda_in_equation_4": run.l1_coefficient * weight,
}), caption="What the L1 coefficient of this run would be in the paper's Equation 4")

# %% [markdown]
# ## Settings
#
# The paper's settings beside this run's. Adam with betas 0.9 and 0.999; the learning rate rises
# linearly over {glue:text}`training.warmup` steps and then stays. After each step the features'
# writing directions are brought back to norm 1; the part of the gradient that would only change the
# norm is removed first. The input bias is the mean input, and the output bias starts at the mean
# output.

# %% tags=["hide-input"]
paper = pd.read_csv(ROOT / "data" / "paper" / "hyperparameters.csv")
width = run.expansion * model.config.hidden_size
steps = max(1, run.training_tokens // run.batch_tokens)
ours = {
    "n_layers": model.config.num_hidden_layers, "width": width, "expansion": run.expansion,
    "training_tokens": steps * run.batch_tokens, "batch_tokens": run.batch_tokens,
    "l1_coefficient": run.l1_coefficient, "learning_rate": run.learning_rate,
    "train_share": 1 - run.validation_share, "live_cut_table3": run.live_cut,
    "live_cut_table4": run.live_cut_table4, "fdr": run.fdr,
}
short = {"training_tokens": "tokens", "l1_coefficient": "l1", "learning_rate": "lr"}
report.values({short.get(name, name): ours[name] for name in list(ours)[:7]}, prefix="training.")
report.value("training.warmup", run.warmup_steps)
report.show(pd.DataFrame({
    "setting": paper["parameter"], "paper": paper["value"],
    "this run": [ours.get(name) for name in paper["parameter"]],
}), caption="Settings of the paper and of this run", digits=8)

# %% [markdown]
# ## The run

# %%
transcoders, history = get_transcoders(model, corpus, run)

# %% mystnb={"image": {"alt": "Four panels against training tokens, one line per layer: reconstruction loss, active features per token, fraction of variance unexplained, share of dead features."}, "figure": {"caption": "Training of all layers at once. Each line is a layer.", "name": "fig-training"}} tags=["hide-input"]
report.figure("training_curves", figures.transcoder_curves(history))

# %% tags=["hide-input"]
last = history[-1]
report.table("training", pd.DataFrame({
    "layer": np.arange(transcoders.n_layers),
    **{key: last[key] for key in ("reconstruction", "sparsity", "l0", "fvu", "dead")},
}), caption="The last training batch, per layer")

# %% tags=["remove-input"]
report.value("training.dead_share", float(np.mean(last["dead"])))
report.value("training.final_l0", float(np.mean(last["l0"])))
report.value("training.final_fvu", float(np.mean(last["fvu"])))

# %% [markdown]
# At the end {glue:text}`training.final_l0` features are active per token on average over layers,
# {glue:text}`training.final_fvu` of the outputs' variance is left unexplained, and a share of
# {glue:text}`training.dead_share` of the features is dead (it has not fired for
# `dead_after_tokens` tokens).
#
# ```{admonition} Key points
# - A coefficient without its loss says nothing: the same $\lambda$ differs about a thousandfold
#   between the paper's formula and the code its settings come from.
# - The files in `transcoders/` have the layout that circuit-tracer loads.
# ```
