"""The explorer of circuits in a browser: another cell, pins, groups, names, search, the address."""

import html
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs

import numpy as np
import pytest
import torch
from browser import Tab, driven
from helpers import model_for, tiny_corpus, tiny_profile, tiny_transcoders

from scfm_circuits.circuits import calls as calls_module
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.search import trace_feature
from scfm_circuits.circuits.view import Detail, circuit_view
from scfm_circuits.common.profile import ROOT, load_profile
from scfm_circuits.enrichment.gene_sets import parse_gmt
from scfm_circuits.features.counting import activation_edges
from scfm_circuits.features.statistics import count_features
from scfm_circuits.report.boxes import explorer
from scfm_circuits.report.boxes.activity import (
    STRATA,
    WINDOW,
    contexts_at,
    levels,
    looked_at,
    read_activity,
)
from scfm_circuits.report.boxes.circuit import Choice
from scfm_circuits.report.report import Report

HOSTILE = "</script><img src=x onerror=\"document.title='pwned'\"><b>"
STATIC = ROOT / "book" / "_static"


# --- what the cells say ---------------------------------------------------------------------------


def test_the_first_cells_of_every_type_are_looked_at() -> None:
    labels = np.array(["b", "a", "b", "a", "b", "c"])
    assert looked_at(labels, per_type=2, most=100).tolist() == [1, 3, 0, 2, 5]
    assert looked_at(labels, per_type=2, most=2).tolist() == [1, 0, 5]


def test_levels_are_the_middles_of_equal_parts() -> None:
    histogram = np.zeros(32, int)
    histogram[10], histogram[20] = 4, 2
    middle = (activation_edges()[:-1] * 2**0.25)[[20, 10, 10]]
    assert levels(histogram).tolist() == middle.tolist() and STRATA == 3
    assert levels(np.zeros((5, 32))).shape == (5, 3)


def test_activity_is_what_the_transcoders_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    corpus = tiny_corpus(16)
    model = model_for(corpus)
    transcoders = tiny_transcoders(model)
    profile = tiny_profile(monkeypatch, tmp_path)
    statistics = count_features(model, transcoders, corpus, 4, progress=False)
    found = read_activity(model, transcoders, statistics, corpus, profile)
    cells = looked_at(corpus.labels)
    active = {}
    for cell in cells.tolist():
        tokens = torch.from_numpy(corpus.tokens[cell][corpus.mask[cell]])
        active[cell] = freeze(model, transcoders, tokens.numpy()).activations
    names = [name for name, _ in found.types]
    assert names == sorted(set(corpus.labels)) and sum(n for _, n in found.types) == len(cells)
    for place, name in enumerate(names):
        own = torch.cat([active[cell] for cell in cells.tolist() if corpus.labels[cell] == name], 1)
        expected = (own > 0).double().mean(dim=1)
        np.testing.assert_allclose(found.share[..., place], expected, atol=1e-6)
    rows = found.of(1, 3)
    assert [row[1] for row in rows] == sorted((row[1] for row in rows), reverse=True)
    wanted = levels(statistics.activation_histogram)
    for layer, feature in [(0, 2), (1, 3)]:
        for part in range(STRATA):
            cell, position = found.samples[layer, feature, part]
            away = [float((abs(z[layer, :, feature] - wanted[layer, feature, part]
                               ) + 1e9 * (z[layer, :, feature] <= 0)).min())
                    for z in active.values()]
            if cell < 0:
                assert min(away) > 1e8
                continue
            here = float(active[int(cell)][layer, position, feature])
            assert abs(here - wanted[layer, feature, part]) == pytest.approx(min(away), abs=1e-5)
    places = [(1, 3, int(cells[0]), 0), (0, 2, int(cells[-1]), 4)]
    contexts = contexts_at(model, transcoders, corpus, places, 2)
    for (layer, feature, cell, position), (strength, label, pieces) in zip(
            places, contexts, strict=True):
        z = active[cell][layer, :, feature]
        begin = max(0, position - WINDOW)
        assert label == corpus.labels[cell]
        assert strength == pytest.approx(float(z[position]), rel=1e-3)
        np.testing.assert_allclose([one[1] for one in pieces],
                                   z[begin : position + WINDOW + 1], rtol=5e-3)
    assert contexts_at(model, transcoders, corpus, [], 2) == []


class Chapter(Report):
    """As much of a chapter as the explorer asks."""

    def __init__(self, profile: Any) -> None:
        super().__init__(profile, "07_endothelial_case_study")
        self.corpus = tiny_corpus(16)
        self.model = model_for(self.corpus)
        self.transcoders = tiny_transcoders(self.model)
        self.statistics = count_features(self.model, self.transcoders, self.corpus, 4,
                                         progress=False)


