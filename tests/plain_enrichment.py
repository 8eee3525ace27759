"""Over-representation by numpy and scipy, one list at a time: the oracle of the compiled engine."""

from collections.abc import Collection, Sequence

import numpy as np
from scipy.stats import hypergeom

from scfm_circuits.enrichment.background import Background, Family
from scfm_circuits.enrichment.gene_sets import GeneSets
from scfm_circuits.enrichment.over_representation import OverRepresentation
from scfm_circuits.enrichment.significance import benjamini_hochberg
from scfm_circuits.enrichment.terms import checked_lists


def plain_over_representation(
    lists: Sequence[Collection[str]], library: GeneSets, *,
    background: int | Collection[str] | Background | None, family: Family = "hit",
    alpha: float = 0.05,
) -> OverRepresentation:
    """What `over_representation` says, list by list and term by term."""
    encoded, universe = checked_lists(lists, library, background, family)
    members = np.zeros((len(universe.sizes), len(library.genes)), bool)
    genes = np.repeat(np.arange(len(library.genes)), np.diff(universe.gene_indptr))
    members[universe.gene_terms, genes] = True
    rows = []
    for i, n in enumerate(encoded.n_query):
        own = encoded.ids[encoded.indptr[i] : encoded.indptr[i + 1]]
        overlap = members[:, own].sum(axis=1)
        hit = np.flatnonzero(overlap)
        if not hit.size:
            rows.append((n, 0, 0, 1.0, 1.0, -1))
            continue
        p = hypergeom.sf(overlap[hit] - 1, universe.total, universe.sizes[hit], n)
        tests = hit.size if family == "hit" else universe.n_terms
        q = benjamini_hochberg([*p, *np.ones(tests - hit.size)])
        rows.append((n, hit.size, np.count_nonzero(q < alpha), p.min(), q.min(), hit[p.argmin()]))
    columns = zip(*rows, strict=True) if rows else [()] * 6
    return OverRepresentation(*(np.array(column) for column in columns))
