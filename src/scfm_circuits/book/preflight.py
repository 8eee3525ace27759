"""What a run will cost, said before anything is fetched: downloads, disk, memory and time.

Sizes are those of the stored corpus, the cells' file and the model's configuration, as far as they
are here, else of data/manifest.yml. Work is known by a file that its chapter leaves, so what is
fresh costs nothing. What does not fit is refused with the profile field to lower. All numbers are
estimates; the time may be off by a factor of two.
"""

import os
import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from scfm_circuits import InputError
from scfm_circuits.book.downloads import (
    Download,
    check_shared_genes,
    missing,
    missing_libraries,
    notes,
)
from scfm_circuits.cells.corpus import (
    Corpus,
    check_case,
    rare_types,
    split_cells,
    stored_corpus,
)
from scfm_circuits.circuits.attribution import NO_CIRCUITS
from scfm_circuits.circuits.case_study import read_sentence
from scfm_circuits.common import manifest
from scfm_circuits.common.files import time_in_words
from scfm_circuits.common.profile import ROOT, Profile, cells_path
from scfm_circuits.enrichment.gene_sets import downloads_are_off
from scfm_circuits.features.counting import CHUNK_BYTES, fixed_bytes
from scfm_circuits.features.pair_counts import BUFFER_KEYS
from scfm_circuits.models.loading import check_layers, load_config, model_dtype
from scfm_circuits.models.mlp_sites import best_device
from scfm_circuits.models.small_models import small_config
from scfm_circuits.transcoders.training.cost import training_operations
from scfm_circuits.transcoders.training.settings import memory_needed, precision_of
from scfm_circuits.transcoders.variants import settings, variant_profile

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ANYWAY = "SCFM_ANYWAY"
"""Environment variable that turns refusals into warnings."""
GIB, CPU = 2**30, torch.device("cpu")
OTHER, KEPT = 2 * GIB, 0.2
"""A chapter's memory beside the parts (libraries, tables, figures), and the share of it all that is
freed and not given back at once."""
PIECES = {"train": 2.0, "genes": 1.0, "loaded": 3.3}
"""Tokens of a gene's name until a corpus is there; 3.3 is Pythia's in the paper's Figure 4."""
COUNT_SHARE, MOST_ACTIVE = 0.03, 100
"""Share of all (feature, pair of token and gene) that occur, and features active on a token: both
guesses, on the large side."""
STARTED, NULL_SECONDS, LIVE = 12.0, 0.02, 800
"""Read off runs of `demo` on two cores: seconds of a chapter beside its work and of a feature's
thousand null lists, and live features of a layer."""

# Work, by a file that its chapter leaves.
CELLS, TRAINED, VALIDATED = "corpus/corpus.json", "transcoders/config.yaml", "tables/table1.csv"
COUNTED, SCORED, CONTROLS = "features.npz", "tables/feature_scores.csv", "tables/table4.csv"
KINDS = "tables/variants.csv"

FIELDS = {
    "forward_cells": ("logits", "layers' inputs and outputs", "attention"),
    "buffer_tokens": ("buffer",),
    "batch_tokens": ("activations of one batch",),
    "expansion": ("parameters and Adam", "gradients", "transcoders", "feature counts",
                  "activations of one batch"),
}
"""Profile fields and the parts of memory that grow with them; first what changes results least."""


class Sizes(NamedTuple):
    """What a run works on: cells, those in the file, its genes; tokens of all cells, of those that
    are trained on, of the longest; whether tokens were counted (else estimated); the model's
    layers, residual width, heads, rows of the embedding and weights; bytes of the transcoders of
    all layers in float32, and of one set of feature statistics;
    and what to say of rare types."""

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
    rare_types: str | None = None


class Stage(NamedTuple):
    """A moment at which much memory is held. leaves: by which work; parts: in bytes; device: whose
    memory."""

    name: str
    leaves: tuple[str, ...]
    parts: Mapping[str, int]
    device: torch.device

    @property
    def bytes(self) -> int:
        """All parts together, and what is freed and kept."""
        return round((1 + KEPT) * sum(self.parts.values()))


