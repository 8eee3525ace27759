"""Tables 1 and 2: losses, divergences and explained variance against other routes."""

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import model_for, tiny_corpus, tiny_transcoders
from scipy.stats import entropy, sem
from sklearn.metrics import r2_score
from tiny_architectures import FAMILIES, tiny
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from scfm_circuits.cells.corpus import Corpus
from scfm_circuits.models.mlp_sites import (
    batches,
    mlp_sites,
    mlps,
    next_token_loss,
    replaced_mlps,
    zero_ablation,
)
from scfm_circuits.transcoders.transcoder import Transcoders
from scfm_circuits.transcoders.validation import (
    _log_probabilities,
    compare_configurations,
    configurations,
    each_layer,
    fraction_of_variance_unexplained,
    recovered,
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
def table(model: Any, transcoders: Transcoders, corpus: Corpus) -> pd.DataFrame:
    return compare_configurations(model, transcoders, corpus, CELLS, 2)


def test_a_model_in_bfloat16_is_close_to_itself(model: Any, transcoders: Transcoders,
                                                corpus: Corpus, table: pd.DataFrame) -> None:
    half, float32 = copy.deepcopy(model).bfloat16(), copy.deepcopy(transcoders).float()
    found = compare_configurations(half, float32, corpus, CELLS, 2)
    np.testing.assert_allclose(found["loss"], table["loss"], rtol=0.02)
    np.testing.assert_allclose(found["kl"], table["kl"], rtol=0.1, atol=0.02)
    fvu, exact = (fraction_of_variance_unexplained(*given, corpus, CELLS, 2)
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
    found = fraction_of_variance_unexplained(half, transcoders, corpus, CELLS, 2)
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


def test_all_configurations_are_there(table, transcoders):
    assert [(one.name, one.layers) for one in configurations(transcoders)] == [
        ("original", None), ("transcoder", None), ("no_mlp", None),
        ("transcoder", [0]), ("no_mlp", [0]), ("transcoder", [1]), ("no_mlp", [1])]
    assert table["layer"].tolist() == [-1, -1, -1, 0, 0, 1, 1]
    assert (table["n_tokens"] == corpus_predictions()).all()


def corpus_predictions() -> int:
    return int((tiny_corpus().lengths[CELLS] - 1).sum())


def test_original_loss_is_the_mean_next_token_loss(table, model, corpus):
    _, ids, mask = next(batches(corpus, CELLS, len(CELLS), torch.device("cpu")))
    expected = next_token_loss(model(input_ids=ids, attention_mask=mask).logits, ids, mask).mean()
    assert row(table, "original")["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert row(table, "original")["kl"] == 0


@pytest.mark.parametrize(("name", "layer"), [("transcoder", -1), ("no_mlp", -1),
                                             ("transcoder", 1), ("no_mlp", 0)])
def test_loss_and_kl_of_each_configuration(table, model, transcoders, corpus, name, layer):
    replacement = transcoders.replacement if name == "transcoder" else zero_ablation
    layers = None if layer < 0 else [layer]
    losses, forward, backward, by_cell = [], [], [], []
    for cell in CELLS:
        before, wanted = logits_of(model, corpus, cell)
        after, _ = logits_of(model, corpus, cell, replacement, layers)
        p, q = Categorical(logits=before), Categorical(logits=after)
        losses.append(-q.log_prob(wanted).numpy())
        forward.append(kl_divergence(p, q).numpy())
        backward.append(kl_divergence(q, p).numpy())
        by_cell.append((losses[-1].mean(), forward[-1].mean()))
        one = entropy(before.softmax(-1).numpy(), after.softmax(-1).numpy(), axis=-1)
        np.testing.assert_allclose(one, forward[-1], rtol=1e-8)
    found = row(table, name, layer)
    assert found["loss"] == pytest.approx(np.concatenate(losses).mean(), rel=1e-4)
    # KL(original || modified), not the other way round.
    right, wrong = np.concatenate(forward).mean(), np.concatenate(backward).mean()
    assert found["kl"] == pytest.approx(right, rel=1e-4)
    assert abs(right / wrong - 1) > 2e-4  # else the line before would not tell
    errors = sem(np.array(by_cell), axis=0)
    assert found[["loss_se", "kl_se"]].to_numpy(float) == pytest.approx(errors, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_starting_at_the_replaced_layer_changes_nothing(family):
    model = tiny(family, native_norms=True)
    transcoders = tiny_transcoders(model).to(torch.float64)
    tokens = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 8:] = mask[2, 6:] = False
    residuals: list[Tensor] = []
    for one in configurations(transcoders):
        found = _log_probabilities(model, one, tokens, mask, residuals)
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
    table = compare_configurations(model, RealMLPs(model), corpus, CELLS, 3)
    original = row(table, "original")["loss"]
    for layer in (-1, 0, 1):
        found = row(table, "transcoder", layer)
        assert found["kl"] == 0 and found["loss"] == original
        assert row(table, "no_mlp", layer)["kl"] > 0.01


def test_the_table_does_not_depend_on_batches_or_order(model, transcoders, corpus, table):
    for cells, size in ((CELLS, 1), (CELLS[::-1], 5)):
        other = compare_configurations(model, transcoders, corpus, cells, size)
        np.testing.assert_allclose(other[["loss", "kl", "loss_se"]], table[["loss", "kl",
                                   "loss_se"]], rtol=1e-4, atol=1e-6)


def test_one_cell_has_no_standard_error(model, transcoders, corpus):
    table = compare_configurations(model, transcoders, corpus, CELLS[:1], 4)
    assert table[["loss_se", "kl_se"]].isna().all(axis=None) and table["loss"].notna().all()


def test_the_model_is_left_as_it_was(model, transcoders, corpus):
    before = logits_of(model, corpus, 3)[0]
    compare_configurations(model, transcoders, corpus, CELLS, 2)
    assert torch.equal(before, logits_of(model, corpus, 3)[0])


# --- FVU -----------------------------------------------------------------------------------------


def test_fvu_is_one_minus_r2_of_each_layer(model, transcoders, corpus):
    found = fraction_of_variance_unexplained(model, transcoders, corpus, CELLS, 2)
    xs, ys = [], []
    for cell in CELLS:
        ids = torch.from_numpy(corpus.tokens[cell][corpus.mask[cell]])[None]
        x, y = mlp_sites(model, ids, torch.ones_like(ids, dtype=torch.bool))
        xs.append(x)
        ys.append(y)
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
    found = fraction_of_variance_unexplained(model, t, corpus, CELLS, 2)
    assert found == pytest.approx([1, 1], rel=1e-9)


def test_fvu_of_a_layer_does_not_see_the_others(model, transcoders, corpus):
    before = fraction_of_variance_unexplained(model, transcoders, corpus, CELLS, 2)
    other = tiny_transcoders(model)
    other.W_dec[0].mul_(50)
    after = fraction_of_variance_unexplained(model, other, corpus, CELLS, 2)
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
    # The paper's Table 2 has no row for the untouched model.
    kl = table2(table, {name: printed[name] for name in ("Transcoder", "No MLP")})
    assert list(kl) == ["configuration", "mean_kl", "standard_error", "paper"]
    assert kl["mean_kl"].tolist() == whole.loc[["transcoder", "no_mlp"], "kl"].tolist()
    assert kl["standard_error"].tolist() == whole.loc[["transcoder", "no_mlp"], "kl_se"].tolist()
    assert recovered(printed) == 0.75
    assert recovered({**printed, "Transcoder": 1.0}) == 1


def test_each_layer_has_its_own_row(table: pd.DataFrame) -> None:
    found = each_layer(table, np.array([0.25, 0.5]))
    assert list(found) == ["layer", "fvu", "loss_replaced", "loss_removed", "kl_replaced",
                           "kl_removed"]
    for row in found.to_dict("records"):
        for done, name in (("replaced", "transcoder"), ("removed", "no_mlp")):
            one = table[(table["layer"] == row["layer"]) & (table["configuration"] == name)]
            assert [row[f"loss_{done}"], row[f"kl_{done}"]] == one[["loss", "kl"]].iloc[0].tolist()
    assert found["fvu"].tolist() == [0.25, 0.5]
