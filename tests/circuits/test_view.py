"""The interactive circuit: what its data say, and what a reader can do with it in a browser."""

import hashlib
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import ANSWER, answer_in, opened
from helpers import model_for, tiny_corpus, tiny_model, tiny_profile, tiny_transcoders, tokens
from hypothesis import given
from hypothesis import strategies as st

from scfm_circuits import InputError
from scfm_circuits.circuits.attribution import logit_direction
from scfm_circuits.circuits.circuit import Circuit, Edge, Expansion, Node
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.search import trace, trace_feature
from scfm_circuits.circuits.view import MAX_GENES, MAX_TEXT, Detail, circuit_view, feature_details
from scfm_circuits.common.profile import load_profile
from scfm_circuits.enrichment.gene_sets import parse_gmt
from scfm_circuits.enrichment.rules import RULES
from scfm_circuits.enrichment.terms import term_table
from scfm_circuits.features.contexts import token_table
from scfm_circuits.features.gene_lists import gene_lists
from scfm_circuits.features.statistics import count_features
from scfm_circuits.report.boxes.circuit import Choice
from scfm_circuits.report.report import Report

ROOT = Path(__file__).resolve().parents[2]
VENDOR = ROOT / "book" / "_extra" / "vendor" / "d3"
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">' \\ \u2028 <!-- ]]> $x$ &lt;"
TEXTS = [" CD", "14", HOSTILE, " LYZ", " is", "."]
GENES = ["CD14", "CD14", None, "LYZ", None, None]


@pytest.fixture(scope="module")
def traced() -> Circuit:
    model = tiny_model()
    frozen = freeze(model, tiny_transcoders(model), tokens(6))
    return trace_feature(frozen, 2, 5, 5, branches=12, depth=4, max_nodes=60)


def made() -> Circuit:
    """A circuit small enough to know by heart; its target's contributions sum to 10."""
    nodes = [Node("T", "feature", 2, 5, 5, 7, 6.0), Node("A", "feature", 1, 5, 5, 3, 2.0),
             Node("H", "head", 1, 5, 0, 1, 3.0), Node("B", "feature", 0, 0, 0, 9, 1.0),
             Node("E", "embedding", -1, 2, 2, 4, 0.5), Node("X", "error", 0, 5, 5, -1, 0.1)]
    edges = [Edge("A", "T", -4.0), Edge("H", "T", 3.0), Edge("X", "T", 0.5),
             Edge("B", "H", 3.0), Edge("E", "A", 1.0)]
    rest = (0.0, 0.0, 0.0, 0.0, 0.0)
    expansions = [Expansion("T", 6.0, -0.5, *rest, 10.0), Expansion("H", 3.0, 3.0, *rest, 4.0),
                  Expansion("A", 2.0, 1.0, *rest, 2.0)]
    return Circuit("T", {node.id: node for node in nodes}, edges,
                   {one.node: one for one in expansions})


DETAILS: dict[str, Detail] = {
    "A": {"tokens": [" LYZ", HOSTILE], "genes": ["LYZ", "CST3", HOSTILE], "term": HOSTILE},
    "B": {"genes": ["CD14", "S100A8"]},
}


# --- the data -------------------------------------------------------------------------------------


def test_a_view_by_hand() -> None:
    view = circuit_view(made(), TEXTS, GENES, DETAILS)
    nodes = {node["id"]: node for node in view["nodes"]}
    edges = {(edge["source"], edge["target"]): edge for edge in view["edges"]}
    assert view["target"] == "T" and view["kinds"] == ["feature", "head", "embedding", "error"]
    assert view["rows"] == ["embedding", "L0 MLP", "L1 heads", "L1 MLP", "L2 MLP"]
    assert [column["position"] for column in view["columns"]] == [0, 2, 5]
    assert [edge["carried"] for edge in view["edges"]] == [0.4, 0.3, 0.225, 0.2, 0.05]
    assert edges["B", "H"] == {"id": "e3", "source": "B", "target": "H", "weight": 3.0,
                               "share": 0.75, "carried": 0.225}
    # A head stands in the column of the token it read.
    assert (nodes["H"]["column"], nodes["H"]["token"], nodes["H"]["gene"]) == (0, " CD", "CD14")
    assert nodes["A"]["genes"] == ["LYZ", "CST3", HOSTILE] and nodes["A"]["influence"] == 0.4
    assert nodes["T"]["value_name"] == "pre-activation" and nodes["E"]["value_name"] == "norm"


