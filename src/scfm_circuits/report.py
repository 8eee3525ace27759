"""What a notebook hands to the book: tables, figures and numbers, each shown and kept as a file.

A chapter makes one `Report` and shows everything through it, so that what the page says and what
stands under `results/<profile>/` cannot differ. Text in tables may come from strangers (gene-set
files, labels, profiles) and is escaped.
"""

import hashlib
import html
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfm_circuits import InputError
from scfm_circuits.files import atomic_path, write_atomic, write_json
from scfm_circuits.profile import ROOT, Profile

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

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
    ) -> Shown:
        """Write `tables/<name>.csv` in full and show at most `rows` rows of it.

        digits: significant digits of a floating-point number on the page; the file has ten.
        """
        path = self.profile.results / "tables" / f"{_checked_name(name, 'table')}.csv"
        text = frame.to_csv(index=False, float_format="%.10g", lineterminator="\n")
        write_atomic(path, text)
        return _shown_table(frame, caption, rows, digits, path)

    def show(
        self, frame: "pd.DataFrame", *,
        caption: str | None = None, rows: int | None = None, digits: int = 4,
    ) -> Shown:
        """Show a table in the same way without writing a file."""
        return _shown_table(frame, caption, rows, digits, None)

    def figure(self, name: str, figure: "Figure") -> Shown:
        """Write `figures/<name>.png` and `.svg`, the same bytes on every run, and show the PNG.

        The page takes its caption and alternative text from the cell's `mystnb` metadata.
        """
        import matplotlib as mpl

        folder = self.profile.results / "figures"
        _checked_name(name, "figure")
        undated: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None}}
        for suffix, metadata in undated.items():
            with (
                atomic_path(folder / f"{name}.{suffix}") as path,
                mpl.rc_context({"svg.hashsalt": name}),
            ):
                figure.savefig(path, dpi=200, bbox_inches="tight", metadata=metadata)
        _let_go(figure)
        png = (folder / f"{name}.png").read_bytes()
        # A PNG's header holds its width in pixels; at 200 dots per inch, half of it is the natural
        # width on a screen.
        width = int.from_bytes(png[16:20], "big") // 2
        return Shown(
            {"image/png": png, "text/plain": f"<Figure {name}>"}, {"image/png": {"width": width}}
        )

    def value(self, key: str, value: Any, text: str | None = None) -> None:
        """Keep a number in `values/<chapter>.json` and make it available to the prose.

        The text cells use it as {glue:text}`key`. text: how it reads there; by default integers
        get thousands separators and other numbers four significant digits. Keys are unique across
        the book.
        """
        # A colon would be read as the start of a format by the glue role.
        _checked_name(key, "value")
        plain = _plain(value)
        self._values[key] = plain
        write_json(self.profile.results / "values" / f"{self.chapter}.json", self._values)
        _glue(key, readable(plain) if text is None else text)

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
                f'<p class="not-comparable" role="note">{html.escape(text)}</p>' for text in said),
            "text/plain": "\n".join(said),
        })

    @staticmethod
    def not_comparable(profile: Profile) -> Shown | None:
        """A note for profiles that train their own small model; None for any other."""
        if profile.model != "train":
            return None
        text = (
            f"Not comparable at this scale: the profile {profile.name} uses a model of "
            f"{profile.model_layers} layers and width {profile.model_width}, trained on the spot. "
            "Numbers that depend on scale stand beside the paper's without a verdict."
        )
        return Report.warning(text)


def readable(value: Any) -> str:
    """A number as prose shows it: `1,234`, `0.01235`, `yes`; `n/a` for a missing one."""
    match value:
        case None:
            return "n/a"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return _number(4)(value)
        case _:
            return str(value)


def short_number(text: str) -> str:
    """A number written in full, with four significant digits; any other text as it is."""
    try:
        value = float(text)
    except ValueError:
        return text
    return text if len(text) <= 7 or not math.isfinite(value) else _number(4)(value)


def _checked_name(name: str, kind: str) -> str:
    if not _NAME.fullmatch(name):
        raise InputError(
            f"The {kind} name {name!r} must be made of letters, digits, `.`, `_` and `-`."
        )
    return name


