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
#     produces: [tables/circuit_nodes.csv, tables/circuit_enrichment.csv, tables/paper_case.csv, tables/paper_case_nulls.csv, circuits/*.json, circuits/*.js, circuits/*.graphml]
#     libraries: [case_library, CellMarker_Augmented_2021]
#     exhibits: "Figures 4 and 5, the case study"
#     modules: [circuits/contrast, circuits/attribution, circuits/case_targets, circuits/graph, enrichment/over_representation]
# ---

# %% [markdown]
# # The circuit behind one call
#
# ```{admonition} In short
# :class: in-short
# - **Question.** Which genes made the model call one cell "{glue:text}`case.prediction`", and through
#   which features?
# - **The paper says.** It traces one feature at the last {term}`token <sub-word token>` of an endothelial
#   cell's prompt. Nine genes on the nodes of its {term}`circuit` give the term "Endothelial cell: heart",
#   with an {term}`FDR` of {glue:text}`paper_case.printed_fdr` and a score of
#   {glue:text}`paper_case.printed_score`.
# - **We find.** Genes that speak for it most: {glue:text}`call.leading`. The circuit of the call itself
#   has {glue:text}`call.nodes` nodes, on {glue:text}`call.gene_nodes` genes{glue:text}`call.term_found`
#   The paper's kind of target is the same feature in {glue:text}`case.same_target` of the held-out cells: it is
#   {glue:text}`case.target_is`.
# - **What it is worth.** Of the call's {glue:text}`call.whole` {glue:text}`call.unit` {glue:text}`call.parts`.
#   With the circuit's features alone the call is {glue:text}`call.keeps`, with no feature
#   {glue:text}`call.nothing_keeps`: a {term}`faithfulness` of {glue:text}`call.faithfulness`{glue:text}`call.worth`
#   {doc}`08_controls` has it for more cells. The paper's FDR does not follow from its nine genes: the same test gives
#   {glue:text}`paper_case.fdr`.
# ```

# %% tags=["parameters"]
profile = "demo"
overrides: dict = {}

# %%
import pandas as pd

from scfm_circuits.cells.tokens import written
from scfm_circuits.circuits import attribution, case_targets, circuit, exports
from scfm_circuits.circuits.calls import calls_of, sums_by_source
from scfm_circuits.circuits.case_study import case_study
from scfm_circuits.circuits.graph_scores import graph_study
from scfm_circuits.paper import case as printed_case
from scfm_circuits.report.boxes import explorer
from scfm_circuits.report.chapter import open_chapter
from scfm_circuits.report.plots import circuits as plots
from scfm_circuits.report.plots import sentence

chapter = open_chapter("07_endothelial_case_study", profile, overrides, exact=True)
settings, corpus = chapter.profile, chapter.corpus
chapter.not_comparable()

# %%
chapter.only_guesses()

# %%
chapter.library_warnings(settings.case_library, printed_case.LIBRARY)

# %%
calls = calls_of(chapter.model, corpus, settings)
study = case_study(calls)
case, genes, position = study.prompt, study.sentence, study.prompt.position

# %%
end = repr(case.texts[position])
chapter.values({
    "type": settings.case_type, "prediction": study.prediction, "truth": study.truth,
    "position": f"final token, {end}" if settings.case_position == "answer" or not settings.in_words
    else f"end of the question, {end}",
    "origin": study.origin, "most_nodes": settings.circuit_nodes, "n_prompt_genes": len(genes), "n_tokens": len(case.texts),
}, prefix="case.")

# %%
library = chapter.library(settings.case_library)
targets = case_targets.case_targets(chapter.model, chapter.transcoders, corpus, settings, study,
                                    library)
frozen, asked = targets.frozen, calls.call(case, study.prediction)
call = targets.call(asked)
by_gene = calls.by_gene(frozen, asked, case.genes)
chapter.value("call.leading", ", ".join(by_gene.loc[by_gene["contribution"] > 0, "gene"][:4]) or "none")

# %%
own = calls.name(asked, study.prediction)
chapter.values({"said": calls.about(case, asked), "token": own, "unit": calls.unit,
                "in_words": settings.in_words, "by_state": not settings.in_words}, prefix="call.")
