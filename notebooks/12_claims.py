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
#     produces: [claims.csv]
#     libraries: [libraries, case_library]
#     exhibits: "every exhibit"
#     modules: [paper/claims]
# ---

# %% [markdown]
# # The paper's claims, one by one
#
# Every number and every checkable sentence of the paper, with ours beside it. *match*: equal at the
# precision the paper prints, or the statement holds. *within*: inside the tolerance that the rule
# names. *off*: outside. *not comparable at this scale*: this profile cannot judge the claim; ours is
# shown all the same where there is one. *not measured*: this run has no number for it.

# %% tags=["parameters"]
profile = "demo"
overrides: dict = {}

# %%
import pandas as pd

from scfm_circuits.paper.claims import VERDICTS, write_claims
from scfm_circuits.report.chapter import open_chapter
from scfm_circuits.report.report import short_number

chapter = open_chapter("12_claims", profile, overrides)
path = write_claims(chapter.profile.name, chapter.profile.results)
claims = pd.read_csv(path, dtype=str, keep_default_na=False)
for column in ("ours", "difference"):
    claims[column] = [short_number(text) for text in claims[column]]
claims["claim"] += [f" ({note})" if note else "" for note in claims["note"]]
chapter.not_comparable()

# %% tags=["remove-input"]
chapter.library_warnings(*chapter.profile.libraries, chapter.profile.case_library)

# %% tags=["hide-input"]
own = claims[claims["kind"] != "internal"]
internal = claims[claims["kind"] == "internal"]
counts = pd.DataFrame({"verdict": list(VERDICTS)})
counts["claims about the model"] = [int((own["verdict"] == v).sum()) for v in VERDICTS]
counts["the paper's own arithmetic"] = [int((internal["verdict"] == v).sum()) for v in VERDICTS]
chapter.show(counts, caption="Verdicts of this run")

# %% [markdown]
# ## Judged in this run

# %% tags=["hide-input"]
columns = ["exhibit", "verdict", "claim", "paper", "ours", "difference", "unit", "rule"]
judged = own[~own["verdict"].isin(["not comparable at this scale", "not measured"])]
chapter.show(judged[columns], caption="Claims that this profile can judge")

# %% [markdown]
# ## The paper's own arithmetic
#
# These need no run: do the printed numbers agree with each other, and with what they are said to be?

# %% tags=["hide-input"]
odd = internal[internal["verdict"] != "match"]
chapter.show(odd[columns], caption="Internal checks that do not come out as printed")

# %% tags=["hide-input"]
chapter.show(internal[internal["verdict"] == "match"][["exhibit", "claim", "paper", "ours"]],
            caption="Internal checks that do")

# %% [markdown]
# ## Not comparable at this scale, or not measured

# %% tags=["hide-input"]
rest = own[own["verdict"].isin(["not comparable at this scale", "not measured"])]
chapter.show(rest[["exhibit", "verdict", "claim", "paper", "ours"]],
            caption="Claims about the paper's own model and cells")
