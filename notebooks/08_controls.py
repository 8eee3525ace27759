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
#     after: [04_sparsity]
#     produces: [tables/circuit_faithfulness.csv, tables/circuit_predictions.csv, tables/knock_out.csv,
#       tables/circuit_flow.csv, tables/circuit_heads.csv, tables/circuit_overlap.csv, tables/task_circuit.csv]
#     exhibits: "beyond the paper"
#     modules: [circuits/attribution, circuits/circuit, circuits/interventions, circuits/prediction, circuits/contrast, circuits/knock_out, circuits/task_circuit, circuits/structure, cells/simulated, circuits/planted_genes, features/known_truth]
# ---

# %% [markdown]
# # Is the circuit what the model uses?
#
# ```{admonition} In short
# :class: in-short
# - **Question.** Does the target change as a {term}`circuit` predicts, and by more than if other features
#   are changed? Is the circuit enough by itself?
# - **The paper says.** It has no control for its circuit, and leaves what circuits have in common to
#   future work.
# - **We find.** Taking the circuit away changes its target by {glue:text}`faithfulness.circuit` of its value
#   (median over {glue:text}`faithfulness.cells` cells); taking away other features at the same
#   tokens, which write {glue:text}`faithfulness.size_same_token` times as much, changes it by
#   {glue:text}`faithfulness.random`. Of {glue:text}`prediction.made` kinds of
#   prediction {glue:text}`prediction.held` hold, {glue:text}`prediction.direction` in sign only, and
#   {glue:text}`prediction.failed` failed. What taking a
#   gene out does ({term}`knock-out`), circuits say better than cheap rivals by
#   {glue:text}`knock_out.won` of {glue:text}`knock_out.measures` measures.
# - **What it is worth.** With every other feature at the mean of its own kind of token, the circuit keeps
#   {glue:text}`faithfulness.own_kind_circuit` of its target, and no circuit at all keeps
#   {glue:text}`faithfulness.own_kind_none`. Circuits of the call itself have a {term}`faithfulness` of
#   {glue:text}`knock_out.faithfulness`. With no feature at all, every MLP at its mean for
#   the kind of token, the model still gives {glue:text}`task.none_mean` of its right answers.
# ```

# %% tags=["parameters"]
profile = "demo"
overrides: dict = {}

# %%
from scfm_circuits.circuits import knock_out, prediction, studies, task_curves
from scfm_circuits.circuits.calls import calls_of
from scfm_circuits.circuits.planted_genes import known_truth
from scfm_circuits.circuits.task_circuit import CHOSEN_BY, MEAN, ZERO, task_circuit
from scfm_circuits.features.known_truth import known_truth_study, verdict
from scfm_circuits.report.chapter import open_chapter
from scfm_circuits.report.plots import circuits as plots
from scfm_circuits.report.plots.features import known_truth_scores

chapter = open_chapter("08_controls", profile, overrides, exact=True)
settings, corpus = chapter.profile, chapter.corpus
chapter.not_comparable()

# %%
chapter.only_guesses()

# %%
study = studies.circuit_study(chapter.model, chapter.transcoders, corpus, settings)

# %% [markdown]
# ## Taking the circuit away
#
# For up to {glue:text}`faithfulness.per_type` {term}`held-out cells <held-out cell>` of every type, the
# strongest feature of the last layer is traced, the paper's kind of target. Then the circuit's features are changed
# in the real model, and the target's {term}`pre-activation` is read again.

# %% mystnb={"image": {"alt": "Left: predicted against measured change of the target when circuit features or random features are taken away. Right: measured changes when they are taken away, doubled, or left alone."}, "figure": {"caption": "What changing features does to the circuit's target, as a share of its pre-activation; -1 means that the target is gone. Each point is a cell; for random features it is the mean of several circuits, with their range as a line (first panel). Short bars: medians.", "name": "fig-faithfulness"}}
chapter.figure("circuit_faithfulness", plots.faithfulness(study.effects))

# %% tags=["fold:The same in numbers and by cell type"]
found = studies.faithfulness(study)
chapter.show(found.medians.replace({"ablation": "taken away", "doubling": "doubled"}), digits=2, caption="Medians over cells: changes as shares of the target's "
             "pre-activation, and what the features write relative to the circuit's")

# %%
chapter.show(found.by_type, digits=2, caption="Taken away, by cell type: medians over cells, the smallest and "
             "the largest change, and the medians of random circuits")

