"""Checkpoints: built-in names, folders and Hub ids, in and out.

Weights are read from safetensors alone: a pickle can run code.
"""

import copy
import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bilinear_lens.models import authors
from bilinear_lens.models.vocabulary import check_tokenizer

BUILT_IN = ("tinystories-1l", "tinystories-4l", "stories260k-bilinear")
BUILT_IN_CLASSIFIERS = ("mnist-1l",)
BUILT_IN_GATED = ("stories260k",)
"""With an activation in their gates: to be made bilinear."""
BUILT_IN_SAES = ("tinystories-4l-saes",)

CLASSIFIER = "HookedBilinearClassifier"
"""What the config of a saved classifier calls its architecture."""

ACTIVATION_NAMES = ("hidden_act", "hidden_activation")
"""Where configs name the activation of a gate; Gemma has both."""

Layout = Literal["hugging-face", "authors"]

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


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
    config = read_config(folder)
    if config.get("architecture") == CLASSIFIER:
        raise ValueError(f"{folder} holds a {CLASSIFIER}: load it with {CLASSIFIER}.")
    shards = check_weight_files(folder)
    if "model_type" in config:
        model = _load_hugging_face(folder, config, dtype)
        named_tokenizer = folder
    elif all(key in config for key in authors.KEYS):
        weights = {name: w for shard in shards for name, w in load_file(shard).items()}
        model = authors.to_llama(config, weights)
        model = model if dtype == "auto" else model.to(dtype)  # pyright: ignore[reportArgumentType]
        name = config.get("tokenizer") or ""
        beside = (folder / "tokenizer.json").exists()
        named_tokenizer = folder if beside else authors.TOKENIZERS.get(name, name)
    else:
        raise ValueError(
            f"{folder / 'config.json'} is neither a Hugging Face config (it has no model_type) nor "
            f"in the layout of the paper's authors (which has {', '.join(authors.KEYS)})."
        )
    if tokenizer is not None:
        given = load_tokenizer(tokenizer)
        check_tokenizer(given, model.config.vocab_size)
        return model, given
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


def name_gate_linear(config: PretrainedConfig) -> None:
    """Make a config say, in place, that its gates are linear."""
    config = config.get_text_config()
    for name in ACTIVATION_NAMES:
        if getattr(config, name, None) is not None or name == "hidden_act":
            setattr(config, name, "linear")


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
    *,
    layout: Layout = "hugging-face",
) -> None:
    """Save as a folder, which appears whole or not at all.

    Args:
        layout: "hugging-face" is what plain Transformers loads; "authors" is that of the bilinear
            papers' authors, in float32, with the tokenizer's files beside it.

    Raises:
        ValueError: if `path` exists or cannot be made, there is no such layout, or the authors'
            has no place for what the model does.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout={layout!r} must be one of {', '.join(get_args(Layout))}.")
    with write_folder(path) as folder:
        if layout == "hugging-face":
            model.save_pretrained(folder)
        else:
            config, weights = authors.from_llama(model)
            if tokenizer is not None:
                config["tokenizer"] = authors.THIS_FOLDER
            (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


@contextmanager
def write_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end of the block, or not at all.

    Raises:
        ValueError: if `path` exists or cannot be made.
    """
    path = Path(path)
    check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as partial:
            folder = Path(partial) / path.name
            folder.mkdir()
            yield folder
            folder.rename(path)
    except OSError as error:
        raise ValueError(f"Cannot write {path}: {error}.") from error


def holds_classifier(name_or_path: str | Path) -> bool:
    """Whether a built-in name, a folder or a Hub id is that of a `HookedBilinearClassifier`.

    Raises:
        KeyError, ValueError: as `load_checkpoint`, if there is no config to be had.
    """
    folder, _ = _folder(name_or_path, None)
    return read_config(folder).get("architecture") == CLASSIFIER


def classifier_files(name_or_path: str | Path, revision: str | None) -> tuple[dict, Path]:
    """The config and the weight file of a saved `HookedBilinearClassifier`.

    Raises:
        KeyError: if there is no such folder.
        ValueError: if the folder holds something else, or its weights are cut short.
    """
    folder, _ = _folder(name_or_path, revision)
    config = read_config(folder)
    if config.pop("architecture", None) != CLASSIFIER:
        raise ValueError(
            f"{folder} holds no {CLASSIFIER}: give a folder that its save_pretrained made. "
            "Language models load with HookedBilinearTransformer."
        )
    weights = check_weight_files(folder)
    if len(weights) > 1:
        raise ValueError(
            f"{folder} must have one file of weights; it has {[file.name for file in weights]}."
        )
    return config, weights[0]