class Cost(NamedTuple):
    """Lines for the terminal, why the run is refused (or nothing), and its seconds (or 0)."""

    text: str
    refusal: str
    seconds: float


def run_cost(profile: Profile, wanted: Collection[str], chapters: int) -> Cost:
    """What the stale chapters cost. wanted: the files that they leave (`produces` in the headers).

    Raises InputError for what will fail in any case: cells, a model, a folder of gene sets or a
    sentence that cannot be had, no cell for the case study, layers that the model lacks, and
    autoencoders.
    """
    if profile.site != "transcoder":
        raise InputError(NO_CIRCUITS)
    if profile.case_sentence is not None:
        read_sentence(profile.case_sentence)
    sizes, device, libraries = run_sizes(profile), best_device(), missing_libraries(profile)
    found = missing(profile, sizes.parameters)
    disk = disk_needed(profile, sizes, found, wanted)
    stages = [one for one in memory_stages(profile, sizes, device) if {*one.leaves} & {*wanted}]
    problems = [*_disk_problems(disk), *memory_problems(profile, sizes, stages)]
    refused = bool(problems) and not os.environ.get(ANYWAY)
    of = f" of {sizes.cells_in_file:,}" if sizes.cells != sizes.cells_in_file else ""
    lines = [f"{profile.name}: {sizes.cells:,}{of} cells, {'' if sizes.measured else 'about '}"
             f"{sizes.tokens / sizes.cells:.0f} tokens each, {sizes.tokens / 1e6:,.2f} M tokens; "
             f"{sizes.layers} layers of width {sizes.width:,}, "
             f"{profile.expansion * sizes.width:,} features each"]
    lines += [f"  note      {note}" for note in (*notes(profile), sizes.rare_types) if note]
    lines += [f"  download  {'' if one.exact else 'at most '}{_size(one.bytes)}: {one.what}"
              for one in found]
    if libraries and downloads_are_off():
        lines.append(f"  gene sets {', '.join(libraries)} are not here and downloads are off; a "
                     "small bundled library will stand in")
    lines += [f"  disk      up to {_size(size)} into {folder} "
              f"({_size(shutil.disk_usage(_existing(folder)).free)} free)"
              for folder, size in disk.items()]
    for place in dict.fromkeys(one.device for one in stages):  # of each, the largest
        largest = max((one for one in stages if one.device == place), key=lambda one: one.bytes)
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in
                          sorted(largest.parts.items(), key=lambda item: -item[1])[:4])
        name = f"{os.cpu_count()} CPU cores" if place == CPU else torch.cuda.get_device_name(place)
        lines.append(f"  memory    about {largest.bytes / GIB:.1f} GiB ({largest.name}: {parts}); "
                     f"{memory_available(place) / GIB:.1f} GiB free on {name}")
    if refused:
        hint = f"(To try all the same, set {ANYWAY}=1.)"
        return Cost("\n".join(lines), "\n".join([*problems, hint]), 0.0)
    seconds = run_seconds(profile, sizes, wanted, chapters, matrix_rate(profile, sizes, device))
    lines.append(f"  time      about {time_in_words(seconds)} for {chapters} chapter"
                 f"{'s' if chapters != 1 else ''}, if nothing of them is there yet")
    return Cost("\n".join(lines), "", seconds)


