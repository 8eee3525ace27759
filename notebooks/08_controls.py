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
#     after: [07_endothelial_case_study]
#     produces: [tables/circuit_faithfulness.csv, tables/circuit_flow.csv, tables/circuit_heads.csv, tables/circuit_overlap.csv]
#     exhibits: "beyond the paper"
#     modules: [circuits/attribution, circuits/circuit, circuits/interventions, circuits/structure, cells/simulated, circuits/planted_genes]
# ---

# %% [markdown]
# # Is the circuit what the model uses?
#
# The paper has no control. {doc}`06_enrichment` sets its features beside gene lists that no trained
# feature made. This chapter asks the same of its circuit: does the target change when the circuit is
# taken away, by as much as predicted, and more than when other active features are taken away? Is the
# circuit enough by itself? And what do the circuits of several cells have in common?

# %% tags=["parameters"]
profile = "demo"

# %%
import numpy as np
import pandas as pd

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import load_corpus
from scfm_circuits.cells.prompts import answered_prompt
from scfm_circuits.cells.simulated import plan_of
from scfm_circuits.cells.tokens import token_texts
from scfm_circuits.circuits.attribution import contributions, feature_direction, freeze
from scfm_circuits.circuits.interventions import FeatureAt, compare_interventions
from scfm_circuits.circuits.planted_genes import (
    circuit_gene_table,
    circuits_in_prose,
    named_right,
    recovery_summary,
    recovery_table,
    role_table,
)
from scfm_circuits.circuits.search import strongest_features, trace_feature
from scfm_circuits.circuits.structure import (
    circuit_features,
    flow_table,
    head_table,
    inhibition,
    overlap_test,
    pair_table,
    path_ends,
    shared_features,
    similarity,
    supernodes,
)
from scfm_circuits.circuits.token_means import mean_activations, token_kinds
from scfm_circuits.common.profile import PLANTED_CELLS, from_notebook
from scfm_circuits.common.randomness import generator
from scfm_circuits.enrichment.controls.planted_programs import features_in_prose, program_matches
from scfm_circuits.features.baselines import reinitialised_statistics, untrained_statistics
from scfm_circuits.features.contexts import token_families
from scfm_circuits.features.statistics import get_statistics
from scfm_circuits.models.loading import get_model
from scfm_circuits.report.plots import circuits as plots
from scfm_circuits.report.report import Report
from scfm_circuits.transcoders.training.run import get_transcoders

run = from_notebook(globals())
report = Report(run, "08_controls")
corpus = load_corpus(run)
model, _ = get_model(run, corpus, exact=True)
transcoders, _ = get_transcoders(model, corpus, run)
report.not_comparable(run)

# %% [markdown]
# ## Taking the circuit away
#
# For up to {glue:text}`faithfulness.per_type` held-out cells of every type, the strongest feature of
# the last layer is traced at the place where the case study reads its target
# ({glue:text}`faithfulness.targets` different features over {glue:text}`faithfulness.cells` cells).
# Then the circuit's features are changed in the real model, and the target's pre-activation is read
# again; attention, LayerNorm and the MLPs in between respond as they will.
#
# - **Taken away:** what they write is taken out. **Doubled:** they write twice as much. The prediction
#   holds attention and LayerNorm still and lets only attention carry the difference on.
# - **Alone:** they run, and every feature outside the circuit is held at its mean over all tokens of
#   {glue:text}`faithfulness.mean_cells` training cells. MLPs are replaced by their transcoders, with
#   the error that these make on the unchanged text.
# - **Alone, own kind:** the same with means over tokens of one kind: first pieces of genes, later
#   pieces, each word of the question, the answer's last token, its other tokens. What the form of any
#   cell's text brings is then left in; what is lost is this cell's own.
#
# Each is done with as many other active features, {glue:text}`faithfulness.draws` times for either
# kind. *Others at the same tokens* are those of the same layer and token that come nearest in how much
# they write. They write {glue:text}`faithfulness.size_same_token` times as much as the circuit, which
# tends to hold what is strong where its target is read. *Others of the same size* are those of the
# same layer that come nearest at any token up to the target's; they write
# {glue:text}`faithfulness.size_same_size` times as much.

