"""Figures of circuits: contributions, the circuit itself, interventions, structure."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from scfm_circuits.common.randomness import generator
from scfm_circuits.report.plots.style import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    legend_below,
    literal,
    panels,
    ticks,
)

if TYPE_CHECKING:
    from scfm_circuits.circuits.circuit import Circuit, Node


def contribution_kinds(shares: Mapping[str, float], of: str = "the target's pre-activation"
                       ) -> Figure:
    """How a reading adds up, by kind of source (signed sums). of: what the reading is."""
    figure, (axis,) = panels(1, width=6.5, height=0.6 + 0.42 * len(shares))
    names, values = list(shares), list(shares.values())
    colours = [BLUE if value >= 0 else ORANGE for value in values]
    axis.barh(range(len(names)), values[::-1], color=colours[::-1])
    axis.set_yticks(range(len(names)), [literal(name) for name in names[::-1]])
    # Right of zero, as to the left of a short bar a phone's version has the names.
    for place, value in enumerate(values[::-1]):
        axis.annotate(f"{value:.3f}".replace("-", "\N{MINUS SIGN}"), (max(value, 0), place),
                      xytext=(4, 0), textcoords="offset points", va="center")
    axis.axvline(0, color="black", linewidth=0.8)
    low, high = min(0, *values), max(0, *values)
    span = (high - low) or 1.0
    axis.set(xlabel=f"contribution to {of}", xlim=(low - 0.05 * span, high + 0.4 * span))
    axis.grid(axis="y", visible=False)
    return figure


MARKERS = {"feature": ("o", GREEN), "head": ("D", PURPLE), "embedding": ("s", GREY),
           "error": ("X", RED), "logit": ("*", "black")}
"""The mark and colour of each kind of node."""
_SIDE_BY_SIDE = 12
"""Nodes that fit beside each other across a picture of a circuit."""
_NAMED = 12
"""Supernodes whose names are drawn: those with most influence."""


def circuit_picture(circuit: "Circuit", texts: Sequence[str], genes: Sequence[str | None],
                    n_layers: int, max_edges: int = 150) -> Figure:
    """Figure 5: layers upwards, tokens along, width by weight, colour by sign.

    The edges that carry most of the target's contributions are drawn, with the nodes they join;
    only tokens that carry such a node have a place. A head stands at the token it read. Nodes of
    one kind that would crowd their place are one supernode, and edges between two places are one
    line for each sign.
    """
    influence = circuit.influence()
    carried = dict(zip(circuit.edges, circuit.carried(), strict=True))
    strongest = sorted(circuit.edges, key=lambda edge: -carried[edge])[:max_edges]
    shown = {circuit.target, *(e.source for e in strongest), *(e.target for e in strongest)}
    supernodes, positions = _supernodes(
        [node for node in circuit.nodes.values() if node.id in shown], n_layers)
    place = {node.id: where for members, where in supernodes for node in members}
    figure, axis = plt.subplots(figsize=(max(6.8, 0.3 * len(positions)), 6.4),
                                constrained_layout=True)
    lines: dict[tuple[tuple[float, float], tuple[float, float], bool], float] = {}
    for edge in strongest:
        ends = place[edge.source], place[edge.target], edge.weight > 0
        lines[ends] = lines.get(ends, 0.0) + carried[edge]
    top = max(lines.values())
    for (start, end, adds), share in sorted(lines.items(), key=lambda line: line[1]):
        axis.plot(*zip(start, end, strict=True), color=BLUE if adds else ORANGE, alpha=0.55,
                  linewidth=0.5 + 6 * (share / top) ** 0.5, zorder=1)
    sizes = [sum(influence[node.id] for node in members) for members, _ in supernodes]
    for kind, (marker, colour) in MARKERS.items():
        chosen = [(where, size) for (members, where), size in zip(supernodes, sizes, strict=True)
                  if members[0].kind == kind]
        if chosen:
            axis.scatter([x for (x, _), _ in chosen], [y for (_, y), _ in chosen], marker=marker,
                         s=[26 + 220 * size for _, size in chosen], color=colour,
                         edgecolor="white", linewidth=0.6, zorder=2)
            # The legend's marks are of one size, whatever the first node's influence.
            axis.scatter([], [], s=45, marker=marker, color=colour, label=kind)
    # Inches from column to column and from layer to layer, at least, in a phone's version too.
    _write_names(axis, supernodes, sizes, len(positions), (
        (0.6 * figure.get_figwidth() - 1.2) / len(positions), 4.2 / (n_layers + 1.5)))
    for sign, colour in (("adds", BLUE), ("takes away", ORANGE)):
        axis.plot([], [], color=colour, linewidth=3, label=sign)
    labels = [f"{texts[p]} ({genes[p]})" if genes[p] else texts[p] for p in positions]
    axis.set_xticks(range(len(positions)), [literal(label) for label in labels], rotation=90,
                    fontsize=10)
    axis.set_yticks([-1, *range(n_layers)], ["embedding", *(f"layer {i}" for i in range(n_layers))])
    axis.set_xlim(-0.6, len(positions) - 0.4)
    axis.grid(axis="x", visible=False)
    legend_below(figure, 4, fontsize=11)
    return figure


def _supernodes(nodes: Sequence["Node"], n_layers: int
                ) -> tuple[list[tuple[list["Node"], tuple[float, float]]], list[int]]:
    """What is drawn as one node, where it is drawn, and the token positions in use.

    Heads stand below the MLP nodes of their layer; what shares a place is set side by side.
    """
    positions = sorted({p for node in nodes for p in (node.position, node.source)})
    column = {position: i for i, position in enumerate(positions)}
    heights = {"embedding": -1.0, "logit": float(n_layers)}
    groups: dict[tuple[int, float], dict[str, list[Node]]] = {}
    for node in nodes:
        y = heights.get(node.kind, node.layer + (-0.15 if node.kind == "head" else 0.25))
        groups.setdefault((column[node.source], y), {}).setdefault(node.kind, []).append(node)
    room = max(1, _SIDE_BY_SIDE // len(positions))
    placed = []
    for (x, y), kinds in groups.items():
        drawn = [one for members in kinds.values()
                 for one in ([members] if len(members) > room else [[node] for node in members])]
        offsets = (np.arange(len(drawn)) - (len(drawn) - 1) / 2) / max(len(drawn), 4)
        placed += [(members, (float(x + 0.8 * offset), y))
                   for members, offset in zip(drawn, offsets, strict=True)]
    return placed, positions


def _write_names(axis: Axes, supernodes: Sequence[tuple[list["Node"], tuple[float, float]]],
                 sizes: Sequence[float], columns: int, inches: tuple[float, float]) -> None:
    """The names of the most influential nodes, each above its own.

    Of names that would run into each other the most influential node has its own. inches: from
    column to column, and from layer to layer.
    """
    ranked = sorted(zip(sizes, supernodes, strict=True), key=lambda pair: -pair[0])
    taken: list[tuple[float, float, float]] = []
    for size, (members, (x, y)) in [one for one in ranked if _name(one[1][0])][:_NAMED]:
        # In the outer columns a name grows inwards, as beside the frame stand the layers.
        outer = 0 if columns == 1 else (round(x) == 0) - (round(x) == columns - 1)
        wide = 0.09 * len(_name(members))
        left, low = x * inches[0] + wide * (outer - 1) / 2, y * inches[1]
        if all(abs(low - other) > 0.18 or left > start + width or left + wide < start
               for start, other, width in taken):
            taken.append((left, low, wide))
            axis.annotate(_name(members), (x, y), textcoords="offset points", fontsize=10, zorder=3,
                          xytext=(-6 * outer, 2 + (26 + 220 * size) ** 0.5 / 2),
                          ha={0: "center", 1: "left", -1: "right"}[outer],
                          path_effects=[withStroke(linewidth=2, foreground="white")])


def _name(members: Sequence["Node"]) -> str:
    """A node's name, or how many a supernode has; nothing where its mark says all."""
    first = members[0]
    if len(members) > 1:
        return f"×{len(members)}"
    return {"feature": f"L{first.layer}.F{first.index}",
            "head": f"head {first.layer}.{first.index}"}.get(first.kind, "")


