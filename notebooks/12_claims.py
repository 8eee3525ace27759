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
# something is printed; or a **setting** of the run. Only the first say anything about the model.
#
# *match*: equal at the precision the paper prints, or the statement holds. *within*: inside the
# tolerance that the rule names. *off*: outside. *undecided*: a bound that lies inside our interval, or
# that has none. *not a test*: a setting or a transcription agrees, as it must. *not judged*: found with
# other gene sets than the paper names. *not comparable at this scale*: this profile cannot judge the
# claim; ours is shown all the same where there is one. *not measured*: this run has no number for it.

# %% tags=["parameters"]
profile = "demo"
overrides: dict = {}

# %%
import pandas as pd

from scfm_circuits.paper.claims import JUDGED, STANDINGS, counts, write_claims
from scfm_circuits.report.chapter import open_chapter
from scfm_circuits.report.report import short_number

chapter = open_chapter("12_claims", profile, overrides)
path = write_claims(chapter.profile, chapter.profile.results)
claims = pd.read_csv(path, dtype=str, keep_default_na=False)
for column in ("ours", "difference"):
    claims[column] = [short_number(text) for text in claims[column]]
claims["claim"] += [f" ({note})" if note else "" for note in claims["note"]]
chapter.not_comparable()

# %% tags=["remove-input"]
chapter.library_warnings(*chapter.profile.libraries, chapter.profile.case_library)

# %% tags=["hide-input"]
by_standing = counts(claims)
chapter.show(by_standing.rename(columns=STANDINGS).reset_index(), caption="Verdicts of this run")

# %% tags=["remove-input"]
tested = by_standing["tested"]
chapter.values({"tested": int(tested.sum()), "judged": int(tested.reindex(JUDGED).sum()),
                **{verdict: int(tested.get(verdict, 0)) for verdict in JUDGED}}, prefix="ledger.")

# %% [markdown]
# Of {glue:text}`ledger.tested` claims that a model can be tested on, this run judges
# {glue:text}`ledger.judged`: {glue:text}`ledger.match` match, {glue:text}`ledger.within` are within the
# tolerance, {glue:text}`ledger.off` are off, and {glue:text}`ledger.undecided` cannot be decided.
#
# ## Tested on this run's model
#
# *Beside* is what ours has to be read against: what features score that learnt nothing, or what luck
# would give.

# %% tags=["hide-input"]
columns = ["exhibit", "verdict", "claim", "paper", "ours", "interval", "beside", "difference",
           "unit", "rule"]
own = claims[claims["standing"] == "tested"]
judged = own["verdict"].isin(JUDGED)
chapter.show(own.loc[judged, columns], caption="Claims that this profile can judge")

# %% [markdown]
# ## Every claim
#
# By what it stands on, then by exhibit: choose a verdict, an exhibit or a standing, or search. What is
# recomputed from the paper's print speaks for the print and not for the model. A setting that differs
# is *off*; one that agrees is no finding.

# %% tags=["hide-input"]
place = {standing: i for i, standing in enumerate(STANDINGS)}
everything = claims.sort_values(["standing", "exhibit"], kind="stable", key=lambda column: (
    column.map(place) if column.name == "standing" else column))
chapter.browse("every_claim", everything[["standing", *columns]], caption="All claims")

# %% [markdown]
# ## What the paper names as future work, and what this book has of it
#
# | the paper | this book |
# | --- | --- |
# | structure of circuits: "inter-node relationships, information flow patterns" | flow by layer, heads, supernodes, overlap between cells, negative edges ({doc}`08_controls`); none of it is translated into biology |
# | "domain-specific tokenizers" | a token for each gene, on small models of three seeds ({doc}`10_sub_words`) |
# | other tasks, "like perturbation response prediction" | nothing |
# | "other scFMs" | GPT-NeoX, Llama, Mistral and Qwen2 can be loaded ({doc}`your_cells`); Geneformer and scGPT cannot |
# | "model improvement and debugging" | features are taken out and doubled ({doc}`08_controls`); no call is steered and no error is debugged |
# | "the design of more interpretable architectures" | nothing |
# | frameworks of scFeatureLens and of Claye et al. for single features | nothing |
