"""The index of features: what its data say, and what a reader can do with it in a browser."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from browser import ANSWER, answer_in, opened
from helpers import model_for, tiny_corpus, tiny_transcoders
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

from scfm_circuits import InputError
from scfm_circuits.circuits.attribution import logit_direction
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.features.contexts import feature_contexts, token_table
from scfm_circuits.features.counting import activation_edges
from scfm_circuits.features.gene_lists import gene_scores
from scfm_circuits.features.statistics import count_features
from scfm_circuits.report.boxes.feature_files import PART_BYTES, IndexColumn, index_box, write_pages
from scfm_circuits.report.boxes.features import (
    GENES,
    TOKENS,
    WINDOW,
    RunTables,
    circuit_membership,
    curated,
    feature_panels,
    index_table,
    logit_effects,
    nearest_features,
    page_features,
    read_tables,
)

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">' \\ \u2028 <!-- ]]> $x$ &lt;"
NONE = pd.DataFrame({"layer": [], "feature": []})


# --- the data -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted() -> tuple[Any, ...]:
    corpus = tiny_corpus()
    model = model_for(corpus)
    transcoders = tiny_transcoders(model)
    return model, transcoders, count_features(model, transcoders, corpus, 4, progress=False), corpus


def test_panels_say_what_the_statistics_say(counted: tuple[Any, ...]) -> None:
    model, transcoders, statistics, corpus = counted
    terms = pd.DataFrame([{"layer": 1, "feature": 3, "library": "L", "rank": 1, "Term": HOSTILE,
                           "Overlap": "2/3", "P-value": 0.01, "Adjusted P-value": 0.02,
                           "Genes": "A;B"}])
    scores = pd.DataFrame([{"layer": 1, "feature": 3, "verdict": "gene-level",
                            "gene_items": "CD14", "gene_f1": 0.5}])
    keys = page_features(statistics, -9, [(1, 3)])
    assert {(1, 3)} <= set(map(tuple, keys.tolist()))
    tables = RunTables(NONE, terms, scores, {(1, 3): [("x.html", HOSTILE)]})
    panels = list(feature_panels(model, transcoders, statistics, corpus, keys, tables))
    assert len(panels) == len(keys)
    for (layer, feature), panel in zip(keys.tolist(), panels, strict=True):
        table = token_table(statistics, layer, feature, corpus).head(TOKENS)
        assert [row[0] for row in panel["tokens"]] == table["token"].tolist()
        for column, place in (("count", 1), ("share", 2), ("rate", 3)):
            assert [row[place] for row in panel["tokens"]] == pytest.approx(
                table[column].tolist(), rel=1e-3)
        assert [row[4].split(" … ")[0].split() for row in panel["tokens"]] == [
            genes[:5] for genes in table["genes"]]
        own = gene_scores(statistics, layer, len(corpus.symbols), "occurrence")[feature]
        assert [row[1] for row in panel["genes"]] == sorted(own.data.tolist(), reverse=True)[:GENES]
        (contexts,) = feature_contexts(statistics, corpus, layer, np.array([feature]), 5, WINDOW)
        assert [row[3:] for row in panel["contexts"]] == [
            [one.before, one.token, one.after] for one in contexts]
        assert sum(panel["histogram"]) == panel["fired"] == statistics.fired[layer, feature]
    (panel,) = (one for key, one in zip(keys.tolist(), panels, strict=True) if key == [1, 3])
    assert panel["terms"] == [["L", HOSTILE, "2/3", 0.01, 0.02, "A;B"]]
    assert panel["scores"] == {"verdict": "gene-level", "levels": [["gene", "CD14", 0.5]]}
    assert panel["circuits"] == [["x.html", HOSTILE]]
    columns, index = index_table(statistics, keys, panels, tables)
    assert [one.name for one in columns][-2:] == ["verdict", "circuits"]
    row = index[(index["layer"] == 1) & (index["feature"] == 3)].iloc[0]
    assert row["verdict"] == "gene-level" and row["circuits"] == 1
    assert row["log10_E_f"] == statistics.log10_frequency[1, 3]


def test_nearest_features_against_sklearn() -> None:
    rows = torch.randn(40, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = cosine_similarity(rows.numpy())
    np.fill_diagonal(expected, -np.inf)
    places, cosines = nearest_features(rows, 5, batch=16)
    np.testing.assert_array_equal(places, np.argsort(-expected, axis=1)[:, :5])
    np.testing.assert_allclose(cosines, -np.sort(-expected, axis=1)[:, :5])


def test_logit_effects_are_those_of_a_circuit_but_for_the_norms_division(
    counted: tuple[Any, ...]
) -> None:
    model, transcoders, _, corpus = counted
    layer, size = transcoders.n_layers - 1, len(corpus.tokenizer)
    ids, effects = logit_effects(model, transcoders.W_dec[layer], size, k=4)
    frozen = freeze(model, transcoders, corpus.tokens[0][corpus.mask[0]])
    at = int(corpus.mask[0].sum()) - 1
    for feature in (0, 5):
        by_circuit = np.array([float(transcoders.W_dec[layer, feature] @ logit_direction(
            frozen, int(token), at).vector) for token in range(size)])
        order = np.argsort(by_circuit)
        assert ids[feature].tolist() == [*order[::-1][:4], *order[:4]]
        ratio = effects[feature] / by_circuit[ids[feature]]
        assert ratio == pytest.approx(np.full(8, ratio[0]), rel=1e-6) and ratio[0] > 0


def test_where_circuits_name_a_feature() -> None:
    nodes = pd.DataFrame([
        {"target": "the call", "kind": "feature", "layer": "1", "feature": "20", "position": "4",
         "token": "_CD", "influence": "0.25"},
        {"target": "the paper's target", "kind": "feature", "layer": "1", "feature": "20",
         "position": "9", "token": ".", "influence": "0.5"},
        {"target": "the call", "kind": "error", "layer": "0", "feature": "", "position": "4",
         "token": "_CD", "influence": "1"},
    ])
    groups = pd.DataFrame([{"cell": "c", "cell_type": HOSTILE, "target": "7", "supernode": "1",
                            "features": "1.20 0.110"}])
    found = circuit_membership(nodes, groups)
    assert set(found) == {(1, 20), (0, 110)}  # not 0.11, a number
    page = "07_endothelial_case_study.html"
    assert found[1, 20][:2] == [
        (page, "case study, circuit of the call: token 5 (_CD, influence 0.25)"),
        (page, "case study, circuit of the paper's target: token 10 (., influence 0.5)")]
    assert HOSTILE in found[0, 110][0][1]


def test_a_circuit_of_other_transcoders(counted: tuple[Any, ...]) -> None:
    with pytest.raises(InputError, match="names feature 999 of layer 0"):
        page_features(counted[2], -9, [(0, 999)])


@given(st.lists(st.sampled_from(["NA", "nan", "null", "None", "<NA>", "-1.#IND", "x,\"y\"", "1e5",
                                 "007"]), min_size=3, max_size=3))
def test_names_that_look_missing_are_read_as_they_are(names: list[str]) -> None:
    first, second, third = names
    with tempfile.TemporaryDirectory() as folder:
        tables = Path(folder) / "tables"
        tables.mkdir()
        keys = {"layer": [0, 0], "feature": [1, 2]}
        for name, columns in (
                ("features", {"best_term": [first, None], "q_enrichr": [0.5, np.nan]}),
                ("feature_terms", {"Term": [second, "3"], "Genes": ["NA", "A;B"]}),
                ("feature_scores", {"token_items": [third, "12"], "token_f1": [0.1, np.nan]})):
            pd.DataFrame({**keys, **columns}).to_csv(tables / f"{name}.csv", index=False)
        found = read_tables(Path(folder))
    assert str(found.features["best_term"][0]) == first and pd.isna(found.features["best_term"][1])
    assert found.features["q_enrichr"].isna().tolist() == [False, True]
    assert found.terms["Term"].tolist() == [second, "3"] and found.terms["Genes"][0] == "NA"
    assert found.scores["token_items"].tolist() == [third, "12"]


def test_tables_that_are_missing_or_broken(tmp_path: Path) -> None:
    tables = read_tables(tmp_path)
    assert tables.circuits == {} and len(tables.features) == len(tables.terms) == 0
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "features.csv").write_bytes(b"layer,feature\n\xff,1\n")
    with pytest.raises(InputError, match=r"features\.csv cannot be read"):
        read_tables(tmp_path)


def test_an_index_without_its_panels_is_not_written(tmp_path: Path) -> None:
    columns, frame = synthetic(3)
    with pytest.raises(InputError, match="differ in number"):
        write_pages(tmp_path / "out", columns, frame, [], activation_edges())
    assert not (tmp_path / "out").exists() and "no feature pages" in index_box(tmp_path / "out")


# --- the page -------------------------------------------------------------------------------------

ROWS = 17_216
"""The live features of the paper's 24 layers."""


