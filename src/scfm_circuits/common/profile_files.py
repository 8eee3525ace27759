"""Fields of a profile as they are written: in a file, or as `key=value` on a command line.

And what is said of one that does not fit.
"""

import contextlib
import json
import re
import shlex
from collections.abc import Hashable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from scfm_circuits import InputError
from scfm_circuits.common.encodings import BINNED, CELL_SENTENCE, GENE_TOKENS, OWN_DICTIONARY
from scfm_circuits.common.labels import template_problem

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic.fields import FieldInfo

    from scfm_circuits.common.profile import Profile

MADE_HERE = ("train", "genes")
"""Models and tokenizers that a run makes itself; other names are loaded."""


class KeyTwice(yaml.constructor.ConstructorError):
    """A key that stands twice in one mapping, `key`."""

    def __init__(self, key: str, mark: yaml.Mark) -> None:
        super().__init__(None, None, f'the key "{key}" is given twice', mark)
        self.key = key


class Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as YAML 1.2 and everybody expects, and 1e6 as a whole
    one, which fits fields of either kind; and raises `KeyTwice`, where YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise KeyTwice(str(key.value), key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    value = float(node.value.replace("_", ""))
    return int(value) if value.is_integer() else value


Loader.add_constructor("!exponent", _number)
Loader.add_implicit_resolver(
    "!exponent", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def split_pairs(text: str) -> list[str]:
    """The `key=value` pairs of one text, quoted as in a shell where need be; a backslash is one.

    A word without a key belongs to the value before it: `case_type=CD14+ Monocyte seed=1` are two
    pairs. Raises InputError if a quotation mark is not closed.
    """
    try:
        reader = shlex.shlex(text, posix=True, punctuation_chars=False)
        reader.whitespace_split, reader.commenters, reader.escape = True, "", ""
        words = list(reader)
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


def parse_overrides(pairs: Sequence[str], fields: Mapping[str, "FieldInfo"]) -> dict[str, Any]:
    """`key=value` pairs, the values read as in a profile file.

    But the text of a field that takes nothing else is taken as it stands, be it `7`, `yes`, `a: b`
    or `a # b`, unless it is in quotes. fields: all that a profile has. Raises InputError for what
    is no pair, or no YAML.
    """
    overrides: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise InputError(f"The parameter {pair!r} must have the form key=value.")
        key = key.strip()
        if key in overrides:
            raise InputError(f"The parameter `{key}` is given twice; leave one out.")
        try:
            overrides[key] = _value(text, fields[key].annotation if key in fields else None)
        except yaml.YAMLError:
            raise InputError(f"The value in {pair!r} cannot be read as YAML.") from None
    return overrides


def _value(text: str, kind: Any) -> Any:
    """What stands behind `key=`, for a field of that kind."""
    begins = text.lstrip()[:1]
    if begins in ('"', "["):
        # JSON has characters beyond 16 bits in two halves, which YAML does not put together.
        with contextlib.suppress(ValueError):
            return json.loads(text)
    if kind is str or (kind == str | None and text not in ("", "null", "~")):
        with contextlib.suppress(yaml.YAMLError):
            if begins in ("'", '"') and isinstance(quoted := yaml.safe_load(text), str):
                return quoted
        return text
    return yaml.load(text, Loader=Loader)


def read_fields(path: Path) -> dict[str, Any]:
    """The fields in a profile's file, unchecked; InputError if they cannot be read."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The profile {path} cannot be read ({error}).") from None
    except KeyTwice as error:
        raise InputError(f"The profile {path} has the field `{error.key}` twice; remove one of "
                         "them.") from None
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
    if problem["type"] == "string_type" and isinstance(problem["input"], (bool, int, float, date)):
        message = "must be text, so put it into quotes"
    got = "" if problem["type"] in ("value_error", "missing") else f" (got {problem['input']!r})"
    if not key:
        key, _, message = message.partition(": ")
        source = "an override" if key in overrides else str(path)
    about = (fields[key].description or "") if key in fields else ""
    about = " ".join(about.split())
    return f"Profile field `{key}` in {source}: {message}{got}. {about}".rstrip()


def over(base: Mapping[str, Any], own: Mapping[str, Any], fields: Mapping[str, "FieldInfo"]
         ) -> dict[str, Any]:
    """`own` fields over those of `base`; other cells or models do not keep the base's names, nor
    cells how symbols are spelled. fields: all that there are, with their defaults."""
    kept = dict(base)
    other = {field for field in ("cells", "model")
             if field in own and own[field] != base.get(field, fields[field].default)}
    if other:
        kept.pop("title", None)
    if "cells" in other:
        kept.pop("cells_name", None)
        kept.pop("symbol_rule", None)
    return {**kept, **own}


def misfit(profile: "Profile") -> str | None:
    """What of a profile's fields does not fit together, as `field: why`; None if all do."""
    if profile.model == "train":
        if profile.model_layers is None:
            return "model_layers: a model that is trained needs a number of layers"
        if profile.model_width % profile.model_heads:
            return (f"model_heads: {profile.model_heads} heads do not divide model_width "
                    f"{profile.model_width}")
    elif profile.tokenizer in MADE_HERE and profile.encoding == CELL_SENTENCE:
        return f"tokenizer: a loaded model needs its own tokenizer, not `{profile.tokenizer}`"
    if profile.model_layers is not None and profile.human_layer >= profile.model_layers:
        return (f"human_layer: layer {profile.human_layer} asked of a model with "
                f"{profile.model_layers} layers; allowed are 0 to {profile.model_layers - 1}")
    asked = template_problem(profile.prompt, "{genes}", ("{num_genes}", "{organism}"))
    told = template_problem(profile.response, "{label}")
    if asked or told:
        return f"prompt: {asked}" if asked else f"response: {told}"
    if (1 + profile.null_draws) * profile.fdr <= 1:
        return (f"null_draws: with {profile.null_draws} null lists no p-value can be below the fdr "
                f"of {profile.fdr:g}; use more than {1 / profile.fdr:.0f}")
    if profile.list_rule == "share" and profile.gene_score != "count":
        return ("list_rule: a share of the activations needs genes ranked by `gene_score: count`, "
                f"not `{profile.gene_score}`; use `top` or `all`")
    if profile.buffer_tokens < profile.batch_tokens:
        return "buffer_tokens: must be at least batch_tokens"
    return _wrong_encoding(profile)


def _wrong_encoding(profile: "Profile") -> str | None:
    """What of a profile does not fit its `encoding`, as of `misfit`."""
    given = [field for field in ("token_dictionary", "gene_medians", "gene_mapping",
                                 "ensembl_column") if getattr(profile, field) is not None]
    by_counts = [field for field in given if field != "token_dictionary"]
    if profile.encoding == CELL_SENTENCE:
        return (f"{given[0]}: cell sentences need none; set `encoding` to one of "
                f"{', '.join(GENE_TOKENS)}, or leave it out") if given else None
    if profile.case_sentence is not None:
        return (f"case_sentence: under `encoding: {profile.encoding}` cells are no sentences of "
                "words; leave it out, and a held-out cell is traced")
    if profile.encoding == BINNED:
        if profile.model == "train":
            return f"model: `encoding: {BINNED}` is scGPT's, so name a folder with its model"
        if by_counts:
            return (f"{by_counts[0]}: `encoding: {BINNED}` knows genes by their symbols and "
                    "divides nothing; leave it out")
    own = profile.token_dictionary == OWN_DICTIONARY
    if own and profile.model != "train":
        return (f"token_dictionary: a loaded model needs its own, not `{OWN_DICTIONARY}`")
    if own and by_counts:
        return (f"{by_counts[0]}: `token_dictionary: {OWN_DICTIONARY}` makes its medians and calls "
                "genes as the cells do; leave it out")
    needed = ("token_dictionary", "gene_medians")[: 1 if profile.encoding == BINNED else 2]
    for field in () if own else needed:
        if field not in given:
            return f"{field}: `encoding: {profile.encoding}` needs the model's own"
    way = GENE_TOKENS[profile.encoding]
    genes = way.most - len(way.before + way.after)
    if profile.genes_per_cell > genes:
        return (f"genes_per_cell: `encoding: {profile.encoding}` takes {genes:,} genes at most, "
                f"not {profile.genes_per_cell:,}")
    if profile.model_thinning < 1:
        return "model_thinning: cells are thinned as cell sentences only; set it to 1"
    return None
