"""The explained model: loading it, its MLP sites, and what takes their place."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import LABELS, model_for, tiny_corpus, tiny_model, tiny_profile, tokens
from pretended_gpu import pretended_gpu
from safetensors.torch import load_file, save_file
from tiny_architectures import ALL_FAMILIES, FAMILIES, LLAMA_TYPE, tiny
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from scfm_circuits import InputError
from scfm_circuits.common.profile import Profile
from scfm_circuits.models import mlp_sites as mlp_sites_module
from scfm_circuits.models.answers import answer_prompt, predict_answers
from scfm_circuits.models.architectures import architecture_of, check_supported
from scfm_circuits.models.loading import (
    check_checkpoint,
    check_vocabulary,
    get_model,
    load_config,
    load_model,
)
from scfm_circuits.models.mlp_sites import (
    Asked,
    Sites,
    batches,
    counting_precision,
    mlp_sites,
    mlps,
    next_tokens,
    replaced_mlps,
    zero_ablation,
)
from scfm_circuits.models.small_models import train_small_model

CPU = torch.device("cpu")


# --- replacing MLPs ------------------------------------------------------------------------------


def attention_by_hand(layer: Any, x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Causal attention of one text (n_pos, d_model), from the weights alone."""
    n, width = x.shape
    size = width // heads
    qkv = (x @ layer.attention.query_key_value.weight.T + layer.attention.query_key_value.bias)
    q, k, v = (part.squeeze(2).transpose(0, 1) for part in
               qkv.view(n, heads, 3, size).split(1, dim=2))
    turned = cos.shape[-1]

    def rotate(t: Tensor) -> Tensor:
        head, tail = t[..., :turned], t[..., turned:]
        a, b = head.chunk(2, dim=-1)
        return torch.cat([head * cos + torch.cat([-b, a], dim=-1) * sin, tail], dim=-1)

    scores = rotate(q) @ rotate(k).mT / math.sqrt(size)
    scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
    mixed = (scores.softmax(dim=-1) @ v).transpose(0, 1).reshape(n, width)
    return mixed @ layer.attention.dense.weight.T + layer.attention.dense.bias


def forward_by_hand(model: Any, ids: Tensor, mlp: Callable[[int, Tensor], Tensor]
                    ) -> tuple[Tensor, list[Tensor]]:
    """Logits of one text, and each layer's MLP input, of a parallel GPT-NeoX."""
    body = model.gpt_neox
    h = body.embed_in.weight[ids]
    cos, sin = (part[0] for part in body.rotary_emb(h[None], torch.arange(len(ids))[None]))
    read = []
    for i, layer in enumerate(body.layers):
        first, second = (
            nn.functional.layer_norm(h, h.shape[-1:], norm.weight, norm.bias,
                                     model.config.layer_norm_eps)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm))
        read.append(second)
        h = h + attention_by_hand(layer, first, model.config.num_attention_heads, cos, sin)
        h = h + mlp(i, second)
    norm = body.final_layer_norm
    h = nn.functional.layer_norm(h, h.shape[-1:], norm.weight, norm.bias,
                                 model.config.layer_norm_eps)
    return h @ model.get_output_embeddings().weight.T, read


def real_mlp(model: Any) -> Callable[[int, Tensor], Tensor]:
    """The model's own MLP by its weights, as a replacement."""
    def mlp(layer: int, x: Tensor) -> Tensor:
        part = model.gpt_neox.layers[layer].mlp
        hidden = nn.functional.gelu(x @ part.dense_h_to_4h.weight.T + part.dense_h_to_4h.bias)
        return hidden @ part.dense_4h_to_h.weight.T + part.dense_4h_to_h.bias
    return mlp


def odd(layer: int, x: Tensor) -> Tensor:
    """A replacement that depends on layer and input."""
    return torch.sin(x) * (layer + 1) + x.roll(1, dims=-1)


