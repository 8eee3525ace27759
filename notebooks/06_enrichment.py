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
#     produces: [tables/table4.csv, tables/table4_shares.csv, tables/features.csv,
#       tables/feature_terms.csv]
#     libraries: [libraries]
#     exhibits: "Table 4"
#     modules: [features/statistics, enrichment/over_representation, enrichment/controls/layer_counts, features/baselines, enrichment/controls/planted_features, enrichment/prerank]
# ---

# %% [markdown]
# # Which features are called biologically interpretable
#
# ```{admonition} In short
# :class: in-short
# - **Question.** For how many features is a {term}`gene-set term <gene set>` enriched among their genes, and for how many gene
#   lists that no trained feature made?
# - **The paper says.** In most layers over 80 % of the {term}`live features <live feature>` are
#   "biologically interpretable": one GO or KEGG term is enriched at {term}`FDR` below 0.05. It gives no
#   control.
# - **We find.** By the paper's most likely rule {glue:text}`controls.enrichr.features` of our features are
#   called interpretable. So are {glue:text}`controls.enrichr.untrained-encoder` of features of an
#   {term}`untrained encoder`, and {glue:text}`controls.enrichr.uniform` of lists of random genes.
# - **What it is worth.** Such a percentage says something about features only by how far it is above its
#   controls. {glue:text}`controls.nominal` of {glue:text}`table4.total.live` features are
#   {term}`ahead of all controls`, where luck gives up to {glue:text}`enrichment.fdr` of all, and
#   {glue:text}`controls.beyond` after correction over all features{glue:text}`planted.limit`
#   {glue:text}`ahead.occurrence.learning`. Depending on choices that the paper does not state, the percentage
#   of the same features is anywhere from {glue:text}`enrichment.lowest` to
#   {glue:text}`enrichment.highest` %.
# ```

# %% tags=["parameters"]
profile = "demo"
overrides: dict = {}

# %%
from scfm_circuits.enrichment import prerank
from scfm_circuits.enrichment.controls import joint_null, layer_counts, studies, tables
from scfm_circuits.enrichment.rules import RULES
from scfm_circuits.report.chapter import open_chapter
from scfm_circuits.report.plots import enrichment as plots

chapter = open_chapter("06_enrichment", profile, overrides)
settings = chapter.profile
stand_in = chapter.stand_in()
chapter.not_comparable()

# %%
chapter.library_warnings()

# %%
corpus, libraries = chapter.corpus, chapter.libraries

# %%
statistics, baselines = chapter.statistics, chapter.baselines
others = {**baselines, **chapter.directions}
study = studies.table4_study(statistics, others, corpus, settings, libraries)

# %%
chapter.value("enrichment.gene_rule", settings.gene_rule)
chapter.value("enrichment.list_rule", settings.list_rule if settings.list_rule != "top"
              else f"top {settings.list_size}")
chapter.rounded("enrichment.median_length", study.median_length)
chapter.value("enrichment.level", settings.fdr, f"{settings.fdr:g}")
chapter.value("enrichment.statement", RULES[settings.enrichment_rule].statement)

# %% [markdown]
# ## Table 4: features with an enriched term
#
# The paper lists each feature's genes, most active first, and tests the list against GO and KEGG. It says
# "GSEA"; what its words and numbers describe is {term}`over-representation analysis (ORA)
# <over-representation (ORA)>`, as the Enrichr service computes it {cite:p}`kuleshov2016enrichr`. This book
# says ORA. {glue:text}`table4.layout`

# %%
table4, paper = study.table, None if stand_in else chapter.paper.table4
chapter.table("table4", table4, rows=0, caption="Live and interpretable features of each layer")
chapter.value("enrichment.stand_in", stand_in)
chapter.value("enrichment.libraries", ", ".join(one.name for one in libraries),
              ", ".join(one.title for one in libraries))
chapter.value("table4.layout", "This run alone, with other gene sets than the paper's." if stand_in
              else "First this run, then the paper's layer at the same relative depth.")
chapter.show(studies.beside_paper(table4, paper), caption="Table 4 of this run under the rule "
             f"{settings.enrichment_rule}" + ("" if stand_in else ", and the paper's"))

# %% mystnb={"image": {"alt": "Percentage of gene lists called interpretable against layer: the features of this run, the paper's, a grey band for lists of random genes and tokens, and an orange band for features that no dictionary learning on this model made."}, "figure": {"caption": "Table 4 as one picture, by the paper's likely rule. Bands go from the lowest to the highest of their kind, with 95 % intervals. Orange: an encoder without training, a model with random weights, single neurons, principal components. Grey: lists of random genes and tokens.", "name": "fig-table4"}}
shares = studies.by_gene_rule(study, settings)
percentages = None if paper is None else paper["percentage"].to_numpy()
chapter.figure("table4", plots.table4_with_nulls(shares, settings, percentages))

