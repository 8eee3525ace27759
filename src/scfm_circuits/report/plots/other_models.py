"""The picture of the chapter on other foundation models."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scfm_circuits.circuits.origins import EVERY, GENE, PARTS, STATE
from scfm_circuits.report.plots.style import BLUE, GREY, ORANGE, legend_below, literal, panels


def parts_of_readings(parts: pd.DataFrame, case_type: str) -> Figure:
    """What the parts give to the right gene's logit in all cells, and to the distance between
    cells of the case's type and all others, a colour per model.

    parts: from `report.other_models`.
    """
    figure, (left, right) = panels(2, width=4.8, height=5.2)
    _panel(left, parts[(parts["question"] == GENE) & (parts["cell_type"] == EVERY)], "")
    left.set_xlabel("right gene's logit,\nless the mean logit")
    _panel(right, parts[(parts["question"] == STATE) & (parts["cell_type"] == case_type)], "share_")
    right.set_xlabel("share of the distance to\nother cells' mean embedding")
    right.tick_params(labelleft=False)
    legend_below(figure)
    return figure


def _panel(axis: Axes, rows: pd.DataFrame, of: str) -> None:
    columns = (("share", "share_lower", "share_upper") if of else
               ("contribution", "lower_95", "upper_95"))
    for n, (model, part) in enumerate(rows.groupby("model", sort=False)):
        own = part.set_index("part").reindex(list(PARTS))
        middle, low, high = (own[name].to_numpy(float) for name in columns)
        places = [i + 0.24 * (n - 1) for i in range(len(PARTS))]
        colour, marker = ((BLUE, "o"), (ORANGE, "s"), (GREY, "D"))[n % 3]
        axis.errorbar(middle, places, xerr=[(middle - low).clip(0), (high - middle).clip(0)],
                      fmt=marker, color=colour,
                      markersize=5, elinewidth=1.6, label=literal(str(model)))
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(PARTS)), list(PARTS))
    axis.set_ylim(len(PARTS) - 0.4, -0.6)
