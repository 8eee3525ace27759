"""Fields of a profile as they are written: in a file, or as `key=value` on a command line."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from scfm_circuits import InputError


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as YAML 1.2 and everybody expects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


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
