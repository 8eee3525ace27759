"""Gene names and prompts as tokens, each of which knows its gene.

The tokenizer; one prompt, token by token; and many prompts at once, put together from gene names
that were encoded once each (checked against the tokenizer, else encoded one by one).

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
from scfm_circuits.common.profile import model_source

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from scfm_circuits.common.profile import Profile

END_OF_TEXT = "<|endoftext|>"
GENE_MARK = "<gene>"
"""In a vocabulary it precedes a symbol that is a token of its own; in text it is a space."""
_CELLS = 4096
_LOOKED_AT = 256
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 -."


class Prompts(NamedTuple):
    """Tokenized prompts, right-padded: the arrays of `corpus.Corpus` of the same names."""

    tokens: np.ndarray
    mask: np.ndarray
    gene: np.ndarray
    place: np.ndarray
    answer_start: np.ndarray
    answer_end: np.ndarray


class _Pieces(NamedTuple):
    """Encoded texts one after the other; start: (n + 1,); place: within the gene, -1 outside."""

    start: np.ndarray
    token: np.ndarray
    place: np.ndarray


Made = Callable[[str, tuple[int, int], type], np.ndarray]
"""Makes an array of a name, shape and type; its content need not be set."""


def in_memory(name: str, shape: tuple[int, int], dtype: type) -> np.ndarray:
    """An array that is not kept in a file."""
    return np.empty(shape, dtype)


def encode_all(tokenizer: "PreTrainedTokenizerFast", prompt: str, symbols: np.ndarray,
               ranking: np.ndarray, answers: Sequence[str], made: Made = in_memory) -> Prompts:
    """All cells' prompts with their answers and the end of text.

    prompt: a template with `{genes}`; symbols: (n_genes,); ranking: (n_cells, k) gene ids, -1 after
    the last; answers: (n_cells,) texts. made: where the four large arrays are to be.
    """
    kinds, which = np.unique(np.asarray(answers), return_inverse=True)
    parts = _parts(tokenizer, prompt, symbols, ranking, kinds, which)
    if parts is not None and _agree(tokenizer, prompt, symbols, ranking, answers, which, parts):
        return _joined(tokenizer.eos_token_id, ranking, *parts, made)
    return _one_by_one(tokenizer, prompt, symbols, ranking, answers, made)


# --- from pieces ---------------------------------------------------------------------------------


def _parts(tokenizer: "PreTrainedTokenizerFast", prompt: str, symbols: np.ndarray,
           ranking: np.ndarray, kinds: np.ndarray, which: np.ndarray
           ) -> tuple[_Pieces, np.ndarray] | None:
    """All pieces, and (n_cells, k + 1) which of them a cell has, -1: none; None if it cannot be."""
    before, after = prompt.split("{genes}")
    size = (ranking >= 0).sum(axis=1)
    if size.min() < 2 or not all(str(answer).startswith(" ") for answer in kinds):
        return None
    cells, n, k = np.arange(len(ranking)), len(symbols), ranking.shape[1]
    first, last = ranking[:, 0], ranking[cells, size - 1]
    chosen = np.full((len(ranking), k + 1), -1, np.int64)
    chosen[:, :k] = np.where(ranking >= 0, ranking + n, -1)
    chosen[:, 0] = first
    chosen[cells, size - 1] = last + 2 * n
    chosen[cells, size] = which + 3 * n
    texts = np.full(3 * n + len(kinds), "", dtype=object)
    spans = np.zeros((len(texts), 2), np.int64)
    lengths = np.array([len(symbol) for symbol in symbols], np.int64)
    occurring = np.unique(ranking[ranking >= 0])
    for ids, offset, head, tail in ((np.unique(first), 0, before, ""), (occurring, n, " ", ""),
                                    (np.unique(last), 2 * n, " ", after)):
        texts[ids + offset] = [f"{head}{symbols[i]}{tail}" for i in ids]
        spans[ids + offset] = len(head)
        spans[ids + offset, 1] += lengths[ids]
    texts[3 * n :] = kinds.astype(object)
    return _encoded(tokenizer, texts.tolist(), spans), chosen


def _encoded(tokenizer: "PreTrainedTokenizerFast", texts: list[str], spans: np.ndarray) -> _Pieces:
    """The texts' tokens; spans: (n, 2) the characters of the gene in each."""
    found = _encode(tokenizer, texts, [[(start, stop)] for start, stop in spans.tolist()])
    place = []
    for (_, offsets), (start, stop) in zip(found, spans.tolist(), strict=True):
        ends = offsets[:, 1]
        inside = (ends > start) & (ends <= stop)
        place.append(np.where(inside, np.cumsum(inside) - 1, -1).astype(np.int16))
    return _Pieces(np.append(0, np.cumsum([len(tokens) for tokens, _ in found])),
                   np.concatenate([tokens for tokens, _ in found]), np.concatenate(place))


