"""The model that is explained: loading or training it, and its MLP sites.

GPT-NeoX computes `h' = h + attention(LN1(h)) + mlp(LN2(h))` (parallel residual): a layer's MLP does
not see the same layer's attention. Hugging Face calls LN2 `post_attention_layernorm` all the same.
An MLP site is the `mlp` module itself: its input is LN2's output, its output what is added. That
holds for all families of `architectures`; the small model that is trained is a GPT-NeoX.

Imports torch, transformers and numpy, so it runs on a bare GPU machine.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from scfm_circuits import InputError, manifest
from scfm_circuits.architectures import check_supported, decoder, decoder_layers
from scfm_circuits.files import atomic_folder, read_json, write_json

if TYPE_CHECKING:
    from transformers import (
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        PreTrainedConfig,
        PreTrainedModel,
    )

    from scfm_circuits.profile import Profile
    from scfm_circuits.sentences import Corpus

Replacement = Callable[[int, Tensor], Tensor]
"""From a layer and its MLP input (..., d_model) to what takes the MLP output's place."""

_FIELDS = ("seed", "model", "model_layers", "model_width", "model_heads", "model_steps",
           "model_batch_cells", "model_learning_rate", "model_revision")


class Sites(NamedTuple):
    """What the MLPs of all layers read and wrote on some tokens.

    inputs, outputs: (n_layers, n_tokens, d_model); row `n` of both is the same token.
    """

    inputs: Tensor
    outputs: Tensor


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def _move(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device)


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mlps(model: nn.Module) -> list[nn.Module]:
    """The MLP modules, layer by layer; InputError for a model of no supported family."""
    return [layer.mlp for layer in decoder_layers(model)]


# --- the model -----------------------------------------------------------------------------------


def _without_widgets() -> None:
    """Switch off the bars of transformers: in a notebook they are widgets, which would pull scripts
    from other hosts into the page."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load_config(name: str | Path, revision: str | None = None, **options: Any
                ) -> "PreTrainedConfig":
    """A model's configuration, which says its size before its weights are there.

    options: as for transformers, such as `local_files_only`. Raises InputError if it cannot be had,
    or if the model is of no supported family or quantized.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(name), revision=revision, trust_remote_code=False,
                                            **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise _cannot_load(name, error) from None
    check_supported(config.model_type, (config.architectures or [config.model_type])[0])
    if getattr(config, "quantization_config", None):
        raise InputError(f"The weights of the model {str(name)!r} are quantized, so what a layer "
                         "computes cannot be read from them; set `model` to one that is not.")
    return config


def check_layers(profile: "Profile", found: int) -> None:
    """InputError if the profile asks for layers that a loaded model of `found` does not have."""
    if profile.model_layers not in (None, found):
        raise InputError(f"The profile asks for {profile.model_layers} layers (`model_layers`), "
                         f"but the model {profile.model!r} has {found}; set `model_layers: "
                         f"{found}`.")
    if profile.human_layer >= found:
        raise InputError(f"`human_layer` is {profile.human_layer}, but the model "
                         f"{profile.model!r} has layers 0 to {found - 1}; lower it.")


