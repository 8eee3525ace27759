"""The ledger: every claim of the paper beside what this run found.

`data/claims.yml` lists the claims. `run_values.gather` collects the run's values,
`internal_checks.internal_values` tests the paper against itself, `judge` holds one value against
one claim, and `write_claims` writes `results/<profile>/claims.csv`.

Claims are counted by what they stand on (`STANDINGS`): only those tested on the run's own model
say anything about it. A setting and a transcription cannot but agree, so they get no match.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scfm_circuits import InputError
from scfm_circuits.common.files import write_atomic
from scfm_circuits.common.profile import ROOT, Profile
from scfm_circuits.common.profile_files import Loader
from scfm_circuits.paper.internal_checks import Value, internal_values
from scfm_circuits.paper.run_values import UNDECIDED, derived_values, gather

CLAIMS = ROOT / "data" / "claims.yml"

Verdict = Literal["match", "within", "off", "undecided", "not a test", "not judged",
                  "not comparable at this scale", "not measured"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
JUDGED: tuple[Verdict, ...] = ("match", "within", "off", "undecided")
"""Verdicts on claims that a run's value was held against."""
Standing = Literal["tested", "recomputed", "transcription", "setting"]
STANDINGS: dict[Standing, str] = {
    "tested": "tested on this run's model",
    "recomputed": "recomputed from what the paper prints",
    "transcription": "transcription of what the paper prints",
    "setting": "settings of the run",
}
"""What a claim stands on, in words."""

COLUMNS = ["id", "exhibit", "paper", "ours", "unit", "rule", "verdict", "difference", "claim",
           "note", "kind", "standing", "interval", "beside"]

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
        if self.type in ("exact", "holds"):
            return self.type
        if self.type == "absolute":
            return f"within {self.tolerance:g}"
        if self.type == "relative":
            return f"within {100 * (self.tolerance or 0):g} %"
        return f"{_BOUNDS[self.type][1]} {self.threshold:g}"


Key = Annotated[str, Field(pattern=r"^\w+(\.[\w-]+)+$")]


class Libraries(BaseModel):
    """The gene-set libraries that the paper names for what it found."""

    model_config = _STRICT

    named: Annotated[list[Text], Field(min_length=1)]
    used: Key
    """Key of the value that says which ones a run used, with commas between."""

    def others(self, values: Mapping[str, Value]) -> str | None:
        """Those that the run used instead, in words; None if it used the ones named."""
        used = values.get(self.used)
        names = {name.strip() for name in used.split(",")} if isinstance(used, str) else set()
        return None if names == {*self.named} else " and ".join(sorted(names)) or "none"


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
    source: Key
    """Key of our value in `gather`, `derived_values`, `internal_values` or `settings_of`; with
    `.low` and `.high` at its end, keys of the interval that a bound is judged by."""
    standing: Standing
    """What the claim stands on."""
    beside: dict[Text, Key] = {}
    """Keys, by name, of what our value has to be read against: the same of what learnt nothing."""
    libraries: Libraries | None = None
    """Gene-set libraries that the paper names; found with others, ours is not judged."""
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
        if self.kind == "internal" and self.standing not in ("recomputed", "transcription"):
            raise ValueError(f"standing: the paper against itself is not {self.standing}")
        return self

    @property
    def printed_decimals(self) -> int:
        """Decimals to which the paper prints its number."""
        if self.decimals is not None:
            return self.decimals
        exponent = Decimal(repr(self.value)).as_tuple().exponent
        return -exponent if isinstance(exponent, int) else 0


