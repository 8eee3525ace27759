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
#     after: [01_cells_and_model, 02_training, 03_validation, 04_sparsity, 05_human_evaluation, 06_enrichment, 07_endothelial_case_study, 08_controls, 09_variants, 10_sub_words, 11_features]
#     produces: [claims.csv, tables/every_claim.csv, tables/every_claim.js]
#     libraries: [libraries, case_library]
#     exhibits: "every exhibit"
#     modules: [paper/claims]
# ---

# %% [markdown]
# # The paper's claims, one by one
#
# Every number and every checkable sentence of the paper, with ours beside it. They do not all weigh
# the same, so they are counted by what they stand on: **tested** on the model of this run;
# **recomputed** from what the paper prints, which needs no model; a **transcription**, which says that
# something is printed; or a **setting** of the run. Only those of the first kind
# say anything about the model.

# %% tags=["parameters"]
profile = "demo"
overrides: dict = {}

# %%
import pandas as pd

from scfm_circuits.paper.claims import JUDGED, counts, write_claims
from scfm_circuits.report.chapter import open_chapter
from scfm_circuits.report.plots.enrichment import table4_with_nulls
from scfm_circuits.report.report import short_number
from scfm_circuits.report.tables import Grouped

chapter = open_chapter("12_claims", profile, overrides)
claims = pd.read_csv(write_claims(chapter.profile, chapter.profile.results), dtype=str,
                     keep_default_na=False)
for column in ("ours", "difference"):
    claims[column] = [short_number(text) for text in claims[column]]

# %% tags=["remove-input"]
chapter.library_warnings(*chapter.profile.libraries, chapter.profile.case_library)

# %% tags=["remove-input"]
by_standing = counts(claims)
tested = by_standing["tested"]
chapter.values({"tested": int(tested.sum()), "judged": int(tested.reindex(JUDGED).sum()),
                **{verdict: int(tested.get(verdict, 0)) for verdict in JUDGED}}, prefix="ledger.")

# %% [markdown]
# Of {glue:text}`ledger.tested` claims that a model can be tested on, this run judges
# {glue:text}`ledger.judged`: {glue:text}`ledger.match`
# <a href="#standing=tested&amp;verdict=match">match</a>, {glue:text}`ledger.within` are
# <a href="#standing=tested&amp;verdict=within">within</a> the tolerance, {glue:text}`ledger.off` are
# <a href="#standing=tested&amp;verdict=off">off</a>, and {glue:text}`ledger.undecided` are
# <a href="#standing=tested&amp;verdict=undecided">undecided</a>. Where a model has to be of the
# paper's size, ours is shown without a verdict.
#
# ```{dropdown} What the verdicts mean
# *match*: equal at the precision the paper prints, or the statement holds. *within*: inside the
# tolerance that the rule names. *off*: outside. *undecided*: a bound that lies inside our interval, or
# that has none. *not a test*: a setting or a transcription agrees, as it must. *not judged*: found
# with other gene sets than the paper names. *not comparable at this scale*: this profile cannot judge
# the claim; ours is shown all the same where there is one. *not measured*: this run has no number for
# it. What is recomputed from the paper's print speaks for the print and not for the model. A setting
# that differs is *off*; one that agrees is no finding.
# ```

# %% tags=["hide-input"]
chapter.show(by_standing.reset_index(), caption="Verdicts of this run, by what a claim stands on")

# %% [markdown]
# ## Table 4 as one picture

# %% mystnb={"image": {"alt": "Percentage of gene lists called interpretable against layer: the features of this run, the paper's, a band for lists of random genes and tokens, and a band for features that learnt nothing."}, "figure": {"caption": "Table 4 by the paper's likely rule. Bands go from the lowest to the highest of their kind, with 95 % intervals. Orange: an encoder without training, a model with random weights, single neurons, principal components. Grey: lists of random genes and tokens.", "name": "fig-claims-table4"}} tags=["hide-input"]
shares = pd.read_csv(chapter.profile.results / "tables" / "table4_shares.csv")
printed = None if chapter.stand_in() else chapter.paper.table4["percentage"].to_numpy()
chapter.figure("claims_table4", table4_with_nulls(shares, chapter.profile, printed))

# %% [markdown]
# ## Every claim
#
# By exhibit: choose what a claim stands on or its verdict, or search; the page's address keeps the
# choice. **+** opens what a claim is compared with. *Beside* is what ours has to be read against: what
# features score that learnt nothing, or what luck would give. The rows of Table 4's single layers are
# in the picture above and in `claims.csv`.

# %% tags=["hide-input"]
single = claims["id"].str.match(r"table4-layer-\d+-")
everything = claims[~single].sort_values("exhibit", kind="stable")
folded = ["standing", "unit", "beside", "interval", "difference", "rule", "note"]
chapter.browse("every_claim", everything[["exhibit", "claim", "paper", "ours", "verdict", *folded]],
               caption="All claims", rows=30,
               grouped=Grouped("exhibit", folded, ["exhibit", "standing", "verdict"]))

# %% [markdown]
# ```{dropdown} What the paper names as future work, and what this book has of it
# | the paper | this book |
# | --- | --- |
# | structure of circuits: "inter-node relationships, information flow patterns" | flow by layer, heads, supernodes, overlap between cells, negative edges ({doc}`08_controls`); none of it is translated into biology |
# | "domain-specific tokenizers" | a token for each gene, on small models of three seeds ({doc}`10_sub_words`) |
# | other tasks, "like perturbation response prediction" | genes deleted and moved to the front, against a response that is known: chapter 14 of the book of the profile `interferon` |
# | "other scFMs" | GPT-NeoX, Llama, Mistral, Qwen2, Gemma 2, Geneformer (BERT) and MaxToki can be loaded, and all chapters work on them ({doc}`your_cells`); small ones of MaxToki's and Geneformer's shape are trained and traced on the demo's cells, in the page *Other foundation models* |
# | "model improvement and debugging" | features are taken out and doubled ({doc}`08_controls`); calls are steered and a wrong call is taken apart: chapter 15 of the book of the profile `interferon` |
# | "the design of more interpretable architectures" | nothing |
# | frameworks of scFeatureLens and of Claye et al. for single features | nothing |
# ```
