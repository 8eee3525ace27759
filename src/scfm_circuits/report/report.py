"""What a notebook hands to the book: tables, figures and numbers, each shown and kept as a file.

A chapter makes one `Report` and shows everything through it, so that what the page says and what
stands under `results/<profile>/` cannot differ. Text in tables may come from strangers (gene-set
files, labels, profiles) and is escaped.
"""

import html
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfm_circuits import InputError
from scfm_circuits.common.files import atomic_path, write_atomic, write_json
from scfm_circuits.common.profile import Profile
from scfm_circuits.report.tables import Grouped, as_code, browsable, number, plain, table_bundle

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from scfm_circuits.report.boxes.circuit import Choice

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Shown:
    """Something IPython displays from a ready-made MIME bundle."""

    def __init__(self, bundle: Mapping[str, Any], metadata: Mapping[str, Any] | None = None):
        self.bundle = dict(bundle)
        self.metadata = dict(metadata or {})

    def _repr_mimebundle_(self, **_: object) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.bundle, self.metadata

    def __repr__(self) -> str:
        return str(self.bundle.get("text/plain", ""))


class Report:
    """One chapter's tables, figures and numbers, under the profile's results folder."""

    def __init__(self, profile: Profile, chapter: str) -> None:
        """profile: the run. chapter: the notebook's name, such as `03_validation`."""
        self.profile = profile
        self.chapter = _checked_name(chapter, "chapter")
        self._values: dict[str, Any] = {}

    def table(
        self, name: str, frame: "pd.DataFrame", *,
        caption: str | None = None, rows: int | None = None, digits: int = 4,
        columns: Mapping[str, str] | None = None,
    ) -> Shown:
        """Write `tables/<name>.csv` in full and show at most `rows` rows of it.

        digits: significant digits of a floating-point number on the page; the file has ten.
        columns: those that the page shows, in this order, with what stands over each; by default
        all, as `headings` has them. Raises InputError for two columns of one name.
        """
        path, shown = self._csv(name, frame), _chosen(frame, columns)
        write_atomic(path, _csv_text(frame))
        return Shown(table_bundle(shown, caption, rows, digits, path))

    def browse(
        self, name: str, frame: "pd.DataFrame", *,
        caption: str | None = None, rows: int = 25, digits: int = 4,
        links: Mapping[str, str] | None = None, grouped: Grouped | None = None,
    ) -> Shown:
        """Write `tables/<name>.csv` in full and show a table to search, sort, filter and page.

        Without the book's script (in JupyterLab, say) it is the table of the first `rows` rows.
        Beside the CSV, `tables/<name>.js` hands all rows to the script.

        links: for a column, the address behind its texts. Other columns' texts are filled in by
        name, as in `{"best_term": "https://amigo.geneontology.org/amigo/term/{go_id}"}`; a row
        that lacks one of them has no link. grouped: headings between the rows, and what is folded.

        Raises InputError for two columns of one name.
        """
        path = self._csv(name, frame)
        bundle, script = browsable(frame, caption, rows, digits, path, links, grouped)
        write_atomic(path, _csv_text(frame))
        write_atomic(path.with_suffix(".js"), script)
        return Shown(bundle)

    def _csv(self, name: str, frame: "pd.DataFrame") -> Path:
        twice = frame.columns[frame.columns.duplicated()]
        if len(twice):
            raise InputError(f"The table {name} has two columns {twice[0]!r}; rename one of them.")
        return self.profile.results / "tables" / f"{_checked_name(name, 'table')}.csv"

    def show(
        self, frame: "pd.DataFrame", *,
        caption: str | None = None, rows: int | None = None, digits: int = 4,
        columns: Mapping[str, str] | None = None,
    ) -> Shown:
        """Show a table in the same way without writing a file."""
        return Shown(table_bundle(_chosen(frame, columns), caption, rows, digits, None))

    def figure(self, name: str, figure: "Figure", phone: "Figure | None" = None) -> Shown:
        """Write `figures/<name>.png` and `.svg`, the same bytes on every run, and show the PNG.

        Their ground is transparent. Of a wide figure `figures/narrow/<name>.png` is a version for
        phones, which the page takes there: `phone`, or what `style.narrow` makes of the figure. The
        page has its caption and alternative text from the cell's `mystnb` metadata.
        """
        import matplotlib as mpl
        import matplotlib.pyplot as plt

        from scfm_circuits.report.plots.style import narrow

        folder = self.profile.results / "figures"
        _checked_name(name, "figure")
        undated: dict[str, dict[str, Any]] = {".png": {"Software": None}, ".svg": {"Date": None}}

        def save(path: Path, drawn: "Figure") -> None:
            with atomic_path(path) as part, mpl.rc_context({"svg.hashsalt": name}):
                drawn.savefig(part, dpi=200, bbox_inches="tight", transparent=True,
                               metadata=undated[path.suffix])

        for suffix in undated:
            save(folder / f"{name}{suffix}", figure)
        if phone is not None or narrow(figure):
            save(folder / "narrow" / f"{name}.png", phone or figure)
        else:  # of an earlier run
            (folder / "narrow" / f"{name}.png").unlink(missing_ok=True)
        for one in (figure, phone):
            if one is not None:
                plt.close(one)  # else the notebook would show it a second time
        png = (folder / f"{name}.png").read_bytes()
        # A PNG's header holds its width in pixels; at 200 dots per inch, half of it is the natural
        # width on a screen.
        width = int.from_bytes(png[16:20], "big") // 2
        return Shown(
            {"image/png": png, "text/plain": f"<Figure {name}>"}, {"image/png": {"width": width}}
        )

    def circuit(self, *choices: "Choice", caption: str | None = None) -> Shown:
        """Write `circuits/<name>.js` of each and show them as a figure to explore, the first first.

        The page links to `circuits/<name>.json` and `.graphml`, the exports of the same circuits
        (`exports.save_both`), which the chapter writes too.
        """
        from scfm_circuits.report.boxes.circuit import circuit_bundle

        for one in choices:
            path = self.profile.results / "circuits" / f"{_checked_name(one.name, 'circuit')}.js"
            write_atomic(path, one.script)
        return Shown(circuit_bundle(choices, caption))

    def value(self, key: str, value: Any, text: str | None = None) -> None:
        """Keep a number in `values/<chapter>.json` and make it available to the prose.

        The text cells use it as {glue:text}`key`. text: how it reads there; by default integers
        get thousands separators and other numbers two significant digits. Keys are unique across
        the book. Raises InputError for what JSON cannot hold.
        """
        # A colon would be read as the start of a format by the glue role.
        _checked_name(key, "value")
        kept = plain(value)
        try:
            json.dumps(kept)
        except (TypeError, ValueError):
            raise InputError(f"The value {key} is of the type {type(value).__name__}, which no "
                             "JSON file can hold; give a number or a text.") from None
        self._values[key] = kept
        write_json(self.profile.results / "values" / f"{self.chapter}.json", self._values)
        _glue(key, readable(kept, 2) if text is None else text)

    def values(self, mapping: Mapping[str, Any], prefix: str = "") -> None:
        """`value` for each item; `prefix` stands before each key."""
        for key, value in mapping.items():
            self.value(f"{prefix}{key}", value)

    @staticmethod
    def warning(*texts: str | None) -> Shown | None:
        """A visible box for each distinct text that is not empty; None if there is none."""
        said = [text for text in dict.fromkeys(texts) if text]
        if not said:
            return None
        return Shown({
            "text/html": "".join(
                f'<p class="not-comparable" role="note">{as_code(html.escape(text))}</p>'
                for text in said),
            "text/plain": "\n".join(said),
        })

    def not_comparable(self, own: Profile | None = None) -> Shown | None:
        """A note for profiles that train their own small model; None for any other.

        own: of the small models that a chapter trains for itself, whatever the profile's model is.
        """
        used = own or self.profile
        if used.model != "train":
            return None
        said = (f"this chapter trains models of its own, of {used.model_layers} layers and width "
                f"{used.model_width}. No number of theirs is that of the models whose shape they "
                "have." if own else
                f"the profile {used.name} uses a model of {used.model_layers} layers and width "
                f"{used.model_width}, trained on the spot. Numbers that depend on scale stand "
                "beside the paper's without a verdict.")
        return self.warning(f"Not comparable at this scale: {said}")


