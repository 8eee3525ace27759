"""Table 4 beside gene lists that no trained feature made.

Each control holds one more thing fixed: the lists' lengths, the genes' frequency in the corpus, the
number and kind of tokens, the encoder's architecture, the training. All lists go through the same
enrichment rules as the features' own. Phases for a layer:

1. the live features' gene lists, tested under every rule;
2. up to `null_draws` null lists of each kind for every feature, tested in threads. The first draws
   say how many of a layer's lists are called interpretable by chance (the null band), all of them
   how often a null list does as well as the feature. A feature leaves the race once 20 of its null
   lists have (Besag and Clifford, Biometrika 1991): the many that fail do so after few draws;
3. the live features of the baselines (an untrained encoder, a re-initialised model), tested alike.

Layers are kept on disk as they are done, so an interrupted run goes on where it was.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from tqdm import tqdm

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.compiled import n_threads
from scfm_circuits.common.kept import Stamp, kept_arrays, stamp_of
from scfm_circuits.common.profile import Profile
from scfm_circuits.common.randomness import generator
from scfm_circuits.enrichment import kernels
from scfm_circuits.enrichment.background import (
    Family,
    GeneIds,
    encode_ids,
    gene_ids,
    prepare_background,
)
from scfm_circuits.enrichment.gene_sets import GeneSets
from scfm_circuits.enrichment.null_lists import (
    Ragged,
    TokenCounts,
    TokenFamilies,
    frequency_matched_null,
    own_kept,
    ragged,
    token_families,
    token_preserving_null,
    uniform_null,
)
from scfm_circuits.enrichment.over_representation import OverRepresentation, over_representation
from scfm_circuits.enrichment.rules import RULES, Rule
from scfm_circuits.features.gene_lists import MIN_FIRINGS, containment, gene_list_ids
from scfm_circuits.features.statistics import FeatureStatistics

NULLS = ("uniform", "frequency-matched", "token-preserving")
"""Kinds of null lists, each holding one more thing fixed."""
BAND_DRAWS = 50
"""Draws of a whole layer that the null bands are taken from."""
ENOUGH = 20
"""Null lists as good as the feature after which no more are drawn for it."""
FREQUENCY_BINS = 50
_STAGES = (BAND_DRAWS, 100, 300, 1000)
_IDS_AT_ONCE = 1_000_000
_FIELDS = ("seed", "live_cut_table4", "fdr", "gene_rule", "gene_score", "containment", "list_rule",
           "list_size", "list_share", "null_draws", "enrichment_rule")
_ROOMS = ("enrichment", "features")


def rules_shown(profile: Profile) -> tuple[str, ...]:
    """The profile's rule first, then `enrichr` and `corpus`, each once."""
    return tuple(dict.fromkeys([profile.enrichment_rule, "enrichr", "corpus"]))


class LayerControls(NamedTuple):
    """What was counted for the n live features of one layer, under R rules and 3 kinds of nulls."""

    features: np.ndarray
    """Indices of the live features, (n,)."""
    lengths: np.ndarray
    """Genes of each feature's list, (n,)."""
    called: np.ndarray
    """Whether a term of any library is significant, (R, n) bool."""
    min_p: np.ndarray
    """Smallest p over all libraries, (R, n)."""
    min_q: np.ndarray
    """Smallest BH-adjusted p over all libraries, (R, n)."""
    null_called: np.ndarray
    """How many of the n null lists of each draw are called, (R, 3, draws of the band)."""
    null_p: np.ndarray
    """Share of a feature's null lists whose smallest p (rule `corpus`) is at most its own, as a
    sequential Monte Carlo p-value, (3, n)."""
    baseline_called: tuple[np.ndarray, ...]
    """For each baseline with m live features, whether they are called, (R, m) bool."""
    baseline_min_p: tuple[np.ndarray, ...]
    """For each baseline, the smallest p of its features under the rule `corpus`, (m,)."""