def synthetic(rows: int) -> tuple[list[IndexColumn], pd.DataFrame]:
    """An index of the paper's size; every tenth row has the gene CD14, row 5 hostile texts."""
    rng = np.random.default_rng(0)
    names = np.array([f"GENE{i}" for i in range(2000)])
    frame = pd.DataFrame({"layer": np.arange(rows) // 718, "feature": np.arange(rows) % 718,
                          "log10_E_f": rng.uniform(-4, 0, rows)})
    frame["genes"] = [" ".join(one) for one in rng.choice(names, (rows, 12))]
    frame.loc[::10, "genes"] += " CD14"
    frame["best_term"] = [f"Regulation of Process {i} (GO:{i:07})" for i in
                          rng.integers(0, 6000, rows)]
    frame["q_corpus"] = np.where(np.arange(rows) % 7 == 0, np.nan, rng.uniform(0, 1, rows))
    frame["beyond"] = np.arange(rows) % 100 == 0
    frame["verdict"] = np.where(np.arange(rows) % 2, "sub-word", "gene-level")
    if rows > 5:
        frame.loc[5, ["genes", "verdict"]] = HOSTILE
    return [IndexColumn("layer", "Layer", "number", "choose"),
            IndexColumn("log10_E_f", "log10 E(f)", "number"),
            IndexColumn("genes", "Genes", "text"), IndexColumn("best_term", "Best term", "text"),
            IndexColumn("q_corpus", "FDR", "number"),
            IndexColumn("beyond", "Ahead", "flag", "positive"),
            IndexColumn("verdict", "Score says", "text", "choose")], frame


