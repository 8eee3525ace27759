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
#     after: []
#     produces: [corpus/corpus.json, tables/cell_types.csv, tables/cell_type_answers.csv,
#       tables/cell_type_accuracy.csv, tables/cell_type_confusion.csv]
#     exhibits: "Figure 1, data split"
#     modules: [cells/reading, cells/corpus, models/mlp_sites, models/known_types]
# ---

# %% [markdown]
# # Cells, sentences and the model
#
# ```{admonition} In short
# :class: in-short
# - **Question.** What does the model read of a cell, and does it know the cell's type?
# - **The paper says.** A cell is a sentence: the names of the genes it expresses, most expressed
#   first {cite:p}`levine2024cell2sentence`. A question follows, and the model completes it with the cell's
#   type (the left half of the paper's Figure 1). The model is used as it is.
# - **We find.** This run's model has {glue:text}`model.layers` layers of width {glue:text}`model.width`. It
#   names {glue:text}`model.accuracy_percent` % of {glue:text}`model.asked` {term}`held-out cells
#   <held-out cell>` correctly ({glue:text}`model.mean_over_types` % as a mean over
#   types with enough of these cells).
# - **What it is worth.** Always naming the commonest type would be right for
#   {glue:text}`model.majority_percent` %. A logistic regression on the same {glue:text}`cells.k` ranks, with
#   no layers at all, is right for {glue:text}`model.regression_percent` %.
# ```

# %% tags=["parameters"]
profile = "demo"
overrides: dict = {}

# %%
import numpy as np
import pandas as pd

from scfm_circuits.cells.packaged import caveats
from scfm_circuits.cells.tokens import written
from scfm_circuits.common.encodings import RANK_VALUE
from scfm_circuits.common.profile import PACKAGED_CELLS
from scfm_circuits.models.known_types import COMMONEST, ENOUGH, MODEL, RANKS, REDRAWN, REGRESSION
from scfm_circuits.report.chapter import open_chapter
from scfm_circuits.report.plots import cells_and_training as plots

chapter = open_chapter("01_cells_and_model", profile, overrides)
corpus = chapter.corpus
chapter.not_comparable()

# %%
chapter.only_guesses()

# %% [markdown]
# ## Cells
#
# The paper uses Heart Cell Atlas v2 {cite:p}`kanemaru2023spatially` and holds out 10 % of it. This run
# uses {glue:text}`cells.described`; {glue:text}`cells.held_out` of them are held out. The split is by
# cell, so that nothing of a held-out cell is ever trained on.

# %% tags=["fold:Cells of each type as a table"]
chapter.values({"cells.name": chapter.profile.cells_name, "cells.total": len(corpus),
                "cells.held_out": len(chapter.held_out),
                "split.train_share": np.mean(~corpus.held_out)})
name, counted = chapter.profile.cells_name, f"{len(corpus):,} cells"
chapter.value("cells.described", len(corpus),
              name if counted in name else f"{counted} ({name})")
types = pd.DataFrame({"cell type": corpus.labels, "held out": corpus.held_out})
types = types.groupby("cell type")["held out"].agg(cells="size", held_out="sum").reset_index()
chapter.table("cell_types", types.sort_values("cells", ascending=False, ignore_index=True),
              caption="Cells of each type")

# %% mystnb={"image": {"alt": "Bars of the number of cells of each type, training and held-out cells stacked."}, "figure": {"caption": "Cells of each type, and how many of them are held out.", "name": "fig-cells"}} tags=["unfold"]
chapter.figure("cells_per_type", plots.cells_per_type(corpus.labels, corpus.held_out))

# %%
chapter.warning(caveats(corpus) if chapter.profile.cells == PACKAGED_CELLS else None)

# %% [markdown] tags=["fold:How labels were read"]
# Labels are read on one line: single spaces, none at the ends, no unseen characters, and letters in
# Unicode's composed form (NFC). Where that changed a label or made two of them one, it is said here.

# %%
chapter.show(pd.DataFrame({"what was decided while reading the cells": corpus.decisions}))

# %% [markdown]
# ## Sentences

# %% [markdown] tags=["only-if:cells.by_state"]
# Each cell becomes {glue:text}`cells.k` genes at most, each a token, in the encoding
# {glue:text}`cells.encoding`: {glue:text}`cells.encoded` Nothing is asked in words, so the paper's prompt
# does not apply here. Here is one held-out cell.

# %% [markdown] tags=["only-if:cells.in_words"]
# Each cell becomes a {term}`cell sentence`, the names of its {glue:text}`cells.k` most expressed genes. Genes of equal
# expression come in random order, and genes that are not expressed are left out. The paper's case study
# has 64 genes; it does not say how long the sentences were on which its transcoders were trained. Here
# is one held-out cell, with the answer the model should give.

