"""Does the method find what was planted? Circuits and features against known gene programs.

Only for cells of `planted_cells`, where the genes of every program are known.

1. Circuits: are the genes on which a circuit's nodes stand those planted for the cell's type?
   Beside them stand random genes of the same prompt (hypergeometric) and the prompt's most
   expressed genes, which are there without any circuit.
2. Features: which program matches each live feature's gene list best (the enrichment engine, with
   the programs as a library), how many programs have a feature, and how many the null lists and the
   features that learnt nothing of `controls` would have.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from scfm_circuits import InputError
from scfm_circuits.attribution import Direction, Frozen, feature_direction, freeze, logit_direction
from scfm_circuits.circuits import Node, feature_id, node_table, strongest_features, trace
from scfm_circuits.control_tables import FEATURES, column_name, verdict_table
from scfm_circuits.controls import NULLS, Tester, layer_controls, null_source, testers
from scfm_circuits.enrichment import GeneSets, Ragged, gene_sets_from_dict, ragged
from scfm_circuits.features import FeatureStatistics, gene_list_ids
from scfm_circuits.language_model import predict_answers
from scfm_circuits.planted_cells import Plan, read_plan
from scfm_circuits.profile import PLANTED_CELLS, Profile, cells_path
from scfm_circuits.sentences import AnsweredPrompt, Corpus, answered_prompt
from scfm_circuits.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM

TARGETS = ("feature", "call")
"""What is traced: the last layer's strongest feature where the case study reads its own, and the
logit of the answer's first token where the answer is decided."""


def plan_of(profile: Profile) -> Plan:
    """What is planted in the profile's cells.

    Raises:
        InputError: the profile's cells are others, whose truth is not known.
    """
    path = cells_path(profile)
    if profile.cells != PLANTED_CELLS or path is None:
        raise InputError(f"The truth about the cells {profile.cells!r} is not known; it is for "
                         f"`cells: {PLANTED_CELLS}` only.")
    return read_plan(path)


def programs_library(plan: Plan) -> GeneSets:
    """The programs as a gene-set library, a term each."""
    return gene_sets_from_dict("planted programs", {one.name: one.genes for one in plan.programs})


# --- circuits ------------------------------------------------------------------------------------


def named_right(model: "GPTNeoXForCausalLM", corpus: Corpus, n: int, asked: int = 20) -> list[int]:
    """Of each cell type the first n held-out cells that the model names right, as the case study
    takes its cell; of the first `asked` of that type."""
    chosen: list[int] = []
    for label in np.unique(corpus.labels[corpus.held_out]):
        cells = np.flatnonzero(corpus.held_out & (corpus.labels == label))[:asked]
        answers = np.array(predict_answers(model, corpus, cells))
        chosen += cells[answers == label][:n].tolist()
    return chosen


def circuit_gene_table(model: "GPTNeoXForCausalLM", transcoders: Transcoders, corpus: Corpus,
                       cells: Sequence[int], plan: Plan, profile: Profile) -> pd.DataFrame:
    """Every gene of the cells' prompts, and what the circuits of both targets make of it.

    Columns: cell, cell_type, target (see `TARGETS`), gene, rank (in the prompt, from 1), role (what
    the gene is to the type, `Plan.role`), nodes (on its tokens), influence (their sum; 0 without a
    node). A cell in which no feature of the last layer is active has no circuit of that target.

    Raises:
        InputError: no cells.
    """
    if not len(cells):
        raise InputError("No held-out cell is named right by the model, so no circuit can be set "
                         "against what was planted; train for more steps (`model_steps`).")
    frames = []
    for cell in cells:
        label = str(corpus.labels[cell])
        case = answered_prompt(corpus, profile, int(cell), label)
        frozen = freeze(model, transcoders, case.encoded.tokens)
        genes = corpus.genes_of(cell)
        for target, start in _starts(frozen, case).items():
            circuit = trace(frozen, *start, branches=profile.circuit_branches,
                            depth=profile.circuit_depth, max_nodes=profile.circuit_nodes)
            nodes = node_table(circuit, case.texts, case.genes)
            sums = nodes.groupby("gene")["influence"].agg(["size", "sum"]).reindex(genes).fillna(0)
            frames.append(pd.DataFrame({
                "cell": str(corpus.cell_ids[cell]), "cell_type": label, "target": target,
                "gene": genes, "rank": np.arange(1, len(genes) + 1),
                "role": [plan.role(gene, label) for gene in genes],
                "nodes": sums["size"].to_numpy(int), "influence": sums["sum"].to_numpy()}))
    return pd.concat(frames, ignore_index=True)