def synthetic_panels(rows: int) -> Iterator[dict[str, Any]]:
    """As large as real ones."""
    for i in range(rows):
        text = HOSTILE if i == 5 else f"_T{i}"
        yield {"fired": 100 + i, "mean": 0.5, "histogram": [0] * 10 + [5, 9, 2] + [0] * 19,
               "contexts": [[1.5, "cell", "type", "_before " * 6, text, "_after " * 6]] * 5,
               "tokens": [[text, 9, 0.5, 0.1, "A B C D E"]] * 8, "genes": [[text, 9, 0.1]] * 20,
               "terms": [["Library", text, "2/3", 0.01, 0.02, "A;B;C"]] * 6,
               "nearest": [[i % 24, 7, 0.9]] * 5, "raises": [[text, 0.1]] * 8,
               "lowers": [[text, -0.1]] * 8, "circuits": [["08_controls.html", text]],
               "types": [["B cell", 0.5, 20], [text, 0.25, 20]],
               "samples": [[1.5, "B cell", [["_CD", 1.5, "CD14"], [text, 0.0, ""]]]],
               "scores": {"verdict": text, "levels": [["token", text, 0.25], ["gene", text, 0.5]]}}


DRIVER = r"""
const all = (selector) => [...document.querySelectorAll(selector)];
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const rows = () => all("#feature-index > .table-scroll tr[aria-rowindex]");
const cells = (row) => [...row.children].map((cell) => cell.textContent);
const shown = () => ({ count: all("[role=status]")[0].textContent, hash: location.hash,
  first: rows().length ? cells(rows()[0]) : null, drawn: rows().length });
const labelled = (text) => all("label").find((one) => one.textContent.trim().startsWith(text))
  .querySelector("input, select");
const type = (text) => {
  const input = labelled("Search");
  input.value = text;
  const before = performance.now();
  input.dispatchEvent(new Event("input"));
  document.body.offsetHeight;
  return performance.now() - before;
};
const set = (text, value) => {
  const input = labelled(text);
  if (input.type === "checkbox") input.checked = value; else input.value = value;
  input.dispatchEvent(new Event("change"));
};
const press = (text) => all("button").find((one) => one.textContent === text).click();
async function until(test) {
  for (let wait = 0; wait < 4000 && !test(); wait++) await pause(25);
  if (!test()) throw new Error(`never: ${test}`);
}
async function drive() {
  const told = {};
  await until(() => all(".feature-part").length);
  told.deep = { title: all(".feature-panel h2")[0].textContent, ...shown(),
    focus: document.activeElement.textContent, loaded: performance.getEntriesByType("resource")
      .map((entry) => entry.name) };
  press("Close"); told.closed = { ...shown(), hidden: all(".feature-panel")[0].hidden };
  press("Reset"); told.reset = shown();
  told.times = [..."cd14 gene1"].map((_, i, text) => type(text.slice(0, i + 1).join("")));
  type("cd14"); told.found = shown();
  type("cd14 l2.f"); told.two = shown();
  type("no such thing"); told.none = shown();
  type(""); set("Layer", "3"); told.layer = shown();
  set("Ahead", true); told.flag = shown(); press("Reset");
  press("log10 E(f)"); told.rising = shown();
  press("log10 E(f)"); told.falling = shown();
  press("FDR"); told.fdr = shown();
  all("#feature-index > .table-scroll")[0].scrollTop = 1e9; await pause(100);
  told.last = cells(rows().at(-1)); press("Reset");
  told.times.push(...[0, 1].map(() => { const t = performance.now(); press("Best term");
    document.body.offsetHeight; return performance.now() - t; }));
  press("Reset");
  location.hash = "#L0.F5"; await until(() => all(".feature-part").length);
  told.panel = all(".feature-panel")[0].textContent;
  told.start = all(".feature-start li")[0].textContent;
  told.sticky = (() => {
    all("#feature-index > .table-scroll")[0].scrollLeft = 1e4;
    const [frame, name] = [all("#feature-index > .table-scroll")[0], rows()[0].children[0]]
      .map((one) => one.getBoundingClientRect().left);
    return Math.abs(frame - name) < 3;
  })();
  told.beside = all(".feature-panel")[0].getBoundingClientRect().top < innerHeight / 2;
  told.hostile = { marked: all("mark")[0].textContent, row: cells(rows()[5])[3],
    images: all("#feature-index :is(img, script, b)").length, title: document.title };
  all(".feature-panel a[href^='#L']")[0].click();
  await until(() => all(".feature-panel h2")[0].textContent !== "Feature 5, layer 0"
    && all(".feature-part").length);
  told.followed = { title: all(".feature-panel h2")[0].textContent, hash: location.hash };
  location.hash = "#L99.F1"; await pause(100); told.missing = shown().count;
  told.wide = document.documentElement.scrollWidth <= innerWidth;
  const requests = () => performance.getEntriesByType("resource").map((entry) => entry.name);
  told.requests = requests().filter((one) => !one.startsWith("file:"));
  // One that does leave the page, to see that it would have been noticed.
  new Image().src = "http://elsewhere.invalid/control.png";
  for (let wait = 0; wait < 400 && requests().every((one) => !one.includes("elsewhere")); wait++) {
    await pause(50);
  }
  told.control = requests().filter((one) => one.includes("elsewhere"));
  return told;
}
drive().catch((error) => String(error.stack)).then(answered);
"""


