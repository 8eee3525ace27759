"""Loading the model that is explained, or having it trained on the spot, with checks before use."""

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from scfm_circuits import InputError
from scfm_circuits.common import manifest
from scfm_circuits.common.encodings import CELL_SENTENCE
from scfm_circuits.common.files import atomic_folder, digest, first_line
from scfm_circuits.common.kept import Stamp, read_record, stamp_of, write_record
from scfm_circuits.common.profile import model_source
from scfm_circuits.common.randomness import generator
from scfm_circuits.models.architectures import architecture_of, check_supported
from scfm_circuits.models.mlp_sites import best_device, moved_to, not_finite
from scfm_circuits.models.small_models import TRAINING_FIELDS, TrainingCurve, train_small_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from scfm_circuits.cells.corpus import Corpus
    from scfm_circuits.common.profile import Profile

_FIELDS = ("seed", "model", "model_revision", "model_subfolder", *TRAINING_FIELDS)
_IN_A_LAYER = re.compile(r"\.layers?\.\d+\.")
_OF_A_LAYER = re.compile(_IN_A_LAYER.pattern + r".*weight$")
"""Names of a layer's tensors, and of its weights; old ones hold masks too, which end in `bias`."""
_FILLED = 128
"""Rows by which embeddings are filled up, at most."""
_FIRST = {"gamma": "weight", "beta": "bias"}
_FIRST_NORMS = re.compile(r"\.(gamma|beta)$")
"""What BERT's first checkpoints call the weights of norms."""