def load_model(name: str | Path, revision: str | None = None,
               dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """A causal language model from a Hugging Face id or folder, in evaluation mode.

    Only safetensors weights are read and no code of the repository is run. Attention is `eager`,
    because the tracer reads its patterns. Raises InputError as `load_config` does, before weights
    are read, or if weights are missing.
    """
    from transformers import AutoModelForCausalLM

    _without_widgets()
    load_config(name, revision)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(name), revision=revision, dtype=dtype, use_safetensors=True,
            trust_remote_code=False, attn_implementation="eager", output_loading_info=True,
        )
        model, loading = loaded
        # transformers fills missing weights with random numbers and only warns.
        if loading["missing_keys"]:
            raise ValueError(f"it lacks the weights {', '.join(sorted(loading['missing_keys']))}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _cannot_load(name, error) from None
    return model.eval()


def _cannot_load(name: str | Path, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return InputError(f"The model {str(name)!r} cannot be loaded ({reason}); check `model` in the "
                      "profile, or download it once with a network.")


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
    the next token over all tokens that are not padding.
    """
    model = build_small_model(profile, len(corpus.tokenizer), corpus.tokens.shape[1])
    _move(model, best_device()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=profile.model_learning_rate,
                                  betas=(0.9, 0.95), weight_decay=0.1)
    steps = profile.model_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=profile.model_learning_rate, total_steps=steps, pct_start=0.1,
        cycle_momentum=False)
    rng = np.random.default_rng([profile.seed, 4])
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
        bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    return model.eval(), TrainingCurve(list(range(1, steps + 1)), losses)


def model_dtype(profile: "Profile") -> torch.dtype:
    """Type of the model's weights, but for circuits."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[profile.model_precision]


def get_model(profile: "Profile", corpus: "Corpus", *, exact: bool = False
              ) -> tuple["PreTrainedModel", TrainingCurve]:
    """The profile's model: loaded, or trained once and kept as a Hugging Face checkpoint folder.

    Returns the model on the best device, in the profile's `model_precision` or, if `exact`, in
    float32; and its training curve (empty if loaded).
    """
    dtype = torch.float32 if exact else model_dtype(profile)
    if profile.model != "train":
        check_layers(profile, load_config(profile.model, profile.model_revision).num_hidden_layers)
        model = load_model(profile.model, profile.model_revision, dtype)
        manifest.check_model(profile.model, model.config, len(corpus.tokenizer))
        check_vocabulary(model, corpus)
        _move(model, best_device())
        return model, TrainingCurve([], [])
    folder = profile.results / "language_model"
    stamp = profile.fingerprint(_FIELDS, ("sentences", "cells", "language_model"))
    stamp["corpus"] = corpus_digest(corpus)
    stored = read_json(folder / "training.json")
    if stored.get("stamp") != stamp:
        _without_widgets()
        model, curve = train_small_model(corpus, profile)
        with atomic_folder(folder) as fresh:
            model.save_pretrained(fresh)
            corpus.tokenizer.save_pretrained(fresh)
            write_json(fresh / "training.json", {"stamp": stamp, **curve._asdict()})
    else:
        curve = TrainingCurve(stored["step"], stored["loss"])
    model = load_model(folder, dtype=dtype)
    _move(model, best_device())
    return model, curve


def corpus_digest(corpus: "Corpus") -> str:
    """A short hash of the corpus's tokens and split; what was trained on them depends on it."""
    import hashlib

    digest = hashlib.sha256()
    for start in range(0, len(corpus), 4096):  # not a copy of all of them
        digest.update(np.ascontiguousarray(corpus.tokens[start : start + 4096]).tobytes())
    digest.update(np.ascontiguousarray(corpus.held_out).tobytes())
    return digest.hexdigest()[:16]


def check_vocabulary(model: nn.Module, corpus: "Corpus") -> None:
    """Raise InputError if the corpus has token ids or lengths that the model cannot take."""
    config: Any = model.config
    largest, length = int(corpus.tokens.max()), corpus.tokens.shape[1]
    if largest >= config.vocab_size:
        raise InputError(f"The tokenizer gives token {largest}, but the model has "
                         f"{config.vocab_size} rows; `tokenizer` and `model` do not belong "
                         "together.")
    if length > config.max_position_embeddings:
        raise InputError(f"The longest cell has {length} tokens, the model takes "
                         f"{config.max_position_embeddings}; lower `genes_per_cell`.")


# --- forward passes ------------------------------------------------------------------------------


def next_token_loss(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of each next token that is not padding, in nats, computed in float32.

    logits: (n, length, vocabulary); tokens, mask: (n, length). Returns (n_predictions,).
    """
    wanted = mask[:, 1:]
    return nn.functional.cross_entropy(
        logits[:, :-1][wanted].float(), tokens[:, 1:][wanted], reduction="none")


def batches(corpus: "Corpus", cells: Sequence[int] | np.ndarray, size: int, device: torch.device
            ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Cells in the given order, `size` at a time, cut to their longest.

    Yields (rows, tokens, mask): (n,) cell indices, (n, length) token ids, (n, length) bool.
    """
    cells = np.asarray(cells)
    for start in range(0, len(cells), size):
        rows = cells[start : start + size]
        length = int(corpus.lengths[rows].max())
        yield (rows, torch.from_numpy(corpus.tokens[rows, :length]).to(device),
               torch.from_numpy(corpus.mask[rows, :length]).to(device))


@contextlib.contextmanager
def replaced_mlps(model: nn.Module, replacement: Replacement,
                  layers: Sequence[int] | None = None) -> Iterator[None]:
    """Within the block, the MLPs of `layers` (default: all) give `replacement(layer, input)`."""
    modules = dict(enumerate(mlps(model)))
    if layers is not None:
        modules = {layer: modules[layer] for layer in layers}

    def hook(layer: int) -> Callable:
        return lambda module, args, output: replacement(layer, args[0])

    handles = [module.register_forward_hook(hook(layer)) for layer, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def zero_ablation(layer: int, inputs: Tensor) -> Tensor:
    """The replacement that removes an MLP: it writes nothing (the paper's "No MLP")."""
    return torch.zeros_like(inputs)


@torch.no_grad()
def mlp_sites(model: nn.Module, tokens: Tensor, mask: Tensor) -> Sites:
    """Inputs and outputs of all MLPs on the tokens that are not padding, from one forward pass.

    tokens, mask: (n, length). No logits are computed.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    where = mask.flatten().nonzero()[:, 0]  # once: a GPU is waited for each time
    handles = [
        module.register_forward_hook(lambda module, args, output: seen.append(
            (args[0].flatten(0, 1)[where], output.flatten(0, 1)[where])))
        for module in mlps(model)
    ]
    try:
        decoder(model)(input_ids=tokens, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    inputs, outputs = zip(*seen, strict=True)
    return Sites(torch.stack(inputs), torch.stack(outputs))


@torch.no_grad()
def predict_answers(model: nn.Module, corpus: "Corpus",
                    cells: Sequence[int] | np.ndarray, new_tokens: int = 24) -> list[str]:
    """The model's own answer to each cell's prompt, decoded greedily, without its full stop."""
    answers = []
    for cell in cells:
        prompt = corpus.tokens[cell][: corpus.answer_start[cell]]
        answers.append(answer_prompt(model, corpus.tokenizer, prompt, new_tokens))
    return answers


@torch.no_grad()
def answer_prompt(model: nn.Module, tokenizer, prompt: np.ndarray,  # type: ignore[no-untyped-def]
                  new_tokens: int = 24) -> str:
    """Greedy answer to one tokenized prompt (length,), without the full stop that ends it.

    A cell type may hold a full stop of its own, so the model's end of text ends the answer; one
    that goes on beyond `new_tokens` is cut at its first full stop.
    """
    tokens = torch.from_numpy(np.asarray(prompt))[None].to(device_of(model))
    past, produced, ended = None, [], False
    for _ in range(new_tokens):
        output = model(input_ids=tokens, past_key_values=past, use_cache=True)
        past, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
        ended = int(tokens) == tokenizer.eos_token_id
        if ended:
            break
        produced.append(int(tokens))
    text = tokenizer.decode(produced, clean_up_tokenization_spaces=False).strip()
    return (text.removesuffix(".") if ended else text.partition(".")[0]).strip()
