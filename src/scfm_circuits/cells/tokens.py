"""Gene names and prompts as tokens, each of which knows its gene.

The tokenizer; all cells' prompts, or one, token by token.

A tokenizer may have genes as tokens (`train_gene_tokenizer`). Such a gene is cut out of the text,
which is otherwise encoded as any other.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from scfm_circuits import InputError
from scfm_circuits.common.encodings import BINNED, GENE_TOKENS
from scfm_circuits.common.files import first_line
from scfm_circuits.common.profile import Profile, model_source

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"
GENE_MARK = "<gene>"
"""In a vocabulary it precedes a symbol that is a token of its own; in text it is a space."""
_CELLS = 512
"""Cells whose prompts the tokenizer is given at once."""
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 -."


class Prompts(NamedTuple):
    """Tokenized prompts, right-padded: the arrays of `corpus.Corpus` of the same names."""

    tokens: np.ndarray
    mask: np.ndarray
    gene: np.ndarray
    place: np.ndarray
    answer_start: np.ndarray
    answer_end: np.ndarray


class Encoded(NamedTuple):
    """One text as tokens: `tokens`, `gene` (id or -1) and `place` in the gene, each (length,)."""

    tokens: np.ndarray
    gene: np.ndarray
    place: np.ndarray


Made = Callable[[str, tuple[int, int], type], np.ndarray]
"""Makes an array of a name, shape and type; its content need not be set."""


def in_memory(name: str, shape: tuple[int, int], dtype: type) -> np.ndarray:
    """An array that is not kept in a file."""
    return np.empty(shape, dtype)


def encode_all(tokenizer: "PreTrainedTokenizerFast", prompt: str, symbols: np.ndarray,
               ranking: np.ndarray, answers: Sequence[str], made: Made = in_memory) -> Prompts:
    """All cells' prompts with their answers and the end of text, which is the padding too.

    prompt: a template with `{genes}`; symbols: (n_genes,); ranking: (n_cells, k) gene ids, -1 after
    the last; answers: (n_cells,) texts. made: where the four large arrays are to be.
    """
    names = np.array(symbols, dtype=object)
    blocks = [slice(start, start + _CELLS) for start in range(0, len(ranking), _CELLS)]
    found, lengths, starts = [], [], []
    for block in tqdm(blocks, desc="tokens", unit="chunk", disable=len(blocks) < 8):
        ids = [row[row >= 0] for row in ranking[block]]
        encoded = _encode_prompts(tokenizer, prompt, [names[own].tolist() for own in ids], ids,
                                  answers[block])
        starts += [start for _, start in encoded]
        lengths += [len(one.tokens) + 1 for one, _ in encoded]
        # In as few bytes as they need: of an atlas all are held until the longest is known.
        found.append([np.concatenate(part, dtype=np.int32) for part in zip(
            *(one for one, _ in encoded), strict=True)])
    length, shape = np.array(lengths)[:, None], (len(ranking), max(lengths))
    prompts = Prompts(made("tokens", shape, np.int64), made("mask", shape, np.bool_),
                      made("gene", shape, np.int32), made("place", shape, np.int16),
                      np.array(starts), length[:, 0] - 2)
    at = np.arange(shape[1])
    for block, parts in zip(blocks, found, strict=True):
        inside = at < length[block] - 1
        for into, values, rest in zip((prompts.tokens, prompts.gene, prompts.place), parts,
                                      (tokenizer.eos_token_id, -1, -1), strict=True):
            part = np.full(inside.shape, rest, into.dtype)
            part[inside] = values
            into[block] = part
        prompts.mask[block] = at < length[block]
    return prompts


def token_texts(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int] | np.ndarray) -> list[str]:
    """Tokens as readable text: a leading space is shown as `_`, as in the paper's Table 3. Of a
    gene at a level (`encoding: binned`), the gene."""
    ids = without_levels(tokenizer, np.asarray(ids))
    texts = [str(tokenizer.decode([int(i)], clean_up_tokenization_spaces=False)) for i in ids]
    return [text.replace(" ", "_").replace("\n", "\\n") for text in texts]


def without_levels(tokenizer: "PreTrainedTokenizerFast", ids: np.ndarray) -> np.ndarray:
    """Tokens as the tokenizer knows them: under `encoding: binned` each has a level beside."""
    mark = GENE_TOKENS[BINNED].special[-1]
    known = tokenizer.convert_tokens_to_ids(mark)
    binned = known is not None and tokenizer.convert_ids_to_tokens(known) == mark
    return ids % len(tokenizer) if binned else ids


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE (as Pythia's, but small) trained on the given texts.

    vocabulary_size: pieces at most; the 256 bytes and the end of a text are always there.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _fast(tokenizer)


def train_gene_tokenizer(texts: Iterable[str], symbols: Iterable[str], vocabulary_size: int
                         ) -> "PreTrainedTokenizerFast":
    """A vocabulary of genes: one token a symbol, wherever in the sentence it stands.

    texts: prompts and answers without genes, which are encoded by a BPE of `vocabulary_size` pieces
    at most (`train_tokenizer`), trained on them; symbols: the genes, each once, which come on top.
    A gene's token reads as a space and the symbol. It is never a part of another text: a label
    CD14+ has nothing of the gene CD14, and a gene B nothing of a label B. So the tokenizer by
    itself cuts genes in a text into pieces; `encode_all` and `encode_prompt` give them theirs.
    """
    import json

    from tokenizers import Regex, Tokenizer, decoders

    tokenizer = train_tokenizer(texts, vocabulary_size)
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = whole["model"]["vocab"]
    # `tokenizers` takes one model only. What no merge leads to is a word level beside the BPE.
    vocabulary |= {GENE_MARK + symbol: len(vocabulary) + i for i, symbol in enumerate(symbols)}
    made = Tokenizer.from_str(json.dumps(whole))
    made.decoder = decoders.Sequence([decoders.Replace(Regex(f"^{GENE_MARK}"), " "),
                                      decoders.ByteLevel()])
    return _fast(made)


def _fast(tokenizer: "Tokenizer") -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT, clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str, revision: str | None = None) -> "PreTrainedTokenizerFast":
    """A tokenizer from a Hugging Face id, a folder, or a folder with only `tokenizer.json`.

    Raises InputError if it cannot be had, gives no character offsets, has no end of text or cannot
    write the letters of gene symbols.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = model_source("tokenizer", name)
    folder = Path(source)
    try:
        if (folder / "tokenizer.json").is_file() and not (
            folder / "tokenizer_config.json"
        ).is_file():
            return PreTrainedTokenizerFast(
                tokenizer_file=str(folder / "tokenizer.json"), bos_token=END_OF_TEXT,
                eos_token=END_OF_TEXT, unk_token=END_OF_TEXT,
            )
        tokenizer: Any = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False)
    except Exception as error:  # a broken file makes `tokenizers` raise a bare Exception
        reason = first_line(error)
        raise InputError(f"The tokenizer {name!r} cannot be loaded ({reason}); check `tokenizer` "
                         "in the profile, or download it once with a network.") from None
    if not tokenizer.is_fast:
        raise InputError(f"The tokenizer {name!r} gives no character offsets, which tell a token's "
                         "gene; use one with a tokenizer.json.")
    if tokenizer.eos_token_id is None:
        raise InputError(f"The tokenizer {name!r} has no token for the end of a text; set "
                         "`eos_token` in its tokenizer_config.json.")
    unknown = _cannot_be_written(tokenizer)
    if unknown:
        shown = ", ".join(map(repr, unknown[:3])) + ", ..." * (len(unknown) > 3)
        raise InputError(f"The tokenizer {name!r} has no token for {shown}, as one is that comes "
                         "without its tokenizer.json; copy the model's own tokenizer files into "
                         "its folder, or name another as `tokenizer` in the profile.")
    return tokenizer


