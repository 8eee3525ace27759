"""A small model trained on the spot on the corpus, where no network is at hand.

Which one the encoding says: cell sentences are learnt by a GPT-NeoX of Pythia's proportions, and
genes as tokens by a small copy of the model whose encoding it is, MaxToki (a Llama) or Geneformer
(a BERT). The last learns to fill in genes that are masked, the others to go on.
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from scfm_circuits import InputError
from scfm_circuits.cells.thinning import read_counts, thinned_prompts
from scfm_circuits.cells.tokens import Prompts
from scfm_circuits.common.encodings import CELL_SENTENCE, RANK_VALUE
from scfm_circuits.common.randomness import generator
from scfm_circuits.models.architectures import check_supported
from scfm_circuits.models.mlp_sites import (
    MASKED,
    Asked,
    best_device,
    device_of,
    mask_token,
    moved_to,
    next_tokens,
    not_finite,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile

TRAINING_FIELDS = ("encoding", "model_layers", "model_width", "model_heads", "model_steps",
                   "model_batch_cells", "model_learning_rate", "model_answer_weight",
                   "model_type_balance", "model_thinning")
"""Profile fields, beside the corpus's, that decide what the small model learns."""
FAMILIES = {CELL_SENTENCE: "GPT-NeoX", "maxtoki": "Llama", "geneformer_v1": "BERT",
            "geneformer_v2": "BERT"}
"""What is trained, by the profile's `encoding`."""
_AHEAD = 128
"""Steps whose sentences are made at once."""


def small_config(profile: "Profile", vocabulary: int, length: int) -> "PreTrainedConfig":
    """The configuration of the model that is trained: the profile's size, the proportions of the
    model whose encoding it is."""
    from transformers import AutoConfig

    shared: dict[str, Any] = dict(
        vocab_size=vocabulary, hidden_size=profile.model_width,
        num_hidden_layers=profile.model_layers, num_attention_heads=profile.model_heads,
        max_position_embeddings=max(256, length), attn_implementation="eager")
    return AutoConfig.for_model(**shared, **_proportions(profile.encoding, profile.model_width))


def _proportions(encoding: str, width: int) -> dict[str, Any]:
    """What of a configuration the model decides whose encoding it is: of Pythia, MaxToki-217M,
    Geneformer V1-10M or V2-104M. Dropout is left out, as a small model is trained for few steps."""
    if encoding == CELL_SENTENCE:
        return dict(model_type="gpt_neox", intermediate_size=4 * width, rotary_pct=0.25,
                    use_parallel_residual=True, tie_word_embeddings=False, bos_token_id=0,
                    eos_token_id=0)
    special = {name: i for i, name in enumerate(RANK_VALUE[encoding].special)}
    if encoding == "maxtoki":
        return dict(model_type="llama", intermediate_size=2 * width, rms_norm_eps=1e-6,
                    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
                    tie_word_embeddings=False, pad_token_id=special["<pad>"],
                    bos_token_id=special["<bos>"], eos_token_id=special["<eos>"])
    mlp = {"geneformer_v1": 2, "geneformer_v2": 4}[encoding]
    return dict(model_type="bert", intermediate_size=mlp * width, hidden_act="relu",
                layer_norm_eps=1e-12, type_vocab_size=2, tie_word_embeddings=True,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                pad_token_id=special["<pad>"])


def build_small_model(profile: "Profile", vocabulary: int, length: int) -> "PreTrainedModel":
    """An untrained model of `small_config`, seeded."""
    import transformers

    config = small_config(profile, vocabulary, length)
    kind: Any = getattr(transformers, check_supported(config.model_type, "").auto)
    torch.manual_seed(profile.seed)
    model: PreTrainedModel = kind.from_config(config)
    return model.float()


class TrainingCurve(NamedTuple):
    """Loss of each training step of the small model, in nats per token that is predicted."""

    step: list[int]
    loss: list[float]


def train_small_model(corpus: "Corpus", profile: "Profile", *, progress: bool = True
                      ) -> tuple["PreTrainedModel", TrainingCurve]:
    """Train a small model on the training cells: to write sentences and name the cell's type, to
    go on with the next gene, or to fill in masked genes (`small_config`).

    AdamW with a cosine schedule after a tenth of warm-up; the loss is the mean cross-entropy over
    all predictions, those of answers weighted (`model_answer_weight`); the curve is without
    weights. Raises InputError at the first step that leaves no finite number.
    """
    model = build_small_model(profile, len(corpus.tokenizer), corpus.tokens.shape[1])
    moved_to(model, best_device()).train()
    model.set_attn_implementation("sdpa")  # a fifth faster; `eager` again for those who look inside
    optimizer = torch.optim.AdamW(model.parameters(), lr=profile.model_learning_rate,
                                  betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    steps = profile.model_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=profile.model_learning_rate, total_steps=steps, pct_start=0.1,
        cycle_momentum=False)
    losses: list[float] = []
    bar = tqdm(_batches(corpus, profile), desc="language model", unit="step", total=steps,
               disable=not progress)
    predictions = (_of_next_tokens if check_supported(model.config.model_type, "").causal
                   else _of_masked_genes)(model, corpus, profile)
    for batch in bar:
        each, weight = predictions(batch)
        loss = (each * weight).sum() / weight.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(each.detach().mean().item())
        if not math.isfinite(losses[-1]) or (len(losses) == steps and not_finite(model)):
            raise InputError(f"The language model does not learn: after step {len(losses)} its "
                             "loss or weights are no finite numbers; lower `model_learning_rate` "
                             f"(it is {profile.model_learning_rate:g}).")
        bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    model.set_attn_implementation("eager")
    return model.eval(), TrainingCurve(list(range(1, steps + 1)), losses)


