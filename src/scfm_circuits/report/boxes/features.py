"""Everything the run knows about each feature, collected for the page `features.html`.

Counts and contexts come from the statistics, terms, controls, scores and circuits from the tables
of chapters 05 to 08, nearest features and logits from the weights. `feature_files` writes them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.cells.tokens import token_texts
from scfm_circuits.common.profile import Profile
from scfm_circuits.features.contexts import Context, feature_contexts, token_table
from scfm_circuits.features.counting import activation_edges
from scfm_circuits.features.gene_lists import ranked_genes
from scfm_circuits.features.statistics import FeatureStatistics
from scfm_circuits.models.architectures import architecture_of, final_norm
from scfm_circuits.report.boxes.activity import Activity, FeaturePlace, contexts_at, read_activity
from scfm_circuits.report.boxes.feature_files import FOLDER, IndexColumn, cut, short, write_pages
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS, GENES, GENES_PER_TOKEN, NEAREST, LOGITS, WINDOW = 8, 20, 5, 5, 8, 8
_PAGES = {"case": "07_endothelial_case_study.html", "cells": "08_controls.html"}
Key = tuple[int, int]

_TEXTS = ("best_term", "library", "tokens", "genes", "Term", "Overlap", "Genes", "gene_items",
          "family_items", "token_items", "verdict")
"""Columns of text in tables that hold numbers too."""


class RunTables(NamedTuple):
    """What chapters 05 to 08 left, empty where a run has none.

    features: one row per live feature (`features.csv`). terms: `feature_terms.csv`. scores:
    `feature_scores.csv`. circuits: for each (layer, feature) pairs of page and text.
    """

    features: pd.DataFrame
    terms: pd.DataFrame
    scores: pd.DataFrame
    circuits: Mapping[Key, Sequence[tuple[str, str]]]


# --- what the chapters left ----------------------------------------------------------------------


def read_tables(results: Path) -> RunTables:
    """The tables of `results`; a missing one is empty, a broken one raises InputError."""
    features, terms, scores = (_table(results, name, dict.fromkeys(_TEXTS, str)) for name in
                               ("features", "feature_terms", "feature_scores"))
    return RunTables(features, terms, scores, circuit_membership(
        _table(results, "circuit_nodes", str), _table(results, "circuit_supernodes", str)))


def _table(results: Path, name: str, dtype: type | dict[str, type]) -> pd.DataFrame:
    path = results / "tables" / f"{name}.csv"
    if not path.is_file():
        return pd.DataFrame({"layer": [], "feature": []})
    try:
        # A token or term may be called NA; what is missing is empty, but in tables of text alone.
        return pd.read_csv(path, dtype=dtype, keep_default_na=False,
                           na_values=[] if dtype is str else [""])
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"The table {path} cannot be read ({error}); remove it and run the "
                         "chapter that writes it again.") from None


def circuit_membership(nodes: pd.DataFrame, supernodes: pd.DataFrame
                       ) -> dict[Key, list[tuple[str, str]]]:
    """For each feature the circuits it is in, as (page, text).

    nodes: `circuit_nodes.csv` of the case study, by `target`; supernodes:
    `circuit_supernodes.csv`, whose `features` are `layer.feature` pairs. Both as texts.
    """
    found: dict[Key, list[tuple[str, str]]] = defaultdict(list)
    if "target" in nodes:
        own = nodes[nodes["kind"] == "feature"]
        places: dict[tuple[str, Key], list[str]] = defaultdict(list)
        for row in own.to_dict("records"):
            places[row["target"], (int(row["layer"]), int(row["feature"]))].append(
                f"token {int(row['position']) + 1} ({row['token']}, influence "
                f"{float(row['influence']):.2g})")
        for (target, key), said in places.items():
            found[key].append((_PAGES["case"], f"case study, circuit of {target}: "
                                               f"{', '.join(said)}"))
    if "features" in supernodes:
        for row in supernodes.to_dict("records"):
            for text in row["features"].split():
                layer, feature = text.split(".")
                found[int(layer), int(feature)].append((
                    _PAGES["cells"], f"cell {row['cell']} ({row['cell_type']}), group "
                    f"{row['supernode']} of the circuit of feature {row['target']}"))
    return found


def page_features(statistics: FeatureStatistics, least: float, circuits: Iterable[Key]
                  ) -> np.ndarray:
    """(n, 2) layers and features that get a page: the live ones and those of a circuit."""
    shown = statistics.live(least)
    for layer, feature in circuits:
        if not (0 <= layer < shown.shape[0] and 0 <= feature < shown.shape[1]):
            raise InputError(f"A circuit names feature {feature} of layer {layer}, which these "
                             "transcoders do not have; run chapters 07 and 08 again.")
        shown[layer, feature] = True
    return np.argwhere(shown)


# --- what the weights say ------------------------------------------------------------------------


@torch.no_grad()
def nearest_features(rows: Tensor, k: int = NEAREST, batch: int = 1024
                     ) -> tuple[np.ndarray, np.ndarray]:
    """For each of the rows (n, d) the k others of largest cosine: places and cosines, (n, k)."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    k = min(k, len(rows) - 1)
    found = []
    for some in torch.arange(len(rows), device=rows.device).split(batch):
        cosine = unit[some] @ unit.T
        cosine[torch.arange(len(some)), some] = -torch.inf
        found.append(cosine.topk(k, dim=1))
    return (torch.cat([one.indices for one in found]).cpu().numpy(),
            torch.cat([one.values for one in found]).cpu().numpy())