# %%
chapter.table("circuit_faithfulness", study.effects, rows=0, caption="The same for every cell: for "
              "random features the mean of several circuits, with the lowest and highest measured "
              "change")

# %%
chapter.value("faithfulness.kinds", settings.in_words, "first pieces of genes, later pieces, each word of the "
              "question, the answer's last token, its other tokens" if settings.in_words else
              "genes, and each special token")
for name, number in {**found.numbers, **found.ratios}.items():
    share = isinstance(number, float) and name != "n_features" and not name.startswith("size_")
    (chapter.percent if share else chapter.value)(f"faithfulness.{name}", number)

# %% [markdown] tags=["unfold"]
# - **Taken away**, the circuit's features (a median of {glue:text}`faithfulness.n_features`) change the
#   target by {glue:text}`faithfulness.circuit`; others at the same tokens by
#   {glue:text}`faithfulness.random`, others of the same size by {glue:text}`faithfulness.random_size`.
#   In {glue:text}`faithfulness.cells_beyond_random` of {glue:text}`faithfulness.cells` cells the circuit
#   lowers the target by more than every random circuit of either kind.
# - **Doubled**, they change it by {glue:text}`faithfulness.doubling_circuit` (others:
#   {glue:text}`faithfulness.doubling_random` and {glue:text}`faithfulness.doubling_random_size`).
# - **Alone**, with all other features at their mean over all tokens, they keep
#   {glue:text}`faithfulness.alone_circuit` of the target; no circuit at all leaves
#   {glue:text}`faithfulness.alone_none`.
# - **Alone, own kind**, with all other features at their mean over tokens of the same kind, they keep
#   {glue:text}`faithfulness.own_kind_circuit`; no circuit at all leaves
#   {glue:text}`faithfulness.own_kind_none`. The nearer that last number is to 100 %, the less of the target
#   hangs on what features say of this cell, and the less a circuit of features can explain.

# %% [markdown] tags=["fold:How features are changed and with what they are compared"]
# The {glue:text}`faithfulness.cells` cells are of {glue:text}`faithfulness.types` types. Number of different
# targets: {glue:text}`faithfulness.targets`. In the model, attention, LayerNorm and the MLPs in between
# respond as they will.
#
# - **Taken away:** what the features write is taken out. **Doubled:** they write twice as much. The
#   prediction holds attention and LayerNorm still, so that only attention passes the difference on.
# - **Alone:** they run, and every feature outside the circuit is held at its mean over all tokens of
#   {glue:text}`faithfulness.mean_cells` training cells. MLPs are replaced by their transcoders, with
#   the error that these make on the unchanged text.
# - **Alone, own kind:** the same with means over tokens of one kind: {glue:text}`faithfulness.kinds`.
#   What features write in any cell's text is then left in, as are errors and what attention reads of the
#   genes themselves; what is lost is what features say of this cell.
#
# Each is done with as many other active features, {glue:text}`faithfulness.draws` times for either
# kind. *Others at the same tokens* are those of the same layer and token that come nearest in how much
# they write. They write {glue:text}`faithfulness.size_same_token` times as much as the circuit, which
# tends to hold what is strong where its target is read. *Others of the same size* are those of the
# same layer that come nearest at any token up to the target's; they write
# {glue:text}`faithfulness.size_same_size` times as much. Alone, they leave
# {glue:text}`faithfulness.alone_same_token` (same tokens) and {glue:text}`faithfulness.alone_same_size`
# (same size) of the target.
#
# Neither kind of random circuit is perfect: one has the circuit's places, the other its size. Features
# of the same size are mostly on other tokens, from which only attention reaches the target. If a circuit
# outperforms both controls, neither position nor size alone explains it.

# %% [markdown]
# ## Did the predictions come true?
#
# A correlation over cells does not say so: it can be high where every sign is wrong. What counts is
# the sign, and the distance from the line measured = predicted. {glue:text}`prediction.key_point`
# With all features taken away, saying of every cell that its target is gone has an R² of
# {glue:text}`prediction.gone_r2`: what that prediction has to beat.

# %%
tested = prediction.predictions(study.effects, study.singles, settings.seed)
chapter.table("circuit_single_features", study.singles, rows=0, caption="Every feature of every circuit, "
              "changed alone")
chapter.show(tested[["done", "features", "same_sign", "slope", "r2", "verdict"]], digits=2,
             caption="Predicted against measured changes of the target")