# %%
for row in table4.itertuples():
    chapter.values({"live": row.live, "interpretable": row.interpretable,
                    "percentage": row.percentage}, prefix=f"table4.layer_{row.layer}.")
total, called = int(table4["live"].sum()), int(table4["interpretable"].sum())
chapter.values({"live": total, "interpretable": called,
                "percentage": 100 * called / total if total else None}, prefix="table4.total.")
printed = None if paper is None else 100 * paper["interpretable"].sum() / paper["total"].sum()
chapter.value("table4.paper_percentage", printed, "." if printed is None else
              f"; over the paper's 24 layers it is {printed:.2f} %.")

# %% [markdown]
# Of {glue:text}`table4.total.live` live features {glue:text}`table4.total.percentage` % are called
# interpretable under this run's rule{glue:text}`table4.paper_percentage`

# %% [markdown] tags=["fold:How the lists are made and tested"]
# Two choices decide this table, and the paper states neither. **Which genes make the list:** under
# the {term}`gene rule` {glue:text}`enrichment.gene_rule` and the list rule
# {glue:text}`enrichment.list_rule` of this run, lists have a median of
# {glue:text}`enrichment.median_length` genes. **How they are tested:** {glue:text}`enrichment.statement`
#
# Beside it stands the stricter rule {term}`corpus <rule corpus>`, with the corpus's own genes as
# {term}`background` and every term in the correction. Libraries:
# {glue:text}`controls.libraries`, {glue:text}`enrichment.n_terms` terms.

# %%
used = studies.library_table(libraries, corpus)
chapter.table("gene_set_libraries", used, rows=0, caption="Libraries with their source and checksum")
chapter.show(used.drop(columns=["from", "sha256"]), caption="Libraries used on this page; symbols are "
             "compared in upper case, terms of every size are tested")

# %% [markdown]
# ## What would anything else have scored?
#
# Each live feature's gene list is compared with lists that owe nothing to a trained feature: random genes,
# genes as common, random tokens, features of an untrained encoder and of a model with random weights, and
# the model's own directions.

# %%
joint = joint_null.joint_study(statistics, others, corpus, settings, libraries)

# %% mystnb={"image": {"alt": "One panel per choice of rules: percentage of lists called interpretable against layer, as a thick line for the trained features, thin lines for three kinds of null lists, points for four kinds of other features, and a band for relabelled genes."}, "figure": {"caption": "Share of lists called interpretable, layer by layer. The thick line is the trained features; thin lines are null lists; points are features that no dictionary learning on this model made, with 95 % intervals; the band holds 95 % of what the trained features' own lists score when the genes have exchanged their names. enrichr is the rule that the paper most likely used, corpus takes the corpus as background and every term into the correction.", "name": "fig-controls"}}
chapter.figure("table4_controls", plots.share_with_controls(shares, joint.shares, percentages))

# %% [markdown]
# Under the rule `enrichr`, the paper's most likely one, {glue:text}`controls.enrichr.features` of the
# features are called interpretable, {glue:text}`controls.enrichr.uniform` of lists of random genes, and
# {glue:text}`controls.enrichr.MLP-neurons` of the model's MLP neurons. Under the rule `corpus` it is
# {glue:text}`controls.corpus.features`, {glue:text}`controls.corpus.uniform` and
# {glue:text}`controls.corpus.MLP-neurons`. {glue:text}`ahead.occurrence.learning`, if a token counts for the
# gene in which it was read (by the paper's gene rule: {glue:text}`ahead.token.shown`).