@dataclass(frozen=True)
class Tester:
    """One rule on all libraries, for lists of the corpus's gene ids; safe to share by threads."""

    rule: str
    family: Family
    alpha: float
    genes: tuple[GeneIds, ...]
    """The corpus's genes, library by library."""

    def tested(self, lists: Ragged) -> list[OverRepresentation]:
        """Everything about each list, library by library."""
        return [over_representation(encode_ids(lists, genes), genes.universe.library,
                                    background=genes.universe, family=self.family,
                                    alpha=self.alpha) for genes in self.genes]

    def counted(self, lists: Ragged) -> tuple[np.ndarray, np.ndarray]:
        """Whether each list is called by any library, and its smallest p; in one thread."""
        n = lists.lengths.size
        called, smallest = np.zeros(n, bool), np.ones(n)
        min_p, significant = np.empty(n), np.empty(n, np.int64)
        for genes in self.genes:
            encoded, terms = encode_ids(lists, genes), genes.universe.term_index
            setting = genes.universe.setting(self.family, self.alpha)
            # Lists of one length share their tails.
            order = np.argsort(encoded.n_query, kind="stable")
            kernels.count_lists(order, encoded, terms, setting, kernels.scratch(terms), min_p,
                                significant)
            called |= significant > 0
            np.minimum(smallest, min_p, out=smallest)
        if np.isnan(smallest).any():
            raise InputError("A null list does not fit the background; raise its number of genes.")
        return called, smallest


def tester_of(rule: Rule, libraries: Sequence[GeneSets], corpus: Corpus, alpha: float) -> Tester:
    """A tester of the rule, for which the genes that occur are the background `corpus`."""
    symbols, background = corpus.symbols.tolist(), rule.background_for(corpus.occurring_symbols)
    known = []
    for library in libraries:
        universe = prepare_background(library, background)
        # Computed here, once: threads would each do it for themselves.
        _ = universe.term_index, universe.log_factorials
        known.append(gene_ids(symbols, universe))
    return Tester(rule.name, rule.family, alpha, tuple(known))


def testers(libraries: Sequence[GeneSets], corpus: Corpus, profile: Profile) -> list[Tester]:
    """A tester for each rule shown."""
    return [tester_of(RULES[name], libraries, corpus, profile.fdr)
            for name in rules_shown(profile)]


class NullSource(NamedTuple):
    """What a layer's null lists are drawn from."""

    own: Ragged
    """The features' lists as places in `used`."""
    used: np.ndarray
    """Ids of the genes that occur in the corpus: the others cannot be on a list."""
    occurrences: np.ndarray
    """In how many cells each of them does."""
    fired: sp.csr_matrix
    """(n_features, n_tokens) how often each feature fires on each token that stands in genes."""
    families: TokenFamilies
    profile: Profile

    def draw(self, kind: str, rng: np.random.Generator, draws: int) -> Ragged:
        """`draws` null lists of every feature, as gene ids of the corpus."""
        if kind == "uniform":
            null = uniform_null(self.own.lengths, len(self.used), rng, draws)
        elif kind == "frequency-matched":
            null = frequency_matched_null(self.own, self.occurrences, FREQUENCY_BINS, rng, draws)
        else:
            tokens = TokenCounts(self.fired.indptr, self.fired.indices, self.fired.data)
            null = token_preserving_null(
                tokens, self.families, self.own.lengths, rng, n_genes=len(self.used),
                by_token=self.profile.gene_rule == "token", draws=draws,
                score=self.profile.gene_score, least=MIN_FIRINGS)
        return Ragged(null.indptr, self.used[null.ids])

    def part(self, chosen: np.ndarray) -> "NullSource":
        """The same for some of the features."""
        own = [self.own.ids[self.own.indptr[i] : self.own.indptr[i + 1]] for i in chosen]
        return self._replace(own=ragged(own), fired=sp.csr_matrix(self.fired[chosen]))


def null_source(statistics: FeatureStatistics, layer: int, features: np.ndarray, own: Ragged,
                corpus: Corpus, profile: Profile) -> NullSource:
    """The genes, tokens and families behind a layer's null lists."""
    inside = np.flatnonzero(statistics.pair_gene >= 0)
    genes, counts = statistics.pair_gene[inside], statistics.pair_count[inside]
    used = np.unique(genes)
    place = np.searchsorted(used, genes)
    _, token = np.unique(statistics.pair_token[inside], return_inverse=True)
    by_token = sp.csr_matrix((np.ones(len(inside)), (np.arange(len(inside)), token)))
    fired = sp.csr_matrix(statistics.counts[layer][features][:, inside] @ by_token)
    contains = containment(statistics, corpus, profile)
    return NullSource(
        Ragged(own.indptr, np.searchsorted(used, own.ids)), used, corpus.cells_with[used], fired,
        token_families(token, place, counts,
                       contains=None if contains is None else contains[:, used]), profile)


