"""Cell sentences: genes in order of expression, as text, as tokens, and back to genes.

The encoding is Cell2Sentence's (Levine et al. 2024): the genes a cell expresses, most expressed
first, ties in random order, upper case, joined by spaces. The prompt is the paper's Figure 4.
Every token knows the gene it is part of and its place in it; words of the prompt and of the
answer belong to no gene.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scfm_circuits import InputError
from scfm_circuits.files import atomic_folder, read_json, write_json
from scfm_circuits.gene_pieces import Made, Prompts, encode_all, in_memory
from scfm_circuits.profile import ROOT, Profile, cells_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from scfm_circuits.cells import RankedCells

END_OF_TEXT = "<|endoftext|>"
_FIELDS = (
    "seed", "cells", "matrix", "symbol_column", "duplicate_symbols", "label_column", "max_cells",
    "sampling", "validation_share", "genes_per_cell", "prompt", "response", "tokenizer",
    "vocabulary_size", "model_revision",
)
_MODULES = ("cells", "h5ad", "planted_cells", "ranking", "gene_pieces", "sentences")
_STAMP, _TOKENIZER = "corpus.json", "tokenizer.json"
_CELLS = 512
"""Cells whose sentences are put together at once."""


class Encoded(NamedTuple):
    """One text as tokens: `tokens`, `gene` (id or -1) and `place` in the gene, each (length,)."""

    tokens: np.ndarray
    gene: np.ndarray
    place: np.ndarray


@dataclass(frozen=True)
class Corpus:
    """All cells as tokens, right-padded.

    tokens: (n_cells, length) int64 token ids; mask: the same shape, False on padding.
    gene: (n_cells, length) int32 index into `symbols`, -1 where a token belongs to no gene.
    place: (n_cells, length) int16 position of the token within its gene, -1 outside genes.
    answer_start: (n_cells,) index of the answer's first token; the token before it asks.
    answer_end: (n_cells,) index of the answer's last token, the full stop.
    labels, cell_ids: (n_cells,) text; held_out: (n_cells,) True for validation cells.
    symbols: the corpus's genes; decisions: sentences for the page.
    """

    tokens: np.ndarray
    mask: np.ndarray
    gene: np.ndarray
    place: np.ndarray
    answer_start: np.ndarray
    answer_end: np.ndarray
    labels: np.ndarray
    cell_ids: np.ndarray
    held_out: np.ndarray
    symbols: np.ndarray
    decisions: np.ndarray
    tokenizer: "PreTrainedTokenizerFast"

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """(n_cells,) tokens of each cell without padding."""
        return self.mask.sum(axis=1)

    @property
    def occurring(self) -> np.ndarray:
        """Ids of the genes that stand in any cell's sentence, ascending."""
        return np.unique(self.gene[self.gene >= 0])

    def gene_ids_of(self, cell: int) -> np.ndarray:
        """The cell's sentence as gene ids, in rank order."""
        return self.gene[cell][(self.place[cell] == 0) & self.mask[cell]]

    def genes_of(self, cell: int) -> list[str]:
        """The cell's sentence: its genes in rank order."""
        return self.symbols[self.gene_ids_of(cell)].tolist()

    def pieces(self, cell: int) -> list[str]:
        """The cell's tokens as text, one string per token."""
        ids = self.tokens[cell][self.mask[cell]]
        return token_texts(self.tokenizer, ids)


def token_texts(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int] | np.ndarray) -> list[str]:
    """Tokens as readable text: a leading space is shown as `_`, as in the paper's Table 3."""
    texts = [str(tokenizer.decode([int(i)], clean_up_tokenization_spaces=False)) for i in ids]
    return [text.replace(" ", "_").replace("\n", "\\n") for text in texts]


def sentence_texts(ranking: np.ndarray, symbols: Sequence[str] | np.ndarray) -> Iterator[str]:
    """Each cell's genes as text, in rank order, joined by spaces.

    ranking: (n_cells, k) ids of genes, -1 after the last; symbols: n_genes texts.
    """
    # An array of texts makes a new object of each element that is taken out; this one shares them.
    names = np.array(symbols, dtype=object)
    for start in range(0, len(ranking), _CELLS):
        part = ranking[start : start + _CELLS]
        sizes = (part >= 0).sum(axis=1).tolist()
        for genes, size in zip(names[part].tolist(), sizes, strict=True):
            yield " ".join(genes[:size])


