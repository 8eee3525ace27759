"""What the model knows of the cells' types: its answers for held-out cells beside two others'.

The commonest training type is what can be said without looking at the cell. A logistic regression
on the same ranks, trained on the same training cells, is what they say to a model without layers.
Where nothing is asked in words, the model's answer is the type whose place is nearest (`states`);
beside it stand the nearest by ranks alone, and that of the same model with its weights drawn anew.
"""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from torch import nn

from scfm_circuits.common.intervals import wilson_interval
from scfm_circuits.common.kept import kept_arrays
from scfm_circuits.common.randomness import generator
from scfm_circuits.models.answers import predict_answers
from scfm_circuits.models.loading import model_stamp, reinitialised_model
from scfm_circuits.models.states import (
    embeddings,
    find_states,
    get_states,
    means_by_type,
    placed_cells,
)

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile

LEVEL = 0.05
"""The model knows the types if an exact one-sided McNemar test against the commonest type has a p
below this."""
ASKED, TAUGHT = 500, 20_000
"""Held-out cells that are asked at most, drawn at random, and training cells that the regression
sees at most, evenly spaced in the corpus."""
ENOUGH = 5
"""Held-out cells of a type from which it counts in the mean over types."""
OTHER = "other words"
"""What an answer that is no type of the corpus is counted as."""
MODEL, REGRESSION, COMMONEST = "the model", "logistic regression", "the commonest type"
RANKS, REDRAWN = "nearest type by ranks alone", "the same model, weights drawn anew"

Columns = dict[str, Any]
"""Columns of a table by name."""


class Said(NamedTuple):
    """Answers for held-out cells, (n,) each: which, the model's words or nearest type, the
    regression's type; and the nearest by ranks, and for redrawn weights, or none where the model
    answers in words."""

    cells: np.ndarray
    model: np.ndarray
    regression: np.ndarray
    ranks: np.ndarray = np.zeros(0, "U1")
    redrawn: np.ndarray = np.zeros(0, "U1")


class KnownTypes(NamedTuple):
    """What `Said` amounts to."""

    accuracy: Columns
    """A row for the model, what stands beside it, and the commonest type: answers, cells, right,
    percentage with lower_95 and upper_95 (Wilson), mean_over_types (percentage, types with `ENOUGH`
    cells; where nothing is asked in words with mean_low and mean_high, 95 %), only_model and
    only_this (cells of which just one of the two is right), and p: of an exact one-sided McNemar
    test that the model is no better."""
    by_type: Columns
    """A row for each type that was asked for, in alphabetical order: cell type, training (cells),
    held_out (that were asked), right, percentage, lower_95, upper_95, regression (right),
    commonest_answer (of equally common ones the first by alphabet)."""
    confusion: Columns
    """A row for each of these types: cell type, then the cells by answer, in the same order, then
    other types of the corpus that were answered, then `OTHER`; columns without a cell are left
    out, but for the types' own."""
    commonest: str
    """The training cells' commonest type."""

    def of(self, answers: str, column: str) -> Any:
        """A number of `accuracy`, by the row's name."""
        return self.accuracy[column][self.accuracy["answers"].index(answers)]

    @property
    def knows(self) -> bool:
        """Whether the model is better than always answering the commonest type, beyond luck."""
        return bool(self.of(COMMONEST, "p") < LEVEL)

    def warning(self) -> str | None:
        """What a page must say first if the model does not know the types; else None."""
        if self.knows:
            return None
        ours, other, p = (self.of(MODEL, "percentage"), self.of(COMMONEST, "percentage"),
                          self.of(COMMONEST, "p"))
        return (f"The model does not know these types: it names {ours:.0f} % of "
                f"{self.of(MODEL, 'cells')} held-out cells correctly, and always answering "
                f"{self.commonest!r} would be right for {other:.0f} % (p = {p:.2g} that the model "
                "is no better, exact one-sided McNemar test). What this book explains is a guess.")