def _cannot_be_written(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Letters and digits of gene symbols that come out of the tokenizer as nothing or unknown."""
    text = _ALPHABET
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    written: set[int] = set()
    for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        if token not in tokenizer.all_special_ids:
            written |= {*range(start, end)}
    return [one for place, one in enumerate(text) if one != " " and place not in written]


def begin_token_note(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """A sentence on the token that the tokenizer puts before a text of itself, if it does."""
    first = tokenizer("A")["input_ids"][0]
    if first == tokenizer("A", add_special_tokens=False)["input_ids"][0]:
        return None
    return (f"The tokenizer puts {tokenizer.convert_ids_to_tokens(first)!r} before each text by "
            "itself; it is left out, so a model that was trained with it sees texts without their "
            "begin.")


def question(profile: Profile) -> str:
    """The profile's prompt with all but `{genes}` filled in.

    `{num_genes}` is `genes_per_cell`, as cell2sentence fills it in, also for a cell with fewer.
    """
    return (profile.prompt.replace("{num_genes}", str(profile.genes_per_cell))
            .replace("{organism}", profile.organism))


def written(profile: Profile, genes: Sequence[str], answer: str) -> str:
    """A sentence's prompt followed by the given answer, as text."""
    return (question(profile).replace("{genes}", " ".join(genes))
            + profile.response.replace("{label}", answer))


def encode_prompt(
    tokenizer: "PreTrainedTokenizerFast", prompt: str, genes: Sequence[str],
    gene_ids: Sequence[int] | np.ndarray, answer: str = "",
) -> tuple[Encoded, int]:
    """One cell's prompt and answer as tokens, each with its gene.

    prompt: a template with `{genes}`; genes: the sentence, in order; gene_ids: their ids.
    Returns the encoding and the index of the answer's first token (the length if it has none).
    A token belongs to the gene that its last character stands in, so the space that a sub-word
    carries in front does not matter.
    """
    [found] = _encode_prompts(tokenizer, prompt, [genes], [np.asarray(gene_ids)], [answer])
    return found


def _encode_prompts(
    tokenizer: "PreTrainedTokenizerFast", prompt: str, sentences: Sequence[Sequence[str]],
    gene_ids: Sequence[np.ndarray], answers: Sequence[str],
) -> list[tuple[Encoded, int]]:
    """`encode_prompt` of several cells, for which the tokenizer is asked once."""
    before, after = prompt.split("{genes}")
    texts = [before + " ".join(genes) + after + answer
             for genes, answer in zip(sentences, answers, strict=True)]
    spans = []
    for genes in sentences:
        sizes = np.array([len(gene) for gene in genes], np.int64)
        stops = len(before) + np.cumsum(sizes + 1) - 1
        spans.append((stops - sizes, stops))
    found = []
    for (tokens, offsets), text, answer, span, ids in zip(
            _encode(tokenizer, texts, spans), texts, answers, spans, gene_ids, strict=True):
        first, last = offsets.T
        # The first gene that ends no earlier than the token; behind the last one there is none.
        place = np.searchsorted(span[1], last)
        start = np.append(span[0], len(text))[place]
        inside = (last > start) & (last > first)
        gene = np.where(inside, np.append(ids, -1)[place], -1).astype(np.int32)
        begin = int(np.searchsorted(last, len(text) - len(answer), side="right"))
        found.append((Encoded(tokens, gene, _places(gene)), begin))
    return found


def _encode(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str],
            spans: Sequence[tuple[np.ndarray, np.ndarray]]
            ) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each text's tokens, and (n_tokens, 2) the characters that they stand for.

    spans: for each text, where its genes begin and end. Those that are tokens of their own are
    taken out, with the space in front, before the rest is encoded.
    """
    runs = [_runs(tokenizer, text, *span) for text, span in zip(texts, spans, strict=True)]
    rest = [text[start:stop] for text, own in zip(texts, runs, strict=True)
            for start, stop, token in own if token is None]
    words = tokenizer(rest, add_special_tokens=False, return_offsets_mapping=True) if rest else {
        "input_ids": [], "offset_mapping": []}
    found = zip(words["input_ids"], words["offset_mapping"], strict=True)
    encoded = []
    for own in runs:
        tokens: list[int] = []
        offsets = [np.zeros((0, 2), np.int64)]
        for start, stop, token in own:
            ids, places = next(found) if token is None else ([token], [(0, stop - start)])
            tokens += ids
            offsets.append(np.array(places, np.int64).reshape(-1, 2) + start)
        encoded.append((np.array(tokens, np.int64), np.concatenate(offsets)))
    return encoded


def _runs(tokenizer: "PreTrainedTokenizerFast", text: str, starts: np.ndarray, stops: np.ndarray
          ) -> list[tuple[int, int, int | None]]:
    """A text in runs of characters: genes with their token, and what is left, with none."""
    runs: list[tuple[int, int, int | None]] = []
    done = 0
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        token = tokenizer.backend_tokenizer.token_to_id(GENE_MARK + text[start:stop])
        if token is not None:
            space = start - text[done:start].endswith(" ")
            runs += [(done, space, None)] if space > done else []
            runs.append((space, stop, token))
            done = stop
    return [*runs, (done, len(text), None)] if done < len(text) else runs


def _places(gene: np.ndarray) -> np.ndarray:
    """(length,) index of each token within its run of equal gene ids; -1 outside genes."""
    new = np.append(True, gene[1:] != gene[:-1])
    start = np.maximum.accumulate(np.where(new, np.arange(len(gene)), 0))
    return np.where(gene >= 0, np.arange(len(gene)) - start, -1).astype(np.int16)