words = {
    True: {
        "meant": "The call is read as its contrast: the log-odds of that token against those of the "
        "other labels.",
        "above": "above 0 the model prefers the answer to all others together.",
        "tint": "The figure shows direct contributions alone: what attention brings from a gene's tokens "
        "straight to the answer. What a gene does through features on the way is not in its tint.",
        "sum_of": "The contrast is a sum over everything that was written into the residual stream "
        "at that token. Attention heads bring in what is written at the genes' tokens, so adding up "
        "their contributions by gene says which genes speak for this answer directly and which "
        "against it."},
    False: {
        "meant": "One unit is half the way from the other types' mean to this type's.",
        "above": "above 0 the cell lies on the side of this type.",
        "tint": "The figure shows what is written at a gene's own token and reaches the call along "
        "all paths of attention: which gene it is, its rank, and what features and errors write "
        "there.",
        "sum_of": "The call is a sum over everything that was written into the residual stream "
        "anywhere, whatever attention paths carried it. Adding it up by the token where it was "
        "written says which genes speak for this type and which against it, and how much of that is "
        "which gene stands there, and how much its rank."}}
chapter.values(words[settings.in_words], prefix="call.")
chapter.value("case.after_the_call", settings.in_words, "And the full stop that ends an answer comes "
              "after the call, so no feature there can have made it." if settings.in_words else
              "Here there is no answer and so no full stop: the last token is the text's own.")
chapter.percent("call.probability", calls.probability(frozen, asked))
chapter.value("call.contrast", float(call.target.reading.value))

# %%
call_gap = attribution.closure(frozen, call.target.reading)
chapter.value("call.closure", call_gap, f"{call_gap:.1e}")
chapter.value("call.closure_max", call.circuit.closure_max_relative,
              f"{call.circuit.closure_max_relative:.1e}")
chapter.values(call.values(), prefix="call.")
faithful = call.own_kind.faithfulness
chapter.rounded("call.faithfulness", faithful, 2)
chapter.value("call.worth", worth := faithful is not None and 0 < faithful < 2,
              ", where 1 is all that features do." if worth else
              ", so by this measure they explain none of it.")
sums = calls.sums(frozen, asked, by_gene)
chapter.value("call.parts", calls.parts(sums))
chapter.p_value("call.p_random", call.genes.p)
term = call.genes.best_term
chapter.value("call.term_found", term is not None, ", and no term of the library has any of them."
              if term is None else f'. Their best term is "{term}" (p = {call.genes.p:.2g} against '
              "random genes of the same sentence).")
chapter.percent("call.kept_share", circuit.share_kept(call.circuit))
chapter.percent("call.prompt_token_share", float((call.nodes["gene"] == "").mean()))

# %% [markdown]
# ## The call, and what led to it
#
# The model's answer for this cell is "{glue:text}`case.prediction`"; its label is
# "{glue:text}`case.truth`". {glue:text}`call.said` {glue:text}`call.meant` It is
# {glue:text}`call.contrast` {glue:text}`call.unit` here; {glue:text}`call.above`
#
# Explore its circuit: click a node to see its tokens, its feature's gene list and best term, its
# strongest contexts, how active it is in each cell type, and its edges. The calls of other cells can be
# chosen too.

# %%
explorer.explore(chapter, [
    explorer.Explored("call", f"{study.prediction}: the call of this chapter",
                      "The cell of this chapter: what led to its call.", call.circuit, case.texts,
                      case.genes, f"call: {study.prediction}"),
    *explorer.further_calls(calls, chapter.transcoders, but=study.prediction)], library,
    caption="The circuit of the call to explore: layers upwards, tokens along; the "
    "larger a node, the more of the target's contributions pass through it")

# %%
scan = f"scfm-{settings.name}"
outputs = {call.target.node.id: exports.Output(own, calls.probability(frozen, asked))}
exports.save_both(settings.results, "call", call.circuit, case.texts, case.genes,
                  slug=f"{settings.name}-call", scan=scan, outputs=outputs)

# %% mystnb={"image": {"alt": "The cell's sentence, gene by gene, tinted by the direct contribution of its tokens to the call; above it the circuit of the call, layers upwards, with the answer on top."}, "figure": {"caption": "The cell as the model read it. Blue genes speak for the call and orange ones against it, the stronger the colour the more. Above, the circuit of the call: heads (diamonds, with a dotted line to what they read), features (circles) and what the transcoders leave unexplained (crosses), layers upwards.", "name": "fig-call-sentence"}}
drawn = (genes, dict(zip(by_gene["gene"], by_gene["contribution"], strict=True)), study.prediction,
         sentence.Traced(call.circuit, case.genes))
chapter.figure("call_sentence", sentence.call_sentence(*drawn),
               sentence.call_sentence(*drawn, columns=sentence.ON_A_PHONE))

# %% [markdown]
# {glue:text}`call.tint`
# {doc}`08_controls` takes each gene out and says without which one the call loses most.

# %% tags=["fold:The prompt and where the call is read in it"]
print(written(settings, genes, study.prediction) if settings.in_words else " ".join(case.texts))