@pytest.mark.parametrize("layers", [None, [1], [0, 2]], ids=str)
@pytest.mark.parametrize("replacement", [odd, zero_ablation], ids=["odd", "zero"])
def test_replaced_mlps_are_a_forward_pass_with_other_mlps(replacement, layers):
    model, ids = tiny_model(), torch.from_numpy(tokens(9))
    own = real_mlp(model)

    def mixed(layer: int, x: Tensor) -> Tensor:
        changed = layers is None or layer in layers
        return replacement(layer, x) if changed else own(layer, x)

    untouched, _ = forward_by_hand(model, ids, own)
    assert torch.allclose(model(input_ids=ids[None]).logits[0], untouched, atol=1e-5)
    with replaced_mlps(model, replacement, layers):
        found = model(input_ids=ids[None]).logits[0]
    expected, _ = forward_by_hand(model, ids, mixed)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, untouched, atol=1e-2)


def test_an_mlp_that_is_replaced_is_not_computed():
    model, called = tiny_model(), []
    for layer, module in enumerate(mlps(model)):
        module.register_forward_hook(lambda *_, layer=layer: called.append(layer))
    ids = torch.from_numpy(tokens(6))[None]
    with replaced_mlps(model, zero_ablation, [0, 2]):
        model(input_ids=ids)
    assert called == [1]
    model(input_ids=ids)
    assert called == [1, 0, 1, 2]


def test_zero_ablation_equals_mlps_whose_weights_are_zero():
    model, ids = tiny_model(), torch.from_numpy(tokens(9))[None]
    with replaced_mlps(model, zero_ablation):
        found = model(input_ids=ids).logits
    for mlp in mlps(model):
        mlp.dense_4h_to_h.weight.zero_()
        mlp.dense_4h_to_h.bias.zero_()
    assert torch.equal(found, model(input_ids=ids).logits)


def hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def test_no_hook_stays_behind():
    model, ids = tiny_model(), torch.from_numpy(tokens(5))[None]
    before, count = model(input_ids=ids).logits, hooks(model)
    with pytest.raises(RuntimeError, match="mine"), replaced_mlps(model, odd):
        raise RuntimeError("mine")
    assert hooks(model) == count and torch.equal(model(input_ids=ids).logits, before)

    def fails(layer: int, x: Tensor) -> Tensor:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), replaced_mlps(model, fails):
        model(input_ids=ids)
    assert hooks(model) == count
    with pytest.raises(KeyError), replaced_mlps(model, odd, [0, 99]):
        pass
    assert hooks(model) == count
    with pytest.raises(IndexError):
        mlp_sites(model, ids + 10_000, torch.ones_like(ids, dtype=torch.bool))
    assert hooks(model) == count


# --- sites ---------------------------------------------------------------------------------------


def test_mlp_sites_are_the_second_layer_norm_and_the_mlp():
    corpus = tiny_corpus()
    model = model_for(corpus)
    _, ids, mask = next(batches(corpus, [0, 1, 2, 3], 4, CPU))
    assert not mask.all()
    found = mlp_sites(model, ids, mask)
    normed: list[Tensor] = []
    handles = [layer.post_attention_layernorm.register_forward_hook(
        lambda module, args, output: normed.append(output)) for layer in model.gpt_neox.layers]
    model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    assert torch.equal(found.inputs, torch.stack([x[mask] for x in normed]))
    expected = torch.stack([real_mlp(model)(i, x) for i, x in enumerate(found.inputs)])
    assert torch.allclose(found.outputs, expected, atol=1e-12)


def test_mlp_sites_do_not_depend_on_padding():
    corpus = tiny_corpus()
    model = model_for(corpus)
    _, ids, mask = next(batches(corpus, range(4), 4, CPU))
    together = mlp_sites(model, ids, mask)
    end = 0
    for row in range(4):
        one = ids[row][mask[row]]
        start, end = end, end + len(one)
        alone = mlp_sites(model, one[None], torch.ones(1, len(one), dtype=torch.bool))
        _, read = forward_by_hand(model, one, real_mlp(model))
        assert torch.allclose(together.inputs[:, start:end], alone.inputs, atol=1e-6)
        assert torch.allclose(alone.inputs, torch.stack(read), atol=1e-5)
    assert end == together.inputs.shape[1]


# --- other families ------------------------------------------------------------------------------


def gated_mlp(part: Any, x: Tensor) -> Tensor:
    """A Llama-type MLP from its weights: SiLU of the gate, times the rest."""
    def linear(module: nn.Linear, x: Tensor) -> Tensor:
        y = x @ module.weight.T
        return y if module.bias is None else y + module.bias
    gate = linear(part.gate_proj, x)
    return linear(part.down_proj, gate * gate.sigmoid() * linear(part.up_proj, x))