def _starts(frozen: Frozen, case: AnsweredPrompt) -> dict[str, tuple[Node, Direction]]:
    """By target the node at which a circuit ends, and its reading."""
    last, position, asked = len(frozen.weights) - 1, case.position, case.answer_start - 1
    token = int(case.encoded.tokens[case.answer_start])
    starts = {}
    for feature in strongest_features(frozen, last, position, 1):
        reading = feature_direction(frozen, last, feature, position)
        node = Node(feature_id(last, feature, position), "feature", last, position, position,
                    feature, float(reading.value))
        starts["feature"] = (node, reading)
    reading = logit_direction(frozen, token, asked)
    starts["call"] = (Node(f"logit_{token}_P{asked}", "logit", last + 1, asked, asked, token,
                           float(reading.value)), reading)
    return starts


def recovery_table(genes: pd.DataFrame) -> pd.DataFrame:
    """One row per circuit of `circuit_gene_table`: how many of its genes were planted for the type.

    Columns: cell, cell_type, target; prompt_genes, planted (of them), circuit_genes, found (planted
    genes of the circuit); precision = found / circuit_genes, recall = found / planted; what as many
    random genes of the prompt have on average (random_precision, random_recall) with p, the share
    of such draws with at least as many planted genes; precision_most_expressed, of as many of the
    prompt's first genes. A circuit may name most genes of its prompt, so the order counts, too:
    top_found is the number of planted genes among as many of the most influential genes as are
    planted, top_share its share of them (precision and recall at once), with top_p and
    top_share_most_expressed as above. A share is missing where there is nothing to divide by.
    """
    from scipy.stats import hypergeom

    rows = []
    for key, one in genes.groupby(["cell", "cell_type", "target"], sort=False):
        one = one.sort_values("rank")
        planted, inside = (one["role"] == "own").to_numpy(), (one["nodes"] > 0).to_numpy()
        n, k, drawn = len(one), int(planted.sum()), int(inside.sum())
        # Genes without a node cannot be told apart: they are not in the ranking at all.
        order = np.argsort(-one["influence"].to_numpy(), kind="stable")
        order = order[inside[order]][:k]
        found, top = int((planted & inside).sum()), int(planted[order].sum())
        rows.append((
            *key, n, k, drawn, found, _share(found, drawn), _share(found, k), k / n, drawn / n,
            float(hypergeom.sf(found - 1, n, k, drawn)), _share(planted[:drawn].sum(), drawn),
            top, _share(top, k), float(hypergeom.sf(top - 1, n, k, len(order))),
            _share(planted[:k].sum(), k)))
    return pd.DataFrame(rows, columns=[
        "cell", "cell_type", "target", "prompt_genes", "planted", "circuit_genes", "found",
        "precision", "recall", "random_precision", "random_recall", "p", "precision_most_expressed",
        "top_found", "top_share", "top_p", "top_share_most_expressed"])


def _share(part: float, whole: float) -> float:
    return float(part) / whole if whole else np.nan


def recovery_summary(table: pd.DataFrame, seed: int, draws: int = 10_000) -> pd.DataFrame:
    """`recovery_table` by target and cell type, and over all types: sums before shares.

    Columns: target, cell_type, circuits, and as in `recovery_table`; p and top_p are the share of
    draws (seeded) in which random genes of the same prompts, as many for each circuit, have at
    least as many planted genes in all. They treat circuits as given one by one: that circuits of
    one model are alike is no part of the null.
    """
    rng = np.random.default_rng([seed, 21])
    rows = []
    for target, circuits in table.groupby("target", sort=False):
        for label in [*circuits["cell_type"].unique(), "all types"]:
            part = circuits if label == "all types" else circuits[circuits["cell_type"] == label]
            n, k = part["prompt_genes"].to_numpy(), part["planted"].to_numpy()
            drawn, found = part["circuit_genes"].to_numpy(), part["found"].to_numpy()
            named = np.minimum(k, drawn)
            rows.append((
                target, label, len(part), _share(found.sum(), drawn.sum()),
                _share(found.sum(), k.sum()), _share((k * drawn / n).sum(), drawn.sum()),
                _share((k * drawn / n).sum(), k.sum()),
                _random_as_good(n, k, drawn, found.sum(), rng, draws),
                _share((part["precision_most_expressed"] * drawn).sum(), drawn.sum()),
                _share(part["top_found"].sum(), k.sum()), _share((k * named / n).sum(), k.sum()),
                _random_as_good(n, k, named, part["top_found"].sum(), rng, draws),
                _share((part["top_share_most_expressed"] * k).sum(), k.sum())))
    return pd.DataFrame(rows, columns=[
        "target", "cell_type", "circuits", "precision", "recall", "random_precision",
        "random_recall", "p", "precision_most_expressed", "top_share", "top_share_random", "top_p",
        "top_share_most_expressed"])