# %% [markdown]
# The case study of this profile is about the type {glue:text}`case.type`. The sentence traced is
# {glue:text}`case.origin`. Its {glue:text}`case.n_prompt_genes` genes and what stands around them take
# {glue:text}`case.n_tokens` tokens. The prompt that the paper prints in its Figure 4 is none of the
# model's own templates ({doc}`01_cells_and_model`). In the explorer, each other cell is the first
# held-out cell of its type that the model names rightly, commonest type first. Terms are of the library
# of this case study, tested against the corpus's own genes.

# %% [markdown] tags=["only-if:call.in_words"]
# Labels may begin alike, and a token that most of them share decides nothing. So the {term}`contrast`
# is read where the answer parts from most of the run's other labels, as the log-odds of its token $a$
# against the tokens $B$ that they offer there, each once:
#
# ```{math}
# \text{contrast} = \ell_a - \log \sum_{b \in B} e^{\ell_b} .
# ```
#
# With attention patterns and norms held at their values, it is a linear reading: the gradient in the
# {term}`logits <logit>` is the answer's token less the others, weighted by their softmax among themselves, and the
# entropy of these weights belongs to the constant.

# %% [markdown] tags=["only-if:call.by_state"]
# A cell's embedding $\mathbf{m}$ is the mean, over the tokens of its genes, of what the model's body
# gives; special tokens are left out. With $\mathbf{c}$ the mean embedding of the type's training cells
# and $\mathbf{o}$ the mean of the other types' means,
#
# ```{math}
# \text{call} = \frac{2\,(\mathbf{m} - \tfrac{1}{2}(\mathbf{c} + \mathbf{o}))
# \cdot (\mathbf{c} - \mathbf{o})}{\lVert \mathbf{c} - \mathbf{o} \rVert^2} .
# ```
#
# With attention patterns and norms held at their values, it is a linear reading at all genes' tokens.
# The cell is named by the nearest of the types' means.

# %%
chapter.table("call_contrast", calls.table(case, frozen, asked), rows=20, digits=3,
              caption="The answer's token and those of the other labels; share is the probability "
              "among them" if settings.in_words else "How far the cell lies on each type's side")

# %% [markdown] tags=["fold:Every gene's direct contribution and the sum"]
# {glue:text}`call.sum_of`

# %% mystnb={"image": {"alt": "Bars of the signed contributions to the contrast of the call: features, attention heads on genes and on other tokens, embedding, error, constant."}, "figure": {"caption": "The call as a sum of its parts; bars to the right speak for it. Error is what the transcoders leave unexplained of the MLPs.", "name": "fig-call"}}
chapter.figure("case_call", plots.contribution_kinds(
    sums, "the call's contrast, nats" if settings.in_words
    else f"the call, {calls.unit}"))

# %%
chapter.table("case_call_genes", by_gene, rows=12,
              caption="Direct attention contributions to the call's contrast, by gene"
              if settings.in_words else "What is written at each gene's token gives the call, and "
              "how much of it tells which gene, which rank, or comes from MLPs")

# %% [markdown]
# The sum differs from the model's own value by {glue:text}`call.closure` of its largest part.

# %% [markdown] tags=["fold:How the circuit is found and the circuit as a static figure"]
# The search is the paper's: take the strongest contributors, extend them upstream, repeat. A
# feature is extended by its own sum, and an {term}`attention head` by what it read at its source token.
# Negative contributions are kept. The search stops at {glue:text}`case.most_nodes` nodes. The circuit has {glue:text}`call.nodes` nodes and
# {glue:text}`call.edges` edges. Its direct edges hold {glue:text}`call.kept_share` of the target's
# absolute contributions; the rest is counted but not drawn. The largest rounding error of any extended node
# is {glue:text}`call.closure_max` of its absolute contributions. As in the paper, some nodes are at words
# of the prompt and not at genes: {glue:text}`call.prompt_token_share` of them. The others name
# {glue:text}`call.gene_nodes` genes.

# %% mystnb={"image": {"alt": "The circuit of the call drawn with layers upwards and tokens along: nodes by kind, edges by sign and strength, leading up to the call."}, "figure": {"caption": "The circuit of the call: layers upwards, tokens along; only tokens with a node have a place. Line width is the size of a contribution; blue adds, orange takes away; the larger a node, the more of the target's contributions pass through it. A number such as ×11 counts the nodes of a kind that are drawn as one.", "name": "fig-call-circuit"}}
last = chapter.transcoders.n_layers - 1
chapter.figure("call_circuit", plots.circuit_picture(call.circuit, case.texts, case.genes, last + 1))

# %% tags=["fold:How much of the model is in the picture"]
graph = graph_study(frozen, call.target, max_features=settings.graph_features)

