"""Gene set enrichment analysis of whole rankings, by `gseapy.prerank`, for chosen features.

The paper says GSEA where the numbers point to over-representation. This is GSEA proper: does a term
sit towards the top of the ranking of all genes of the corpus by how often a feature fires on them?

Two things differ from gseapy's defaults, because a feature is silent on most genes:
- The running sum is unweighted (weight 0). Weighted by the scores, as is usual for fold changes,
  one active gene among a term's silent ones takes the whole sum to its peak, in the observed term
  and in nearly every permutation alike, so that not even a planted term is found.
- Ties, which most genes are, are put into a random order drawn from the seed, which does not depend
  on the order the genes came in. Left to gseapy they keep some order that may mean something.

Only positive enrichment (NES > 0, the term towards the top) says anything about a feature: the
bottom of the ranking is a tie of silent genes. Negative rows are returned and never counted.
"""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.compiled import n_threads
from scfm_circuits.common.profile import Profile
from scfm_circuits.common.randomness import generator
from scfm_circuits.enrichment.gene_sets import GeneSets
from scfm_circuits.features.contexts import draw_features
from scfm_circuits.features.gene_lists import gene_scores
from scfm_circuits.features.statistics import FeatureStatistics

SMALLEST = 15
"""Genes that a term must have in the ranking, unless asked otherwise."""
COLUMNS = ("ranking", "library", "Term", "n_genes", "ES", "NES", "P-value", "FDR", "Leading edge")

Scores = Mapping[str, float] | pd.Series


def prerank_table(
    rankings: Mapping[Hashable, Scores],
    libraries: Sequence[GeneSets],
    *,
    seed: int,
    min_size: int = SMALLEST,
    max_size: int = 500,
    permutations: int = 1000,
) -> pd.DataFrame:
    """Every term of every library within the size limits, for every ranking.

    Args:
        rankings: label (a feature's, say) -> score of each gene symbol, silent genes included as 0.
        libraries: gene sets; false discovery rates are computed per ranking and library.
        seed: of the permutations and of the order of ties. The same seed gives the same table.
        min_size, max_size: genes a term must have in the ranking.
        permutations: random sets of the same size per term. Memory grows with it and with the
            number of genes times terms. P and FDR can be 0: no permutation went beyond the term.

    Returns:
        One row per tested term: ranking, library, Term, n_genes (of the term in the ranking), ES
        and NES (enrichment score, plain and divided by the mean of the same sign's permutations),
        P-value, FDR (GSEA's pooled one, not Benjamini-Hochberg), Leading edge (";"-joined, from the
        end of the ranking that the term leans to). Sorted by ranking and library as given, then
        NES, highest first. A library with no term within the limits has no row.

    Raises:
        InputError: limits that make no sense, a ranking that is no more than `min_size` genes long,
            that has equal scores only or one that is no number, or an entry that is no symbol.
    """
    if not 1 <= min_size <= max_size:
        raise InputError(f"Term sizes from {min_size} to {max_size} make no sense; give 1 or more, "
                         "the smaller first.")
    if permutations < 1:
        raise InputError(f"The number of permutations is {permutations}; use at least 1.")
    # All rankings are checked before the first minutes go into one.
    ordered = {label: _ordered(label, scores, min_size, seed)
               for label, scores in rankings.items()}

    def tested(label: Hashable, library: GeneSets) -> pd.DataFrame | None:
        genes = ordered[label]
        # A term that is the whole ranking cannot lean to either end; gseapy leaves it out, too.
        sets = library.within(frozenset(genes), min_size, min(max_size, len(genes) - 1))
        if not sets:
            return None
        table = _prerank(genes, sets, min_size, max_size, permutations, seed)
        table.insert(0, "ranking", label)  # type: ignore[arg-type]
        table.insert(1, "library", library.name)
        return table

    import gseapy  # noqa: F401  (threads must not import it side by side)

    with ThreadPoolExecutor(n_threads()) as pool:  # gseapy lets other threads run
        found = pool.map(tested, *zip(*product(ordered, libraries), strict=True))
        parts = [one for one in found if one is not None]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(COLUMNS))


def prerank_called(table: pd.DataFrame, labels: Collection[Hashable], fdr: float = 0.05
                   ) -> pd.Series:
    """Whether any term of any library leans to the top of a ranking with FDR < fdr, by label.

    labels: of all rankings asked about; one without a row in the table is not called.

    Raises:
        InputError: a level that is not between 0 and 1.
    """
    if not 0 < fdr < 1:
        raise InputError(f"The FDR is {fdr}; use a level between 0 and 1, such as 0.05.")
    called = set(table.loc[(table["FDR"] < fdr) & (table["NES"] > 0), "ranking"])
    return pd.Series([label in called for label in labels], index=list(labels), dtype=bool)


