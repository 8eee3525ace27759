"""The parts of the front page that come from the run: model, findings, picture, verdicts, imprint.

All numbers are read from the chapters' `values/*.json`; what a run does not have is left out. Texts
come from profiles and labels and are escaped.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import yaml

from scfm_circuits.common.files import read_json
from scfm_circuits.common.profile import ROOT, Profile

PICTURE = "figures/call_sentence.png"
CHAPTERS = {"enrichment": "06_enrichment", "human": "05_human_evaluation",
            "case": "07_endothelial_case_study"}


def model_box(profile: Profile) -> str:
    """Which model and cells the numbers are from; amber where they are not those of a paper."""
    values = _values(profile.results, "01_cells_and_model")
    cells = (f"{'real' if profile.cells_are == 'real' else 'simulated'} cells: "
             f"{escape(profile.cells_name)}")
    if profile.model != "train":
        return (f'<p class="model-box" role="note">All numbers are from the model '
                f"<strong>{escape(str(profile.model))}</strong> and {cells}.</p>")
    size = values.get("model.parameters")
    right, asked = values.get("model.accuracy_percent"), values.get("model.asked")
    about = [f"{profile.model_layers} layers",
             *([f"{size / 1e6:.1f} million parameters"] if size else []),
             "trained on the spot",
             *([f"right about {right:.0f} % of {asked:,} held-out cells"] if right else [])]
    return ('<p class="model-box demo" role="note"><strong>Demo model.</strong> All numbers are '
            f"from a small model ({', '.join(about)}) and {cells}. They show that every step works "
            "and what each claim has to be compared with; they say nothing about the paper's own "
            "model.</p>")


def findings(profile: Profile) -> str:
    """The paper's three claims and what this run says to each, as a list in HTML."""
    values = {name: _values(profile.results, chapter) for name, chapter in CHAPTERS.items()}
    said = (
        ("In most layers over 80 % of the features are “biologically interpretable”.",
         _on_features(values["enrichment"]), CHAPTERS["enrichment"]),
        ("People find 7 of 20 features (35 %) interpretable at the level of genes.",
         _on_people(values["human"]), CHAPTERS["human"]),
        ("The circuit behind one call finds the cell type's own genes (“Endothelial cell: "
         "heart”, FDR 0.0013).", _on_circuit(values["case"]), CHAPTERS["case"]),
    )
    items = "".join(
        f'<li><p class="claim"><span>The paper</span> {claim}</p>'
        f'<p class="answer"><span>This run</span> {answer or "This run has no number for it."} '
        f'<a href="{chapter}.html">Chapter {int(chapter[:2])}</a></p></li>'
        for claim, answer, chapter in said)
    return f'<ol class="findings">{items}</ol>'


def _on_features(values: Mapping[str, Any]) -> str:
    shares = [values.get(f"controls.enrichr.{name}")
              for name in ("features", "untrained-encoder", "uniform")]
    if None in shares:
        return ""
    ours, untrained, uniform = (f"<strong>{share:.0f} %</strong>" for share in shares)
    sets = (" (tested on a small stand-in for the paper's gene sets)"
            if values.get("enrichment.stand_in") else "")
    return (f"By the paper's likely rule {ours} of ours are; so are {untrained} of those of an "
            f"encoder that was never trained, and {uniform} of lists of random genes{sets}.")


def _on_people(values: Mapping[str, Any]) -> str:
    own, untrained = (values.get(f"score.{name}.gene_level") for name in ("features", "untrained"))
    rated = (f"Its raters say so of {100 * values['human.rate']:.0f} %." if values.get("human.rate")
             is not None else 'Nobody has <a href="rate.html">rated</a> ours yet.')
    if own is None or untrained is None:
        return rated
    either, beside = (values.get(f"score.{name}.either") for name in ("features", "untrained"))
    unsure, too = ("", "") if either is None or beside is None else (
        f" (and in {100 * either:.0f} % either that or a sub-word)", f" ({100 * beside:.0f} %)")
    return (f"{rated} A score without raters finds a gene or a family in "
            f"<strong>{100 * own:.1f} %</strong>{unsure}, and in {100 * untrained:.1f} %{too} of "
            "features that learnt nothing.")