# %%
per_type, most, draws = 3, 30, 5
rng = generator(run.seed, "interventions")
training = np.sort(rng.permutation(np.flatnonzero(~corpus.held_out))[:100])
means = mean_activations(model, transcoders, corpus, training, run.forward_cells)
held_out = np.flatnonzero(corpus.held_out)
turn = pd.Series(corpus.labels[held_out]).groupby(corpus.labels[held_out]).cumcount().to_numpy()
# Every type's first cell before any type's second, should there be too many types.
turns = np.lexsort((corpus.labels[held_out], turn))
cells = held_out[turns[turn[turns] < per_type][:most]]
cells = cells[np.argsort(corpus.labels[cells], kind="stable")]
last, rows, circuits, flows, heads, inner = transcoders.n_layers - 1, [], [], [], [], []
for cell in cells:
    case = answered_prompt(corpus, run, int(cell), str(corpus.labels[cell]))
    frozen = freeze(model, transcoders, case.encoded.tokens)
    strongest = strongest_features(frozen, last, case.position, 1)
    if not strongest:
        continue
    target = FeatureAt(last, strongest[0], case.position)
    circuit = trace_feature(frozen, *target, branches=run.circuit_branches,
                            depth=run.circuit_depth, max_nodes=run.circuit_nodes)
    chosen = [FeatureAt(node.layer, node.index, node.position) for node in circuit.nodes.values()
              if node.kind == "feature" and node.id != circuit.target]
    reading = feature_direction(frozen, *target)
    kinds = token_kinds(case.encoded.gene, case.encoded.place, case.answer_start)
    of_cell = {"cell": str(corpus.cell_ids[cell]), "cell_type": str(corpus.labels[cell]),
               "target": target.feature}
    rows += [{**of_cell, "pre_activation": float(reading.value), **one._asdict()} for one in
             compare_interventions(model, frozen, chosen, target, reading, means, kinds, rng, draws=draws)]
    parts = contributions(frozen, reading)
    circuits.append((of_cell, circuit))
    flows.append(flow_table(circuit, parts).assign(**of_cell))
    heads.append(head_table(circuit, parts, case.genes).assign(**of_cell))
    inner.append({**of_cell, **path_ends(circuit), **inhibition(circuit)._asdict()})

# %% mystnb={"image": {"alt": "Left: predicted against measured change of the target when circuit features or random features are taken away. Right: measured changes when they are taken away, doubled, or left alone."}, "figure": {"caption": "What changing features does to the circuit's target, as a share of its pre-activation; -1 means that the target is gone. Each point is a cell; for random features it is the mean of several circuits, with their range as a line (left). Black: medians.", "name": "fig-faithfulness"}} tags=["hide-input"]
effects = pd.DataFrame(rows)
if effects.empty:
    raise InputError("No feature of the last layer is active at the target of any held-out cell; "
                     "lower `l1_coefficient` or train on more tokens.")
report.figure("circuit_faithfulness", plots.faithfulness(effects))

# %% tags=["hide-input"]
in_order = effects.groupby(["intervention", "features"], sort=False)
columns = ["n_features", "size", "predicted", "measured"]
summary = in_order[columns].median().reset_index()
report.show(summary, caption="Medians over cells: changes as shares of the target's pre-activation, "
            "and what the features write relative to the circuit's")

# %% tags=["hide-input"]
taken = effects[effects["intervention"] == "ablation"].set_index(["cell_type", "cell"])
by_type = taken[taken["features"] == "circuit"].groupby("cell_type").agg(
    cells=("measured", "size"), predicted=("predicted", "median"), measured=("measured", "median"),
    smallest=("measured", "max"), largest=("measured", "min"))
for kind in ("same token", "same size"):
    by_type[kind] = taken[taken["features"] == kind].groupby("cell_type")["measured"].median()
report.show(by_type.reset_index(), caption="Taken away, by cell type: medians over cells, the smallest "
            "and the largest change, and the medians of random circuits")

# %% tags=["hide-input"]
report.table("circuit_faithfulness", effects, rows=10, caption="The same for every cell: for random "
             "features the mean of several circuits, with the lowest and highest measured change")

# %% tags=["remove-input"]
median = summary.set_index(["intervention", "features"])
per_cell = effects.set_index(["intervention", "features"]).sort_index()
own = per_cell.loc[("ablation", "circuit")]
report.values({"cells": len(own), "targets": int(own["target"].nunique()), "per_type": per_type,
               "mean_cells": len(training), "draws": draws,
               "types": int(own["cell_type"].nunique()),
               "n_features": float(median.loc[("ablation", "circuit"), "n_features"]),
               "circuit": float(median.loc[("ablation", "circuit"), "measured"]),
               "random": float(median.loc[("ablation", "same token"), "measured"]),
               "random_size": float(median.loc[("ablation", "same size"), "measured"])},
              prefix="faithfulness.")