def _size(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{max(n, 1e5) / 1e6:.1f} MB"


def run_sizes(profile: Profile) -> Sizes:
    """The sizes of a profile's run; InputError as `run_cost` says for cells and models."""
    from transformers import AutoModelForCausalLM

    corpus = stored_corpus(profile)
    if corpus is not None:
        lengths = corpus.lengths
        cells, in_file, genes = len(corpus), len(corpus), len(corpus.symbols)
        tokens, padded = int(lengths.sum()), int(lengths.max())
        trained_on, rare = int(lengths[~corpus.held_out].sum()), rare_types(corpus.labels)
        check_shared_genes(profile, corpus.symbols.tolist())
    else:
        in_file, genes, length, rare = _cells(profile)
        cells = min(in_file, profile.max_cells or in_file)
        tokens, padded = round(cells * length), round(1.3 * length)
        trained_on = tokens - round(max(1, round(cells * profile.validation_share)) * length)
    config = model_config(profile, corpus, padded, genes)
    with torch.device("meta"):  # the number of weights, without making them
        weights = AutoModelForCausalLM.from_config(config).parameters()
    layers, width = int(config.num_hidden_layers), int(config.hidden_size)
    features = profile.expansion * width
    occurring = min(round(COUNT_SHARE * layers * features * PIECES["loaded"] * genes),
                    layers * tokens * MOST_ACTIVE)
    return Sizes(cells, in_file, genes, tokens, trained_on, padded, corpus is not None,
                 layers, width, int(config.num_attention_heads), int(config.vocab_size),
                 sum(one.numel() for one in weights),
                 4 * layers * (2 * features * width + features + 2 * width),
                 fixed_bytes(layers * features, profile.contexts_per_feature) + 8 * occurring,
                 rare if profile.model == "train" else None)


def model_config(profile: Profile, corpus: Corpus | None, length: int, genes: int = 0
                 ) -> "PreTrainedConfig":
    """The configuration of the profile's model: from here, the manifest, or else the network.

    length: of the longest prompt, in tokens; genes: of the cells, each a token perhaps.
    """
    if profile.model == "train":
        own = genes if profile.tokenizer == "genes" else 0
        rows = len(corpus.tokenizer) if corpus is not None else profile.vocabulary_size + own
        return small_config(profile, rows, length)
    listed = manifest.entry("models", profile.model)
    try:
        config = load_config(profile.model, profile.model_revision,
                             local_files_only=listed is not None)
    except InputError:
        if listed is None:
            raise
        from transformers import AutoConfig

        config = AutoConfig.for_model(**listed["config"])
    check_layers(profile, int(config.num_hidden_layers))
    return config


def _cells(profile: Profile) -> tuple[int, int, float, str | None]:
    """(cells, genes, tokens of a cell, `rare_types`) of the profile's cells, the third estimated,
    the last None also for cells that are not here."""
    length = (profile.genes_per_cell * PIECES.get(profile.tokenizer, PIECES["loaded"])
              + len(profile.prompt + profile.response) / 4 + 4)  # and the question, an answer
    listed, path = manifest.entry("cells", profile.cells), cells_path(profile, ROOT)
    # One of another size will be set aside and fetched again.
    if listed is not None and path is not None and not (
            path.is_file() and path.stat().st_size == listed["bytes"]):
        return int(listed["cells"]), int(listed["genes"]), length, None
    from scfm_circuits.cells.reading import describe_cells

    found = describe_cells(profile)
    held_out = split_cells(len(found.labels), profile.validation_share, profile.seed)
    check_case(found.labels, held_out, profile)
    check_shared_genes(profile, found.symbols)
    return found.n_cells, len(found.symbols), length, rare_types(found.labels)


def works(profile: Profile, sizes: Sizes) -> dict[str, tuple[float, str, int]]:
    """What takes long and leaves much, by a file that its chapter leaves: operations, what it is
    called in results/, and its bytes there."""
    width = profile.expansion * sizes.width
    passed = 2.0 * sizes.parameters  # operations of a token
    counted = sizes.tokens * (passed + 2 * sizes.layers * sizes.width * width)
    one_set, counts = sizes.one_set, sizes.counts

    def trained(run: Profile) -> float:
        kept = sizes.training_tokens <= run.buffer_tokens  # then the model runs once
        return training_operations(sizes.layers, sizes.width, width, run.training_tokens,
                                   sizes.parameters // sizes.layers,
                                   sizes.training_tokens if kept else None)

    own, control, kinds = profile.model == "train", profile.reinitialised_control, settings(profile)
    seen = profile.model_steps * profile.model_batch_cells * sizes.tokens / sizes.cells
    each = trained(variant_profile(profile, {})) + counted
    return {
        CELLS: (own * 3 * passed * seen, "language_model", own * 4 * sizes.parameters),
        TRAINED: (trained(profile), "transcoders", one_set),
        COUNTED: (counted, "features.npz", counts),
        SCORED: (counted, "untrained", counts),
        CONTROLS: (control * (trained(profile) + counted), "reinitialised",
                   control * (one_set + counts)),
        KINDS: (len(kinds) * each, "variants", len(kinds) * (one_set + counts)),
    }


def disk_needed(profile: Profile, sizes: Sizes, found: Iterable[Download],
                wanted: Collection[str]) -> dict[Path, int]:
    """Bytes that will be written, by folder, at the moment when most is there.

    In results/: what the stale chapters leave beyond what is there already, and one training
    checkpoint with the one that takes its place.
    """
    needed = 200 * 2**20 + 15 * sizes.cells * sizes.padded * (CELLS in wanted)
    if {TRAINED, CONTROLS, KINDS} & {*wanted}:
        needed += 2 * 3 * sizes.one_set
    for file, (_, name, size) in works(profile, sizes).items():
        top = profile.results / name
        there = sum(one.stat().st_size for one in (top, *top.rglob("*")) if one.is_file())
        needed += max(0, size - there) * (file in wanted)
    disk = {profile.results: needed}
    for one in found:
        disk[one.folder] = disk.get(one.folder, 0) + one.bytes
    return disk


def _disk_problems(disk: Mapping[Path, int]) -> list[str]:
    """One sentence for each disk that has not the room; folders of one disk are added up."""
    together: dict[int, list[Path]] = {}
    for folder in disk:
        together.setdefault(os.stat(_existing(folder)).st_dev, []).append(folder)
    problems = []
    for folders in together.values():
        needed = sum(disk[folder] for folder in folders)
        free = shutil.disk_usage(_existing(folders[0])).free
        if needed > free:
            problems.append(
                f"The disk of {' and '.join(map(str, folders))} has {free / 1e9:.1f} GB free, and "
                f"the run writes up to {needed / 1e9:.1f} GB there; make room, name other folders "
                "in SCFM_RESULTS, SCFM_DATA or HF_HOME, or lower `expansion` or `max_cells` in the "
                "profile.")
    return problems


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists; InputError if nothing can be written."""
    try:
        while not folder.exists():
            folder = folder.parent
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    raise InputError(f"Nothing can be written into {folder}; name other folders in SCFM_RESULTS, "
                     "SCFM_DATA, SCFM_CACHE or HF_HOME.")


def memory_stages(profile: Profile, sizes: Sizes, device: torch.device) -> list[Stage]:
    """The stages of a run that hold most."""
    on_gpu, own, other = device.type == "cuda", model_dtype(profile), precision_of(profile, device)
    cells = min(profile.forward_cells, sizes.cells)
    batch = round(cells * sizes.tokens / sizes.cells)
    passing = {
        "model": own.itemsize * sizes.parameters, "other": OTHER, "transcoders": sizes.one_set,
        # As a list by layers and put together.
        "layers' inputs and outputs": 2 * own.itemsize * 2 * sizes.layers * batch * sizes.width,
        # Scores, their softmax and its sum with the mask, of one layer.
        "attention": 3 * 4 * cells * sizes.heads * sizes.padded**2}
    training = passing | {"attention": 0} | memory_needed(  # which is fused here
        profile, sizes.training_tokens, sizes.layers, sizes.width,
        sizes.layers if on_gpu else 1, other.itemsize)
    if other != own:
        training["model in the type of training"] = other.itemsize * sizes.parameters
    counts = {"feature counts": (4 if profile.reinitialised_control else 3) * sizes.counts,
              "keys to be sorted": 4 * 8 * BUFFER_KEYS}
    counting = "counting features", (COUNTED, SCORED, CONTROLS, KINDS)
    on_device = {"activations and keys": 2 * CHUNK_BYTES + 4 * 8 * 8 * BUFFER_KEYS}
    stages = [
        Stage("training", (TRAINED, KINDS), training, device),
        # Log-probabilities of two configurations, logits, and one more while they are compared.
        Stage("validation", (VALIDATED,),
              passing | {"logits": 4 * 4 * batch * sizes.vocabulary}, device),
        Stage(*counting, passing | (on_device if on_gpu else counts), device)]
    if on_gpu:
        stages.append(Stage(*counting, {"other": OTHER, **counts}, CPU))
    if profile.reinitialised_control:
        stages.append(Stage("the control's training", (CONTROLS,), training | {
            "re-initialised model": passing["model"], "transcoders": 2 * sizes.one_set} | (
            {} if on_gpu else {"feature counts": 2 * sizes.counts}), device))
    return stages


def memory_available(device: torch.device) -> int:
    """Bytes that are free on the device: of the GPU, or of the machine and this container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return min([int(psutil.virtual_memory().available), *group_limits()])


def group_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
                 ) -> list[int]:
    """The limits in bytes of this process's control groups (containers, batch jobs)."""
    found = []
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, kinds, path = line.split(":", 2)
        # Version 2 has one tree, version 1 one for each kind.
        base, name = (root / "memory", "limit_in_bytes") if kinds else (root, "max")
        place = base / path.strip("/")
        for folder in (place, *place.parents):
            limit = folder / f"memory.{name}"
            if kinds in ("", "memory") and folder.is_relative_to(base) and limit.is_file():
                found += [int(limit.read_text())] if limit.read_text().strip().isdigit() else []
    return found


