"""One circuit for a whole task: how few features name the cells' types as often as all of them?

The circuits of the other files are of one cell each. Here features are chosen once, on training
cells, by a mean over these, and the model runs on held-out cells with every MLP replaced:

    MLP output at a token of kind k = base(k) + sum over kept features of (z - mean(k)) d

1. `choose` scores every feature (of a layer, at whatever token) by its influence on the call (see
   `calls`), by the gradient, by how much it writes, or at random.
2. `kept_features` is the replacement. `base` and `mean` are the MLP's mean output and the feature's
   mean activation over training tokens of the same kind (`token_means.token_kinds`), so features
   that are not kept stand at their mean. The transcoders' error is replaced by its mean, too: what
   they miss of this cell cannot help. With the baseline `ZERO` features not kept are silent and no
   error is added; with all features that is the model of Tables 1 and 2.
3. `task_circuit` asks held-out cells with a few, many, all or no features; `task_curves` says what
   came out.

ProtoMech (arXiv:2602.12026) draws such curves for proteins; random features are added here.
"""

import contextlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scfm_circuits.circuits.calls import Calls, calls_of
from scfm_circuits.circuits.direct_effects import total_pulls
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.interventions import Call, at_places
from scfm_circuits.circuits.studies import studied_cells
from scfm_circuits.circuits.token_means import (
    MEAN_CELLS,
    Means,
    kinds_of,
    mean_activations,
    prompt_kinds,
)
from scfm_circuits.common.randomness import generator
from scfm_circuits.models.architectures import architecture_of, decoder
from scfm_circuits.models.mlp_sites import (
    Replacement,
    batches,
    device_of,
    faster_attention,
    hooked,
    replaced_mlps,
    site_hooks,
)
from scfm_circuits.transcoders.transcoder import Transcoders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile

INFLUENCE, GRADIENT, ACTIVATION, RANDOM = "influence", "gradient", "activation", "random"
CHOSEN_BY = (INFLUENCE, GRADIENT, ACTIVATION, RANDOM)
"""How features are chosen (`choose`)."""
MEAN, ZERO = "mean of the same kind of token", "zero"
"""What features that are not kept stand at."""
ORIGINAL, ALL, NONE = "original model", "all features", "no feature"
"""What stands beside the circuits."""

SHARES = (1 / 256, 1 / 64, 1 / 16, 1 / 4)
"""Shares of the firing features that are kept."""
DRAWS = 3
"""Random choices of features."""
CHOICE_CELLS, CHOICE_PER_TYPE, SCORED_CELLS, SCORED_PER_TYPE = 40, 5, 96, 16
"""Training cells that features are chosen on, and held-out cells that are asked, at most, and of
one type at most."""
BIN = 16
"""Features of a layer, neighbours in how often they fire, among which a random choice exchanges."""


class Setting(NamedTuple):
    """What the model runs with: features chosen how, the others where, which draw, how many."""

    chosen: str
    baseline: str
    draw: int
    share: float
    keep: Tensor | None
    """(n_layers, n_features) bool: features that are kept; None for the original model."""

    @property
    def features(self) -> int:
        """How many features are kept; 0 for the original model."""
        return 0 if self.keep is None else int(self.keep.sum())


Scores = dict[tuple[str, str], Tensor]
"""(n_layers, n_features) by how features are chosen, and where the others stand."""


class TaskCircuit(NamedTuple):
    """What is left of the task with some of the features.

    right: (n_settings, n_cells) whether a cell is answered rightly, as in `validation`: each token
    of its label's answer is the likeliest after those before it; or, where nothing is asked in
    words, its type's place is the nearest. contrast: the same shape, the call in its units.
    """

    settings: list[Setting]
    right: np.ndarray
    contrast: np.ndarray
    firing: int
    """Features that fire on the training cells that means are taken over."""
    choice_cells: int
    cells: np.ndarray
    """(n_cells,) the held-out cells asked."""


# --- choosing ------------------------------------------------------------------------------------