for kind in ("same token", "same size"):
    size = float(median.loc[("ablation", kind), "size"])
    report.value(f"faithfulness.size_{kind.replace(' ', '_')}", size, f"{size:.2f}")
for name, intervention in (("", "ablation"), ("doubling_", "doubling"), ("alone_", "alone"),
                           ("own_kind_", "alone, own kind")):
    pair = per_cell.loc[(intervention, "circuit"), ["predicted", "measured"]]
    for method in ("spearman", "pearson"):
        value = float(pair["predicted"].corr(pair["measured"], method=method))
        key = "correlation" if method == "spearman" else "pearson"
        report.value(f"faithfulness.{name}{key}", value, f"{value:.2f}")
for key, kind in (("circuit", "circuit"), ("random", "same token"), ("random_size", "same size")):
    report.value(f"faithfulness.doubling_{key}", float(median.loc[("doubling", kind), "measured"]))
for kind in ("circuit", "none", "same token", "same size"):
    kept = 1 + float(median.loc[("alone", kind), "measured"])
    report.value(f"faithfulness.alone_{kind.replace(' ', '_')}", kept, f"{kept:.2f}")
for kind in ("circuit", "none"):
    kept = 1 + float(median.loc[("alone, own kind", kind), "measured"])
    report.value(f"faithfulness.own_kind_{kind}", kept, f"{kept:.2f}")
beyond = 0
for kind in ("same token", "same size"):
    lowest = per_cell.loc[("ablation", kind)].set_index("cell")["lowest"]
    beyond = beyond + (own.set_index("cell")["measured"] < lowest).astype(int)
report.value("faithfulness.cells_beyond_random", int((beyond == 2).sum()))

# %% [markdown]
# Over {glue:text}`faithfulness.cells` cells of {glue:text}`faithfulness.types` types, taking away the
# circuit's features (a median of {glue:text}`faithfulness.n_features`) changes the target by a median
# of {glue:text}`faithfulness.circuit` of its pre-activation; others at the same tokens change it by
# {glue:text}`faithfulness.random`, others of the same size by
# {glue:text}`faithfulness.random_size`. In {glue:text}`faithfulness.cells_beyond_random` of the cells
# the circuit lowers the target by more than every random circuit of either kind. Doubling changes it
# by {glue:text}`faithfulness.doubling_circuit` (others {glue:text}`faithfulness.doubling_random` and
# {glue:text}`faithfulness.doubling_random_size`).
#
# Predicted and measured changes have a rank correlation over the {glue:text}`faithfulness.cells`
# cells of {glue:text}`faithfulness.correlation` (Pearson {glue:text}`faithfulness.pearson`) for
# taking away, {glue:text}`faithfulness.doubling_correlation`
# ({glue:text}`faithfulness.doubling_pearson`) for doubling and
# {glue:text}`faithfulness.alone_correlation` ({glue:text}`faithfulness.alone_pearson`) for the circuit
# alone ({glue:text}`faithfulness.own_kind_correlation` and
# {glue:text}`faithfulness.own_kind_pearson` with means of the own kind). Where they differ, attention, LayerNorm and features outside the circuit have responded. Cells
# that share a target are not independent, so these correlations say less than their number of cells.
#
# The circuit alone keeps {glue:text}`faithfulness.alone_circuit` of the target's pre-activation. No
# circuit at all, every feature at its mean, leaves {glue:text}`faithfulness.alone_none`; random
# features alone leave {glue:text}`faithfulness.alone_same_token` (same tokens) and
# {glue:text}`faithfulness.alone_same_size` (same size). With means of the token's own kind, the
# circuit keeps {glue:text}`faithfulness.own_kind_circuit` and no circuit at all leaves
# {glue:text}`faithfulness.own_kind_none`. The nearer that last number is to 1, the less of the target
# is this cell's own: the form of the text alone would make it fire, and the circuit explains why it
# fires in any such text, not why in this cell.
#
# Neither kind of random circuit is perfect: one has the circuit's places, the other its size. Features
# of the same size stand mostly on other tokens, from which only attention reaches the target. A
# circuit that beats both has neither place nor size alone to thank.