def test_every_number_is_the_circuits(traced: Circuit) -> None:
    view = circuit_view(traced, TEXTS, GENES)
    influence = traced.influence()
    assert len(view["nodes"]) == len(traced.nodes) and len(view["edges"]) == len(traced.edges)
    assert {node["kind"] for node in view["nodes"]} >= {"feature", "head"}
    for node in view["nodes"]:
        assert node["influence"] == pytest.approx(influence[node["id"]], rel=1e-5)
        assert node["value"] == pytest.approx(traced.nodes[node["id"]].value, rel=1e-5)
    for edge in view["edges"]:
        kept = traced.edges[int(edge["id"][1:])]
        assert (edge["source"], edge["target"]) == (kept.source, kept.target)
        assert edge["weight"] == pytest.approx(kept.weight, rel=1e-5)
    rows = {node["id"]: node["row"] for node in view["nodes"]}
    assert all(rows[edge["source"]] < rows[edge["target"]] for edge in view["edges"])


def test_the_heaviest_edges_are_kept(traced: Circuit) -> None:
    whole = circuit_view(traced, TEXTS, GENES)
    view = circuit_view(traced, TEXTS, GENES, max_edges=10)
    assert view["edges"] == whole["edges"][:10]
    assert view["total_edges"] == len(traced.edges) > 10
    assert view["total_nodes"] == len(traced.nodes)
    ends = {end for edge in view["edges"] for end in (edge["source"], edge["target"])}
    assert {node["id"] for node in view["nodes"]} == ends | {traced.target}
    used = {node["column"] for node in view["nodes"]}
    assert used == set(range(len(view["columns"])))


def test_a_logit_stands_on_top() -> None:
    model = tiny_model()
    frozen = freeze(model, tiny_transcoders(model), tokens(6))
    target = Node("logit", "logit", 3, 5, 5, 7, 0.0)
    circuit = trace(frozen, target, logit_direction(frozen, 7, 5), branches=6, depth=2,
                    max_nodes=20)
    view = circuit_view(circuit, TEXTS, GENES)
    assert view["rows"][-1] == "logit" and view["kinds"][-1] == "logit"


def test_long_texts_and_lists_are_cut() -> None:
    detail: Detail = {"genes": [f"G{i}" for i in range(500)], "term": "x" * 999}
    texts = ["y" * 999] * 6
    nodes = circuit_view(made(), texts, GENES, {"A": detail})["nodes"]
    (node,) = (node for node in nodes if node["id"] == "A")
    assert len(node["genes"]) == MAX_GENES and node["n_genes"] == 500
    assert len(node["term"]) == len(node["token"]) == MAX_TEXT


def test_numbers_that_are_none() -> None:
    circuit = made()
    circuit.edges[0] = circuit.edges[0]._replace(weight=float("nan"))
    with pytest.raises(InputError, match="not a finite number"):
        circuit_view(circuit, TEXTS, GENES)


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_no_text_ends_the_script(text: str) -> None:
    texts = [text + HOSTILE] * 6
    view = circuit_view(made(), texts, GENES, {"A": {"term": text, "genes": [HOSTILE]}})
    script = Choice("case", "", view).script
    assert script.isascii() and not set("<>&") & set(script) and script.count("\n") == 1
    match = re.fullmatch(r'companionCircuit\("case", (\{.*\})\);\n', script)
    assert match and json.loads(match[1]) == view


def test_details_are_those_of_the_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    corpus = tiny_corpus()
    model = model_for(corpus)
    transcoders = tiny_transcoders(model)
    profile = tiny_profile(monkeypatch, tmp_path)
    statistics = count_features(model, transcoders, corpus, 4, progress=False)
    frozen = freeze(model, transcoders, corpus.tokens[0][corpus.mask[0]])
    circuit = trace_feature(frozen, 1, 5, 6, branches=8, depth=2, max_nodes=20)
    library = parse_gmt(b"T cells\t\tCD3D\tCD8A\nOthers\t\tLYZ\tS100A8\tS100A9\tMS4A1\n",
                        "Cells", "user", "The library")
    details = feature_details(circuit, statistics, corpus, profile, library)
    features = [node for node in circuit.nodes.values() if node.kind == "feature"]
    assert set(details) == {node.id for node in features} and len(features) > 3
    symbols = corpus.symbols[np.unique(corpus.gene[corpus.gene >= 0])].tolist()
    for node in features:
        (genes,) = gene_lists(statistics, node.layer, np.array([node.index]), corpus, profile)
        table = token_table(statistics, node.layer, node.index, corpus)
        assert details[node.id]["genes"] == genes
        assert details[node.id]["tokens"] == table["token"].head(12).tolist()
        terms = term_table(genes, library, background=RULES["corpus"].background_for(symbols),
                           family=RULES["corpus"].family, odds=RULES["corpus"].odds)
        if len(terms):
            assert str(terms["Term"].iloc[0]) in details[node.id]["term"]
        else:
            assert "term" not in details[node.id]
    assert circuit_view(circuit, ["t"] * 99, [None] * 99, details)["nodes"]