# %% [markdown] tags=["fold:The controls one by one"]
# - **uniform**: as many genes of the corpus, drawn at random. Under a correct rule at most about 5 %
#   of them are called interpretable for each library: this tests the rule, not the features.
# - **frequency-matched**: genes as common in the corpus as the feature's own. A feature that fires
#   anywhere at random lists the commonest genes of the tissue. Such a list holds
#   {glue:text}`controls.kept.frequency-matched` of the feature's own genes again (a uniform one
#   {glue:text}`controls.kept.uniform`); by so much the control is too strong.
# - **token-preserving**: random tokens matched to the feature's own in number, frequency and number of
#   containing genes; the list is built from them by the same rule. Pieces of gene names are gene families,
#   and gene families are terms.
# - **untrained encoder**: features that read random directions of the real model, with thresholds
#   such that they fire as often as the trained ones.
# - **re-initialised model**: features of transcoders trained the same way on a model whose weights
#   are random ({cite:t}`heap2025random` found such features about as interpretable as real ones).
# - **MLP neurons** and **principal components**: the model's own directions at the same places,
#   which fire as often. They may know all that the model knows; what a trained feature adds to them
#   is what dictionary learning adds.
#
# There are {glue:text}`controls.band_draws` draws for each null. All of this is done twice. Under the gene
# rule `token` a feature is given every gene whose name contains its tokens, as the paper's words say; under
# `occurrence` the gene in which it fired.
#
# Features of a layer share genes, so their share varies more than if each had genes of its own. To
# see by how much, the genes exchange their names, commoner ones with commoner ones, once for all
# lists of a layer together ({glue:text}`controls.draws` times).

# %% tags=["fold:Every control in numbers"]
for kind, share in layer_counts.own_genes_kept(statistics, corpus, settings).items():
    chapter.percent(f"controls.kept.{kind}", share)
chapter.values({"draws": settings.null_draws, "band_draws": study.band_draws,
                "enough": layer_counts.ENOUGH}, prefix="controls.")
chapter.table("table4_shares", shares, rows=0, caption="Share of lists called interpretable, of the "
              "features and of every control, by rule and layer")
chapter.table("table4_joint", joint.shares, rows=0, caption="The same share beside that of the same "
              "lists with genes relabelled")
chapter.table("table4_differences", joint.differences, rows=0, caption="Differences between the "
              "features' share and other kinds', beside those of relabelled genes")
together = studies.together(study.shares)
by_rule = together.percentages
chapter.show(studies.every_rule(study, settings), digits=3,
             caption="Mean over the layers of the percentage of lists called interpretable. "
             + " ".join(f"{rule}: {RULES[rule].statement}" for rule in by_rule))

# %%
for rule, column in by_rule.items():
    for kind, value in column.items():
        chapter.value(f"controls.{rule}.{kind.replace(' ', '-')}", float(value), f"{value:.0f} %")
    chapter.value(f"controls.highest.{rule}", together.highest[rule])
    chapter.rounded(f"controls.lead.{rule}", float(together.lead[rule]), 1)
chapter.rounded("table4.corpus_percentage", float(by_rule.loc["features", "corpus"]), 1)
chapter.value("controls.libraries", ", ".join(
    one.title + (" (bundled)" if one.source == "bundled" else "") for one in libraries))
for gene_rule in ("token", "occurrence"):
    for kind in ("re-initialised model", *joint_null.SAME_MODEL):
        chapter.value(f"ahead.{gene_rule}.{kind.replace(' ', '-')}", *joint.ahead(gene_rule, kind))
    share, text = joint.share(gene_rule)
    chapter.value(f"joint.{gene_rule}.features", share, text)
    shows = joint.learning_shows(gene_rule, settings.fdr)
    chapter.value(f"ahead.{gene_rule}.learning", shows, ("Dictionary learning adds" if shows else
                  "This run does not show that dictionary learning adds anything")
                  + " to directions that the model has anyway")
    chapter.value(f"ahead.{gene_rule}.shown", shows, "yes" if shows else "not shown either")

# %% [markdown]
# The rule `corpus`, with the features' lead in percentage points. p is how often relabelled genes score as
# much, or set the two as far from the lead that relabelling gives on average: whether kinds that know
# nothing of gene sets would differ so, not how surely two that do differ.
#
# | | genes by `token` | genes by `occurrence` |
# | --- | --- | --- |
# | features called, beside relabelled genes | {glue:text}`joint.token.features` | {glue:text}`joint.occurrence.features` |
# | ahead of a model with random weights | {glue:text}`ahead.token.re-initialised-model` | {glue:text}`ahead.occurrence.re-initialised-model` |
# | ahead of random directions of the same model | {glue:text}`ahead.token.untrained-encoder` | {glue:text}`ahead.occurrence.untrained-encoder` |
# | ahead of its MLP neurons | {glue:text}`ahead.token.MLP-neurons` | {glue:text}`ahead.occurrence.MLP-neurons` |
# | ahead of its principal components | {glue:text}`ahead.token.principal-components` | {glue:text}`ahead.occurrence.principal-components` |
#
# The second row asks what the *language model* has learnt. The last three ask what *dictionary
# learning* adds to directions that the same model has anyway. It shows if the features are ahead of all
# three, by more than relabelled genes are on average, each at p < {glue:text}`enrichment.level`.

# %%
machinery = studies.nominal_level(libraries, corpus, settings)