# %% tags=["fold:How a prediction is judged"]
chapter.table("circuit_predictions", tested, digits=2, caption="Every prediction; shares of right "
              "signs are means over cells, intervals are over cells")

# %% [markdown]
# $$\text{slope} = \frac{\sum p\,m}{\sum p^2}, \qquad
# R^2 = 1 - \frac{\sum (m - p)^2}{\sum m^2},$$
#
# with $p$ predicted and $m$ measured, as shares of the target. $R^2$ is 1 on the line and 0 for saying
# that nothing changes; below 0 a prediction is worse than saying nothing. The rule: a prediction *holds*
# if the signs are right in more than half, by the whole of their 95 % interval over cells, and $R^2$ is
# above a half; with the signs right and a lower $R^2$ it has the *right sign, wrong size*; else it has
# *failed*. The features are changed all at once, and one at a time with all others left alone: the
# smaller the change, the fairer the test of a linear prediction.
#
# Where a prediction is off, attention, LayerNorm and features outside the circuit have responded. Cells
# that share a target are not independent, so the intervals are narrower than they would be over targets
# (of which there are {glue:text}`faithfulness.targets`).

# %% mystnb={"image": {"alt": "Measured against predicted change of the target when circuit features are taken away (left) and doubled (right), all at once and one at a time, with the line on which both are equal."}, "figure": {"caption": "Measured against predicted changes of the target, as shares of its pre-activation: all of a circuit's features at once (a point per cell) and one at a time (a point per feature). On the dotted line both are equal.", "name": "fig-predictions"}}
chapter.figure("circuit_predictions", plots.predictions(study.effects, study.singles))

# %%
chapter.values({"made": len(tested), **{
    name: int((tested["verdict"] == verdict).sum()) for name, verdict in (
        ("held", prediction.HOLDS), ("direction", prediction.DIRECTION),
        ("failed", prediction.FAILED))}}, prefix="prediction.")
chapter.rounded("prediction.gone_r2", prediction.gone_r2(study.effects), 2)
chapter.value("prediction.key_point", int((tested["verdict"] == prediction.HOLDS).sum()),
              prediction.key_point(tested))

# %%
taken_out = knock_out.knock_out_study(chapter.model, chapter.transcoders, corpus, settings)
chapter.value("knock_out.most_missed", knock_out.most_missed(taken_out.genes, settings.case_type))
chapter.values({"unit": calls_of(chapter.model, corpus, settings).unit,
                "what": "the contrast of its label" if settings.in_words else
                "how far the cell lies on its type's side"}, prefix="knock_out.")

# %% [markdown]
# ## Genes taken out
#
# What a gene does to the call can be measured without any circuit: take it out of the sentence and ask
# again. For {glue:text}`knock_out.cells` held-out cells of {glue:text}`knock_out.types` types
# {glue:text}`knock_out.which` is taken out, and what the call loses ({glue:text}`knock_out.what`) is the gene's effect.
# {glue:text}`knock_out.most_missed`
#
# How well does a circuit say so, and how well do cheaper scores? By {glue:text}`knock_out.won` of
# {glue:text}`knock_out.measures` measures the best of the circuit's scores is ahead of the best of the
# cheaper ones, by the whole interval of the difference.

# %% mystnb={"image": {"alt": "Three panels with a row for each score: rank correlation with the effects of taking genes out, the same by size, and the share of the largest effects found, each with its interval and the band of shuffled genes."}, "figure": {"caption": "How well circuits (blue) and cheap rivals (orange) say what taking each gene out of the sentence does to the call: means over cells with 95 % intervals; grey is what shuffled genes reach.", "name": "fig-knock-out"}}
chapter.figure("knock_out", plots.knock_outs(taken_out.summary, knock_out.CIRCUITS))

# %% [markdown]
# The call is {glue:text}`knock_out.whole` {glue:text}`knock_out.unit`; with the features of its greedy
# {term}`circuit` alone, all others held at the means of their own kind of token, it is
# {glue:text}`knock_out.circuit`, and with no feature {glue:text}`knock_out.nothing` (means over cells). Errors stay
# as they are and attention still reads the genes, so only the distance between the last number and the
# first is there to explain. The circuits' share of it, their {term}`faithfulness`, is
# {glue:text}`knock_out.faithfulness`.

# %% tags=["fold:Every score and every gene"]
chapter.table("knock_out", taken_out.summary, rows=0, caption="Each score against the effects of "
              "taking genes out: means over cells, 95 % intervals, and those of shuffled genes")