def get_known_types(model: nn.Module, corpus: "Corpus", profile: "Profile") -> KnownTypes:
    """`known_types` of the profile's model, from answers that are kept in its results."""
    said = kept_arrays(profile.results / "known_types.npz", model_stamp(profile, corpus),
                       lambda: ask_held_out(model, corpus, profile.seed) if corpus.has_answers
                       else place_held_out(model, corpus, profile), Said._asdict,
                       lambda stored: Said(*(stored[name] for name in Said._fields)))
    return known_types(corpus, said)


def ask_held_out(model: nn.Module, corpus: "Corpus", seed: int, most: int = ASKED) -> Said:
    """Ask the model, and a regression, for the types of held-out cells, `most` of them."""
    cells = cells_asked(corpus, seed, most)
    return Said(cells, np.array(predict_answers(model, corpus, cells), dtype=str),
                regression_answers(corpus, cells))


def place_held_out(model: nn.Module, corpus: "Corpus", profile: "Profile", most: int = ASKED
                   ) -> Said:
    """The nearest types of held-out cells, `most` of them, and what stands beside these."""
    cells, size = cells_asked(corpus, profile.seed, most), profile.forward_cells
    redrawn = reinitialised_model(model, profile.seed)  # type: ignore[arg-type]
    by_model = ((model, get_states(model, corpus, profile)),
                (redrawn, find_states(redrawn, corpus, size)))
    own, control = (states.nearest(embeddings(one, corpus, cells, size))
                    for one, states in by_model)
    training = placed_cells(corpus)
    by_ranks = means_by_type(ranks(corpus, training), corpus.labels[training])
    return Said(cells, own, regression_answers(corpus, cells),
                by_ranks.nearest(ranks(corpus, cells)), control)


def cells_asked(corpus: "Corpus", seed: int, most: int = ASKED) -> np.ndarray:
    """(n,) held-out cells that are asked, `most` at most, drawn at random."""
    held_out = np.flatnonzero(corpus.held_out)
    return np.sort(generator(seed, "cells asked for their type").permutation(held_out)[:most])


def known_types(corpus: "Corpus", said: Said) -> KnownTypes:
    """Count answers against labels."""
    truth, taught = corpus.labels[said.cells], corpus.labels[~corpus.held_out]
    commonest = commonest_text(taught)
    types, right = np.unique(truth), said.model == truth
    regression = said.regression == truth
    of_type = [truth == one for one in types]
    beside = {name: answers == truth for name, answers in (
        (RANKS, said.ranks), (REDRAWN, said.redrawn)) if len(answers)}
    accuracy = _accuracy({MODEL: right, **beside, REGRESSION: regression,
                          COMMONEST: truth == commonest}, of_type, intervals=bool(beside))
    by_type = {
        "cell type": types, "training": [int(np.sum(taught == one)) for one in types],
        "held_out": [int(one.sum()) for one in of_type],
        **_shares([right[one] for one in of_type]),
        "regression": [int(regression[one].sum()) for one in of_type],
        "commonest_answer": [commonest_text(said.model[one]) for one in of_type]}
    others = np.setdiff1d(np.intersect1d(said.model, corpus.labels), types)
    answers = np.where(np.isin(said.model, corpus.labels), said.model, OTHER)
    columns = [*types, *others, *([OTHER] if OTHER in answers else [])]
    confusion = {"cell type": types, **{
        str(answer): [int(np.sum(answers[one] == answer)) for one in of_type]
        for answer in columns}}
    return KnownTypes(accuracy, by_type, confusion, commonest)


