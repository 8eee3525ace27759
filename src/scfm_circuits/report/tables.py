"""The HTML of a table, and the data file that makes a long one browsable.

A browsable table is an ordinary one of its first rows in a box that `book/_static/browse.js` finds.
The script then loads `tables/<name>.js`: a call with one JSON value, because a page opened from
disk may load a script but not fetch a file. Every column lists its distinct values in sorting order
and a code (an index into them) for each row, so that a browser sorts, filters and searches by
looking up small integers.

All texts are untrusted: escaped in HTML, and in the script so that nothing ends it early.
"""

import hashlib
import html
import json
import math
import os
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from scfm_circuits.common.profile import ROOT
from scfm_circuits.report.headings import heading

if TYPE_CHECKING:
    import pandas as pd

LONG = 40
"""Texts with more characters get a wide column."""
CHOICES = 32
"""A column with at most so many distinct values can be filtered by choosing one of them."""
# What encodeURIComponent leaves as it is, besides letters, digits and `_.-~`.
_UNRESERVED = "!'()*"


class Column(NamedTuple):
    """One column as the page shows it."""

    name: str
    """What stands over it, which need not be its name in the file."""
    kind: str
    """`number`, `long` or nothing: the class of its cells."""
    values: list[Any]
    """Plain Python values, one per row."""
    texts: list[str]
    """How they read, one per row and not escaped; a missing value is an empty text."""
    discrete: bool
    """Whether it holds anything but floating-point numbers."""


class Grouped(NamedTuple):
    """How the rows of a browsable table are put in groups and shortened; all are column names."""

    by: str
    """The column by which the frame is sorted: its texts are headings between the rows."""
    folded: Sequence[str] = ()
    """Columns that a row shows when it is opened."""
    filters: Sequence[str] = ()
    """The columns whose values can be chosen, where they are few."""


def plain(value: Any) -> Any:
    """A numpy scalar as a Python one; NaN and infinity as None, as JSON has neither."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def number(digits: int) -> Callable[[float], str]:
    """How a floating-point number reads: `digits` significant digits, whole numbers in full."""

    def as_text(value: float) -> str:
        if math.isnan(value):
            return ""
        # As it will read: 99.8 with two digits is 100, not 1e+02.
        if 10**digits <= abs(float(f"{value:.{digits}g}")) < 1e9:
            return f"{value:,.0f}"
        return f"{value:.{digits}g}"

    return as_text


def shown_columns(frame: "pd.DataFrame", digits: int) -> list[Column]:
    """The frame's columns as they read with `digits` significant digits."""
    from pandas import NA
    from pandas.api.types import is_float_dtype, is_numeric_dtype

    as_number = number(digits)

    def as_text(value: Any) -> str:
        if value is None or value is NA or value != value:
            return ""
        if isinstance(value, bool):
            return "yes" if value else "no"
        return as_number(value) if isinstance(value, float) else str(value)

    columns = []
    for index, name in enumerate(frame.columns):
        column = frame.iloc[:, index]
        values = [plain(value) for value in column]
        texts = [as_text(value) for value in values]
        if name == "library":
            texts = [text.replace("_", " ") for text in texts]  # as `GeneSets.title`
        # Long texts are given room: a browser would break them into a column of single words.
        kind = ("number" if is_numeric_dtype(column)
                else "long" if any(len(text) > LONG for text in texts) else "")
        columns.append(Column(heading(str(name)), kind, values, texts, not is_float_dtype(column)))
    return columns


def with_intervals(columns: Sequence[Column]) -> list[Column]:
    """The columns, with each lower bound and the upper one beside it as one column."""
    found: list[Column] = []
    for column in columns:
        name = column.name.removesuffix(" to")
        if not (found and name != column.name and found[-1].name == f"{name} from"):
            found.append(column)
            continue
        texts = [f"{low} to {high}" if low and high else low or high
                 for low, high in zip(found[-1].texts, column.texts, strict=True)]
        found[-1] = Column(f"{name} interval", "number", texts, texts, True)
    return found


