"""The stack of transcoders against single layers, and its files."""

from pathlib import Path

import pytest
import torch
import yaml
from helpers import tiny_model, tiny_transcoders
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_architectures import tiny
from torch import Tensor

from scfm_circuits import InputError
from scfm_circuits.common.files import read_json, write_json
from scfm_circuits.models.architectures import architecture_of, decoder_layers
from scfm_circuits.models.mlp_sites import mlp_sites, replaced_mlps, site_hooks
from scfm_circuits.transcoders.activations import keep_largest
from scfm_circuits.transcoders.transcoder import (
    Transcoders,
    Variant,
    load_transcoders,
    save_layers,
    save_transcoders,
)


@pytest.fixture
def transcoders() -> Transcoders:
    return tiny_transcoders(tiny_model())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def plain_layer(t: Transcoders, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations, z and y_hat of one layer, token by token and feature by feature."""
    pre = torch.empty(len(x), t.n_features, dtype=x.dtype)
    y = torch.empty_like(x)
    for n, token in enumerate(x):
        for f in range(t.n_features):
            pre[n, f] = t.W_enc[layer, f].dot(token - t.b_in[layer]) + t.b_enc[layer, f]
        y[n] = t.b_dec[layer] + sum(max(float(pre[n, f]), 0.0) * t.W_dec[layer, f]
                                    for f in range(t.n_features))
    return pre, pre.clamp(min=0), y


def test_the_stack_equals_each_layer_alone(transcoders, x):
    for layer in range(3):
        pre, z, y = plain_layer(transcoders, layer, x[layer])
        assert torch.allclose(transcoders.pre_activations(x)[layer], pre, atol=1e-12)
        assert torch.allclose(transcoders.encode(x)[layer], z, atol=1e-12)
        assert torch.allclose(transcoders(x)[layer], y, atol=1e-12)
        assert torch.allclose(transcoders.layer_pre_activations(layer, x[layer]), pre, atol=1e-12)
        assert torch.allclose(transcoders.replacement(layer, x[layer]), y, atol=1e-12)
    assert (pre < 0).any() and (pre > 0).any()


def test_one_layer_takes_any_leading_shape(transcoders, x):
    flat = transcoders.replacement(1, x[1])
    assert torch.allclose(transcoders.replacement(1, x[1][None, :, None])[0, :, 0], flat)


def test_start_has_unit_decoder_rows_and_no_biases():
    t = Transcoders(2, 64, 512).initialise(0)
    assert torch.allclose(t.W_dec.norm(dim=-1), torch.ones(2, 512))
    assert (t.W_dec.norm(dim=1) - 1).abs().min() > 0.5
    assert abs(float(t.W_enc.detach().std()) / (2 / 512) ** 0.5 - 1) < 0.02
    assert not any(bias.any() for bias in (t.b_enc, t.b_dec, t.b_in))
    again = Transcoders(2, 64, 512).initialise(0)
    assert torch.equal(t.W_enc, again.W_enc) and torch.equal(t.W_dec, again.W_dec)
    assert not torch.equal(t.W_enc[0], t.W_enc[1])
    assert not torch.equal(Transcoders(2, 64, 512).initialise(1).W_enc, t.W_enc)


def test_a_layer_starts_the_same_in_any_stack():
    whole = Transcoders(5, 8, 16).initialise(3)
    part = Transcoders(2, 8, 16).initialise(3, first_layer=3)
    assert torch.equal(part.W_enc, whole.W_enc[3:]) and torch.equal(part.W_dec, whole.W_dec[3:])


# --- variants ------------------------------------------------------------------------------------


VARIANTS = [Variant(), Variant("topk", 3), Variant("batchtopk", 3), Variant("jumprelu"),
            Variant("topk", 4, skip=True), Variant("relu", site="sae")]


def of_variant(variant: Variant) -> Transcoders:
    """Random transcoders; thresholds so high that they matter."""
    t = Transcoders(3, 16, 24, variant).double().requires_grad_(False)
    g = torch.Generator().manual_seed(6)
    for name, part in (*t.named_parameters(), *t.named_buffers()):
        part.copy_(torch.randn(part.shape, generator=g, dtype=part.dtype)
                   * (0.3 if name == "log_threshold" else 0.5))
    return t


def activations(t: Transcoders, layer: int, pre: Tensor) -> Tensor:
    """z of one token's pre-activations, feature by feature."""
    kind, k = t.variant.activation, t.variant.k
    z = torch.zeros_like(pre)
    largest = pre.argsort(descending=True)[:k].tolist()
    for f, value in enumerate(pre.tolist()):
        if kind in ("jumprelu", "batchtopk"):
            kept = value > float(t.log_threshold[layer, f].exp())
        else:
            kept = value > 0 and (kind == "relu" or f in largest)
        z[f] = value if kept else 0.0
    return z


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda one: f"{one.activation} {one.skip}")
def test_a_variant_equals_each_layer_alone(variant, x):
    t = of_variant(variant)
    for layer in range(3):
        pre = x[layer] @ t.W_enc[layer].T - t.W_enc[layer] @ t.b_in[layer] + t.b_enc[layer]
        z = torch.stack([activations(t, layer, token) for token in pre])
        y = z @ t.W_dec[layer] + t.b_dec[layer]
        assert torch.allclose(t.encode(x)[layer], z, atol=1e-12) and (z == 0).any() and z.any()
        assert torch.allclose(t.layer_activations(layer, x[layer]), z, atol=1e-12)
        assert torch.allclose(t.layer_activations(layer, x[layer][None, :, None])[0, :, 0], z)
        some = torch.tensor([4, 0, 2])
        assert torch.allclose(t.layer_activations(layer, x[layer], some), z[:, some], atol=1e-12)
        assert torch.allclose(t.decode(t.encode(x))[layer], y, atol=1e-12)
        if variant.skip:
            y = y + torch.stack([t.W_skip[layer] @ (token - t.b_in[layer]) for token in x[layer]])
        assert torch.allclose(t(x)[layer], y, atol=1e-12)
        assert torch.allclose(t.replacement(layer, x[layer]), y, atol=1e-12)


