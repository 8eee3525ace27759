"""Are the genes on which a circuit's nodes stand those planted for the cell's type?

Only for simulated cells, where the genes of every program are known. Beside the circuits stand
random genes of the same prompt (hypergeometric) and the prompt's most expressed genes, which are
there without any circuit.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.cells.prompts import AnsweredPrompt, answered_prompt
from scfm_circuits.cells.simulated import Plan
from scfm_circuits.circuits.attribution import Reading
from scfm_circuits.circuits.circuit import Node, node_table
from scfm_circuits.circuits.contrast import contrast_of
from scfm_circuits.circuits.frozen import Frozen, freeze
from scfm_circuits.circuits.search import feature_start, limits, strongest_features, trace
from scfm_circuits.common.profile import Profile
from scfm_circuits.common.randomness import generator
from scfm_circuits.enrichment.significance import percent, ratio
from scfm_circuits.models.answers import predict_answers
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM

ASKED = 20
"""Held-out cells of a type that are asked, at most."""

# --- circuits ------------------------------------------------------------------------------------


def named_right(model: "GPTNeoXForCausalLM", corpus: Corpus, n: int) -> list[int]:
    """Of each cell type the first n held-out cells that the model names right, of the first
    `ASKED` of that type."""
    chosen: list[int] = []
    for label in np.unique(corpus.labels[corpus.held_out]):
        cells = np.flatnonzero(corpus.held_out & (corpus.labels == label))[:ASKED]
        answers = np.array(predict_answers(model, corpus, cells))
        chosen += cells[answers == label][:n].tolist()
    return chosen


def circuit_gene_table(model: "GPTNeoXForCausalLM", transcoders: Transcoders, corpus: Corpus,
                       cells: Sequence[int], plan: Plan, profile: Profile) -> pd.DataFrame:
    """Every gene of the cells' prompts, and what the circuits of both targets make of it.

    Columns: cell, cell_type, target (`feature`: the last layer's strongest where the case study
    reads its own; `call`: the label's contrast, see `contrast`), gene, rank (in the prompt, from
    1), role (what the gene is to the type, `Plan.role`), nodes (on its tokens), influence (their
    sum; 0 without a node). A cell in which no feature of the last layer is active has no circuit
    of that target.

    Raises:
        InputError: no cells.
    """
    if not len(cells):
        raise InputError("No held-out cell is named right by the model, so no circuit can be set "
                         "against what was planted; train for more steps (`model_steps`).")
    frames = []
    for cell in cells:
        label = str(corpus.labels[cell])
        case = answered_prompt(corpus, profile, int(cell), label)
        frozen = freeze(model, transcoders, case.encoded.tokens)
        genes = corpus.genes_of(cell)
        for target, start in _starts(frozen, corpus, case).items():
            circuit = trace(frozen, *start, **limits(profile))
            nodes = node_table(circuit, case.texts, case.genes)
            sums = nodes.groupby("gene")["influence"].agg(["size", "sum"]).reindex(genes).fillna(0)
            frames.append(pd.DataFrame({
                "cell": str(corpus.cell_ids[cell]), "cell_type": label, "target": target,
                "gene": genes, "rank": np.arange(1, len(genes) + 1),
                "role": [plan.role(gene, label) for gene in genes],
                "nodes": sums["size"].to_numpy(int), "influence": sums["sum"].to_numpy()}))
    return pd.concat(frames, ignore_index=True)


def _starts(frozen: Frozen, corpus: Corpus, case: AnsweredPrompt
            ) -> dict[str, tuple[Node, Reading]]:
    """By target the node at which a circuit ends, and its reading."""
    last, position = len(frozen.weights) - 1, case.position
    starts = {}
    for feature in strongest_features(frozen, last, position, 1):
        starts["feature"] = feature_start(frozen, last, feature, position)
    return {**starts, "call": contrast_of(corpus, case).start(frozen)}


def recovery_table(genes: pd.DataFrame) -> pd.DataFrame:
    """One row per circuit of `circuit_gene_table`: how many of its genes were planted for the type.

    Columns: cell, cell_type, target; prompt_genes, planted (of them), circuit_genes, found (planted
    genes of the circuit); precision = found / circuit_genes, recall = found / planted; what as many
    random genes of the prompt have on average (random_precision, random_recall) with p, the share
    of such draws with at least as many planted genes; precision_most_expressed, of as many of the
    prompt's first genes. A circuit may name most genes of its prompt, so the order counts, too:
    top_found is the number of planted genes among as many of the most influential genes as are
    planted, top_share its share of them (precision and recall at once), with top_p and
    top_share_most_expressed as above. A share is missing where there is nothing to divide by.
    """
    from scipy.stats import hypergeom

    rows = []
    for key, one in genes.groupby(["cell", "cell_type", "target"], sort=False):
        one = one.sort_values("rank")
        planted, inside = (one["role"] == "own").to_numpy(), (one["nodes"] > 0).to_numpy()
        n, k, drawn = len(one), int(planted.sum()), int(inside.sum())
        # Genes without a node cannot be told apart: they are not in the ranking at all.
        order = np.argsort(-one["influence"].to_numpy(), kind="stable")
        order = order[inside[order]][:k]
        found, top = int((planted & inside).sum()), int(planted[order].sum())
        rows.append((
            *key, n, k, drawn, found, ratio(found, drawn), ratio(found, k), k / n, drawn / n,
            float(hypergeom.sf(found - 1, n, k, drawn)), ratio(planted[:drawn].sum(), drawn),
            top, ratio(top, k), float(hypergeom.sf(top - 1, n, k, len(order))),
            ratio(planted[:k].sum(), k)))
    return pd.DataFrame(rows, columns=[
        "cell", "cell_type", "target", "prompt_genes", "planted", "circuit_genes", "found",
        "precision", "recall", "random_precision", "random_recall", "p", "precision_most_expressed",
        "top_found", "top_share", "top_p", "top_share_most_expressed"])


def recovery_summary(table: pd.DataFrame, seed: int, draws: int = 10_000) -> pd.DataFrame:
    """`recovery_table` by target and cell type, and over all types: sums before shares.

    Columns: target, cell_type, circuits, and as in `recovery_table`; p and top_p are the share of
    draws (seeded) in which random genes of the same prompts, as many for each circuit, have at
    least as many planted genes in all. They treat circuits as given one by one: that circuits of
    one model are alike is no part of the null.
    """
    rng = generator(seed, "random genes of a prompt")
    rows = []
    for target, circuits in table.groupby("target", sort=False):
        for label in [*circuits["cell_type"].unique(), "all types"]:
            part = circuits if label == "all types" else circuits[circuits["cell_type"] == label]
            n, k = part["prompt_genes"].to_numpy(), part["planted"].to_numpy()
            drawn, found = part["circuit_genes"].to_numpy(), part["found"].to_numpy()
            named = np.minimum(k, drawn)
            rows.append((
                target, label, len(part), ratio(found.sum(), drawn.sum()),
                ratio(found.sum(), k.sum()), ratio((k * drawn / n).sum(), drawn.sum()),
                ratio((k * drawn / n).sum(), k.sum()),
                _random_as_good(n, k, drawn, found.sum(), rng, draws),
                ratio((part["precision_most_expressed"] * drawn).sum(), drawn.sum()),
                ratio(part["top_found"].sum(), k.sum()), ratio((k * named / n).sum(), k.sum()),
                _random_as_good(n, k, named, part["top_found"].sum(), rng, draws),
                ratio((part["top_share_most_expressed"] * k).sum(), k.sum())))
    return pd.DataFrame(rows, columns=[
        "target", "cell_type", "circuits", "precision", "recall", "random_precision",
        "random_recall", "p", "precision_most_expressed", "top_share", "top_share_random", "top_p",
        "top_share_most_expressed"])


def _random_as_good(n: np.ndarray, k: np.ndarray, drawn: np.ndarray, found: float,
                    rng: np.random.Generator, draws: int) -> float:
    sums = rng.hypergeometric(k, n - k, drawn, (draws, len(n))).sum(axis=1)
    return float((1 + (sums >= found).sum()) / (1 + draws))


def role_table(genes: pd.DataFrame) -> pd.DataFrame:
    """What the genes of prompts and circuits are to the cell's type, by target and role.

    Columns: target, role, prompt_percent (of all prompt genes), circuit_percent (of all circuit
    genes), influence_percent (of what all genes of the circuits carry).
    """
    rows = []
    for target, part in genes.groupby("target", sort=False):
        inside = part[part["nodes"] > 0]
        for role in ("own", "shared", "other", "state", "background"):
            own = inside[inside["role"] == role]
            rows.append((target, role, 100 * (part["role"] == role).mean(),
                         100 * ratio(len(own), len(inside)),
                         100 * ratio(own["influence"].sum(), inside["influence"].sum())))
    return pd.DataFrame(rows, columns=["target", "role", "prompt_percent", "circuit_percent",
                                       "influence_percent"])


# --- all of it -----------------------------------------------------------------------------------


class KnownTruth(NamedTuple):
    """What circuits find of what was planted."""

    genes: pd.DataFrame
    """`circuit_gene_table` of up to five cells of each type that the model names right."""
    circuits: pd.DataFrame
    """`recovery_table`: a row per circuit."""
    summary: pd.DataFrame
    """`recovery_summary`: by target and cell type, and over all types."""
    roles: pd.DataFrame
    """`role_table`."""

    def over_all_types(self) -> dict[str, dict[str, float]]:
        """By target the row of `summary` over all types, and own, shared, background: shares of the
        influence on genes of these roles."""
        every = self.summary[self.summary["cell_type"] == "all types"].set_index("target")
        influence = self.roles.pivot(index="target", columns="role", values="influence_percent")
        shares = influence[["own", "shared", "background"]] / 100
        rows = every.drop(columns="cell_type").join(shares)
        return {str(target): {str(name): float(value) for name, value in row.items()}
                for target, row in rows.iterrows()}

    def words(self) -> dict[str, dict[str, str]]:
        """`over_all_types` for a page: shares in percent, p-values with two digits."""
        return {target: {
            name: f"{value:.2g}" if name in ("p", "top_p") else f"{value:.0f}"
            if name == "circuits" else percent(value) for name, value in row.items()}
            for target, row in self.over_all_types().items()}


def known_truth(model: "GPTNeoXForCausalLM", transcoders: Transcoders, corpus: Corpus, plan: Plan,
                profile: Profile) -> KnownTruth:
    """Trace cells of every type, and set their circuits' genes against what was planted.

    Raises:
        InputError: the model names no held-out cell right.
    """
    genes = circuit_gene_table(model, transcoders, corpus, named_right(model, corpus, n=5), plan,
                               profile)
    circuits = recovery_table(genes)
    return KnownTruth(genes, circuits, recovery_summary(circuits, profile.seed), role_table(genes))
