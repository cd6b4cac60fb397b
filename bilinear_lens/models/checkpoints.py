"""Checkpoints: built-in names, folders and Hub ids, and the layout of the paper's authors.

The only file that knows foreign weight layouts. Weights are read from safetensors alone: a pickle
can run code.
"""

import copy
import gzip
import json
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

BUILT_IN = ("tinystories-1l", "tinystories-4l")

AUTHORS_TOKENIZERS = {
    "ts-4096": "tdooms/ts-tokenizer-4096",
    "mistral": "mistral-community/Mixtral-8x22B-v0.1",
}
"""Where the short names in the authors' configs live on the Hub; others stand for themselves."""

ACTIVATION_NAMES = ("hidden_act", "hidden_activation")
"""Where configs name the activation of a gate; Gemma has both."""

AUTHORS_GATES = ("linear", "relu", "silu", "gelu")

AUTHORS_KEYS = ("n_head", "n_layer", "n_ctx", "d_model", "d_hidden", "bilinear")


def built_in(name: str) -> Path:
    """A model folder, or a file, that ships with the package."""
    return Path(str(files("bilinear_lens.models") / "pretrained" / name))


def held_out_stories() -> list[str]:
    """400 real TinyStories that the built-in models were not trained on."""
    text = gzip.decompress(built_in("held-out-stories.txt.gz").read_bytes()).decode()
    return [story.strip() for story in text.split("<|endoftext|>")]


