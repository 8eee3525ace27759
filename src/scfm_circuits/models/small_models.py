"""A small GPT-NeoX trained on the spot on the corpus, where no network is at hand."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from scfm_circuits import InputError
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
    the next token over all tokens that are not padding. Raises InputError at the first step that
    leaves no finite number.
    """
    model = build_small_model(profile, len(corpus.tokenizer), corpus.tokens.shape[1])
    moved_to(model, best_device()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=profile.model_learning_rate,
                                  betas=(0.9, 0.95), weight_decay=0.1)
    steps = profile.model_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=profile.model_learning_rate, total_steps=steps, pct_start=0.1,
        cycle_momentum=False)
    rng = generator(profile.seed, "batches of the small model")
    train = np.flatnonzero(~corpus.held_out)
    size = min(profile.model_batch_cells, len(train))
    queue = np.array([], np.int64)
    losses: list[float] = []
    bar = tqdm(range(steps), desc="language model", unit="step", disable=not progress)
    for _ in bar:
        while len(queue) < size:
            queue = np.append(queue, rng.permutation(train))
        batch, queue = queue[:size], queue[size:]
        # Batches are cut to their longest cell; padding would be computed and thrown away.
        length = int(corpus.lengths[batch].max())
        tokens = torch.from_numpy(corpus.tokens[batch, :length]).to(device_of(model))
        mask = torch.from_numpy(corpus.mask[batch, :length]).to(device_of(model))
        loss = next_token_loss(model(input_ids=tokens, attention_mask=mask).logits, tokens,
                               mask).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or (len(losses) == steps and not_finite(model)):
            raise InputError(f"The language model does not learn: after step {len(losses)} its "
                             "loss or weights are no finite numbers; lower `model_learning_rate` "
                             f"(it is {profile.model_learning_rate:g}).")
        bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    return model.eval(), TrainingCurve(list(range(1, steps + 1)), losses)