def split_cells(n_cells: int, share: float, seed: int) -> np.ndarray:
    """(n_cells,) bool: True for the held-out share, drawn at random by cell."""
    n_held_out = max(1, round(n_cells * share))
    if n_held_out >= n_cells:
        raise InputError(f"{n_cells} cells cannot be split with validation_share {share}: nothing "
                         "would be left to train on; use more cells.")
    held_out = np.zeros(n_cells, bool)
    held_out[np.random.default_rng([seed, 3]).permutation(n_cells)[:n_held_out]] = True
    return held_out


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE (as Pythia's, but small) trained on the given texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT, clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str, revision: str | None = None) -> "PreTrainedTokenizerFast":
    """A tokenizer from a Hugging Face id, a folder, or a folder with only `tokenizer.json`."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(name).expanduser()
    try:
        if (folder / "tokenizer.json").is_file() and not (
            folder / "tokenizer_config.json"
        ).is_file():
            return PreTrainedTokenizerFast(
                tokenizer_file=str(folder / "tokenizer.json"), bos_token=END_OF_TEXT,
                eos_token=END_OF_TEXT, unk_token=END_OF_TEXT,
            )
        tokenizer: Any = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=False)
    except Exception as error:  # a broken file makes `tokenizers` raise a bare Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"The tokenizer {name!r} cannot be loaded ({reason}); check `tokenizer` "
                         "in the profile, or download it once with a network.") from None
    if not tokenizer.is_fast:
        raise InputError(f"The tokenizer {name!r} gives no character offsets, which tell a token's "
                         "gene; use one with a tokenizer.json.")
    if tokenizer.eos_token_id is None:
        raise InputError(f"The tokenizer {name!r} has no token for the end of a text; set "
                         "`eos_token` in its tokenizer_config.json.")
    return tokenizer


def encode_prompt(
    tokenizer: "PreTrainedTokenizerFast", prompt: str, genes: Sequence[str],
    gene_ids: Sequence[int] | np.ndarray, answer: str = "", *, end: bool = False,
) -> tuple[Encoded, int]:
    """One cell's prompt and answer as tokens, each with its gene.

    prompt: a template with `{genes}`; genes: the sentence, in order; gene_ids: their ids.
    Returns the encoding and the index of the answer's first token (the length if it has none).
    A token belongs to the gene that its last character stands in, so the space that a sub-word
    carries in front does not matter.
    """
    before, after = prompt.split("{genes}")
    sentence = " ".join(genes)
    text = before + sentence + after + answer
    owner = np.full(len(text) + 1, -1, np.int32)
    start = len(before)
    for gene, symbol in zip(gene_ids, genes, strict=True):
        owner[start : start + len(symbol)] = gene
        # The rank in the sentence tells two mentions apart; genes are unique, so the id does too.
        start += len(symbol) + 1
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = np.array(encoding["input_ids"], np.int64)
    offsets = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)
    gene = np.where(offsets[:, 1] > offsets[:, 0], owner[np.maximum(offsets[:, 1] - 1, 0)], -1)
    answer_start = int(np.searchsorted(offsets[:, 1], len(text) - len(answer), side="right"))
    if end:
        tokens = np.append(tokens, tokenizer.eos_token_id)
        gene = np.append(gene, -1)
    return Encoded(tokens, gene.astype(np.int32), _places(gene)), answer_start


def _places(gene: np.ndarray) -> np.ndarray:
    """(length,) index of each token within its run of equal gene ids; -1 outside genes."""
    new = np.append(True, gene[1:] != gene[:-1])
    start = np.maximum.accumulate(np.where(new, np.arange(len(gene)), 0))
    return np.where(gene >= 0, np.arange(len(gene)) - start, -1).astype(np.int16)


class AnsweredPrompt(NamedTuple):
    """A sentence's prompt with an answer: tokens, their texts and genes, the target's position."""

    encoded: Encoded
    texts: list[str]
    genes: list[str | None]
    answer_start: int
    position: int


def answered_sentence(tokenizer: "PreTrainedTokenizerFast", profile: Profile, genes: Sequence[str],
                      gene_ids: Sequence[int] | np.ndarray, answer: str) -> AnsweredPrompt:
    """A sentence's prompt followed by the given answer, as the case study traces it.

    `position` is where the profile's `case_position` reads the target: the answer's last token, or
    the prompt's.
    """
    encoded, start = encode_prompt(tokenizer, profile.prompt, genes, gene_ids,
                                   profile.response.replace("{label}", answer))
    position = len(encoded.tokens) - 1 if profile.case_position == "answer" else start - 1
    names = dict(zip(gene_ids, genes, strict=True))
    return AnsweredPrompt(encoded, token_texts(tokenizer, encoded.tokens),
                          [names.get(gene) for gene in encoded.gene], start, position)


def answered_prompt(corpus: Corpus, profile: Profile, cell: int, answer: str) -> AnsweredPrompt:
    """`answered_sentence` of a cell of the corpus, with the corpus's gene ids."""
    return answered_sentence(corpus.tokenizer, profile, corpus.genes_of(cell),
                             corpus.gene_ids_of(cell), answer)


def build_corpus(cells: "RankedCells", profile: Profile, made: Made = in_memory) -> Corpus:
    """All cells as prompts with answers, tokenized, split and padded.

    made: where the large arrays are to be (`gene_pieces.encode_all`).

    Raises InputError if the tokenizer cannot be had or there are too few cells to split.
    """
    held_out = split_cells(len(cells), profile.validation_share, profile.seed)
    symbols = np.array(cells.symbols)
    answers = [profile.response.replace("{label}", label) for label in cells.labels]
    if profile.tokenizer == "train":
        texts = (profile.prompt.replace("{genes}", sentence) + answers[i]
                 for i, sentence in enumerate(sentence_texts(cells.ranking, symbols))
                 if not held_out[i])
        tokenizer = train_tokenizer(texts, profile.vocabulary_size)
    else:
        tokenizer = load_tokenizer(profile.tokenizer, profile.model_revision)
    prompts = encode_all(tokenizer, profile.prompt, symbols, cells.ranking, answers, made)
    return Corpus(
        **prompts._asdict(), labels=cells.labels, cell_ids=cells.cell_ids, held_out=held_out,
        symbols=symbols, decisions=np.array(cells.decisions), tokenizer=tokenizer,
    )


def load_corpus(profile: Profile) -> Corpus:
    """The profile's corpus: from `results/<profile>/corpus/` if it is current, else built.

    The folder holds an .npy file per array, which is mapped, not read: a part of the corpus costs
    memory while it is looked at. (Arrow would do the same; numpy needs no further package.)
    """
    folder, stamp = profile.results / "corpus", _corpus_stamp(profile)
    stored = _stored_corpus(folder, stamp)
    if stored is not None:
        check_case(stored.labels, stored.held_out, profile)
        return stored
    from scfm_circuits.cells import read_ranked

    cells = read_ranked(profile)
    check_case(cells.labels, split_cells(len(cells), profile.validation_share, profile.seed),
               profile)
    with atomic_folder(folder) as fresh:

        def mapped(name: str, shape: tuple[int, int], dtype: type) -> np.ndarray:
            return np.lib.format.open_memmap(fresh / f"{name}.npy", "w+", dtype, shape)

        corpus = build_corpus(cells, profile, mapped)
        for key, value in vars(corpus).items():
            if isinstance(value, np.memmap):
                value.flush()
            elif key != "tokenizer":
                np.save(fresh / f"{key}.npy", value, allow_pickle=False)
        (fresh / _TOKENIZER).write_text(corpus.tokenizer.backend_tokenizer.to_str(),
                                        encoding="utf-8")
        write_json(fresh / _STAMP, {"stamp": stamp, "end_of_text": corpus.tokenizer.eos_token})
        del corpus
    built = _stored_corpus(folder, stamp)
    if built is None:
        raise InputError(f"The corpus {folder} was written and cannot be read; check the disk.")
    return built


def stored_corpus(profile: Profile) -> Corpus | None:
    """The corpus that `load_corpus` stored, if it is current."""
    return _stored_corpus(profile.results / "corpus", _corpus_stamp(profile))


def _corpus_stamp(profile: Profile) -> str:
    """What the corpus depends on: profile fields, sources, and the cells' file."""
    stamp = json.dumps(profile.fingerprint(_FIELDS, _MODULES), sort_keys=True)
    return stamp + _file_stamp(profile)


def _stored_corpus(folder: Path, stamp: str) -> Corpus | None:
    """The corpus in `folder` if it carries this stamp and can be read, else None."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        about = read_json(folder / _STAMP)
        if about.get("stamp") != stamp:
            return None
        names = [field.name for field in fields(Corpus) if field.name != "tokenizer"]
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
                  for name in names}
        end = str(about["end_of_text"])
        text = (folder / _TOKENIZER).read_text(encoding="utf-8")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text),
                                            bos_token=end, eos_token=end, unk_token=end)
    except Exception:  # a broken tokenizer.json makes `tokenizers` raise a bare Exception
        return None
    large = set(Prompts._fields[:4])
    return Corpus(tokenizer=tokenizer, **{name: value if name in large else np.array(value)
                                          for name, value in arrays.items()})


def check_case(labels: np.ndarray, held_out: np.ndarray, profile: Profile) -> None:
    """InputError, before anything is tokenized or trained, if the case study has no cell.

    labels, held_out: (n_cells,) of the cells that are used.
    """
    if not np.any(held_out & (labels == profile.case_type)):
        known = ", ".join(np.unique(labels[held_out]))
        raise InputError(f"No held-out cell has the type {profile.case_type!r} (`case_type` in the "
                         f"profile); held-out cells have the types {known}.")


def _file_stamp(profile: Profile) -> str:
    """Size and time of the cells' file, so that a changed file is read again."""
    path = cells_path(profile, ROOT)
    if path is None or not path.is_file():
        return ""
    return f"{path.stat().st_size}:{path.stat().st_mtime_ns}"
