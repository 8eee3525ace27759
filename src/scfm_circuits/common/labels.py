"""Labels of cells: one way of writing each, wherever it is read, and those that name no type.

Also the templates that genes and labels are written into.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable

import numpy as np

_NAMED = 5
"""Labels that became equal which are named."""
_NO_TYPE = frozenset((
    "nan", "na", "n/a", "<na>", "none", "null", "unknown", "unassigned", "unannotated", "unlabeled",
    "unlabelled", "unclassified", "undefined", "undetermined", "not available", "not applicable",
    "not assigned", "missing"))


def normal_label(text: str) -> str:
    """A label on one line: Unicode's composed form (NFC), single spaces inside and none at the
    ends, and no characters that cannot be seen (categories Cc and Cf)."""
    words = unicodedata.normalize("NFC", text).split()
    seen = ("".join(one for one in word if unicodedata.category(one) not in ("Cc", "Cf"))
            for word in words)
    # What stood around an unseen character may compose now.
    return unicodedata.normalize("NFC", " ".join(word for word in seen if word))


def names_no_type(label: str) -> bool:
    """Whether a label says that the type is not known: `nan`, `unknown`, `-`, nothing at all."""
    return label.casefold() in _NO_TYPE or not any(map(str.isalnum, label))


def normal_labels(given: Iterable[str]) -> tuple[np.ndarray, list[str]]:
    """Labels, each as `normal_label` has it, and a sentence for the page if any were rewritten.

    Returns (n_cells,) text. The sentence names labels that became equal.
    """
    texts = list(given)
    names = {text: normal_label(text) for text in sorted(set(texts))}
    labels = np.array([names[text] for text in texts], dtype=np.str_)
    changed = sum(name != text for text, name in names.items())
    if not changed:
        return labels, []
    together: dict[str, list[str]] = {}
    for text, label in names.items():
        together.setdefault(label, []).append(_shown(text))
    merged = [f"{', '.join(texts[:-1])} and {texts[-1]} are one type, {_shown(label)}"
              for label, texts in together.items() if len(texts) > 1]
    named = _first_ones(merged)
    return labels, [
        f"{changed:,} of {len(names):,} labels were written with other spaces, unseen characters "
        f"or another form of their letters than the pages use{': ' * bool(named)}{named}."]


def doubtful_labels(labels: np.ndarray) -> list[str]:
    """Sentences on labels that name no type, and on those that may be one.

    labels: (n_cells,) as `normal_labels` gives them.
    """
    names, counts = np.unique(labels, return_counts=True)
    untold = np.array([names_no_type(name) for name in names], bool)
    said: list[str] = []
    alike: dict[str, list[str]] = {}
    if untold.any():
        which = ", ".join(map(_shown, names[untold].tolist()))
        said.append(f"{counts[untold].sum():,} of {len(labels):,} cells have a label that names no "
                    f"type ({which}), which is taken as a type like any other.")
    for name in names.tolist():
        alike.setdefault(re.sub(r"[\s_]", "", name).casefold(), []).append(_shown(name))
    pairs = [" and ".join(one) for one in alike.values() if len(one) > 1]
    if pairs:
        said.append("Warning: labels that differ only in capitals, spaces or underscores are taken "
                    f"as types of their own ({_first_ones(pairs)}); make them one in the file if "
                    "they are.")
    return said


def listed(names: Iterable[object], most: int = 30) -> str:
    """Names from a file for a sentence, on one line: the first `most`, the rest as a number."""
    shown = [normal_label(str(name))[:60] for name in names]
    more = len(shown) - most
    return (", ".join(shown[:most]) or "none") + (f" and {more:,} more" if more > 0 else "")


def _first_ones(said: list[str]) -> str:
    more = len(said) - _NAMED
    return "; ".join(said[:_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _shown(text: str) -> str:
    """A label in quotes with its unseen characters spelled out, cut if it is long."""
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def template_problem(text: str, needed: str, optional: Collection[str] = ()) -> str | None:
    """What is wrong with a template's placeholders, such as `{genes}`; None if nothing is.

    A line break that is written in a way in which it is none is wrong with it too. needed: must
    stand in it once; optional: may. Any other word in braces would be put to the model
    as it stands. Braces around anything else are text.
    """
    if text.count(needed) != 1:
        return f"must contain {needed} exactly once"
    literal = re.search(r"\\[nrt]", text)
    if literal:
        return (f"holds {literal[0]} as a backslash and a letter; only within double quotes that "
                "are around the text itself is it a line break or a tab")
    known = [needed, *optional]
    other = [one for one in re.findall(r"\{[A-Za-z_]\w*\}", text) if one not in known]
    if not other:
        return None
    hint = {"{cell_sentence}": "; write {genes}", "{cell_type}": "; write {label}"}
    return (f"holds the placeholder {other[0]}, which is none of {', '.join(known)}"
            + (hint.get(other[0], "") if hint.get(other[0], "")[8:] in known else ""))
