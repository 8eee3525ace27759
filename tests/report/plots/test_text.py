"""Text from files (labels, genes, tokens) is drawn as it is, whatever matplotlib makes of signs."""

import importlib
import inspect
import io
import pkgutil
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import tiny_model, tiny_transcoders, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from scfm_circuits.circuits.circuit import Circuit
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.origins import EVERY, PARTS, STATE
from scfm_circuits.circuits.origins import GENE as RIGHT_GENE
from scfm_circuits.circuits.search import strongest_features, trace_feature
from scfm_circuits.common.profile import load_profile
from scfm_circuits.features.known_truth import ALWAYS, TRANSCODERS
from scfm_circuits.features.unit_scores import AUROC, F1
from scfm_circuits.interpretability.scores import EITHER, FAMILY, GENE, NONE, SUB_WORD
from scfm_circuits.report import plots
from scfm_circuits.report.plots import (
    cells_and_training,
    circuits,
    enrichment,
    features,
    other_models,
    sentence,
    steering,
    sub_words,
)
from scfm_circuits.report.plots.style import literal
from scfm_circuits.report.plots.variants import variants
from scfm_circuits.report.sub_words import EARLY, KINDS, LATE

LONG = "hematopoietic multipotent progenitor cell of the bone marrow and of many another place"
ODD = ["CD4$+$ T", "a_b^c", r"\frac{a}{b}", "$", "$$", r"\$x$ and $\alpha$", r"ends in \ ",
       "_hidden", "%d {x}", "1e3", "2024-01-02", "<b>&amp;", "Müller", LONG, LONG + " too", ""]
OWN_MATHEMATICS = {r"$\log_{10} E(f)$, E(f): share of the tokens on which a feature fires"}


@pytest.fixture(autouse=True)
def closed() -> Any:
    yield
    plt.close("all")


def drawn(figure: Figure) -> list[str]:
    """All text of a figure as it is drawn; mathematics as it is written, between dollars."""
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    found = []
    for one in figure.findobj(Text):
        text, is_mathematics = one._preprocess_math(one.get_text())
        found.append(f"mathematics: {text}" if is_mathematics is True else text)
    return found