def memory_problems(profile: Profile, sizes: Sizes, stages: Sequence[Stage]) -> list[str]:
    """A sentence for each field to lower, with the value at which all stages that it can help fit;
    and one for what no field alone can help."""
    problems: dict[str, tuple[int, str]] = {}
    for stage in stages:
        free = memory_available(stage.device)
        if stage.bytes <= free:
            continue
        field, value = _advice(profile, sizes, stage, free)
        where = "this machine" if stage.device == CPU else "the GPU"
        text = (f"{stage.name[0].upper()}{stage.name[1:]} needs {stage.bytes / GIB:.1f} GiB of "
                f"memory, and {where} has {free / GIB:.1f} GiB free; ") + (
            f"lower `{field}` in the profile (it is {getattr(profile, field):,}; {value:,} would "
            "fit)." if field else "no profile field alone is enough: lower `expansion` and "
            "`buffer_tokens`, set `model_precision: bfloat16`"
            + (", or do without (`reinitialised_control: false`)."
               if stage.leaves == (CONTROLS,) else ", or take a smaller model."))
        problems[field] = min(problems.get(field, (value, text)), (value, text))
    return [text for _, text in problems.values()]


def _advice(profile: Profile, sizes: Sizes, stage: Stage, free: int) -> tuple[str, int]:
    """The first field that makes a stage fit, and its value; an empty name if there is none."""
    most = {"buffer_tokens": sizes.training_tokens, "forward_cells": sizes.cells}
    least = {"buffer_tokens": profile.batch_tokens}
    for field, parts in FIELDS.items():
        held = (1 + KEPT) * sum(stage.parts.get(part, 0) for part in parts)
        used = min(getattr(profile, field), most.get(field, 2**63))
        # A little less, as parts are not wholly proportional.
        value = int(0.99 * used * (1 - (stage.bytes - free) / held)) if held else 0
        if value >= least.get(field, 1):
            return field, value
    return "", 0


def matrix_rate(profile: Profile, sizes: Sizes, device: torch.device) -> float:
    """Operations per second of products of a transcoder's shape, measured in a second."""
    kind: dict[str, Any] = {"device": device, "dtype": precision_of(profile, device)}
    x = torch.ones(profile.batch_tokens, min(sizes.width, 1024), **kind)
    w = torch.ones(x.shape[1], min(profile.expansion * sizes.width, 8192), **kind)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < 1.0 or best == float("inf"):
        start = time.perf_counter()
        (x @ w)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * x.shape[0] * w.numel() / best


def run_seconds(profile: Profile, sizes: Sizes, wanted: Collection[str], chapters: int,
                rate: float) -> float:
    """Seconds that the stale chapters take from nothing, at so many operations per second.

    What is not products of matrices is about made up for by features that are zero and not
    multiplied.
    """
    live = sizes.layers * min(profile.expansion * sizes.width, LIVE)
    nulls = live * NULL_SECONDS * profile.null_draws / 1000 * 2 / (os.cpu_count() or 2)
    total = sum(work[0] for file, work in works(profile, sizes).items() if file in wanted)
    return chapters * STARTED + nulls * (CONTROLS in wanted) + total / rate