def test_other_cells_are_those_that_the_model_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chapter = Chapter(tiny_profile(monkeypatch, tmp_path, circuit_nodes=20))
    labels, held_out = chapter.corpus.labels, np.flatnonzero(chapter.corpus.held_out)
    wrong = held_out[0]
    monkeypatch.setattr(calls_module, "predict_answers", lambda _model, corpus, cells: [
        "?" if cell == wrong else str(corpus.labels[cell]) for cell in cells])
    types = sorted(set(labels[held_out]), key=lambda one: -int((labels == one).sum()))
    but = types[-1]
    expected = []
    for name in types[:-1]:
        expected += [cell for cell in held_out if labels[cell] == name and cell != wrong][:1]
    own = calls_module.calls_of(chapter.model, chapter.corpus, chapter.profile)
    found = explorer.further_cells(own, but)
    assert sorted(found) == sorted(expected) and all(labels[cell] != but for cell in found)
    calls = explorer.further_calls(own, chapter.transcoders, but="none")
    assert 0 < len(calls) <= explorer.MOST_CELLS
    library = parse_gmt(b"T cells\t\tCD3D\tCD8A\n", "Cells", "user", "The library")
    shown = explorer.explore(cast(Any, chapter), calls, library, "All")
    names = [one.name for one in calls]
    for name in names:
        files = {path.suffix for path in (chapter.profile.results / "circuits").glob(f"{name}.*")}
        assert files == {".js", ".json", ".graphml"}
    (listed,) = re.findall(r'data-choices="([^"]*)"', shown.bundle["text/html"])
    assert [one[0] for one in json.loads(html.unescape(listed))] == names
    text = (chapter.profile.results / "circuits" / f"{names[0]}.js").read_text()
    view = json.loads(text.removeprefix(f'companionCircuit("{names[0]}", ').removesuffix(");\n"))
    by_id = {node["id"]: node for node in view["nodes"]}
    assert by_id[view["target"]]["name"] == calls[0].target and view["about"] == calls[0].about
    features = [node for node in view["nodes"] if node["kind"] == "feature"]
    assert features and all(node["types"] and node["contexts"] for node in features)


# --- the page -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page with the circuits of two cells."""
    folder = tmp_path_factory.mktemp("explorer")
    corpus = tiny_corpus(16)
    model = model_for(corpus)
    transcoders = tiny_transcoders(model)
    views = []
    for cell in (0, 1):
        frozen = freeze(model, transcoders, corpus.tokens[cell][corpus.mask[cell]])
        circuit = trace_feature(frozen, 1, 5, 12, branches=12, depth=3, max_nodes=60)
        details: dict[str, Detail] = {
            name: {"tokens": ["_CD", HOSTILE], "genes": ["CD14"], "term": "A term (1/2 genes)",
                   "term_name": "A term", "types": [["B cell", 0.5, 4], [HOSTILE, 0.25, 4]],
                   "contexts": [[1.5, HOSTILE, [["_CD", 1.5, "CD14"], [HOSTILE, 0.0, ""]]]]}
            for name, node in circuit.nodes.items() if node.kind == "feature"}
        genes = [f"G{i % 4}" for i in range(99)]
        views.append(circuit_view(circuit, [f"t{i}" for i in range(99)], genes, details,
                                  about=f"About cell {cell}.", types_note="The note."))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCFM_RESULTS", str(folder))
        shown = Report(load_profile("smoke"), "07").circuit(
            Choice("one", "The first cell", views[0]), Choice("two", HOSTILE, views[1]))
    shutil.copytree(folder / "smoke" / "circuits", folder / "downloads" / "circuits")
    shutil.copytree(ROOT / "book" / "_extra" / "vendor" / "d3", folder / "vendor" / "d3")
    names = ["dom.js", "circuit.js", "circuit_graph.js", "circuit_panel.js", "evidence.js",
             "custom.css", "circuit.css", "evidence.css"]
    for name in names:
        shutil.copy(STATIC / name, folder)
    path = folder / "page.html"
    path.write_text(
        '<!doctype html><html><head><meta charset="utf-8"><title>Circuit</title>'
        + "".join(f'<script src="{name}"></script>' if name.endswith("js") else
                  f'<link rel="stylesheet" href="{name}">' for name in names)
        + f'</head><body style="margin: 0">{shown.bundle["text/html"]}</body></html>')
    return path.as_uri()