def _random_as_good(n: np.ndarray, k: np.ndarray, drawn: np.ndarray, found: float,
                    rng: np.random.Generator, draws: int) -> float:
    sums = rng.hypergeometric(k, n - k, drawn, (draws, len(n))).sum(axis=1)
    return float((1 + (sums >= found).sum()) / (1 + draws))


def role_table(genes: pd.DataFrame) -> pd.DataFrame:
    """What the genes of prompts and circuits are to the cell's type, by target and role.

    Columns: target, role, prompt_percent (of all prompt genes), circuit_percent (of all circuit
    genes), influence_percent (of what all genes of the circuits carry).
    """
    rows = []
    for target, part in genes.groupby("target", sort=False):
        inside = part[part["nodes"] > 0]
        for role in ("own", "shared", "other", "state", "background"):
            own = inside[inside["role"] == role]
            rows.append((target, role, 100 * (part["role"] == role).mean(),
                         100 * _share(len(own), len(inside)),
                         100 * _share(own["influence"].sum(), inside["influence"].sum())))
    return pd.DataFrame(rows, columns=["target", "role", "prompt_percent", "circuit_percent",
                                       "influence_percent"])


def circuits_in_prose(summary: pd.DataFrame, roles: pd.DataFrame) -> str:
    """What `recovery_summary` and `role_table` say, for a page."""
    every = summary[summary["cell_type"] == "all types"].set_index("target")
    names = {"feature": "the last layer's strongest feature", "call": "the call itself"}
    said = []
    for target, row in every.iterrows():
        influence = roles[roles["target"] == target].set_index("role")["influence_percent"]
        said.append(
            f"Circuits of {names[str(target)]} ({row['circuits']} cells): of their genes "
            f"{_percent(row['precision'])} were planted for the cell's type, where random genes of "
            f"the same prompts give {_percent(row['random_precision'])} (p = {row['p']:.2g}) and "
            f"the most expressed ones {_percent(row['precision_most_expressed'])}. They hold "
            f"{_percent(row['recall'])} of the planted genes of the prompts, and would hold "
            f"{_percent(row['random_recall'])} by chance. Of as many of their most influential "
            f"genes as are planted, {_percent(row['top_share'])} are planted (by chance "
            f"{_percent(row['top_share_random'])}, p = {row['top_p']:.2g}; most expressed "
            f"{_percent(row['top_share_most_expressed'])}). Of the influence that stands on genes, "
            f"{influence['own']:.0f} % is on genes planted for the type, {influence['shared']:.0f} "
            f"% on those that it shares with another, and {influence['background']:.0f} % on genes "
            "that all types express alike.")
    return " ".join(said)


