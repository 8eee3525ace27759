"""scGPT: its published checkpoint, the layers against PyTorch's own, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_architectures import tiny
from torch import Tensor, nn

from scfm_circuits import InputError
from scfm_circuits.models import scgpt
from scfm_circuits.models.loading import load_model
from scfm_circuits.models.mlp_sites import faster_attention, mlp_sites

WIDTH, HEADS, LAYERS, GENES = 16, 4, 3, 10
THEIRS = (
    (r"scgpt\.genes", "encoder.embedding"), (r"scgpt\.gene_norm", "encoder.enc_norm"),
    (r"scgpt\.level_in", "value_encoder.linear1"), (r"scgpt\.level_out", "value_encoder.linear2"),
    (r"scgpt\.level_norm", "value_encoder.norm"), (r"self_attn\.qkv\.", "self_attn.Wqkv."),
    (r"self_attn\.out\.", "self_attn.out_proj."), (r"mlp\.0", "linear1"), (r"mlp\.2", "linear2"),
    (r"scgpt\.layers", "transformer_encoder.layers"), (r"^head\.", "decoder.fc."),
    (r"^value\.", "decoder.fc.4."))
ARGS = {"embsize": WIDTH, "nlayers": LAYERS, "nheads": HEADS, "d_hid": 2 * WIDTH, "n_bins": 51,
        "input_emb_style": "continuous", "max_seq_len": 1200, "fast_transformer": True}


def published(folder: Path, flash: bool = True, args: dict[str, Any] | None = None,
              **tensors: Tensor | None) -> dict[str, Tensor]:
    """A checkpoint as scGPT's authors write it; tensors: others, or None to leave one out."""
    content = {}
    for name, one in tiny("scgpt").state_dict().items():
        for ours, theirs in THEIRS:
            name = re.sub(ours, theirs, name)
        content[name if flash else name.replace("Wqkv.", "in_proj_")] = one.float()
    content |= {"mvc_decoder.gene2query.weight": torch.ones(WIDTH, WIDTH),
                "flag_encoder.weight": torch.ones(2, WIDTH)}
    for name, one in tensors.items():
        content.pop(name, None)
        content |= {} if one is None else {name: one}
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / scgpt.CHECKPOINT)
    (folder / scgpt.SETTINGS).write_text(json.dumps(ARGS | (args or {})))
    return content


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCFM_CACHE", str(tmp_path / "cache"))


def by_pytorch(content: dict[str, Tensor], genes: Tensor, levels: Tensor, padding: Tensor
               ) -> Tensor:
    """(n, length) values, by `nn.TransformerEncoder` and what scGPT's source puts around it."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).eval()
    encoder.load_state_dict({
        name.removeprefix("transformer_encoder.").replace("Wqkv.", "in_proj_"): one
        for name, one in content.items() if name.startswith("transformer_encoder.")})

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ content[f"{name}.weight"].T + content[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (WIDTH,), content[f"{name}.weight"],
                                        content[f"{name}.bias"])

    x = norm("encoder.enc_norm", content["encoder.embedding.weight"][genes]) + norm(
        "value_encoder.norm", linear("value_encoder.linear2", linear(
            "value_encoder.linear1", levels[..., None].float()).relu()))
    x = encoder(x, src_key_padding_mask=padding)
    for map_ in ("decoder.fc.0", "decoder.fc.2"):
        x = nn.functional.leaky_relu(linear(map_, x))
    return linear("decoder.fc.4", x)[..., 0]


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "PyTorch's names"])
@torch.no_grad()
def test_a_published_checkpoint_gives_what_pytorch_gives(tmp_path, flash):
    content = published(tmp_path / "scgpt", flash)
    model = load_model(tmp_path / "scgpt")
    torch.manual_seed(0)
    genes, levels = torch.randint(0, GENES, (2, 7)), torch.randint(0, 51, (2, 7))
    keep = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    wanted = by_pytorch(content, genes, levels, ~keep)
    tokens = genes + GENES * levels
    found = model(input_ids=tokens, attention_mask=keep).logits[..., 0]
    assert torch.allclose(found[keep], wanted[keep], atol=1e-5)
    with faster_attention(model):
        fused = model(input_ids=tokens, attention_mask=keep).logits[..., 0]
    assert torch.allclose(fused[keep], wanted[keep], atol=1e-5)
    sites = mlp_sites(model, tokens, keep)
    assert sites.inputs.shape == sites.outputs.shape == (LAYERS, 12, WIDTH)


def test_it_is_converted_once(tmp_path, monkeypatch):
    published(tmp_path / "scgpt")
    first = load_model(tmp_path / "scgpt").state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", None)
        again = load_model(tmp_path / "scgpt").state_dict()
    assert all(torch.equal(again[name], one) for name, one in first.items())
    # Other weights in its place are converted anew.
    published(tmp_path / "scgpt", **{"decoder.fc.4.bias": torch.ones(1)})
    assert load_model(tmp_path / "scgpt").value.bias.item() == 1
    [folder] = (tmp_path / "cache" / "scgpt").iterdir()
    assert load_model(folder).value.bias.item() == 1


NORM = torch.ones(WIDTH)


@pytest.mark.parametrize(("tensors", "args", "told"), [
    ({"dsbn.bns.0.weight": NORM}, {}, r"has dsbn.bns.0.weight: models with batch norms"),
    ({"bn.weight": NORM}, {}, "has bn.weight: models with batch norms"),
    ({"batch_encoder.embedding.weight": NORM}, {}, "batch norms or batch labels"),
    ({"decoder.fc.4.bias": None}, {}, "lacks the tensors: value.bias"),
    ({"transformer_encoder.layers.1.self_attn.Wqkv.weight": None}, {},
     "lacks the tensors: scgpt.layers.1.self_attn.qkv.weight"),
    ({"decoder.zero_logit.0.weight": NORM}, {},
     "has tensors that this model does not: decoder.zero_logit.0.weight"),
    ({"transformer_encoder.layers.3.norm1.weight": NORM}, {}, r"does not: scgpt.layers.3.norm1"),
    ({"decoder.fc.0.bias": torch.ones(3)}, {}, "of another shape: head.0.bias"),
    ({}, {"input_emb_style": "category"}, "`input_emb_style: category`, and only `continuous`"),
    ({}, {"n_bins": 7}, "`n_bins: 7`, and only `51`"),
    ({}, {"pre_norm": True}, "says `pre_norm`"),
    ({}, {"nheads": "8"}, "args.json, which came with it, gives no `nheads`"),
])
def test_another_kind_of_checkpoint_is_refused_by_name(tmp_path, tensors, args, told):
    published(tmp_path / "scgpt", args=args, **tensors)
    with pytest.raises(InputError, match=told) as error:
        load_model(tmp_path / "scgpt")
    assert "\n" not in str(error.value) and "whole-human" in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("content", [b"no archive", {"a": print}, [torch.ones(1)], {"a": 1}],
                         ids=["garbage", "code", "a list", "a number"])
def test_a_checkpoint_that_is_more_than_tensors_is_refused(tmp_path, content):
    published(tmp_path / "scgpt")
    path = tmp_path / "scgpt" / scgpt.CHECKPOINT
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=r"as tensors alone|no table of tensors"):
        load_model(tmp_path / "scgpt")
