"""What a chapter opens: cells, model, transcoders, statistics, gene sets, baselines.

    chapter = open_chapter("06_enrichment", profile, overrides)
    chapter.statistics            # made, or read, when first asked for
    chapter.table("table4", ...)  # all that `Report` shows and keeps

Each part is made at most once, when first asked for, from the parts before it, and is kept in
`results/<profile>/` by the room that makes it; a chapter run by hand makes what is missing.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from scfm_circuits.common.profile import PLANTED_CELLS, load_profile, own_results
from scfm_circuits.report.report import Report, Shown

if TYPE_CHECKING:
    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.cells.simulated import Plan
    from scfm_circuits.enrichment.gene_sets import GeneSets
    from scfm_circuits.features.statistics import FeatureStatistics
    from scfm_circuits.models.known_types import KnownTypes
    from scfm_circuits.models.small_models import TrainingCurve
    from scfm_circuits.paper.exhibits import PaperTables
    from scfm_circuits.transcoders.transcoder import Transcoders

History = list[dict[str, Any]]


def open_chapter(name: str, profile: str, overrides: Mapping[str, Any] | None = None, *,
                 exact: bool = False) -> "Chapter":
    """The chapter `name` (such as `06_enrichment`) of a profile with some fields overridden.

    exact: have the model in float32 whatever the profile says, as circuits need.
    Raises InputError naming the field, if profile or overrides cannot be used; or naming the file
    whose results stand there.
    """
    chapter = Chapter(load_profile(profile, overrides), name)
    own_results(chapter.profile, profile)
    chapter.exact = exact
    return chapter


class Chapter(Report):
    """A chapter's parts, each made when first asked for, and all that `Report` does."""

    exact = False

    @cached_property
    def paper(self) -> "PaperTables":
        """The paper's exhibits as printed."""
        from scfm_circuits.paper.exhibits import read_paper

        return read_paper()

    @cached_property
    def plan(self) -> "Plan | None":
        """The gene programs planted in simulated cells; None for cells that were measured."""
        from scfm_circuits.cells.simulated import plan_of

        return plan_of(self.profile) if self.profile.cells == PLANTED_CELLS else None

    @cached_property
    def corpus(self) -> "Corpus":
        """The cells as token sequences."""
        from scfm_circuits.cells.corpus import load_corpus

        return load_corpus(self.profile)

    @cached_property
    def held_out(self) -> np.ndarray:
        """(n,) places of the held-out cells in the corpus."""
        return np.flatnonzero(self.corpus.held_out)

    @cached_property
    def _model(self) -> tuple[Any, "TrainingCurve"]:
        from scfm_circuits.models.loading import get_model

        return get_model(self.profile, self.corpus, exact=self.exact)

    @property
    def model(self) -> Any:
        """The model that is explained (a causal language model of transformers), ready to run."""
        return self._model[0]

    @property
    def model_curve(self) -> "TrainingCurve":
        """The model's own training, where it was trained on the spot; else empty."""
        return self._model[1]

    @cached_property
    def known_types(self) -> "KnownTypes":
        """What the model knows of the cells' types: its answers for held-out cells."""
        from scfm_circuits.models.known_types import get_known_types

        return get_known_types(self.model, self.corpus, self.profile)

    def only_guesses(self) -> Shown | None:
        """A box that the model does not know the types that it is asked for; None if it does."""
        return self.warning(self.known_types.warning())

    @cached_property
    def _trained(self) -> tuple["Transcoders", History]:
        from scfm_circuits.transcoders.training.run import get_transcoders

        return get_transcoders(self.model, self.corpus, self.profile)

    @property
    def transcoders(self) -> "Transcoders":
        """The transcoders of all layers."""
        return self._trained[0]

    @property
    def history(self) -> History:
        """The transcoders' training history, a row for each measurement."""
        return self._trained[1]

    @cached_property
    def statistics(self) -> "FeatureStatistics":
        """What each feature fires on, counted over the corpus."""
        from scfm_circuits.features.statistics import get_statistics

        return get_statistics(self.model, self.transcoders, self.corpus, self.profile)

    @cached_property
    def _libraries(self) -> dict[str, "GeneSets"]:
        return {}

    def library(self, name: str) -> "GeneSets":
        """The gene-set library of that name, or the bundled one that stands in for it."""
        from scfm_circuits.enrichment.gene_sets import load_library

        if name not in self._libraries:
            self._libraries[name] = load_library(name, self.profile.gene_sets)
        return self._libraries[name]

    @property
    def libraries(self) -> list["GeneSets"]:
        """The profile's gene-set libraries, each once; one may stand in for several."""
        asked = map(self.library, self.profile.libraries)
        return list({one.content_sha256: one for one in asked}.values())

    def library_warnings(self, *names: str) -> Shown | None:
        """A box for what is wrong with these libraries, or the profile's; None if nothing is."""
        from scfm_circuits.enrichment.gene_sets import warnings_of

        return self.warning(*warnings_of(map(self.library, names or self.profile.libraries)))

    def stand_in(self, *names: str) -> bool:
        """Whether one of these libraries, or the profile's, is the bundled one: then no result of
        theirs is to stand beside the paper's."""
        return any(self.library(name).source == "bundled"
                   for name in names or self.profile.libraries)

    @cached_property
    def untrained(self) -> "FeatureStatistics":
        """Features of an untrained encoder, as many as the transcoders'."""
        from scfm_circuits.features.baselines import untrained_statistics

        return untrained_statistics(self.model, self.statistics, self.corpus, self.profile,
                                    n_features=self.transcoders.n_features)

    @cached_property
    def baselines(self) -> dict[str, "FeatureStatistics"]:
        """Features that learnt nothing, by name.

        An untrained encoder's; and, if the profile says `reinitialised_control`, those of
        transcoders trained on a model with random weights.
        """
        from scfm_circuits.features.baselines import reinitialised_statistics

        found = {"untrained encoder": self.untrained}
        if self.profile.reinitialised_control:
            found["re-initialised model"] = reinitialised_statistics(
                self.model, self.corpus, self.profile)
        return found

    @cached_property
    def directions(self) -> dict[str, "FeatureStatistics"]:
        """The model's own directions, which no dictionary learning made, by name."""
        from scfm_circuits.features.baselines import DIRECTIONS, direction_statistics

        return {kind: direction_statistics(kind, self.model, self.statistics, self.corpus,
                                           self.profile) for kind in DIRECTIONS}

    # --- numbers in the prose ---

    def percent(self, key: str, share: float | None, digits: int = 0,
                missing: str = "n/a") -> None:
        """`value` of a share between 0 and 1, which reads as a percentage, or as `missing`."""
        text = missing if share is None or np.isnan(share) else f"{100 * share:z.{digits}f} %"
        self.value(key, share, text)

    def rounded(self, key: str, number: float | None, digits: int = 0) -> None:
        """`value` of a number that reads with so many decimals and commas between thousands."""
        text = "n/a" if number is None or np.isnan(number) else f"{number:z,.{digits}f}"
        self.value(key, number, text)

    def p_value(self, key: str, p: float | None) -> None:
        """`value` of a p-value, which reads with two significant digits."""
        self.value(key, p, "n/a" if p is None or np.isnan(p) else f"{p:.2g}")
