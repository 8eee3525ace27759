"""Shares of whole layers under one relabelling of the genes for all features at once.

Features of a layer share genes. Null lists that are drawn feature by feature do not, so the share
of them that is called hardly varies, and a band made of such draws is several times too narrow.
Here the genes exchange their names, within bins of how many cells they occur in, once for all lists
of all kinds and layers: the lists overlap each other as before, and know nothing of the gene sets.
The relabelled shares give the band and the p-value of a layer's share, and of the difference
between two kinds of features.
"""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.compiled import n_threads
from scfm_circuits.common.kept import kept_arrays, stamp_of
from scfm_circuits.common.profile import Profile
from scfm_circuits.common.randomness import generator
from scfm_circuits.enrichment.controls.layer_counts import FREQUENCY_BINS, Tester, tester_of
from scfm_circuits.enrichment.controls.tables import FEATURES
from scfm_circuits.enrichment.gene_sets import GeneSets
from scfm_circuits.enrichment.null_lists import Ragged, quantile_bins, ragged
from scfm_circuits.enrichment.rules import RULES
from scfm_circuits.features.baselines import DIRECTIONS
from scfm_circuits.features.gene_lists import gene_list_ids
from scfm_circuits.features.statistics import FeatureStatistics

SAME_MODEL = ("untrained encoder", *DIRECTIONS)
"""Directions of the model that is explained, which no dictionary learning chose."""
MOST_LISTS = 100
"""Features of a kind and layer that are relabelled; of more live ones, as many evenly spaced."""
ALL_LAYERS = "all"


class JointNull(NamedTuple):
    """Lists called under the rule `corpus`, as they are and relabelled: K kinds, L layers."""

    kinds: tuple[str, ...]
    """The trained features' name, FEATURES, first."""
    tested: np.ndarray
    """(K, L) lists."""
    called: np.ndarray
    """(K, L) how many of them are called."""
    null: np.ndarray
    """(draws, K, L) how many are called after each relabelling."""

    def percentages(self) -> tuple[np.ndarray, np.ndarray]:
        """(K, L + 1) and (draws, K, L + 1) percentages called; the last column is their mean over
        the layers in which the kind has a list, so that no kind weighs layers by its own counts."""
        with np.errstate(invalid="ignore"):
            own, null = (100 * part / self.tested for part in (self.called, self.null))
        return tuple(np.concatenate([part, np.nanmean(part, axis=-1, keepdims=True)], axis=-1)
                     for part in (own, null))  # type: ignore[return-value]


def joint_null(kinds: Mapping[str, FeatureStatistics], corpus: Corpus, profile: Profile,
               libraries: Sequence[GeneSets]) -> JointNull:
    """Relabel the genes `null_draws` times under the rule `corpus` and the profile's gene rule.

    kinds: statistics by name, those of the trained features (FEATURES) first, all with the same
    layers. Kept in `results/<profile>/controls/`.
    """
    lists, group = _lists(kinds, corpus, profile)
    cells = corpus.cells_with
    n_layers = len(next(iter(kinds.values())).fired)
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(one).tobytes() for one in
                                     (lists.indptr, lists.ids, group, cells)))
    stamp = stamp_of(profile, ("seed", "fdr", "null_draws"), ("enrichment",), kinds=list(kinds),
                     lists=digest.hexdigest(),
                     libraries=[library.content_sha256 for library in libraries])

    def make() -> JointNull:
        tester = tester_of(RULES["corpus"], libraries, corpus, profile.fdr)
        return _relabelled(tuple(kinds), n_layers, lists, group, cells, tester, profile)

    return kept_arrays(profile.results / "controls" / f"joint_{profile.gene_rule}.npz", stamp, make,
                       lambda one: {"tested": one.tested, "called": one.called, "null": one.null},
                       lambda arrays: JointNull(tuple(kinds), arrays["tested"], arrays["called"],
                                                arrays["null"]))


