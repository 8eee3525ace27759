"""A cell's sentence as the model read it, and above it the circuit of its call."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from scfm_circuits.report.plots.circuits import MARKERS
from scfm_circuits.report.plots.style import BLUE, ORANGE, literal

if TYPE_CHECKING:
    from scfm_circuits.circuits.circuit import Circuit, Node

COLUMNS, ON_A_PHONE = 5, 3
MOST_GENES = 80
"""Of a longer sentence the first so many genes are drawn, which are the most expressed."""
LONGEST_GENE = 12
MAX_EDGES = 45
_STEP = 1.15
"""Height of a layer of the circuit, in rows of the sentence."""

Place = tuple[float, float]


class Traced(NamedTuple):
    """A circuit and the gene of each token that it stands on, (n_pos,) symbols or None."""

    circuit: "Circuit"
    genes: Sequence[str | None]


def call_sentence(genes: Sequence[str], contributions: Mapping[str, float], answer: str,
                  traced: Traced | None = None, columns: int = COLUMNS) -> Figure:
    """A cell's sentence, its genes tinted by what they contribute to the call.

    genes: the sentence in rank order; it reads from left to right and from top to bottom.
    contributions: signed, by gene (such as `calls.gene_contributions`); the darkest tint is the
    largest size among them. answer: what the model says. traced: the circuit drawn above, with
    the edges that carry most of its target's contributions; whatever the target is, it is on top.
    columns: genes in a row, `ON_A_PHONE` for a narrow picture with letters of the same size.
    """
    shown = list(genes)[:MOST_GENES]
    rows = -(-len(shown) // columns)
    boxes = {gene: (i % columns + 0.5, -(i // columns) - 0.5) for i, gene in
             reversed(list(enumerate(shown)))}
    layers = _layers(traced.circuit) if traced else []
    top = _STEP * (len(layers) + 0.6)
    rest = f"{len(genes) - len(shown)} more genes; " if len(genes) > len(shown) else ""
    # What has no room beside the legend is below it.
    below = 0.8 if rest or columns < COLUMNS else 0.0
    figure, axis = plt.subplots(figsize=(6.4 if columns >= COLUMNS else 4.2,
                                         0.33 * (rows + top + 1.9 + below)), layout="constrained")
    axis.set(xlim=(0, columns), ylim=(-rows - 1.0 - below, top + 0.9))
    axis.axis("off")
    if traced:
        _draw_circuit(axis, traced, layers, boxes, columns, top - 0.2)
    largest = max((abs(value) for value in contributions.values()), default=0.0) or 1.0
    for gene, (x, y) in boxes.items():
        _draw_gene(axis, gene, x, y, contributions.get(gene, 0.0) / largest)
    said = literal(answer) or "(nothing)"
    axis.text(columns / 2, top + 0.45, f"the model says: {said}", ha="center", va="center",
              fontsize=14, fontweight="bold")
    for x, colour, text in ((0.05, BLUE, "speaks for it"), (1.5, ORANGE, "speaks against it")):
        axis.add_patch(plt.Rectangle((x, -rows - 0.75), 0.15, 0.45, color=colour))
        axis.text(x + 0.22, -rows - 0.52, text, va="center", fontsize=11)
    axis.text(columns - 0.05, -rows - 0.52 - below, f"{rest}highest rank first", ha="right",
              va="center", fontsize=11, color="0.35")
    return figure


def _draw_gene(axis: Axes, gene: str, x: float, y: float, share: float) -> None:
    """One gene in its box; share: its contribution over the largest, from -1 to 1."""
    colour = np.array(to_rgb(BLUE if share >= 0 else ORANGE))
    # Small contributions are seen too: the square root is spread more evenly. The darkest tint is
    # light enough for black letters.
    tint = 1 - 0.72 * (1 - colour) * abs(share) ** 0.5
    axis.add_patch(FancyBboxPatch((x - 0.46, y - 0.36), 0.92, 0.72, facecolor=tint, zorder=3,
                                  boxstyle="round,pad=0,rounding_size=0.08", edgecolor="0.75",
                                  linewidth=0.7, mutation_aspect=2.5))
    axis.text(x, y - 0.02, literal(gene, LONGEST_GENE), ha="center", va="center", zorder=4,
              fontsize=11, color="black",
              fontweight="bold" if abs(share) > 0.2 else "normal")


def _strongest(circuit: "Circuit") -> list[tuple[float, str, str, float]]:
    """Share of the target's contributions, source, target and weight of the edges drawn."""
    carried = sorted(zip(circuit.carried(), circuit.edges, strict=True),
                     key=lambda pair: -pair[0])[:MAX_EDGES]
    return [(share, edge.source, edge.target, edge.weight) for share, edge in carried]


def _level(node: "Node") -> tuple[int, int]:
    """Layers upwards; in each the heads come first."""
    return node.layer, 0 if node.kind == "head" else 1


def _layers(circuit: "Circuit") -> list[list["Node"]]:
    """The nodes drawn, bottom to top, without the target and the tokens' embeddings."""
    used = {name for _, source, target, _ in _strongest(circuit) for name in (source, target)}
    nodes = [node for node in circuit.nodes.values() if node.id in used - {circuit.target}
             and node.kind != "embedding"]
    return [[node for node in nodes if _level(node) == level]
            for level in sorted({_level(node) for node in nodes})]


def _draw_circuit(axis: Axes, traced: Traced, layers: list[list["Node"]],
                  boxes: Mapping[str, Place], columns: int, top: float) -> None:
    """The circuit between the sentence and its target, which is in the middle at height `top`."""
    circuit, influence = traced.circuit, traced.circuit.influence()
    place: dict[str, Place] = {circuit.target: (columns / 2, top)}

    def box_of(node: "Node") -> Place | None:
        gene = traced.genes[node.source]
        return boxes.get(gene) if gene else None

    for height, nodes in enumerate(layers):
        # Nodes at genes are near their column; those at the question's words are on the right.
        order = sorted(nodes, key=lambda node: ((box_of(node) or (columns, 0.0))[0], node.source))
        for x, node in zip((np.arange(len(order)) + 0.5) * columns / len(order), order,
                           strict=True):
            place[node.id] = float(x), _STEP * (height + 0.75)
            box = box_of(node)
            if node.kind == "head" and box:  # what it read
                axis.plot([x, box[0]], [place[node.id][1], box[1]], color="0.6", linewidth=0.8,
                          linestyle=":", zorder=1)
    for node in circuit.nodes.values():
        box = box_of(node)
        if node.kind == "embedding" and box:
            place[node.id] = box
    edges = _strongest(circuit)
    most = max((share for share, *_ in edges), default=1.0)
    for share, source, target, weight in reversed(edges):
        if source in place and target in place:
            axis.plot(*zip(place[source], place[target], strict=True), alpha=0.55, zorder=1,
                      color=BLUE if weight > 0 else ORANGE,
                      linewidth=0.4 + 2.6 * (share / most) ** 0.5)
    drawn = [node for nodes in layers for node in nodes] + [circuit.nodes[circuit.target]]
    for kind, (mark, colour) in MARKERS.items():
        chosen = [node for node in drawn if node.kind == kind]
        if chosen:
            x, y = zip(*(place[node.id] for node in chosen), strict=True)
            axis.scatter(x, y, marker=mark, s=[35 + 260 * influence[node.id] for node in chosen],
                         color=colour, edgecolor="white", linewidth=0.7, zorder=5)
    if layers:
        axis.text(0.02, top, "the circuit,\nlayers upwards", fontsize=10, va="center",
                  color="0.35")
