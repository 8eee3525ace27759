"""A small GPT-NeoX trained on the spot on the corpus, where no network is at hand."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from scfm_circuits import InputError
from scfm_circuits.cells.thinning import read_counts, thinned_prompts
from scfm_circuits.cells.tokens import Prompts
from scfm_circuits.common.randomness import generator
from scfm_circuits.models.mlp_sites import (
    best_device,
    device_of,
    moved_to,
    next_token_loss,
    not_finite,
)

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile

TRAINING_FIELDS = ("model_layers", "model_width", "model_heads", "model_steps", "model_batch_cells",
                   "model_learning_rate", "model_answer_weight", "model_type_balance",
                   "model_thinning")
"""Profile fields, beside the corpus's, that decide what the small model learns."""
_AHEAD = 128
"""Steps whose sentences are made at once."""


def small_config(profile: "Profile", vocabulary: int, length: int) -> "GPTNeoXConfig":
    """The configuration of the model that is trained: the profile's size, Pythia's proportions."""
    from transformers import GPTNeoXConfig

    settings: dict[str, Any] = dict(
        vocab_size=vocabulary, hidden_size=profile.model_width,
        num_hidden_layers=profile.model_layers, num_attention_heads=profile.model_heads,
        intermediate_size=4 * profile.model_width, max_position_embeddings=max(256, length),
        rotary_pct=0.25, use_parallel_residual=True, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )
    return GPTNeoXConfig(**settings)


def build_small_model(profile: "Profile", vocabulary: int, length: int) -> "GPTNeoXForCausalLM":
    """An untrained GPT-NeoX of `small_config`, seeded."""
    from transformers import GPTNeoXForCausalLM

    config = small_config(profile, vocabulary, length)
    torch.manual_seed(profile.seed)
    return GPTNeoXForCausalLM(config).float()


class TrainingCurve(NamedTuple):
    """Loss of each training step of the small model, in nats per token."""

    step: list[int]
    loss: list[float]


def train_small_model(corpus: "Corpus", profile: "Profile", *, progress: bool = True
                      ) -> tuple["GPTNeoXForCausalLM", TrainingCurve]:
    """Train a small GPT-NeoX on the training cells to write sentences and name the cell's type.

    AdamW with a cosine schedule after a tenth of warm-up; the loss is the mean cross-entropy of
    the next token over all tokens that are not padding, those of answers weighted
    (`model_answer_weight`); the curve is without weights. Raises InputError at the first step that
    leaves no finite number.
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
    for batch in bar:
        # Batches are cut to their longest cell; padding would be computed and thrown away.
        length = int(batch.mask.sum(axis=1).max())
        tokens, mask, weight = (
            torch.from_numpy(np.ascontiguousarray(one[:, :length])).to(device_of(model))
            for one in (batch.tokens, batch.mask, _weights(batch, profile.model_answer_weight)))
        # No token attends to the padding behind it: without a mask attention is faster.
        each = next_token_loss(model(input_ids=tokens).logits, tokens, mask)
        weight = weight[:, 1:][mask[:, 1:]]
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
