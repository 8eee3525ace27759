"""What a circuit of the case may be traced from, and what such a circuit says.

1. The call (`calls`).
2. A feature of the last layer where the call is made, chosen by `call_features`: by how far it
   tells the cell's type from the others, in training cells.
3. The paper's kind: the strongest feature of the last layer at the last token. `target_elsewhere`
   says whether it is anything of this cell.

`CaseTargets` traces each in the same way: its circuit, the genes of its nodes with their terms
beside those of random genes of the sentence (`gene_nodes`), and what it keeps of its target.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from scfm_circuits import InputError
from scfm_circuits.cells.prompts import AnsweredPrompt
from scfm_circuits.circuits.calls import GeneCall
from scfm_circuits.circuits.case_study import CaseStudy
from scfm_circuits.circuits.circuit import Circuit, circuit_genes, node_table
from scfm_circuits.circuits.frozen import Frozen, freeze
from scfm_circuits.circuits.graph import Target, feature_target
from scfm_circuits.circuits.interventions import (
    Call,
    FeatureAt,
    Kept,
    held_at_means,
    kept_alone,
)
from scfm_circuits.circuits.search import limits, strongest_features, trace
from scfm_circuits.circuits.structure import features_at
from scfm_circuits.circuits.token_means import Means, prompt_kinds, study_means
from scfm_circuits.common.randomness import generator
from scfm_circuits.enrichment.background import prepare_background
from scfm_circuits.enrichment.over_representation import over_representation
from scfm_circuits.enrichment.rules import RULES, Rule
from scfm_circuits.features.unit_scores import aurocs
from scfm_circuits.models.mlp_sites import batches, device_of, mlp_sites
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile
    from scfm_circuits.enrichment.gene_sets import GeneSets

PLACE = "a feature of this place in the text"
"""What a feature is called that is the strongest at its place in most cells of all types."""
PER_TYPE, DRAWS = 20, 1_000
"""Training cells of each type that features are compared in, and held-out cells they are checked
in; draws of random gene nodes."""


# --- how special is a feature? -------------------------------------------------------------------


@torch.no_grad()
def activations_at_end(model: "PreTrainedModel", transcoders: Transcoders, corpus: "Corpus",
                       cells: np.ndarray, layer: int, place: str, forward_cells: int) -> np.ndarray:
    """(n_cells, n_features) activations of a layer where each cell's case would be read.

    place: `answer` or `query`, as the profile's `case_position`.
    """
    ends = corpus.answer_end if place == "answer" else corpus.answer_start - 1
    found = []
    for rows, tokens, mask in batches(corpus, cells, forward_cells, device_of(model)):
        # Kept tokens stand cell after cell, so a cell's own start where the earlier ones end.
        starts = np.concatenate([[0], np.cumsum(corpus.lengths[rows])[:-1]])
        chosen = torch.from_numpy(starts + ends[rows]).to(tokens.device)
        inputs = mlp_sites(model, tokens, mask).inputs[layer][chosen]
        found.append(transcoders.layer_activations(layer, inputs).cpu().numpy())
    return np.concatenate(found)


def strongest_at_end(*where: Any) -> np.ndarray:
    """(n_cells,) the most active feature of a layer, -1 if none is active; `activations_at_end`
    says where, and takes the same arguments."""
    found = activations_at_end(*where)
    return np.where(found.max(axis=1) > 0, found.argmax(axis=1), -1)


class TargetElsewhere(NamedTuple):
    """How often a feature is the strongest of its layer at the same place in other cells.

    share: of the cells; types: among the cells; same_types: among those where it is.
    """

    share: float
    types: int
    same_types: int

    @property
    def called(self) -> str:
        """What the feature is: `PLACE`, if it is the strongest in over half of the cells."""
        return PLACE if self.share > 0.5 else "not a feature of this place in most texts"


def target_elsewhere(model: "PreTrainedModel", transcoders: Transcoders, corpus: "Corpus",
                     profile: "Profile", layer: int, feature: int, most: int = 200
                     ) -> TargetElsewhere:
    """Read held-out cells, `most` at most, evenly spaced, where the profile reads its case."""
    cells = corpus.held_out_cells(most)
    same = strongest_at_end(model, transcoders, corpus, cells, layer, profile.case_position,
                            profile.forward_cells) == feature
    return TargetElsewhere(float(same.mean()), len(np.unique(corpus.labels[cells])),
                           len(np.unique(corpus.labels[cells[same]])))


def call_features(model: "PreTrainedModel", transcoders: Transcoders, corpus: "Corpus",
                  profile: "Profile", label: str) -> pd.DataFrame:
    """The last layer's features at the question's last token, the most specific to `label` first.

    In the first `PER_TYPE` training cells of every type. Columns: feature; own and others, mean
    activation in cells of the type and in those of other types (mean over types); auroc, the chance
    that a cell of the type has the higher activation of the two (ties count half) than one of
    another type, whichever that is (mean over types); held_out_auroc, the same in as many held-out
    cells, which had no say in the order (missing if there are none). Sorted by auroc, ties by the
    difference of the means. Empty if there is no other type, or no training cell of this one.
    """
    last, found = transcoders.n_layers - 1, {}
    for part, wanted in (("auroc", ~corpus.held_out), ("held_out_auroc", corpus.held_out)):
        cells = np.flatnonzero(wanted)
        turn = pd.Series(corpus.labels[cells]).groupby(corpus.labels[cells]).cumcount().to_numpy()
        cells = cells[turn < PER_TYPE]
        z = activations_at_end(model, transcoders, corpus, cells, last, "query",
                               profile.forward_cells)
        found[part] = {str(one): z[corpus.labels[cells] == one]
                       for one in np.unique(corpus.labels[cells])}
    columns = ["feature", "own", "others", "auroc", "held_out_auroc"]
    trained = found["auroc"]
    if label not in trained or len(trained) < 2:
        return pd.DataFrame(columns=columns)
    others = np.mean([z.mean(axis=0) for one, z in trained.items() if one != label], axis=0)
    table = pd.DataFrame({
        "feature": np.arange(transcoders.n_features), "own": trained[label].mean(axis=0),
        "others": others, **{part: _auroc(by_type, label) for part, by_type in found.items()}})
    order = np.lexsort((others - table["own"], -table["auroc"]))
    return table.iloc[order].reset_index(drop=True)[columns]


def _auroc(by_type: dict[str, np.ndarray], label: str) -> np.ndarray | float:
    """(n_features,) AUROC of a type's cells against each other type's, mean over types."""
    own = by_type.get(label)
    if own is None or len(by_type) < 2:
        return np.nan
    areas = []
    for other in (z for one, z in by_type.items() if one != label):
        both = np.concatenate([own, other])
        areas.append(aurocs(rankdata(both, axis=0), np.arange(len(both)) < len(own)))
    return np.mean(areas, axis=0)


# --- what do its genes say? ----------------------------------------------------------------------


class GeneNodes(NamedTuple):
    """The genes that a circuit's nodes stand on, and their terms beside those of random genes.

    genes: the most influential first. terms: `Rule.terms` of them. significant: terms below the
    profile's FDR; random_significant: mean over draws of as many random genes of the sentence; p:
    share of draws whose smallest p is as small as the circuit's (the circuit's own genes counted as
    one draw). Missing without genes or draws.
    """

    genes: list[str]
    terms: pd.DataFrame
    significant: int
    random_significant: float
    p: float

    @property
    def best_term(self) -> str | None:
        """The term of smallest p."""
        return str(self.terms["Term"].iloc[0]) if len(self.terms) else None

    @property
    def best_fdr(self) -> float:
        """Its adjusted p; missing without a term."""
        return float(self.terms["Adjusted P-value"].iloc[0]) if len(self.terms) else np.nan


def gene_nodes(genes: Sequence[str], sentence: Sequence[str], library: "GeneSets", rule: Rule,
               symbols: set[str], *, fdr: float, seed: int, draws: int = DRAWS) -> GeneNodes:
    """Test a circuit's genes, and `draws` times as many random genes of the same sentence.

    symbols: those of the corpus, for rules that need them.
    """
    terms = rule.terms(genes, library, symbols)
    significant = int((terms["Adjusted P-value"] < fdr).sum())
    if not genes or draws < 1:
        return GeneNodes(list(genes), terms, significant, np.nan, np.nan)
    rng, names = generator(seed, "random gene nodes"), np.array(sentence)
    lists = [names[np.sort(rng.permutation(len(names))[:len(genes)])].tolist()
             for _ in range(draws)]
    universe = prepare_background(library, rule.background_for(symbols))
    found = over_representation([list(genes), *lists], library, background=universe,
                                family=rule.family, alpha=fdr)
    own, random = found.min_p[0], found.min_p[1:]
    # The same p can differ in its last digit where it is summed up in another order.
    return GeneNodes(list(genes), terms, significant, float(found.n_significant[1:].mean()),
                     float((1 + (random <= own * (1 + 1e-9)).sum()) / (1 + draws)))


def marker_genes(library: "GeneSets", label: str) -> set[str]:
    """The genes of all terms in whose name the label stands, in any case of letters."""
    found: set[str] = set()
    for place, term in enumerate(library.terms):
        if label.lower() in term.lower():
            own = library.term_genes[library.term_indptr[place] : library.term_indptr[place + 1]]
            found |= {library.genes[gene] for gene in own}
    return found


# --- traced --------------------------------------------------------------------------------------


class Traced(NamedTuple):
    """One target's circuit, its nodes and genes, and what is left of the target with the circuit
    alone and without, all other features held at means of their own kind of token."""

    target: Target
    circuit: Circuit
    nodes: pd.DataFrame
    genes: GeneNodes
    own_kind: Kept

    def row(self, name: str) -> dict[str, object]:
        """Its row in a table of targets."""
        genes, kept = self.genes, self.own_kind
        return {"target": name, "nodes": len(self.nodes), "genes": len(genes.genes),
                "best_term": genes.best_term, "FDR": genes.best_fdr, "p": genes.p,
                "terms_below": genes.significant, "random_below": genes.random_significant,
                "whole": kept.whole, "circuit": kept.circuit, "no_circuit": kept.nothing}

    def values(self) -> dict[str, object]:
        """What a page says of it: counts, its genes' terms, and what is left of the target."""
        genes = self.genes
        return {"nodes": len(self.nodes), "edges": len(self.circuit.edges),
                "gene_nodes": len(genes.genes), "best_term": genes.best_term,
                "terms_below": genes.significant, "random_below": genes.random_significant,
                "whole": self.own_kind.whole, "keeps": self.own_kind.circuit,
                "nothing_keeps": self.own_kind.nothing}


