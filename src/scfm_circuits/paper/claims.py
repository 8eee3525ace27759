"""The ledger: every claim of the paper beside what this run found.

`data/claims.yml` lists the claims. `run_values.gather` collects the run's values,
`internal_checks.internal_values` tests the paper against itself, `judge` holds one value against
one claim, and `write_claims` writes `results/<profile>/claims.csv`.
"""

import math
import operator
import re
from collections.abc import Callable, Hashable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scfm_circuits import InputError
from scfm_circuits.common.files import write_atomic
from scfm_circuits.common.profile import ROOT
from scfm_circuits.paper.internal_checks import Value, internal_values
from scfm_circuits.paper.run_values import derived_values, gather

CLAIMS = ROOT / "data" / "claims.yml"

Verdict = Literal["match", "within", "off", "not comparable at this scale", "not measured"]
VERDICTS: tuple[Verdict, ...] = (
    "match", "within", "off", "not comparable at this scale", "not measured")

COLUMNS = ["id", "exhibit", "paper", "ours", "unit", "rule", "verdict",
           "difference", "claim", "note", "kind"]

Number = Annotated[int | float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)

# A bound stands for a statement such as "over 80 %": it holds or it does not.
_BOUNDS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "at_least": (operator.ge, "at least"),
    "greater_than": (operator.gt, "more than"),
    "less_than": (operator.lt, "less than"),
}


class Rule(BaseModel):
    """How our value is compared with the paper's."""

    model_config = _STRICT

    type: Literal["exact", "absolute", "relative", "holds", "at_least", "greater_than", "less_than"]
    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Largest difference that counts as "within": in the claim's unit, or relative to the paper."""
    threshold: Number | None = None
    """The bound of at_least, greater_than and less_than, in the claim's unit."""

    @model_validator(mode="after")
    def _complete(self) -> "Rule":
        if (self.type in ("absolute", "relative")) != (self.tolerance is not None):
            raise ValueError("tolerance belongs to the types absolute and relative, and only there")
        if (self.type in _BOUNDS) != (self.threshold is not None):
            raise ValueError(f"threshold belongs to the types {', '.join(_BOUNDS)}, and only there")
        return self

    def __str__(self) -> str:
        if self.type == "exact":
            return "exact"
        if self.type == "holds":
            return "holds"
        if self.type == "absolute":
            return f"within {self.tolerance:g}"
        if self.type == "relative":
            return f"within {100 * (self.tolerance or 0):g} %"
        return f"{_BOUNDS[self.type][1]} {self.threshold:g}"


class Claim(BaseModel):
    """One number or checkable sentence of the paper."""

    model_config = _STRICT

    id: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    """A slug, unique in the file."""
    exhibit: Text
    """"Table 4", "Figure 2", "Text", ..."""
    claim: Text
    """What the paper says, as one sentence."""
    locator: Text
    """Where it says so: a section, a row and column, or the words themselves."""
    kind: Literal["number", "order", "share", "text", "internal"]
    """internal: the paper checked against itself; the others compare it with this run."""
    value: bool | Number | Text
    """The paper's value: true for a sentence that holds or does not; beside a bound, its word."""
    unit: str
    """Unit of the value; empty for a pure number or a sentence."""
    rule: Rule
    source: Annotated[str, Field(pattern=r"^\w+(\.[\w-]+)+$")]
    """Key of our value in `gather`, `derived_values` or `internal_values`."""
    profiles: Annotated[list[Annotated[str, Field(pattern=r"^[\w.-]+$")]], Field(min_length=1)]
    """Profiles in which our value can be judged; `all` for every one."""
    note: Text
    """What the comparison is worth."""
    decimals: int | None = None
    """Decimals the paper prints (-6: to the million); left out, those of the value."""

    @model_validator(mode="after")
    def _consistent(self) -> "Claim":
        number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        if self.rule.type == "holds":
            if self.value is not True:
                raise ValueError("a rule of type holds needs the value true")
        elif isinstance(self.value, bool) or (
            isinstance(self.value, str) and self.rule.type in ("absolute", "relative")
        ):
            raise ValueError(f"a rule of type {self.rule.type} cannot judge the value {self.value}")
        if self.decimals is not None and not number:
            raise ValueError("decimals belongs to numbers")
        if (self.kind == "internal") != self.source.startswith("internal."):
            raise ValueError("the kind internal and a source under internal. go together")
        return self

    @property
    def printed_decimals(self) -> int:
        """Decimals to which the paper prints its number."""
        if self.decimals is not None:
            return self.decimals
        exponent = Decimal(repr(self.value)).as_tuple().exponent
        return -exponent if isinstance(exponent, int) else 0

    def can_be_judged(self, profile: str) -> bool:
        """Whether a value of this profile may be held against the paper's."""
        return "all" in self.profiles or profile in self.profiles


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, except that a key given twice is an error instead of the last winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'the key "{key.value}" is given twice', key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)


