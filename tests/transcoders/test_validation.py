"""Tables 1 and 2: losses, divergences and explained variance against other routes."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import model_for, tiny_corpus, tiny_model, tiny_transcoders
from scipy.stats import entropy
from sklearn.metrics import r2_score
from statsmodels.regression.linear_model import WLS
from three_types import gene_corpus, gene_model
from tiny_architectures import FAMILIES, tiny
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.common.intervals import wilson_interval
from scfm_circuits.models.answers import predict_answers
from scfm_circuits.models.mlp_sites import (
    batches,
    masked_genes,
    mlp_sites,
    mlps,
    next_tokens,
    replaced_mlps,
    zero_ablation,
)
from scfm_circuits.models.states import find_states
from scfm_circuits.transcoders import validation
from scfm_circuits.transcoders.transcoder import Transcoders
from scfm_circuits.transcoders.validation import (
    KINDS,
    SHOWN,
    Compared,
    _last_hidden,
    _log_probabilities,
    compare_configurations,
    configurations,
    each_layer,
    fraction_of_variance_unexplained,
    mean_outputs,
    predicted_kinds,
    recovered,
    scores_by_cell,
    table1,
    table2,
)

CELLS = np.array([5, 1, 8, 2, 11])


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return tiny_corpus()


@pytest.fixture(scope="module")
def model(corpus: Corpus) -> Any:
    return model_for(corpus)


@pytest.fixture(scope="module")
def transcoders(model: Any) -> Transcoders:
    return tiny_transcoders(model)


@pytest.fixture(scope="module")
def compared(model: Any, transcoders: Transcoders, corpus: Corpus) -> Compared:
    return compare_configurations(model, transcoders, corpus, CELLS, 2)


@pytest.fixture(scope="module")
def table(compared: Compared) -> pd.DataFrame:
    return compared.scores


def in_turn(model: Any) -> list[validation.Configuration]:
    """Every configuration of random transcoders and random means, in the model's type."""
    means = torch.randn(len(mlps(model)), model.config.hidden_size, dtype=torch.float64,
                        generator=torch.Generator().manual_seed(5))
    return configurations(tiny_transcoders(model).to(torch.float64), means)


def test_a_model_in_bfloat16_is_close_to_itself(model: Any, transcoders: Transcoders,
                                                corpus: Corpus, table: pd.DataFrame) -> None:
    half, float32 = copy.deepcopy(model).bfloat16(), copy.deepcopy(transcoders).float()
    found = compare_configurations(half, float32, corpus, CELLS, 2).scores
    np.testing.assert_allclose(found["loss"], table["loss"], rtol=0.02)
    np.testing.assert_allclose(found["kl"], table["kl"], rtol=0.1, atol=0.02)
    fvu, exact = (fraction_of_variance_unexplained(*given, corpus, CELLS, 2)[0]
                  for given in ((half, float32), (model, transcoders)))
    np.testing.assert_allclose(fvu, exact, rtol=0.02)


def test_outputs_far_from_zero_are_measured_in_full_precision(
        model: Any, transcoders: Transcoders, corpus: Corpus) -> None:
    """A bfloat16 model's outputs are summed in float64: half precision would lose the variance."""
    half = copy.deepcopy(model).bfloat16()
    for module in mlps(half):
        module.dense_4h_to_h.bias[0] += 20
    given = [mlp_sites(half, ids, mask)
             for _, ids, mask in batches(corpus, CELLS, 2, torch.device("cpu"))]
    x, y = (torch.cat([one[i].double() for one in given], dim=1) for i in (0, 1))
    [found] = fraction_of_variance_unexplained(half, transcoders, corpus, CELLS, 2)
    for layer in range(transcoders.n_layers):
        explained = r2_score(y[layer], transcoders.layer_estimate(layer, x[layer]),
                             multioutput="variance_weighted")
        assert found[layer] == pytest.approx(1 - explained, rel=1e-6)


def row(table: pd.DataFrame, name: str, layer: int = -1) -> pd.Series:
    found = table[(table["configuration"] == name) & (table["layer"] == layer)]
    assert len(found) == 1
    return found.iloc[0]