def subfolder_of(name_or_path: str | Path, subfolder: str | None, revision: str | None) -> Path:
    """A folder of SAEs, or one of it, on this machine.

    Raises:
        KeyError: if the name is not known.
        ValueError: if there is no such subfolder, naming those there are.
    """
    if str(name_or_path) in BUILT_IN_SAES and Path(name_or_path).is_dir():
        raise ValueError(
            f"{name_or_path} ships with the package and is a folder here, too: rename the folder, "
            f"or say ./{name_or_path} for it."
        )
    folder, _ = _folder(name_or_path, revision, known=BUILT_IN_SAES, subfolder=subfolder)
    if subfolder is not None and not (folder / subfolder).is_dir():
        there = sorted(each.name for each in folder.glob("*") if each.is_dir())
        raise ValueError(f"{folder} has no folder {subfolder!r}; it has {there}.")
    return folder / (subfolder or "")


def _folder(
    name_or_path: str | Path,
    revision: str | None,
    *,
    known: tuple[str, ...] = BUILT_IN + BUILT_IN_CLASSIFIERS + BUILT_IN_GATED,
    subfolder: str | None = None,
) -> tuple[Path, bool]:
    """Where the checkpoint lies on this machine, and whether it came from the Hub."""
    name = str(name_or_path)
    if name in known:
        if revision is not None:
            raise ValueError(f"{name} ships with the package: it has no revisions.")
        return built_in(name), False
    if name and Path(name).is_dir():
        return Path(name), False
    if isinstance(name_or_path, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        near = get_close_matches(name, known, n=2, cutoff=0.6)
        raise KeyError(
            f"No model or folder {name!r}. Built-in models: {', '.join(known)}"
            f"{f' (near: {near})' if near else ''}; otherwise give a folder or a Hub id "
            "(user/name)."
        )
    try:
        return _snapshot(name, revision=revision, subfolder=subfolder), True
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"Cannot get {name!r}, which is no folder here, from the Hugging Face Hub: {error}"
        ) from error


def _snapshot(
    name: str,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
) -> Path:
    """A Hub repository's weights, configs and tokenizer: of its top folder, or of one below."""
    inside = f"{subfolder}/" if subfolder else ""
    folder = snapshot_download(
        name,
        revision=revision,
        local_files_only=local_files_only,
        allow_patterns=[f"{inside}*{end}" for end in (".json", ".safetensors", ".model", ".txt")],
        ignore_patterns=[f"{inside}*/*", "consolidated*"],
    )
    return Path(folder)


def read_config(folder: Path) -> dict:
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json: it is not a checkpoint folder.")
    return read_settings(folder / "config.json")


def read_settings(file: Path) -> dict:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings, but {str(settings)[:40]!r}.")
    return settings


def check_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: each whole, and all that an index of parts names."""
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        names = pickles(folder)
        found = f"only pickles ({', '.join(names)}), which can run code" if names else "none"
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
    index, names = folder / "model.safetensors.index.json", {shard.name for shard in shards}
    if index.exists() and "model.safetensors" not in names:  # a whole file is read without it
        named = dict(read_settings(index).get("weight_map", {}))
        if missing := sorted(set(named.values()) - names):
            raise ValueError(
                f"{folder} lacks {missing[:3]}, which {index.name} names: fetch it again."
            )
    return shards


def pickles(folder: Path) -> list[str]:
    return sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))


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


def _read_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    files = [Path(folder) / name for name in ("tokenizer.json", "tokenizer_config.json")]
    if (Path(folder) / "tokenizer.model").exists() and not any(map(Path.exists, files)):
        # AutoTokenizer does not read from SentencePiece's file that a text begins with a space
        return LlamaTokenizer.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_tokenizer(tokenizer: PreTrainedTokenizerBase | str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, a built-in name or a Hub id, or itself.

    Raises:
        ValueError: if it cannot be loaded.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    try:
        folder, _ = _folder(tokenizer, None)
        return _read_tokenizer(folder)
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
        return _read_tokenizer(name)
    except (OSError, ValueError, KeyError, HfHubHTTPError, StrictDataclassError):
        return None