def shown(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"


# --- every figure, with odd text where it takes any ----------------------------------------------


def cells_per_type() -> tuple[Figure, list[str]]:
    labels = np.repeat(ODD, 3)
    return cells_and_training.cells_per_type(labels, np.arange(len(labels)) % 3 == 0), ODD


def odd_circuit() -> Circuit:
    """A circuit over as many tokens as there are odd texts."""
    model = tiny_model()
    n = len(ODD)
    run = freeze(model, tiny_transcoders(model), tokens(n))
    target = strongest_features(run, 2, n - 1, 1)[0]
    return trace_feature(run, 2, target, n - 1, branches=40, depth=3, max_nodes=300)


def circuit_picture() -> tuple[Figure, list[str]]:
    circuit = odd_circuit()
    places = {place for node in circuit.nodes.values() for place in (node.position, node.source)}
    figure = circuits.circuit_picture(circuit, ODD, [None, *ODD[:-1]], 3, max_edges=10_000)
    texts = [ODD[i] + (f" ({ODD[i - 1]})" if i and ODD[i - 1] else "") for i in sorted(places)]
    assert len(texts) > 10
    return figure, texts


def call_sentence() -> tuple[Figure, list[str]]:
    circuit = odd_circuit()
    figure = sentence.call_sentence(ODD, {ODD[0]: 2.0, ODD[1]: -1.0}, ODD[2],
                                    sentence.Traced(circuit, ODD))
    cut = [text if len(text) <= sentence.LONGEST_GENE else text[:sentence.LONGEST_GENE - 1] + "…"
           for text in ODD]
    return figure, [*cut, f"the model says: {ODD[2]}"]


def circuit_overlap() -> tuple[Figure, list[str]]:
    return circuits.circuit_overlap(np.ones((len(ODD), len(ODD))), ODD), ODD


def planted_recovery() -> tuple[Figure, list[str]]:
    columns = ("top_share_random", "top_share_most_expressed", "top_share")
    rows = pd.DataFrame({"cell_type": ODD, **dict.fromkeys(columns, 0.5)})
    both = pd.concat([rows.assign(target="call"), rows.assign(target="$x$")])
    return circuits.planted_recovery(both), [*ODD, "circuits of the $x$"]


def contribution_kinds() -> tuple[Figure, list[str]]:
    return circuits.contribution_kinds({name: 0.5 for name in ODD}), ODD


def faithfulness() -> tuple[Figure, list[str]]:
    frame = pd.DataFrame({"features": ["circuit"] * 2, "intervention": ["ablation"] * 2})
    return circuits.faithfulness(frame.assign(predicted=1.0, measured=1.0, lowest=0.5, highest=2.0)
                                 ), []


def predictions() -> tuple[Figure, list[str]]:
    frame = pd.DataFrame({"features": ["circuit"] * 2, "intervention": ["ablation", "doubling"]})
    frame = frame.assign(predicted=1.0, measured=0.5)
    return circuits.predictions(frame, frame), []


def task_curves() -> tuple[Figure, list[str]]:
    chosen = ["original model", "all features", "no feature", "influence", "gradient",
              "activation", "random", "random"]
    frame = pd.DataFrame({"chosen": chosen, "others": ["", *["zero"] * 7], "kept": 5.0,
                          "draw": [0] * 7 + [1], "share": [np.nan, 1, 0, *[0.25] * 5]})
    return circuits.task_curves(frame.assign(kept_lower_95=4.0, kept_upper_95=np.nan)), []


def knock_outs() -> tuple[Figure, list[str]]:
    ends = ("", "_low", "_high", "_null_low", "_null_high")
    measures = [f"{one}{end}" for one in ("spearman", "spearman_size", "overlap") for end in ends]
    return circuits.knock_outs(pd.DataFrame({"score": ODD, "what": ODD,
                                             **dict.fromkeys(measures, 0.5)}), ODD[:1]), ODD


def known_ranks() -> tuple[Figure, list[str]]:
    summary = pd.DataFrame({"by": ODD, "what": ODD, "median_rank": 3.0, "null_low": 2.0,
                            "null_high": 40.0, "of": 50})
    return circuits.known_ranks(summary.assign(rank=2.0), summary, ODD[:1], ODD[1:2]), ODD


def steering_curves() -> tuple[Figure, list[str]]:
    arms = ["nothing", steering.BEST, steering.BY_EFFECT, steering.MEANS, steering.RANDOM, "some"]
    frame = pd.DataFrame([(arm, dose) for arm in arms for dose in (-1.0, 1.0)],
                         columns=["arm", "dose"]).assign(done="pushed")
    for name in ("change", "called", "cost"):
        frame[name] = 1.0
    for name in ("lower_95", "upper_95", "lowest", "highest", *(
            f"{one}_{end}_95" for one in ("called", "cost")
            for end in ("lower", "upper"))):
        frame[name] = 0.5
    return steering.steering_curves(frame, "$x$ of a"), ["log-odds of $x$ of a"]


def concept_scores() -> tuple[Figure, list[str]]:
    names = [text for text in dict.fromkeys(ODD) if text not in (LONG, LONG + " too")]
    kinds = ["features", "all features", "untrained encoder", "random directions", "MLP neurons",
             "principal components"]
    table = pd.DataFrame([(name, kind) for name in names for kind in kinds],
                         columns=["concept", "units"])
    table = table.assign(f1=0.5, lower_95=0.4, upper_95=0.6, always_yes=0.1)
    return steering.concept_scores(table), names


def circuit_flow() -> tuple[Figure, list[str]]:
    frame = pd.DataFrame({"kind": ["attention", "features"], "layer": [0, 1]})
    return circuits.circuit_flow(frame.assign(share=0.5, passing=0.5, cell=ODD[0])), []


def confusion_matrix() -> tuple[Figure, list[str]]:
    short = [one for one in ODD if one and len(one) < 20]
    figure = cells_and_training.confusion_matrix(pd.DataFrame(
        np.eye(len(short), dtype=int), short, short))
    return figure, [f"{one} (1)  {number}" for number, one in enumerate(short, 1)]


def answers_by_layer() -> tuple[Figure, list[str]]:
    frame = pd.DataFrame({"layer": [-1, -1, -2, 0], "percentage": 5.0, "lower_95": 4.0,
                          "configuration": ["original", "mean", "no_mlp", "transcoder"]})
    return cells_and_training.answers_by_layer(frame.assign(upper_95=6.0)), []


def training_curve() -> tuple[Figure, list[str]]:
    return cells_and_training.training_curve([1, 2], [2.0, 1.0]), []


def transcoder_curves() -> tuple[Figure, list[str]]:
    row = {"reconstruction": [1.0, 2.0], "l0": [1, 2], "fvu": [0.1, 0.2], "dead": [0.0, 0.1]}
    return cells_and_training.transcoder_curves([{"tokens": 1, **row}, {"tokens": 9, **row}]), []


def loss_comparison() -> tuple[Figure, list[str]]:
    frame = pd.DataFrame({"validation_loss": [1.0, 2, 3], "paper": [1.0, 2, 3]})
    return cells_and_training.loss_comparison(frame.assign(standard_error=0.1)), []


def layer_alone() -> tuple[Figure, list[str]]:
    frame = pd.DataFrame({"layer": [0, 1, 0, 1], "kl": [0.1, 0.2, 0.3, 0.4],
                          "configuration": ["transcoder"] * 2 + ["no_mlp"] * 2})
    return cells_and_training.layer_alone(frame, np.array([0.1, 0.2])), []


def share_with_controls() -> tuple[Figure, list[str]]:
    frame = pd.DataFrame([(rule, kind, layer) for rule in ("$a$", "b_c^d")
                          for kind in ("features", "uniform", "$null$ x") for layer in (0, 1)],
                         columns=["rule", "lists", "layer"])
    frame = frame.assign(gene_rule="by $x$", percentage=5.0, lower_95=4.0, upper_95=6.0)
    return enrichment.share_with_controls(frame, frame), [
        "$a$\ngenes by by $x$", "b_c^d\ngenes by by $x$", "$null$ x"]


def table4_with_nulls() -> tuple[Figure, list[str]]:
    profile = load_profile("demo")
    frame = pd.DataFrame([(kind, layer) for kind in ("features", "uniform", "MLP neurons")
                          for layer in (0, 1)], columns=["lists", "layer"])
    frame = frame.assign(gene_rule=profile.gene_rule, rule=profile.enrichment_rule,
                         percentage=5.0, lower_95=4.0, upper_95=6.0)
    return enrichment.table4_with_nulls(frame, profile, np.full(24, 80.0)), []


def beyond_controls() -> tuple[Figure, list[str]]:
    return enrichment.beyond_controls([0, 1], {"a $x$ b": [1.0, 2.0]}, 0.05), [
        "a $x$ b", "5 %: luck at most, uncorrected"]


def explained_per_layer() -> tuple[Figure, list[str]]:
    frame = pd.DataFrame({"source": ["feature"], "layer": [0]})
    return features.explained_per_layer(frame.assign(
        **dict.fromkeys((GENE, FAMILY, EITHER, SUB_WORD, NONE), 0.2))), []


def prediction_by_kind() -> tuple[Figure, list[str]]:
    frame = pd.DataFrame({"gene_f1": [0.5], "family_f1": [0.5], "token_f1": [0.5]})
    return features.prediction_by_kind(frame, frame.assign(source=ODD[0])), []


def l0_per_layer() -> tuple[Figure, list[str]]:
    return features.l0_per_layer(np.arange(3.0), np.ones((3, 3)), (0.5, 6.0, 2.0, 12.0)), []


def frequency_distribution() -> tuple[Figure, list[str]]:
    return features.frequency_distribution(np.linspace(-5, -1, 9), -4, 0,
                                           np.array([-2.5, -2.5])), []


def known_truth_scores() -> tuple[Figure, list[str]]:
    units = [*TRANSCODERS, "single genes"]
    rows = pd.DataFrame([(kind, measure, name) for kind in ("some", "other")
                         for measure in (AUROC, F1) for name in (*units, ALWAYS)],
                        columns=["kind", "measure", "units"])
    summary = rows.assign(tokenizer="sub-words", mean=0.7, low=0.6, high=0.8)
    return features.known_truth_scores(summary), [*units, "some\nsub-words"]


def all_variants() -> tuple[Figure, list[str]]:
    table = pd.DataFrame({"variant": ["relu_normalized"], "label": ["a $x$ b"]}).assign(
        l0=2.0, fvu=0.1, loss_increase=0.1, live_table4=3, percentage_enrichr=5.0,
        null_enrichr=1.0)
    return variants(table, table[["variant", "l0", "fvu"]], "enrichr"), ["a $x$ b"]


def both_tokenizers() -> tuple[Figure, list[str]]:
    measures = [measure for panel in sub_words._PANELS.values() for measure in panel]
    return sub_words.both_tokenizers(pd.DataFrame(
        [(where, measure, tokenizer, value) for where in (EARLY, LATE) for measure in measures
         for tokenizer in KINDS.values() for value in (1.0, 2.0)],
        columns=["where", "measure", "tokenizer", "value"])), []


def parts_of_readings() -> tuple[Figure, list[str]]:
    numbers = {name: 0.5 for name in ("contribution", "lower_95", "upper_95", "share",
                                      "share_lower", "share_upper")}
    return other_models.parts_of_readings(pd.DataFrame([
        {"question": question, "cell_type": cell_type, "model": model, "part": part, **numbers}
        for question, cell_type in ((RIGHT_GENE, EVERY), (STATE, "a")) for part in PARTS
        for model in ("one", "two", "a $x$ b")]), "a"), ["a $x$ b"]


FIGURES: dict[str, Callable[[], tuple[Figure, list[str]]]] = {one.__name__: one for one in (
    cells_per_type, circuit_picture, circuit_overlap, planted_recovery, contribution_kinds,
    faithfulness, predictions, task_curves, knock_outs, known_ranks, circuit_flow, training_curve,
    steering_curves, concept_scores,
    transcoder_curves,
    loss_comparison, layer_alone,
    share_with_controls, table4_with_nulls, beyond_controls, explained_per_layer,
    prediction_by_kind, l0_per_layer,
    frequency_distribution, confusion_matrix, answers_by_layer,
    known_truth_scores, both_tokenizers, parts_of_readings, call_sentence)} | {
        "variants": all_variants}


def test_every_figure_is_drawn_here() -> None:
    modules = [importlib.import_module(f"{plots.__name__}.{one.name}")
               for one in pkgutil.iter_modules(plots.__path__)]
    there = {name for module in modules for name, one in inspect.getmembers(module)
             if inspect.isfunction(one) and one.__module__ == module.__name__
             and inspect.signature(one).return_annotation in (Figure, "Figure")}
    assert there == set(FIGURES)


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # too long for the panel
@pytest.mark.parametrize("name", FIGURES)
def test_text_is_drawn_as_it_is(name: str) -> None:
    figure, texts = FIGURES[name]()
    found = drawn(figure)
    for text in texts:
        assert shown(text) in found, text
    own = {f"mathematics: {one}" for one in OWN_MATHEMATICS}
    odd = [one for one in found if one.startswith("mathematics") and one not in own
           and "mathdefault" not in one]  # which is how matplotlib writes numbers of a log scale
    assert not odd


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=60))
@settings(max_examples=300)
def test_literal_text_is_no_mathematics(text: str) -> None:
    assert Text(0, 0, literal(text))._preprocess_math(literal(text)) == (text, False)