def as_code(escaped: str) -> str:
    """Escaped text with what stands between backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escaped)


def table_bundle(
    frame: "pd.DataFrame", caption: str | None, rows: int | None, digits: int, path: Path | None,
) -> dict[str, str]:
    """MIME bundle of the table's first `rows` rows (all if None), with a link to its file.

    With no rows and a file it is the caption and the link alone.
    """
    part = frame if rows is None else frame.head(rows)
    if rows == 0 and path is not None:
        what = f"{html.escape(caption)}: " if caption else ""
        shown = f'<p class="table-note">{what}{len(frame):,} rows in {_file_link(path)}</p>'
    else:
        body = _table_html(with_intervals(shown_columns(part, digits)))
        shown = _boxed(body, caption, _counted(part, frame), path)
    return {
        "text/html": shown,
        "text/plain": _plain_text(part, frame, caption, digits, path),
    }


def browsable(
    frame: "pd.DataFrame", caption: str | None, rows: int, digits: int, path: Path,
    links: Mapping[str, str] | None, grouped: "Grouped | None" = None,
) -> tuple[dict[str, str], str]:
    """A table that browse.js takes over: the MIME bundle of its first rows, and the data script.

    path: of the CSV; the data script is meant to stand beside it, as `<name>.js`.
    """
    columns = shown_columns(frame, digits)
    addresses = _addresses([str(name) for name in frame.columns], links or {})
    script = data_script(path.stem, columns, addresses)
    part = frame.head(rows)
    # A text may be long further down: the first rows look as the others will.
    first = [column._replace(values=column.values[:rows], texts=column.texts[:rows])
             for column in columns]
    body = _boxed(_table_html(first, addresses, clamped=True), caption, _counted(part, frame), path)
    source = f"downloads/tables/{path.stem}.js?v={version_of(script)}"
    box = (f'<div class="browse" data-table="{path.stem}" data-source="{source}" '
           f'data-rows="{rows}"{_grouping(grouped)}>')
    return {
        "text/html": f"{box}\n{body}\n</div>",
        "text/plain": _plain_text(part, frame, caption, digits, path),
    }, script


def _grouping(grouped: "Grouped | None") -> str:
    """What browse.js is told of a grouped table, as an attribute."""
    if grouped is None:
        return ""
    told = {"by": heading(grouped.by), "folded": [heading(one) for one in grouped.folded],
            "filters": [heading(one) for one in grouped.filters]}
    return f' data-grouped="{html.escape(json.dumps(told))}"'


def data_script(
    name: str, columns: Sequence[Column], addresses: Mapping[int, Sequence[str | int]],
) -> str:
    """The whole table as a script: `companionTable("<name>", {...});` around plain JSON.

    The object has `rows` (their number) and `columns`, each with `name`, `kind`, `values` (distinct
    texts in sorting order), `codes` (an index into them per row, -1 for a missing value), `choose`
    (whether to offer a choice of its values) and `link` (parts of an address, texts and indices of
    columns, or null).
    """
    rows = len(columns[0].texts) if columns else 0
    content = []
    for index, column in enumerate(columns):
        values, codes = _coded(column)
        content.append({
            "name": column.name, "kind": column.kind, "values": values, "codes": codes,
            "choose": _can_be_chosen(column, values, rows),
            "link": list(addresses[index]) if index in addresses else None,
        })
    return script_call("companionTable", name, {"rows": rows, "columns": content})


def script_json(value: Any) -> str:
    """JSON in ASCII without `<`, `>` and `&`, which holds nothing that could end a script."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def script_call(function: str, *values: Any) -> str:
    """A script with one call, which is how data reach a page that was opened from disk."""
    return f"{function}({', '.join(map(script_json, values))});\n"


def version_of(script: str | bytes) -> str:
    """What is put behind a script's address, so that a browser does not take the one it remembers
    for a new run's."""
    return hashlib.sha256(script.encode() if isinstance(script, str) else script).hexdigest()[:12]


def _coded(column: Column) -> tuple[list[str], list[int]]:
    """The distinct texts in sorting order, and each row's index into them (-1: missing).

    Different numbers that read the same stay apart, so that the order is that of the numbers.
    """
    keys = [_sorting_key(value, text) if text else None
            for value, text in zip(column.values, column.texts, strict=True)]
    ordered = sorted({key for key in keys if key is not None})
    codes = {key: index for index, key in enumerate(ordered)}
    return [key[-1] for key in ordered], [-1 if key is None else codes[key] for key in keys]


def _sorting_key(value: Any, text: str) -> tuple[int, Any, str]:
    """Numbers by size, then texts without regard to case and with numbers in them by size."""
    if isinstance(value, int | float):
        return 0, value, text
    # Groups of 15 digits, as Python refuses to read thousands of them.
    parts = re.split(r"([0-9]{1,15})", text.casefold())
    return 1, tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), text