def _on_circuit(values: Mapping[str, Any]) -> str:
    whole, kept, none = (values.get(f"call.{name}") for name in ("whole", "keeps", "nothing_keeps"))
    if whole is None or kept is None or none is None:
        return ""
    term, p = values.get("call.best_term"), values.get("call.p_random")
    judged = term and p is not None and not values.get("case.stand_in")
    unit = escape(str(values.get("call.unit") or "nats"))
    found = ("The genes of our call's circuit are most enriched for "
             f"“{escape(str(term))}” (p = <strong>{p:.2g}</strong> against random genes of the "
             "same sentence). " if judged else "")
    return (f"{found}The call is {whole:.1f} {unit}. With the circuit's features alone it is "
            f"<strong>{kept:.1f}</strong>, with every feature held at its average "
            f"<strong>{none:.1f}</strong>.")


def picture(profile: Profile) -> str:
    """The cell's sentence with the circuit of its call, and who speaks for it; nothing without."""
    table = profile.results / "tables" / "case_call_genes.csv"
    if not (profile.results / PICTURE).is_file() or not table.is_file():
        return ""
    with open(table, encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if float(row["contribution"]) > 0]
    rows.sort(key=lambda row: -float(row["contribution"]))
    genes = [escape(row["gene"]) for row in rows[:4]]
    case = _values(profile.results, CHAPTERS["case"])
    label = escape(str(case.get("case.prediction") or "(nothing)"))
    says, how = ("say", ", direct attention")
    if case.get("call.by_state"):
        says, how = "call the cell", ""
    leading = f"{', '.join(genes[:-1])} and {genes[-1]}" if len(genes) > 1 else "".join(genes)
    told = (f"Which genes made the model {says} “{label}”: {leading} speak for it most."
            if genes else f"What made the model {says} “{label}”.")
    phone = PICTURE.replace("figures/", "figures/narrow/")
    source = (f'<source media="(max-width: 600px)" srcset="downloads/{phone}">'
              if (profile.results / phone).is_file() else "")
    return (f'<figure class="hero"><a href="{CHAPTERS["case"]}.html"><picture>{source}'
            f'<img src="downloads/{PICTURE}" alt="A cell as a list of its genes, tinted by what '
            f'they contribute to the call; above it the circuit that leads to it. {told}">'
            "</picture></a>"
            f"<figcaption>{told} Blue: for it; orange: against it; one cell{how}. "
            "Diamonds are attention heads, circles features, crosses what the transcoders leave "
            "unexplained.</figcaption></figure>")


def verdict_counts(results: Path) -> str:
    """How many claims that were tested on this run's model got which verdict, by exhibit.

    From the run's `claims.csv`. What is recomputed from print, a transcription or a setting says
    nothing about the model and is counted on the ledger's own page.
    """
    from scfm_circuits.paper.claims import VERDICTS

    path = results / "claims.csv"
    if not path.is_file():
        return "This run has no claims ledger."
    with open(path, encoding="utf-8", newline="") as handle:
        tested = [claim for claim in csv.DictReader(handle) if claim["standing"] == "tested"]
    shown = [verdict for verdict in VERDICTS if any(one["verdict"] == verdict for one in tested)]
    groups = {cell(exhibit): [claim for claim in tested if claim["exhibit"] == exhibit]
              for exhibit in dict.fromkeys(claim["exhibit"] for claim in tested)}
    rows = []
    for title, group in (groups | {"**all**": tested}).items():
        counts = Counter(claim["verdict"] for claim in group)
        rows.append([title, *(str(counts[verdict] or "") for verdict in shown)])
    return markdown_table(["Exhibit", *shown], rows)


def cell(text: object) -> str:
    """Untrusted text as one cell of a Markdown table."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>|$])", r"\\\1", flat)


def markdown_table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def imprint(results: Path) -> str:
    """Repository and licence, as CITATION.cff says (the authors are at the foot of every page), and
    the run's commit."""
    commit = read_json(results / "provenance.json").get("commit")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    where = cited.get("repository-code")
    code = (f'<a href="{escape(where, quote=True)}">Code and notebooks</a>' if where
            else "Code and notebooks")
    at = f": commit {escape(commit[:10])}" if commit else ""
    return f'<p class="imprint">{code}{at}. Licence: {escape(cited["license"])}.</p>'


def _values(results: Path, chapter: str) -> dict[str, Any]:
    return read_json(results / "values" / f"{chapter}.json")