# %%
chapter.table("knock_out_cells", taken_out.cells, rows=0, caption="The same for every cell")

# %%
chapter.table("knock_out_kept", taken_out.kept, rows=0, caption="What is left of each cell's call")

# %%
chapter.table("knock_out_genes", taken_out.genes, rows=0, caption="Every gene that was taken out: what the "
              "call loses by it, and its scores")

# %%
numbers = knock_out.numbers(taken_out, settings.seed)
won = numbers.pop("won")
chapter.values(numbers, prefix="knock_out.")
chapter.value("knock_out.won", won, f"{won or 'none'}")

# %% [markdown]
# - With signs: {glue:text}`knock_out.spearman`.
# - By size: {glue:text}`knock_out.spearman_size`.
# - Of the largest: {glue:text}`knock_out.overlap`.
#
# Both of a pair are the best of several, chosen after the fact. The first cells of each type are taken in
# turn. Nothing is put in a gene's place, the text is encoded again, and the call of the cell's label is
# read ({doc}`07_endothelial_case_study`; it is above 0 in {glue:text}`knock_out.ahead` of the cells). The
# scores are
#
# - *all paths*: what the gene's own embedding gives the call along all paths of the {term}`frozen model`,
#   through attention and active features, with its sign;
# - *all that is written at its tokens*: embedding, features and errors there, each with what attention
#   alone carries of it to the call. Over all tokens, with biases, this adds up to the call;
# - *nodes*: the influence of the greedy circuit's nodes on the gene's tokens, and its signed share;
# - and what is had for less: the place in the sentence, attention (rollout), and the model's own
#   gradients: input times gradient, and integrated gradients from a text whose genes all have their
#   mean embedding ({glue:text}`knock_out.steps` steps).
#
# Over the genes of a cell the order by a score is compared with the order by effect: with signs, by
# size, and by what they share of the {glue:text}`knock_out.k` largest. The interval is over cells, the
# grey band is what genes permuted within each cell reach. A gene taken out also moves all genes
# behind it forward, and its effect includes all responses of the model: what attention, norms and
# features do in response is in it, and in no score that holds them still.

# %% [markdown]
# ## What several circuits have in common
#
# The paper shows one circuit and leaves its structure to future work. Here the circuits just tested
# are taken apart.
#
# - **What drives the target.** {glue:text}`structure.direct_features` of what is written straight to it
#   comes from features of earlier layers, {glue:text}`structure.direct_attention` from attention. Followed
#   upstream, {glue:text}`structure.ends_errors` ends in errors and {glue:text}`structure.ends_not_kept` in
#   contributions too small to be kept: that much the circuit does not explain.
# - **Which head carries the genes.** Of what attention brings to the target's token,
#   {glue:text}`structure.attention_to_genes` was read at tokens of genes. Head
#   {glue:text}`structure.top_head` (layer.head) brings {glue:text}`structure.top_head_share` of that part.
# - **Features that say the same.** {glue:text}`structure.features` different features (median) make
#   {glue:text}`structure.supernodes` {term}`supernodes <supernode>`.
# - **What a type's circuits share.** Two circuits of one type share {glue:text}`structure.within` of their
#   features, two of different types {glue:text}`structure.between` (permutation test over cells, p =
#   {glue:text}`structure.overlap_p`). {glue:text}`structure.in_every_circuit` of
#   {glue:text}`structure.all_features` features are in every circuit, whatever the cell: by being there
#   they do not tell what type a cell is.

# %% mystnb={"image": {"alt": "Stacked bars by layer: shares of the target's contributions from attention, features and errors, directly and through the circuit, with token embedding and biases beside them."}, "figure": {"caption": "What drives the targets, mean over cells. Left: what each layer writes straight to the target's token adds up to 100 %. Right: how much passes through the circuit's nodes of each layer on its way; a path passes several layers.", "name": "fig-flow"}} tags=["fold:What flows where"]
chapter.figure("circuit_flow", plots.circuit_flow(study.flow))

# %%
chapter.table("circuit_flow", study.flow, rows=0, caption="What drives each cell's target, by layer")
chapter.show(studies.end_table(study), caption="Where the target's contributions end when the "
             "circuit is followed upstream (mean over cells)")

# %%
for name, share in studies.flow_shares(study).items():
    chapter.percent(f"structure.{name}", share)