Predictions = Callable[[Prompts], tuple[Tensor, Tensor]]
"""From a batch to each prediction's loss, in nats, and its weight."""


def _of_next_tokens(model: "PreTrainedModel", corpus: "Corpus", profile: "Profile") -> Predictions:
    def of(batch: Prompts) -> tuple[Tensor, Tensor]:
        tokens, mask, weight = _cut(batch, model, batch.tokens, batch.mask,
                                    _weights(batch, profile.model_answer_weight))
        # No token attends to the padding behind it: without a mask attention is faster.
        each = next_tokens(tokens, mask).loss(model(input_ids=tokens).logits)
        return each, weight[:, 1:][mask[:, 1:]]
    return of


def _of_masked_genes(model: "PreTrainedModel", corpus: "Corpus", profile: "Profile") -> Predictions:
    rng, mask_id = generator(profile.seed, "masks in training"), mask_token(corpus)

    def of(batch: Prompts) -> tuple[Tensor, Tensor]:
        told, chosen = hidden_genes(batch, mask_id, len(corpus.tokenizer), rng)
        tokens, mask, shown, where = _cut(batch, model, batch.tokens, batch.mask, told, chosen)
        each = Asked(shown, where, tokens[where]).loss(
            model(input_ids=shown, attention_mask=mask).logits)
        return each, torch.ones_like(each)
    return of


def hidden_genes(batch: Prompts, mask_id: int, vocabulary: int, rng: np.random.Generator
                 ) -> tuple[np.ndarray, np.ndarray]:
    """A batch's tokens as an encoder is shown them in training, and which are asked, each (n,
    length).

    Geneformer's rule, which is BERT's (Devlin et al. 2019; transformers'
    DataCollatorForLanguageModeling): 15 % of the genes are asked, of which 80 % are shown as a
    mask, 10 % as any token and 10 % as they are. A batch in which none is drawn asks its first.
    """
    genes = batch.gene >= 0
    chosen = genes & (rng.random(genes.shape) < MASKED)
    if not chosen.any():
        chosen[np.unravel_index(np.argmax(genes), genes.shape)] = True
    way, others = rng.random(genes.shape), rng.integers(0, vocabulary, genes.shape)
    told = np.where(chosen & (way < 0.8), mask_id,
                    np.where(chosen & (way >= 0.9), others, batch.tokens))
    return told, chosen


def _cut(batch: Prompts, model: nn.Module, *arrays: np.ndarray) -> list[Tensor]:
    """Arrays (n, length) of a batch, on the model's device, cut to its longest cell: padding would
    be computed and thrown away."""
    length = int(batch.mask.sum(axis=1).max())
    return [torch.from_numpy(np.ascontiguousarray(one[:, :length])).to(device_of(model))
            for one in arrays]


def _weights(batch: Prompts, of_answers: float) -> np.ndarray:
    """(n, length) float32 weight of each token in the loss."""
    at = np.arange(batch.tokens.shape[1])
    answer = (at >= batch.answer_start[:, None]) & (at <= batch.answer_end[:, None])
    return np.where(answer, of_answers, 1.0).astype(np.float32)


def _batches(corpus: "Corpus", profile: "Profile") -> Iterator[Prompts]:
    """The training cells' prompts, `model_batch_cells` at a time, `model_steps` times.

    Cells come in turn, each epoch in another order, or drawn more evenly by type; their sentences
    are the corpus's, or thinned anew.
    """
    rng = generator(profile.seed, "batches of the small model")
    fresh = generator(profile.seed, "thinned cells")
    counts = read_counts(profile, corpus) if profile.model_thinning < 1 else None
    train = np.flatnonzero(~corpus.held_out)
    _, kind, sizes = np.unique(corpus.labels[train], return_inverse=True, return_counts=True)
    chance = (1 / sizes[kind]) ** profile.model_type_balance
    size = min(profile.model_batch_cells, len(train))
    queue = np.array([], np.int64)
    for done in range(0, profile.model_steps, _AHEAD):
        n_steps = min(_AHEAD, profile.model_steps - done)
        while len(queue) < n_steps * size:
            queue = np.append(queue, rng.permutation(train) if profile.model_type_balance == 0
                              else rng.choice(train, len(train), p=chance / chance.sum()))
        cells, queue = queue[: n_steps * size], queue[n_steps * size :]
        prompts = (Prompts(*(getattr(corpus, name)[cells] for name in Prompts._fields))
                   if counts is None else thinned_prompts(corpus, profile, counts, cells, fresh))
        for start in range(0, len(cells), size):
            yield Prompts(*(one[start : start + size] for one in prompts))