@settings(max_examples=60)
@given(values=st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=6),
       k=st.integers(1, 7))
def test_keep_largest_keeps_k_also_where_some_are_equal(values, k):
    z = torch.tensor(values, dtype=torch.float64)
    kept = keep_largest(z, k)
    for row, left in zip(z.tolist(), kept.tolist(), strict=True):
        assert sorted(left, reverse=True)[:k] == sorted(row, reverse=True)[:k]
        assert sorted(left, reverse=True)[k:] == [0.0] * max(0, 5 - k)
        assert all(one in (0.0, whole) for one, whole in zip(left, row, strict=True))


# --- files ---------------------------------------------------------------------------------------


def test_the_saved_layout_is_circuit_tracers(transcoders, tmp_path):
    save_transcoders(transcoders, tmp_path, "org/model", {"steps": 5})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml", "layer_0.safetensors", "layer_1.safetensors", "layer_2.safetensors",
        "training.json"]
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config == {
        "model_kind": "transcoder_set", "model_name": "org/model", "scan": None,
        "activation": "relu",
        "feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    for layer in range(3):
        tensors = load_file(tmp_path / f"layer_{layer}.safetensors")
        assert {key: tuple(value.shape) for key, value in tensors.items()} == {
            "W_enc": (24, 16), "W_dec": (24, 16), "b_enc": (24,), "b_dec": (16,)}
        assert all(value.dtype == torch.float32 for value in tensors.values())
    assert read_json(tmp_path / "training.json")["steps"] == 5


def test_the_input_mean_is_folded_into_the_saved_bias(transcoders, x, tmp_path):
    save_transcoders(transcoders, tmp_path, "m", {})
    loaded = load_transcoders(tmp_path)
    assert not loaded.b_in.any() and transcoders.b_in.abs().min() > 0
    assert torch.allclose(loaded.pre_activations(x.float()),
                          transcoders.pre_activations(x).float(), atol=2e-5)
    assert torch.allclose(loaded(x.float()), transcoders(x).float(), atol=2e-4)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    # As another program computes it, knowing nothing of an input mean.
    saved = load_file(tmp_path / "layer_2.safetensors")
    z = (x[2].float() @ saved["W_enc"].T + saved["b_enc"]).relu()
    y = z @ saved["W_dec"] + saved["b_dec"]
    assert torch.allclose(y, transcoders.replacement(2, x[2]).float(), atol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda one: f"{one.activation} {one.skip}")
def test_a_variant_is_saved_and_comes_back(variant, x, tmp_path):
    t = of_variant(variant)
    save_transcoders(t, tmp_path, "m", {})
    loaded = load_transcoders(tmp_path)
    assert loaded.variant == variant
    assert torch.allclose(loaded.encode(x.float()), t.encode(x).float(), atol=2e-4)
    assert torch.allclose(loaded(x.float()), t(x).float(), atol=2e-4)
    assert torch.allclose(loaded.replacement(1, x[1].float()), t(x)[1].float(), atol=2e-4)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    expected = "mlp.hook_out" if variant.site == "sae" else "mlp.hook_in"
    assert config["feature_input_hook"] == expected
    assert config["feature_output_hook"] == "mlp.hook_out"


def as_circuit_tracer_reads(folder: Path, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and output of one layer by circuit-tracer's rule, from its own files alone.

    Its config.yaml names the activation: `topk` keeps the k largest pre-activations whatever their
    sign, `relu` cuts at 0; without one, thresholds in the file make it a JumpReLU, else it is ReLU.
    The skip path reads the input as it is.
    """
    config = yaml.safe_load((folder / "config.yaml").read_text())
    saved = {key: one.double() for key, one in
             load_file(folder / f"layer_{layer}.safetensors").items()}
    pre = x @ saved["W_enc"].T + saved["b_enc"]
    if config.get("activation") == "topk":
        kept = torch.zeros_like(pre).scatter_(-1, pre.topk(config["k"]).indices, 1.0)
    elif config.get("activation") != "relu" and "activation_function.threshold" in saved:
        kept = pre > saved["activation_function.threshold"]
    else:
        kept = pre > 0
    z = pre * kept
    y = z @ saved["W_dec"] + saved["b_dec"]
    return z, y + x @ saved["W_skip"].T if "W_skip" in saved else y


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda one: f"{one.activation} {one.skip}")
@pytest.mark.parametrize("low", [0.0, 3.0])
def test_every_kind_is_read_by_circuit_tracer_as_it_is_here(variant, low, x, tmp_path):
    """With low biases fewer than k pre-activations of a token are positive."""
    t = of_variant(variant)
    t.b_enc -= low
    save_transcoders(t, tmp_path, "m", {})
    here, written = t.encode(x), t(x)
    for layer in range(3):
        z, y = as_circuit_tracer_reads(tmp_path, layer, x[layer])
        assert torch.equal((z != 0).sum(dim=-1), (here[layer] != 0).sum(dim=-1))
        assert torch.allclose(z[:, :24], here[layer], atol=1e-5) and not z[:, 24:].any()
        assert torch.allclose(y, written[layer], atol=1e-5)
    if variant.activation == "topk" and low:
        assert ((here > 0).sum(dim=-1) < variant.k).any()


TRACER_HOOKS = {
    # Of circuit-tracer, by its own tables: the module, and whether its input or output is meant.
    "gemma2": {"mlp.hook_in": ("pre_feedforward_layernorm", "output"),
               "hook_mlp_out": ("post_feedforward_layernorm", "output")},
    "llama": {"mlp.hook_in": ("post_attention_layernorm", "output"),
              "mlp.hook_out": ("mlp", "output")},
    "parallel": {"mlp.hook_in": ("mlp", "input"), "mlp.hook_out": ("mlp", "output")},
}


@pytest.mark.parametrize("family", TRACER_HOOKS)
def test_hooks_are_where_circuit_tracer_finds_what_was_trained_on(family, tmp_path):
    """With the files put at the named places of transformers' own model, an MLP's estimate is what
    `replaced_mlps` puts there."""
    model = tiny(family, dtype=torch.float32)
    t = tiny_transcoders(model)
    save_transcoders(t, tmp_path, "m", {}, architecture_of(model).written)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    seen: dict[str, Tensor] = {}
    layer = decoder_layers(model)[1]
    for key in ("feature_input_hook", "feature_output_hook"):
        name, side = TRACER_HOOKS[family][config[key]]
        layer.get_submodule(name).register_forward_hook(
            lambda module, args, output, key=key, side=side: seen.update(
                {key: (args[0] if side == "input" else output)[0]}))
    sites = mlp_sites(model, torch.arange(5)[None], torch.ones(1, 5, dtype=torch.bool))
    assert torch.equal(seen["feature_input_hook"], sites.inputs[1])
    assert torch.equal(seen["feature_output_hook"], sites.outputs[1])
    _, estimate = as_circuit_tracer_reads(tmp_path, 1, seen["feature_input_hook"].double())
    with replaced_mlps(model, t.replacement, [1]):
        mlp_out: list[Tensor] = []
        handles = site_hooks(model, lambda index, read, wrote: mlp_out.append(wrote), [1])
        model(input_ids=torch.arange(5)[None])
        for handle in handles:
            handle.remove()
    assert torch.allclose(estimate.float(), mlp_out[0][0], atol=1e-4)


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_the_files_of_a_layer_do_not_depend_on_the_stack(n_layers, tmp_path):
    whole = tiny_transcoders(tiny_model()).float()
    part = Transcoders(n_layers, 16, 24).requires_grad_(False)
    part.load_state_dict({name: one[:n_layers] for name, one in whole.state_dict().items()})
    for folder, t in (("whole", whole), ("part", part)):
        (tmp_path / folder).mkdir()
        save_layers(t, tmp_path / folder)
    for layer in range(n_layers):
        contents = {(tmp_path / folder / f"layer_{layer}.safetensors").read_bytes()
                    for folder in ("whole", "part")}
        assert len(contents) == 1


def test_a_record_of_an_unknown_variant(transcoders, tmp_path):
    save_transcoders(transcoders, tmp_path, "m", {})
    write_json(tmp_path / "training.json", {"n_layers": 3, "variant": {"gate": 1}})
    with pytest.raises(InputError, match="training chapter"):
        load_transcoders(tmp_path)


def test_twelve_layers_come_back_in_order(tmp_path):
    t = Transcoders(12, 4, 6).initialise(1)
    save_transcoders(t, tmp_path, "m", {})
    assert torch.equal(load_transcoders(tmp_path).W_enc, t.W_enc)


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    path = folder / "layer_1.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def empty(folder: Path) -> None:
    (folder / "layer_1.safetensors").write_bytes(b"")


def changed(key: str, value: Tensor | None, layers: range = range(1, 2)):
    def change(folder: Path) -> None:
        for layer in layers:
            path = folder / f"layer_{layer}.safetensors"
            tensors = load_file(path)
            tensors.pop(key)
            save_file({**tensors, **({} if value is None else {key: value})}, path)
    return change


@pytest.mark.parametrize("damage", [
    remove("layer_0.safetensors"), remove("layer_1.safetensors"), remove("layer_2.safetensors"),
    cut, empty, changed("b_dec", None), changed("W_enc", torch.zeros(24, 5)),
    changed("b_enc", torch.zeros(23), range(3)), changed("W_enc", torch.zeros(24), range(3)),
], ids=["no first", "no middle", "no last", "cut", "empty", "no b_dec", "one other shape",
        "all other shapes", "all other dimensions"])
def test_missing_and_broken_files(transcoders, tmp_path, damage):
    save_transcoders(transcoders, tmp_path, "m", {})
    load_transcoders(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match="training chapter") as caught:
        load_transcoders(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_another_name_does_no_harm(transcoders, tmp_path):
    save_transcoders(transcoders, tmp_path, "m", {})
    (tmp_path / "layer_0 copy.safetensors").write_bytes(b"")
    assert load_transcoders(tmp_path).n_layers == 3


def test_transcoders_of_another_program_load(transcoders, tmp_path):
    save_transcoders(transcoders, tmp_path, "m", {})
    (tmp_path / "training.json").unlink()
    assert load_transcoders(tmp_path).n_layers == 3


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="run the training chapter first"):
        load_transcoders(tmp_path / "none")
