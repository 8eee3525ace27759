"""What the book's search finds beside its pages: genes, gene-set terms and features of the run.

A page opened from disk may load a script but not fetch a file, so it is a script with one call,
which the search page alone loads. Each result leads to the index of features, filtered.
"""

import csv
from collections import Counter
from pathlib import Path

from scfm_circuits.report.tables import script_call

FILE = "search_words.js"


def script(results: Path) -> str:
    """`companionSearch("words", {...});` from `tables/features.csv`.

    genes and terms: pairs of a text and in how many features' lists it is (a term: whose best it
    is); features: names such as L1.F20. All are empty for a run without that table.
    """
    genes, terms, features = Counter[str](), Counter[str](), list[str]()
    table = results / "tables" / "features.csv"
    if table.is_file():
        with open(table, encoding="utf-8", newline="") as handle:
            for row in csv.DictReader(handle):
                genes.update(row["genes"].split())
                terms.update([row["best_term"]] if row["best_term"] else [])
                features.append(f"L{row['layer']}.F{row['feature']}")
    return script_call("companionSearch", "words", {
        "genes": genes.most_common(), "terms": terms.most_common(), "features": features})