def _ordered(label: Hashable, scores: Scores, min_size: int, seed: int) -> list[str]:
    """The genes of a ranking in upper case, highest score first, ties shuffled.

    Of two spellings of a symbol (C1orf112, C1ORF112) the higher score stands.
    """
    highest: dict[str, float] = {}
    for symbol, score in scores.items():
        if not isinstance(symbol, str) or not symbol.strip():
            raise InputError(f"Ranking {label!r:.60}: {symbol!r:.60} is not a gene symbol; remove "
                             "missing values and empty entries.")
        name, value = symbol.strip().upper(), float(score)
        if not math.isfinite(value):
            raise InputError(f"Ranking {label!r:.60}: the score of {name[:60]} is {value}; give "
                             "each gene a number, 0 where the feature is silent.")
        highest[name] = max(value, highest.get(name, -math.inf))
    if len(highest) <= min_size:
        raise InputError(f"Ranking {label!r:.60} has {len(highest)} genes, too few for terms of "
                         f"{min_size}; pass all genes of the corpus, silent ones with score 0.")
    genes = np.array(sorted(highest))
    values = np.array([highest[gene] for gene in genes])
    if values.min() == values.max():
        raise InputError(f"Ranking {label!r:.60} gives all of its {len(genes):,} genes the score "
                         f"{values[0]:g}, so nothing is ranked; leave it out.")
    shuffled = generator(seed, "prerank ties").permutation(genes.size)
    return genes[shuffled[np.argsort(-values[shuffled], kind="stable")]].tolist()


def _prerank(genes: Sequence[str], sets: dict[str, list[str]], min_size: int, max_size: int,
             permutations: int, seed: int) -> pd.DataFrame:
    """gseapy's result for one ranking and library, in our columns."""
    import gseapy

    # Unweighted, only the order counts: distinct scores keep gseapy from sorting ties anew.
    scores = pd.Series(np.arange(len(genes), 0, -1, dtype=float), index=list(genes))
    # Sets given as a mapping and no folder: nothing is fetched, nothing is written.
    result = gseapy.prerank(
        scores, sets, outdir=None, no_plot=True, verbose=False, min_size=min_size,
        max_size=max_size, permutation_num=permutations, weight=0.0, threads=1, seed=seed,
    ).res2d
    table = pd.DataFrame({
        "Term": result["Term"].astype(str),
        "n_genes": [len(sets[term]) for term in result["Term"]],
        **{ours: result[theirs].astype(float) for ours, theirs in {
            "ES": "ES", "NES": "NES", "P-value": "NOM p-val", "FDR": "FDR q-val"}.items()},
        "Leading edge": result["Lead_genes"].astype(str),
    })
    position = {term: i for i, term in enumerate(sets)}
    in_library_order = table.iloc[np.argsort([position[term] for term in table["Term"]])]
    return in_library_order.sort_values("NES", ascending=False, kind="stable", ignore_index=True)


# --- for a chapter -----------------------------------------------------------------------------


class PrerankStudy(NamedTuple):
    """gseapy's `prerank` for a few features, and for the same rankings with shuffled names."""

    terms: pd.DataFrame
    """`prerank_table`: every term tested."""
    best: pd.DataFrame
    """One row per ranking: terms tested, the best positive term, and whether any is called."""
    n: int
    """Features ranked."""
    called: int
    """Features with a term below the FDR."""
    shuffled: int
    """Shuffled rankings with one."""


def prerank_study(statistics: FeatureStatistics, corpus: Corpus, profile: Profile,
                  libraries: Sequence[GeneSets]) -> PrerankStudy:
    """Rank all genes by the activations of the first features of the human evaluation."""
    used, layer = corpus.occurring, profile.human_layer
    symbols = corpus.symbols[used].tolist()
    scores = gene_scores(statistics, layer, len(corpus.symbols), profile.gene_rule)
    sampled = draw_features(statistics, layer, profile.human_features, profile.live_cut,
                            profile.seed)
    # A feature that fires on words of the prompt alone ranks no gene.
    chosen = [feature for feature in sampled
              if len(symbols) > SMALLEST and scores[feature].nnz][: profile.prerank_features]
    rng = generator(profile.seed, "prerank, names shuffled")
    rankings: dict[Hashable, pd.Series] = {}
    for feature in chosen:
        activations = scores[feature].toarray().ravel()[used]
        rankings[f"{feature}"] = pd.Series(activations, index=symbols)
        rankings[f"{feature}, names shuffled"] = pd.Series(rng.permutation(activations),
                                                           index=symbols)
    ranked = prerank_table(rankings, libraries, seed=profile.seed)
    positive = ranked[ranked["NES"] > 0].sort_values(["FDR", "NES"], ascending=[True, False],
                                                     kind="stable")
    found = positive.drop_duplicates("ranking").set_index("ranking").reindex(list(rankings))
    by_ranking = prerank_called(ranked, list(rankings), profile.fdr)
    own = int(sum(by_ranking[f"{feature}"] for feature in chosen))
    best = pd.DataFrame({
        "feature": list(rankings), "terms tested": ranked.groupby("ranking").size().reindex(
            list(rankings), fill_value=0).tolist(),
        "best term": found["Term"].tolist(), "NES": found["NES"].tolist(),
        "FDR": found["FDR"].tolist(),
        f"a term at FDR < {profile.fdr:g}": by_ranking.tolist()})
    return PrerankStudy(ranked, best, len(chosen), own, int(by_ranking.sum()) - own)