# %% [markdown]
# The search above follows the strongest contributors only. The graph below starts from the same
# target and takes everything upstream of it as a source, whatever attention paths lead there, as
# circuit-tracer does: an edge is what one node gives another through all heads and layers in
# between. The features with most influence on the target get a row of their own; edges to the
# others, and those too weak to keep, are counted as dropped. Each row adds up as before.

# %%
both = graph.table()
chapter.table("circuit_graph", both, rows=0, caption="The graph before and after pruning, with where "
              "its influence ends")
chapter.show(both.drop(columns=[one for one in both if one.startswith("ends_")]), digits=3,
             caption="The graph, before and after pruning to the nodes that hold 80 % of all influence "
             "and the edges that hold 98 % of it")

# %%
whole = graph.whole
exports.save_both(settings.results, "call_graph", graph.pruned, case.texts, case.genes,
                  slug=f"{settings.name}-call-graph", scan=scan, outputs=outputs)
chapter.values(graph.counts(greedy={node.id for node in call.circuit.features}), prefix="graph.")
chapter.value("graph.closure_max", whole.closure_max_relative, f"{whole.closure_max_relative:.1e}")
chapter.rounded("graph.replacement", graph.replacement, 2)
chapter.rounded("graph.completeness", graph.completeness, 2)
for end, share in graph.ends.items():
    chapter.percent(f"graph.ends.{end}", share)

# %% [markdown]
# Of {glue:text}`graph.active` active features upstream of the target, {glue:text}`graph.rows` have a
# row. Followed back through the graph, {glue:text}`graph.ends.tokens` of the target's absolute
# contributions start at the prompt's tokens, {glue:text}`graph.ends.errors` at what the transcoders
# leave unexplained, {glue:text}`graph.ends.constant` at biases, which the text does not touch, and
# {glue:text}`graph.ends.dropped` were dropped. Circuit-tracer's two scores see neither biases nor
# what was dropped: the {term}`replacement score` is {glue:text}`graph.replacement`, and the
# {term}`completeness score` {glue:text}`graph.completeness`; 1 would be best for both. A high score says
# that the transcoders replace the MLPs well on this text, not that the picture is small or easy to read.
# The largest rounding error of any row is {glue:text}`graph.closure_max` of its absolute contributions.
#
# Pruning leaves {glue:text}`graph.pruned_features` features and
# {glue:text}`graph.pruned_edges` edges. Of the {glue:text}`graph.greedy_features` features of the
# greedy circuit above, {glue:text}`graph.shared_features` are among them: the two searches rank
# differently, because one follows single heads and the other sums over them. Both are kept under
# `results/<profile>/circuits/` as Neuronpedia's JSON and as GraphML, which Cytoscape, Gephi and
# networkx read.

# %% tags=["fold:A feature of the last layer that tells this type from the others"]
specific = case_targets.call_features(chapter.model, chapter.transcoders, corpus, settings, study.truth)
asking = case.answer_start - 1
active = frozen.activations[last, asking, specific["feature"].to_numpy(int)].cpu().numpy() > 0
chosen = specific[active].head(1)
by_type = targets.feature(last, int(chosen["feature"].iloc[0]), asking) if len(chosen) else None

# %% [markdown] tags=["only-if:call.by_state"]
# The call is read at all genes, so no feature at a single token can carry it; below stand the features
# of the last layer at the text's last token that tell the cell's type from the others best.

# %% [markdown] tags=["only-if:call.in_words"]
# A feature of the last layer at the question's last token can carry the call. It is chosen by how well
# it tells the cell's type from the others, not by its size: of the features that are active there in
# this text, the one that is most often higher in the type's training cells than in another type's
# (the mean of its AUROC over types). Held-out cells are not used for the choice; they check it.

# %%
chapter.table("call_features", specific[active].head(8), digits=3,
              caption="Features of the last layer at the question's last token that tell the "
              "cell's type from the others best, of those active in this text")

# %%
chapter.value("call.feature", int(chosen["feature"].iloc[0]) if len(chosen) else None)
for name in ("auroc", "held_out_auroc"):
    chapter.rounded(f"call.feature_{name}", float(chosen[name].iloc[0]) if len(chosen) else None, 2)

# %% [markdown]
# The choice is feature {glue:text}`call.feature`: AUROC {glue:text}`call.feature_auroc` in training
# cells, where it was chosen as the best of many, and {glue:text}`call.feature_held_out_auroc` in
# held-out cells.

# %%
gene = calls.gene_call(case, case_targets.marker_genes(library, settings.case_type))
of_gene = targets.of_gene(gene, chapter.transcoders) if gene else None