@pytest.fixture(scope="module")
def tab(page: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with driven(tmp_path_factory.mktemp("browser")) as one:
        yield one


NODES = "[...document.querySelectorAll('.circuit .node')]"
LISTED = "[...document.querySelectorAll('.circuit-list li')]"
DRAWN = "document.querySelector('.circuit-status') && document.querySelectorAll('.node').length"


def opened_at(tab: Tab, address: str, width: int = 1280) -> None:
    """Load an address anew: a change behind the # alone would not."""
    tab.screen(width)
    tab.open("about:blank")
    tab.open(address)
    tab.until(DRAWN)


def state(tab: Tab) -> dict[str, list[str]]:
    return parse_qs(tab.run("location.hash.slice(1)"))


def test_another_cell_is_chosen_and_its_files_are_linked(tab: Tab, page: str) -> None:
    opened_at(tab, page)
    assert tab.run("location.hash") == ""
    assert tab.run("document.querySelector('.circuit-about').textContent") == "About cell 0."
    tab.run("""{ const list = document.querySelector('.circuit-choice select');
        list.value = 'two'; list.dispatchEvent(new Event('change')); }""")
    tab.until("document.querySelector('.circuit-about').textContent === 'About cell 1.'")
    assert state(tab) == {"circuit": ["two"]}
    links = tab.run("[...document.querySelectorAll('[data-file]')].map((one) => "
                    "[one.getAttribute('href'), one.textContent])")
    assert links == [["downloads/circuits/two.json", "two.json"],
                     ["downloads/circuits/two.graphml", "two.graphml"]]
    assert tab.run("document.querySelectorAll('.circuit-choice option')[1].textContent") == HOSTILE
    assert tab.run("document.title") == "Circuit" and tab.errors == []


def test_what_is_chosen_is_in_the_address_and_comes_back(tab: Tab, page: str) -> None:
    opened_at(tab, page)
    chosen = tab.run(f"{NODES}.map((one) => one.__data__.id)[3]")
    tab.run(f"{NODES}[3].dispatchEvent(new MouseEvent('click', {{ bubbles: true }}))")
    assert tab.run("document.querySelector('.circuit-panel h3').textContent")
    tab.run("""{ const field = document.querySelector('.circuit-panel input');
        field.value = 'Mine & <b>'; field.dispatchEvent(new Event('input')); }""")
    # By keys alone: to the target, and P pins it; the next one too.
    tab.run(f"{NODES}.find((one) => one.tabIndex === 0).focus()")
    for key in ("Home", "p", "ArrowDown", "p"):
        tab.run(f"document.activeElement.dispatchEvent(new KeyboardEvent('keydown', "
                f"{{ key: '{key}', bubbles: true, cancelable: true }}))")
    pinned = tab.run(f"{NODES}.filter((one) => one.classList.contains('pinned'))"
                     ".map((one) => one.__data__.id)")
    assert len(pinned) == 2 and len(tab.run(
        "[...document.querySelectorAll('.circuit-box')].map((one) => one.textContent)")) == 2
    said = state(tab)
    assert said["node"] == [chosen] and said["label"] == [f"{chosen}~Mine & <b>"]
    assert sorted(said["pin"][0].split(",")) == sorted(pinned)
    opened_at(tab, page + tab.run("location.hash"))
    tab.until("!!document.querySelector('.circuit-panel h3')")
    assert tab.run(f"{NODES}.filter((one) => one.classList.contains('pinned'))"
                   ".map((one) => one.__data__.id)") == pinned
    assert tab.run(f"{NODES}.find((one) => one.classList.contains('chosen')).__data__.id"
                   ) == chosen
    assert "Mine & <b>" in tab.run("[...document.querySelectorAll('.circuit-labels text')]"
                                   ".map((one) => one.textContent)")
    # An address may name what this circuit does not have.
    opened_at(tab, page + "#circuit=one&node=nothing&pin=a,b&group=x~c&label=d~e&by=html&weight=z")
    assert tab.run("document.querySelectorAll('.circuit-box').length") == 0
    opened_at(tab, page + "#circuit=elsewhere")
    assert tab.run("document.querySelector('.circuit-about').textContent") == "About cell 0."
    assert tab.errors == []


def test_pinned_nodes_become_a_group_and_rules_make_groups(tab: Tab, page: str) -> None:
    opened_at(tab, page)
    tab.run(f"{LISTED}.slice(1, 4).forEach((_, i) => {LISTED}[i + 1].lastChild.click())")
    assert tab.run("document.querySelectorAll('.circuit-box').length") == 4  # and the target
    tab.run("""{ document.querySelector('.circuit-forming input').value = 'My ~ group';
        document.querySelector('.circuit-forming button').click(); }""")
    boxes = "[...document.querySelectorAll('.circuit-box > button:first-child')]"
    names = tab.run(f"{boxes}.map((one) => one.firstChild.textContent)")
    assert "My ~ group (3)" in names and len(names) == 2 and "pin" not in state(tab)
    (group,) = state(tab)["group"]
    assert group.startswith("My - group~") and group.count("~") == 3
    # What flows into the target from the group is what its members pass on, by other paths too.
    assert tab.run(f"{boxes}[0].getAttribute('aria-label')").count("My ~ group adds") + tab.run(
        f"{boxes}[0].getAttribute('aria-label')").count("My ~ group takes away") == 1
    opened_at(tab, page + tab.run("location.hash"))
    assert "My - group (3)" in tab.run(f"{boxes}.map((one) => one.firstChild.textContent)")
    for rule, name in (("gene", "G"), ("term", "A term"), ("token", "_CD")):
        tab.run(f"""{{ const list = document.querySelector('.circuit-sub select');
            list.value = '{rule}'; list.dispatchEvent(new Event('input', {{ bubbles: true }})); }}
            """)
        assert any(one.startswith(name) for one in tab.run(
            f"{boxes}.map((one) => one.firstChild.textContent)")), rule
        assert state(tab)["by"] == [rule]
    tab.run("[...document.querySelectorAll('.circuit-sub button')].find((one) => "
            "one.textContent === 'Clear').click()")
    assert state(tab) == {"circuit": ["one"]} and tab.errors == []


def test_a_gene_is_found_and_filters_keep_the_whole_in_view(tab: Tab, page: str) -> None:
    opened_at(tab, page)
    assert len(tab.run(f"{LISTED}.map((one) => one.textContent)")) > 10
    tab.run("""{ const field = document.querySelector('.circuit-list input');
        field.value = 'g0 transcoder'; field.dispatchEvent(new Event('input')); }""")
    found = tab.run(f"{LISTED}.map((one) => one.textContent)")
    assert found and all("Transcoder error" in text and "(G0)" in text for text in found)
    assert state(tab)["q"] == ["g0 transcoder"]
    missed = tab.run(f"{NODES}.filter((one) => !one.classList.contains('missed')).length")
    assert missed == len(found)
    opened_at(tab, page + tab.run("location.hash"))
    assert tab.run(f"{LISTED}.map((one) => one.textContent)") == found
    tab.run("""{ const [slider] = document.querySelectorAll('.circuit-controls input');
        slider.value = 70; slider.dispatchEvent(new Event('input', { bubbles: true })); }""")
    outside = tab.run(f"""(() => {{
        const frame = document.querySelector('.circuit-ground').getBoundingClientRect();
        const seen = {NODES}.filter((one) => one.getAttribute('display') !== 'none');
        return [seen.length, seen.filter((one) => {{
          const box = one.querySelector('path').getBoundingClientRect();
          const [x, y] = [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
          return x < frame.left || x > frame.right || y < frame.top || y > frame.bottom;
        }}).length]; }})()""")
    assert 0 < outside[0] < 60 and outside[1] == 0
    assert state(tab)["weight"] == ["70"] and tab.errors == []


def test_a_finger_chooses_the_nearest_and_the_panel_says_where_it_fires(tab: Tab, page: str
                                                                        ) -> None:
    opened_at(tab, page, width=390)
    tab.run(f"""{{ const one = {NODES}.find((node) => node.__data__.kind === 'feature');
        const box = one.querySelector('path').getBoundingClientRect();
        document.querySelector('.circuit-window').dispatchEvent(new MouseEvent('click', {{
          bubbles: true, clientX: box.left - 3, clientY: box.top - 3 }})); }}""")
    assert tab.run("document.querySelector('.circuit-panel h3').textContent").startswith("Feature")
    panel = tab.run("document.querySelector('.circuit-panel').textContent")
    assert "B cell" in panel and "The note." in panel and HOSTILE in panel
    assert tab.run("document.querySelector('.circuit-panel .heat mark').textContent") == "CD"
    assert tab.run("document.querySelectorAll('.circuit :is(img, script, b)').length") == 0
    assert tab.run("document.documentElement.scrollWidth") <= 390
    tab.run("[...document.querySelectorAll('.circuit-viewing button')].find((one) => "
            "one.textContent === 'Full screen').click()")
    assert tab.run("document.querySelector('.circuit').getBoundingClientRect().top") == 0
    tab.run("document.querySelector('.circuit-viewing button').dispatchEvent(new KeyboardEvent("
            "'keydown', { key: 'Escape', bubbles: true }))")
    assert not tab.run("document.querySelector('.circuit').classList.contains('full')")
    assert tab.errors == []


def test_on_a_phone_only_the_target_is_named_until_there_is_room(tab: Tab, page: str) -> None:
    labels = "document.querySelectorAll('.circuit-labels text').length"
    opened_at(tab, page)
    wide = tab.run(labels)
    opened_at(tab, page, width=390)
    few = tab.run(labels)
    assert few <= 1 < wide
    named = [tab.run(f"""([...document.querySelectorAll('.circuit-viewing button')].find((one) =>
        one.textContent === '+').click(), {labels})""") for _ in range(4)]
    assert max(named) > few and tab.errors == [], named