def _agree(tokenizer: "PreTrainedTokenizerFast", prompt: str, symbols: np.ndarray,
           ranking: np.ndarray, answers: Sequence[str], which: np.ndarray,
           parts: tuple[_Pieces, np.ndarray]) -> bool:
    """Whether cells of each answer, and some more, come out as the tokenizer itself has them."""
    _, one_of_each = np.unique(which, return_index=True)
    spread = np.linspace(0, len(ranking) - 1, min(len(ranking), _LOOKED_AT)).astype(int)
    some = np.union1d(one_of_each, spread)
    pieces, chosen = parts
    joined = _joined(tokenizer.eos_token_id, ranking[some], pieces, chosen[some], in_memory,
                     quiet=True)
    alone = _one_by_one(tokenizer, prompt, symbols, ranking[some], [answers[i] for i in some],
                        in_memory, quiet=True)
    return all(np.array_equal(a, b) for a, b in zip(joined, alone, strict=True))


def _joined(end: int, ranking: np.ndarray, pieces: _Pieces, chosen: np.ndarray, made: Made,
            quiet: bool = False) -> Prompts:
    """Each cell's pieces side by side, then the end of text, which is the padding too.

        chosen   before+G1      " G2"   ...   " Gk"+after    answer   (-1)
        tokens   t t t t t      t t     ...   t t t t        t t t    end   end ...
        gene     - - - 1 1      2 2     ...   k k - -        - - -    -     -
    """
    sizes = np.append(np.diff(pieces.start), 0)  # the last one for "no piece"
    question = np.empty(len(chosen), np.int64)
    lengths = np.empty(len(chosen), np.int64)
    blocks = [slice(a, a + _CELLS) for a in range(0, len(chosen), _CELLS)]
    for block in blocks:
        each = sizes[chosen[block]]
        lengths[block] = each.sum(axis=1) + 1
        answer = (ranking[block] >= 0).sum(axis=1)  # its column: after the genes
        question[block] = lengths[block] - 1 - each[np.arange(len(each)), answer]
    prompts = _empty(lengths, question, made)
    at = np.arange(prompts.tokens.shape[1])
    for block in tqdm(blocks, desc="tokens", unit="chunk", disable=quiet or len(blocks) < 2):
        # All the block's tokens in one row, cell after cell; `source` is where each stands among
        # the pieces: start, start + 1, ... of each piece in turn.
        inside = at < lengths[block, None] - 1
        row, column = np.nonzero(chosen[block] >= 0)
        piece = chosen[block][row, column]
        length = sizes[piece]
        skipped = pieces.start[piece] - (np.cumsum(length) - length)
        source = np.repeat(skipped, length) + np.arange(length.sum())
        place = pieces.place[source]
        whose = np.append(ranking[block], np.full((len(inside), 1), -1, ranking.dtype), axis=1)
        gene = np.where(place >= 0, np.repeat(whose[row, column], length), -1)
        for into, values, rest in ((prompts.tokens, pieces.token[source], end),
                                   (prompts.gene, gene, -1), (prompts.place, place, -1)):
            part = np.full(inside.shape, rest, into.dtype)
            part[inside] = values
            into[block] = part
        prompts.mask[block] = at < lengths[block, None]
    return prompts


def _empty(lengths: np.ndarray, question: np.ndarray, made: Made) -> Prompts:
    shape = len(lengths), int(lengths.max())
    return Prompts(made("tokens", shape, np.int64), made("mask", shape, np.bool_),
                   made("gene", shape, np.int32), made("place", shape, np.int16), question,
                   lengths - 2)


# --- one by one ----------------------------------------------------------------------------------