# %% [markdown] tags=["only-if:gene.asked"]
# ## A gene that the model fills in
#
# What such a model is trained on is a gene itself: an encoder fills in a masked one, a decoder writes the
# next. The gene is chosen by a rule that looks at no result: the cell's first, in rank order, that is in
# any term of the case library with the type's name in it; without one, the first of all (for a decoder, of
# those with a gene before them). Here it is
# {glue:text}`gene.asked`, of rank {glue:text}`gene.rank`. The log-odds of its token against those of all
# other genes are {glue:text}`gene.log_odds` nats. Its circuit has {glue:text}`gene.nodes` nodes on
# {glue:text}`gene.gene_nodes` genes; alone it keeps {glue:text}`gene.keeps` nats of it, and no circuit at all
# keeps {glue:text}`gene.nothing_keeps`. The sum closes within {glue:text}`gene.closure_max`.

# %% tags=["only-if:gene.asked"]
chapter.value("gene.asked", bool(gene), gene.gene if gene else "")
said = {**of_gene.values(), "rank": genes.index(gene.gene) + 1,
        "log_odds": float(of_gene.target.reading.value)} if gene else {}
chapter.values({name: said.get(name) for name in (
    "rank", "log_odds", "nodes", "gene_nodes", "keeps", "nothing_keeps")}, prefix="gene.")
chapter.value("gene.closure_max", bool(gene),
              f"{of_gene.circuit.closure_max_relative:.1e}" if gene else "")
chapter.table("gene_nodes", of_gene.nodes, rows=10, columns={
    one: one for one in ("kind", "layer", "feature", "head", "token", "gene", "value", "influence")},
              caption="The most influential nodes of the gene's circuit") if gene else None

# %% [markdown]
# ## The paper's target, and a caution
#
# The paper traces one of the strongest features of the last layer at the last token. Here that is the
# {glue:text}`case.position`, and the strongest feature is {glue:text}`case.target`. It is the strongest at
# the same place in {glue:text}`case.same_target` of the held-out cells, which are of
# {glue:text}`case.types_said`: it is {glue:text}`case.target_is`. A feature that is strongest for every cell type marks a position in the
# text, not a cell type. The paper does not report this check for its feature 2692.
# {glue:text}`case.after_the_call`

# %%
strongest = targets.strongest(8)
traced = targets.feature(last, strongest[0], position)

# %% tags=["fold:The target's contributions add up; those of the paper's Equation 5 do not"]
reading = traced.target.reading
chapter.value("case.target", strongest[0], str(strongest[0]))
chapter.values({"target_layer": last, "pre_activation": float(reading.value)}, prefix="case.")
chapter.table("case_features", pd.DataFrame({
    "layer": last, "feature": strongest,
    "activation": frozen.activations[last, position, strongest].tolist(),
}), caption="Most active features of the last layer at that token")

# %%
elsewhere = case_targets.target_elsewhere(chapter.model, chapter.transcoders, corpus, settings, last,
                                          strongest[0])
chapter.percent("case.same_target", elsewhere.share)
chapter.values({"n_types": elsewhere.types, "same_target_types": elsewhere.same_types,
                "target_is": elsewhere.called}, prefix="case.")
same, all_types = elsewhere.same_types, elsewhere.types
chapter.value("case.types_said", same, f"all {all_types} types" if same == all_types
              else f"{same} of {all_types} types")

# %% [markdown]
# With attention patterns and LayerNorm scales held at their values on this text, the model is linear
# between features, and a feature's {term}`pre-activation` is a sum over everything that was written into
# the residual stream at its token. With $\mathbf{u} = C(\mathbf{g} \odot \mathbf{f}) / \sigma$, the
# encoder row pulled back through LayerNorm,
#
# ```{math}
# h = \sum_{l,i} z^{(l,i)}\,\mathbf{d}^{(l,i)}\!\cdot\mathbf{u}
# + \sum_l \boldsymbol\varepsilon^{(l)}\!\cdot\mathbf{u} + \mathbf{e}\cdot\mathbf{u}
# + \sum_{l,h,s} A^{(l,h)}_{ts}\,\frac{\mathbf{v}^{(l,h)}\!\cdot\mathbf{r}^{(l)}_s}{\sigma^{(l)}_s}
# + \text{constant}.
# ```
#
# The paper's Equation 5 has the encoder row itself in place of $\mathbf{u}$, which leaves the
# LayerNorm out. Here the constant is computed from the biases and not from what is missing, so the sum can
# be checked: it differs from the model's own pre-activation, {glue:text}`case.pre_activation`, by
# {glue:text}`case.closure` of it.