# %% [markdown]
# ## What several circuits have in common
#
# The paper shows one circuit and leaves its structure to future work. Here the circuits just tested
# are taken apart. All shares are of the absolute contributions to the target, so that nothing
# cancels.

# %% mystnb={"image": {"alt": "Stacked bars by layer: shares of the target's contributions from attention, features and errors, directly and through the circuit, with token embedding and biases beside them."}, "figure": {"caption": "What drives the targets, mean over cells. Left: what each layer writes straight to the target's token adds up to 100 %. Right: how much passes through the circuit's nodes of each layer on its way; a path passes several layers.", "name": "fig-flow"}} tags=["hide-input"]
keys = ["cell", "cell_type", "target"]
flow = pd.concat(flows, ignore_index=True)
flow = flow[[*keys, *(column for column in flow if column not in keys)]]
report.figure("circuit_flow", plots.circuit_flow(flow))

# %% tags=["hide-input"]
report.table("circuit_flow", flow, rows=0)
inside = pd.DataFrame(inner)
ends = inside[[*path_ends(circuits[0][1])]].mean().rename_axis("path ends at").rename("share")
report.show(ends.reset_index(), caption="Where the target's contributions end when the circuit is "
            "followed upstream (mean over cells)")

# %% tags=["remove-input"]
direct = flow.groupby(["cell", "kind"])["share"].sum().groupby("kind").mean()
for kind in ("attention", "features", "errors", "embedding", "biases"):
    report.value(f"structure.direct_{kind}", float(direct[kind]), f"{100 * direct[kind]:.0f} %")
for end in ("errors", "not kept"):
    report.value(f"structure.ends_{end.replace(' ', '_')}", float(ends[end]),
                 f"{100 * ends[end]:.0f} %")
negative = float((inside["negative"] / inside["edges"]).mean())
report.value("structure.negative_edges", negative, f"{100 * negative:.0f} %")
carried = float(inside["carried"].mean())
report.value("structure.negative_carried", carried, f"{100 * carried:.0f} %")

# %% [markdown]
# **What flows where.** Of what is written straight to the target, {glue:text}`structure.direct_features`
# comes from features of earlier layers, {glue:text}`structure.direct_attention` from attention,
# {glue:text}`structure.direct_errors` from the transcoders' errors,
# {glue:text}`structure.direct_embedding` from the token itself and
# {glue:text}`structure.direct_biases` from biases. Followed upstream through the circuit,
# {glue:text}`structure.ends_errors` ends in errors and {glue:text}`structure.ends_not_kept` in
# contributions too small to be kept: that much of the target the circuit does not explain.
# {glue:text}`structure.negative_edges` of the edges are negative and carry
# {glue:text}`structure.negative_carried` of the flow: a drawing of positive edges alone would leave
# them out.

# %% tags=["hide-input"]
read = pd.concat(heads, ignore_index=True)
read = read[[*keys, *(column for column in read if column not in keys)]]
listed = read[read["gene"] != ""].groupby("cell", sort=False).head(20)
report.table("circuit_heads", listed, rows=10, caption="Which head brings which gene to the target's "
             "token: for every cell the 20 strongest pairs by direct share")

# %% tags=["remove-input"]
on_gene = read[read["gene"] != ""]
gene_share = float(on_gene["share"].sum() / max(read["share"].sum(), 1e-30))
report.value("structure.attention_to_genes", gene_share, f"{100 * gene_share:.0f} %")
by_head = on_gene.groupby(["layer", "head"])["share"].sum()
best = by_head.idxmax()
report.value("structure.top_head", f"{best[0]}.{best[1]}")
of_genes = float(by_head.max() / max(by_head.sum(), 1e-30))
report.value("structure.top_head_share", of_genes, f"{100 * of_genes:.0f} %")
firsts = on_gene.groupby(["cell", "layer", "head"])["share"].sum().reset_index()
firsts = firsts.sort_values("share", ascending=False, kind="stable").drop_duplicates("cell")
report.value("structure.top_head_cells",
             int(((firsts["layer"] == best[0]) & (firsts["head"] == best[1])).sum()))