# --- files and page -------------------------------------------------------------------------------


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    monkeypatch.setenv("SCFM_RESULTS", str(tmp_path))
    return Report(load_profile("smoke"), "07_endothelial_case_study")


def test_the_page_without_a_script(report: Report, tmp_path: Path) -> None:
    view = circuit_view(made(), TEXTS, GENES, max_edges=3)
    case = Choice("case", "case", view)
    shown = report.circuit(case, caption=HOSTILE)
    text = shown.bundle["text/html"]
    assert (tmp_path / "smoke" / "circuits" / "case.js").read_text() == case.script
    assert "(3 of 5 edges)" in text and 'href="downloads/circuits/case.json">' in text
    (listed,) = re.findall(r'data-choices="([^"]*)"', text)
    ((name, title, source),) = json.loads(html.unescape(listed))
    assert name == title == "case"
    assert re.fullmatch(r"downloads/circuits/case\.js\?v=[0-9a-f]{12}", source)
    assert 'data-library="vendor/d3/d3.min.js"' in text and not re.search(r"<(script|img)", text)
    assert "3 of 5 edges" in repr(shown)
    with pytest.raises(InputError, match="must be made of letters"):
        report.circuit(case._replace(name="../case"))


def test_the_library_is_the_one_recorded() -> None:
    library = (VENDOR / "d3.min.js").read_bytes()
    assert library.startswith(b"// https://d3js.org v7.9.0 Copyright 2010-2023 Mike Bostock")
    assert hashlib.sha256(library).hexdigest() == (
        "f2094bbf6141b359722c4fe454eb6c4b0f0e42cc10cc7af921fc158fceb86539")
    assert "Permission to use, copy, modify" in (VENDOR / "LICENSE").read_text()


# --- a real browser -------------------------------------------------------------------------------