def make_page(folder: Path) -> Path:
    """A page with an index of ROWS synthetic features that opens one and drives itself."""
    columns, frame = synthetic(ROWS)
    data = folder / "downloads" / "feature_pages"
    write_pages(data, columns, frame, synthetic_panels(ROWS), activation_edges(),
                curated=[[0, 5, HOSTILE, "the rule"]], types_note="The note.")
    for name in ("features.js", "evidence.js", "dom.js", "custom.css", "features.css",
                 "evidence.css"):
        shutil.copy(ROOT / "book" / "_static" / name, folder)
    page = folder / "page.html"
    page.write_text(
        '<!doctype html><html><head><meta charset="utf-8"><title>Features</title>'
        '<link rel="stylesheet" href="custom.css"><link rel="stylesheet" href="features.css">'
        "<script>location.hash = '#L2.F10&q=cd14&layer=2&sort=-log10_E_f';</script>"
        '<link rel="stylesheet" href="evidence.css"><script src="features.js"></script>'
        '<script src="evidence.js"></script><script src="dom.js"></script></head><body>'
        f"{index_box(data)}<script>{ANSWER}{DRIVER}</script></body></html>", encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_page(tmp_path_factory.mktemp("index")).parent


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, Any]:
    answer = answer_in(opened(folder / "page.html", "--host-resolver-rules=MAP * ~NOTFOUND",
                            marker='data-source="downloads/feature_pages/', budget=200_000))
    assert isinstance(answer, dict), answer
    return answer


def test_parts_are_small_and_in_ascii(folder: Path) -> None:
    parts = list((folder / "downloads" / "feature_pages").glob("*.js"))
    assert len(parts) > 50
    for part in parts:
        text = part.read_text(encoding="ascii")
        assert len(text) <= PART_BYTES + 100 and "<" not in text