# %% [markdown]
# **Which head carries the genes.** Of what attention brings straight to the target's token,
# {glue:text}`structure.attention_to_genes` was read at tokens of genes, the rest at words of the
# prompt and of the answer. Head {glue:text}`structure.top_head` (layer.head) brings more of
# the genes' part than any other, {glue:text}`structure.top_head_share` of it; it is the strongest
# head on genes in {glue:text}`structure.top_head_cells` of the {glue:text}`faithfulness.cells` cells. The table's last
# columns add what arrives through features on the way.

# %%
statistics = get_statistics(model, transcoders, corpus, run)
sets = [set(circuit_features(circuit)) for _, circuit in circuits]
families = token_families(statistics, sorted(set().union(*sets)))
groups = pd.concat([supernodes(circuit, families).assign(**of_cell)
                    for of_cell, circuit in circuits], ignore_index=True)

# %% tags=["hide-input"]
groups["tokens"] = ["  ".join(token_texts(corpus.tokenizer, tokens[:6])) for tokens in
                    groups["tokens"]]
groups = groups[[*keys, *(column for column in groups if column not in keys)]]
report.table("circuit_supernodes", groups, rows=0)
shown = groups["cell"] == groups["cell"][max(int((groups["cell_type"] == run.case_type).argmax()), 0)]
report.show(groups[shown].drop(columns=keys), rows=6, caption="Supernodes of one circuit: features "
            "joined if the tokens that hold half of their activations overlap by half or more")

# %% tags=["remove-input"]
per_circuit = groups.groupby("cell", sort=False)
report.value("structure.features", float(np.median([len(one) for one in sets])))
report.value("structure.supernodes", float(per_circuit.size().median()))
largest = float((per_circuit["n_features"].max() / per_circuit["n_features"].sum()).mean())
report.value("structure.largest_supernode", largest, f"{100 * largest:.0f} %")

# %% [markdown]
# **Features that say the same.** Grouped by the tokens that they fire on most, the median of
# {glue:text}`structure.features` different features of a circuit make
# {glue:text}`structure.supernodes` supernodes; the largest holds
# {glue:text}`structure.largest_supernode` of a circuit's features.

# %% mystnb={"image": {"alt": "Heat map of the overlap of every pair of circuits, cells sorted by type, with the pairs of one type boxed."}, "figure": {"caption": "Features that two cells' circuits share, of all features of either (Jaccard index); boxes hold the pairs of one type.", "name": "fig-overlap"}} tags=["hide-input"]
names, types, targets = ([of_cell[key] for of_cell, _ in circuits] for key in keys)
overlap = similarity(sets)
report.figure("circuit_overlap", plots.circuit_overlap(overlap, types))

# %% tags=["hide-input"]
tests = {"all pairs": overlap_test(overlap, types, seed=run.seed),
         "pairs with the same target": overlap_test(overlap, types, strata=targets,
                                                    seed=run.seed)}
report.table("circuit_overlap", pair_table(overlap, names, types, targets), rows=0)
report.table("circuit_shared_features", shared_features(sets, types), rows=0)
report.show(pd.DataFrame([{"pairs": name, **test._asdict()} for name, test in tests.items()]),
            caption="Mean overlap of pairs of one type and of two, and how often types dealt out at "
            "random differ as much")

# %% tags=["remove-input"]
for name, test in zip(("", "_same_target"), tests.values(), strict=True):
    for part in ("within", "between"):
        value = getattr(test, part)
        report.value(f"structure.{part}{name}", value, None if value is None else f"{value:.2f}")
    report.value(f"structure.overlap_p{name}", test.p, None if test.p is None else f"{test.p:.2g}")
shared = shared_features(sets, types)
report.value("structure.all_features", len(shared))
report.value("structure.in_every_circuit", int((shared["n_circuits"] == len(circuits)).sum()))
report.value("structure.one_type_only", int(((shared["n_types"] == 1)
                                             & (shared["n_circuits"] > 1)).sum()))

# %% [markdown]
# **What a type's circuits share.** Two circuits of one type share {glue:text}`structure.within` of
# their features, two of different types {glue:text}`structure.between`; types dealt out at random
# differ as much with p = {glue:text}`structure.overlap_p`. Circuits of one target resemble each other
# whatever the type, and types may differ in their targets. Among pairs with the same target the two
# numbers are {glue:text}`structure.within_same_target` and
# {glue:text}`structure.between_same_target` (p = {glue:text}`structure.overlap_p_same_target`).
# Of {glue:text}`structure.all_features` features in any circuit,
# {glue:text}`structure.in_every_circuit` are in every one, whatever the cell, and
# {glue:text}`structure.one_type_only` are in more than one circuit but of a single type.

