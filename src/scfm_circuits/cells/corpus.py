"""Cells as tokens: genes in order of expression, as text or as tokens, and back to genes.

The paper's encoding is Cell2Sentence's (Levine et al. 2024): the genes a cell expresses, most
expressed first, ties in random order, upper case, joined by spaces. The prompt is its Figure 4.
The others are in `rank_value`. Every token knows the gene it is part of and its place in it; words
of the prompt and of the answer, and special tokens, belong to no gene.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scfm_circuits import InputError
from scfm_circuits.cells.dictionaries import files_stamp, read_gene_tokens
from scfm_circuits.cells.rank_value import encode_ranked, gene_tokenizer, own_tokens
from scfm_circuits.cells.tokens import (
    Made,
    Prompts,
    begin_token_note,
    encode_all,
    in_memory,
    load_tokenizer,
    question,
    token_texts,
    train_gene_tokenizer,
    train_tokenizer,
)
from scfm_circuits.common.encodings import CELL_SENTENCE, OWN_DICTIONARY
from scfm_circuits.common.files import atomic_folder
from scfm_circuits.common.kept import Stamp, read_record, stamp_of, write_record
from scfm_circuits.common.labels import listed
from scfm_circuits.common.profile import Profile, cells_path
from scfm_circuits.common.randomness import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from scfm_circuits.cells.reading import RankedCells

_FIELDS = (
    "seed", "cells", "matrix", "symbol_column", "symbol_rule", "duplicate_symbols", "label_column",
    "max_cells", "sampling", "validation_share", "genes_per_cell", "prompt", "organism",
    "response", "tokenizer", "vocabulary_size", "model_revision", "encoding", "token_dictionary",
    "gene_medians", "gene_mapping", "ensembl_column",
)
_ROOMS = ("cells",)
_STAMP, _TOKENIZER = "corpus.json", "tokenizer.json"
RARE = 30
"""Cells of a type below which a model that is trained on the spot hardly learns it."""
_CELLS = 512
"""Cells whose sentences are put together at once."""


@dataclass(frozen=True)
class Corpus:
    """All cells as tokens, right-padded.

    tokens: (n_cells, length) int64 token ids, with a level each under `encoding: binned`
    (`rank_value.encode_ranked`); mask: the same shape, False on padding.
    gene: (n_cells, length) int32 index into `symbols`, -1 where a token belongs to no gene.
    place: (n_cells, length) int16 position of the token within its gene, -1 outside genes.
    answer_start: (n_cells,) index of the answer's first token; the token before it asks.
    answer_end: (n_cells,) index of the answer's last token, the full stop. Cells under a rank-value
    encoding have no answer: `answer_start` is their length, `answer_end` one less.
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

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n_cells,) tokens of each cell without padding; counted once, as there may be many."""
        return self.mask.sum(axis=1)

    def training_cells(self, most: int) -> np.ndarray:
        """Cells that are not held out, `most` at most, evenly spaced in the corpus."""
        return _spaced(np.flatnonzero(~self.held_out), most)

    def held_out_cells(self, most: int) -> np.ndarray:
        """Held-out cells, `most` at most, evenly spaced: a file's first cells are often of one
        sample."""
        return _spaced(np.flatnonzero(self.held_out), most)

    @property
    def has_answers(self) -> bool:
        """Whether the cells' types are written behind their genes."""
        return bool((self.answer_end >= self.answer_start).all())

    @property
    def has_sub_words(self) -> bool:
        """Whether any gene is cut into several tokens."""
        return bool((self.place > 0).any())

    @cached_property
    def occurring(self) -> np.ndarray:
        """Ids of the genes that stand in any cell's sentence, ascending."""
        return np.unique(self.gene[self.gene >= 0])

    @property
    def occurring_symbols(self) -> list[str]:
        """The symbols of these genes."""
        found: list[str] = self.symbols[self.occurring].tolist()
        return found

    @cached_property
    def cells_with(self) -> np.ndarray:
        """(n_genes,) in how many cells each gene stands, however many tokens its name has."""
        return np.bincount(self.gene[(self.place == 0) & self.mask], minlength=len(self.symbols))

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


def _spaced(cells: np.ndarray, most: int) -> np.ndarray:
    return cells[np.unique(np.linspace(0, len(cells) - 1, most).round().astype(int))]


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