def features_in_prose(matches: "ProgramMatches", types: int) -> str:
    """What `program_matches` says, for a page. types: how many cell types there are."""
    lists = matches.lists.set_index("lists")
    own = matches.programs[matches.programs["kind"] == "own"]
    beyond = int(matches.features["beyond_all_controls"].sum())
    ahead = int(matches.programs["ahead_of_controls"].sum()) / len(matches.features)
    others = "; ".join(f"{name} {row['percentage']:.1f} % and {row['own_programs']:.1f}"
                       for name, row in lists.drop(index=FEATURES).iterrows())
    features = lists.loc[FEATURES]
    recalls = own[[f"{column_name(str(name))}_recall" for name in lists.index.drop(FEATURES)]]
    return (
        f"Of {len(matches.features):,} live features {features['percentage']:.1f} % "
        f"match a program. {100 * ahead:.1f} % match one and are ahead of every control at the "
        f"same level, one by one; after correction over all features {beyond:,} are. Of the "
        f"{types} programs that are planted for one cell type "
        f"{features['own_programs']:.0f} have a feature that matches. For lists that no "
        "trained feature made, the share that matches and the number of these programs matched "
        f"are: {others}. The best feature of such a program lists a median of "
        f"{_percent(own['best_recall'].fillna(0).median())} of its genes (with "
        f"{_percent(own['best_precision'].median())} of the list in the program), the best list of "
        f"the control that does best {_percent(recalls.median().max())}.")


def _percent(share: float) -> str:
    return "none" if np.isnan(share) else f"{100 * share:.0f} %"


# --- features ------------------------------------------------------------------------------------


class ProgramMatches(NamedTuple):
    """Features' gene lists against the programs, see `program_matches`."""

    features: pd.DataFrame
    """One row per live feature: `verdict_table`, and program (the best one), kind, best_p, best_q,
    overlap, list_genes, matched."""
    programs: pd.DataFrame
    """One row per program: who matches it, the best list, and what null lists have."""
    lists: pd.DataFrame
    """One row per kind of lists: share matching a program, programs matched."""


def program_matches(statistics: FeatureStatistics, baselines: Mapping[str, FeatureStatistics],
                    corpus: Corpus, profile: Profile, plan: Plan, draws: int = 20
                    ) -> ProgramMatches:
    """The best program of every live feature (cut of Table 4), beside the controls.

    Lists are made under the profile's gene rule, and tested under the rule `corpus`: the corpus's
    genes as background, Benjamini-Hochberg over all programs. A list matches its best program if
    that q is below the profile's FDR; whether a feature is beyond all controls is decided as in
    `verdict_table`, with the programs as the only library. For each kind of null lists every live
    feature has `draws` lists, one in each draw, so a draw is a whole set of features.

    Columns of `programs`: program, kind, cell_types, genes (planted), corpus_genes (that occur in
    prompts), features (that match it best), and of them ahead_of_controls (p_controls below
    the FDR before correction over features) and beyond_all_controls; best_layer, best_feature,
    best_overlap, best_list_genes, best_precision (overlap / list) and best_recall (overlap /
    corpus_genes) of the match with the smallest p; and for each control <control>_features and
    <control>_recall, the number of matches and the best one's recall (0 where none matches), for
    null lists as means over draws.
    Columns of `lists`: lists, tested, matched, percentage, programs (that have a match; null lists:
    mean over draws), own_programs (of them, those planted for one cell type).
    """
    ready = testers([programs_library(plan)], corpus, profile)
    tester = next(one for one in ready if one.rule == "corpus")
    program_of = _program_of(corpus, plan)
    everything: dict[str, FeatureStatistics] = {FEATURES: statistics, **baselines}
    found: dict[str, list[pd.DataFrame]] = {name: [] for name in (FEATURES, *NULLS, *baselines)}
    layers = []
    for layer in range(len(statistics.fired)):
        layers.append(layer_controls(statistics, baselines, layer, corpus, profile, ready))
        for name, one in everything.items():
            chosen = np.flatnonzero(one.live(profile.live_cut_table4)[layer])
            own = ragged(gene_list_ids(one, layer, chosen, corpus, profile))
            matched = _matched(own, tester, program_of)
            found[name].append(matched.assign(layer=layer, feature=chosen, draw=0))
            if name != FEATURES or not len(chosen):
                continue
            source = null_source(statistics, layer, chosen, own, corpus, profile)
            for i, kind in enumerate(NULLS):
                rng = np.random.default_rng([profile.seed, 22, layer, i])
                matched = _matched(source.draw(kind, rng, draws), tester, program_of)
                found[kind].append(matched.assign(draw=np.repeat(np.arange(draws), len(chosen))))
    tables = {name: pd.concat(parts, ignore_index=True) for name, parts in found.items() if parts}
    verdicts = verdict_table(layers, list(baselines), profile)
    features = verdicts.merge(tables[FEATURES].drop(columns="draw"), on=["layer", "feature"],
                              validate="one_to_one")
    return ProgramMatches(_named(features, plan), _program_table(features, tables, corpus, plan,
                                                                 draws, profile.fdr),
                          _list_table(tables, plan, draws))


