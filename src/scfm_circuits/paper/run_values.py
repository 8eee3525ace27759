"""What a run found: its values and tables as one flat dict of dotted keys.

Notebooks write `results/<profile>/values/<notebook>.json`, flat objects such as
`{"table1.transcoder": 2.31}`; `gather` reads them and the tables beside them, and `derived_values`
adds the orders and shares that follow from them.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from scfm_circuits import InputError
from scfm_circuits.paper.internal_checks import Value

# Columns that hold a table's numbers, with the dotted key each row's number gets.
_TABLE_KEYS = (
    ("table1", "configuration", "validation_loss", "table1.{}"),
    ("table2", "configuration", "mean_kl", "table2.{}"),
    ("l0", "layer", "l0", "l0.layer_{}"),
    ("table4", "layer", "live", "table4.layer_{}.live"),
    ("table4", "layer", "total", "table4.layer_{}.live"),
    ("table4", "layer", "interpretable", "table4.layer_{}.interpretable"),
    ("table4", "layer", "percentage", "table4.layer_{}.percentage"),
)
_SAMPLE = "human_eval_sample"
_READ = {_SAMPLE, *(table for table, *_ in _TABLE_KEYS)}
_ROWS = re.compile(r"original|transcoder|no_mlp|\d+")


_STAND_IN = {
    "enrichment.stand_in": re.compile(r"table4\.(?!.*\.live$).*"),
    "case.stand_in": re.compile(r"case\.best_term.*"),
}
"""Values that say that the bundled gene sets stood in for the paper's, and what was found with
them."""


def _table_values(path: Path) -> dict[str, Value]:
    """Numbers of one of our tables whose columns are those of `data/paper`; others are not read."""
    if path.stem not in _READ:
        return {}
    try:
        frame = pd.read_csv(path)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable CSV file: {error}.") from error
    values: dict[str, Value] = {}
    for table, index, column, key in _TABLE_KEYS:
        if path.stem != table or not {index, column} <= set(frame.columns):
            continue
        rows = frame[index].astype(str).str.strip().str.lower().str.replace(" ", "_")
        numbers = pd.to_numeric(frame[column], errors="coerce")
        # A table in long form (one row per layer and rule) has no single value for a layer.
        if rows.is_unique:
            values |= {key.format(row): None if math.isnan(number) else number
                       for row, number in zip(rows, numbers.tolist(), strict=True)
                       if _ROWS.fullmatch(row)}
    if path.stem == _SAMPLE and "log10_E_f" in frame.columns and len(frame):
        values["table3.median_log10_E_f"] = float(frame["log10_E_f"].median())
    return values


def _json_values(path: Path) -> dict[str, Value]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not readable JSON: {error}; run its notebook again.") \
            from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold one flat object of dotted keys.")
    for key, value in content.items():
        if not (value is None or isinstance(value, bool | int | float | str)):
            raise InputError(f'{path}: the value of "{key}" must be a number, true, false, text '
                             "or null, not a list or an object.")
    return content


def _agree(first: Value, second: Value) -> bool:
    if isinstance(first, int | float) and isinstance(second, int | float):
        both_nan = math.isnan(first) and math.isnan(second)
        return both_nan or math.isclose(first, second, rel_tol=1e-6, abs_tol=1e-9)
    return first == second


def gather(results: str | Path) -> dict[str, Value]:
    """Our values of one run: `values/*.json`, then the tables, as one flat dict of dotted keys.

    `results` is `results/<profile>`. A value that is null in one file yields to another file's.
    What was found with other gene sets than the paper's, because these were not there, is null: it
    is no value to hold against the paper's.
    Raises InputError if a file is malformed or if two files of the run disagree on a key.
    """
    folder = Path(results)
    found: dict[str, tuple[Value, Path]] = {}
    readers: tuple[tuple[str, Callable[[Path], dict[str, Value]]], ...] = (
        ("values/*.json", _json_values), ("tables/*.csv", _table_values))
    for pattern, reader in readers:
        for path in sorted(folder.glob(pattern)):
            for key, value in reader(path).items():
                if value is None:
                    found.setdefault(key, (None, path))
                    continue
                known, other = found.get(key, (None, path))
                if known is not None and not _agree(known, value):
                    raise InputError(f'{other} and {path} disagree on "{key}" ({known} and '
                                     f"{value}); one is left from an older run: make notebooks.")
                found[key] = (value if known is None else known, path if known is None else other)
    values = {key: value for key, (value, _) in found.items()}
    for said, those in _STAND_IN.items():
        if values.get(said) is True:
            values |= {key: None for key in values if those.fullmatch(key)}
    return values


def derived_values(values: Mapping[str, Value]) -> dict[str, Value]:
    """Orders and shares that follow from the gathered values; None where an input is missing."""

    def number(key: str) -> float | None:
        value = values.get(key)
        return float(value) if isinstance(value, int | float) else None

    original, ours, none = (number(f"table1.{c}") for c in ("original", "transcoder", "no_mlp"))
    kl, kl_none = number("table2.transcoder"), number("table2.no_mlp")
    fdr = number("paper_case.fdr")
    derived: dict[str, Value] = dict.fromkeys(DERIVED)
    if original is not None and ours is not None and none is not None:
        derived["derived.loss_order"] = original < ours < none
        # Without a gap to close, the share closed has no meaning.
        derived["derived.loss_recovered"] = (
            (none - ours) / (none - original) if none > original else None)
    if kl is not None and kl_none is not None:
        derived["derived.kl_order"] = kl < kl_none
    if fdr is not None:
        derived["derived.paper_case_significant"] = fdr < 0.05
    layers = number("training.n_layers")
    if layers is not None:
        means = [number(f"l0.layer_{layer}") for layer in range(int(layers))]
        if any(mean is not None for mean in means):
            derived["derived.l0_every_layer"] = all(mean is not None for mean in means)
    return derived | _derived_from_table4(values)


DERIVED = (
    "derived.loss_order", "derived.loss_recovered", "derived.kl_order", "derived.l0_every_layer",
    "derived.paper_case_significant", "derived.layers_above_layer0", "derived.late_minus_early",
)


def _derived_from_table4(values: Mapping[str, Value]) -> dict[str, Value]:
    percentages: list[float] = []
    # A layer without live features has no percentage (null) and is left out, not counted as 0 %.
    while (key := f"table4.layer_{len(percentages)}.percentage") in values:
        value = values[key]
        percentages.append(float(value) if isinstance(value, int | float) else math.nan)
    first, later = percentages[:1], [p for p in percentages[1:] if not math.isnan(p)]
    if not later or math.isnan(first[0]):
        return {}
    third = len(percentages) // 3
    early = [p for p in percentages[:third] if not math.isnan(p)]
    late = [p for p in percentages[third:] if not math.isnan(p)]
    return {
        "derived.layers_above_layer0": sum(p > first[0] for p in later) / len(later),
        "derived.late_minus_early":
            sum(late) / len(late) - sum(early) / len(early) if early and late else None,
    }