DRIVER = r"""
const all = (selector) => [...document.querySelectorAll(`.circuit ${selector}`)];
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const isShown = (mark) => mark.getAttribute("display") !== "none";
const shown = () => ({ edges: all(".circuit-edges path").filter(isShown).length,
  nodes: all(".node").filter(isShown).map((node) => node.getAttribute("aria-label")),
  said: all(".circuit-status")[0].textContent });
const node = (start) => all(".node")
  .find((one) => one.getAttribute("aria-label").startsWith(start));
const labelled = (text) => all(".circuit-controls label")
  .find((label) => label.textContent.includes(text)).querySelector("input, select");
function set(text, value) {
  const input = labelled(text);
  if (input.type === "checkbox") input.click();
  else { input.value = value; input.dispatchEvent(new Event("input", { bubbles: true })); }
}
const press = (key) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const press_button = (name) => all("button").find((one) => one.textContent === name).click();
const focused = () => document.activeElement.getAttribute("aria-label");
const panel = () => ({ title: all("h3")[0]?.textContent ?? null,
  facts: Object.fromEntries(all("dt").map((dt) => [dt.textContent, dt.nextSibling.textContent])),
  lists: all(".circuit-connections > div").map((list) => [list.querySelector("h4").textContent,
    [...list.querySelectorAll("button")].map((one) => [...one.children].map(
      (part) => part.textContent))]) });
async function drive() {
  for (let wait = 0; wait < 8000 && !all("h3, .circuit-hint").length; wait++) await pause(50);
  await pause(100);
  const told = { start: shown(), hint: all(".circuit-panel")[0].textContent };
  node("Feature 3").dispatchEvent(new MouseEvent("click", { bubbles: true }));
  told.clicked = panel();
  told.live = all("h3")[0].closest("[aria-live]").getAttribute("aria-live");
  node("Feature 3").dispatchEvent(new PointerEvent("pointerenter"));
  node("Token embedding").dispatchEvent(new PointerEvent("pointerenter"));
  told.hostile_tip = all(".circuit-tip")[0].textContent;
  node("Feature 3").dispatchEvent(new PointerEvent("pointerenter"));
  told.tip = { hidden: all(".circuit-tip")[0].hidden, text: all(".circuit-tip")[0].textContent };
  all(".circuit-connections button")[1].click();
  told.followed = { ...panel(), focus: document.activeElement.textContent };
  press_button("Close"); told.closed = { ...panel(), focus: focused() };
  set("Sign", "-1"); told.negative = shown();
  set("Sign", "1"); told.positive = shown(); press_button("Reset filters"); told.reset = shown();
  set("gene tokens"); told.genes = shown(); press_button("Reset filters");
  set("transcoder errors"); told.kind = shown(); press_button("Reset filters");
  set("Least weight", 60);
  told.heavy = { ...shown(), value: labelled("Least weight").getAttribute("aria-valuetext") };
  set("Least weight", 100); told.heaviest = shown(); press_button("Reset filters");
  told.stops = all(".node[tabindex='0']").length;
  all(".node[tabindex='0']")[0].focus(); told.keys = [focused()];
  for (const key of ["ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft", "Home", "End"]) {
    press(key); told.keys.push(focused());
  }
  press("Home"); press("ArrowDown"); press("Enter"); told.chosen = panel().title;
  told.selected = all(".node[aria-selected='true']").length;
  press("Escape"); told.escaped = panel().title;
  const place = () => node("Feature 9").getAttribute("transform");
  press_button("Whole picture");
  const before = place();
  for (let i = 0; i < 4; i++) press_button("+");
  const mouse = (type, x) => new MouseEvent(type, { bubbles: true, clientX: x, view: window });
  all(".circuit-ground")[0].dispatchEvent(mouse("mousedown", 400));
  window.dispatchEvent(mouse("mousemove", 90));
  window.dispatchEvent(mouse("mouseup", 90));
  // The click that ends a drag chooses nothing.
  await pause(100);
  told.beyond = all(".circuit-beyond")[0].textContent;
  node("Feature 9").dispatchEvent(new MouseEvent("click", { bubbles: true }));
  const inside = (one, box) => one.left >= box.left && one.right <= box.right;
  await pause(100);
  told.revealed = inside(node("Feature 9").querySelector("path").getBoundingClientRect(),
    all(".circuit-ground")[0].getBoundingClientRect());
  told.zoomed = place() !== before;
  // An open panel may bring a scroll bar, and with it another width.
  press_button("Close"); await pause(100);
  press_button("Whole picture"); told.back = place() === before;
  told.images = all(":is(img, script, b)").length;
  told.title = document.title;
  told.labels = all(".circuit-columns text").map((text) => text.textContent);
  const requests = () => performance.getEntriesByType("resource").map((entry) => entry.name);
  told.requests = requests();
  // One that does leave the page, to see that it would have been noticed.
  new Image().src = "http://elsewhere.invalid/control.png";
  for (let wait = 0; wait < 800 && !requests().length; wait++) await pause(50);
  told.control = requests();
  told.wide = document.documentElement.scrollWidth <= innerWidth;
  return told;
}
drive().catch((error) => String(error.stack)).then(answered);
"""


SCRIPTS = ("circuit.js", "circuit_graph.js", "circuit_panel.js", "evidence.js", "dom.js",
           "custom.css", "circuit.css", "evidence.css")


def driven(report: Report, folder: Path, width: int) -> dict[str, Any]:
    """What the driver saw in a page with the circuit `made`."""
    case = Choice("case", "case", circuit_view(made(), TEXTS, GENES, DETAILS))
    shown = report.circuit(case, caption="All")
    shutil.copytree(folder / "smoke" / "circuits", folder / "downloads" / "circuits")
    shutil.copytree(VENDOR, folder / "vendor" / "d3")
    for name in SCRIPTS:
        shutil.copy(ROOT / "book" / "_static" / name, folder)
    (folder / "page.html").write_text(
        '<!doctype html><html><head><meta charset="utf-8"><title>Circuit</title>'
        + "".join(f'<script src="{name}"></script>' if name.endswith("js") else
                  f'<link rel="stylesheet" href="{name}">' for name in SCRIPTS)
        + "</head><body>"
        f'{shown.bundle["text/html"]}<script>{ANSWER}{DRIVER}</script></body></html>')
    # Not the title, which a text that got into the page as HTML would change.
    page = opened(folder / "page.html", "--host-resolver-rules=MAP * ~NOTFOUND", width=width,
                  marker='data-library="vendor', budget=500_000)
    answer = answer_in(page)
    assert isinstance(answer, dict), answer
    return answer


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCFM_RESULTS", str(folder))
        return driven(Report(load_profile("smoke"), "07_endothelial_case_study"), folder, 1280)