def test_long_text_is_cut_where_it_is_drawn_and_its_bars_stay_apart() -> None:
    figure, _ = cells_per_type()
    axis = figure.axes[0]
    assert len(axis.patches) == 2 * len(ODD)
    assert len({round(bar.get_y(), 6) for bar in axis.patches}) == len(ODD)
    assert [tick.get_text() for tick in axis.get_yticklabels()].count(shown(LONG)) == 2


def test_more_types_than_fit_a_figure_are_added_up() -> None:
    names = np.array([f"type {i}" for i in range(1_500)])
    labels = np.concatenate([names, np.repeat(names[-5:], 3)])
    held_out = np.arange(len(labels)) % 4 == 0
    figure = cells_and_training.cells_per_type(labels, held_out)
    figure.savefig(io.BytesIO(), format="png", dpi=200, bbox_inches="tight")
    axis = figure.axes[0]
    texts = [tick.get_text() for tick in axis.get_yticklabels()]
    assert len(texts) == cells_and_training.MOST_BARS + 1
    assert texts[0] == f"{1_500 - cells_and_training.MOST_BARS:,} other types"
    assert set(texts[-5:]) == set(names[-5:])
    assert sum(bar.get_width() for bar in axis.patches) == len(labels)


def test_a_sentence_is_tinted_by_what_its_genes_contribute() -> None:
    genes = [f"G{i}" for i in range(sentence.MOST_GENES + 7)]
    figure = sentence.call_sentence(genes, {"G0": 2.0, "G1": -0.5, "G99": 5.0}, "beta")
    boxes = [one for one in figure.axes[0].patches if hasattr(one, "get_boxstyle")]
    tints = [np.array(box.get_facecolor()[:3]) for box in boxes]
    assert len(boxes) == sentence.MOST_GENES
    first, second, *others = tints[::-1]
    # Blue speaks for the call and orange against it; without a contribution a box is white.
    assert first[2] > first[0] and second[0] > second[2] and first.sum() < second.sum()
    assert all((tint == 1).all() for tint in others)
    assert any("7 more genes" in text for text in drawn(figure))


def test_a_task_without_right_answers_is_drawn() -> None:
    """A small model may give none: then no share of them is kept, and the scale has no point."""
    chosen = ["all features", "no feature", "influence", "random"]
    drawn(circuits.task_curves(pd.DataFrame({
        "chosen": chosen, "others": "zero", "kept": np.nan, "draw": 0,
        "share": [1, 0, 0.25, 0.25], "kept_lower_95": np.nan, "kept_upper_95": np.nan})))
