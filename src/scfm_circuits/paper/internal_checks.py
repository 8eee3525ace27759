"""The paper's own numbers, and what they say about one another.

`read_paper` reads `data/paper/*.csv` (the exhibits exactly as printed); every function marked
`@check` then tests the paper against itself: fractions, cuts, gene lists, the layers' pattern and
the loss against the KL divergence. Sums that the paper does not print are nothing to test.
`internal_values` runs them all; `claims` puts them into the ledger.
"""

import re
from collections.abc import Callable
from pathlib import Path

from scipy import stats

from scfm_circuits import InputError
from scfm_circuits.paper.case import TERM_IN_PROMPT, combined_score, server_case
from scfm_circuits.paper.exhibits import MODEL_WIDTH, PaperTables, read_paper
from scfm_circuits.paper.intervals import (
    Shares,
    late_less_early,
    layer0_difference,
    layers_over,
    overlap,
)

Value = float | int | bool | str | None


Check = Callable[[PaperTables], Value | dict[str, Value]]
CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    """Register a check: its result is `internal.<name>`, or `internal.<name>.<key>` for a dict."""

    def register(function: Check) -> Check:
        if name in CHECKS:
            raise ValueError(f"two checks are called {name}")
        CHECKS[name] = function
        return function

    return register


def internal_values(folder: str | Path | None = None) -> dict[str, Value]:
    """All internal checks, computed from `data/paper/*.csv`: dotted key -> value."""
    paper = read_paper(folder)
    values: dict[str, Value] = {}
    for name, function in CHECKS.items():
        result = function(paper)
        if isinstance(result, dict):
            values |= {f"internal.{name}.{key}": value for key, value in result.items()}
        else:
            values[f"internal.{name}"] = result
    return values


# --- Tables 1 and 2 ----------------------------------------------------------------------------

@check("excess_loss")
def _excess_loss(paper: PaperTables) -> dict[str, Value]:
    # For a calibrated original model, E[loss_modified - loss_original] = KL(original || modified).
    original = paper.loss["Original"]
    return {
        "transcoder": paper.loss["Transcoder"] - original,
        "no_mlp": paper.loss["No MLP"] - original,
    }


# --- training ----------------------------------------------------------------------------------

@check("width_is_expansion_times_model_width")
def _width(paper: PaperTables) -> float:
    return paper.settings["expansion"] * MODEL_WIDTH


# --- Table 3 -----------------------------------------------------------------------------------

@check("table3_count")
def _table3_count(paper: PaperTables) -> dict[str, Value]:
    yes = int((paper.table3["gene_level_interpretable"] == "Yes").sum())
    rows = len(paper.table3)
    return {"rows": rows, "yes": yes, "share": yes / rows}


@check("table3_all_live")
def _table3_all_live(paper: PaperTables) -> bool:
    return bool((paper.table3["log10_E_f"] >= paper.settings["live_cut_table3"]).all())


@check("table3_ids_valid")
def _table3_ids_valid(paper: PaperTables) -> bool:
    ids = paper.table3["feature"]
    return bool(ids.is_unique and ids.between(0, paper.settings["width"] - 1).all())


def named_genes(description: str) -> tuple[str, list[str]]:
    """Split a Table 3 description into its token and the genes or gene families it names.

    "BL token in ABLIM1, ABL1, ABLIM3" gives ("BL", ["ABLIM1", "ABL1", "ABLIM3"]); a description
    that names no gene ("Y tokens (non-specific)") gives an empty list.
    """
    match = re.fullmatch(r"(?:Trailing )?(\S+) tokens?(?: in (.*))?(?: \(non-specific\))?",
                         description)
    if match is None:
        raise InputError(
            f'data/paper/table3.csv: "{description}" does not read as "<piece> token in <genes>".')
    token, where = match.groups()
    # A symbol has at least three characters, all of them capitals, digits or hyphens.
    return token, re.findall(r"\b[A-Z][A-Z0-9-]{2,}\b", where or "")


@check("table3_row")
def _table3_row(paper: PaperTables) -> dict[str, Value]:
    """A row is consistent if its feature is live and each gene it names contains its token."""
    result: dict[str, Value] = {}
    for row in paper.table3.itertuples(index=False):
        token, genes = named_genes(str(row.activating_tokens))
        live = float(str(row.log10_E_f)) >= paper.settings["live_cut_table3"]
        result[str(row.feature)] = live and all(token in gene for gene in genes)
    return result