def _plain(value: Any) -> Any:
    """A numpy scalar as a Python one; NaN and infinity as None, as JSON has neither."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _glue(key: str, text: str) -> None:
    """Store `text` in the notebook under `key`; outside of IPython there is no notebook."""
    from IPython import get_ipython  # type: ignore[attr-defined]

    if get_ipython() is None:  # type: ignore[no-untyped-call]
        return
    from myst_nb import glue

    # A string is glued in quotes. The glue role evaluates what it finds: without them `4,646` would
    # read (4, 646) and `0.00` would read 0.0.
    glue(key, text, display=False)


def _let_go(figure: "Figure") -> None:
    """Take the figure out of pyplot's hands, else the notebook would show it a second time."""
    import matplotlib.pyplot as plt

    plt.close(figure)


def _number(digits: int) -> Callable[[float], str]:
    """How a floating-point number reads: `digits` significant digits, whole numbers in full."""

    def as_text(value: float) -> str:
        if math.isnan(value):
            return ""
        if 10**digits <= abs(value) < 1e9:
            return f"{value:,.0f}"
        return f"{value:.{digits}g}"

    return as_text


def _html_table(frame: "pd.DataFrame", digits: int) -> str:
    """The table as HTML with every text escaped; numbers to the right, text to the left."""
    from pandas import NA
    from pandas.api.types import is_numeric_dtype

    number = _number(digits)

    def as_text(value: Any) -> str:
        value = _plain(value)
        if value is None or value is NA or value != value:
            return ""
        return number(value) if isinstance(value, float) else html.escape(str(value))

    columns = [frame.iloc[:, index] for index in range(frame.shape[1])]
    # Long texts are given room: a browser would break them into a column of single words.
    kinds = [
        ' class="number"' if is_numeric_dtype(column)
        else ' class="long"' if any(len(str(value)) > 40 for value in column) else ""
        for column in columns
    ]
    head = "".join(f'<th scope="col"{kind}>{html.escape(str(name))}</th>'
                   for name, kind in zip(frame.columns, kinds, strict=True))
    rows = (
        "".join(f"<td{kind}>{as_text(value)}</td>" for value, kind in zip(row, kinds, strict=True))
        for row in zip(*columns, strict=True)
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (f'<table class="dataframe">\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody>\n</table>")


def _shown_table(
    frame: "pd.DataFrame", caption: str | None, rows: int | None, digits: int, path: Path | None,
) -> Shown:
    part = frame if rows is None else frame.head(rows)
    body = _html_table(part, digits)
    notes = []
    if len(part) < len(frame):
        notes.append(f"{len(part):,} of {len(frame):,} rows")
    link = ""
    if path is not None:
        # Beside the built pages, the results stand under downloads/.
        link = f'<a href="downloads/tables/{path.name}">{html.escape(path.name)}</a>'
    line = "; ".join([*map(html.escape, notes), *([link] if link else [])])
    title, label = "", f'aria-label="{html.escape(path.stem if path else "table", quote=True)}"'
    if caption:
        # Above the box that scrolls, else a phone would show its beginning only.
        whole = f"{caption}\0{path.name if path else ''}\0{body}"
        key = f"table-{hashlib.sha256(whole.encode(errors='replace')).hexdigest()[:12]}"
        title = f'<p class="table-caption mathjax_ignore" id="{key}">{html.escape(caption)}</p>\n'
        label = f'aria-labelledby="{key}"'
        body = body.replace("<table ", f"<table {label} ", 1)
    text = part.to_string(index=False, float_format=_number(digits), na_rep="")
    if path is not None:
        notes.append(os.path.relpath(path, ROOT))
    return Shown({
        "text/html": (
            # The reserved class keeps MathJax away from dollar signs in cells.
            title
            + f'<div class="table-scroll mathjax_ignore" tabindex="0" role="region" {label}>\n'
            f'{body}\n</div>'
            + (f'\n<p class="table-note">{line}</p>' if line else "")
        ),
        "text/plain": "\n".join([*([caption] if caption else []), text, *notes]),
    })