@torch.no_grad()
def logit_effects(model: "PreTrainedModel", rows: Tensor, vocabulary: int, k: int = LOGITS
                  ) -> tuple[np.ndarray, np.ndarray]:
    """The tokens whose logits each row (n, d_model) raises and lowers most when it is written.

    Token ids and effects, (n, 2 k): the k largest, then the k smallest, smallest first. The effect
    of one unit, relative to the mean over the vocabulary, through the final norm's gain and the
    unembedding; the division by the residual's size and all later layers are left out.
    """
    head: Any = model.get_output_embeddings()
    norm = architecture_of(model).norm(final_norm(model))
    unembedding = head.weight[:vocabulary]
    unembedding = unembedding - unembedding.mean(dim=0)
    k = min(k, vocabulary // 2)
    ids, values = [], []
    for some in rows.to(unembedding.dtype).split(512):
        centred = some - some.mean(dim=1, keepdim=True) if norm.centred else some
        effect = (centred * norm.gain) @ unembedding.T
        high, low = effect.topk(k), effect.topk(k, largest=False)
        ids.append(torch.cat([high.indices, low.indices], dim=1))
        values.append(torch.cat([high.values, low.values], dim=1))
    return torch.cat(ids).cpu().numpy(), torch.cat(values).float().cpu().numpy()


# --- one feature after another -------------------------------------------------------------------


def feature_panels(model: "PreTrainedModel", transcoders: Transcoders,
                   statistics: FeatureStatistics, corpus: Corpus, keys: np.ndarray,
                   tables: RunTables) -> Iterator[dict[str, Any]]:
    """What opens behind each of `keys` (n, 2), in order.

    fired, mean, histogram (tokens in the bins of `activation_edges`); contexts (activation, cell,
    label, before, token, after); tokens (text, count, share of the feature's activations, rate
    among the token's occurrences, genes); genes (symbol, activations in it, share); terms (library,
    term, overlap, p, FDR, genes); nearest (layer, feature, cosine of the decoder rows); raises and
    lowers (token, effect); circuits (page, text); scores.
    """
    vocabulary = len(corpus.tokenizer)
    texts = np.array(token_texts(corpus.tokenizer, np.arange(vocabulary)), dtype=object)
    layers, features = keys.T
    rows = transcoders.W_dec[torch.as_tensor(layers), torch.as_tensor(features)]
    near, cosines = nearest_features(rows)
    ids, effects = logit_effects(model, rows, vocabulary)
    terms: dict[Key, list[dict[Any, Any]]] = defaultdict(list)
    for row in tables.terms.to_dict("records"):
        terms[row["layer"], row["feature"]].append(row)
    scores = {(row["layer"], row["feature"]): row for row in tables.scores.to_dict("records")}
    n_contexts = statistics.context_cell.shape[2]
    place = 0
    for layer in np.unique(layers).tolist():
        own = features[layers == layer]
        genes = ranked_genes(statistics, layer, own, len(corpus.symbols), "occurrence")
        contexts = feature_contexts(statistics, corpus, layer, own, n_contexts, WINDOW)
        for feature, (ranked, counts), strongest in zip(own, genes, contexts, strict=True):
            key, half = (int(layer), int(feature)), ids.shape[1] // 2
            effect = [[texts[i], short(x)] for i, x in zip(ids[place], effects[place],
                                                            strict=True)]
            fired = max(int(statistics.fired[key]), 1)
            yield {
                "fired": int(statistics.fired[key]), "mean": short(statistics.mean_activation[key]),
                "histogram": statistics.activation_histogram[key].tolist(),
                "contexts": _contexts(strongest, corpus),
                "tokens": _tokens(token_table(statistics, *key, corpus, TOKENS)),
                "genes": [[str(corpus.symbols[gene]), int(n), short(n / fired)] for gene, n in
                          zip(ranked[:GENES], counts[:GENES], strict=True)],
                "terms": _terms(terms.get(key, [])),
                "nearest": [[*keys[i].tolist(), short(x)] for i, x in
                            zip(near[place], cosines[place], strict=True)],
                "raises": effect[:half], "lowers": effect[half:],
                "circuits": [[page, cut(text)] for page, text in tables.circuits.get(key, ())],
                "scores": _scores(scores.get(key)),
            }
            place += 1


def _contexts(found: Iterable[Context], corpus: Corpus) -> list[list[Any]]:
    return [[short(one.activation), str(corpus.cell_ids[one.cell]), cut(corpus.labels[one.cell]),
             one.before, one.token, one.after] for one in found]


def _tokens(table: pd.DataFrame) -> list[list[Any]]:
    shown = []
    for token, _, count, share, rate, genes in table.itertuples(index=False):
        more = f" … ({len(genes)} in all)" if len(genes) > GENES_PER_TOKEN else ""
        shown.append([token, count, short(share), short(rate),
                      cut(" ".join(genes[:GENES_PER_TOKEN]) + more)])
    return shown


def _terms(rows: Iterable[Mapping[Any, Any]]) -> list[list[Any]]:
    return [[cut(row["library"]), cut(row["Term"]), row["Overlap"], short(row["P-value"]),
             short(row["Adjusted P-value"]), cut(row["Genes"])] for row in rows]


def _scores(row: Mapping[Any, Any] | None) -> dict[str, Any]:
    if row is None or "verdict" not in row:
        return {}
    kinds = [kind for kind in ("gene", "family", "token") if f"{kind}_items" in row]
    return {"verdict": cut(row["verdict"]), "levels": [
        [kind, cut(row[f"{kind}_items"]), short(row[f"{kind}_f1"])] for kind in kinds]}


# --- the index -----------------------------------------------------------------------------------


def index_table(statistics: FeatureStatistics, keys: np.ndarray,
                panels: Sequence[Mapping[str, Any]], tables: RunTables
                ) -> tuple[list[IndexColumn], pd.DataFrame]:
    """The columns of the index and one row per key, with `layer` and `feature` first."""
    frame = pd.DataFrame(keys, columns=["layer", "feature"])
    frame["log10_E_f"] = statistics.log10_frequency[tuple(keys.T)]
    frame["tokens"] = [cut(" ".join(one[0] for one in panel["tokens"][:5])) for panel in panels]
    frame["genes"] = [cut(" ".join(one[0] for one in panel["genes"][:12])) for panel in panels]
    frame["circuits"] = [len(panel["circuits"]) for panel in panels]
    columns = [IndexColumn("layer", "Layer", "number", "choose"),
               IndexColumn("log10_E_f", "log10 E(f)", "number"),
               IndexColumn("tokens", "Tokens", "text"), IndexColumn("genes", "Genes", "text")]
    known = tables.features
    if "best_term" in known:
        rules = [name for name in map(str, known)
                 if name.startswith("q_") and name != "q_controls"]
        flags = {"table4_interpretable": "Interpretable (Table 4)",
                 "beyond_all_controls": "Ahead of all controls"}
        frame = frame.merge(known[["layer", "feature", "best_term", *rules, *flags]],
                            on=["layer", "feature"], how="left")
        columns += [IndexColumn("best_term", "Best term", "text"),
                    *(IndexColumn(name, f"FDR, {name[2:]}", "number") for name in rules),
                    *(IndexColumn(name, title, "flag", "positive")
                      for name, title in flags.items())]
        frame["best_term"] = [cut(text) if isinstance(text, str) else ""
                              for text in frame["best_term"]]
    if "verdict" in tables.scores:
        frame = frame.merge(tables.scores[["layer", "feature", "verdict"]],
                            on=["layer", "feature"], how="left")
        frame["verdict"] = frame["verdict"].fillna("")
        columns.append(IndexColumn("verdict", "Score says", "text", "choose"))
    columns.append(IndexColumn("circuits", "Circuits", "number", "positive"))
    return columns, frame


def curated(index: "pd.DataFrame", panels: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Up to six features to start with, one by each rule: [layer, feature, title, the rule].

    index, panels: as `index_table` and `feature_panels` make them. No feature comes twice; of
    equals the first in layer and index; a rule that finds none is left out.
    """
    empty = pd.Series(np.nan, index=index.index)

    def f1(level: str, verdict: str) -> pd.Series:
        said = index.get("verdict", empty) == verdict
        best = [next((one[2] for one in panel["scores"].get("levels", ()) if one[0] == level),
                     None) for panel in panels]
        return pd.Series(best, index=index.index, dtype=float).where(said)

    shares = [sorted((row[1] for row in panel.get("types", ())), reverse=True)[:2] or [0.0]
              for panel in panels]
    apart = pd.Series([one[0] - one[-1] for one in shares], index=index.index)
    behind = ~index.get("beyond_all_controls", empty).astype("boolean").fillna(True)
    rules = [
        ("In most circuits", "the feature with most entries in circuits",
         index["circuits"].where(index["circuits"] > 0)),
        ("A gene's feature", "scored gene-level, with the best F1 of its description",
         f1("gene", "gene")),
        ("A gene family's feature", "scored family-level, with the best F1",
         f1("family", "family")),
        ("A sub-word's feature", "scored sub-word, with the best F1", f1("token", "sub-word")),
        ("Enriched, and so are its controls", "the lowest FDR among features that are not ahead of "
         "all controls", -index.get("q_corpus", empty).where(behind)),
        ("Of one cell type", "the largest distance between the two types in which it is active on "
         "most tokens", apart.where(apart > 0)),
    ]
    found: list[list[Any]] = []
    keys = list(zip(index["layer"], index["feature"], strict=True))
    for title, rule, value in rules:
        taken = {(one[0], one[1]) for one in found}
        free = value[[key not in taken for key in keys]].dropna()
        if len(free):
            place: Any = free.idxmax()
            row = index.loc[place]
            found.append([int(row["layer"]), int(row["feature"]), title, rule])
    return found


def add_activity(panels: Sequence[dict[str, Any]], keys: np.ndarray, activity: Activity,
                 read: Callable[[Sequence[FeaturePlace]], list[list[Any]]]) -> None:
    """Give each panel `types` ([cell type, share of tokens, cells]) and `samples` (contexts of
    several strengths, with every token's activation, as `contexts_at` reads them)."""
    places: list[FeaturePlace] = []
    owners: list[int] = []
    for place, (layer, feature) in enumerate(keys.tolist()):
        panels[place].update(types=[[cut(name), short(share), cells] for name, share, cells in
                                    activity.of(layer, feature)], samples=[])
        for cell, position in activity.samples[layer, feature].tolist():
            if cell >= 0:
                places.append((layer, feature, cell, position))
                owners.append(place)
    for place, (strength, label, pieces) in zip(owners, read(places), strict=True):
        panels[place]["samples"].append([strength, cut(label), pieces])


def make_pages(model: "PreTrainedModel", transcoders: Transcoders, statistics: FeatureStatistics,
               corpus: Corpus, run: Profile) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Collect and write `results/<profile>/feature_pages`; returns the index and the panels."""
    from tqdm import tqdm

    tables = read_tables(run.results)
    least = min(run.live_cut, run.live_cut_table4)
    keys = page_features(statistics, least, tables.circuits)
    if len(keys) < 2:
        raise InputError(f"Fewer than two features have log10 E(f) >= {least:g}, so there is "
                         "nothing to compare; train longer or lower the live cut.")
    panels = list(tqdm(feature_panels(model, transcoders, statistics, corpus, keys, tables),
                       total=len(keys), desc="features", unit="feature"))
    activity = read_activity(model, transcoders, statistics, corpus, run)
    add_activity(panels, keys, activity, lambda places: contexts_at(
        model, transcoders, corpus, places, run.forward_cells))
    columns, index = index_table(statistics, keys, panels, tables)
    write_pages(run.results / FOLDER, columns, index, panels, activation_edges(),
                curated=curated(index, panels), types_note=activity.note)
    return index, panels
