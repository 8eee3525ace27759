"""The named ways to test: background, Benjamini-Hochberg family and odds ratio."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from scfm_circuits import InputError
from scfm_circuits.enrichment.background import Family
from scfm_circuits.enrichment.gene_sets import GeneSets
from scfm_circuits.enrichment.terms import Odds, term_table


@dataclass(frozen=True)
class Rule:
    """A named way to test: background, BH family and odds ratio."""

    name: str
    background: int | Literal["corpus", "library"]
    """A number of genes, the genes of the corpus, or the union of the library."""
    family: Family
    """BH over the terms hit by the list, or over all terms of the library."""
    odds: Odds
    """gseapy's odds ratio (0.5 added to each cell) or the Enrichr server's."""
    statement: str
    """One sentence for every table and caption."""

    def background_for(
        self, corpus_genes: Collection[str] | None = None
    ) -> int | Collection[str] | None:
        """The `background` argument that this rule means, given the symbols of the corpus.

        Raises:
            InputError: the rule needs the corpus's genes and got none.
        """
        if self.background == "library":
            return None
        if self.background != "corpus":
            return self.background
        if not corpus_genes:
            raise InputError(
                f"The rule {self.name!r} needs the genes of the corpus as background; pass them."
            )
        return corpus_genes

    def terms(self, genes: Collection[str], library: GeneSets, corpus_genes: Collection[str]
              ) -> pd.DataFrame:
        """`terms.term_table` of one list under this rule."""
        return term_table(genes, library, background=self.background_for(corpus_genes),
                          family=self.family, odds=self.odds)


RULES: Mapping[str, Rule] = {
    "enrichr": Rule(
        "enrichr", 20_000, "hit", "enrichr",
        "Hypergeometric test against a background of 20,000 genes, Benjamini-Hochberg over the "
        "terms hit by the list, as the Enrichr server does (unknown symbols count as drawn).",
    ),
    "corpus": Rule(
        "corpus", "corpus", "all", "gseapy",
        "Hypergeometric test against the genes that occur in the corpus, Benjamini-Hochberg over "
        "all terms of the library that contain one of them.",
    ),
    "gseapy": Rule(
        "gseapy", "library", "hit", "gseapy",
        "Hypergeometric test against all genes of the library, Benjamini-Hochberg over the terms "
        "hit by the list, as gseapy.enrich does by default.",
    ),
}  # fmt: skip