# %% mystnb={"image": {"alt": "Bars of the signed contributions to the target's pre-activation: features, attention heads, embedding, error, constant."}, "figure": {"caption": "The target feature's pre-activation as a sum of its sources. Error is what the transcoders leave unexplained of earlier layers' MLPs.", "name": "fig-sum"}}
parts = attribution.contributions(frozen, reading)
sums = sums_by_source(parts)
chapter.figure("case_sum", plots.contribution_kinds(sums))

# %%
total, value = float(parts.total()), float(reading.value)
closing = abs(float(parts.total() - reading.value)) / abs(value)
chapter.value("case.closure", closing, f"{closing:.1e}")
chapter.table("case_sum", pd.DataFrame({
    "source": [*sums, "sum", "pre-activation of the model"],
    "contribution": [*sums.values(), total, value],
}), caption="The sum, and what the model itself computes", digits=7)

# %%
as_printed = attribution.compare_equation_5(frozen, parts, last, strongest[0], position)
chapter.rounded("case.equation5_correlation", as_printed.correlation, 2)
chapter.rounded("case.equation5_ratio", as_printed.ratio, 2)

# %% [markdown]
# Over the features active at this token, Equation 5 as printed and the exact contributions have a
# correlation of {glue:text}`case.equation5_correlation`. But a correlation does not see scale: the sum over
# features by Equation 5 is {glue:text}`case.equation5_ratio` times the exact one, so its terms
# cannot be compared with attention, error and bias.

# %% mystnb={"image": {"alt": "The circuit of the paper's target drawn with layers upwards and tokens along, leading up to the target feature at the last token."}, "figure": {"caption": "The circuit of the paper's target (its Figure 5), drawn as the one above.", "name": "fig-circuit"}} tags=["fold:The circuit of the paper's target as a figure and to explore"]
chapter.figure("figure5_circuit", plots.circuit_picture(traced.circuit, case.texts, case.genes,
                                                        last + 1))

# %%
explorer.explore(chapter, [explorer.Explored("case_study", "the paper's target", "", traced.circuit,
                                             case.texts, case.genes)], library,
                 caption="The circuit of the paper's target to explore")

# %%
exports.save_both(settings.results, "case_study", traced.circuit, case.texts, case.genes,
                  slug=f"{settings.name}-case", scan=scan)
chapter.values(traced.values(), prefix="case.")
chapter.p_value("case.p_random", traced.genes.p)
chapter.value("case.closure_max", traced.circuit.closure_max_relative,
              f"{traced.circuit.closure_max_relative:.1e}")
chapter.percent("case.prompt_token_share", float((traced.nodes["gene"] == "").mean()))
chapter.value("case.prompt_share_of_tokens", case.genes.count(None) / len(case.genes))
chapter.percent("case.kept_share", circuit.share_kept(traced.circuit))

# %% [markdown]
# Its circuit has {glue:text}`case.nodes` nodes and {glue:text}`case.edges` edges; its direct edges
# hold {glue:text}`case.kept_share` of the target's absolute contributions,
# {glue:text}`case.prompt_token_share` of its nodes are at words of the prompt, and the largest
# rounding error of any extended node is {glue:text}`case.closure_max`.

# %% [markdown]
# ## What the circuits say, side by side
#
# Of the sentence's {glue:text}`case.n_prompt_genes` genes the circuit of the call has nodes on
# {glue:text}`call.gene_nodes`, and that of the paper's target on {glue:text}`case.gene_nodes`. Their best
# term is compared with those of as many random genes of the same sentence (p). The last three columns are
# the target's value in the whole model, with the circuit's features alone, and with no circuit at all.

# %%
of_type = "the call's feature" if settings.in_words else "the type's feature"
traced_all = {"the call": call, **({f"the gene {gene.gene}": of_gene} if gene else {}),
              **({of_type: by_type} if by_type else {}), "the paper's target": traced}
rows = pd.DataFrame([one.row(name) for name, one in traced_all.items()])
chapter.table("case_targets", rows, rows=0, caption="Targets of one text, with the counts of terms below "
              "the FDR")
chapter.show(rows.drop(columns=["nodes", "terms_below", "random_below"]), digits=2,
             caption="Targets of one text: genes of their circuits, and what is left of each: of the call "
             f"in {calls.unit}, of features as pre-activation")

# %% [markdown]
# For the call the best term is "{glue:text}`call.best_term`"
# (p = {glue:text}`call.p_random` against random genes of the sentence), for the paper's target
# "{glue:text}`case.best_term`" (p = {glue:text}`case.p_random`). The whole prompt's genes, with no
# circuit at all, give "{glue:text}`case.best_term_all`": they are the genes that rank first in
# the cell, so a term that fits the cell shows that the prompt fits the cell before it shows anything
# about the circuit.