def load_checkpoint(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A Hugging Face model and its tokenizer, from a built-in name, a folder or a Hub id.

    The network is used for Hub ids only. Where no tokenizer can be had it is None.

    Args:
        dtype: "auto" is what the weights are saved in (float32 from the authors' layout).

    Raises:
        KeyError: if the name is not known.
        ValueError: if the folder is not a checkpoint, or its weights are cut short, a pickle,
            contradict the config.
    """
    folder, on_hub = _folder(name_or_path, revision)
    config = _read_config(folder)
    shards = _check_weight_files(folder)
    if "model_type" in config:
        model = _load_hugging_face(folder, config, dtype)
        named_tokenizer = folder
    elif all(key in config for key in AUTHORS_KEYS):
        weights = {name: w for shard in shards for name, w in load_file(shard).items()}
        model = from_authors_layout(config, weights)
        model = model if dtype == "auto" else model.to(dtype)  # pyright: ignore[reportArgumentType]
        name = config.get("tokenizer") or ""
        named_tokenizer = AUTHORS_TOKENIZERS.get(name, name)
    else:
        raise ValueError(
            f"{folder / 'config.json'} is neither a Hugging Face config (it has no model_type) nor "
            f"in the layout of the paper's authors (which has {', '.join(AUTHORS_KEYS)})."
        )
    if tokenizer is not None:
        return model, _given_tokenizer(tokenizer)
    return model, _found_tokenizer(named_tokenizer, local_only=not on_hub)


def check_new(path: str | Path) -> None:
    """Refuse to write over what is there.

    Raises:
        ValueError: if `path` exists.
    """
    if Path(path).exists():
        raise ValueError(f"{path} exists already: give a new folder, or remove it.")


def with_linear_name(config: PretrainedConfig) -> PretrainedConfig:
    """A copy whose linear gate has the one name that Transformers knows for it."""
    config = copy.deepcopy(config)
    for name in ACTIVATION_NAMES:
        if getattr(config, name, None) == "identity":
            setattr(config, name, "linear")
    return config


def save_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: str | Path
) -> None:
    """Save as a plain Hugging Face folder, which appears whole or not at all.

    Raises:
        ValueError: if `path` exists or cannot be made.
    """
    path = Path(path)
    check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as partial:
            folder = Path(partial) / path.name
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            folder.rename(path)
    except OSError as error:
        raise ValueError(f"Cannot write {path}: {error}.") from error


def from_authors_layout(config: dict, weights: dict[str, Tensor]) -> LlamaForCausalLM:
    """The paper's authors' language model as a stock Llama, with the same logits.

    Their attention output is scaled by `1 / sqrt(2 n_layer)`, which goes into the output
    projection. Their norms have no weight, which a weight of 1 is; where they have no norm, one
    with a huge epsilon and a weight of its root divides and multiplies by the same number, exactly
    up to rounding.

    Args:
        config: their `config.json` (public repository tdooms/bilinear-decomposition).
        weights: their state dict.

    Raises:
        ValueError: if the MLPs are not bilinear, or config and weights contradict each other.
    """
    for name in ("n_head", "n_layer", "n_ctx", "d_model", "d_hidden"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(f"{name} is {config[name]!r} in the config: it must be 1 or more.")
    if config["d_model"] % config["n_head"]:
        raise ValueError(
            f"d_model={config['d_model']} in the config is no multiple of "
            f"n_head={config['n_head']}."
        )
    gate = config.get("gate") or "linear"
    if gate not in AUTHORS_GATES:
        raise ValueError(f"gate is {gate!r} in the config: it must be null or {AUTHORS_GATES[1:]}.")
    if not config["bilinear"]:
        raise ValueError(
            "This checkpoint has plain MLPs (bilinear: false in its config); a bilinear lens needs "
            "bilinear ones."
        )
    d_model, d_hidden, n_layers = config["d_model"], config["d_hidden"], config["n_layer"]
    has_bias, has_norm = bool(config.get("bias")), config.get("normalization", True)
    epsilon = 1e-8 if has_norm else 1e12
    gain = torch.ones(d_model) * (1.0 if has_norm else epsilon**0.5)
    weights = {
        name: weight
        for name, weight in weights.items()
        if "norm" not in name and not name.endswith("rotary.inv_freq")
    }

    def take(name: str, *shape: int) -> Tensor:
        if name not in weights:
            raise ValueError(f"The checkpoint has no {name}, which its config asks for.")
        weight = weights.pop(name)
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(weight.shape)}; the config asks for {list(shape)}."
            )
        return weight.float()

    n_vocab = len(weights.get("transformer.wte.weight", ()))
    state = {
        "model.embed_tokens.weight": take("transformer.wte.weight", n_vocab, d_model),
        "lm_head.weight": take("lm_head.weight", n_vocab, d_model),
        "model.norm.weight": gain,
    }
    for layer in range(n_layers):
        theirs, ours = f"transformer.h.{layer}.", f"model.layers.{layer}."
        qkv = take(theirs + "attn.qkv.weight", 3 * d_model, d_model).chunk(3)
        output = take(theirs + "attn.o.weight", d_model, d_model) / (2 * n_layers) ** 0.5
        left, right = take(theirs + "mlp.w.weight", 2 * d_hidden, d_model).chunk(2)
        state |= {ours + f"self_attn.{x}_proj.weight": w for x, w in zip("qkv", qkv, strict=True)}
        state |= {
            ours + "self_attn.o_proj.weight": output,
            ours + "mlp.gate_proj.weight": left,
            ours + "mlp.up_proj.weight": right,
            ours + "mlp.down_proj.weight": take(theirs + "mlp.p.weight", d_model, d_hidden),
            ours + "input_layernorm.weight": gain,
            ours + "post_attention_layernorm.weight": gain,
        }
        if has_bias:
            left_bias, right_bias = take(theirs + "mlp.w.bias", 2 * d_hidden).chunk(2)
            state |= {
                ours + "mlp.gate_proj.bias": left_bias,
                ours + "mlp.up_proj.bias": right_bias,
                ours + "mlp.down_proj.bias": torch.zeros(d_model),
            }
    if weights:
        raise ValueError(f"The checkpoint has weights that its config has no use for: {[*weights]}")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=n_vocab,
            hidden_size=d_model,
            intermediate_size=d_hidden,
            num_hidden_layers=n_layers,
            num_attention_heads=config["n_head"],
            max_position_embeddings=config["n_ctx"],
            hidden_act=gate,
            mlp_bias=has_bias,
            rms_norm_eps=epsilon,
            tie_word_embeddings=False,
        )
    )
    model.load_state_dict(state)
    return model.eval()


def _folder(name_or_path: str | Path, revision: str | None) -> tuple[Path, bool]:
    """Where the checkpoint lies on this machine, and whether it came from the Hub."""
    name = str(name_or_path)
    if name in BUILT_IN:
        if revision is not None:
            raise ValueError(f"{name} ships with the package: it has no revisions.")
        return built_in(name), False
    if name and Path(name).is_dir():
        return Path(name), False
    if isinstance(name_or_path, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        near = get_close_matches(name, BUILT_IN, n=2, cutoff=0.3)
        raise KeyError(
            f"No model or folder {name!r}. Built-in models: {', '.join(BUILT_IN)}"
            f"{f' (near: {near})' if near else ''}; otherwise give a folder or a Hub id "
            "(user/name)."
        )
    try:
        return _snapshot(name, revision=revision), True
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"Cannot get {name!r}, which is no folder here, from the Hugging Face Hub: {error}"
        ) from error


def _snapshot(name: str, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """A Hub repository's weights, configs and tokenizer; nothing below its top folder."""
    folder = snapshot_download(
        name,
        revision=revision,
        local_files_only=local_files_only,
        allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"],
        ignore_patterns=["*/*", "consolidated*"],
    )
    return Path(folder)


def _read_config(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no config.json: it is not a checkpoint folder.") from error
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not JSON: {error}.") from error


def _check_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, each whole."""
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickles = [file.name for file in [*folder.glob("*.bin"), *folder.glob("*.pt*")]]
        found = f"only pickles ({', '.join(pickles)}), which can run code" if pickles else "none"
        raise ValueError(
            f"{folder} must hold its weights as safetensors; there are {found}. Convert them where "
            "you trust them: torch.load(..., weights_only=True), then safetensors.torch.save_file."
        )
    for shard in shards:
        try:
            with safe_open(shard, framework="pt"):
                pass  # opening compares the header with the file's length
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{shard} is cut short or not safetensors ({error}): fetch it again."
            ) from error
    return shards


def _load_hugging_face(
    folder: Path, config: dict, dtype: torch.dtype | Literal["auto"]
) -> PreTrainedModel:
    """The model of a folder: nothing left random, nothing left over, no code but Transformers'."""
    if config["model_type"] not in CONFIG_MAPPING:
        raise ValueError(
            f"{folder} has model_type {config['model_type']!r}, which Transformers does not know; "
            "code that comes with a checkpoint is never run."
        )
    if "hidden_act" in config and config["hidden_act"] is None:
        config = {**config, "hidden_act": "linear"}
    try:
        hf_config = with_linear_name(CONFIG_MAPPING[config["model_type"]].from_dict(config))
        model, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            folder,
            config=hf_config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # named below
            output_loading_info=True,
            trust_remote_code=False,
        )
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, StrictDataclassError) as error:
        raise ValueError(f"{folder} does not load: {error}") from error
    for kind in ("mismatched_keys", "missing_keys", "unexpected_keys"):
        if info[kind]:
            raise ValueError(
                f"The weights of {folder} contradict its config: {kind.replace('_', ' ')} (with "
                f"shapes saved and asked for) {sorted(map(str, info[kind]))[:5]}."
            )
    return model


def _given_tokenizer(tokenizer: PreTrainedTokenizerBase | str | Path) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    try:
        folder, _ = _folder(tokenizer, None)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"Cannot load the tokenizer {str(tokenizer)!r}: {error}") from error


def _found_tokenizer(name: str | Path, *, local_only: bool) -> PreTrainedTokenizerBase | None:
    """The checkpoint's own tokenizer, or None: only what needs strings will miss it."""
    if not name:
        return None
    try:
        if not isinstance(name, Path):
            # Transformers asks the network about a name even where it may use local files only
            name = _snapshot(name, local_files_only=local_only)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, HfHubHTTPError, StrictDataclassError):
        return None