def load_claims(path: Path = CLAIMS) -> list[Claim]:
    """Read and check the claims file (default `data/claims.yml`), in the file's order.

    The file is a mapping of `claims`, a list, and optionally `templates`, a place for YAML anchors.
    Raises InputError naming the file, the claim and the key if something is wrong.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
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


Interval = tuple[float | None, float | None]


def _unusable(claim: Claim, ours: object, needed: str) -> InputError:
    return InputError(f'The value "{claim.source}" is {ours!r}, but the claim "{claim.id}" '
                      f"needs {needed}; correct the notebook that writes it.")


def judge(claim: Claim, ours: Value, profile: str, interval: Interval = (None, None), *,
          others: str | None = None) -> Verdict:
    """Hold our value against the paper's.

    "match": equal at the precision the paper prints, or the statement holds; "within": inside the
    rule's tolerance; "off": neither (a NaN or an infinity is always off). A bound is judged by the
    whole interval: "undecided" if the bound lies inside it, or there is none. What the paper's own
    numbers give is exact without one. Where agreement cannot fail, it is "not a test". A profile
    that the claim does not list gives "not comparable at this scale" whatever the value; gene sets
    other than the paper's "not judged"; no value where there could be one "not measured". A run
    with overrides has a name of its own (`demo+1f2e3d4c`) and so is never judged beyond the claims
    for all profiles.

    interval: low and high end, in the claim's unit. others: `Libraries.others` of the run.
    Raises InputError if the value's type does not fit the claim.
    """
    if not {"all", profile} & {*claim.profiles}:
        return "not comparable at this scale"
    if ours is None:
        return "not measured"
    if others is not None:
        return "not judged"
    verdict = _judged(claim, ours, interval)
    agrees = verdict in ("match", "within")
    return "not a test" if agrees and claim.standing in ("transcription", "setting") else verdict


def _judged(claim: Claim, ours: Value, interval: Interval) -> Verdict:
    rule = claim.rule
    if ours == UNDECIDED:
        return "undecided"
    if rule.type == "holds":
        if not isinstance(ours, bool):
            raise _unusable(claim, ours, "true or false")
        return "match" if ours else "off"
    if rule.type == "exact" and isinstance(claim.value, str):
        if not isinstance(ours, str):
            raise _unusable(claim, ours, "text")
        return "match" if _plain_text(ours) == _plain_text(claim.value) else "off"
    if ours is None or isinstance(ours, bool | str):
        raise _unusable(claim, ours, "a number")
    if rule.threshold is not None and math.isfinite(ours):
        exact = claim.standing != "tested" and interval == (None, None)
        return _judge_bound(rule, (ours, ours) if exact else interval)
    return _judge_number(claim, float(ours))


def _judge_bound(rule: Rule, interval: Interval) -> Verdict:
    low, high = interval
    if low is None or high is None:
        return "undecided"
    holds, bound = _BOUNDS[rule.type][0], float(rule.threshold or 0)
    held = {holds(end, bound) for end in (low, high)}
    return "undecided" if len(held) > 1 else "match" if held.pop() else "off"


def _judge_number(claim: Claim, ours: float) -> Verdict:
    rule = claim.rule
    if not math.isfinite(ours):
        return "off"
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


def settings_of(profile: Profile) -> dict[str, Value]:
    """The profile's fields as values, under `profile.`; lists with commas between."""
    fields = profile.model_dump()
    return {f"profile.{name}": ", ".join(map(str, value)) if isinstance(value, list) else value
            for name, value in fields.items()}


def ledger(profile: Profile, results: str | Path) -> pd.DataFrame:
    """One row per claim: the paper's value, ours, and the verdict.

    `results` is `results/<profile>`. Columns: id, exhibit, paper, ours, unit, rule, verdict,
    difference (ours - paper, NaN unless both are numbers), claim, note, kind, standing, interval
    (that a bound is judged by) and beside. `paper`, `ours` and the last two are text: the paper's
    number with the decimals it prints, ours with ten digits, empty if there is none. Ours is shown
    also where it is not judged, unless it was found with other gene sets than the paper's: the note
    then names them.
    """
    values = gather(results)
    values = values | derived_values(values) | internal_values() | settings_of(profile)
    rows = [_row(claim, values, profile.name) for claim in load_claims()]
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(claim: Claim, values: Mapping[str, Value], profile: str) -> dict[str, Any]:
    ours = values.get(claim.source)
    low, high = (_number(values.get(claim.source + end)) for end in (".low", ".high"))
    others = claim.libraries.others(values) if claim.libraries else None
    verdict = judge(claim, ours, profile, (low, high), others=others)
    note = claim.note
    if others is not None and ours is not None:
        named = " and ".join(claim.libraries.named) if claim.libraries else ""
        note, ours, low = f"Not judged: found with {others}, not {named}. {note}", None, None
    numbers = not any(isinstance(v, bool | str) or v is None for v in (claim.value, ours))
    decimals = claim.printed_decimals if not isinstance(claim.value, bool | str) else None
    return {
        "id": claim.id,
        "exhibit": claim.exhibit,
        "paper": _shown(claim.value, decimals),
        "ours": _shown(ours),
        "unit": claim.unit,
        "rule": str(claim.rule),
        "verdict": verdict,
        "difference": float(ours or 0) - float(claim.value) if numbers else math.nan,
        "claim": claim.claim,
        "note": note,
        "kind": claim.kind,
        "standing": claim.standing,
        "interval": "" if low is None or high is None else f"{low:.4g} to {high:.4g}",
        "beside": "; ".join(f"{name}: {_short(values[key])}" for name, key in claim.beside.items()
                            if values.get(key) is not None),
    }


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _shown(value)


def _number(value: Value) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def write_claims(profile: Profile, results: str | Path) -> Path:
    """Write the ledger to `<results>/claims.csv` and return the path (`results` as in `ledger`)."""
    text = ledger(profile, results).to_csv(
        index=False, float_format="%.10g", lineterminator="\n")
    return write_atomic(Path(results) / "claims.csv", text)


def counts(claims: pd.DataFrame) -> pd.DataFrame:
    """How many claims of each standing got which verdict: a row per verdict, a column per standing.

    claims: the columns verdict and standing. Verdicts that no claim got are left out.
    """
    table = pd.crosstab(claims["verdict"], claims["standing"])
    verdicts = [verdict for verdict in VERDICTS if verdict in table.index]
    return table.reindex(index=verdicts, columns=list(STANDINGS), fill_value=0)