def _accuracy(right: dict[str, np.ndarray], of_type: list[np.ndarray], intervals: bool) -> Columns:
    """`KnownTypes.accuracy`; right: by name, the model's first, which answers are right."""
    model, enough = right[MODEL], [one for one in of_type if one.sum() >= ENOUGH]
    only = [(int((model & ~one).sum()), int((one & ~model).sum())) for one in right.values()]
    means = np.array([_mean_over_types([one[cells] for cells in enough]) for one in right.values()])
    return {
        "answers": list(right), "cells": [len(one) for one in right.values()],
        **_shares(list(right.values())), "mean_over_types": means[:, 0].tolist(),
        **({"mean_low": means[:, 1].tolist(), "mean_high": means[:, 2].tolist()}
           if intervals else {}),
        "only_model": [ours for ours, _ in only], "only_this": [theirs for _, theirs in only],
        "p": [np.nan, *(mcnemar_p(*pair, "greater") for pair in only[1:])]}


def _mean_over_types(right: list[np.ndarray]) -> tuple[float, float, float]:
    """Mean percentage over types with its 95 % interval: the sides of each type's interval
    (Wilson's), squared and added (Newcombe 1998)."""
    if not right:
        return np.nan, np.nan, np.nan
    shares = np.array([one.mean() for one in right])
    ends = np.array([wilson_interval(int(one.sum()), len(one)) for one in right])
    below, above = np.sqrt(np.square(ends - shares[:, None]).sum(axis=0)) / len(right)
    mean = float(np.mean([one.mean() for one in right]))
    return 100 * mean, 100 * (mean - float(below)), 100 * (mean + float(above))


def mcnemar_p(ours: int, theirs: int, alternative: Literal["greater", "two-sided"] = "two-sided"
              ) -> float:
    """p of the exact McNemar test that two are as often right, from how many cells just one of them
    answers rightly; 1 where there is none. alternative: `greater`, that ours is right more often.
    """
    from scipy.stats import binomtest

    n = ours + theirs
    return float(binomtest(ours, n, alternative=alternative).pvalue) if n else 1.0


def _shares(right: list[np.ndarray]) -> Columns:
    """right, percentage, lower_95 and upper_95 (Wilson) of each, which has a bool for each cell."""
    found = [(int(one.sum()), len(one)) for one in right]
    intervals = [wilson_interval(*one) for one in found]
    return {"right": [k for k, _ in found], "percentage": [100 * k / n for k, n in found],
            "lower_95": [100 * low for low, _ in intervals],
            "upper_95": [100 * high for _, high in intervals]}


def commonest_text(texts: np.ndarray) -> str:
    """The commonest text; of equally common ones the first by alphabet."""
    values, counts = np.unique(texts, return_counts=True)
    return str(values[counts.argmax()])


def regression_answers(corpus: "Corpus", cells: np.ndarray) -> np.ndarray:
    """(n,) types that a multinomial logistic regression on `ranks` names.

    Trained on training cells alone; scikit-learn's, with its own penalty (l2, C = 1), in which
    nothing is random.
    """
    training = corpus.training_cells(TAUGHT)
    labels = corpus.labels[training]
    if len(np.unique(labels)) == 1:  # which scikit-learn refuses
        return np.full(len(cells), labels[0])
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    seen = ranks(corpus, training)
    used = np.unique(seen.indices)  # the penalty leaves the others at exactly 0
    with threadpool_limits(1, "blas"):  # on so short vectors more threads only wait for each other
        fitted = LogisticRegression(max_iter=1000).fit(seen[:, used], labels)
    return np.asarray(fitted.predict(ranks(corpus, cells)[:, used]), dtype=str)


def ranks(corpus: "Corpus", cells: np.ndarray) -> "csr_array":
    """(n_cells, n_genes) sparse: 1 for a sentence's first gene, falling by the same step to the
    last place that any sentence of the corpus has; 0 for a gene that is not in the sentence."""
    from scipy.sparse import csr_array

    length = int(np.max((corpus.place == 0).sum(axis=1)))
    first = corpus.place[cells] == 0
    values = (1 - (np.cumsum(first, axis=1) - 1) / length)[first]
    ends = np.concatenate([[0], np.cumsum(first.sum(axis=1))])
    return csr_array((values, corpus.gene[cells][first], ends),
                     shape=(len(cells), len(corpus.symbols)))
