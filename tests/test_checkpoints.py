"""Foreign layouts, and folders that are no checkpoints."""

import json
import math
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import CONFIGS, random_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import bilinear_lens as bl
from bilinear_lens.models.checkpoints import built_in, load_checkpoint

AUTHORS = {
    "n_head": 4,
    "n_layer": 3,
    "n_ctx": 32,
    "d_model": 24,
    "d_hidden": 28,
    "bilinear": True,
    "gate": None,
    "bias": False,
    "normalization": True,
    "tokenizer": "ts-4096",
    "repo": "somebody/something",
}


def authors_weights(config: dict) -> dict[str, Tensor]:
    """Random weights in the layout of the paper's authors, stray keys included."""
    generator = torch.Generator().manual_seed(0)
    d, h, scale = config["d_model"], config["d_hidden"], 0.15 if config["normalization"] else 0.08

    def normal(*shape: int) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    weights = {"transformer.wte.weight": 3 * normal(37, d), "lm_head.weight": 3 * normal(37, d)}
    for layer in range(config["n_layer"]):
        prefix = f"transformer.h.{layer}."
        weights |= {
            prefix + "attn.qkv.weight": 2 * normal(3 * d, d),
            prefix + "attn.o.weight": normal(d, d),
            prefix + "attn.rotary.inv_freq": torch.rand(3, generator=generator),
            prefix + "mlp.w.weight": normal(2 * h, d),
            prefix + "mlp.p.weight": normal(d, h),
            prefix + "norm1.weight": torch.rand(d, generator=generator),
        }
        if config["bias"]:
            weights[prefix + "mlp.w.bias"] = normal(2 * h)
    return weights