def readable(value: Any, digits: int = 4) -> str:
    """A number with so many significant digits: `1,234`, `0.01235`, `yes`; `n/a` for a missing one.
    """
    match value:
        case None:
            return "n/a"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return number(digits)(value)
        case _:
            return str(value)


def short_number(text: str) -> str:
    """A number written in full, with four significant digits; any other text as it is."""
    try:
        value = float(text)
    except ValueError:
        return text
    return text if len(text) <= 7 or not math.isfinite(value) else number(4)(value)


def _chosen(frame: "pd.DataFrame", columns: Mapping[str, str] | None) -> "pd.DataFrame":
    return frame if columns is None else frame[list(columns)].rename(columns=columns)


def _csv_text(frame: "pd.DataFrame") -> str:
    return frame.to_csv(index=False, float_format="%.10g", lineterminator="\n")


def _checked_name(name: str, kind: str) -> str:
    if not _NAME.fullmatch(name):
        raise InputError(
            f"The {kind} name {name!r} must be made of letters, digits, `.`, `_` and `-`."
        )
    return name


def _glue(key: str, text: str) -> None:
    """Store `text` in the notebook under `key`; outside of IPython there is no notebook."""
    from IPython import get_ipython  # type: ignore[attr-defined]

    if get_ipython() is None:  # type: ignore[no-untyped-call]
        return
    from myst_nb import glue

    # A string is glued in quotes. The glue role evaluates what it finds: without them `4,646` would
    # read (4, 646) and `0.00` would read 0.0.
    glue(key, text, display=False)