def own_genes_kept(statistics: FeatureStatistics, corpus: Corpus, profile: Profile
                   ) -> dict[str, float]:
    """Mean share of the live features' own genes that null lists hold again, by kind of null."""
    used = np.unique(statistics.pair_gene[statistics.pair_gene >= 0])
    occurrences = corpus.cells_with[used]
    shares: dict[str, list[np.ndarray]] = {"uniform": [], "frequency-matched": []}
    for layer in range(len(statistics.fired)):
        features = np.flatnonzero(statistics.live(profile.live_cut_table4)[layer])
        lists = ragged(gene_list_ids(statistics, layer, features, corpus, profile))
        own = Ragged(lists.indptr, np.searchsorted(used, lists.ids))
        for kind, n_bins in (("uniform", 1), ("frequency-matched", FREQUENCY_BINS)):
            shares[kind].append(own_kept(own, occurrences, n_bins))
    known = {kind: np.concatenate([np.zeros(0), *found]) for kind, found in shares.items()}
    return {kind: float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")
            for kind, found in known.items()}


def layer_controls(statistics: FeatureStatistics, baselines: Mapping[str, FeatureStatistics],
                   layer: int, corpus: Corpus, profile: Profile, ready: Sequence[Tester],
                   bar: "tqdm[Any] | None" = None) -> LayerControls:
    """All counts of one layer; `bar` advances by one for each null list."""
    features = np.flatnonzero(statistics.live(profile.live_cut_table4)[layer])
    own = ragged(gene_list_ids(statistics, layer, features, corpus, profile))
    tested = [tester.tested(own) for tester in ready]
    min_p = np.array([np.min([one.min_p for one in results], axis=0) for results in tested])
    corpus_rule = [tester.rule for tester in ready].index("corpus")
    source = null_source(statistics, layer, features, own, corpus, profile)
    called, null_p = _nulls(source, ready, min_p[corpus_rule], corpus_rule, layer, bar)
    others = []
    for other in baselines.values():
        chosen = np.flatnonzero(other.live(profile.live_cut_table4)[layer])
        lists = ragged(gene_list_ids(other, layer, chosen, corpus, profile))
        others.append([tester.counted(lists) for tester in ready])
    return LayerControls(
        features, own.lengths,
        np.array([np.any([one.n_significant > 0 for one in results], axis=0)
                  for results in tested]),
        min_p,
        np.array([np.min([one.min_q for one in results], axis=0) for results in tested]),
        called, null_p,
        tuple(np.array([one for one, _ in other]) for other in others),
        tuple(other[corpus_rule][1] for other in others))


class Race:
    """Null lists against features, draw by draw: a sequential Monte Carlo test of each feature.

    If the 20th null list that does as well comes at draw l, p = 20 / l; if it never comes,
    p = (1 + those that did) / (1 + draws). Both are valid p-values (Besag and Clifford 1991).
    """

    def __init__(self, n: int) -> None:
        self.draws = np.zeros(n, np.int64)
        self.as_good = np.zeros(n, np.int64)

    @property
    def running(self) -> np.ndarray:
        """Features that need more draws."""
        return np.flatnonzero(self.as_good < ENOUGH)

    def add(self, features: np.ndarray, as_good: np.ndarray) -> None:
        """Take in the features' next draws; as_good: (draws, len(features)) bool."""
        still = self.as_good[features] < ENOUGH
        features, as_good = features[still], as_good[:, still]
        sums = self.as_good[features] + np.cumsum(as_good, axis=0)
        reached = (sums >= ENOUGH).any(axis=0)
        self.draws[features] += np.where(reached, (sums >= ENOUGH).argmax(axis=0) + 1,
                                         len(as_good))
        self.as_good[features] = np.minimum(sums[-1], ENOUGH)

    @property
    def p(self) -> np.ndarray:
        """(n,) p-values."""
        ended = self.as_good >= ENOUGH
        return np.where(ended, ENOUGH / np.maximum(self.draws, 1),
                        (1 + self.as_good) / (1 + self.draws))


