"""What a run works on, and the work that it is, before anything is fetched.

Sizes are those of the stored corpus, the cells' file and the model's configuration, as far as they
are here, else of data/manifest.yml. Work is known by a file that its chapter leaves, so what is
fresh costs nothing.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from scfm_circuits import InputError
from scfm_circuits.book.downloads import (
    check_shared_genes,
    described,
    dictionaries_are_here,
)
from scfm_circuits.cells.corpus import (
    Corpus,
    check_case,
    rare_types,
    split_cells,
    stored_corpus,
)
from scfm_circuits.cells.dictionaries import read_gene_tokens
from scfm_circuits.circuits import knock_out, known_response
from scfm_circuits.common import manifest
from scfm_circuits.common.encodings import GENE_TOKENS, OWN_DICTIONARY
from scfm_circuits.common.profile import Profile, cells_path
from scfm_circuits.features.counting import fixed_bytes
from scfm_circuits.models.architectures import check_supported
from scfm_circuits.models.loading import (
    check_checkpoint,
    check_dictionary,
    check_layers,
    load_config,
)
from scfm_circuits.models.small_models import small_config
from scfm_circuits.transcoders.training.cost import training_operations
from scfm_circuits.transcoders.variants import settings, variant_profile

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PIECES = {"train": 2.0, "genes": 1.0, "loaded": 3.3}
"""Tokens of a gene's name until a corpus is there; 3.3 is Pythia's in the paper's Figure 4."""
COUNT_SHARE, MOST_ACTIVE = 0.03, 100
"""Share of all (feature, pair of token and gene) that occur, and features active on a token: both
guesses, on the large side."""

# Work, by a file that its chapter leaves.
CELLS, TRAINED, VALIDATED = "corpus/corpus.json", "transcoders/config.yaml", "tables/table1.csv"
COUNTED, SCORED, CONTROLS = "features.npz", "tables/feature_scores.csv", "tables/table4.csv"
KINDS, KNOCKED_OUT = "tables/variants.csv", "tables/knock_out.csv"
PERTURBED = "tables/perturbation.csv"
TRACED, INTERVENED = "tables/circuit_nodes.csv", "tables/circuit_faithfulness.csv"


class Sizes(NamedTuple):
    """What a run works on: cells, those in the file, its genes; tokens of all cells, of those that
    are trained on, of the longest; whether tokens were counted (else estimated); the model's
    layers, residual width, heads, rows of the embedding and weights; bytes of the transcoders of
    all layers in float32, and of one set of feature statistics; what to say of the cells."""

    cells: int
    cells_in_file: int
    genes: int
    tokens: int
    training_tokens: int
    padded: int
    measured: bool
    layers: int
    width: int
    heads: int
    vocabulary: int
    parameters: int
    one_set: int
    counts: int
    notes: Sequence[str] = ()


def run_sizes(profile: Profile) -> Sizes:
    """The sizes of a profile's run; InputError as `run_cost` says for cells and models."""
    import transformers

    corpus = stored_corpus(profile)
    if corpus is not None:
        lengths = corpus.lengths
        cells, in_file, genes = len(corpus), len(corpus), len(corpus.symbols)
        tokens, padded = int(lengths.sum()), int(lengths.max())
        trained_on, told = int(lengths[~corpus.held_out].sum()), rare_types(corpus.labels, profile)
        check_shared_genes(profile, corpus.symbols.tolist())
    else:
        in_file, genes, kept, most, told = _cells(profile)
        cells, length = min(in_file, profile.max_cells or in_file), _length(profile, kept)
        tokens, padded = round(cells * length), round(
            _length(profile, most) * (1.3 if profile.in_words else 1))
        trained_on = tokens - round(max(1, round(cells * profile.validation_share)) * length)
    config = model_config(profile, corpus, padded, genes)
    kind = getattr(transformers, check_supported(config.model_type, "").auto)
    with torch.device("meta"):  # the number of weights, without making them
        model = kind.from_config(config)
    if profile.model != "train":
        check_checkpoint(profile.model, profile.model_subfolder, model)
    layers, width = int(config.num_hidden_layers), int(config.hidden_size)
    features = profile.expansion * width
    occurring = min(round(COUNT_SHARE * layers * features * _pieces(profile) * genes),
                    layers * tokens * MOST_ACTIVE)
    return Sizes(cells, in_file, genes, tokens, trained_on, padded, corpus is not None,
                 layers, width, int(config.num_attention_heads), int(config.vocab_size),
                 sum(one.numel() for one in model.parameters()),
                 4 * layers * (2 * features * width + features + 2 * width),
                 fixed_bytes(layers * features, profile.contexts_per_feature) + 8 * occurring, told)