def test_a_deep_link_opens_a_feature_and_loads_its_part_alone(told: dict[str, Any]) -> None:
    deep = told["deep"]
    assert deep["title"] == deep["focus"] == "Feature 10, layer 2"
    assert deep["hash"] == "#L2.F10&q=cd14&layer=2&sort=-log10_E_f"
    assert sum("/panels_" in name for name in deep["loaded"]) <= 1
    frame = synthetic(ROWS)[1]
    own = frame[(frame["layer"] == 2) & frame["genes"].str.contains("CD14")]
    assert deep["count"] == f"{len(own)} of 17,216 features"
    best = own.loc[own["log10_E_f"].idxmax()]
    assert deep["first"][0] == f"L2.F{best['feature']}"
    assert told["closed"]["hidden"] and "L2.F10" not in told["closed"]["hash"]


def test_search_and_filters(told: dict[str, Any]) -> None:
    frame = synthetic(ROWS)[1]
    has = frame["genes"].str.contains("CD14")
    assert told["reset"]["count"] == "17,216 of 17,216 features" and told["reset"]["hash"] == ""
    assert told["found"]["count"] == f"{has.sum():,} of 17,216 features"
    assert told["found"]["hash"] == "#q=cd14"
    assert told["two"]["count"].startswith(f"{(has & (frame['layer'] == 2)).sum()} of")
    assert told["none"]["count"].startswith("0 of") and told["none"]["first"] is None
    assert told["layer"]["count"].startswith("718 of") and told["layer"]["hash"] == "#layer=3"
    both = (frame["layer"] == 3) & frame["beyond"]
    assert told["flag"]["count"].startswith(f"{both.sum()} of")
    assert all(0 < told[key]["drawn"] < 100 for key in ("reset", "found", "layer"))


def test_order(told: dict[str, Any]) -> None:
    frame = synthetic(ROWS)[1]

    def name(row: int) -> str:
        return f"L{frame['layer'][row]}.F{frame['feature'][row]}"

    assert told["rising"]["first"][0] == name(frame["log10_E_f"].idxmin())
    assert told["falling"]["first"][0] == name(frame["log10_E_f"].idxmax())
    assert told["fdr"]["first"][0] == name(frame["q_corpus"].idxmin())
    # What is missing comes last, in the order of the table.
    missing = frame.index[frame["q_corpus"].isna()]
    assert told["last"][0] == name(missing[-1])


def test_markup_stays_text_and_links_lead_on(told: dict[str, Any]) -> None:
    hostile = told["hostile"]
    assert hostile["marked"] == hostile["row"] == HOSTILE
    assert hostile["images"] == 0 and hostile["title"] == "Features"
    assert told["followed"] == {"title": "Feature 7, layer 5", "hash": "#L5.F7"}
    assert told["missing"].endswith("no live feature L99.F1")


def test_nothing_is_fetched_and_nothing_is_wider_than_the_page(told: dict[str, Any]) -> None:
    assert told["requests"] == [] and told["control"] and told["wide"]


def test_a_panel_says_where_it_fires_and_names_stay_in_sight(told: dict[str, Any]) -> None:
    panel = told["panel"]
    assert f"Best description: {HOSTILE} (as genes; F1 0.5" in panel
    assert "B cell" in panel and "The note." in panel and "20 cells" in panel
    assert told["start"] == f"{HOSTILE} (L0.F5): the rule"
    assert told["sticky"] and told["beside"]


def test_six_are_chosen_by_rule_and_none_twice() -> None:
    index = pd.DataFrame({
        "layer": range(6), "feature": 7, "circuits": [9, 9, 0, 1, 0, 0],
        "verdict": ["gene", "gene", "family", "sub-word", "none", "none"],
        "q_corpus": [0.1, 0.2, 0.3, 0.4, 1e-9, np.nan],
        "beyond_all_controls": [False, False, False, False, True, None]})
    levels = [["gene", "A", 0.9], ["family", "B", 0.8], ["token", "C", 0.7]]
    panels = [{"scores": {"levels": levels}, "types": [["a", 0.2, 5], ["b", 0.1 * i, 5]]}
              for i in range(6)]
    found = curated(index, panels)
    assert [(one[0], one[2]) for one in found] == [
        (0, "In most circuits"), (1, "A gene's feature"), (2, "A gene family's feature"),
        (3, "A sub-word's feature"), (5, "Of one cell type")]
    assert curated(index[["layer", "feature", "circuits"]].assign(circuits=0),
                   [{"scores": {}}] * 6) == []