# %% [markdown] tags=["fold:Is the test itself right?"]
# Random lists of stated lengths, library by library. At a nominal level of
# {glue:text}`enrichment.fdr`, a correct rule calls about that share of them or fewer.

# %%
chapter.percent("enrichment.fdr", settings.fdr)
chapter.table("table4_machinery", machinery, digits=3,
              caption="Uniformly random lists of the corpus's genes called interpretable")

# %%
choices = studies.choices({"features": statistics, **others}, corpus, settings, libraries)

# %% [markdown] tags=["fold:How the choices move the number"]
# The same features, one choice changed at a time: longer and shorter lists, which genes a token
# counts for, what genes are ranked by, background and {term}`BH family`. The paper's sentence ("listing
# genes in descending order of activation frequency ... genes that specifically activate the feature") can
# be read as a count, the commonest genes first, or as {term}`E(f, t) <E(f)>` for a probability, like its
# E(f): then genes come first on which the feature fires at a higher *rate*.

# %%
chapter.values({"lowest": float(choices["percentage"].min()),
                "highest": float(choices["percentage"].max()),
                "n_terms": sum(len(one) for one in libraries)}, prefix="enrichment.")
chapter.table("table4_choices", choices, digits=3, caption="Share called interpretable under other "
              f"choices, in percent, beside what else was called under the same choice; the lists "
              f"are tested under the rule {settings.enrichment_rule} unless it says otherwise")

# %% [markdown]
# ## Which features beat all controls?
#
# Now feature by feature, under the rule `corpus` and the gene rule `occurrence`: a feature's p-value has to
# be smaller than those of its null lists and of features that learnt nothing, for every kind of them.

# %%
left = studies.demands(study.verdicts, len(table4), settings.fdr)

# %% mystnb={"image": {"alt": "Bars per layer: percentage of live features left as more is demanded, from a term under the paper's likely rule to beating all controls."}, "figure": {"caption": "What is left of the live features, layer by layer, as more is demanded of them (gene rule occurrence).", "name": "fig-beyond"}}
chapter.figure("table4_beyond", plots.beyond_controls(list(range(len(table4))), left,
                                                     settings.fdr))

# %%
p = study.verdicts["p_controls"]
beyond, nominal = int(study.verdicts["beyond_all_controls"].sum()), int((p < settings.fdr).sum())
chapter.values({"beyond": beyond, "beyond_percentage": 100 * beyond / total if total else None,
                "nominal": nominal, "nominal_percentage": 100 * nominal / total if total else None,
                "smallest_p": float(p.min()), "smallest_possible": study.smallest_possible_p},
               prefix="controls.")

# %%
found = studies.feature_tables(study, statistics, corpus, settings, libraries)

# %%
ahead = found.features[found.features["p_controls"] < settings.fdr]
commonest = ahead["Term"].value_counts()
chapter.value("controls.commonest_term", commonest.index[0] if len(ahead) else None)
chapter.value("controls.commonest_count", int(commonest.iloc[0]) if len(ahead) else None)

# %% [markdown]
# {glue:text}`controls.nominal` of {glue:text}`table4.total.live` features
# ({glue:text}`controls.nominal_percentage` %) are ahead of every control, uncorrected
# (p < {glue:text}`enrichment.level`, so luck gives up to {glue:text}`enrichment.fdr`); the best term of {glue:text}`controls.commonest_count` of them is
# "{glue:text}`controls.commonest_term`". {glue:text}`controls.beyond`
# ({glue:text}`controls.beyond_percentage` %) are beyond all controls after correction over the features.

# %% tags=["fold:Each control by itself"]
singles = tables.single_controls(study.verdicts, settings.fdr)
chapter.table("table4_single_controls", singles, digits=3, caption="Features ahead of each control by "
              f"itself, uncorrected (p < {settings.fdr:g})")

# %% [markdown]
# A feature's smallest p-value is compared with those of up to {glue:text}`controls.draws` null lists of each
# kind made for it, and with those of the features of its layer that learnt nothing; the share that does as
# well is its empirical p-value against that control. (Drawing stops once {glue:text}`controls.enough` null
# lists have done as well, which gives a valid p-value {cite:p}`besag1991sequential`.) The largest of them
# counts, since a feature has to beat every control, and these are corrected over all features
# (Benjamini-Hochberg).
#
# Among features no better than one of the controls the uncorrected share would be up to
# {glue:text}`enrichment.fdr`, and as a rule far less, because the controls are not equally strong. The
# smallest p against all controls is {glue:text}`controls.smallest_p`; with these numbers
# of null lists and of features that learnt nothing it could have been
# {glue:text}`controls.smallest_possible`.