@pytest.mark.parametrize("family", LLAMA_TYPE)
def test_mlp_sites_of_a_llama_do_not_depend_on_padding(family):
    corpus = tiny_corpus()
    # In float32, as in use: transformers' softmax is NaN for a float64 row that is all masked, as
    # padding beyond a sliding window is.
    model = tiny(family, vocabulary=len(corpus.tokenizer), dtype=torch.float32)
    _, ids, mask = next(batches(corpus, range(4), 4, CPU))
    assert not mask.all()
    together = mlp_sites(model, ids, mask)
    normed: list[Tensor] = []
    handles = [layer.post_attention_layernorm.register_forward_hook(
        lambda module, args, output: normed.append(output[0])) for layer in model.model.layers]
    for row in range(4):
        one = ids[row][mask[row]]
        model(input_ids=one[None])
        start = int(mask[:row].sum())
        part = slice(start, start + len(one))
        assert torch.allclose(together.inputs[:, part], torch.stack(normed), atol=1e-5)
        normed.clear()
    for handle in handles:
        handle.remove()
    expected = torch.stack([gated_mlp(mlp, x) for mlp, x in
                            zip(mlps(model), together.inputs, strict=True)])
    assert torch.allclose(together.outputs, expected, atol=1e-5)


@pytest.mark.parametrize("family", LLAMA_TYPE)
def test_replaced_mlps_of_a_llama(family):
    model, ids = tiny(family), torch.from_numpy(tokens(9))[None]
    clean, count = model(input_ids=ids).logits, hooks(model)
    parts = mlps(model)
    with replaced_mlps(model, lambda layer, x: gated_mlp(parts[layer], x)):
        assert torch.allclose(model(input_ids=ids).logits, clean, atol=1e-10)
    with replaced_mlps(model, zero_ablation, [1]):
        without = model(input_ids=ids).logits
    assert hooks(model) == count and not torch.allclose(without, clean, atol=1e-2)
    for part in (parts[1].down_proj.weight, parts[1].down_proj.bias):
        if part is not None:
            part.zero_()
    assert torch.equal(model(input_ids=ids).logits, without)


# --- loss and batches ----------------------------------------------------------------------------


def test_loss_of_next_tokens_is_torchs_on_single_texts():
    corpus = tiny_corpus()
    model = model_for(corpus)
    _, ids, mask = next(batches(corpus, range(5), 5, CPU))
    together = next_tokens(ids, mask).loss(model(input_ids=ids, attention_mask=mask).logits)
    expected = []
    for row in range(5):
        one = ids[row][mask[row]]
        logits = model(input_ids=one[None]).logits[0]
        logs = logits.log_softmax(dim=-1)
        expected += [-float(logs[i, one[i + 1]]) for i in range(len(one) - 1)]
    assert together.shape == (int(mask.sum()) - 5,)
    np.testing.assert_allclose(together.numpy(), expected, rtol=1e-5)


def test_passes_are_coarser_and_fused_on_a_gpu_within_the_block_alone():
    model = tiny_model()

    def state() -> tuple[str, str]:
        return torch.get_float32_matmul_precision(), model.config._attn_implementation

    before = state()
    assert before == ("highest", "eager")
    with counting_precision(model):
        assert state() == before
    with pretended_gpu() as device, pytest.raises(KeyError):
        model.to(device)
        with counting_precision(model):
            assert state() == ("high", "sdpa")
            raise KeyError
    assert state() == before


def test_batches_hold_every_cell_once_in_the_given_order():
    corpus = tiny_corpus()
    order = [7, 2, 5, 0, 11]
    seen: list[int] = []
    for rows, ids, mask in batches(corpus, order, 2, CPU):
        assert ids.shape[1] == corpus.lengths[rows].max()
        for row, cell in enumerate(rows):
            expected = corpus.tokens[cell][corpus.mask[cell]]
            np.testing.assert_array_equal(ids[row][mask[row]].numpy(), expected)
        seen += rows.tolist()
    assert seen == order


# --- loading -------------------------------------------------------------------------------------