def choose(calls: Calls, transcoders: Transcoders, cells: np.ndarray, means: Means) -> Scores:
    """Score all features by influence, gradient and activation, for either baseline.

    With `dz` what taking a feature away takes, z less its mean at tokens of the same kind or all of
    z: influence is |sum over tokens of dz times its total effect| on the call of the cell's own
    label, through attention and features with patterns, norms and active features as they are
    (`direct_effects.total_pulls`); gradient is the same with the gradient in the original model,
    where all responds. Both are means over the cells. activation: mean of z ||d|| over all tokens
    that means are taken over.
    """
    score = {(name, baseline): torch.zeros_like(transcoders.b_enc)
             for name in (INFLUENCE, GRADIENT) for baseline in (MEAN, ZERO)}
    for cell in tqdm(cells, "task circuit, choice", unit="cell"):
        prompt = calls.prompt(cell)
        call = calls.call(prompt, str(calls.corpus.labels[cell]))
        frozen = freeze(calls.model, transcoders, prompt.encoded.tokens)
        kinds = means.places(prompt_kinds(prompt))
        pulls = {INFLUENCE: total_pulls(frozen, call.start(frozen)[1]),
                 GRADIENT: output_gradients(calls.model, frozen.tokens, call)}
        for layer in range(transcoders.n_layers):
            z = frozen.activations[layer]
            away = {MEAN: z - means.activations[layer][kinds], ZERO: z}
            for name, pull in pulls.items():
                effect = pull[layer] @ transcoders.W_dec[layer].T
                for baseline, dz in away.items():
                    score[name, baseline][layer] += (dz * effect).sum(dim=0).abs() / len(cells)
    share = (means.counts / means.counts.sum()).to(means.activations.dtype)
    written = torch.einsum("k,lkf->lf", share, means.activations)
    written = written * transcoders.W_dec.norm(dim=-1)
    return {**score, (ACTIVATION, MEAN): written, (ACTIVATION, ZERO): written}


def output_gradients(model: "PreTrainedModel", tokens: Tensor, call: Call) -> Tensor:
    """(n_layers, n_pos, d_model) gradient of a text's call in its MLPs' outputs."""
    added: list[Tensor] = []

    def hook(layer: int, read: Tensor, output: Tensor) -> Tensor:
        added.append(torch.zeros_like(output, requires_grad=True))
        return output + added[-1]

    with torch.enable_grad(), hooked(site_hooks(model, hook)):
        hidden = decoder(model)(input_ids=tokens[None], use_cache=False).last_hidden_state
        value = call.read(model, hidden, at_places(call.places, hidden[0])).sum()
        gradients = torch.autograd.grad(value, added, materialize_grads=True)
    return torch.cat(gradients)


def largest(score: Tensor, n: int) -> Tensor:
    """(n_layers, n_features) bool: the `n` features of highest score, the first of equal ones."""
    keep = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    keep[score.flatten().argsort(descending=True, stable=True)[:n]] = True
    return keep.view_as(score)


def exchanged(score: Tensor, firing: Tensor, rng: np.random.Generator) -> Tensor:
    """The scores dealt out anew among features of a layer that fire about as often.

    firing: (n_layers, n_features) how often each fires. Features are taken in this order, `BIN` at
    a time; of each such group as many are then kept as were, whatever the number kept.
    """
    dealt, values = score.cpu().numpy().copy(), score.cpu().numpy()
    for layer, often in enumerate(firing.cpu().numpy()):
        order = np.argsort(often, kind="stable")
        for start in range(0, len(order), BIN):
            group = order[start : start + BIN]
            dealt[layer, group] = values[layer, rng.permutation(group)]
    return torch.from_numpy(dealt).to(score.device)


def settings_of(scores: Scores, means: Means, seed: int) -> list[Setting]:
    """The original model; then for both baselines all features, none, every choice and share."""
    firing = means.firing
    every, n = torch.ones_like(firing, dtype=torch.bool), int((firing > 0).sum())
    found = [Setting(ORIGINAL, "", 0, np.nan, None)]
    for baseline in (MEAN, ZERO):
        found += [Setting(ALL, baseline, 0, 1.0, every), Setting(NONE, baseline, 0, 0.0, ~every)]
        for name in CHOSEN_BY:
            chosen = [scores[name, baseline]] if name != RANDOM else [
                exchanged(scores[INFLUENCE, baseline], firing,
                          generator(seed, "task circuit", 1 + draw)) for draw in range(DRAWS)]
            found += [Setting(name, baseline, draw, share,
                              largest(score, max(1, round(share * n))))
                      for draw, score in enumerate(chosen) for share in SHARES]
    return found


