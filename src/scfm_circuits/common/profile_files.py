"""Fields of a profile as they are written: in a file, or as `key=value` on a command line.

And what is said of one that does not fit.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from scfm_circuits import InputError

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic.fields import FieldInfo


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as YAML 1.2 and everybody expects, and 1e6 as a whole
    one, which fits fields of either kind."""


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    value = float(node.value.replace("_", ""))
    return int(value) if value.is_integer() else value


_Loader.add_constructor("!exponent", _number)
_Loader.add_implicit_resolver(
    "!exponent", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def split_pairs(text: str) -> list[str]:
    """The `key=value` pairs of one text, quoted as in a shell where need be.

    A word without a key belongs to the value before it: `case_type=CD14+ Monocyte seed=1` are two
    pairs. Raises InputError if a quotation mark is not closed.
    """
    try:
        words = shlex.split(text)
    except ValueError:
        raise InputError(f"In PARAMS={text!r} a quotation mark is not closed; put the whole pair "
                         "that holds one into marks of the other kind.") from None
    pairs: list[str] = []
    for word in words:
        if pairs and not re.match(r"[A-Za-z_]\w*=", word):
            pairs[-1] += f" {word}"
        else:
            pairs.append(word)
    return pairs


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs, the values read as in a profile file."""
    overrides = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise InputError(f"The parameter {pair!r} must have the form key=value.")
        try:
            overrides[key.strip()] = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            raise InputError(f"The value in {pair!r} cannot be read as YAML.") from None
    return overrides


def read_fields(path: Path) -> dict[str, Any]:
    """The fields in a profile's file, unchecked; InputError if they cannot be read."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The profile {path} cannot be read ({error}).") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise InputError(f"The profile {path} is not valid YAML{line}; check its syntax.") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"The profile {path} must be a list of `field: value` lines.")
    return content


def explained(error: "ValidationError", path: Path, overrides: Mapping[str, Any],
              fields: Mapping[str, "FieldInfo"]) -> str:
    """The first problem of a validation error, naming key, file and what is allowed."""
    problem = error.errors(include_url=False)[0]
    key = str(problem["loc"][0]) if problem["loc"] else ""
    source = "an override" if key in overrides else str(path)
    if problem["type"] == "extra_forbidden":
        import difflib

        near = difflib.get_close_matches(key, fields, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else (
            "allowed are " + ", ".join(sorted(fields)) + ".")
        return f"Unknown profile field `{key}` in {source}; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    got = "" if problem["type"] in ("value_error", "missing") else f" (got {problem['input']!r})"
    if not key:
        key, _, message = message.partition(": ")
        source = "an override" if key in overrides else str(path)
    about = (fields[key].description or "") if key in fields else ""
    about = " ".join(about.split())
    return f"Profile field `{key}` in {source}: {message}{got}. {about}".rstrip()