def saved(folder: Path, **options: Any) -> Path:
    tiny_model(dtype=torch.float32, **options).save_pretrained(folder)
    return folder


def test_a_saved_model_is_loaded_as_it_was(tmp_path):
    model = load_model(saved(tmp_path))
    ids = torch.from_numpy(tokens(6))[None]
    expected = tiny_model(dtype=torch.float32)(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert not model.training and model.config._attn_implementation == "eager"


def test_a_missing_folder(tmp_path):
    with pytest.raises(InputError, match=r"`model` is .* but there is no folder"):
        load_model(tmp_path / "none")


def test_another_number_of_layers(tmp_path):
    profile = Profile(name="t", model=str(saved(tmp_path)), tokenizer="t", model_layers=24)
    with pytest.raises(InputError, match=r"asks for 24 layers.*has 3; set `model_layers: 3`"):
        get_model(profile, tiny_corpus())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_as_it_was(tmp_path, family):
    model = tiny(family, dtype=torch.float32, native_norms=True)
    model.save_pretrained(tmp_path)
    loaded, ids = load_model(tmp_path), torch.from_numpy(tokens(6))[None]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert type(loaded) is type(model) and loaded.config._attn_implementation == "eager"


def test_a_tied_unembedding_is_no_missing_weight(tmp_path):
    model = tiny("qwen2", dtype=torch.float32, native_norms=True)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_model(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_another_architecture_is_refused_before_its_weights_are_read(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20, n_positions=8)
                    ).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"GPT2LMHeadModel.*GPT-NeoX.*Llama.*BERT"):
        load_model(tmp_path)