# %% [markdown]
# All shares are of the absolute contributions to the target, so that nothing cancels. Besides features and
# attention, {glue:text}`structure.direct_errors` of what is written straight to the target comes from the
# transcoders' errors, {glue:text}`structure.direct_embedding` from the token itself and
# {glue:text}`structure.direct_biases` from biases. {glue:text}`structure.negative_edges` of the edges are
# negative and carry {glue:text}`structure.negative_carried` of the flow: a drawing of positive edges alone
# would leave them out.

# %% tags=["fold:Heads and genes"]
heads = studies.head_summary(study)
chapter.table("circuit_heads", heads.listed, rows=0, caption="Which head brings which gene to the "
              "target's token: for every cell the 20 strongest pairs by direct share")

# %%
chapter.percent("structure.attention_to_genes", heads.to_genes)
chapter.percent("structure.top_head_share", heads.top_share)
chapter.values({"top_head": heads.top, "top_head_cells": heads.top_cells}, prefix="structure.")

# %% [markdown]
# Head {glue:text}`structure.top_head` is the strongest head on genes in
# {glue:text}`structure.top_head_cells` of the {glue:text}`faithfulness.cells` cells. What attention did not
# read at genes it read at words of the prompt and of the answer. The file's last columns add what
# arrives through features on the way.

# %%
groups = studies.supernode_table(study, chapter.statistics, corpus)

# %% tags=["fold:Supernodes of one circuit"]
chapter.table("circuit_supernodes", groups.table, rows=0, caption="The supernodes of every circuit")
chapter.show(groups.of_one(settings.case_type), rows=6, caption="Supernodes of one circuit: features "
             "joined if the tokens that hold half of their activations overlap by half or more")

# %%
chapter.values({"features": groups.features, "supernodes": groups.supernodes}, prefix="structure.")
chapter.percent("structure.largest_supernode", groups.largest)

# %% [markdown]
# Features are joined if the tokens that they fire on most overlap. The largest supernode holds
# {glue:text}`structure.largest_supernode` of a circuit's features.

# %% mystnb={"image": {"alt": "Heat map of the overlap of every pair of circuits, cells sorted by type, with the pairs of one type boxed."}, "figure": {"caption": "Features that two cells' circuits share, of all features of either (Jaccard index); boxes hold the pairs of one type.", "name": "fig-overlap"}} tags=["fold:Overlap of every two circuits"]
common = studies.overlap_study(study, settings.seed)
chapter.figure("circuit_overlap", plots.circuit_overlap(common.overlap, study.types))

# %%
chapter.table("circuit_overlap", common.pairs, rows=0, caption="Overlap of every two circuits")
chapter.table("circuit_shared_features", common.shared, rows=0, caption="In which circuits each feature is")
chapter.show(common.tests(), caption="Mean overlap of pairs of one type and of two, and how often "
             "permuted types differ as much")

# %%
for name, test in (("", common.of_all), ("_same_target", common.same_target)):
    chapter.percent(f"structure.within{name}", test.within)
    chapter.percent(f"structure.between{name}", test.between)
    chapter.p_value(f"structure.overlap_p{name}", test.p)
chapter.values(common.counts(), prefix="structure.")
chapter.value("structure.several_targets", not common.one_target)

# %% [markdown]
# Circuits of one target resemble each other whatever the type, and cells that share a target are not
# independent. {glue:text}`structure.one_type_only` features are in several circuits of one type only.

# %% [markdown] tags=["only-if:structure.several_targets"]
# Types may differ in their targets. Among pairs with the same target the two shares are
# {glue:text}`structure.within_same_target` and {glue:text}`structure.between_same_target` (p =
# {glue:text}`structure.overlap_p_same_target`).

# %% [markdown]
# ## One circuit for the whole task
#
# So far every circuit was of one cell. How few features, the same for all cells, name the cells' types
# as often as all of them do? Features are chosen on {glue:text}`task.choice_cells` training cells and
# tried on {glue:text}`task.cells` held-out cells. Features that are not kept are held at their mean over
# tokens of the same kind (first panel), or silent as in Tables 1 and 2 (second panel).

# %%
task = task_circuit(chapter.model, chapter.transcoders, corpus, settings)