# %% tags=["fold:The nodes and genes of each circuit"]
def of_all(table):
    tables = {name: table(one) for name, one in traced_all.items()}
    return pd.concat(tables, names=["target"]).reset_index("target")


nodes = of_all(lambda one: one.nodes)
chapter.table("circuit_nodes", nodes, rows=0, caption="The nodes of each circuit with all their numbers")
chapter.show(nodes.groupby("target", sort=False).head(7)[
    ["target", "kind", "layer", "feature", "token", "gene", "influence"]], digits=2,
    caption="The most influential nodes of each circuit (embedding: what a token brings itself, before "
    "layer 0; the logit comes after the last)")

# %%
chapter.table("circuit_edges", of_all(lambda one: circuit.edge_table(one.circuit).rename(
    columns={"target": "target_node"})), rows=0, caption="The edges of each circuit")

# %%
chapter.table("circuit_expansions", of_all(lambda one: circuit.expansion_table(one.circuit)),
              rows=0, caption="Closure: kept edges, biases and the parts not kept add up to each "
              "node's value")

# %%
by_genes = of_all(lambda one: circuit.gene_table(one.nodes))
chapter.table("circuit_genes", by_genes, rows=0, caption="Every gene that a circuit has nodes on")
chapter.show(by_genes.groupby("target", sort=False).head(6), digits=2,
             caption="The genes that each circuit's nodes are on, most influential first")

# %% tags=["fold:How the columns are computed and every term"]
everything = targets.rule.terms(genes, library, targets.symbols)

# %%
chapter.value("case.library", library.name, library.title)
chapter.values({
    "stand_in": chapter.stand_in(settings.case_library),
    "best_term_all": everything["Term"].iloc[0] if len(everything) else None,
    "statement": targets.rule.statement, "random_draws": case_targets.DRAWS,
    "fdr_cut": settings.fdr}, prefix="case.")
chapter.table("circuit_enrichment", of_all(lambda one: one.genes.terms).assign(
    rule=targets.rule.name, library=library.name), rows=12,
    caption=f"Terms of {library.title} enriched among the circuits' genes. {targets.rule.statement}")

# %% [markdown]
# {glue:text}`case.statement` Heads are counted at the token they read. The column p is how often
# {glue:text}`case.random_draws` draws of random genes reach as small a p-value for whichever term is their
# best. Of the call, {glue:text}`call.terms_below` terms are below FDR {glue:text}`case.fdr_cut` (random
# genes: {glue:text}`call.random_below`); of the paper's target, {glue:text}`case.terms_below` (random
# genes: {glue:text}`case.random_below`).
#
# With the circuit alone, or with none, every other feature is held at its mean over tokens of its own
# kind in training cells. Transcoder errors stay as they are, and attention reads the genes in all
# three, so what no circuit keeps is not zero. Of the paper's target, {glue:text}`case.whole`, the circuit
# keeps {glue:text}`case.keeps` and no circuit {glue:text}`case.nothing_keeps`.

# %% [markdown]
# ## The paper's own case
#
# The paper prints its prompt (Figure 4, {glue:text}`paper_case.n_prompt` genes) and the nine genes
# of its circuit, so its enrichment can be computed again. The qualitative finding is reproduced: the term
# "Endothelial cell: heart" {glue:text}`paper_case.best_term_is_endothelial_heart` by p-value
# ({glue:text}`paper_case.p`), because of VWF and PTPRB. The two printed numbers are not: the server's formula gives an FDR of
# {glue:text}`paper_case.fdr` where the paper has {glue:text}`paper_case.printed_fdr`, and a score of
# {glue:text}`paper_case.score` where it has {glue:text}`paper_case.printed_score`.

# %%
heart = chapter.library(printed_case.LIBRARY)
printed = printed_case.paper_case(heart, targets.symbols, chapter.paper)

# %% [markdown] tags=["only-if:paper_case.nulls"]
# Would other genes have done as well? VWF with random genes, with no model behind them, brings the term
# below FDR 0.05 in {glue:text}`paper_case.null.anchor_random.hit` % of draws under the server's rule, and in
# {glue:text}`paper_case.null.anchor_random.all` % corrected for all terms of the library. VWF with other
# genes of the same prompt does so in {glue:text}`paper_case.null.anchor_prompt.all` % (all terms).

# %% tags=["fold:Endothelial cell: heart under every rule"]
chapter.table("paper_case", printed.table, digits=3, caption="Endothelial cell: heart, for the paper's "
              "genes, under each rule")