def test_quantized_weights_are_refused_before_they_are_read(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="quantized"):
        load_model(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    saved(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize("family", ["gemma2", "bert", "llama"])
def test_a_model_in_a_folder_of_its_repository(tmp_path, family):
    model = tiny(family, dtype=torch.float32, native_norms=True)
    model.save_pretrained(tmp_path / "one" / "of-two")
    loaded = load_model(tmp_path, subfolder="one/of-two")
    ids = torch.from_numpy(tokens(6))[None]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.config._attn_implementation == "eager"
    with pytest.raises(InputError, match="check `model`"):
        load_model(tmp_path, subfolder="other")


@pytest.mark.parametrize("family", ["bert", "gemma2", "llama", "scgpt"])
def test_weights_of_layers_that_would_not_be_used_are_refused(tmp_path, family):
    """An adapter's, say; those of another head are left aside."""
    tiny(family, dtype=torch.float32, native_norms=True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["classifier.weight"] = torch.zeros(2, 16)
    save_file(tensors, path, metadata={"format": "pt"})
    load_model(tmp_path)
    heads_checked(tmp_path)
    name = next(one for one in tensors if ".1." in one and one.endswith("weight"))
    tensors[name.replace("weight", "lora_A.weight")] = torch.zeros(2, 16)
    save_file(tensors, path, metadata={"format": "pt"})
    for reader in (load_model, heads_checked):
        with pytest.raises(InputError, match=r"which would not be used: .*lora_A\.weight"):
            reader(tmp_path)


@pytest.mark.parametrize("family", ["llama", "bert", "gemma2", "scgpt"])
def test_weights_that_are_missing_are_named(tmp_path, family):
    """As in a checkpoint tuned to call types, which has another head, or one of FlashAttention's
    layers, whose q, k and v have another name."""
    tiny(family).float().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    lost = sorted(name for name in tensors if ".1." in name)
    for name in lost:
        tensors[name.replace(".1.", ".1.flash.")] = tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    for reader in (load_model, heads_checked):
        with pytest.raises(InputError) as error:
            reader(tmp_path)
        told = str(error.value)
        assert f"it lacks the weights {', '.join(lost[:3])} and {len(lost) - 3} more" in told
        assert "\n" not in told


def heads_checked(folder: Path) -> None:
    """`check_checkpoint` of a folder's model."""
    config = load_config(folder)
    kind = getattr(transformers, check_supported(config.model_type, "").auto)
    with torch.device("meta"):
        model = kind.from_config(config)
    check_checkpoint(str(folder), "", model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_what_loads_is_not_refused_by_its_names(tmp_path, family, tied):
    model = tiny(family, dtype=torch.float32, native_norms=True)
    if family != "scgpt":
        model.config.tie_word_embeddings = tied
        model.tie_weights()
    model.save_pretrained(tmp_path)
    heads_checked(tmp_path)
    path = tmp_path / "model.safetensors"
    body = architecture_of(model).body + "."
    named = {name.removeprefix(body).replace("LayerNorm.weight", "LayerNorm.gamma"): one
             for name, one in load_file(path).items()}
    if family not in ("bert", "bert-gelu"):  # others have their head beside a body of that name
        named = load_file(path)
    save_file(named, path, metadata={"format": "pt"})
    load_model(tmp_path)
    heads_checked(tmp_path)


def test_a_head_for_cell_types_is_none_for_genes(tmp_path):
    """As Geneformer's own code leaves it when it is tuned to tell types apart."""
    tuned = transformers.BertForSequenceClassification(tiny("bert").config)
    tuned.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(config)
    for reader in (load_model, lambda folder: check_checkpoint(str(folder), "", model)):
        with pytest.raises(InputError, match=r"lacks the weights cls\.predictions\."):
            reader(tmp_path)


def test_a_model_that_answers_nothing_is_not_asked(monkeypatch, tmp_path):
    tiny("bert", dtype=torch.float32, vocabulary=2000).save_pretrained(tmp_path / "bert")
    corpus = tiny_corpus()
    profile = tiny_profile(monkeypatch, tmp_path, model=str(tmp_path / "bert"), tokenizer="x",
                           model_layers=None, human_layer=1)
    with pytest.raises(InputError, match="fills in what is masked and writes no answer"):
        get_model(profile, corpus)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def no_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def lacking_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def other_shape(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"] = torch.zeros(3, 3)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("damage", "told"), [
    (truncate, "file not fully covered"), (empty, "header too small"),
    (lacking_weights, "lacks the weights"),
    (other_shape, r"dense_h_to_4h.weight has the shape \(3, 3\), and by")])
def test_a_broken_checkpoint_is_told_before_any_work(tmp_path, damage, told):
    damage(saved(tmp_path))
    with pytest.raises(InputError, match=told):
        heads_checked(tmp_path)


def test_a_folder_without_weights_is_told_before_any_work(tmp_path):
    """The plan accepted it, and there was no word of converting `pytorch_model.bin`."""
    path = saved(tmp_path) / "model.safetensors"
    torch.save(load_file(path), tmp_path / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(InputError, match=r"has no safetensors weights.*convert it first"):
        heads_checked(tmp_path)


@pytest.mark.parametrize("damage", [truncate, empty, no_config, lacking_weights, other_shape])
def test_a_broken_checkpoint(tmp_path, damage):
    damage(saved(tmp_path))
    with pytest.raises(InputError, match="check `model` in the profile") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["gpt_neox.layers.1.mlp.dense_h_to_4h.weight",
                                  "gpt_neox.final_layer_norm.bias"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, name, value):
    path = saved(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[3] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} holds a value.*check `model` in the profile"):
        load_model(tmp_path)


def test_tokens_beyond_the_models_vocabulary_or_length():
    corpus = tiny_corpus()
    with pytest.raises(InputError, match="do not belong together"):
        check_vocabulary(tiny_model(vocabulary=int(corpus.tokens.max())), corpus)
    model = model_for(corpus)
    check_vocabulary(model, corpus)
    model.config.max_position_embeddings = corpus.tokens.shape[1] - 1
    with pytest.raises(InputError, match="lower `genes_per_cell`"):
        check_vocabulary(model, corpus)


# --- the small model -----------------------------------------------------------------------------

QUICK = {"model_steps": 4, "model_width": 16, "model_batch_cells": 4, "validation_share": 0.25}


def test_the_small_model_learns_from_training_cells_only(monkeypatch, tmp_path):
    profile = tiny_profile(monkeypatch, tmp_path, **QUICK)
    corpus = tiny_corpus()
    changed = corpus.tokens.copy()
    changed[corpus.held_out] = 1
    a, curve = train_small_model(corpus, profile, progress=False)
    b, _ = train_small_model(replace(corpus, tokens=changed), profile, progress=False)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert curve.step == [1, 2, 3, 4] and not a.training
    assert abs(curve.loss[0] - math.log(len(corpus.tokenizer))) < 0.5
    longer = profile.model_copy(update={"model_steps": 40})
    assert train_small_model(corpus, longer, progress=False)[1].loss[-1] < curve.loss[0] - 1


def test_a_small_model_that_does_not_learn_is_told_at_once(monkeypatch, tmp_path):
    profile = tiny_profile(monkeypatch, tmp_path, **{**QUICK, "model_steps": 100})
    losses: list[int] = []

    def diverged(asked: Asked, logits: Tensor) -> Tensor:
        losses.append(1)
        return logits.sum(dim=-1)[asked.at] * (math.nan if len(losses) > 2 else 1)

    monkeypatch.setattr(Asked, "loss", diverged)
    with pytest.raises(InputError, match=r"step 3 .*lower `model_learning_rate`"):
        get_model(profile, tiny_corpus())
    assert not (profile.results / "language_model").exists()


def test_the_small_model_is_trained_once_and_kept(monkeypatch, tmp_path):
    profile = tiny_profile(monkeypatch, tmp_path, **QUICK)
    corpus = tiny_corpus()
    trained: list[int] = []
    train = train_small_model

    def counted(*args: Any, **options: Any) -> Any:
        trained.append(1)
        return train(*args, **options, progress=False)

    monkeypatch.setattr("scfm_circuits.models.loading.train_small_model", counted)
    first, curve = get_model(profile, corpus)
    again, same_curve = get_model(profile, corpus)
    assert len(trained) == 1 and curve == same_curve
    ids = torch.from_numpy(corpus.tokens[:2])
    assert torch.equal(first(input_ids=ids).logits, again(input_ids=ids).logits)
    get_model(profile.model_copy(update={"expansion": 2}), corpus)
    assert len(trained) == 1
    get_model(profile.model_copy(update={"model_learning_rate": 1e-3}), corpus)
    assert len(trained) == 2
    get_model(profile, replace(corpus, held_out=~corpus.held_out))
    assert len(trained) == 3


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json",
                                  "training.json"])
@pytest.mark.parametrize("lose", [Path.unlink, lambda path: path.write_bytes(b""),
                                  lambda path: os.truncate(path, path.stat().st_size // 2)],
                         ids=["deleted", "emptied", "cut"])
def test_a_small_model_that_is_not_whole_is_trained_again(monkeypatch, tmp_path, capsys, file,
                                                          lose):
    profile, corpus = tiny_profile(monkeypatch, tmp_path, **QUICK), tiny_corpus()
    first, curve = get_model(profile, corpus)
    folder = profile.results / "language_model"
    weights = [one.clone() for one in first.parameters()]  # they are mapped, not read
    lose(folder / file)
    capsys.readouterr()
    again, same_curve = get_model(profile, corpus)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "is made again" in line]
    assert said.startswith(f"{os.path.relpath(folder)} is not whole ({file} ")
    assert same_curve == curve and all(map(torch.equal, weights, again.parameters()))


def test_the_models_type_is_the_profiles_but_for_circuits(tmp_path):
    corpus = tiny_corpus()
    model_for(corpus, dtype=torch.float32).save_pretrained(tmp_path)
    profile = Profile(name="t", model=str(tmp_path), tokenizer="t", model_layers=None,
                      human_layer=0, model_precision="bfloat16")
    half, exact = (get_model(profile, corpus, exact=one)[0] for one in (False, True))
    assert {one.dtype for one in half.parameters()} == {torch.bfloat16}
    assert {one.dtype for one in exact.parameters()} == {torch.float32}


# --- answers -------------------------------------------------------------------------------------


class Scripted(nn.Module):
    """A model that answers with given tokens, whatever it is asked, and keeps what it was asked."""

    def __init__(self, script: list[int], vocabulary: int) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.script, self.vocabulary = script, vocabulary
        self.asked: list[list[int]] = []

    def forward(self, input_ids: Tensor, past_key_values: int | None = None,
                use_cache: bool = True) -> Any:
        self.asked.append(input_ids[0].tolist())
        step = past_key_values or 0
        logits = torch.zeros(1, input_ids.shape[1], self.vocabulary)
        logits[0, -1, self.script[step % len(self.script)]] = 1
        return type("Output", (), {"logits": logits, "past_key_values": step + 1})()


def answer(text: str, *, ended: bool = True, new_tokens: int = 24) -> tuple[str, Scripted]:
    tokenizer = tiny_corpus().tokenizer
    script = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * ended
    model = Scripted(script, len(tokenizer))
    return answer_prompt(model, tokenizer, np.array([3, 1, 4]), new_tokens), model


@pytest.mark.parametrize("label", [*LABELS, "T cell, approx. naive", "St. X", "A. b. c."])
def test_an_answer_is_the_label_without_its_full_stop(label):
    assert answer(f" {label}.", new_tokens=200)[0] == label


def test_an_answer_that_goes_on_is_cut_at_its_first_full_stop():
    assert answer(" B cell. And a lot of other words follow here.", ended=False)[0] == "B cell"


def test_an_answer_without_an_end_has_at_most_the_given_tokens():
    found, model = answer(" CD8A LYZ CD8A LYZ", ended=False, new_tokens=5)
    assert len(model.asked) == 5
    tokenizer = tiny_corpus().tokenizer
    assert found == tokenizer.decode(tokenizer(" CD8A LYZ CD8A LYZ")["input_ids"][:5]).strip()


def test_the_prompt_is_asked_once_then_token_by_token():
    _, model = answer(" B cell.")
    assert model.asked[0] == [3, 1, 4] and all(len(one) == 1 for one in model.asked[1:])


def test_predictions_do_not_see_the_answer():
    corpus = tiny_corpus()
    script = [*corpus.tokenizer(" B cell.")["input_ids"], corpus.tokenizer.eos_token_id]
    for cell in range(3):
        model = Scripted(script, len(corpus.tokenizer))
        assert predict_answers(model, corpus, [cell]) == ["B cell"]
        assert model.asked[0] == corpus.tokens[cell, : corpus.answer_start[cell]].tolist()


def test_the_cache_changes_no_answer():
    corpus = tiny_corpus()
    model = model_for(corpus, dtype=torch.float32)
    prompt = corpus.tokens[0][: corpus.answer_start[0]]
    ids = prompt.tolist()
    for _ in range(5):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    produced = ids[len(prompt):]
    assert corpus.tokenizer.eos_token_id not in produced
    text = corpus.tokenizer.decode(produced, clean_up_tokenization_spaces=False)
    assert answer_prompt(model, corpus.tokenizer, prompt, 5) == text.partition(".")[0].strip()


@pytest.mark.parametrize("runs", [32, 1], ids=["by runs of one length", "by rows"])
@pytest.mark.parametrize("padding", ["none", "right", "between"])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32], ids=str)
def test_sites_are_written_where_they_are_wanted(kind, padding, runs, monkeypatch):
    """Into the middle of a larger tensor, in its type; nothing else of it is touched."""
    monkeypatch.setattr(mlp_sites_module, "RUNS", runs)
    model = tiny_model()
    ids = torch.from_numpy(tokens(24).reshape(4, 6))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padding != "none":
        mask[:2, 4:] = mask[2, 5:] = False
    if padding == "between":
        mask[3, 2] = False
    n = int(mask.sum())
    expected = mlp_sites(model, ids, mask)
    room = torch.full((2, 3, n + 4, 16), 7, dtype=kind)
    found = mlp_sites(model, ids, mask, Sites(*room[:, :, 2 : n + 2]))
    for part, whole, its in zip(found, room, expected, strict=True):
        assert torch.equal(part, its.to(kind)) and part.data_ptr() == whole[:, 2:].data_ptr()
        assert (whole[:, :2] == 7).all() and (whole[:, n + 2 :] == 7).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_do_not_depend_on_padding_that_the_model_is_not_told_of(family):
    """Right of the tokens, which no supported family lets them attend to."""
    model = tiny(family)
    model.set_attn_implementation("sdpa")
    ids = torch.from_numpy(tokens(24).reshape(4, 6))
    mask = torch.arange(6) < torch.tensor([3, 4, 4, 6])[:, None]
    told, untold = (mlp_sites(model, ids, mask, masked=masked) for masked in (True, False))
    other = mlp_sites(model, torch.where(mask, ids, 1), mask, masked=False)
    for one, two, three in zip(told, untold, other, strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-6) and torch.equal(two, three)