# %% tags=["only-if:planted.tested", "fold:Would a good feature pass?"]
planted = studies.planted_passing(statistics, baselines, corpus, settings, libraries,
                                  study.verdicts)

# %% [markdown] tags=["only-if:planted.tested"]
# A control is useful only if a truly good feature can beat it. We therefore construct
# {term}`features known to be good <planted feature>`: each fires on every token of the genes of one term,
# drawn at random from the libraries, and nowhere else; diluted ones fire on other genes as well. They go
# through the same lists, tests and controls (those of layer {glue:text}`planted.layer`), under both gene
# rules.

# %% tags=["only-if:planted.tested"]
chapter.table("planted_features", planted.table, digits=3, caption="Planted features against the "
              f"same controls, uncorrected (p < {settings.fdr:g} against every control)")

# %%
chapter.values({"tested": planted.tested, "layer": settings.human_layer,
                "genes": planted.median_genes}, prefix="planted.")
told = {rule: f"{ahead} of {planted.planted[rule]}" for rule, ahead in planted.ahead.items()}
for gene_rule in ("token", "occurrence"):
    chapter.value(f"planted.{gene_rule}", planted.ahead.get(gene_rule), told.get(gene_rule, "none"))
needed = ("no number of further features as good as the median pure planted one would be enough"
          if planted.needed is None else f"at least {planted.needed:,} further features as good as the "
          "median pure planted one would be needed")
chapter.value("planted.needed", planted.needed, needed)
chapter.value("planted.limit", planted.tested and not beyond,
              f", for which {needed}." if planted.tested and not beyond else ".")

# %% [markdown] tags=["only-if:planted.tested"]
# Pure planted features (a median of {glue:text}`planted.genes` genes each) that are ahead of all
# controls: {glue:text}`planted.token` under the gene rule `token`, {glue:text}`planted.occurrence`
# under `occurrence`, where a token counts for the gene in which it was read. The paper's words describe
# `token`, under which a feature that fires on the CD of one gene is given all genes with CD in their
# names: what it knew about the gene is lost before the test begins. The features are therefore tested
# under `occurrence`.
#
# Against these controls {glue:text}`planted.needed` for any to survive the correction. So read
# the uncorrected share.

# %% [markdown] tags=["fold:Feature by feature: every live feature and its best term"]
# Every live feature, furthest ahead of the controls first: search for a gene, a token or a term, or
# choose a layer. Genes, terms and FDR columns (the smallest BH-adjusted p under that rule) are those
# of the gene rule `occurrence`; "interpretable (Table 4)" is the verdict of Table 4 above. The file has
# all columns; `feature_terms.csv` has the three best terms of each library for every feature. A
# feature's number leads to everything known about it, in {doc}`features`.

# %%
chapter.table("feature_terms", found.terms, rows=0, caption="The three best terms of each library for "
              "every live feature")
chapter.browse("features", found.page(), caption="Live features and their best terms", digits=3,
               links={"feature": "features.html#L{layer}.F{feature}"})

# %% [markdown] tags=["only-if:prerank.tested"]
# ## What GSEA itself would say
#
# Gene set enrichment analysis proper takes no list but a ranking of all genes, and asks whether a
# term's genes gather at its top. gseapy's `prerank` {cite:p}`fang2023gseapy` was run on
# {glue:text}`prerank.n` features of the human evaluation ({doc}`05_human_evaluation`):
# {glue:text}`prerank.called` have a term below the FDR, and {glue:text}`prerank.shuffled` with the genes'
# names shuffled. This is another test than Table 4's and cannot be compared with it: it has
# fewer terms (those with 15 to 500 genes in the corpus) and another null (shuffled names, against which
# frequent genes and token families count as findings as well).

# %% tags=["only-if:prerank.tested"]
ranked = prerank.prerank_study(statistics, corpus, settings, libraries)

# %% tags=["only-if:prerank.tested", "fold:Every ranking"]
chapter.table("prerank", ranked.terms, rows=0, caption="Every term of every ranking")
chapter.values({"tested": len(ranked.terms) > 0, "n": ranked.n, "called": ranked.called, "shuffled": ranked.shuffled},
               prefix="prerank.")
chapter.show(ranked.best, caption=f"prerank for features of layer {settings.human_layer}, and for "
             "shuffled names")

# %% [markdown] tags=["only-if:prerank.tested"]
# Genes are ranked by the feature's activations and tested by order alone: with prerank's default weights
# the few genes with large counts would decide every score. Beside each is the same ranking with the genes'
# names shuffled.