def _program_of(corpus: Corpus, plan: Plan) -> np.ndarray:
    """(n_genes,) index of the program of each of the corpus's genes, -1 for none."""
    place = {gene.upper(): i for i, one in enumerate(plan.programs) for gene in one.genes}
    return np.array([place.get(str(symbol).upper(), -1) for symbol in corpus.symbols])


def _matched(lists: Ragged, tester: Tester, program_of: np.ndarray) -> pd.DataFrame:
    """For each list: best (program's index, -1 for none), best_p, best_q, overlap, list_genes,
    matched."""
    result = tester.tested(lists)[0]
    row = np.repeat(np.arange(lists.lengths.size), lists.lengths)
    # Programs share no gene, so a gene counts for the best program or for none.
    inside = program_of[lists.ids] == np.where(result.best_term < 0, -2, result.best_term)[row]
    overlap = np.bincount(row, weights=inside, minlength=lists.lengths.size).astype(int)
    return pd.DataFrame({"best": result.best_term, "best_p": result.min_p, "best_q": result.min_q,
                         "overlap": overlap, "list_genes": lists.lengths,
                         "matched": result.n_significant > 0})


def _named(features: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    names = np.array([*(one.name for one in plan.programs), ""])
    kinds = np.array([*(one.kind for one in plan.programs), ""])
    best = features["best"].to_numpy()
    return features.drop(columns="best").assign(program=names[best], kind=kinds[best])


def _program_table(features: pd.DataFrame, tables: Mapping[str, pd.DataFrame], corpus: Corpus,
                   plan: Plan, draws: int, fdr: float) -> pd.DataFrame:
    program_of = _program_of(corpus, plan)[corpus.occurring]
    rows = []
    for i, program in enumerate(plan.programs):
        n_genes = int((program_of == i).sum())
        own = features[(features["best"] == i) & features["matched"]]
        row = {"program": program.name, "kind": program.kind,
               "cell_types": "; ".join(program.cell_types), "genes": len(program.genes),
               "corpus_genes": n_genes, "features": len(own),
               "ahead_of_controls": int((own["p_controls"] < fdr).sum()),
               "beyond_all_controls": int(own["beyond_all_controls"].sum())}
        best = own.sort_values(["best_p", "layer", "feature"]).head(1)
        for name in ("layer", "feature", "overlap", "list_genes"):
            row[f"best_{name}"] = int(best[name].iloc[0]) if len(best) else None
        row["best_precision"] = _best(best, "list_genes")
        row["best_recall"] = _best(best.assign(n=n_genes), "n")
        for name, table in tables.items():
            if name != FEATURES:
                n = draws if name in NULLS else 1
                null = table[(table["best"] == i) & table["matched"]]
                first = null.sort_values("best_p", kind="stable").groupby("draw").head(1)
                row[f"{column_name(name)}_features"] = len(null) / n
                row[f"{column_name(name)}_recall"] = _share(first["overlap"].sum() / n, n_genes)
        rows.append(row)
    table = pd.DataFrame(rows)
    whole = ["best_layer", "best_feature", "best_overlap", "best_list_genes"]
    return table.astype(dict.fromkeys(whole, "Int64"))


def _best(best: pd.DataFrame, of: str) -> float:
    return _share(best["overlap"].iloc[0], best[of].iloc[0]) if len(best) else np.nan


def _list_table(tables: Mapping[str, pd.DataFrame], plan: Plan, draws: int) -> pd.DataFrame:
    rows = []
    own = [i for i, program in enumerate(plan.programs) if program.kind == "own"]
    for name, table in tables.items():
        n = draws if name in NULLS else 1
        hit = table[table["matched"]]
        programs = hit.groupby("draw")["best"].nunique().sum() / n
        planted = hit[hit["best"].isin(own)].groupby("draw")["best"].nunique().sum() / n
        rows.append((name, len(table), len(hit), 100 * _share(len(hit), len(table)), programs,
                     planted))
    return pd.DataFrame(rows, columns=["lists", "tested", "matched", "percentage", "programs",
                                       "own_programs"])
