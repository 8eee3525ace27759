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
#     produces: [tables/table4.csv, tables/feature_terms.csv]
#     exhibits: "Table 4"
#     modules: [features, enrichment]
# ---

# %% [markdown]
# # Which features are called biologically interpretable
#
# The paper lists each feature's genes, most active first, and calls the feature biologically
# interpretable if one GO or KEGG term is enriched among them at FDR below 0.05. It says "GSEA"; what
# its words and numbers describe is over-representation analysis (ORA), a test of the overlap between
# two lists, as the Enrichr service computes it {cite:p}`kuleshov2016enrichr`. This book says ORA.

# %% tags=["parameters"]
profile = "demo"

# %%
import numpy as np
import pandas as pd

from scfm_circuits import figures
from scfm_circuits.enrichment import RULES, load_library, over_representation, prepare_background
from scfm_circuits.features import gene_lists, get_statistics, ranked_genes, select_genes
from scfm_circuits.language_model import get_model
from scfm_circuits.profile import ROOT, from_notebook
from scfm_circuits.report import Report
from scfm_circuits.sentences import load_corpus
from scfm_circuits.training import get_transcoders

run = from_notebook(globals())
report = Report(run, "06_enrichment")
corpus = load_corpus(run)
model, _ = get_model(run, corpus)
transcoders, _ = get_transcoders(model, corpus, run)
statistics = get_statistics(model, transcoders, corpus, run)
report.not_comparable(run)

# %% [markdown]
# ## Gene sets

# %%
loaded = [load_library(name, run.gene_sets) for name in run.libraries]
# Without the real libraries one bundled library stands in for all of them.
libraries = list({library.content_sha256: library for library in loaded}.values())

# %% tags=["hide-input"]
report.table("gene_set_libraries", pd.DataFrame([{
    "library": one.name, "terms": len(one.terms), "genes": len(one.genes), "from": one.source,
    "sha256": one.sha256[:12],
} for one in libraries]), caption="Libraries used on this page")

# %% tags=["remove-input"]
report.warning(*(one.warning for one in loaded))

# %% [markdown]
# ## The lists and the test
#
# Two choices decide this table, and the paper states neither. **Which genes make the list:** under
# the gene rule {glue:text}`enrichment.gene_rule` and the list rule {glue:text}`enrichment.list_rule`
# of this run, lists have a median of {glue:text}`enrichment.median_length` genes. **What they are
# tested against:** {glue:text}`enrichment.statement`
#
# Next to it stands the rule that a statistician would ask for, with the corpus's own genes as
# background and every term in the correction. {doc}`08_controls` asks what random lists score.

# %%
symbols = set(corpus.symbols[np.unique(corpus.gene[corpus.gene >= 0])].tolist())
rules = dict.fromkeys([run.enrichment_rule, "enrichr", "corpus"])
live = statistics.live(run.live_cut_table4)
rows, terms, lengths = [], [], []
for layer in range(transcoders.n_layers):
    features = np.flatnonzero(live[layer])
    lists = gene_lists(statistics, layer, features, corpus, run)
    lengths += [len(genes) for genes in lists]
    found = {}
    for rule in rules:
        results = [over_representation(
            lists, library, background=RULES[rule].background_for(symbols),
            family=RULES[rule].family, alpha=run.fdr) for library in libraries]
        found[rule] = np.any([result.n_significant > 0 for result in results], axis=0)
        if rule == run.enrichment_rule:
            best = np.argmin([result.min_p for result in results], axis=0)
            for row, feature in enumerate(features):
                result, library = results[best[row]], libraries[best[row]]
                term = result.best_term[row]
                terms.append({
                    "rule": rule,
                    "layer": layer, "feature": feature,
                    "log10_E_f": statistics.log10_frequency[layer, feature],
                    "interpretable": bool(found[rule][row]), "n_genes": len(lists[row]),
                    "library": library.name,
                    "best_term": library.terms[term] if term >= 0 else "",
                    "p": result.min_p[row], "q": result.min_q[row],
                    "genes": " ".join(lists[row][:10]),
                })
    rows.append({"layer": layer, "live": len(features), **{
        f"interpretable_{rule}": int(found[rule].sum()) for rule in rules}})

# %% tags=["remove-input"]
report.value("enrichment.gene_rule", run.gene_rule)
report.value("enrichment.list_rule", run.list_rule if run.list_rule != "top"
             else f"top {run.list_size}")
report.value("enrichment.median_length", float(np.median(lengths)), f"{np.median(lengths):.0f}")
report.value("enrichment.statement", RULES[run.enrichment_rule].statement)

# %% [markdown]
# ## Table 4

# %% tags=["hide-input"]
table4 = pd.DataFrame(rows)
share = {rule: (100 * table4[f"interpretable_{rule}"] / table4["live"].replace(0, np.nan))
         for rule in rules}
