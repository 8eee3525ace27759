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
from scfm_circuits.paper.intervals import (
    Overlap,
    Shares,
    gap_closed,
    late_less_early,
    layer0_difference,
    layers_above_layer0,
    layers_over,
    overlap,
    share_estimate,
)

# Columns that hold a table's numbers, with the dotted key each row's number gets.
_TABLE_KEYS = (
    ("table1", "configuration", "validation_loss", "table1.{}"),
    ("table1", "configuration", "added_error", "table1.{}.added_error"),
    ("table2", "configuration", "mean_kl", "table2.{}"),
    ("table2", "configuration", "standard_error", "table2.{}.error"),
    ("l0", "layer", "l0", "l0.layer_{}"),
    ("table4", "layer", "live", "table4.layer_{}.live"),
    ("table4", "layer", "total", "table4.layer_{}.live"),
    ("table4", "layer", "interpretable", "table4.layer_{}.interpretable"),
    ("table4", "layer", "percentage", "table4.layer_{}.percentage"),
)
_SAMPLE = "human_eval_sample"
_READ = {_SAMPLE, *(table for table, *_ in _TABLE_KEYS)}
_ROWS = re.compile(r"original|transcoder|no_mlp|\d+")


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
    return {key: value for key, (value, _) in found.items()} | _interpreted(folder / "tables")


_SCORES, _NODES, _SHARES = "feature_scores", "circuit_nodes", "feature_score_shares"


def _interpreted(tables: Path) -> dict[str, Value]:
    """What the automatic score says of the circuit's features and of fragments, by layer.

    Keys under `scores.`: circuit_unexplained and run_unexplained, the shares of features that no
    gene, family or sub-word predicts; circuit_features, of how many; and for features and the
    untrained encoder, <source>.layer_<l>.sub_word (percent) and .scored.
    """
    values: dict[str, Value] = {}
    paths = {name: tables / f"{name}.csv" for name in (_SCORES, _NODES, _SHARES)}
    if paths[_SCORES].is_file() and paths[_NODES].is_file():
        verdicts = pd.read_csv(paths[_SCORES], usecols=["layer", "feature", "verdict"])
        verdicts = verdicts[verdicts["verdict"] != "too rare"]
        nodes = pd.read_csv(paths[_NODES], usecols=["kind", "layer", "feature"])
        traced = nodes[nodes["kind"] == "feature"][["layer", "feature"]].drop_duplicates()
        own = traced.astype(int).merge(verdicts, on=["layer", "feature"])["verdict"] == "none"
        if len(own):
            values = {"scores.circuit_unexplained": float(own.mean()),
                      "scores.circuit_features": len(own),
                      "scores.run_unexplained": float((verdicts["verdict"] == "none").mean())}
    if paths[_SHARES].is_file():
        shares = pd.read_csv(paths[_SHARES], dtype={"layer": str})
        for row in shares[shares["layer"] != "all"].to_dict("records"):
            key = f"scores.{str(row['source']).replace(' ', '_')}.layer_{row['layer']}"
            values |= {f"{key}.sub_word": 100 * row["sub-word"], f"{key}.scored": row["scored"]}
    return values


def derived_values(values: Mapping[str, Value]) -> dict[str, Value]:
    """Orders, shares and differences that follow from the gathered values, with their intervals.

    Each key of `DERIVED`, with `.low` and `.high` where it is a number; None where an input is
    missing. An order that the standard errors leave open is "undecided".
    """
    given = _Given(values)
    derived: dict[str, Value] = dict.fromkeys(DERIVED)
    fdr, layers = given("paper_case.fdr"), given("training.n_layers")
    if fdr is not None:
        derived["derived.paper_case_significant"] = fdr < 0.05
    if layers is not None:
        means = [given(f"l0.layer_{layer}") for layer in range(int(layers))]
        if any(mean is not None for mean in means):
            derived["derived.l0_every_layer"] = all(mean is not None for mean in means)
    if None not in (given("table4.total.live"), given("case.gene_nodes")):
        derived["derived.both_pipelines"] = True
    return derived | _of_losses(given) | _of_layers(given) | _of_circuit(given)


DERIVED = (
    "derived.loss_order", "derived.loss_recovered", "derived.kl_order", "derived.l0_every_layer",
    "derived.paper_case_significant", "derived.both_pipelines", "derived.layers_over_80",
    "derived.layer0_less_others", "derived.layers_above_layer0", "derived.late_less_early",
    "derived.layer0_fragments", "derived.layer0_fragments_untrained", "derived.prompt_nodes",
    "derived.unexplained_features", "derived.nine_genes", "derived.nine_genes_told",
    "derived.endothelial_genes", "derived.endothelial_genes_told",
)
UNDECIDED = "undecided"