# %% mystnb={"image": {"alt": "Percentage of right answers kept against the share of features kept, for features chosen by influence, gradient, activation and at random; left with the other features at their mean, right with them silent."}, "figure": {"caption": "Right answers of the original model that are right still with a share of the features, chosen once for all cells. Bands: 95 % intervals over cells. Lines across: all features and none.", "name": "fig-task"}}
curve = task_curves.curve(task)
chapter.figure("task_circuit", plots.task_curves(curve))

# %% [markdown]
# Of the original model's right answers, all {glue:text}`task.firing` features that fire keep
# {glue:text}`task.all_mean`. None of them, every MLP at its mean for the kind of token (not over all tokens, as in
# {doc}`03_validation`), keeps
# {glue:text}`task.none_mean`: for so much of the task no feature is needed, whatever a circuit shows.
# With nothing in the MLPs' place it is {glue:text}`task.none_zero`.
#
# The smallest circuit, chosen by influence, that keeps at least 90 %, of the features that fire:
#
# - **others at their mean:** {glue:text}`task.fewest_mean`;
# - **others silent:** {glue:text}`task.fewest_zero`.

# %% tags=["fold:How features are chosen and what each choice keeps"]
choices = task_curves.compare_choices(task, settings.seed)
chapter.table("task_circuit", curve, rows=0, caption="Right answers and contrast kept by every circuit "
              "tried")
beside = curve[~curve["chosen"].isin(CHOSEN_BY)]
chapter.table("task_choices", choices, rows=0, caption="What the circuits keep, with the range over "
              "random draws")

# %%
chapter.show(choices.drop(columns=["lowest", "highest"]).replace({"others": {MEAN: "mean"}}), digits=2,
             caption="What the circuits keep, in percent, mean over the sizes tried, and by how many points "
             "the choice by influence is ahead")

# %%
chapter.values({"choice_cells": task.choice_cells, "cells": len(task.cells), "firing": task.firing,
                "draws": int(curve["draw"].max()) + 1}, prefix="task.")
kept = beside.set_index(["chosen", "others"])["kept"] / 100
for key, others in (("mean", MEAN), ("zero", ZERO)):
    chapter.percent(f"task.all_{key}", kept["all features", others])
    chapter.percent(f"task.none_{key}", kept["no feature", others])
    chapter.value(f"task.fewest_{key}", task_curves.fewest(curve, others))

# %% [markdown]
# All MLPs are replaced by the features kept. Where the others are at their mean, so is the transcoders'
# error: what these miss of a cell cannot help. Where they are silent, no error is added.
#
# - **By influence:** what a feature's taking away would do to the call
#   ({doc}`07_endothelial_case_study`), on all paths of the linear model, mean size over training cells.
# - **By gradient:** the same with the gradient in the original model. **By activation:** what a
#   feature writes on average.
# - **Random:** the scores of the first choice permuted among features of a layer that fire
#   about as often, {glue:text}`task.draws` times; the interval holds those of every draw.
#
# The choice by influence is ahead of another, or behind, where the whole interval is on one side of 0.
# *Contrast* is the {term}`faithfulness` of the call, with all features as the whole.
#
# What circuits should find is known for simulated cells only. The book of the profile `planted`
# (`make book PROFILE=planted`, about ten minutes more) has a further section here: how much of what was
# planted do circuits find, and do transcoders' features find it better than directions that no dictionary
# learning made?

# %% [markdown] tags=["only-if:truth.known"]
# ## Known truth
#
# {glue:text}`truth.known`

# %%
plan = chapter.plan  # None unless the cells are simulated
known = """
In this profile the right answer is known. Cells of each type express a program of genes that was
planted for it, besides programs shared with another type, states that any type can be in, and a
background that all express alike (data/planted/programs.yml). Does the method find what was
planted?"""
chapter.value("truth.known", bool(plan), " ".join(known.split()) if plan else "")

# %%
truth = known_truth(chapter.model, chapter.transcoders, corpus, plan, settings) if plan else None

# %% mystnb={"image": {"alt": "Two panels, circuits of the feature and of the call: for each cell type, the percentage of planted genes among the circuit's most influential genes, the prompt's most expressed genes, and random genes of the prompt."}, "figure": {"caption": "Among as many genes as are planted in the prompt for the cell's type: how many are planted, if the circuit's most influential genes are taken, the prompt's most expressed, or random ones.", "name": "fig-planted"}} tags=["only-if:truth.known"]
chapter.figure("planted_recovery", plots.planted_recovery(truth.summary)) if truth else None