# %%
ours, stated = printed.ours, chapter.paper.case
chapter.rounded("paper_case.fdr", float(ours["FDR"]), 4)
chapter.rounded("paper_case.score", float(ours["score"]), 2)
chapter.p_value("paper_case.p", float(ours["p"]))
chapter.value("paper_case.best_term_is_endothelial_heart", bool(ours["rank by p"] == 1),
              "ranks first" if ours["rank by p"] == 1 else "does not rank first")
chapter.value("paper_case.score_is_highest", printed.score_is_highest,
              "is" if printed.score_is_highest else "is not")
chapter.rounded("paper_case.highest", float(ours["highest score below 0.05"]), 1)
chapter.values({
    "n_prompt": len(printed.prompt), "terms_hit": len(printed.server),
    "terms_below": int(ours["terms below 0.05"]), "single_gene": printed.single_gene,
    "printed_fdr": stated["fdr"], "printed_score": stated["enrichment_score"],
}, prefix="paper_case.")
exchanged = "Each rule is shown with the Benjamini-Hochberg family exchanged, too."
left_out = (" The rule corpus is left out: not all of the nine genes occur in this run's cells."
            if printed.corpus_left_out else "")
chapter.value("paper_case.corpus_rule_left_out", printed.corpus_left_out, exchanged + left_out
              if printed.settings else "Here the server's rule alone can be shown, "
              "from overlap counts.")

# %% [markdown]
# No formula we know of gives both printed numbers. With two of nine genes in a term, a score of
# {glue:text}`paper_case.printed_score` goes with a *p-value* near {glue:text}`paper_case.printed_fdr`
# whatever the term's size. So the printed FDR may be a p-value; that is a guess. The paper says "the highest
# score among all pathways"; here the term's score {glue:text}`paper_case.score_is_highest` the highest below
# FDR 0.05, which is {glue:text}`paper_case.highest`. An FDR below 0.05 says little here: of
# {glue:text}`paper_case.terms_hit` terms that hold any of the nine genes,
# {glue:text}`paper_case.terms_below` have one, {glue:text}`paper_case.single_gene` of them by a single
# gene. {glue:text}`paper_case.corpus_rule_left_out`

# %% [markdown] tags=["fold:Would other genes have done as well?", "only-if:paper_case.nulls"]
# Nothing in the table above says how easily the term is reached. So the same test is run on lists
# that owe less and less to the circuit: VWF with random genes, VWF with other genes of the same
# prompt, any genes of the prompt, and random genes alone, {glue:text}`paper_case.draws` draws each.
# A random gene is one of the background's; where that is a number, those of its genes that the
# library does not know match no term.
#
# The server's rule corrects only for the terms that a list happens to touch, and in a list this short a single
# gene can be enough. Corrected for all terms, two genes of the term are needed. The prompt is the sentence of
# an endothelial cell, so what the circuit adds has to be read against other genes of the prompt.

# %% tags=["only-if:paper_case.nulls"]
draws = 2_000
nulls = printed.nulls(draws, settings.seed)

# %%
chapter.value("paper_case.draws", draws)
chapter.value("paper_case.nulls", len(nulls) > 0)
for kind in ("anchor_random", "anchor_prompt", "prompt", "random"):
    for family in ("hit", "all"):
        row = printed_case.null_row(nulls, kind, family=family) if len(nulls) else {"percent": None}
        chapter.value(f"paper_case.null.{kind}.{family}", row["percent"])
chapter.table("paper_case_nulls", nulls, rows=0, caption="How often other genes bring the term below "
              "FDR 0.05")

# %%
chapter.show(printed_case.rates_by_rule(nulls, printed.settings), caption="How often the term named "
             "is below FDR 0.05, with a 95 % interval") if len(nulls) else None

# %% [markdown] tags=["fold:The paper's nine genes in this run's circuits", "only-if:case.nine_in_prompt"]
# Whether the paper's genes are the circuit's genes can only be said on the paper's own prompt and model.
# On any other cell the question has no meaning, and the ledger says "not comparable at this scale".

# %% tags=["only-if:case.nine_in_prompt"]
present = {name: {gene: gene in one.genes.genes for gene in printed.nine}
           for name, one in (("case", traced), ("call", call))}
for name, there in present.items():
    chapter.values(there, prefix=f"{name}.gene_node.")
chapter.value("case.nine_in_prompt", len({*printed.nine} & {*genes}))
chapter.values(printed_case.term_overlap(library, stated["term"], traced.genes.genes, genes),
               "case.term.")
chapter.show(chapter.paper.circuit.assign(
    in_prompt=[gene in genes for gene in printed.nine],
    in_circuit=list(present["case"].values()), in_the_calls_circuit=list(present["call"].values())),
    caption="The paper's nine genes in this run's prompt and circuits")