def _can_be_chosen(column: Column, values: Sequence[str], rows: int) -> bool:
    """Whether the values are few, repeat and are short enough for a list to choose from."""
    choices = len(values) + ("" in column.texts)
    return (column.discrete and column.kind != "long"
            and 2 <= choices <= CHOICES and choices * 2 <= rows)


def _addresses(names: Sequence[str], links: Mapping[str, str]) -> dict[int, list[str | int]]:
    """Each linked column's address as texts and, for the fields in it, indices of columns."""
    found = {}
    for column, template in links.items():
        parts: list[str | int] = []
        for literal, field, _, _ in string.Formatter().parse(template):
            parts += [literal] if literal else []
            parts += [] if field is None else [names.index(field)]
        found[names.index(column)] = parts
    return found


def _table_html(
    columns: Sequence[Column], addresses: Mapping[int, Sequence[str | int]] | None = None, *,
    clamped: bool = False,
) -> str:
    """The table as HTML with every text escaped; numbers to the right, text to the left.

    clamped: long texts get a box that the style sheet limits to a few lines.
    """
    kinds = [f' class="{column.kind}"' if column.kind else "" for column in columns]
    head = "".join(f'<th scope="col"{kind}>{html.escape(column.name)}</th>'
                   for column, kind in zip(columns, kinds, strict=True))

    def cell(index: int, texts: Sequence[str]) -> str:
        text = shown = html.escape(texts[index])
        address = _address((addresses or {}).get(index), texts) if text else None
        if address is not None:
            shown = f'<a href="{html.escape(address)}">{shown}</a>'
        if not clamped:
            shown = as_code(shown)
        elif columns[index].kind == "long" and text:
            shown = f'<div class="clamp" title="{text}">{shown}</div>'
        return f"<td{kinds[index]}>{shown}</td>"

    rows: Iterable[tuple[str, ...]] = zip(*(column.texts for column in columns), strict=True)
    cells = ("".join(cell(index, texts) for index in range(len(texts))) for texts in rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in cells)
    return (f'<table class="dataframe">\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody>\n</table>")


def _address(parts: Sequence[str | int] | None, texts: Sequence[str]) -> str | None:
    """The address with the row's texts in it, quoted; None if there is none or one is missing."""
    if parts is None or not all(texts[part] for part in parts if isinstance(part, int)):
        return None
    return "".join(part if isinstance(part, str) else quote(texts[part], safe=_UNRESERVED)
                   for part in parts)


def _counted(part: "pd.DataFrame", frame: "pd.DataFrame") -> str:
    return f"{len(part):,} of {len(frame):,} rows" if len(part) < len(frame) else ""


def _boxed(body: str, caption: str | None, count: str, path: Path | None) -> str:
    """The table in a box that scrolls, its caption above and the count and file below."""
    link = "" if path is None else _file_link(path)
    count = f'<span class="table-count">{count}{"; " if link else ""}</span>' if count else ""
    title, label = "", f'aria-label="{html.escape(path.stem if path else "table", quote=True)}"'
    if caption:
        # Above the box that scrolls, else a phone would show its beginning only.
        whole = f"{caption}\0{path.name if path else ''}\0{body}"
        key = f"table-{hashlib.sha256(whole.encode(errors='replace')).hexdigest()[:12]}"
        title = f'<p class="table-caption mathjax_ignore" id="{key}">{html.escape(caption)}</p>\n'
        label = f'aria-labelledby="{key}"'
        body = body.replace("<table ", f"<table {label} ", 1)
    return (
        # The reserved class keeps MathJax away from dollar signs in cells.
        f'{title}<div class="table-scroll mathjax_ignore" tabindex="0" role="region" {label}>\n'
        f"{body}\n</div>"
        + (f'\n<p class="table-note">{count}{link}</p>' if count or link else "")
    )


def _file_link(path: Path) -> str:
    """A link to a file of the results, which stand under downloads/ beside the built pages."""
    return f'<a href="downloads/tables/{path.name}">{html.escape(path.name)}</a>'


def _plain_text(
    part: "pd.DataFrame", frame: "pd.DataFrame", caption: str | None, digits: int,
    path: Path | None,
) -> str:
    lines = [
        caption, part.to_string(index=False, float_format=number(digits), na_rep=""),
        _counted(part, frame), os.path.relpath(path, ROOT) if path is not None else None,
    ]
    return "\n".join(line for line in lines if line)