_CIRCUIT_COLOURS = {"circuit": BLUE, "same token": GREEN, "same size": GREY, "none": ORANGE}
_INTERVENTION_NAMES = {"ablation": "taken away", "doubling": "doubled", "alone": "alone",
                       "alone, own kind": "alone,\nown kind"}


def faithfulness(frame: pd.DataFrame) -> Figure:
    """What changing features does to a circuit's target, circuits beside random circuits.

    frame: a row per cell, `features` and `intervention` (`compare_interventions`); predicted,
    measured, lowest, highest as shares of the target.
    Left: predicted against measured, features taken away. Right: measured, every intervention.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True,
                                width_ratios=(4, 6))
    taken = frame[frame["intervention"] == "ablation"]
    kinds = [kind for kind in _CIRCUIT_COLOURS if (frame["features"] == kind).any()]
    for kind in kinds[::-1]:
        rows = taken[taken["features"] == kind]
        if len(rows):
            axes[0].scatter(rows["predicted"], rows["measured"], s=22, alpha=0.7,
                            color=_CIRCUIT_COLOURS[kind], zorder=2)
            axes[0].vlines(rows["predicted"], rows["lowest"], rows["highest"], linewidth=1,
                           alpha=0.5, color=_CIRCUIT_COLOURS[kind], zorder=1)
    low = min(taken["predicted"].min(), taken["lowest"].min(), -1.0)
    high = max(taken["predicted"].max(), taken["highest"].max(), 0.1)
    axes[0].plot([low, high], [low, high], color="black", linewidth=0.8, linestyle=":")
    axes[0].set(xlabel="predicted change / target", ylabel="measured change / target",
                title="taken away")
    # Own jitter: seaborn's comes from the global generator and would differ from run to run.
    jitter = generator(0, "jitter of points")
    for place, name in enumerate(_INTERVENTION_NAMES):
        for offset, kind in enumerate(kinds):
            values = frame.loc[(frame["features"] == kind) & (frame["intervention"] == name),
                               "measured"]
            x = place + 0.2 * (offset - (len(kinds) - 1) / 2)
            axes[1].scatter(x + jitter.uniform(-0.05, 0.05, len(values)), values, s=16, alpha=0.7,
                            color=_CIRCUIT_COLOURS[kind])
            if len(values):
                axes[1].hlines(values.median(), x - 0.08, x + 0.08, color="black", linewidth=1.5)
    axes[1].set_xticks(range(len(_INTERVENTION_NAMES)), list(_INTERVENTION_NAMES.values()))
    axes[1].axhline(0, color="black", linewidth=0.8)
    axes[1].set(ylabel="measured change / target", title="every intervention")
    axes[1].grid(axis="x", visible=False)
    labels = {"circuit": "the circuit", "same token": "others at the same tokens",
              "same size": "others of the same size", "none": "no feature (all at their means)"}
    for kind in kinds:
        axes[0].scatter([], [], s=30, color=_CIRCUIT_COLOURS[kind], label=labels[kind])
    legend_below(figure, len(kinds))
    return figure


def predictions(effects: pd.DataFrame, singles: pd.DataFrame) -> Figure:
    """Measured against predicted changes of circuits' targets: features taken away, and doubled.

    effects, singles: as `studies.CircuitStudy` has them; changes as shares of the target.
    """
    figure, axes = panels(2, width=4.8, height=4)
    for axis, (name, title) in zip(axes, list(_INTERVENTION_NAMES.items())[:2], strict=True):
        own = effects[(effects["features"] == "circuit") & (effects["intervention"] == name)]
        each = singles[singles["intervention"] == name]
        axis.scatter(each["predicted"], each["measured"], s=9, alpha=0.4, color=ORANGE,
                     label="one feature at a time")
        axis.scatter(own["predicted"], own["measured"], s=24, alpha=0.7, color=BLUE,
                     label="all features of a circuit")
        both = pd.concat([own["predicted"], each["predicted"]])
        ends = [min(both.min(), 0), max(both.max(), 0)]
        axis.plot(ends, ends, color="black", linewidth=0.8, linestyle=":")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel="predicted change / target", ylabel="measured change / target", title=title)
    legend_below(figure, 2)
    return figure


_CHOICE_COLOURS = {"influence": BLUE, "gradient": GREEN, "activation": PURPLE, "random": GREY}


def task_curves(curve: pd.DataFrame) -> Figure:
    """Right answers kept against the share of features kept, a panel for each place of the others.

    curve: `task_curves.curve`. Bands are its intervals over cells; random draws are lines of their
    own. Lines across: what all features and what none keep.
    """
    where = [one for one in dict.fromkeys(curve["others"]) if one]
    figure, axes = panels(len(where), width=4.8, height=4)
    for axis, others in zip(axes, where, strict=True):
        rows = curve[curve["others"] == others]
        for style, name in (("--", "all features"), (":", "no feature")):
            kept = rows.loc[rows["chosen"] == name, "kept"].mean()
            axis.axhline(kept, color="black", linestyle=style, linewidth=1, label=name)
        for name, colour in _CHOICE_COLOURS.items():
            for draw, some in rows[rows["chosen"] == name].groupby("draw"):
                axis.plot(some["share"], some["kept"], color=colour, marker="o", markersize=4,
                          label=None if draw else f"chosen by {name}" if name != "random"
                          else "random, firing as often")
                if not draw:
                    axis.fill_between(some["share"], some["kept_lower_95"], some["kept_upper_95"],
                                      color=colour, alpha=0.12, linewidth=0)
        shares = sorted(set(rows.loc[rows["chosen"].isin(list(_CHOICE_COLOURS)), "share"]))
        # A scale without a point (no answer was right) has no limits of its own.
        axis.set_xlim(min(shares) / 1.3, max(shares) * 1.3)
        axis.set_xscale("log", base=2)
        axis.set_xticks(shares, [f"1/{round(1 / share)}" for share in shares])
        axis.set(title=f"others at {others}", xlabel="share of the firing features kept",
                 ylabel="% of the right answers kept", ylim=(0, 104))
    legend_below(figure, 3)
    return figure


def circuit_flow(flow: pd.DataFrame) -> Figure:
    """What writes the targets' values, layer by layer, as mean shares over cells.

    flow: one row per cell, kind and layer (`structure.flow_table`). Left: written straight to the
    target. Right: passing through the circuit's nodes.
    """
    figure, axes = panels(2, width=4.8, height=4)
    colours = {"attention": PURPLE, "features": GREEN, "errors": RED, "embedding": GREY,
               "biases": BROWN}
    n_cells = flow["cell"].nunique()
    n_layers = int(flow["layer"].max()) + 1
    for axis, column, title in ((axes[0], "share", "written straight to the target"),
                                (axes[1], "passing", "passing through the circuit")):
        means = flow.groupby(["kind", "layer"])[column].sum() / n_cells
        bottom = np.zeros(n_layers)
        for kind in ("attention", "features", "errors"):
            values = np.array([means.get((kind, layer), 0.0) for layer in range(n_layers)])
            axis.bar(np.arange(n_layers), 100 * values, bottom=100 * bottom, label=kind,
                     color=colours[kind])
            bottom += values
        # A path ends at a bias: none passes through.
        aside = ["embedding"] if column == "passing" else ["embedding", "biases"]
        for place, kind in zip((-2, -3), aside, strict=False):
            axis.bar(place, 100 * means.get((kind, -1), 0.0), color=colours[kind])
        axis.set_xticks([*range(-2, -2 - len(aside), -1), *ticks(n_layers)],
                        [*aside, *map(str, ticks(n_layers))])
        axis.tick_params(axis="x", labelsize=9)
        for label in axis.get_xticklabels()[: len(aside)]:
            label.set_rotation(90)
        axis.set(title=title, xlabel="layer", xlim=(-3.6, n_layers - 0.4))
        axis.grid(axis="x", visible=False)
    axes[0].set_ylabel("% of the target's contributions")
    legend_below(figure, 3)
    return figure


def circuit_overlap(overlap: np.ndarray, labels: Sequence[str]) -> Figure:
    """Jaccard index of every pair of circuits' features, cells in the order given.

    overlap: (n, n); labels: (n,) the cells' types, equal ones side by side, which are boxed.
    """
    n = len(labels)
    figure, axis = plt.subplots(figsize=(3.5 + 0.2 * n, 2.2 + 0.2 * n), constrained_layout=True)
    shown = np.where(np.eye(n, dtype=bool), np.nan, overlap)
    image = axis.imshow(shown, cmap="viridis", vmin=0, vmax=max(np.nanmax(shown, initial=0), 0.01))
    starts = [i for i in range(n) if i == 0 or labels[i] != labels[i - 1]]
    ends = [*starts[1:], n]
    for start, end in zip(starts, ends, strict=True):
        axis.add_patch(plt.Rectangle((start - 0.5, start - 0.5), end - start, end - start,
                                     fill=False, edgecolor=ORANGE, linewidth=2, clip_on=False))
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    names = [literal(labels[start]) for start in starts]
    axis.set_xticks(middles, names, rotation=90, fontsize=9)
    axis.set_yticks(middles, names, fontsize=9)
    axis.grid(visible=False)
    figure.colorbar(image, ax=axis, label="shared features (Jaccard index)", shrink=0.8)
    return figure


def planted_recovery(summary: pd.DataFrame) -> Figure:
    """Planted genes among as many of a circuit's most influential genes as are planted, by cell
    type; one panel per target. summary: `planted_genes.recovery_summary`."""
    targets = list(summary["target"].unique())
    figure, axes = panels(len(targets), width=4.8)
    marks = {"top_share_random": ("random", "|", GREY),
             "top_share_most_expressed": ("most expressed", "s", ORANGE),
             "top_share": ("circuit", "o", BLUE)}
    for ax, target in zip(axes, targets, strict=True):
        rows = summary[summary["target"] == target].iloc[::-1]
        places = np.arange(len(rows))
        for column, (label, mark, colour) in marks.items():
            ax.scatter(100 * rows[column], places, marker=mark, color=colour, label=label, zorder=3,
                       s=110 if mark == "|" else 55 if mark == "s" else 22)
        ax.set_yticks(places, [literal(name) for name in rows["cell_type"]])
        ax.grid(axis="y", color="0.9")
        ax.set(xlim=(0, 100), title=f"circuits of the {literal(target)}",
               xlabel="planted for the cell's type, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def knock_outs(summary: pd.DataFrame, circuits: Sequence[str]) -> Figure:
    """How well each score orders the genes by what taking them out does.

    summary: `knock_out.summarised`; circuits: the scores that a circuit gives, in blue. Points are
    means over cells with their 95 % intervals, the grey band what shuffled genes reach.
    """
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 0.9 + 0.42 * len(summary)), sharey=True,
                                constrained_layout=True)
    places = np.arange(len(summary))[::-1]
    colours = [BLUE if name in circuits else ORANGE for name in summary["score"]]
    titles = {"spearman": "rank correlation, with signs", "spearman_size": "of sizes",
              "overlap": "shared among the largest"}
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        low, high = (summary[f"{measure}_null_{end}"] for end in ("low", "high"))
        axis.axvspan(low.min(), high.max(), color="0.85", zorder=0)
        axis.hlines(places, summary[f"{measure}_low"], summary[f"{measure}_high"], color=colours,
                    linewidth=2)
        axis.scatter(summary[measure], places, color=colours, s=36, zorder=3)
        axis.set(title=title, xlabel="mean over cells")
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(places, [literal(what) for what in summary["what"]])
    return figure


def known_ranks(genes: pd.DataFrame, summary: pd.DataFrame, circuits: Sequence[str],
                measured: Sequence[str]) -> Figure:
    """Where known genes stand among all, way by way; the first rank is the best.

    genes, summary: of `known_response.KnownRanks`; circuits, measured: ways drawn in blue and in
    black, all others in orange. Small points are genes, the large one their median, the grey bar
    the middle 95 % of medians of random genes as frequent.
    """
    figure, axis = plt.subplots(figsize=(9.0, 1.0 + 0.42 * len(summary)), constrained_layout=True)
    rows = summary.iloc[::-1]
    for place, (_, row) in enumerate(rows.iterrows()):
        colour = ("0.1" if row["by"] in measured else BLUE if row["by"] in circuits else ORANGE)
        axis.hlines(place, row["null_low"], row["null_high"], color="0.85", linewidth=9, zorder=0)
        own = genes.loc[genes["by"] == row["by"], "rank"]
        axis.scatter(own, [place] * len(own), color=colour, s=14, alpha=0.6, zorder=2)
        axis.scatter([row["median_rank"]], [place], color=colour, s=60, zorder=3)
    axis.set_xscale("log")
    axis.set(xlim=(0.8, 1.3 * float(summary["of"].max())), xlabel="rank among all genes")
    axis.set_yticks(range(len(rows)), [literal(what) for what in rows["what"]])
    axis.grid(axis="y", visible=False)
    return figure