def of_cells(corpus: Corpus, rows: np.ndarray) -> Corpus:
    """The corpus of some of its cells, with all its genes."""
    return dataclasses.replace(corpus, **{name: getattr(corpus, name)[rows] for name in (
        "tokens", "mask", "gene", "place", "answer_start", "answer_end", "labels", "cell_ids",
        "held_out")})


def split_cells(n_cells: int, share: float, seed: int) -> np.ndarray:
    """(n_cells,) bool: True for the held-out share, drawn at random by cell."""
    n_held_out = max(1, round(n_cells * share))
    if n_held_out >= n_cells:
        raise InputError(f"{n_cells} cells cannot be split with validation_share {share}: nothing "
                         "would be left to train on; use more cells.")
    held_out = np.zeros(n_cells, bool)
    held_out[generator(seed, "held-out cells").permutation(n_cells)[:n_held_out]] = True
    return held_out


def build_corpus(cells: "RankedCells", profile: Profile, made: Made = in_memory,
                 held_out: np.ndarray | None = None) -> Corpus:
    """All cells as prompts with answers, tokenized, split and padded.

    made: where the large arrays are to be (`tokens.encode_all`). held_out: (n_cells,) the split;
    without it, `split_cells`.

    Raises InputError if the tokenizer or a dictionary cannot be had, there are too few cells to
    split, or a label or symbol holds a token that has a meaning of its own, such as the end of a
    text.
    """
    if held_out is None:
        held_out = split_cells(len(cells), profile.validation_share, profile.seed)
    if profile.encoding != CELL_SENTENCE:
        return _ranked_corpus(cells, profile, made, held_out)
    symbols, asked = np.array(cells.symbols), question(profile)
    answers = [profile.response.replace("{label}", label) for label in cells.labels]
    if profile.tokenizer == "train":
        texts = (asked.replace("{genes}", sentence) + answers[i]
                 for i, sentence in enumerate(sentence_texts(cells.ranking, symbols))
                 if not held_out[i])
        tokenizer = train_tokenizer(texts, profile.vocabulary_size)
    elif profile.tokenizer == "genes":
        texts = (asked.replace("{genes}", "") + answer
                 for answer, out in zip(answers, held_out, strict=True) if not out)
        used = np.unique(cells.ranking[cells.ranking >= 0])
        tokenizer = train_gene_tokenizer(texts, symbols[used].tolist(), profile.vocabulary_size)
    else:
        tokenizer = load_tokenizer(profile.tokenizer, profile.model_revision)
    _check_special(tokenizer, cells.labels, symbols)
    note = begin_token_note(tokenizer)
    decisions = [*cells.decisions, *([note] if note else [])]
    prompts = encode_all(tokenizer, asked, symbols, cells.ranking, answers, made)
    return Corpus(
        **prompts._asdict(), labels=cells.labels, cell_ids=cells.cell_ids, held_out=held_out,
        symbols=symbols, decisions=np.array(decisions), tokenizer=tokenizer,
    )


def _ranked_corpus(cells: "RankedCells", profile: Profile, made: Made, held_out: np.ndarray
                   ) -> Corpus:
    """The corpus of cells whose genes are the model's tokens: no prompt, and no answer."""
    known = (own_tokens(profile, cells.symbols) if profile.token_dictionary == OWN_DICTIONARY
             else read_gene_tokens(profile))
    prompts = encode_ranked(profile.encoding, known, cells.tokens, cells.ranking, made,
                            cells.levels)
    return Corpus(
        **prompts._asdict(), labels=cells.labels, cell_ids=cells.cell_ids, held_out=held_out,
        symbols=np.array(cells.symbols), decisions=np.array(cells.decisions),
        tokenizer=gene_tokenizer(known, cells.symbols, cells.tokens))


def _check_special(tokenizer: "PreTrainedTokenizerFast", labels: np.ndarray, symbols: np.ndarray
                   ) -> None:
    for kind, texts in (("label", np.unique(labels)), ("gene symbol", symbols)):
        everything = "\n".join(texts)
        for token in filter(everything.__contains__, tokenizer.all_special_tokens):
            bad = next(text for text in texts if token in text)
            raise InputError(f"The {kind} {str(bad)[:60]!r} holds {token!r}, which the tokenizer "
                             "takes for the end or another mark of a text; rename it in the cells.")


