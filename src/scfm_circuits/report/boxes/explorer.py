"""What the explorer of circuits shows: several circuits, and what their features fire on."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scfm_circuits.circuits.circuit import Circuit
from scfm_circuits.circuits.view import Detail, circuit_view, feature_details
from scfm_circuits.report.boxes.activity import Activity, FeaturePlace, contexts_at, read_activity
from scfm_circuits.report.boxes.circuit import Choice

if TYPE_CHECKING:
    from scfm_circuits.circuits.calls import Calls
    from scfm_circuits.enrichment.gene_sets import GeneSets
    from scfm_circuits.report.chapter import Chapter
    from scfm_circuits.report.report import Shown
    from scfm_circuits.transcoders.transcoder import Transcoders

CONTEXTS = 3
"""Strongest contexts of a feature, each from another cell."""
MOST_CELLS, TRIED = 5, 10
"""Further cells whose calls are traced, each of another type; held-out cells of a type asked."""


class Explored(NamedTuple):
    """A circuit to choose in the explorer.

    name: of its files; title: in the list; about: one sentence; texts, genes: (n_pos,) of the
    prompt; target: what the target is called, or nothing.
    """

    name: str
    title: str
    about: str
    circuit: Circuit
    texts: Sequence[str]
    genes: Sequence[str | None]
    target: str = ""


def further_cells(calls: "Calls", but: str) -> list[int]:
    """Cells of the commonest types whose calls the model gets right.

    The rule: of each type other than `but`, the first of its first `TRIED` held-out cells that the
    model names rightly; the `MOST_CELLS` types with most cells.
    """
    corpus = calls.corpus
    types, counts = np.unique(corpus.labels, return_counts=True)
    tried = {str(name): np.flatnonzero(corpus.held_out & (corpus.labels == name))[:TRIED]
             for name in types[np.argsort(-counts, kind="stable")] if name != but}
    cells = np.concatenate([*tried.values(), np.zeros(0, np.int64)]).astype(np.int64)
    if not len(cells):
        return []
    right = set(cells[calls.said(cells) == corpus.labels[cells]].tolist())
    firsts = ([cell for cell in own.tolist() if cell in right][:1] for own in tried.values())
    return [cell for first in firsts for cell in first][:MOST_CELLS]


def further_calls(calls: "Calls", transcoders: "Transcoders", but: str) -> list[Explored]:
    """The circuits of the calls of `further_cells`, traced as the case's own call is.

    Writes their files beside the case's (`exports.save_both`).
    """
    from scfm_circuits.circuits.calls import trace_call
    from scfm_circuits.circuits.exports import Output, save_both
    from scfm_circuits.circuits.frozen import freeze

    corpus, profile, found = calls.corpus, calls.profile, []
    for place, cell in enumerate(further_cells(calls, but), start=1):
        label, prompt = str(corpus.labels[cell]), calls.prompt(cell)
        call = calls.call(prompt, label)
        frozen = freeze(calls.model, transcoders, prompt.encoded.tokens)
        circuit = trace_call(frozen, call, profile)
        save_both(profile.results, f"call_{place}", circuit, prompt.texts, prompt.genes,
                  slug=f"{profile.name}-call-{place}", scan=f"scfm-{profile.name}",
                  outputs={circuit.target: Output(label, calls.probability(frozen, call))})
        found.append(Explored(
            f"call_{place}", f"{label}: the call of another cell",
            f"Cell {corpus.cell_ids[cell]}, the first held-out cell of type {label} that "
            f"{calls.one_named}: what led to that call.",
            circuit, prompt.texts, prompt.genes, f"call: {label}"))
    return found


def explore(chapter: "Chapter", circuits: Sequence[Explored], library: "GeneSets", caption: str
            ) -> "Shown":
    """The explorer of some circuits, the first of which is shown, with what features fire on."""
    activity = _activity(chapter)
    features = sorted({(node.layer, node.index) for one in circuits
                       for node in one.circuit.nodes.values() if node.kind == "feature"})
    contexts = strongest_contexts(chapter, features)
    choices = []
    for one in circuits:
        details = feature_details(one.circuit, chapter.statistics, chapter.corpus, chapter.profile,
                                  library)
        for name, detail in details.items():
            node = one.circuit.nodes[name]
            detail["contexts"] = contexts[node.layer, node.index]
            detail["types"] = activity.of(node.layer, node.index)
        if one.target:
            details[one.circuit.target] = {**details.get(one.circuit.target, Detail()),
                                           "label": one.target}
        choices.append(Choice(one.name, one.title, circuit_view(
            one.circuit, one.texts, one.genes, details, about=one.about, types_note=activity.note)))
    return chapter.circuit(*choices, caption=caption)


@lru_cache(maxsize=1)
def _activity(chapter: "Chapter") -> Activity:
    """By cell type alone; a chapter shows several explorers."""
    return read_activity(chapter.model, chapter.transcoders, chapter.statistics, chapter.corpus,
                         chapter.profile, samples=False)


def strongest_contexts(chapter: "Chapter", features: Sequence[tuple[int, int]]
                       ) -> dict[tuple[int, int], list[Any]]:
    """The strongest contexts of some features, by layer and index."""
    statistics = chapter.statistics
    places: list[FeaturePlace] = [
        (layer, feature, int(cell), int(position)) for layer, feature in features
        for cell, position in zip(statistics.context_cell[layer, feature, :CONTEXTS],
                                  statistics.context_position[layer, feature, :CONTEXTS],
                                  strict=True) if cell >= 0]
    read = contexts_at(chapter.model, chapter.transcoders, chapter.corpus, places,
                       chapter.profile.forward_cells)
    found: dict[tuple[int, int], list[Any]] = {key: [] for key in features}
    for (layer, feature, *_), context in zip(places, read, strict=True):
        found[layer, feature].append(context)
    return found
