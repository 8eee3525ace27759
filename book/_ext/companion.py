"""On every page: which cells and profile (banner), and where the numbers come from (footer).

The run is described by `companion.json`, which stands beside the configuration when the book is
built. All of its text is escaped: titles and names come from profiles that anybody may write.
"""

import json
import re
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

SHOWN_VERSIONS = ("python", "torch", "transformers", "scanpy", "numpy")


def banner(run: Mapping[str, Any], model: str | None) -> str:
    """The line above every page, as HTML.

    model: what the run's own small model is, or None for a model that was loaded.
    """
    kind = run["cells_are"]
    overrides = ", ".join(f"{key}={value}" for key, value in sorted(run["overrides"].items()))
    parts = [
        f'<strong class="badge-cells {"real" if kind == "real" else "simulated"}">'
        f'{"REAL" if kind == "real" else "SIMULATED"} cells</strong>'
        f'<span class="long"> {escape(run["cells_name"])}</span>',
        f"profile <strong>{escape(run['profile'])}</strong>"
        + (f" ({escape(overrides)})" if overrides else ""),
    ]
    if model is not None:
        parts.insert(0, '<strong class="badge-model">DEMO MODEL</strong>'
                        f'<span class="long"> {escape(model)}, not the paper\'s</span>')
    return f'<span class="companion-banner">{" · ".join(parts)}</span>'


def commit_text(git: Mapping[str, Any]) -> str:
    """The commit in short, and whether there were changes on top of it."""
    commit = git.get("commit")
    if not commit:
        return "no commit"
    return f"commit {commit[:10]}" + (" with uncommitted changes" if git.get("dirty") else "")


def footer(
    run: Mapping[str, Any], chapter: Mapping[str, Any] | None, page: str,
    link: Callable[[str], str],
) -> str:
    """The lines below a page, as HTML.

    chapter: the page's execution record, or None for a page of prose.
    link: turns a path below the book's root into an address relative to the page.
    """
    versions = {**run["versions"], **((chapter or {}).get("versions") or {})}
    kind = "real" if run["cells_are"] == "real" else "simulated"
    lines = []
    if chapter is not None:
        source = chapter.get("source", f"{page}.py")
        lines.append(
            f'This page: <a href="{escape(link(f"downloads/notebooks/{source}"), quote=True)}">'
            f"notebooks/{escape(source)}</a>, executed {escape(chapter['executed_at'])} "
            f"in {chapter['seconds']:.0f} s."
        )
    lines += [
        f"Run: profile {escape(run['profile'])}, seed {run['seed']}, "
        f"{escape(commit_text((chapter or {}).get('git') or run))}, {kind} cells "
        f"({escape(run['cells_name'])}), {run['seconds_total']:.0f} s in all on "
        f"{run['machine']['cpus']} processors.",
        "Versions: " + ", ".join(
            f"{name} {escape(versions[name])}" for name in SHOWN_VERSIONS if name in versions
        ) + ".",
        f'Files of this run: <a href="{escape(link("downloads.html"), quote=True)}">downloads</a>, '
        f'<a href="{escape(link("downloads/provenance.json"), quote=True)}">provenance.json</a>.',
    ]
    body = "".join(f"<p>{line}</p>" for line in lines)
    return f'<section class="provenance" aria-label="Provenance">{body}</section>'


def load(app: Sphinx) -> None:
    """Read the run; the theme shows the banner."""
    path = Path(app.srcdir) / "companion.json"
    app.companion = json.loads(path.read_text(encoding="utf-8"))  # type: ignore[attr-defined]


def with_narrow(body: str, narrow: Mapping[str, str], link: Callable[[str], str]) -> str:
    """The page with pictures that are another file where the screen is narrow.

    narrow: paths below the book's root by the file names of the wide ones, without `.png`.
    """
    def either(match: re.Match[str]) -> str:
        if match[1] not in narrow:
            return match[0]
        return (f'<picture><source media="(max-width: 600px)" '
                f'srcset="{escape(link(narrow[match[1]]), quote=True)}">{match[0]}</picture>')

    return re.sub(r'<img [^>]*src="[^"]*_images/([0-9a-f]{64})\.png"[^>]*>', either, body)


