"""Parts and weights of every supported family, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_corpus, tiny_profile, tiny_transcoders, tokens
from tiny_architectures import BERT_TYPE, FAMILIES, LLAMA_TYPE, tiny
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from scfm_circuits import InputError
from scfm_circuits.circuits.frozen import freeze
from scfm_circuits.circuits.search import trace_feature
from scfm_circuits.models.architectures import (
    architecture_of,
    check_supported,
    decoder,
    decoder_layers,
    final_norm,
    layer_weights,
    neuron_rows,
)
from scfm_circuits.models.mlp_sites import mlp_sites, mlps, replaced_mlps, zero_ablation
from scfm_circuits.transcoders.training.run import TrainingRun
from scfm_circuits.transcoders.validation import (
    compare_configurations,
    fraction_of_variance_unexplained,
)

SHARED = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
          "intermediate_size": 8, "pad_token_id": 0}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_are_those_the_forward_pass_uses(family):
    model = tiny(family, layers=2)
    order: list[object] = []
    for part in (decoder(model), final_norm(model), *(
            p for layer in decoder_layers(model) for p in
            (layer, layer.input_layernorm, layer.post_attention_layernorm, layer.mlp))):
        part.register_forward_hook(lambda module, args, output: order.append(module))
    model(input_ids=torch.arange(5)[None])
    expected: list[object] = []
    for layer in decoder_layers(model):
        expected += [layer.input_layernorm, layer.post_attention_layernorm, layer.mlp, layer]
    assert order == [*expected, final_norm(model), decoder(model)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_of_neurons_give_what_their_function_reads(family):
    model = tiny(family, layers=2)
    seen: dict[str, torch.Tensor] = {}
    mlp = decoder_layers(model)[1].mlp
    function = getattr(mlp, "act", None) or mlp.act_fn
    mlp.register_forward_hook(lambda module, args, output: seen.update(site=args[0]))
    function.register_forward_hook(lambda module, args, output: seen.update(read=args[0]))
    model(input_ids=torch.arange(5)[None])
    rows = neuron_rows(model)[1]
    bias = seen["read"] - seen["site"] @ rows.T
    # The same at every token, whatever was read.
    assert torch.allclose(bias, bias[:, :1].expand_as(bias), atol=1e-10)
    assert rows.shape[1] == seen["site"].shape[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_mlp_site_reads_the_second_norm_and_its_output_is_added(family):
    model = tiny(family)
    seen: dict[str, torch.Tensor] = {}
    layer = decoder_layers(model)[1]
    attention = getattr(layer, "self_attn", None) or layer.attention
    for name, part in (("attention", attention), ("norm2", layer.post_attention_layernorm),
                       ("mlp", layer.mlp), ("layer", layer)):
        def keep(module, args, kwargs, output, name=name):
            seen[f"{name}.in"] = args[0] if args else kwargs["hidden_states"]
            seen[f"{name}.out"] = output[0] if isinstance(output, tuple) else output
        part.register_forward_hook(keep, with_kwargs=True)
    model(input_ids=torch.arange(6)[None])
    assert torch.equal(seen["mlp.in"], seen["norm2.out"])
    total = seen["layer.in"] + seen["attention.out"] + seen["mlp.out"]
    assert torch.allclose(seen["layer.out"], total, atol=1e-12)
    parallel = architecture_of(model).parallel(model.config)
    before = seen["layer.in"] if parallel else seen["layer.in"] + seen["attention.out"]
    assert torch.allclose(seen["norm2.in"], before, atol=1e-12)
    assert parallel == (family in ("parallel", "neox-no-biases"))


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_their_modules(family):
    model = tiny(family, native_norms=True, dtype=torch.float32)
    architecture, x = architecture_of(model), torch.randn(5, 16) + 0.5
    for module in (final_norm(model), decoder_layers(model)[0].input_layernorm):
        norm = architecture.norm(module)
        centred = x - x.mean(dim=-1, keepdim=True) if norm.centred else x
        found = norm.gain * centred / norm.scale(x)[:, None] + norm.bias
        assert torch.allclose(found, module(x), atol=1e-6)
        assert norm.centred == (family not in LLAMA_TYPE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("heads, value_heads, size", [(4, 4, 4), (4, 2, 4), (4, 1, 6), (2, 1, 16)])
def test_weights_give_the_attention_modules_output(family, heads, value_heads, size):
    model = tiny(family, heads=heads, value_heads=value_heads, head_size=size)
    layer, weights = decoder_layers(model)[1], layer_weights(model)[1]
    if family in LLAMA_TYPE:
        assert weights.w_v.shape == (heads, size, 16) and len(weights.values) == value_heads
    attention = getattr(layer, "self_attn", None) or layer.attention
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    attention.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(
            ((args[0] if args else kwargs["hidden_states"])[0], output[0][0], output[1][0])),
        with_kwargs=True)
    model(input_ids=torch.from_numpy(tokens(7))[None])
    read, wrote, pattern = seen[0]
    values = torch.einsum("hkd,sd->hsk", weights.w_v, read) + weights.b_v[:, None]
    found = torch.einsum("hts,hsk,hok->to", pattern, values, weights.w_o) + weights.b_o
    assert torch.allclose(found, wrote, atol=1e-12)


def test_biases_are_there_where_the_family_has_them():
    def has(family: str) -> tuple[bool, bool, bool]:
        model = tiny(family)
        weights, own = layer_weights(model)[0], architecture_of(model)
        norm = own.norm(decoder_layers(model)[0].get_submodule(own.steps[0].norm))
        return tuple(bool(b.any()) for b in (weights.b_v, weights.b_o, norm.bias))

    assert has("parallel") == (True, True, True)
    assert has("neox-no-biases") == (False, False, True)
    assert has("llama") == has("mistral") == (False, False, False)
    assert has("llama-biases") == (True, True, False)
    assert has("qwen2") == (True, False, False)


def test_weights_are_views_of_the_models_own():
    model = tiny("qwen2")
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights = layer_weights(model)[0]
    for tensor in (weights.values, weights.value_bias, weights.w_o):
        assert tensor.untyped_storage().data_ptr() in own


OTHERS = {
    "GPT2LMHeadModel": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20, n_positions=8)),
    # Like Llama, but they scale by 1 + gain in one place, or normalise q and k.
    "GemmaForCausalLM": lambda: GemmaForCausalLM(GemmaConfig(**SHARED, head_dim=4)),
    "Qwen3ForCausalLM": lambda: Qwen3ForCausalLM(Qwen3Config(**SHARED, head_dim=4)),
    "Linear": lambda: torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_family_is_refused_by_name(name):
    model = OTHERS[name]()
    for use in (architecture_of, decoder_layers, lambda m: freeze(m, None, [1, 2])):
        with pytest.raises(InputError, match=rf"{name}.*GPT-NeoX.*Llama.*BERT"):
            use(model)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(InputError, match=r"BertModel.*AutoModelForMaskedLM"):
        architecture_of(tiny("bert").bert)
    with pytest.raises(InputError, match=r"LlamaModel.*AutoModelForCausalLM"):
        architecture_of(tiny("llama").model)


def test_no_model_type():
    with pytest.raises(InputError, match="The model is a thing"):
        check_supported(None, "thing")


@pytest.mark.parametrize("family", FAMILIES)
def test_freezing_needs_eager_attention(family):
    model = tiny(family)
    model.set_attn_implementation("sdpa")
    with pytest.raises(InputError, match="attn_implementation='eager'"):
        freeze(model, tiny_transcoders(model), tokens(4))


# --- norms elsewhere than in front of a branch ----------------------------------------------------


def _parts_of(model: Any, ids: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """What went into and came out of named modules of each layer."""
    seen: dict[str, list[torch.Tensor]] = {}
    for layer in decoder_layers(model):
        for name, part in (("", layer), *layer.named_modules()):
            def keep(module, args, kwargs, output, name=name):
                read = args[0] if args else kwargs.get("hidden_states")
                seen.setdefault(f"{name}.in", []).append(read)
                seen.setdefault(f"{name}.out", []).append(
                    output[0] if isinstance(output, tuple) else output)
            part.register_forward_hook(keep, with_kwargs=True)
    model(input_ids=ids)
    return seen


def test_gemma_2_normalises_what_it_reads_and_what_it_writes():
    ids = torch.from_numpy(tokens(7))[None]
    seen = _parts_of(tiny("gemma2"), ids)
    sites = mlp_sites(tiny("gemma2"), ids, torch.ones_like(ids, dtype=torch.bool))
    for layer in range(3):
        middle = seen["pre_feedforward_layernorm.in"][layer][0]
        assert torch.equal(sites.inputs[layer], seen["mlp.in"][layer][0])
        # What is added is what the site writes, behind its norm.
        assert torch.allclose(middle + sites.outputs[layer], seen[".out"][2 * layer][0])
        assert torch.allclose(seen["input_layernorm.in"][layer][0]
                              + seen["post_attention_layernorm.out"][layer][0], middle)


def test_bert_normalises_the_stream():
    ids = torch.from_numpy(tokens(7))[None]
    model = tiny("bert")
    sites = mlp_sites(tiny("bert"), ids, torch.ones_like(ids, dtype=torch.bool))
    seen = _parts_of(model, ids)
    for layer in range(3):
        stream = seen["attention.output.LayerNorm.out"][layer][0]
        assert torch.equal(sites.inputs[layer], stream)
        assert torch.allclose(seen["output.LayerNorm.in"][layer][0], stream + sites.outputs[layer])


@pytest.mark.parametrize("family", ["gemma2", *BERT_TYPE])
def test_replaced_mlps_pass_the_norms_that_are_not_theirs(family):
    model, ids = tiny(family), torch.from_numpy(tokens(9))[None]
    clean, parts = model(input_ids=ids).logits, mlps(model)
    with replaced_mlps(model, lambda layer, x: parts[layer](x)):
        assert torch.allclose(model(input_ids=ids).logits, clean, atol=1e-12)
    with replaced_mlps(model, zero_ablation, [1]):
        without = model(input_ids=ids).logits
    assert not torch.allclose(without, clean, atol=1e-3)
    assert torch.equal(model(input_ids=ids).logits, clean)
    silent = [one for name, one in decoder_layers(model)[1].named_parameters()
              if name.startswith(("output.dense", "post_feedforward"))]
    for one in silent:  # gemma's gain is this and 1
        one.fill_(-1.0 if family == "gemma2" else 0.0)
    assert torch.allclose(model(input_ids=ids).logits, without, atol=1e-12)


@pytest.mark.parametrize("family", BERT_TYPE)
def test_sites_of_an_encoder_do_not_see_the_padding(family):
    """Whoever asks, and however many padded tokens stand behind."""
    model = tiny(family)
    ids = torch.from_numpy(tokens(12))[None].repeat(2, 1)
    mask = torch.arange(12) < torch.tensor([[7], [12]])
    ids[0, 7:] = 0
    alone = mlp_sites(model, ids[:1, :7], mask[:1, :7])
    for masked in (True, False):
        together = mlp_sites(model, ids, mask, masked=masked)
        assert (together.inputs[:, :7] - alone.inputs).abs().max() < 1e-12


# --- what needs only the MLP sites ---------------------------------------------------------------


@pytest.mark.parametrize("family", LLAMA_TYPE)
def test_transcoders_learn_the_mlps_of_a_llama(monkeypatch, tmp_path, family):
    profile = tiny_profile(monkeypatch, tmp_path, batch_tokens=64, training_tokens=64 * 150,
                           buffer_tokens=512, warmup_steps=5, expansion=4, learning_rate=1e-2,
                           forward_cells=4)
    corpus = tiny_corpus(20)
    model = tiny(family, layers=2, vocabulary=len(corpus.tokenizer), dtype=torch.float32,
                 native_norms=True)
    run = TrainingRun(model, corpus, profile)
    run.run(until=1, progress=False)
    held_out = np.flatnonzero(corpus.held_out)
    [before] = fraction_of_variance_unexplained(model, run.transcoders, corpus, held_out, 4)
    run = TrainingRun(model, corpus, profile)
    run.run(progress=False)
    [after] = fraction_of_variance_unexplained(model, run.transcoders, corpus, held_out, 4)
    assert (after < 0.8 * before).all()
    table = compare_configurations(model, run.transcoders, corpus, held_out, 4).scores
    table = table[table["layer"] == -1].set_index("configuration")
    original, *others = table["kl"]
    assert original == 0 and all(kl > 0 for kl in others)


@pytest.mark.parametrize("family", LLAMA_TYPE)
def test_a_circuit_of_a_llama_adds_up(family):
    model = tiny(family)
    run = freeze(model, tiny_transcoders(model), tokens(8))
    circuit = trace_feature(run, 2, 5, 7, branches=6, depth=4, max_nodes=50)
    assert len(circuit.expansions) > 10 and circuit.closure_max_relative < 1e-10
    # In a sequential block attention of the target's own layer is upstream of it.
    whole = trace_feature(run, 2, 5, 7, branches=1000, depth=1, max_nodes=1000)
    assert {node.layer for node in whole.nodes.values() if node.kind == "head"} == {0, 1, 2}