def _lists(kinds: Mapping[str, FeatureStatistics], corpus: Corpus, profile: Profile
           ) -> tuple[Ragged, np.ndarray]:
    """All lists of the corpus's gene ids, and (n_lists,) kind * n_layers + layer of each."""
    lists: list[np.ndarray] = []
    group: list[int] = []
    for kind, statistics in enumerate(kinds.values()):
        live = statistics.live(profile.live_cut_table4)
        for layer in range(len(live)):
            features = some_of(np.flatnonzero(live[layer]))
            lists += gene_list_ids(statistics, layer, features, corpus, profile)
            group += [kind * len(live) + layer] * len(features)
    return ragged(lists), np.array(group, np.int64)


def some_of(features: np.ndarray) -> np.ndarray:
    """At most MOST_LISTS of the features, evenly spaced."""
    places = np.linspace(0, len(features) - 1, min(MOST_LISTS, len(features))).astype(int)
    return features[places]


def relabelling(cells: np.ndarray, used: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n_genes,) the new label of each gene: the used ones exchange theirs within bins of `cells`.

    cells: (n_genes,) in how many cells each occurs. used: ids of the genes that occur at all.
    """
    bins = quantile_bins(cells[used].astype(np.float64), FREQUENCY_BINS)
    label = np.arange(len(cells))
    label[used[np.argsort(bins, kind="stable")]] = used[np.lexsort((rng.random(len(used)), bins))]
    return label


def _relabelled(kinds: tuple[str, ...], n_layers: int, lists: Ragged, group: np.ndarray,
                cells: np.ndarray, tester: Tester, profile: Profile) -> JointNull:
    used, n = np.flatnonzero(cells), len(kinds) * n_layers

    def by_group(called: np.ndarray) -> np.ndarray:
        return np.bincount(group[called], minlength=n).reshape(len(kinds), n_layers)

    def draw(number: int) -> np.ndarray:
        label = relabelling(cells, used, generator(profile.seed, "relabelled genes", number))
        return by_group(tester.counted(lists._replace(ids=label[lists.ids]))[0])

    own = by_group(tester.counted(lists)[0])
    with ThreadPoolExecutor(n_threads()) as pool:
        null = list(tqdm(pool.map(draw, range(profile.null_draws)), "relabellings of all genes",
                         profile.null_draws))
    return JointNull(kinds, np.bincount(group, minlength=n).reshape(own.shape), own,
                     np.array(null))


# --- tables --------------------------------------------------------------------------------------


def joint_table(joint: JointNull) -> pd.DataFrame:
    """Each kind's share of lists called, beside what relabelled genes give.

    Columns: lists (kind), layer (`all`: the mean over layers), tested, percentage, null_mean,
    null_sd, lower_95, upper_95 (the middle 95 % of the relabellings, not an interval of the
    share), and p, one-sided: the share of relabellings, the own labels among them, with as much.
    """
    own, null = joint.percentages()
    rows = []
    for k, kind in enumerate(joint.kinds):
        for column, tested in enumerate([*joint.tested[k], joint.tested[k].sum()]):
            rows.append([kind, _name(column, own.shape[1]), int(tested), own[k, column],
                         *_spread(null[:, k, column]),
                         _p(null[:, k, column] - own[k, column])])
    return pd.DataFrame(rows, columns=["lists", "layer", "tested", "percentage", "null_mean",
                                       "null_sd", "lower_95", "upper_95", "p"])


def difference_table(joint: JointNull) -> pd.DataFrame:
    """The trained features' share less that of each other kind, in percentage points.

    Columns: lists (the other kind), layer, difference, null_mean, null_sd, lower_95, upper_95 (of
    the relabelled differences), and p, two-sided: how often relabelled genes set the two kinds at
    least as far apart from the mean of all relabellings.
    """
    own, null = joint.percentages()
    rows = []
    for k, kind in enumerate(joint.kinds):
        if kind == FEATURES:
            continue
        for column in range(own.shape[1]):
            difference = own[0, column] - own[k, column]
            relabelled = null[:, 0, column] - null[:, k, column]
            away = np.abs(relabelled - relabelled.mean())
            rows.append([kind, _name(column, own.shape[1]), difference, *_spread(relabelled),
                         _p(away - abs(difference - relabelled.mean()))])
    return pd.DataFrame(rows, columns=["lists", "layer", "difference", "null_mean", "null_sd",
                                       "lower_95", "upper_95", "p"])


def _name(column: int, columns: int) -> "int | str":
    return ALL_LAYERS if column == columns - 1 else column


def _spread(values: np.ndarray) -> tuple[float, float, float, float]:
    if np.isnan(values).all():
        return (np.nan,) * 4
    low, high = np.quantile(values, [0.025, 0.975])
    return float(values.mean()), float(values.std(ddof=1)), float(low), float(high)


def _p(ahead: np.ndarray) -> float:
    """From how far each relabelling is ahead of the run; missing where there is nothing to test."""
    return np.nan if np.isnan(ahead).any() else float(
        (1 + (ahead >= -1e-9).sum()) / (1 + len(ahead)))


# --- the study -----------------------------------------------------------------------------------


class JointStudy(NamedTuple):
    """Whole layers under one relabelling of the genes, for both gene rules."""

    shares: pd.DataFrame
    """`joint_table` with a first column gene_rule."""
    differences: pd.DataFrame
    """`difference_table` with a first column gene_rule."""

    def of_all_layers(self) -> pd.DataFrame:
        """A row per gene rule and kind, the mean over layers; the differences' columns end in
        `_ahead`, and are missing for the trained features."""
        shares, differences = (one[one["layer"] == ALL_LAYERS].drop(columns="layer")
                               for one in self)
        return shares.merge(differences, on=["gene_rule", "lists"], how="left",
                            suffixes=("", "_ahead"))

    def _row(self, gene_rule: str, kind: str) -> "pd.Series | None":
        table = self.of_all_layers()
        rows = table[(table["gene_rule"] == gene_rule) & (table["lists"] == kind)]
        return None if rows.empty else rows.iloc[0]

    def share(self, gene_rule: str) -> tuple[float | None, str]:
        """The trained features' percentage over all layers, and how it reads beside its null."""
        row = self._row(gene_rule, FEATURES)
        return (None, "not tested") if row is None else (float(row["percentage"]), (
            f"{row['percentage']:.1f} % (relabelled: {row['lower_95']:.1f} to "
            f"{row['upper_95']:.1f} %; p = {row['p']:.2g})"))

    def ahead(self, gene_rule: str, kind: str) -> tuple[float | None, str]:
        """The percentage points by which the trained features are ahead of a kind, and how they
        read beside their null; None for a kind that was not tested."""
        row = self._row(gene_rule, kind)
        return (None, "not tested") if row is None else (float(row["difference"]), (
            f"{row['difference']:+.1f} points (relabelled: {row['lower_95_ahead']:+.1f} to "
            f"{row['upper_95_ahead']:+.1f}; p = {row['p_ahead']:.2g})"))

    def learning_shows(self, gene_rule: str, level: float) -> bool:
        """Whether the trained features are ahead of every kind of SAME_MODEL, and by more than
        relabelled genes are on average, each at the level.

        That all of them are beaten is an intersection-union test, so no correction is due. As p is
        two-sided, a lead that is unusually small for such lists has a small p as well.
        """
        rows = [self._row(gene_rule, kind) for kind in SAME_MODEL]
        return all(row is not None and row["p_ahead"] < level
                   and row["difference"] > max(0.0, row["null_mean_ahead"]) for row in rows)


def joint_study(statistics: FeatureStatistics, others: Mapping[str, FeatureStatistics],
                corpus: Corpus, profile: Profile, libraries: Sequence[GeneSets]) -> JointStudy:
    """The shares of trained features and of all other kinds beside relabelled genes."""
    kinds = {FEATURES: statistics, **others}
    shares: list[pd.DataFrame] = []
    differences: list[pd.DataFrame] = []
    for gene_rule in dict.fromkeys([profile.gene_rule, "occurrence"]):
        joint = joint_null(kinds, corpus, profile.model_copy(update={"gene_rule": gene_rule}),
                           libraries)
        for tables, table in ((shares, joint_table(joint)), (differences, difference_table(joint))):
            table.insert(0, "gene_rule", gene_rule)
            tables.append(table)
    return JointStudy(*(pd.concat(tables, ignore_index=True) for tables in (shares, differences)))
