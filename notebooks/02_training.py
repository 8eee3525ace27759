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

from scfm_circuits.cells.corpus import load_corpus
from scfm_circuits.common.files import read_json, time_in_words
from scfm_circuits.common.profile import ROOT, from_notebook
from scfm_circuits.models.loading import get_model
from scfm_circuits.report.benchmarks import shown_benchmark
from scfm_circuits.report.live_curves import watcher
from scfm_circuits.report.plots.cells_and_training import transcoder_curves
from scfm_circuits.report.report import Report, readable
from scfm_circuits.transcoders.training import cost
from scfm_circuits.transcoders.training.activation_buffer import ActivationBuffer
from scfm_circuits.transcoders.training.history import known_mean
from scfm_circuits.transcoders.training.run import get_transcoders

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
# The paper's settings beside this run's, and what else can be trained: each is a profile field, set
# as in `make book PARAMS="activation=topk"`. Adam has betas 0.9 and 0.999; the learning rate rises
# linearly over {glue:text}`training.warmup` steps and then stays, unless it is told to fall. After
# each step the features' writing directions are brought back to norm 1; the part of the gradient
# that would only change the norm is removed first. The input bias is the mean input, and the output
# bias starts at the mean output.

# %% tags=["hide-input"]
paper = pd.read_csv(ROOT / "data" / "paper" / "hyperparameters.csv").set_index("parameter")["value"]
config = model.config
width = run.expansion * config.hidden_size
steps = max(1, run.training_tokens // run.batch_tokens)
tokens = steps * run.batch_tokens
computed = {"n_layers": config.num_hidden_layers, "width": width, "training_tokens": tokens,
            "train_share": 1 - run.validation_share, "live_cut_table3": run.live_cut}
meanings = {
    "n_layers": "layers, each with a transcoder", "width": "features per layer",
    "expansion": "features over the model's width", "training_tokens": "tokens trained on",
    "batch_tokens": "tokens in a step", "l1_coefficient": "weight of the L1 penalty",
    "learning_rate": "Adam's learning rate", "train_share": "share of the cells trained on",
    "live_cut_table3": "log10 E(f) of a live feature, Table 3", "live_cut_table4":
    "the same, Table 4", "fdr": "q-value of an interpretable feature",
    "loss": "units of the squared error (above)", "activation": "relu, topk, batchtopk, jumprelu",
    "active_features": "per token, under topk and batchtopk",
    "skip": "a linear map beside the features", "site": "transcoder, or an autoencoder of outputs",
    "warmup_steps": "steps over which the learning rate rises",
    "l1_warmup_steps": "steps over which the penalty rises",
    "decay_steps": "last steps, in which the learning rate falls to 0",
    "resample_steps": "dead features start anew every so many steps; 0: never",
    "precision": "type of the products; auto: bfloat16 on a GPU",
}
# What the paper's text fixes beyond its table; where it names nothing, the cell says so.
described = {"loss": "equation4", "activation": "relu", "skip": False, "site": "transcoder"}
ours = {name: computed.get(name, getattr(run, name, None)) for name in meanings}
short = {"training_tokens": "tokens", "l1_coefficient": "l1", "learning_rate": "lr"}
report.values({short.get(name, name): ours[name] for name in list(meanings)[:7]},
              prefix="training.")
report.value("training.warmup", run.warmup_steps)
named = {**{name: int(value) if value == int(value) else value for name, value in paper.items()},
         **described}
report.show(pd.DataFrame({
    "setting": list(meanings), "what it is": list(meanings.values()),
    "paper": [readable(named[name]) if name in named else "not named" for name in meanings],
    "this run": [readable(value) for value in ours.values()],
}), caption="Settings of the paper and of this run")

# %% [markdown]
# ## The run
#
# In a notebook that is run by hand the curves are drawn while it trains; with `tensorboard: true` in
# the profile, `tensorboard --logdir results` shows them too. A run that was stopped goes on from its
# checkpoint.

# %%
transcoders, history = get_transcoders(model, corpus, run, logged=watcher(run))

# %% mystnb={"image": {"alt": "Four panels against training tokens, one line per layer: reconstruction loss, active features per token, fraction of variance unexplained, share of dead features."}, "figure": {"caption": "Training of all layers at once. Each line is a layer.", "name": "fig-training"}} tags=["hide-input"]
report.figure("training_curves", transcoder_curves(history))

# %% tags=["hide-input"]
last = history[-1]
report.table("training", pd.DataFrame({
    "layer": np.arange(transcoders.n_layers),
    **{key: last[key] for key in ("reconstruction", "sparsity", "l0", "fvu", "dead")},
}), caption="The last training batch, per layer")

# %% tags=["remove-input"]
report.value("training.dead_share", known_mean(last["dead"]))
report.value("training.final_l0", known_mean(last["l0"]))
report.value("training.final_fvu", known_mean(last["fvu"]))

# %% [markdown]
# At the end {glue:text}`training.final_l0` features are active per token on average over layers,
# {glue:text}`training.final_fvu` of the outputs' variance is left unexplained, and a share of
# {glue:text}`training.dead_share` of the features is dead (it has not fired for
# `dead_after_tokens` tokens).

# %% [markdown]
# ## What it costs
#
# For each token and layer, a step multiplies five times by a matrix of a transcoder's size (twice
# forward, three times backward, as nothing is differentiated in the input), and the token passes the
# model once. All layers share that pass; layer by layer it would be repeated.

# %% tags=["hide-input"]
record = read_json(run.results / "transcoders" / "training.json")
in_training = int(corpus.lengths[~corpus.held_out].sum())
kept = in_training <= run.buffer_tokens  # then the model runs once
operations = cost.training_operations(
    config.num_hidden_layers, config.hidden_size, width, tokens, cost.layer_weights(model),
    in_training if kept else tokens)
of_paper = cost.training_operations(
    int(paper["n_layers"]), int(paper["width"]) // int(paper["expansion"]), int(paper["width"]),
    int(paper["training_tokens"]))
seconds = max(record["seconds"], 1e-9)
report.value("training.paper_operations", of_paper, f"{of_paper:.3g}")
report.show(pd.DataFrame({
    "measure": ["tokens", "floating-point operations", "time", "tokens per second",
         "operations per second"],
    "this run": [readable(tokens), f"{operations:.3g}", time_in_words(seconds),
                 f"{tokens / seconds:,.0f}", f"{operations / seconds:.3g}"],
    "the paper's size": [readable(int(paper["training_tokens"])), f"{of_paper:.3g}",
                         time_in_words(of_paper / operations * seconds)
                         + ", projected", "not named", "as this run"],
}), caption="Cost of this run, and what its rate would mean for the paper's size")

# %% [markdown]
# The projection holds this run's operations per second against the paper's
# {glue:text}`training.paper_operations`. That is not comparable where this run's layers are smaller
# than the paper's: small products do not fill a processor, and the rest of a step weighs more. The
# benchmark measures the paper's layer size on the machine at hand.

# %% tags=["remove-input"]
shown_benchmark(report, ROOT / "results" / "bench" / "training.json")

# %% [markdown]
# ```{admonition} Key points
# - A coefficient without its loss says nothing: the same $\lambda$ differs about a thousandfold
#   between the paper's formula and the code its settings come from.
# - The files in `transcoders/` have the layout that circuit-tracer loads.
# ```