# %% [markdown]
# ## Known truth
#
# {glue:text}`truth.known`

# %% tags=["remove-input"]
simulated = run.cells == PLANTED_CELLS
report.value("truth.known", simulated, "In this profile the right answer is known. Cells of each "
             "type express a program of genes that was planted for it, besides programs shared with "
             "another type, states that any type can be in, and a background that all express alike "
             "(data/planted/programs.yml). Does the method find what was planted?" if simulated else
             "What should be found is known for simulated cells only. The profile planted makes such "
             "cells (make book PROFILE=planted), and in its book this section says how much of what "
             "was planted circuits and features find.")

# %%
if simulated:
    plan = plan_of(run)
    named = named_right(model, corpus, n=5)
    planted_genes = circuit_gene_table(model, transcoders, corpus, named, plan, run)
    recovery = recovery_table(planted_genes)
    recovered = recovery_summary(recovery, run.seed)
    roles = role_table(planted_genes)

# %% mystnb={"image": {"alt": "Two panels, circuits of the feature and of the call: for each cell type, the percentage of planted genes among the circuit's most influential genes, the prompt's most expressed genes, and random genes of the prompt."}, "figure": {"caption": "Among as many genes as are planted in the prompt for the cell's type: how many are planted, if the circuit's most influential genes are taken, the prompt's most expressed, or random ones.", "name": "fig-planted"}} tags=["hide-input"]
report.figure("planted_recovery", plots.planted_recovery(recovered)) if simulated else None

# %% tags=["hide-input"]
report.table("planted_recovery", recovered, digits=3, caption="Planted genes among the circuits' "
             "genes, by target and cell type") if simulated else None

# %% tags=["hide-input"]
report.table("planted_roles", roles, digits=3, caption="What the genes of prompts and circuits are "
             "to the cell's type") if simulated else None

# %% tags=["remove-input"]
if simulated:
    report.table("planted_circuit_genes", planted_genes, rows=0)
    every = recovered[recovered["cell_type"] == "all types"].set_index("target")
    for target, row in every.iterrows():
        report.values({name: float(row[name]) for name in (
            "precision", "recall", "random_precision", "random_recall", "p", "top_share", "top_p",
            "precision_most_expressed", "top_share_most_expressed")}, prefix=f"truth.{target}.")
report.value("truth.circuits", simulated,
             circuits_in_prose(recovered, roles) if simulated else "")
report.table("planted_circuits", recovery, rows=6, digits=3,
             caption="The same for every circuit") if simulated else None

# %% [markdown]
# {glue:text}`truth.circuits`

# %%
if simulated:
    by_gene = run.model_copy(update={"gene_rule": "occurrence"})
    statistics = get_statistics(model, transcoders, corpus, run)
    baselines = {"untrained encoder": untrained_statistics(
        model, statistics, corpus, run, n_features=transcoders.n_features)}
    if run.reinitialised_control:
        baselines["re-initialised model"] = reinitialised_statistics(model, corpus, run)
    matches = program_matches(statistics, baselines, corpus, by_gene, plan)

# %% tags=["hide-input"]
report.table("planted_lists", matches.lists, digits=3, caption="Gene lists that match a planted "
             "program at the profile's FDR, and how many programs they match") if simulated else None

# %% tags=["hide-input"]
report.table("planted_programs", matches.programs, digits=3, caption="Planted programs, the features "
             "that match them, and null lists (mean over draws)") if simulated else None

# %% tags=["remove-input"]
if simulated:
    report.table("planted_matches", matches.features, rows=0)
    for row in matches.lists.itertuples(index=False):
        name = str(row.lists).replace(" ", "-")
        report.values({"percentage": float(row.percentage), "programs": float(row.programs),
                       "own_programs": float(row.own_programs)}, prefix=f"truth.lists.{name}.")
report.value("truth.features", simulated,
             features_in_prose(matches, len(plan.cell_types)) if simulated else "")

# %% [markdown]
# {glue:text}`truth.features`

# %% [markdown]
# ```{admonition} Key points
# - Closing to rounding is arithmetic; that the model's own value moves as predicted is evidence.
# - A circuit is a claim about the model, and can be tested in the model: without it, and with it alone.
# - A feature in every cell's circuit does not tell, by being there, what type a cell is.
# ```