# %%
in_words, encoding = chapter.profile.in_words, chapter.profile.encoding
chapter.values({"in_words": in_words, "by_state": not in_words, "encoding": encoding,
                "encoded": "" if in_words else
                "counts divided by the gene's median, the largest quotient first, so that genes that "
                "are high in every cell do not come first." if encoding in RANK_VALUE else
                "each with the level of its expression.",
                "others": "the words of the question and the answer belong" if in_words else
                "special tokens belong"}, prefix="cells.")
cell = int(np.flatnonzero(corpus.held_out & (corpus.labels == chapter.profile.case_type))[0])
n_genes = (corpus.place == 0).sum(axis=1)
chapter.values({"k": chapter.profile.genes_per_cell, "n_genes_in_prompt": n_genes[cell]},
               prefix="cells.")
print(written(chapter.profile, corpus.genes_of(cell), corpus.labels[cell]) if in_words
      else " ".join(corpus.pieces(cell)))

# %% [markdown]
# {glue:text}`cells.pieces` Every token remembers the gene it came from and its
# place in it; {glue:text}`cells.others` to no gene. Tokens of a gene, on average:
# {glue:text}`cells.tokens_per_gene` in this corpus, 3.30 in the paper's sentence (with Pythia's tokenizer).

# %% [markdown] tags=["fold:The paper's prompt and the tokens of that cell"]
# The paper prints its prompt (Figure 4): the sentence, a full stop, a blank line and "The corresponding
# cell type is:". None of the 15 templates of the model's own package, cell2sentence
# {cite:p}`levine2024cell2sentence`, is that. Each begins with an instruction that names the number of
# genes and the species, and gives the sentence after it. So either the figure is abbreviated, or the
# model was asked in a way that it was not trained on; the paper does not say which. `prompt` in a
# profile takes either, and `paper` has both ({doc}`your_cells`).

# %%
chapter.values({"tokens_per_gene": (corpus.gene >= 0).sum() / n_genes.sum(),
                "tokens": corpus.mask.sum()}, prefix="cells.")
chapter.value("cells.pieces", corpus.has_sub_words,
              "The tokenizer cuts gene names into pieces." if corpus.has_sub_words else
              "Every gene is one token; a tokenizer cuts the other words into pieces."
              if in_words else "Every gene is one token.")
first = slice(0, 14)
chapter.show(pd.DataFrame({
    "token": corpus.pieces(cell)[first],
    "gene": [corpus.symbols[g] if g >= 0 else "" for g in corpus.gene[cell][first]],
    "place in the gene": corpus.place[cell][first],
}), caption="The first tokens of that cell (a leading space is shown as _)")

# %% [markdown]
# ## The model
#
# The paper's model, C2S-Pythia-410m, is a GPT-NeoX with 24 layers of width 1,024. Its layers run
# attention and MLP side by side: an MLP sees what earlier layers wrote, and not the attention of its own
# layer. A profile that names a Hugging Face model loads it; the small profiles train one of the same
# kind on the training cells; where genes are tokens, one of the shape of MaxToki (a Llama) or of
# Geneformer (a BERT), whose MLPs see the attention of their own layer, too. This run's model has
# {glue:text}`model.layers` layers of width
# {glue:text}`model.width`.

# %%
model, curve = chapter.model, chapter.model_curve
chapter.values({"layers": model.config.num_hidden_layers, "width": model.config.hidden_size,
                "parameters": model.num_parameters()}, prefix="model.")

# %% tags=["fold:How the model was trained"]
trained = chapter.profile
chapter.show(pd.DataFrame([
    ("steps", f"{trained.model_steps:,}, of {trained.model_batch_cells} cells each"),
    *([("weight of the answer's tokens in the loss",
        f"{trained.model_answer_weight:g}; others 1")] if in_words else []),
    ("how often a type of n cells is drawn",
     "as n" if not trained.model_type_balance else
     "as any other" if trained.model_type_balance == 1 else
     f"as n to the power of {1 - trained.model_type_balance:g}"),
    ("sentence of a cell", "always the one that its values give" if trained.model_thinning == 1
     else "a fresh one each time, from counts thinned to between "
     f"{100 * trained.model_thinning:.0f} and 100 %; values that are no counts are not thinned"),
], columns=["setting", "this run"]), caption="How the model was trained") if curve.step else None

# %% mystnb={"image": {"alt": "Line of the language model's training loss falling with steps; empty if the model was loaded."}, "figure": {"caption": "Training loss of the small language model (a model that was loaded has no curve).", "name": "fig-lm"}}
chapter.figure("language_model_training", plots.training_curve(curve.step, curve.loss))