def model_config(profile: Profile, corpus: Corpus | None, length: int, genes: int = 0
                 ) -> "PreTrainedConfig":
    """The configuration of the profile's model: from here, the manifest, or else the network.

    length: of the longest prompt, in tokens; genes: of the cells, each a token perhaps.
    """
    if profile.model == "train":
        rows = len(corpus.tokenizer) if corpus is not None else _vocabulary(profile, genes)
        return small_config(profile, rows, length)
    listed = manifest.entry("models", manifest.model_name(profile.model, profile.model_subfolder))
    try:
        config = load_config(profile.model, profile.model_revision,
                             subfolder=profile.model_subfolder, local_files_only=listed is not None)
    except InputError:
        if listed is None:
            raise
        from transformers import AutoConfig

        config = AutoConfig.for_model(**{**listed.get("expected", {}), **listed["config"]})
    check_layers(profile, int(config.num_hidden_layers))
    if not profile.in_words and dictionaries_are_here(profile):
        known = read_gene_tokens(profile)
        check_dictionary(config, len(known.genes) + len(known.special))
    return config


class _Cells(NamedTuple):
    """Cells, their genes, how many of them a cell's sentence has on average (estimated) and at
    most, and what to say of the cells."""

    cells: int
    genes: int
    kept: float
    most: int
    told: list[str]


def _cells(profile: Profile) -> _Cells:
    """The profile's cells: looked at, or, if they are not here, as the manifest has them."""
    listed, path = manifest.entry("cells", profile.cells), cells_path(profile)
    # One of another size will be set aside and fetched again.
    if listed is not None and path is not None and not (
            path.is_file() and path.stat().st_size == listed["bytes"]):
        told = [] if profile.in_words else [
            "How many genes a cell expresses is known once the cells are here; until then each "
            f"counts as {profile.genes_per_cell:,} genes (`genes_per_cell`), the most it can have."]
        return _Cells(int(listed["cells"]), int(listed["genes"]), profile.genes_per_cell,
                      profile.genes_per_cell, told)
    found = described(profile)
    held_out = split_cells(len(found.labels), profile.validation_share, profile.seed)
    check_case(found.labels, held_out, profile)
    check_shared_genes(profile, found.symbols)
    genes = len(found.symbols)
    if profile.token_dictionary == OWN_DICTIONARY:
        genes = min(genes, profile.vocabulary_size - _special(profile))
    most = min(profile.genes_per_cell, genes, found.most)
    if most < knock_out.LEAST:
        raise InputError(f"The cells of {profile.cells} have {most} genes at most, and with fewer "
                         f"than {knock_out.LEAST} none can be taken out; give cells with more.")
    kept = float(found.expressed.clip(max=most).mean()) if len(found.expressed) else most
    return _Cells(found.n_cells, genes, kept, most,
                  found.decisions + rare_types(found.labels, profile))


def _special(profile: Profile) -> int:
    """Special tokens of the dictionary that the profile's encoding has."""
    return len(GENE_TOKENS[profile.encoding].special)