_MARKUP = re.compile(
    r"(<(pre|code|script|style|svg|textarea)\b.*?</\2>|<[^>]*>)", re.DOTALL)
_PERCENT = re.compile(r"\s%(?!\w)")
# As Python writes small and large numbers: 5.9e-26.
_POWER = re.compile(r"(?<![\w.])(\d(?:\.\d+)?)e([+-]\d{2,3})(?!\w)")
# Of a number that stands by itself: names such as IL-2 and ranges such as 3-5 keep their hyphen.
_NEGATIVE = re.compile(r"(?<![^\s(\[])(?<!\\[(\[])-(?=\d)")


def typeset(body: str) -> str:
    """The page with numbers as they are printed: a % is not parted from its number by a line's end,
    5.9e-26 is 5.9 × 10⁻²⁶, and a negative number has a minus sign. Code is left as it is."""
    def power(match: re.Match[str]) -> str:
        exponent = str(int(match[2])).replace("-", "\N{MINUS SIGN}")
        return f"{match[1]}\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}10<sup>{exponent}</sup>"

    # Every third part is a tag or code, and the name of the code's tag follows it.
    parts = _MARKUP.split(body)
    for index in range(0, len(parts), 3):
        text = _PERCENT.sub("\N{NO-BREAK SPACE}%", parts[index])
        # Right behind a closed tag it is the end of a name.
        if not (text.startswith("-") and parts[index - 2].startswith("</")):
            text = _NEGATIVE.sub("\N{MINUS SIGN}", text)
        parts[index] = _POWER.sub(power, text)
    return "".join(part for index, part in enumerate(parts) if index % 3 < 2)


def add_to_page(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: object
) -> None:
    """Give the theme this page's banner and footer."""
    data = app.companion  # type: ignore[attr-defined]
    # A list of references has list items; docutils gives them a role that browsers no longer know.
    context["body"] = with_narrow(
        typeset(context.get("body", "")).replace('role="doc-biblioentry"', 'role="listitem"'),
        data["narrow"], lambda path: context["pathto"](path, 1))
    # Without it the theme writes an error on the first visit.
    context["default_mode"] = "auto"
    context["theme_announcement"] = banner(data["run"], data["model"])
    context["theme_extra_footer"] = footer(
        data["run"], data["chapters"].get(pagename), pagename,
        lambda path: context["pathto"](path, 1),
    )


def own_numbers(app: Sphinx, env: Any) -> list[str]:
    """Give each chapter the number of its file, where a book lacks one before it."""
    for page, record in app.companion["chapters"].items():  # type: ignore[attr-defined]
        number = re.match(r"\d+", record.get("source", ""))
        if number is None or not env.toc_secnumbers.get(page):
            continue
        # Texts among the nodes have no attributes.
        references = [one for one in env.tocs[page].findall()
                      if getattr(one, "attributes", {}).get("secnumber")]
        for node in [env.titles[page], *references]:
            node["secnumber"] = [int(number[0]), *node["secnumber"][1:]]
        env.toc_secnumbers[page] = {
            anchor: (int(number[0]), *found[1:]) if found else found
            for anchor, found in env.toc_secnumbers[page].items()}
    return []


def drop_thebe(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: object
) -> None:
    """Leave out Thebe, which Jupyter Book registers twice (an error in every page's console).

    It would start a kernel on another host; these pages are read without one.
    """
    context["script_files"] = [
        script for script in context["script_files"]
        if "thebe" not in f"{script} {getattr(script, 'attributes', {}).get('body', '')}".lower()
    ]


def setup(app: Sphinx) -> dict[str, object]:
    """Register with Sphinx."""
    app.connect("builder-inited", load)
    # After Sphinx has numbered the chapters in their order.
    app.connect("env-get-updated", own_numbers, priority=900)
    app.connect("html-page-context", add_to_page)
    # After the extensions that add scripts to single pages.
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