def _nulls(source: NullSource, ready: Sequence[Tester], own_p: np.ndarray, corpus_rule: int,
           layer: int, bar: "tqdm[Any] | None") -> tuple[np.ndarray, np.ndarray]:
    """(null_called, null_p) of a layer; the work is shared out in chunks of draws to threads."""
    n, draws = own_p.size, source.profile.null_draws
    band = min(BAND_DRAWS, draws)
    called = np.zeros((len(ready), len(NULLS), band), np.int64)
    races = [Race(n) for _ in NULLS]
    if not n:
        return called, np.zeros((len(NULLS), 0))

    def work(kind: int, start: int, size: int, features: np.ndarray, part: NullSource
             ) -> np.ndarray:
        rng = generator(source.profile.seed, "null lists", layer, kind, start)
        lists = part.draw(NULLS[kind], rng, size)
        smallest = np.ones(0)
        for r, tester in enumerate(ready):
            if r == corpus_rule or start < band:
                hits, p = tester.counted(lists)
                smallest = p if r == corpus_rule else smallest
                if start < band:
                    called[r, kind, start : start + size] = hits.reshape(size, -1).sum(axis=1)
        return smallest.reshape(size, -1) <= own_p[features]

    with ThreadPoolExecutor(n_threads()) as pool:
        start = 0
        for end in sorted({min(stage, draws) for stage in (*_STAGES, draws)}):
            jobs = list(_jobs(races, source, start, end))
            for (kind, _, size, features, _), as_good in zip(
                    jobs, pool.map(work, *zip(*jobs, strict=True)) if jobs else (), strict=True):
                races[kind].add(features, as_good)
                if bar is not None:
                    bar.update(size * len(features))
            start = end
    return called, np.array([race.p for race in races])


def _jobs(races: Sequence[Race], source: NullSource, start: int, end: int
          ) -> Iterator[tuple[int, int, int, np.ndarray, NullSource]]:
    """Draws `start` to `end` in chunks: kind, first draw, draws, features, what to draw from.

    The chunks depend on nothing but sizes, and so do the generators: threads change no number.
    """
    for kind, race in enumerate(races):
        features = race.running
        if not features.size:
            continue
        part = source.part(features)
        chunk = max(1, _IDS_AT_ONCE // max(1, int(part.own.lengths.sum())))
        for first in range(start, end, chunk):
            yield kind, first, min(chunk, end - first), features, part


def get_controls(statistics: FeatureStatistics, baselines: Mapping[str, FeatureStatistics],
                 corpus: Corpus, profile: Profile, libraries: Sequence[GeneSets]
                 ) -> list[LayerControls]:
    """`layer_controls` of every layer, kept in `results/<profile>/controls/`.

    The folder in there is named by gene rule and number of draws, so that runs of one profile that
    differ in these stand side by side.
    """
    folder = profile.results / "controls" / f"{profile.gene_rule}-{profile.null_draws}"
    ready = testers(libraries, corpus, profile)
    live = statistics.live(profile.live_cut_table4).sum(axis=1)
    most = live * len(NULLS) * profile.null_draws
    print(f"Testing {int(live.sum()):,} live features against up to {profile.null_draws:,} null "
          f"lists of {len(NULLS)} kinds each.")
    bar: tqdm[Any] = tqdm(desc="null lists", unit="list", unit_scale=True, total=int(most.sum()))
    layers = []
    with bar:
        for layer in range(len(live)):
            layers.append(kept_arrays(
                folder / f"layer_{layer}.npz",
                _stamp(statistics, baselines, layer, corpus, profile, libraries),
                partial(layer_controls, statistics, baselines, layer, corpus, profile, ready, bar),
                _arrays, partial(_controls, n_baselines=len(baselines))))
            # Lists that need not be drawn count as done.
            bar.update(int(most[: layer + 1].sum()) - bar.n)
    return layers


def _stamp(statistics: FeatureStatistics, baselines: Mapping[str, FeatureStatistics], layer: int,
           corpus: Corpus, profile: Profile, libraries: Sequence[GeneSets]) -> Stamp:
    """Everything a layer's counts depend on."""
    digest = hashlib.sha256("\n".join(corpus.symbols).encode())
    digest.update(corpus.gene.tobytes())
    for one in (statistics, *baselines.values()):
        for array in (one.fired[layer], one.pair_token, one.pair_gene, one.pair_count,
                      one.counts[layer].indptr, one.counts[layer].indices, one.counts[layer].data):
            digest.update(array.tobytes())
    return stamp_of(profile, _FIELDS, _ROOMS, baselines=list(baselines), counts=digest.hexdigest(),
                    libraries=[library.content_sha256 for library in libraries])


def _arrays(controls: LayerControls) -> dict[str, Any]:
    several = {f"{key}_{i}": array for key, arrays in controls._asdict().items()
               if key.startswith("baseline") for i, array in enumerate(arrays)}
    return {key: value for key, value in controls._asdict().items()
            if not key.startswith("baseline")} | several


def _controls(arrays: dict[str, np.ndarray], n_baselines: int) -> LayerControls:
    parts: dict[str, Any] = {
        key: tuple(arrays[f"{key}_{i}"] for i in range(n_baselines))
        if key.startswith("baseline") else arrays[key] for key in LayerControls._fields}
    return LayerControls(**parts)