def _beside(profile: Profile) -> int:
    """Tokens of a cell that are no gene's, where genes are tokens."""
    way = GENE_TOKENS[profile.encoding]
    return len(way.before + way.after)


def _pieces(profile: Profile) -> float:
    """Tokens of a gene's name, until a corpus is there."""
    return PIECES.get(profile.tokenizer, PIECES["loaded"]) if profile.in_words else 1.0


def _length(profile: Profile, genes: float) -> float:
    """Tokens of a cell with so many genes, until a corpus is there."""
    if not profile.in_words:
        return genes + _beside(profile)
    # And the question, an answer.
    return genes * _pieces(profile) + len(profile.prompt + profile.response) / 4 + 4


def _vocabulary(profile: Profile, genes: int) -> int:
    """Rows of the embedding of a model that is trained, until a corpus is there."""
    if profile.in_words:
        return profile.vocabulary_size + genes * (profile.tokenizer == "genes")
    if profile.token_dictionary != OWN_DICTIONARY and dictionaries_are_here(profile):
        genes = len(read_gene_tokens(profile).genes)
    return genes + _special(profile)


class Work(NamedTuple):
    """What takes long or leaves much: operations by kind (see `REACHED`), what it is called in
    results/, and its bytes there."""

    operations: Mapping[str, float]
    folder: str = ""
    bytes: int = 0


def works(profile: Profile, sizes: Sizes) -> dict[str, Work]:
    """Work by a file that its chapter leaves."""
    width, one_set, counts = profile.expansion * sizes.width, sizes.one_set, sizes.counts
    length = sizes.tokens / sizes.cells
    # Operations of a token: two a weight, and attention's products with all tokens of its cell.
    passed = 2.0 * sizes.parameters + 4.0 * sizes.layers * sizes.width * length
    encoded = 2.0 * sizes.layers * sizes.width * width
    counted = sizes.tokens * (passed + encoded)
    # The model whole three times, and each layer alone twice, of which half a pass is left.
    validated = (sizes.tokens - sizes.training_tokens) * (
        (3 + sizes.layers) * passed + 4 * encoded)

    def trained(run: Profile) -> float:
        kept = sizes.training_tokens <= run.buffer_tokens  # then the model runs once
        return training_operations(sizes.layers, sizes.width, width, run.training_tokens,
                                   round(passed / 2 / sizes.layers),
                                   sizes.training_tokens if kept else None)

    own, control, kinds = profile.model == "train", profile.reinitialised_control, settings(profile)
    seen = profile.model_steps * profile.model_batch_cells * sizes.tokens / sizes.cells
    share = min(1.0, (profile.variant_cells or sizes.cells) / sizes.cells)
    genes = profile.genes_per_cell if profile.in_words else length - _beside(profile)

    def taken_out(cells: int, genes: float) -> float:
        """Some cells, whole and without so many genes, one by one."""
        return min(cells, sizes.cells) * (1 + genes) * length * passed

    return {
        CELLS: Work({"model": own * 3 * passed * seen}, "language_model",
                    own * 4 * sizes.parameters),
        TRAINED: Work({"train": trained(profile)}, "transcoders", one_set),
        VALIDATED: Work({"validate": validated}),
        COUNTED: Work({"count": counted}, "features.npz", counts),
        SCORED: Work({"count": counted}, "untrained", counts),
        CONTROLS: Work({"train": control * trained(profile), "count": control * counted},
                       "reinitialised", control * (one_set + counts)),
        KNOCKED_OUT: Work({"count": taken_out(
            knock_out.CELLS, min(genes, knock_out.MOST_GENES))}),
        # Every gene twice: with positions held, and moved up.
        PERTURBED: Work({"count": bool(profile.known_response) * taken_out(
            known_response.CELLS, 2 * genes)}, "perturbation"),
        KINDS: Work({"train": len(kinds) * trained(variant_profile(profile, {})),
                     "count": len(kinds) * share * counted}, "variants",
                    len(kinds) * (one_set + counts)),
    }
