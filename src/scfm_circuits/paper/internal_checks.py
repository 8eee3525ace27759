"""The paper's own numbers, and what they say about one another.

`read_paper` reads `data/paper/*.csv` (the exhibits exactly as printed); `internal_values` tests the
paper against itself, exhibit by exhibit: fractions, cuts, gene lists, the layers' pattern and the
loss against the KL divergence. Sums that the paper does not print are nothing to test. `claims`
puts the values into the ledger.
"""

import re
from pathlib import Path

from scipy import stats

from scfm_circuits import InputError
from scfm_circuits.paper.case import TERM_IN_PROMPT, combined_score, server_case
from scfm_circuits.paper.exhibits import MODEL_WIDTH, PAPER, PaperTables, read_paper
from scfm_circuits.paper.intervals import (
    Shares,
    late_less_early,
    layer0_difference,
    layers_over,
    overlap,
)

Value = float | int | bool | str | None


def internal_values(folder: str | Path = PAPER) -> dict[str, Value]:
    """All internal checks, computed from `data/paper/*.csv`: `internal.<name>` -> value."""
    paper = read_paper(folder)
    found = _training(paper) | _table3(paper) | _table4(paper) | _case(paper)
    return {f"internal.{name}": value for name, value in found.items()}


def _training(paper: PaperTables) -> dict[str, Value]:
    """Tables 1 and 2, and the width of a layer."""
    # For a calibrated original model, E[loss_modified - loss_original] = KL(original || modified).
    original = paper.loss["Original"]
    return {"excess_loss.transcoder": paper.loss["Transcoder"] - original,
            "excess_loss.no_mlp": paper.loss["No MLP"] - original,
            "width_is_expansion_times_model_width": paper.settings["expansion"] * MODEL_WIDTH}


# --- Table 3 -----------------------------------------------------------------------------------


def _table3(paper: PaperTables) -> dict[str, Value]:
    table, ids, cut = paper.table3, paper.table3["feature"], paper.settings["live_cut_table3"]
    yes = int((table["gene_level_interpretable"] == "Yes").sum())
    found: dict[str, Value] = {
        "table3_count.rows": len(table), "table3_count.yes": yes,
        "table3_count.share": yes / len(table),
        "table3_all_live": bool((table["log10_E_f"] >= cut).all()),
        "table3_ids_valid": bool(ids.is_unique
                                 and ids.between(0, paper.settings["width"] - 1).all())}
    # A row is consistent if its feature is live and each gene it names contains its token.
    for row in table.to_dict("records"):
        token, genes = named_genes(row["activating_tokens"])
        found[f"table3_row.{row['feature']}"] = (
            row["log10_E_f"] >= cut and all(token in gene for gene in genes))
    return found


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


# --- Table 4 -----------------------------------------------------------------------------------


def _table4(paper: PaperTables) -> dict[str, Value]:
    table = paper.table4
    percent = 100 * table["interpretable"] / table["total"]
    printed = table["interpretable"].astype(str) + "/" + table["total"].astype(str)
    rounded = (percent - table["percentage"]).abs() <= 0.005 + 1e-9
    shares = Shares.given(percent.to_list(), table["total"].to_list())
    later = table[table["layer"] > 0]
    trend = stats.spearmanr(later["layer"], later["percentage"])
    return {
        "table4_fractions": bool((printed == table["fraction"]).all() and rounded.all()),
        "table4_layers": int(table["layer"].nunique()),
        # What the text says of the layers, from the counts, each with its interval.
        **layers_over(shares, 80).named("table4_pattern.over_80"),
        **layer0_difference(shares).named("table4_pattern.layer0"),
        **late_less_early(shares, len(table)).named("table4_pattern.late_less_early"),
        "table4_rises_after_layer0": bool(trend.statistic > 0 and trend.pvalue < 0.05),
        # Percent of all features of a layer, not only of its live ones, in the best layer.
        "table4_best_layer_of_all_features": float(
            100 * table["interpretable"].max() / paper.settings["width"])}


# --- Figures 1, 4, 5 and the case study --------------------------------------------------------


def _case(paper: PaperTables) -> dict[str, Value]:
    genes, nodes, case = paper.prompt_genes, set(paper.circuit["gene"]), paper.case
    # Do the nine hold more of the genes of their term than nine of the prompt's by luck?
    term = server_case().query("term != ''").iloc[0]
    found = overlap(int(term["overlap"]), TERM_IN_PROMPT, len(paper.circuit), len(genes))
    endothelial = {} if found is None else {
        **found.beyond.named("endothelial_genes.beyond"), "endothelial_genes.told": found.told}
    return {
        "figure4.count": len(genes), "figure4.distinct": len(set(genes)) == len(genes),
        "circuit_genes.count": len(nodes),
        "circuit_genes.literature": int((paper.circuit["literature"] == "yes").sum()),
        "circuit_genes.figure1": set(case["figure1_genes"].split(";")) <= nodes,
        **endothelial,
        "case_feature_valid": 0 <= int(case["feature"]) < paper.settings["width"],
        # A GSEA enrichment score is a signed Kolmogorov-Smirnov-like deviation (Subramanian 2005).
        "score_is_gsea": abs(float(case["enrichment_score"])) <= 1,
        # Equal at the four decimals the paper prints.
        "fdr_differs_from_p": abs(_implied_p(paper) - float(case["fdr"])) > 0.5e-4}


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