def _without_widgets() -> None:
    """Switch off the bars of transformers: in a notebook they are widgets, which would pull scripts
    from other hosts into the page."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _source(name: str | Path) -> str:
    """What transformers loads: a folder or a name; of the files that scGPT's authors publish, the
    folder in the cache that is made of them."""
    from scfm_circuits.models import scgpt

    scgpt.register()
    source = model_source("model", str(name))
    if not scgpt.is_published(Path(source)):
        return source
    own = digest(str(Path(source).resolve()))
    return str(scgpt.converted(Path(source), manifest.cache_folder() / "scgpt" / own))


def load_config(name: str | Path, revision: str | None = None, **options: Any
                ) -> "PreTrainedConfig":
    """A model's configuration, which says its size before its weights are there.

    options: as for transformers, such as `local_files_only` or `subfolder`. Raises InputError if
    it cannot be had, or if the model is of no supported family or quantized.
    """
    from transformers import AutoConfig

    source = _source(name)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False,
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
               dtype: torch.dtype = torch.float32, subfolder: str = "") -> "PreTrainedModel":
    """A language model from a Hugging Face id or folder, in evaluation mode.

    subfolder: where in it the model is. Only safetensors weights are read and no code of the
    repository is run. Attention is `eager`, because the tracer reads its patterns. Raises
    InputError as `load_config` does, before weights are read, or if weights are missing or no
    finite numbers, or layers have some that the family does not know.
    """
    import transformers

    _without_widgets()
    config = load_config(name, revision, subfolder=subfolder)
    source = _source(name)
    kind: Any = getattr(transformers, check_supported(config.model_type, "").auto)
    try:
        model, loading = kind.from_pretrained(
            source, revision=revision, dtype=dtype, use_safetensors=True, subfolder=subfolder,
            trust_remote_code=False, attn_implementation="eager", output_loading_info=True,
        )
        # transformers fills missing weights with random numbers and only warns.
        _check_names(loading["missing_keys"], loading["unexpected_keys"], config.model_type)
        odd = not_finite(model)
        if odd is not None:
            raise ValueError(f"its weight {odd} holds a value that is no finite number")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _cannot_load(name, error) from None
    return model.eval()


def check_checkpoint(name: str, subfolder: str, model: nn.Module) -> None:
    """Before any work: InputError, as of `load_model`, if a folder has no safetensors, one of them
    cannot be read, or its layers, or the head behind them, do not have the weights of the family,
    by name and shape.

    Only the heads of the files are read. A model that is in no folder here is left to `load_model`,
    as are the embeddings, which some checkpoints call by older names.
    model: of the folder's configuration; its weights may be on the meta device.
    """
    try:
        folder = Path(_source(name), subfolder)
    except InputError:  # it is not here, and told among what is to be fetched
        return
    found: dict[str, tuple[int, ...]] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                names = file.keys()
                found.update((key, tuple(file.get_slice(key).get_shape())) for key in names)
    except (OSError, SafetensorError) as error:
        raise _cannot_load(name, error) from None
    if not folder.is_dir():
        return
    if not found:
        raise InputError(f"The model {str(name)!r} has no safetensors weights in {folder}, and "
                         "others are not read, as they can run code; convert it first.")
    family, config = architecture_of(model), cast("PreTrainedConfig", model.config)

    def plain(key: str) -> str:  # transformers takes names without the body's, and BERT's first
        return _FIRST_NORMS.sub(lambda old: f".{_FIRST[old[1]]}",
                                key.removeprefix(f"{family.body}."))

    known, wanted = {plain(key) for key in found}, {
        plain(key): key for key, _ in model.named_parameters()}
    lacking = [key for short, key in wanted.items() if short not in known and (
        _IN_A_LAYER.search(key) or (family.head and key.startswith(f"{family.head}.")))]
    foreign = [key for key in found if plain(key) not in wanted]
    shapes = {key: tuple(one.shape) for key, one in model.named_parameters()}
    try:
        _check_names(lacking, foreign, config.model_type)
        for key, shape in found.items():
            wants = shapes[wanted[plain(key)]] if plain(key) in wanted else shape
            if shape != wants:
                raise ValueError(f"its weight {key} has the shape {shape}, and by its config.json "
                                 f"{wants}")
    except ValueError as error:
        raise _cannot_load(name, error) from None


def _check_names(missing: Iterable[str], unexpected: Iterable[str], family: str) -> None:
    """ValueError for weights that a checkpoint lacks, or for those of layers that its family has
    not."""
    lacking = sorted(missing)
    if lacking:
        raise ValueError(f"it lacks the weights {', '.join(lacking[:3])}"
                         + f" and {len(lacking) - 3} more" * (len(lacking) > 3))
    foreign = sorted(one for one in unexpected if _OF_A_LAYER.search(f".{one}"))
    if foreign:
        raise ValueError(f"its layers have weights that a {family} has not, and which would not be "
                         f"used: {', '.join(foreign[:3])}")


def _cannot_load(name: str | Path, error: Exception) -> InputError:
    reason = first_line(error)
    if "ignore_mismatched_sizes" in reason:
        reason = "its weights have other shapes than its config.json says"
    return InputError(f"The model {str(name)!r} cannot be loaded ({reason}); check `model` in the "
                      "profile, or download it once with a network.")


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
        config = load_config(profile.model, profile.model_revision,
                             subfolder=profile.model_subfolder)
        check_layers(profile, config.num_hidden_layers)
        if profile.encoding == CELL_SENTENCE and not check_supported(config.model_type, "").causal:
            raise InputError(f"The model {profile.model!r} fills in what is masked and writes no "
                             "answer, so it reads genes as tokens; set `encoding` to its own.")
        model = load_model(profile.model, profile.model_revision, dtype, profile.model_subfolder)
        manifest.check_model(manifest.model_name(profile.model, profile.model_subfolder),
                             model.config, len(corpus.tokenizer))
        check_vocabulary(model, corpus)
        moved_to(model, best_device())
        return model, TrainingCurve([], [])
    folder = profile.results / "language_model"
    stamp = model_stamp(profile, corpus)
    stored = read_record(folder / "training.json", stamp)
    if stored is None:
        _without_widgets()
        model, curve = train_small_model(corpus, profile)
        with atomic_folder(folder) as fresh:
            model.save_pretrained(fresh)
            corpus.tokenizer.save_pretrained(fresh)
            write_record(fresh / "training.json", {"stamp": stamp, **curve._asdict()})
    else:
        curve = TrainingCurve(stored["step"], stored["loss"])
    model = load_model(folder, dtype=dtype)
    moved_to(model, best_device())
    return model, curve


def model_stamp(profile: "Profile", corpus: "Corpus") -> Stamp:
    """What a model that is trained on the corpus depends on, and what any says of its cells."""
    return stamp_of(profile, _FIELDS, ("cells", "models"), corpus=corpus_digest(corpus))


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
    if not corpus.has_answers:
        check_dictionary(config, len(corpus.tokenizer))
    if largest >= config.vocab_size * getattr(config, "levels", 1):
        raise InputError(f"The tokenizer gives token {largest}, but the model has "
                         f"{config.vocab_size} rows; `tokenizer` and `model` do not belong "
                         "together.")
    if length > config.max_position_embeddings:
        raise InputError(f"The longest cell has {length} tokens, the model takes "
                         f"{config.max_position_embeddings}; lower `genes_per_cell`.")


def check_dictionary(config: Any, tokens: int) -> None:
    """InputError if a model whose tokens are genes has another number of them than the dictionary,
    but for rows that fill its embedding up to a round number."""
    more = config.vocab_size - tokens
    if not 0 <= more < (1 if hasattr(config, "levels") else _FILLED):
        raise InputError(f"The token dictionary has {tokens:,} tokens, but the model has "
                         f"{config.vocab_size:,} rows; set `token_dictionary` to the one that came "
                         "with the model.")


@torch.no_grad()
def reinitialised_model(model: "PreTrainedModel", seed: int) -> "PreTrainedModel":
    """A copy of the model whose every parameter tensor is drawn anew; the model stays as it is.

    Entries are normal with the tensor's own mean and standard deviation, embeddings included
    (Heap et al.'s "re-randomised including embeddings"), so the scales of weights are kept and all
    else is lost; a constant tensor stays. Tensors that the model ties stay tied. Needs the memory
    of one more model.
    """
    drawn = copy.deepcopy(model)
    # numpy's numbers are the same on every device, and none of those that the model began with.
    rng = generator(seed, "re-initialised model")
    for parameter in drawn.parameters():
        std, mean = torch.std_mean(parameter.float(), correction=0)
        noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape), np.float32))
        parameter.copy_(noise.to(parameter.device) * std + mean)
    return drawn