def load_claims(path: str | Path | None = None) -> list[Claim]:
    """Read and check the claims file (default `data/claims.yml`), in the file's order.

    The file is a mapping of `claims`, a list, and optionally `templates`, a place for YAML anchors.
    Raises InputError naming the file, the claim and the key if something is wrong.
    """
    path = CLAIMS if path is None else Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise InputError(f"Cannot read the claims file {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("claims"), list):
        raise InputError(f"{path} must be a mapping with a list called claims.")
    if unknown := set(content) - {"claims", "templates"}:
        raise InputError(f"{path}: unknown key {sorted(map(str, unknown))[0]}; "
                         "only claims and templates are allowed at the top.")
    claims: dict[str, Claim] = {}
    for position, entry in enumerate(content["claims"], start=1):
        name = entry.get("id") if isinstance(entry, dict) else None
        where = f'{path}: claim "{name}"' if name else f"{path}: claim number {position}"
        try:
            claim = Claim.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "the claim as a whole"
            raise InputError(f"{where}, key {key}: {first['msg']}.") from error
        if claim.id in claims:
            raise InputError(f"{where}, key id: another claim has this id already.")
        claims[claim.id] = claim
    return list(claims.values())


def _plain_text(text: str) -> str:
    """Case, runs of spaces and spaces around a colon do not make two names different."""
    return re.sub(r"\s*:\s*", ":", " ".join(text.split())).casefold()


def _unusable(claim: Claim, ours: object, needed: str) -> InputError:
    return InputError(f'The value "{claim.source}" is {ours!r}, but the claim "{claim.id}" '
                      f"needs {needed}; correct the notebook that writes it.")


def judge(claim: Claim, ours: Value, profile: str) -> Verdict:
    """Hold our value against the paper's.

    "match": equal at the precision the paper prints, or the statement holds; "within": inside the
    rule's tolerance; "off": neither (a NaN or an infinity is always off). A profile that the claim
    does not list gives "not comparable at this scale" whatever the value; no value where there
    could be one gives "not measured". A run with overrides has a name of its own (`demo+1f2e3d4c`)
    and so is never judged beyond the claims for all profiles. Raises InputError if the value's type
    does not fit the claim.
    """
    if not claim.can_be_judged(profile):
        return "not comparable at this scale"
    if ours is None:
        return "not measured"
    rule = claim.rule
    if rule.type == "holds":
        if not isinstance(ours, bool):
            raise _unusable(claim, ours, "true or false")
        return "match" if ours else "off"
    if rule.type == "exact" and isinstance(claim.value, str):
        if not isinstance(ours, str):
            raise _unusable(claim, ours, "text")
        return "match" if _plain_text(ours) == _plain_text(claim.value) else "off"
    if isinstance(ours, bool | str):
        raise _unusable(claim, ours, "a number")
    return _judge_number(claim, float(ours))


def _judge_number(claim: Claim, ours: float) -> Verdict:
    rule = claim.rule
    if not math.isfinite(ours):
        return "off"
    if rule.threshold is not None:
        return "match" if _BOUNDS[rule.type][0](ours, rule.threshold) else "off"
    paper = float(claim.value)
    # The slack keeps 0.29 against 0.30 +- 0.01 inside, as it is on paper.
    difference = abs(ours - paper) * (1 - 1e-9)
    if difference <= 0.5 * 10.0 ** -claim.printed_decimals:
        return "match"
    if rule.tolerance is None:
        return "off"
    allowed = rule.tolerance * (abs(paper) if rule.type == "relative" else 1.0)
    return "within" if difference <= allowed else "off"


# --- the ledger --------------------------------------------------------------------------------

def _shown(value: Value, decimals: int | None = None) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return " ".join(value.split())
    return f"{value:.10g}" if decimals is None else f"{value:.{max(decimals, 0)}f}"


def ledger(profile: str, results: str | Path) -> pd.DataFrame:
    """One row per claim: the paper's value, ours, and the verdict.

    `results` is `results/<profile>`. Columns: id, exhibit, paper, ours, unit, rule, verdict,
    difference (ours - paper, NaN unless both are numbers), claim, note, kind. `paper` and `ours`
    are text: the paper's number with the decimals it prints, ours with ten digits, empty if there
    is none. Ours is shown also where it is not judged.
    """
    values = gather(results)
    values = values | derived_values(values) | internal_values()
    rows = []
    for claim in load_claims():
        ours = values.get(claim.source)
        numbers = not any(isinstance(v, bool | str) or v is None for v in (claim.value, ours))
        decimals = claim.printed_decimals if not isinstance(claim.value, bool | str) else None
        rows.append({
            "id": claim.id,
            "exhibit": claim.exhibit,
            "paper": _shown(claim.value, decimals),
            "ours": _shown(ours),
            "unit": claim.unit,
            "rule": str(claim.rule),
            "verdict": judge(claim, ours, profile),
            "difference": float(ours or 0) - float(claim.value) if numbers else math.nan,
            "claim": claim.claim,
            "note": claim.note,
            "kind": claim.kind,
        })
    return pd.DataFrame(rows, columns=COLUMNS)


def write_claims(profile: str, results: str | Path) -> Path:
    """Write the ledger to `<results>/claims.csv` and return the path (`results` as in `ledger`)."""
    text = ledger(profile, results).to_csv(
        index=False, float_format="%.10g", lineterminator="\n")
    return write_atomic(Path(results) / "claims.csv", text)