def _one_by_one(tokenizer: "PreTrainedTokenizerFast", prompt: str, symbols: np.ndarray,
                ranking: np.ndarray, answers: Sequence[str], made: Made, quiet: bool = False
                ) -> Prompts:
    found = []
    for ids, answer in tqdm(zip(ranking, answers, strict=True), desc="tokens", unit="cell",
                            total=len(ranking), disable=quiet or len(ranking) < _CELLS):
        own = ids[ids >= 0]
        found.append(encode_prompt(tokenizer, prompt, symbols[own].tolist(), own, answer, end=True))
    lengths = np.array([len(one.tokens) for one, _ in found])
    prompts = _empty(lengths, np.array([start for _, start in found]), made)
    prompts.tokens[:], prompts.gene[:], prompts.place[:] = tokenizer.eos_token_id, -1, -1
    prompts.mask[:] = np.arange(prompts.mask.shape[1]) < lengths[:, None]
    for row, (one, _) in enumerate(found):
        prompts.tokens[row, : lengths[row]] = one.tokens
        prompts.gene[row, : lengths[row]] = one.gene
        prompts.place[row, : lengths[row]] = one.place
    return prompts

class Encoded(NamedTuple):
    """One text as tokens: `tokens`, `gene` (id or -1) and `place` in the gene, each (length,)."""

    tokens: np.ndarray
    gene: np.ndarray
    place: np.ndarray


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


def question(profile: "Profile") -> str:
    """The profile's prompt with all but `{genes}` filled in.

    `{num_genes}` is `genes_per_cell`, as cell2sentence fills it in, also for a cell with fewer.
    """
    return (profile.prompt.replace("{num_genes}", str(profile.genes_per_cell))
            .replace("{organism}", profile.organism))


def written(profile: "Profile", genes: Sequence[str], answer: str) -> str:
    """A sentence's prompt followed by the given answer, as text."""
    return (question(profile).replace("{genes}", " ".join(genes))
            + profile.response.replace("{label}", answer))


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
    start, spans = len(before), []
    for gene, symbol in zip(gene_ids, genes, strict=True):
        spans.append((start, start + len(symbol)))
        owner[slice(*spans[-1])] = gene
        # The rank in the sentence tells two mentions apart; genes are unique, so the id does too.
        start += len(symbol) + 1
    [(tokens, offsets)] = _encode(tokenizer, [text], [spans])
    gene = np.where(offsets[:, 1] > offsets[:, 0], owner[np.maximum(offsets[:, 1] - 1, 0)], -1)
    answer_start = int(np.searchsorted(offsets[:, 1], len(text) - len(answer), side="right"))
    if end:
        tokens = np.append(tokens, tokenizer.eos_token_id)
        gene = np.append(gene, -1)
    return Encoded(tokens, gene.astype(np.int32), _places(gene)), answer_start


def _encode(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str],
            spans: Sequence[Sequence[tuple[int, int]]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each text's tokens, and (n_tokens, 2) the characters that they stand for.

    spans: for each text, the characters of its genes. Those that are tokens of their own are taken
    out, with the space in front, before the rest is encoded.
    """
    runs = [_runs(tokenizer, text, genes) for text, genes in zip(texts, spans, strict=True)]
    rest = [text[start:stop] for text, own in zip(texts, runs, strict=True)
            for start, stop, token in own if token is None]
    words = tokenizer(rest, add_special_tokens=False, return_offsets_mapping=True) if rest else {
        "input_ids": [], "offset_mapping": []}
    found = zip(words["input_ids"], words["offset_mapping"], strict=True)
    encoded = []
    for own in runs:
        tokens: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, stop, token in own:
            ids, places = next(found) if token is None else ([token], [(0, stop - start)])
            tokens += ids
            offsets += [(start + a, start + b) for a, b in places]
        encoded.append((np.array(tokens, np.int64), np.array(offsets, np.int64).reshape(-1, 2)))
    return encoded


def _runs(tokenizer: "PreTrainedTokenizerFast", text: str, genes: Sequence[tuple[int, int]]
          ) -> list[tuple[int, int, int | None]]:
    """A text in runs of characters: genes with their token, and what is left, with none."""
    runs: list[tuple[int, int, int | None]] = []
    done = 0
    for start, stop in genes:
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