# %% tags=["only-if:truth.known"]
chapter.table("planted_recovery", truth.summary, digits=3, caption="Planted genes among the "
              "circuits' genes, by target and cell type") if truth else None

# %% tags=["only-if:truth.known"]
chapter.table("planted_roles", truth.roles, digits=3, caption="What the genes of prompts and "
              "circuits are to the cell's type") if truth else None

# %%
said = """
Circuits of {traced} ({circuits} cells): of their genes {precision} were planted for the cell's
type, where random genes of the same prompts give {random_precision} (p = {p}) and the most
expressed ones {precision_most_expressed}. They hold {recall} of the planted genes of the prompts,
and would hold {random_recall} by chance. Of as many of their most influential genes as are planted,
{top_share} are planted (by chance {top_share_random}, p = {top_p}; most expressed
{top_share_most_expressed}). Of the influence that stands on genes, {own} is on genes planted for
the type, {shared} on those that it shares with another, and {background} on genes that all types
express alike."""
traced = {"feature": "the last layer's strongest feature", "call": "the call itself"}
words = truth.words() if truth else {}
chapter.value("truth.circuits", bool(plan), " ".join(" ".join(
    said.format(traced=traced[target], **row) for target, row in words.items()).split()))
for target, row in (truth.over_all_types() if truth else {}).items():
    chapter.values({name: row[name] for name in (
        "precision", "recall", "random_precision", "random_recall", "p", "top_share", "top_p",
        "precision_most_expressed", "top_share_most_expressed")}, prefix=f"truth.{target}.")
if truth:
    chapter.table("planted_circuit_genes", truth.genes, rows=0, caption="Every gene of every "
                  "circuit, and whether it is planted for the cell's type")
chapter.table("planted_circuits", truth.circuits, rows=6, digits=3,
              caption="The same for every circuit") if truth else None

# %% [markdown] tags=["only-if:truth.known"]
# {glue:text}`truth.circuits`

# %% [markdown] tags=["only-if:truth.known"]
# **What features find.** Programs as strong as those above leave little to tell apart. So small models
# are trained on harder cells, once for each of {glue:text}`truth.seeds` seeds and two tokenizers: programs
# of genes that rise {glue:text}`truth.fold` times only; conjunctions of two programs, of which one decides
# the type and has no gene of its own; and the order of two genes, which decides the type as well. On
# held-out cells the models name {glue:text}`truth.right_genes` % of the types with a token a gene, and
# {glue:text}`truth.right_sub_words` % with sub-words.
#
# A unit (a feature, a neuron, a direction) is chosen on training cells and scored on held-out ones: how
# well it tells by itself whether the truth holds, and how well two or five of them do together. Kinds of
# transcoders are compared with as many directions that no dictionary learning made, within each seed. The
# rule was fixed before any result was seen: a kind wins where it is ahead of *every* rival by an interval
# over seeds that allows for all comparisons at once.

# %%
found = known_truth_study(settings) if plan else None

# %% mystnb={"image": {"alt": "For three kinds of truth and two tokenizers: the held-out AUROC and F1 of the best feature of three kinds of transcoders, of the best of four kinds of other directions, of the best single gene, and of a linear probe of all that MLPs read."}, "figure": {"caption": "How well the best unit tells a planted truth on held-out cells: mean over seeds with its 95 % interval. Dotted: the same answer for every cell.", "name": "fig-known-truth"}} tags=["only-if:truth.known"]
chapter.figure("known_truth", known_truth_scores(found.summary())) if found else None

# %% tags=["only-if:truth.known"]
chapter.show(found.means(), digits=3, caption="Scores on held-out cells, means over seeds: of the best "
             "unit, and of probes of one, two and five units") if found else None

# %% tags=["only-if:truth.known"]
chapter.table("known_truth_comparisons", found.comparisons, rows=12, digits=2, caption="Transcoders "
              "less the rival over which they lead least, with its interval over seeds") if found else None

# %%
chapter.values(found.words() if found else dict.fromkeys(
    ("seeds", "fold", "right_genes", "right_sub_words")), prefix="truth.")
chapter.value("truth.verdict", bool(found), verdict(found.comparisons) if found else "")
if found:
    chapter.table("known_truth", found.summary(), rows=0, caption="Scores of the best unit of every "
                  "kind for every truth")
    chapter.table("known_truth_models", found.models(), rows=0, caption="The small models that "
                  "these scores are of")

# %% [markdown] tags=["only-if:truth.known"]
# {glue:text}`truth.verdict`