# --- Table 4 -----------------------------------------------------------------------------------

@check("table4_fractions")
def _table4_fractions(paper: PaperTables) -> bool:
    table = paper.table4
    exact = 100 * table["interpretable"] / table["total"]
    printed = table["interpretable"].astype(str) + "/" + table["total"].astype(str)
    rounded = (exact - table["percentage"]).abs() <= 0.005 + 1e-9
    return bool((printed == table["fraction"]).all() and rounded.all())


@check("table4_layers")
def _table4_layers(paper: PaperTables) -> int:
    return int(paper.table4["layer"].nunique())


@check("table4_pattern")
def _table4_pattern(paper: PaperTables) -> dict[str, Value]:
    """What the text says of the table's layers, from its counts, each with its interval."""
    table = paper.table4
    percent = 100 * table["interpretable"] / table["total"]
    shares = Shares.given(percent.to_list(), table["total"].to_list())
    return {**layers_over(shares, 80).named("over_80"),
            **layer0_difference(shares).named("layer0"),
            **late_less_early(shares, len(table)).named("late_less_early")}


@check("table4_rises_after_layer0")
def _table4_rises_after_layer0(paper: PaperTables) -> bool:
    later = paper.table4[paper.table4["layer"] > 0]
    trend = stats.spearmanr(later["layer"], later["percentage"])
    return bool(trend.statistic > 0 and trend.pvalue < 0.05)


@check("table4_best_layer_of_all_features")
def _table4_best_layer_of_all_features(paper: PaperTables) -> float:
    """Percent of all features of a layer, not only of its live ones, in the best layer."""
    return float(100 * paper.table4["interpretable"].max() / paper.settings["width"])


# --- Figures 1, 4, 5 and the case study --------------------------------------------------------

@check("figure4")
def _figure4(paper: PaperTables) -> dict[str, Value]:
    genes = paper.prompt_genes
    return {"count": len(genes), "distinct": len(set(genes)) == len(genes)}


@check("circuit_genes")
def _circuit_genes(paper: PaperTables) -> dict[str, Value]:
    nodes = set(paper.circuit["gene"])
    return {
        "count": len(nodes),
        "literature": int((paper.circuit["literature"] == "yes").sum()),
        "figure1": set(paper.case["figure1_genes"].split(";")) <= nodes,
    }


@check("endothelial_genes")
def _endothelial_genes(paper: PaperTables) -> dict[str, Value]:
    """Do the nine hold more of the genes of their term than nine of the prompt's by luck?"""
    term = server_case().query("term != ''").iloc[0]
    found = overlap(int(term["overlap"]), TERM_IN_PROMPT, len(paper.circuit),
                    len(paper.prompt_genes))
    return {} if found is None else {**found.beyond.named("beyond"), "told": found.told}


@check("case_feature_valid")
def _case_feature_valid(paper: PaperTables) -> bool:
    return 0 <= int(paper.case["feature"]) < paper.settings["width"]


@check("score_is_gsea")
def _score_is_gsea(paper: PaperTables) -> bool:
    # A GSEA enrichment score is a signed Kolmogorov-Smirnov-like deviation (Subramanian 2005).
    return abs(float(paper.case["enrichment_score"])) <= 1


def _implied_p(paper: PaperTables) -> float:
    """The raw p that the printed score implies when two of the nine genes are in the term.

    Neither the term's size nor the background is printed, so each term size from 50 to 500 is
    paired with the background that gives the printed score; the p farthest from the printed FDR
    is returned. Two genes (VWF and PTPRB) is what CellMarker Augmented 2021 holds of the nine.
    """
    score, fdr = float(paper.case["enrichment_score"]), float(paper.case["fdr"])
    query = len(paper.circuit)
    implied = []
    for term in range(50, 501, 50):
        low, high = term + query, 10_000_000
        while high - low > 1:
            middle = (low + high) // 2
            if combined_score(2, term, query, middle)[0] < score:
                low = middle
            else:
                high = middle
        implied.append(combined_score(2, term, query, low)[1])
    return max(implied, key=lambda p: abs(p - fdr))


@check("fdr_differs_from_p")
def _fdr_differs_from_p(paper: PaperTables) -> bool:
    # Equal at the four decimals the paper prints.
    return abs(_implied_p(paper) - float(paper.case["fdr"])) > 0.5e-4