# --- running -------------------------------------------------------------------------------------


def kept_features(transcoders: Transcoders, means: Means, kinds: Tensor, setting: Setting
                  ) -> Replacement:
    """What takes every MLP's place on some cells; kinds: (n_cells, length) of their tokens."""
    t, keep = transcoders, setting.keep
    assert keep is not None

    def replacement(layer: int, x: Tensor) -> Tensor:
        kept = keep[layer].nonzero()[:, 0]
        writes = t.W_dec[layer, kept]
        base = t.b_dec[layer]
        if setting.baseline == MEAN:
            at_mean = means.activations[layer][:, kept] @ writes
            base = (means.outputs[layer] - at_mean)[kinds]
        elif t.variant.skip:
            base = base + (x - t.b_in[layer]) @ t.W_skip[layer].mT
        if not len(kept):
            return base.expand_as(x).to(x.dtype)
        return (base + t.layer_activations(layer, x, kept) @ writes).to(x.dtype)

    return replacement


@torch.no_grad()
def task_circuit(model: "PreTrainedModel", transcoders: Transcoders, corpus: "Corpus",
                 profile: "Profile") -> TaskCircuit:
    """Choose features on training cells, and ask held-out cells for their types with them.

    Of both kinds of cells every type has as many as there are, up to a bound, so that the commonest
    type does not decide. Memory is that of one layer's activations for `profile.forward_cells`
    cells at a time; time that of one pass of `SCORED_CELLS` cells for each setting.
    """
    rng, calls = generator(profile.seed, "task circuit", 0), calls_of(model, corpus, profile)
    training = rng.permutation(np.flatnonzero(~corpus.held_out))
    means = mean_activations(model, transcoders, corpus, np.sort(training[:MEAN_CELLS]),
                             profile.forward_cells)
    choice = studied_cells(corpus, CHOICE_PER_TYPE, CHOICE_CELLS, among=calls.callable(training))
    held_out = calls.callable(rng.permutation(np.flatnonzero(corpus.held_out)))
    cells = studied_cells(corpus, SCORED_PER_TYPE, SCORED_CELLS, among=held_out)
    scores = choose(calls, transcoders, choice, means)
    settings = settings_of(scores, means, profile.seed)
    found = TaskCircuit(settings, np.zeros((len(settings), len(cells)), bool),
                        np.zeros((len(settings), len(cells))), int((means.firing > 0).sum()),
                        len(choice), cells)
    own = calls.own_calls(cells)
    bar = tqdm(total=len(cells) * len(settings), desc="task circuit", unit="cell")
    done = 0
    for rows, tokens, mask in batches(corpus, cells, profile.forward_cells, device_of(model)):
        where = slice(done, done + len(rows))
        done += len(rows)
        kinds = kinds_of(corpus, rows)[:, : tokens.shape[1]]
        # What stands behind the answer reaches nothing that is read.
        places = means.places(np.where(kinds < 0, kinds[:, :1], kinds))
        with faster_attention(model):
            for at, setting in enumerate(settings):
                found.right[at, where], found.contrast[at, where] = calls.scored(
                    rows, tokens, last_hidden(
                        model, tokens, mask, None if setting.keep is None else kept_features(
                            transcoders, means, places, setting)), own[where])
                bar.update(len(rows))
    bar.close()
    return found


def last_hidden(model: "PreTrainedModel", tokens: Tensor, mask: Tensor,
                replacement: Replacement | None = None) -> Tensor:
    """(n, length, d_model) what the model's body gives, with its MLPs replaced."""
    # Without a mask, which makes attention slower: in a decoder padding stands behind all that is
    # read.
    told = None if architecture_of(model).causal else mask
    with replaced_mlps(model, replacement) if replacement else contextlib.nullcontext():
        last: Tensor = decoder(model)(input_ids=tokens, attention_mask=told,
                                      use_cache=False).last_hidden_state
    return last