class _Given:
    """Numbers among the values; None for what is missing or no number."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self.values = values

    def __call__(self, key: str) -> float | None:
        value = self.values.get(key)
        return float(value) if isinstance(value, int | float) else None

    def all(self, *keys: str) -> list[float] | None:
        """The numbers of these keys; None if one is missing."""
        found = [number for number in map(self, keys) if number is not None]
        return found if len(found) == len(keys) else None

    def shares(self, percent: str, of: str) -> tuple[Shares, int]:
        """Two keys with {} for the layer, from layer 0 on, and how many layers there are.

        A layer without features has no percentage (null); it is not 0 %.
        """
        rows: list[list[float]] = []
        while (key := percent.format(len(rows))) in self.values:
            found = self(key), self(of.format(len(rows)))
            rows.append([math.nan if one is None else one for one in found])
        columns = zip(*rows, strict=True) if rows else ((), ())
        return Shares.given(*map(list, columns)), len(rows)


def _order(*steps: tuple[float, float]) -> Value:
    """Whether every difference, with its standard error, is above 0; or what they leave open."""
    if all(difference > 1.96 * error for difference, error in steps):
        return True
    return False if any(difference < -1.96 * error for difference, error in steps) else UNDECIDED


def _of_losses(given: _Given) -> dict[str, Value]:
    derived: dict[str, Value] = {}
    loss = given.all("table1.original", "table1.transcoder", "table1.no_mlp")
    errors = given.all("table1.transcoder.added_error", "table1.no_mlp.added_error")
    if loss is not None:
        ours, none = loss[1] - loss[0], loss[2] - loss[0]
        first, second = errors or (math.nan, math.nan)
        derived["derived.loss_order"] = _order((ours, first),
                                               (none - ours, math.hypot(first, second)))
        derived |= gap_closed(ours, first, none, second).named("derived.loss_recovered")
    kl = given.all("table2.transcoder", "table2.no_mlp")
    if kl is not None:
        errors = given.all("table2.transcoder.error", "table2.no_mlp.error") or [math.nan] * 2
        derived["derived.kl_order"] = _order((kl[1] - kl[0], math.hypot(*errors)))
    return derived


def _of_layers(given: _Given) -> dict[str, Value]:
    shares, n_layers = given.shares("table4.layer_{}.percentage", "table4.layer_{}.live")
    fragments, _ = given.shares("scores.feature.layer_{}.sub_word",
                                "scores.feature.layer_{}.scored")
    untrained, _ = given.shares("scores.untrained_encoder.layer_{}.sub_word",
                                "scores.untrained_encoder.layer_{}.scored")
    return {
        **layers_over(shares, 80).named("derived.layers_over_80"),
        **layer0_difference(shares).named("derived.layer0_less_others"),
        **layers_above_layer0(shares).named("derived.layers_above_layer0"),
        **late_less_early(shares, n_layers).named("derived.late_less_early"),
        **layer0_difference(fragments).named("derived.layer0_fragments"),
        **layer0_difference(untrained).named("derived.layer0_fragments_untrained"),
    }


def _of_circuit(given: _Given) -> dict[str, Value]:
    derived: dict[str, Value] = {}
    for key, share, of in (("prompt_nodes", "case.prompt_token_share", "case.nodes"),
                           ("unexplained_features", "scores.circuit_unexplained",
                            "scores.circuit_features")):
        found = given.all(share, of)
        if found is not None:
            derived |= share_estimate(found[0], int(found[1])).named(f"derived.{key}")
    nine = [value for key, value in given.values.items() if key.startswith("case.gene_node.")]
    drawn = given.all("case.gene_nodes", "case.n_prompt_genes")
    # Only genes that stand in the sentence can be found, so all nine must.
    if drawn is not None and given("case.nine_in_prompt") == len(nine):
        derived |= _together("derived.nine_genes", overlap(nine.count(True), len(nine),
                                                           *map(int, drawn)))
    term = given.all(*(f"case.term.{part}" for part in ("found", "named", "drawn", "of")))
    if term is not None:
        derived |= _together("derived.endothelial_genes", overlap(*map(int, term)))
    return derived


def _together(key: str, found: Overlap | None) -> dict[str, Value]:
    return {} if found is None else {**found.beyond.named(key), f"{key}_told": found.told}