def test_a_click_opens_a_node_with_its_genes(told: dict[str, Any]) -> None:
    assert told["hint"].startswith("Choose a node")
    clicked = told["clicked"]
    assert clicked["title"] == "Feature 3, layer 1" and told["live"] == "polite"
    assert clicked["facts"]["its genes"] == f"LYZ CST3 {HOSTILE}"
    assert clicked["facts"]["best term"] == HOSTILE
    assert clicked["facts"]["activation"] == "2"
    assert clicked["facts"]["influence"].replace("\xa0", " ").startswith("40 % of the target's")
    (received, into), (given_to, out) = clicked["lists"]
    assert received == "Receives from (1)" and given_to == "Contributes to (1)"
    assert into[0][0] == "+1" and into[0][1].startswith("Token embedding")
    assert [text.replace("\xa0", " ") for text in out[0]] == [
        "\u22124", "Feature 7, layer 2, at .", "40 %"]
    assert not told["tip"]["hidden"] and "activation 2" in told["tip"]["text"]


def test_an_edge_leads_to_the_other_node(told: dict[str, Any]) -> None:
    followed = told["followed"]
    assert followed["title"] == followed["focus"] == "Feature 7, layer 2 (the target)"
    assert [row[0] for row in followed["lists"][0][1]] == ["\u22124", "+3", "+0.5"]
    assert told["closed"]["title"] is None
    assert told["closed"]["focus"].startswith("Feature 7, layer 2 (the target)")


def test_filters_hide_edges(told: dict[str, Any]) -> None:
    assert told["start"]["edges"] == 5 and len(told["start"]["nodes"]) == 6
    assert told["start"]["said"] == "5 of 5 edges and 6 of 6 nodes shown."
    assert told["negative"]["edges"] == 1
    assert [label.split(",")[0] for label in told["negative"]["nodes"]] == ["Feature 7",
                                                                           "Feature 3"]
    assert told["positive"]["edges"] == 4
    # B on CD14, the head that reads it, and the target they lead to.
    assert told["genes"]["edges"] == 2
    assert told["genes"]["said"] == "2 of 5 edges and 3 of 6 nodes shown."
    assert told["kind"]["edges"] == 4
    # Six tenths of the way from 5 to 40 per cent on a logarithmic scale are 17 per cent.
    assert told["heavy"]["edges"] == 4
    assert told["heavy"]["value"].replace("\xa0", " ") == "at least 17 %"
    assert told["heaviest"]["edges"] == 1 and told["reset"] == told["start"]


def test_the_keys_reach_every_node(told: dict[str, Any]) -> None:
    assert told["stops"] == 1
    names = [label.split(",")[0] for label in told["keys"]]
    assert names == ["Feature 7", "Feature 3", "Head 1", "Feature 9", "Head 1", "Feature 7",
                     "Token embedding"]
    assert told["chosen"] == "Feature 3, layer 1" and told["selected"] == 1
    assert told["escaped"] is None
    assert told["zoomed"] and told["back"]


def test_nothing_leaves_the_page_and_texts_stay_texts(told: dict[str, Any]) -> None:
    assert HOSTILE in told["hostile_tip"]
    assert told["images"] == 0 and told["title"] == "Circuit"
    # Files that the page loads from its own folder are not among the requests Chromium lists.
    assert told["requests"] == []
    assert told["control"] == ["http://elsewhere.invalid/control.png"]
    assert told["labels"][0] == "␣CD (CD14)" and told["labels"][1].startswith("</script><img")


def test_on_a_phone_what_is_outside_of_the_view_is_said_and_comes_in(
    report: Report, tmp_path: Path
) -> None:
    # Chromium's window is at least 500 pixels wide.
    seen = driven(report, tmp_path, 500)
    assert "← more to the left" in seen["beyond"] and seen["revealed"]
    assert seen["zoomed"] and seen["back"]
    assert seen["wide"] and seen["clicked"]["title"] == "Feature 3, layer 1"