def logits_of(model: Any, corpus: Corpus, cell: int, replacement: Any = None,
              layers: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Logits before each token but the first, and these tokens, of one cell without padding."""
    ids = torch.from_numpy(corpus.tokens[cell][corpus.mask[cell]])
    if replacement is None:
        logits = model(input_ids=ids[None]).logits[0]
    else:
        with replaced_mlps(model, replacement, layers):
            logits = model(input_ids=ids[None]).logits[0]
    return logits[:-1], ids[1:]


def test_all_configurations_are_there(table, model):
    ways = ["transcoder", "mean", "no_mlp"]
    assert [(one.name, one.layers) for one in in_turn(model)] == [
        ("original", None), *((way, None) for way in ways), *((way, [0]) for way in ways),
        *((way, [1]) for way in ways)]
    deeper = in_turn(tiny_model())  # of three layers, where there is something between
    assert [one.layers for one in deeper[4:10]] == [[1, 2]] * 3 + [[0]] * 3
    assert [one.place for one in deeper] == [-1] * 4 + [-2] * 3 + [0] * 3 + [1] * 3 + [2] * 3
    assert table["layer"].tolist() == [-1] * 4 + [0] * 3 + [1] * 3
    assert list(SHOWN) == table["configuration"][:4].tolist()
    assert (table["n_tokens"] == corpus_predictions()).all()


def corpus_predictions() -> int:
    return int((tiny_corpus().lengths[CELLS] - 1).sum())


def test_original_loss_is_the_mean_next_token_loss(table, model, corpus):
    _, ids, mask = next(batches(corpus, CELLS, len(CELLS), torch.device("cpu")))
    logits = model(input_ids=ids, attention_mask=mask).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]])
    assert row(table, "original")["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert row(table, "original")["kl"] == 0


@pytest.mark.parametrize(("name", "layer"), [
    ("transcoder", -1), ("no_mlp", -1), ("mean", -1), ("transcoder", 1), ("no_mlp", 0),
    ("mean", 1)])
def test_loss_and_kl_of_each_configuration(table, model, transcoders, corpus, name, layer):
    means = hooked_means(model, corpus)
    replacement = {"transcoder": transcoders.replacement, "no_mlp": zero_ablation,
                   "mean": lambda layer, x: means[layer].expand_as(x)}[name]
    layers = None if layer < 0 else [layer]
    losses, forward, backward, by_cell = [], [], [], []
    for cell in CELLS:
        before, wanted = logits_of(model, corpus, cell)
        after, _ = logits_of(model, corpus, cell, replacement, layers)
        p, q = Categorical(logits=before), Categorical(logits=after)
        losses.append(-q.log_prob(wanted).numpy())
        forward.append(kl_divergence(p, q).numpy())
        backward.append(kl_divergence(q, p).numpy())
        added = losses[-1] + Categorical(logits=before).log_prob(wanted).numpy()
        by_cell.append([one.mean() for one in (losses[-1], forward[-1], added)])
        one = entropy(before.softmax(-1).numpy(), after.softmax(-1).numpy(), axis=-1)
        np.testing.assert_allclose(one, forward[-1], rtol=1e-8)
    found = row(table, name, layer)
    assert found["loss"] == pytest.approx(np.concatenate(losses).mean(), rel=1e-4)
    # KL(original || modified), not the other way round.
    right, wrong = np.concatenate(forward).mean(), np.concatenate(backward).mean()
    assert found["kl"] == pytest.approx(right, rel=1e-4)
    assert abs(right / wrong - 1) > 2e-4  # else the line before would not tell
    # A mean over predictions, of which long sentences have more: cells weigh by how many they have.
    errors = [WLS(means, np.ones(len(CELLS)), [len(one) for one in losses])
              .fit(cov_type="HC1").bse[0] for means in np.transpose(by_cell)]
    assert found[["loss_se", "kl_se"]].to_numpy(float) == pytest.approx(errors[:2], rel=1e-3)
    # What is added to the same cells' loss is known far better than the loss.
    assert found["added_se"] == pytest.approx(errors[2], rel=2e-2, abs=1e-7)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "bert"])
def test_starting_at_the_replaced_layer_changes_nothing(family):
    model = tiny(family, native_norms=True)
    tokens = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 8:] = mask[2, 6:] = False
    residuals: list[Tensor] = []
    for one in in_turn(model):
        last = _last_hidden(model, one, tokens, mask, residuals)[:, :-1][mask[:, 1:]]
        found = _log_probabilities(model, last)
        with replaced_mlps(model, one.replacement or RealMLPs(model).replacement, one.layers):
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        whole = logits[:, :-1].float().log_softmax(dim=-1)[mask[:, 1:]]
        torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)
    assert len(mlps(model)) == len(residuals) == 3


class RealMLPs:
    """A `Transcoders` whose estimate is the model's own MLP."""

    def __init__(self, model: Any) -> None:
        self.modules, self.n_layers = mlps(model), len(mlps(model))

    def replacement(self, layer: int, x: Tensor) -> Tensor:
        return self.modules[layer].forward(x)


def test_a_perfect_replacement_loses_nothing(model, corpus):
    table, _, answers = compare_configurations(model, RealMLPs(model), corpus, CELLS, 3)
    original = row(table, "original")["loss"]
    for layer in (-1, 0, 1):
        found = row(table, "transcoder", layer)
        assert found["kl"] == 0 and found["loss"] == original
        assert row(table, "no_mlp", layer)["kl"] > 0.01
        assert row(answers, "transcoder", layer)["right"] == row(answers, "original")["right"]
        assert row(answers, "transcoder", layer)[["lost", "gained"]].tolist() == [0, 0]


def test_the_table_does_not_depend_on_batches_or_order(model, transcoders, corpus, table):
    for cells, size in ((CELLS, 1), (CELLS[::-1], 5)):
        other = compare_configurations(model, transcoders, corpus, cells, size).scores
        np.testing.assert_allclose(other[["loss", "kl", "loss_se"]], table[["loss", "kl",
                                   "loss_se"]], rtol=1e-4, atol=1e-6)


def test_one_cell_has_no_standard_error(model, transcoders, corpus):
    table = compare_configurations(model, transcoders, corpus, CELLS[:1], 4).scores
    assert table[["loss_se", "kl_se"]].isna().all(axis=None) and table["loss"].notna().all()


def test_the_model_is_left_as_it_was(model, transcoders, corpus):
    before = logits_of(model, corpus, 3)[0]
    compare_configurations(model, transcoders, corpus, CELLS, 2)
    assert torch.equal(before, logits_of(model, corpus, 3)[0])


# --- FVU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0, 1])
def test_fvu_is_one_minus_r2_of_each_layer(model, transcoders, corpus, skip):
    found = fraction_of_variance_unexplained(model, transcoders, corpus, CELLS, 2, (0, 1))[skip]
    xs, ys = [], []
    for cell in CELLS:
        ids = torch.from_numpy(corpus.tokens[cell][corpus.mask[cell]])[None]
        x, y = mlp_sites(model, ids, torch.ones_like(ids, dtype=torch.bool))
        xs.append(x[:, skip:])
        ys.append(y[:, skip:])
    x, y = torch.cat(xs, dim=1), torch.cat(ys, dim=1)
    for layer in range(2):
        estimate = transcoders.replacement(layer, x[layer])
        r2 = r2_score(y[layer].numpy(), estimate.numpy(), multioutput="variance_weighted")
        assert found[layer] == pytest.approx(1 - r2, rel=1e-5)


def test_fvu_of_the_mean_is_one(model, corpus):
    t = Transcoders(2, 16, 4).double().requires_grad_(False)
    for tensor in t.parameters():
        tensor.zero_()
    parts = [mlp_sites(model, ids, mask).outputs
             for _, ids, mask in batches(corpus, CELLS, 2, torch.device("cpu"))]
    t.b_dec.copy_(torch.cat(parts, dim=1).mean(dim=1))
    [found] = fraction_of_variance_unexplained(model, t, corpus, CELLS, 2)
    assert found == pytest.approx([1, 1], rel=1e-9)


def test_fvu_of_a_layer_does_not_see_the_others(model, transcoders, corpus):
    [before] = fraction_of_variance_unexplained(model, transcoders, corpus, CELLS, 2)
    other = tiny_transcoders(model)
    other.W_dec[0].mul_(50)
    [after] = fraction_of_variance_unexplained(model, other, corpus, CELLS, 2)
    assert after[1] == before[1] and after[0] > 10 * before[0]


def test_the_papers_tables_have_its_rows_beside_ours(table: pd.DataFrame) -> None:
    printed = {"Transcoder": 2.0, "Original": 1.0, "No MLP": 5.0}
    whole = table[table["layer"] == -1].set_index("configuration")
    loss = table1(table, printed)
    assert loss["configuration"].tolist() == ["Original", "Transcoder", "No MLP"]
    assert loss["paper"].tolist() == [1, 2, 5]
    assert loss["validation_loss"].tolist() == whole.loc[
        ["original", "transcoder", "no_mlp"], "loss"].tolist()
    assert loss["standard_error"].tolist() == whole.loc[
        ["original", "transcoder", "no_mlp"], "loss_se"].tolist()
    assert loss["added_error"].tolist() == whole.loc[
        ["original", "transcoder", "no_mlp"], "added_se"].tolist()
    # The paper's Table 2 has no row for the untouched model.
    kl = table2(table, {name: printed[name] for name in ("Transcoder", "No MLP")})
    assert list(kl) == ["configuration", "mean_kl", "standard_error", "paper"]
    assert kl["mean_kl"].tolist() == whole.loc[["transcoder", "no_mlp"], "kl"].tolist()
    assert kl["standard_error"].tolist() == whole.loc[["transcoder", "no_mlp"], "kl_se"].tolist()
    assert recovered(printed) == 0.75
    assert recovered({**printed, "Transcoder": 1.0}) == 1
    assert recovered({**printed, "mean": 3.0}, "mean") == 0.5


def test_each_layer_has_its_own_row(compared: Compared) -> None:
    found = each_layer(compared, np.array([0.25, 0.5]), np.array([0.5, 0.75]))
    assert found["fvu_without_first"].tolist() == [0.5, 0.75]
    ways = {"replaced": "transcoder", "at_mean": "mean", "removed": "no_mlp"}
    assert list(found) == ["layer", "fvu", "fvu_without_first", *(
        f"{measure}_{way}" for measure in ("loss", "kl", "right") for way in ways)]
    for one in found.to_dict("records"):
        for done, name in ways.items():
            scores = row(compared.scores, name, one["layer"])
            assert [one[f"loss_{done}"], one[f"kl_{done}"]] == scores[["loss", "kl"]].tolist()
            assert one[f"right_{done}"] == row(compared.answers, name, one["layer"])["percentage"]
    assert found["fvu"].tolist() == [0.25, 0.5]


# --- the mean, kinds of tokens, answers -----------------------------------------------------------


def hooked_means(model: Any, corpus: Corpus) -> Tensor:
    """(n_layers, d_model) mean of what plain hooks see on the training cells, each by itself."""
    seen: list[list[Tensor]] = [[] for _ in mlps(model)]
    handles = [mlp.register_forward_hook(lambda module, args, y, kept=kept: kept.append(y[0]))
               for mlp, kept in zip(mlps(model), seen, strict=True)]
    for cell in np.flatnonzero(~corpus.held_out):
        model(input_ids=torch.from_numpy(corpus.tokens[cell][corpus.mask[cell]])[None])
    for handle in handles:
        handle.remove()
    return torch.stack([torch.cat(kept).mean(dim=0) for kept in seen])


def test_the_mean_output_is_that_over_training_tokens(
        model: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    means = hooked_means(model, corpus)
    torch.testing.assert_close(mean_outputs(model, corpus, 2), means, rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(validation, "MEAN_CELLS", 1)  # the first of them alone
    few = mean_outputs(model, corpus, 2)
    assert torch.isfinite(few).all() and not torch.allclose(few, means, rtol=1e-3)


def kinds_by_hand(corpus: Corpus, cell: int) -> list[str]:
    """The kind of every token but the first, from the corpus's own arrays, token by token."""
    found = []
    for at in range(1, int(corpus.lengths[cell])):
        place = corpus.place[cell, at]
        found.append(KINDS[3] if at >= corpus.answer_start[cell] else
                     KINDS[0] if place == 0 else KINDS[1] if place > 0 else KINDS[2])
    return found


def test_every_prediction_has_the_kind_of_its_token(corpus: Corpus) -> None:
    length = int(corpus.lengths[CELLS].max())
    kinds = predicted_kinds(corpus, CELLS, length)
    for given, cell in zip(kinds, CELLS, strict=True):
        by_hand = kinds_by_hand(corpus, int(cell))
        assert [KINDS[one] for one in given[: len(by_hand)]] == by_hand
        assert set(by_hand) == set(KINDS)
    # White space between two genes is no word of the question.
    spaced = dataclasses.replace(corpus, gene=corpus.gene.copy(), place=corpus.place.copy())
    spaced.gene[CELLS[0], 2], spaced.place[CELLS[0], 2] = -1, -1
    assert KINDS[predicted_kinds(spaced, CELLS[:1], length)[0, 1]] == KINDS[1]


def test_kinds_of_tokens_add_up_to_table_1(model: Any, corpus: Corpus, compared: Compared) -> None:
    found = scores_by_cell(model, in_turn(model), corpus, CELLS, 2)
    assert found.sums.dtype == np.float64
    assert found.predictions.sum(axis=0).tolist() == (corpus.lengths[CELLS] - 1).tolist()
    table = compared.kinds.set_index("tokens")
    parts, whole = table.loc[list(KINDS)], table.loc["all"]
    assert parts["predictions"].sum() == whole["predictions"] == corpus_predictions()
    assert parts["share"].sum() == pytest.approx(1, rel=1e-12)
    for name in SHOWN:
        total = row(compared.scores, name)["loss"]
        assert parts["predictions"] @ parts[name] / whole["predictions"] == pytest.approx(
            total, rel=1e-12)
        assert whole[name] == pytest.approx(total, rel=1e-12)
    # And a kind's loss is that of its own tokens.
    losses: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for cell in CELLS:
        logits, ids = logits_of(model, corpus, int(cell))
        for kind, loss in zip(kinds_by_hand(corpus, int(cell)), torch.nn.functional.cross_entropy(
                logits, ids, reduction="none").tolist(), strict=True):
            losses[kind].append(loss)
    for kind, values in losses.items():
        assert parts.loc[kind, "original"] == pytest.approx(np.mean(values), rel=1e-5)


def test_a_kind_that_does_not_occur_has_no_row(model: Any, corpus: Corpus) -> None:
    bare = dataclasses.replace(corpus, gene=np.full_like(corpus.gene, -1),
                               place=np.full_like(corpus.place, -1))
    found = compare_configurations(model, RealMLPs(model), bare, CELLS, 3).kinds
    assert found["tokens"].tolist() == ["prompt", "answer", "all"]
    assert found[list(SHOWN)].notna().all(axis=None)


def test_right_answers_are_those_that_the_model_gives_when_asked(corpus: Corpus) -> None:
    """A model trained for a moment, so that it is right about some cells and wrong about others."""
    model = model_for(corpus, dtype=torch.float32).requires_grad_(True)
    optimizer, cells = torch.optim.Adam(model.parameters(), lr=3e-3), np.arange(len(corpus))
    _, ids, mask = next(batches(corpus, cells, len(cells), torch.device("cpu")))
    found, chosen = np.zeros(len(cells), bool), [validation.Configuration("original", None, None)]
    for step in range(400):
        optimizer.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits
        next_tokens(ids, mask).loss(logits).mean().backward()
        optimizer.step()
        found = scores_by_cell(model, chosen, corpus, cells, 5).right[0] if step > 50 else found
        if 2 < found.sum() < len(found):
            break
    said = np.array(predict_answers(model, corpus, cells)) == corpus.labels
    assert found.tolist() == said.tolist() and 0 < found.sum() < len(found)


def test_answers_are_counted_and_compared_with_the_original(
        monkeypatch: pytest.MonkeyPatch, model: Any, transcoders: Transcoders, corpus: Corpus
        ) -> None:
    rng = np.random.default_rng(0)
    right = rng.random((10, 40)) < 0.6
    right[2] = right[0]
    monkeypatch.setattr(validation, "scores_by_cell", lambda *given: validation.CellScores(
        np.ones((10, 2, 4, 40)), np.ones((4, 40)), right))
    found = compare_configurations(model, transcoders, corpus, np.arange(40), 3).answers
    assert found["right"].tolist() == right.sum(axis=1).tolist()
    assert (found["right"] - found["gained"] + found["lost"] == right[0].sum()).all()
    assert found.loc[2, ["lost", "gained"]].tolist() == [0, 0]
    for one in found.itertuples():
        low, high = wilson_interval(one.right, 40)
        assert [one.lower_95, one.upper_95] == pytest.approx([100 * low, 100 * high])
        assert one.percentage == pytest.approx(100 * one.right / 40)


@pytest.mark.parametrize("encoding", ["maxtoki", "geneformer_v2", "geneformer_v1"])
def test_a_model_of_gene_tokens_is_asked_next_or_masked_genes(encoding, tmp_path, monkeypatch):
    """Loss and KL one cell at a time from transformers' logits; right is the nearest type's place,
    of an encoder by the genes that it is shown."""
    monkeypatch.setenv("SCFM_RESULTS", str(tmp_path / "results"))
    _, corpus = gene_corpus(tmp_path, encoding)
    model = gene_model(encoding, corpus)
    t, cells = tiny_transcoders(model), np.flatnonzero(corpus.held_out)[:5]
    found = compare_configurations(model, t, corpus, cells, 3, seed=2)
    states = find_states(model, corpus, 4)
    for name, replacement in (("original", None), ("transcoder", t.replacement)):
        losses, kls, right = [], [], []
        for cell in cells:
            ids = torch.from_numpy(corpus.tokens[cell][corpus.mask[cell]])
            gene = corpus.gene[cell][corpus.mask[cell]] >= 0
            shown, hidden = ids.clone(), masked_genes(corpus, [cell], 2)[0][: len(ids)]
            if encoding == "maxtoki":
                at, wanted = np.arange(len(ids) - 1), ids[1:]
            else:
                at, wanted = np.flatnonzero(hidden), ids[hidden]
                shown[at] = corpus.tokenizer.convert_tokens_to_ids("<mask>")
                gene = gene & ~hidden
            plain = model(input_ids=shown[None], output_hidden_states=True)
            if replacement is not None:
                with replaced_mlps(model, replacement):
                    changed = model(input_ids=shown[None], output_hidden_states=True)
            else:
                changed = plain
            logs, before = (one.logits[0, at].log_softmax(-1) for one in (changed, plain))
            losses += (-logs[torch.arange(len(at)), wanted]).tolist()
            kls += (before.exp() * (before - logs)).sum(-1).tolist()
            point = changed.hidden_states[-1][0][gene].mean(dim=0).numpy()
            right.append(states.nearest(point[None])[0] == corpus.labels[cell])
        ours = row(found.scores, name)
        assert ours["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert ours["kl"] == pytest.approx(np.mean(kls), rel=1e-4, abs=1e-6)
        assert ours["n_tokens"] == len(losses)
        assert row(found.answers, name)["right"] == sum(right)
    assert found.kinds["tokens"].tolist() == {
        "maxtoki": ["gene", "special token", "all"]}.get(encoding, ["gene", "all"])