def with_tokenizer(corpus: Corpus, profile: Profile, rows: np.ndarray) -> Corpus:
    """Some cells of a corpus, split as they were, in the tokens of the profile's `tokenizer`.

    Of a longer sentence the first `genes_per_cell` genes are taken.
    """
    from scfm_circuits.cells.reading import RankedCells

    sentences = [corpus.gene_ids_of(cell)[: profile.genes_per_cell] for cell in rows]
    ranking = np.full((len(rows), max(map(len, sentences))), -1, np.int32)
    for row, genes in zip(ranking, sentences, strict=True):
        row[: len(genes)] = genes
    cells = RankedCells(tuple(corpus.symbols.tolist()), corpus.labels[rows], corpus.cell_ids[rows],
                        tuple(corpus.decisions.tolist()), ranking)
    return build_corpus(cells, profile, held_out=corpus.held_out[rows])


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
    from scfm_circuits.cells.reading import read_ranked

    cells = read_ranked(profile)
    check_case(cells.labels, split_cells(len(cells), profile.validation_share, profile.seed),
               profile)
    with atomic_folder(folder) as fresh:

        def mapped(name: str, shape: tuple[int, int], dtype: type) -> np.ndarray:
            return np.lib.format.open_memmap(fresh / f"{name}.npy", "w+", dtype, shape)

        corpus = build_corpus(cells, profile, mapped)
        for key in (field.name for field in fields(corpus) if field.name != "tokenizer"):
            value = getattr(corpus, key)
            if isinstance(value, np.memmap):
                value.flush()
            else:
                np.save(fresh / f"{key}.npy", value, allow_pickle=False)
        (fresh / _TOKENIZER).write_text(corpus.tokenizer.backend_tokenizer.to_str(),
                                        encoding="utf-8")
        write_record(fresh / _STAMP, {"stamp": stamp, "end_of_text": corpus.tokenizer.eos_token})
        del corpus
    built = _stored_corpus(folder, stamp)
    if built is None:
        raise InputError(f"The corpus {folder} was written and cannot be read; check the disk.")
    return built


def stored_corpus(profile: Profile) -> Corpus | None:
    """The corpus that `load_corpus` stored, if it is current."""
    return _stored_corpus(profile.results / "corpus", _corpus_stamp(profile))


def _corpus_stamp(profile: Profile) -> Stamp:
    """What the corpus depends on; its cells' file, by size and time."""
    path = cells_path(profile)
    about = None if path is None or not path.is_file() else path.stat()
    return stamp_of(profile, _FIELDS, _ROOMS, dictionaries=files_stamp(profile),
                    file=about and [about.st_size, about.st_mtime_ns])


def _stored_corpus(folder: Path, stamp: Stamp) -> Corpus | None:
    """The corpus in `folder` if it carries this stamp and is whole, else None."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    about = read_record(folder / _STAMP, stamp)
    if about is None:
        return None
    names = [field.name for field in fields(Corpus) if field.name != "tokenizer"]
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
              for name in names}
    end = str(about["end_of_text"])
    text = (folder / _TOKENIZER).read_text(encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text),
                                        bos_token=end, eos_token=end, unk_token=end)
    large = set(Prompts._fields[:4])
    return Corpus(tokenizer=tokenizer, **{name: value if name in large else np.array(value)
                                          for name, value in arrays.items()})


def check_case(labels: np.ndarray, held_out: np.ndarray, profile: Profile) -> None:
    """InputError, before anything is tokenized or trained, if the case study has no cell.

    labels, held_out: (n_cells,) of the cells that are used.
    """
    if not np.any(held_out & (labels == profile.case_type)):
        known = listed(np.unique(labels[held_out]))
        raise InputError(f"No held-out cell has the type {profile.case_type!r} (`case_type` in the "
                         f"profile); held-out cells have the types {known}.")


def rare_types(labels: np.ndarray, profile: Profile) -> list[str]:
    """A sentence if half of the types or more have fewer than `RARE` cells and the model is yet to
    be trained; else none.

    labels: (n_cells,) of the cells that are used.
    """
    counts = np.unique(labels, return_counts=True)[1]
    rare = int((counts < RARE).sum())
    if 2 * rare < len(counts) or profile.model != "train":
        return []
    return [f"{rare} of {len(counts)} types have fewer than {RARE} cells, and a model that is "
            "trained on the spot hardly learns such a type; use more cells, join types or leave "
            "rare ones out, or name a trained `model`."]