class CaseTargets(NamedTuple):
    """What all targets of one text share.

    sentence: the text's genes; means: `token_means.mean_activations`; symbols: the corpus's.
    """

    model: "PreTrainedModel"
    frozen: Frozen
    case: AnsweredPrompt
    sentence: Sequence[str]
    profile: "Profile"
    means: Means
    library: "GeneSets"
    rule: Rule
    symbols: set[str]

    def call(self, call: Call) -> Traced:
        """The circuit of the call."""
        return self._of(Target(*call.start(self.frozen), 1.0), call)

    def strongest(self, n: int) -> list[int]:
        """The n features of the last layer that are most active where the case is read.

        Raises InputError if there is none.
        """
        last = len(self.frozen.weights) - 1
        found = strongest_features(self.frozen, last, self.case.position, n)
        if not found:
            raise InputError("No feature of the last layer is active at the target token; lower "
                             "`l1_coefficient` or train on more tokens.")
        return found

    def feature(self, layer: int, feature: int, position: int) -> Traced:
        """The circuit of a feature at a token."""
        return self._of(feature_target(self.frozen, layer, feature, position),
                        FeatureAt(layer, feature, position))

    def of_gene(self, asked: GeneCall, transcoders: Transcoders) -> Traced:
        """The circuit of a gene that the model is asked, in the text that it is shown."""
        frozen = freeze(self.model, transcoders, asked.prompt.encoded.tokens)
        return self._replace(frozen=frozen, case=asked.prompt).call(asked.call)

    def _of(self, target: Target, asked: FeatureAt | Call) -> Traced:
        """asked: how the model is asked for the target."""
        profile, case = self.profile, self.case
        circuit = trace(self.frozen, target.node, target.reading, **limits(profile))
        nodes = node_table(circuit, case.texts, case.genes)
        return Traced(
            target, circuit, nodes,
            gene_nodes(circuit_genes(nodes), self.sentence, self.library, self.rule, self.symbols,
                       fdr=profile.fdr, seed=profile.seed),
            kept_alone(self.model, self.frozen, features_at(circuit), asked, target.reading,
                       held_at_means(self.frozen, self.means, prompt_kinds(case))))


def case_targets(model: "PreTrainedModel", transcoders: Transcoders, corpus: "Corpus",
                 profile: "Profile", study: CaseStudy, library: "GeneSets") -> CaseTargets:
    """The case, frozen, with means over the training cells that chapter 08 takes them over."""
    return CaseTargets(
        model, freeze(model, transcoders, study.prompt.encoded.tokens), study.prompt,
        study.sentence, profile,
        study_means(model, transcoders, corpus, profile), library,
        RULES[profile.enrichment_rule], set(corpus.occurring_symbols))