# %% [markdown]
# ### What does it know about the cells?

# %% [markdown] tags=["only-if:cells.by_state"]
# Nothing is asked in words. A cell's embedding is the mean, over the tokens of its genes, of what the
# model's body gives, as Geneformer's users embed cells; and the model names the type whose
# training cells' mean embedding is nearest. {glue:text}`model.asked` held-out cells are named so. Beside
# it stand always the training cells' commonest type; a logistic regression that sees the place of each
# gene in the same {glue:text}`cells.k` ranks; the nearest type by these ranks alone, without a model; and
# the same model with its weights drawn anew. What the last two name, no training of the model explains.

# %% [markdown] tags=["only-if:cells.in_words"]
# The model answers the prompts of {glue:text}`model.asked` held-out cells in its own words, always with
# the likeliest token. An answer is correct only if it matches the cell's label exactly (a model trained
# with a different label vocabulary would score zero). Two other answers stand beside it: always the
# commonest type of the training cells, which needs no look at a cell; and that of a logistic regression
# on the same training cells, which sees the place of each gene in the same {glue:text}`cells.k` ranks.

# %%
known = chapter.known_types
by_type, accuracy = pd.DataFrame(known.by_type), pd.DataFrame(known.accuracy)
chapter.table("cell_type_accuracy", accuracy, digits=3, columns={
    one: one for one in accuracy if one not in ("cells", "right")}, caption="Held-out cells answered correctly "
              "(percentage with a 95 % interval; mean over types with "
              f"{ENOUGH} or more of these cells)")

# %%
accuracy = accuracy.set_index("answers")
chapter.values({"asked": int(accuracy["cells"][MODEL]),
                "accuracy": float(accuracy["percentage"][MODEL]) / 100,
                "majority": float(accuracy["percentage"][COMMONEST]) / 100,
                "knows_the_types": known.knows}, prefix="model.")
for key, row in (("accuracy", MODEL), ("majority", COMMONEST), ("regression", REGRESSION)):
    chapter.rounded(f"model.{key}_percent", accuracy["percentage"][row])
chapter.rounded("model.mean_over_types", accuracy["mean_over_types"][MODEL])
for key, row in (("balanced", MODEL), ("balanced_ranks", RANKS), ("balanced_redrawn", REDRAWN)):
    said = "{mean_low:.0f} to {mean_high:.0f}" if row == MODEL else (
        "{mean_over_types:.0f} % ({mean_low:.0f} to {mean_high:.0f})")
    chapter.value(f"model.{key}", "" if in_words else said.format(**accuracy.loc[row]))
chapter.rounded("model.balanced_chance", accuracy["mean_over_types"][COMMONEST])
for key, row in (("majority", COMMONEST), ("regression", REGRESSION)):
    chapter.values({"model": int(accuracy["only_model"][row]),
                    "other": int(accuracy["only_this"][row])}, prefix=f"model.only.{key}.")
    chapter.p_value(f"model.p.{key}", float(accuracy["p"][row]))

# %% [markdown]
# Is the model better than the two others? Only cells count about which just one of a pair is right.
# Beside the commonest type that is the model for {glue:text}`model.only.majority.model` cells and the
# commonest type for {glue:text}`model.only.majority.other` (exact one-sided McNemar test, p =
# {glue:text}`model.p.majority`). Beside the regression it is the model for
# {glue:text}`model.only.regression.model` and the regression for
# {glue:text}`model.only.regression.other` (p = {glue:text}`model.p.regression`).

# %% [markdown] tags=["only-if:cells.by_state"]
# As a mean over types the model is right for {glue:text}`model.mean_over_types` %
# (95 % interval {glue:text}`model.balanced`). By ranks alone it would be {glue:text}`model.balanced_ranks`, with weights
# drawn anew {glue:text}`model.balanced_redrawn`, and by chance {glue:text}`model.balanced_chance` %.

# %% tags=["fold:Answers by type as a table"]
chapter.table("cell_type_answers", by_type, digits=3, caption="Answers for held-out cells, by true "
              "type")

# %% mystnb={"image": {"alt": "Heat map of true types against the model's answers for held-out cells, each row coloured by its shares, with the numbers of cells."}, "figure": {"caption": "What the model answers (columns, numbered as the rows) for held-out cells of each type (rows, with their number of cells). Colour: share of the row. On the diagonal the answer is right.", "name": "fig-confusion"}} tags=["unfold"]
confusion = pd.DataFrame(known.confusion).set_index("cell type")
chapter.figure("cell_type_confusion", plots.confusion_matrix(confusion))

# %%
chapter.table("cell_type_confusion", confusion.reset_index(), rows=0,
              caption="Number of cells of each type with each answer")