def authors_forward(config: dict, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """A plain reading of the layout's description: nothing of Llama, nothing of ours."""
    d, n_heads = config["d_model"], config["n_head"]
    size, n = d // n_heads, len(tokens)

    def norm(x: Tensor) -> Tensor:
        if not config["normalization"]:
            return x
        return x / (x.square().mean(-1, keepdim=True) + 1e-8).sqrt()

    frequency = 10000 ** (-torch.arange(0, size, 2).double() / size)
    angle = torch.arange(n).double()[:, None] * frequency
    cosine, sine = angle.cos(), angle.sin()

    def rotate(x: Tensor) -> Tensor:
        one, two = x[..., : size // 2], x[..., size // 2 :]
        return torch.cat([one * cosine - two * sine, two * cosine + one * sine], dim=-1)

    x = weights["transformer.wte.weight"][tokens]
    for layer in range(config["n_layer"]):
        part = {
            name.removeprefix(f"transformer.h.{layer}."): weight
            for name, weight in weights.items()
            if name.startswith(f"transformer.h.{layer}.")
        }
        qkv = norm(x) @ part["attn.qkv.weight"].T
        q, k, v = (each.unflatten(-1, (n_heads, size)).transpose(0, 1) for each in qkv.chunk(3, -1))
        scores = rotate(q) @ rotate(k).mT / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + mixed @ part["attn.o.weight"].T / math.sqrt(2 * config["n_layer"])
        hidden = norm(x) @ part["mlp.w.weight"].T + part.get("mlp.w.bias", 0)
        left, right = hidden.chunk(2, -1)
        gate = getattr(F, config["gate"]) if config["gate"] else lambda z: z
        x = x + (gate(left) * right) @ part["mlp.p.weight"].T
    return norm(x) @ weights["lm_head.weight"].T


def write(folder: Path, config: dict, weights: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("change", [{}, {"bias": True}, {"normalization": False}])
def test_the_authors_layout_converts_exactly(tmp_path, change, fold, record_property):
    config = AUTHORS | change
    weights = authors_weights(config)
    tokens = torch.tensor([3, 14, 15, 9, 2, 6, 5, 35])
    double = {name: weight.double() for name, weight in weights.items()}
    expected = authors_forward(config, double, tokens).float()
    folder = write(tmp_path / "theirs", config, weights)
    model = bl.HookedBilinearTransformer.from_pretrained(folder, fold=fold)
    assert model.tokenizer is None
    with torch.no_grad():
        actual = model(tokens[None])[0].log_softmax(-1)
    difference = (actual - expected.log_softmax(-1)).abs().max().item()
    record_property("largest difference of log-probabilities", difference)
    assert difference < 1e-5
    unscaled = double | {
        name: weight * 1.1 for name, weight in double.items() if name.endswith("attn.o.weight")
    }
    control = authors_forward(config, unscaled, tokens).float().log_softmax(-1)
    assert (actual - control).abs().max() > 1e-3


def test_a_gated_checkpoint_converts_and_is_refused_by_the_lens(tmp_path):
    config = AUTHORS | {"gate": "silu"}
    weights = authors_weights(config)
    tokens = torch.tensor([3, 14, 15, 9])
    folder = write(tmp_path / "theirs", config, weights)
    model, _ = load_checkpoint(folder)
    double = {name: weight.double() for name, weight in weights.items()}
    with torch.no_grad():
        actual = model(tokens[None]).logits[0].double()
    torch.testing.assert_close(
        actual, authors_forward(config, double, tokens), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="bilinearize"):
        bl.HookedBilinearTransformer.from_pretrained(folder)


def test_a_tokenizer_may_be_given(tmp_path):
    config = AUTHORS | {"tokenizer": "nobody/nothing"}
    weights = authors_weights(config)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = torch.randn(4096, 24, generator=torch.Generator().manual_seed(0))
    folder = write(tmp_path / "theirs", config, weights)
    given = built_in("tinystories-1l")
    model = bl.HookedBilinearTransformer.from_pretrained(folder, tokenizer=given)
    assert model.token_labels[5] == "%"
    again = bl.HookedBilinearTransformer.from_pretrained(folder, tokenizer=model.tokenizer)
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    named = bl.HookedBilinearTransformer.from_pretrained(folder, tokenizer="tinystories-4l")
    assert named.token_labels[5] == "%"
    with pytest.raises(ValueError, match="Cannot load the tokenizer"):
        bl.HookedBilinearTransformer.from_pretrained(folder, tokenizer=tmp_path / "theirs")


def fault(folder: str | Path, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        bl.HookedBilinearTransformer.from_pretrained(folder)
    return str(caught.value)


def test_a_checkpoints_own_code_is_never_run(tmp_path, monkeypatch):
    write(
        tmp_path, {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}, {"w": torch.ones(1)}
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert "is never run" in fault(tmp_path)
    folder = tmp_path / "ours"
    random_model(CONFIGS["llama"]).save_pretrained(folder)
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.C")
    (folder / "config.json").write_text(json.dumps(config))
    assert bl.HookedBilinearTransformer.from_pretrained(folder).cfg.n_layers == 3


def test_local_checkpoints_ask_nothing_of_the_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    theirs = write(tmp_path / "theirs", AUTHORS, authors_weights(AUTHORS))
    assert bl.HookedBilinearTransformer.from_pretrained(theirs).tokenizer is None
    model = bl.HookedBilinearTransformer.from_pretrained("tinystories-1l")
    model.save_pretrained(tmp_path / "ours")
    assert bl.HookedBilinearTransformer.from_pretrained(tmp_path / "ours").tokenizer is not None


@pytest.mark.parametrize("name", ["identity", None])
def test_other_names_of_a_linear_gate_load(tmp_path, name):
    plain = random_model(CONFIGS["llama"])
    plain.save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": name}))
    model = bl.HookedBilinearTransformer.from_pretrained(tmp_path / "folder")
    tokens = torch.tensor([[3, 14, 15]])
    torch.testing.assert_close(model(tokens), plain(tokens).logits, atol=1e-4, rtol=1e-4)


def test_unknown_names_list_the_near_ones(tmp_path):
    assert "near: ['tinystories-1l" in fault("tinystories-1", KeyError)
    assert "tinystories-4l" in fault(tmp_path / "nothing", KeyError)


def test_a_hub_id_without_a_network_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "'nobody/nothing'" in fault("nobody/nothing")


def test_folders_that_are_no_checkpoints(tmp_path):
    assert "has no config.json" in fault(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in fault(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "safetensors; there are none" in fault(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    assert "pytorch_model.bin), which can run code" in fault(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    write(tmp_path, {"what": "ever"}, {"w": torch.zeros(2)})
    assert "has no model_type" in fault(tmp_path)


@pytest.mark.parametrize("layout", ["theirs", "ours"])
def test_weights_cut_short(tmp_path, layout):
    folder = tmp_path / "folder"
    if layout == "theirs":
        write(folder, AUTHORS, authors_weights(AUTHORS))
    else:
        random_model(CONFIGS["llama"]).save_pretrained(folder)
    file = folder / "model.safetensors"
    for size in (file.stat().st_size - 100, 20, 0):
        file.write_bytes(file.read_bytes()[:size])
        assert "cut short" in fault(folder)


def test_a_config_that_contradicts_its_weights(tmp_path):
    folder = tmp_path / "ours"
    random_model(CONFIGS["llama"]).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for change, expected in (
        ({"intermediate_size": 30}, "mismatched keys (with shapes saved and asked for) [\"('model"),
        ({"num_hidden_layers": 4}, "missing keys"),
        ({"num_hidden_layers": 2}, "unexpected keys"),
        ({"num_attention_heads": 5}, "does not load"),
        ({"hidden_size": "x"}, "does not load"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        message = fault(folder)
        assert str(folder) in message and expected in message
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "missing keys" in fault(folder)


def test_an_authors_config_that_contradicts_its_weights(tmp_path):
    weights = authors_weights(AUTHORS)
    cases = {
        "mlp.p.weight has shape [24, 28]; the config asks for [24, 30]": {"d_hidden": 30},
        "no transformer.h.3.attn": {"n_layer": 4},
        "no use for": {"n_layer": 2},
        "no transformer.h.0.mlp.w.bias": {"bias": True},
        "plain MLPs": {"bilinear": False},
        "no multiple of n_head=5": {"n_head": 5},
        "n_head is 0": {"n_head": 0},
        "d_model is 'x'": {"d_model": "x"},
        "gate is 'nonsense'": {"gate": "nonsense"},
    }
    for expected, change in cases.items():
        if change.get("d_hidden"):
            weights["transformer.h.0.mlp.w.weight"] = torch.zeros(60, 24)
        assert expected in fault(write(tmp_path / "theirs", AUTHORS | change, weights))
        weights = authors_weights(AUTHORS)


def test_folders_that_cannot_be_written(tmp_path):
    model = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS["llama"]))
    with pytest.raises(ValueError, match="exists already"):
        model.save_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot write"):
        model.save_pretrained(tmp_path / "file" / "folder")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_the_tokenizer_of_stories260k_is_sentencepiece_s():
    """Ids of `spm_encode` with the model's own file: a text begins with a space."""
    for name in ("stories260k", "stories260k-bilinear"):
        _, tokenizer = load_checkpoint(name)
        assert tokenizer is not None
        assert tokenizer("Once upon a time")["input_ids"] == [403, 407, 261, 378]
        assert tokenizer.decode([403, 407, 261, 378]) == "Once upon a time"


def test_a_bare_sentencepiece_file_is_read_as_it_means():
    folder = Path(__file__).parents[2] / "shared" / "data" / "checkpoints" / "stories260K"
    if not folder.exists():
        pytest.skip("needs ../shared/data/checkpoints/stories260K")
    _, tokenizer = load_checkpoint(folder)
    assert tokenizer is not None
    assert tokenizer("Once upon a time")["input_ids"] == [403, 407, 261, 378]
