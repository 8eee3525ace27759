"""How large a run will be, before anything is fetched or made: cells, tokens, the model's shape.

What is there already is looked at (the stored corpus, the cells' file, the model's configuration);
what is still elsewhere is taken from data/manifest.yml. Only a model that is neither here nor in
the manifest is asked for on the network, for its configuration alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scfm_circuits import InputError
from scfm_circuits.cells.corpus import Corpus, check_case, split_cells, stored_corpus
from scfm_circuits.cells.tokens import load_tokenizer
from scfm_circuits.common import manifest
from scfm_circuits.common.profile import ROOT, Profile, cells_path
from scfm_circuits.models.loading import check_layers, load_config
from scfm_circuits.models.small_models import small_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TOKENS_PER_GENE = {"train": 2.0, "loaded": 3.3}
"""Pieces of a gene's name where no tokenizer is at hand: a trained one, fitted to symbols, makes
fewer; 3.3 is what Pythia's makes of the paper's Figure 4."""
_SYMBOLS = 2000


class RunSizes(NamedTuple):
    """What a run works on.

    cells: those used, of `cells_in_file` as far as these were looked at; held_out: cells among
    them. genes: columns of the file.
    length: tokens of a cell's prompt with its answer, on average; padded: of the longest.
    measured: whether tokens were counted (else estimated). config: the model's configuration.
    parameters: the model's weights, all of them.
    """

    cells: int
    cells_in_file: int
    held_out: int
    genes: int
    length: float
    padded: int
    measured: bool
    config: "PreTrainedConfig"
    parameters: int

    @property
    def tokens(self) -> int:
        """Tokens of all cells."""
        return round(self.cells * self.length)

    @property
    def training_tokens(self) -> int:
        """Tokens of the cells that are trained on."""
        return round((self.cells - self.held_out) * self.length)

    @property
    def held_out_tokens(self) -> int:
        """Tokens of the held-out cells."""
        return self.tokens - self.training_tokens

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return int(self.config.num_hidden_layers)

    @property
    def width(self) -> int:
        """Its residual width, d_model."""
        return int(self.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Rows of its embedding."""
        return int(self.config.vocab_size)


def run_sizes(profile: Profile) -> RunSizes:
    """The sizes of a profile's run.

    Raises InputError if the cells or the model's configuration cannot be had, if the model has not
    the layers that the profile asks for, or if the case study would have no cell.
    """
    corpus = stored_corpus(profile)
    if corpus is not None:
        lengths = corpus.lengths
        config = model_config(profile, corpus, int(lengths.max()))
        return RunSizes(len(corpus), len(corpus), int(corpus.held_out.sum()), len(corpus.symbols),
                        float(lengths.mean()), int(lengths.max()), True, config,
                        _parameters(config))
    cells_in_file, genes, symbols = _cells(profile)
    cells = min(cells_in_file, profile.max_cells or cells_in_file)
    length = _length(profile, symbols)
    padded, held_out = round(1.3 * length), max(1, round(cells * profile.validation_share))
    config = model_config(profile, corpus, padded)
    return RunSizes(cells, cells_in_file, held_out, genes, length, padded, False, config,
                    _parameters(config))


def model_config(profile: Profile, corpus: Corpus | None, length: int) -> "PreTrainedConfig":
    """The configuration of the profile's model: from here, the manifest, or the network.

    corpus: decides the rows of the model that is trained, if it is there. Raises InputError as
    `models.loading.load_config` and `check_layers` do.
    """
    if profile.model == "train":
        rows = len(corpus.tokenizer) if corpus is not None else profile.vocabulary_size
        return small_config(profile, rows, length)
    try:
        config = load_config(profile.model, profile.model_revision, local_files_only=True)
    except InputError:
        listed = manifest.entry("models", profile.model)
        if listed is None:
            config = load_config(profile.model, profile.model_revision)
        else:
            from transformers import AutoConfig

            config = AutoConfig.for_model(**listed["config"])
    check_layers(profile, int(config.num_hidden_layers))
    return config


def _parameters(config: "PreTrainedConfig") -> int:
    """Weights of a model of that configuration, without making them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _cells(profile: Profile) -> tuple[int, int, Sequence[str]]:
    """(cells, genes, some symbols) of the profile's cells; symbols of a file that is there.

    Raises InputError for cells that do not fit, and if no held-out one has the profile's case type.
    """
    listed, path = manifest.entry("cells", profile.cells), cells_path(profile, ROOT)
    # One of another size will be set aside and fetched again.
    if listed is not None and path is not None and not (
            path.is_file() and path.stat().st_size == listed["bytes"]):
        return int(listed["cells"]), int(listed["genes"]), ()
    from scfm_circuits.cells.reading import describe

    found = describe(profile)
    held_out = split_cells(len(found.labels), profile.validation_share, profile.seed)
    check_case(found.labels, held_out, profile)
    some = np.random.default_rng(0).permutation(len(found.symbols))[:_SYMBOLS]
    return found.n_cells, len(found.symbols), [found.symbols[i] for i in some]


def _length(profile: Profile, symbols: Sequence[str]) -> float:
    """Tokens of a cell, estimated: `genes_per_cell` names, the question, an answer, the end."""
    words = len(profile.prompt.replace("{genes}", "") + profile.response) / 4 + 4
    each = TOKENS_PER_GENE["train" if profile.tokenizer == "train" else "loaded"]
    if symbols and Path(profile.tokenizer).expanduser().is_dir():
        tokenizer = load_tokenizer(profile.tokenizer)
        ids = tokenizer([f" {symbol}" for symbol in symbols], add_special_tokens=False)["input_ids"]
        each = sum(map(len, ids)) / len(symbols)
    return profile.genes_per_cell * each + words