table4 = pd.DataFrame({
    "rule": run.enrichment_rule, "layer": table4["layer"], "live": table4["live"],
    "interpretable": table4[f"interpretable_{run.enrichment_rule}"],
    "percentage": share[run.enrichment_rule],
    **{f"percentage_{rule}": values for rule, values in share.items()},
})
report.table("table4", table4, caption="Table 4 of this run, and the percentage under each rule. "
             + " ".join(f"{rule}: {RULES[rule].statement}" for rule in rules))

# %% mystnb={"image": {"alt": "Lines of the percentage of live features called interpretable per layer under each rule, with the paper's percentages at the same relative depth."}, "figure": {"caption": "Share of live features called interpretable, per layer. The paper's line is another model, other cells and other libraries; it is there for the shape.", "name": "fig-table4"}} tags=["hide-input"]
paper = pd.read_csv(ROOT / "data" / "paper" / "table4.csv")
report.figure("table4", figures.interpretable_per_layer(
    {f"rule {rule}": values.to_numpy() for rule, values in share.items()},
    paper["percentage"].to_numpy()))

# %% tags=["remove-input"]
percentage = table4["percentage"]
for row in table4.itertuples():
    report.values({"live": row.live, "interpretable": row.interpretable,
                   "percentage": row.percentage}, prefix=f"table4.layer_{row.layer}.")
total, called = int(table4["live"].sum()), int(table4["interpretable"].sum())
report.values({"live": total, "interpretable": called,
               "percentage": 100 * called / total if total else None}, prefix="table4.total.")
report.value("table4.share_of_layers_over_80", float((percentage > 80).mean()))
report.value("table4.layer0_dip", float(percentage[0] - percentage[1:].mean()))
called_corpus = (share["corpus"] * table4["live"]).sum()
corpus_share = float(called_corpus / total) if total else np.nan
report.value("table4.corpus_percentage", corpus_share, f"{corpus_share:.1f}")

# %% [markdown]
# Of {glue:text}`table4.total.live` live features {glue:text}`table4.total.percentage` % are called
# interpretable under this run's rule, and {glue:text}`table4.corpus_percentage` % with the corpus as
# background and every term in the correction.
#
# ### How the choices move the number
#
# The same features, with longer and shorter lists, and with background and BH family exchanged one
# at a time.

# %%
variants = {"top 10": ("top", 10), "top 30": ("top", 30), "top 100": ("top", 100),
            "half of the activations": ("share", 0), "all activating genes": ("all", 0)}
rule = RULES[run.enrichment_rule]
backgrounds = [prepare_background(one, rule.background_for(symbols)) for one in libraries]
moved = []
for layer in range(transcoders.n_layers):
    features = np.flatnonzero(live[layer])
    ranked = ranked_genes(statistics, layer, features, len(corpus.symbols), run.gene_rule)
    for label, (list_rule, size) in variants.items():
        lists = [corpus.symbols[select_genes(genes, scores, list_rule, size, 0.5)].tolist()
                 for genes, scores in ranked]
        hit = np.any([over_representation(lists, one, background=background, family=rule.family,
                                          alpha=run.fdr).n_significant > 0
                      for one, background in zip(libraries, backgrounds, strict=True)], axis=0)
        moved.append({"choice": f"list: {label}", "live": len(features), "hits": int(hit.sum())})
    lists = gene_lists(statistics, layer, features, corpus, run)
    for number in (20_000, "corpus genes"):
        for family in ("hit", "all"):
            hit = np.any([over_representation(
                lists, one, background=symbols if number == "corpus genes" else number,
                family=family, alpha=run.fdr).n_significant > 0 for one in libraries], axis=0)
            moved.append({"choice": f"background {number}, BH over {family} terms",
                          "live": len(features), "hits": int(hit.sum())})

# %% tags=["hide-input"]
moved = pd.DataFrame(moved).groupby("choice", sort=False)[["live", "hits"]].sum().reset_index()
moved["percentage"] = 100 * moved["hits"] / moved["live"]
report.value("enrichment.lowest", float(moved["percentage"].min()))
report.value("enrichment.highest", float(moved["percentage"].max()))
report.value("enrichment.n_terms", sum(len(one) for one in libraries))
report.table("table4_choices", moved, caption="Share called interpretable under other choices; the "
             f"lists are tested under the rule {run.enrichment_rule}")

# %% [markdown]
# ## Feature by feature

# %% tags=["hide-input"]
feature_terms = pd.DataFrame(terms).sort_values(["p", "layer", "feature"], ignore_index=True)
report.table("feature_terms", feature_terms, rows=15,
             caption="The features with the smallest p-values, their best terms and first genes")

# %% [markdown]
# ## The paper's table

# %% tags=["hide-input"]
report.show(paper[["layer", "total", "interpretable", "percentage"]],
            caption="The paper's Table 4, as printed")

# %% [markdown]
# ```{admonition} Key points
# - What the paper calls GSEA is over-representation analysis: at least one of
#   {glue:text}`enrichment.n_terms` terms below the FDR.
# - Between the choices tried above, the same features come out anywhere from
#   {glue:text}`enrichment.lowest` to {glue:text}`enrichment.highest` %; the paper states none of
#   them.
# - Whether a percentage is high can only be said beside that of random lists: {doc}`08_controls`.
# ```
