"""Layouts of saved sparse autoencoders: sparsify's, SAELens's, that of the papers' authors."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

from safetensors.torch import load_file, save_file
from torch import Tensor

from bilinear_lens.models.checkpoints import check_weight_files, read_settings

if TYPE_CHECKING:
    from bilinear_lens.models.saes import SparseAutoencoder

Layout = Literal["sparsify", "saelens", "authors"]

_FILES = {
    "sparsify": ("cfg.json", "sae.safetensors"),
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "authors": ("config.json", "model.safetensors"),
}
_AUTHORS_POINTS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out",
}
_MODULES = {
    "": "hook_resid_post",
    "self_attn": "attn.hook_out",
    "attn": "attn.hook_out",
    "attention": "attn.hook_out",
    "mlp": "mlp.hook_out",
}
"""What Hugging Face's modules of a block give out, by TransformerLens's names."""
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in")


def read(folder: Path, *, hook: str | None) -> dict[str, Any]:
    """What makes a `SparseAutoencoder`, by the names of its fields.

    Raises:
        ValueError: if the layout is not known, or asks for what is not supported.
    """
    found = next((each for each, files in _FILES.items() if _holds(folder, files)), None)
    if found is None:
        below = sorted(each.name for each in folder.glob("*") if each.is_dir())
        known = "; ".join(f"{each}: {' and '.join(files)}" for each, files in _FILES.items())
        where = f" There are folders in it: subfolder= must be one of {below}." if below else ""
        raise ValueError(f"{folder} holds no SAE in a layout that is known ({known}).{where}")
    config_name, weights_name = _FILES[found]
    check_weight_files(folder)
    config, weights = read_settings(folder / config_name), load_file(folder / weights_name)
    try:
        return _READERS[found](config, weights, folder.name, hook)
    except KeyError as error:
        raise ValueError(f"{folder} is in the layout of {found}, but lacks {error}.") from error


def writer(sae: "SparseAutoencoder", layout: Layout) -> Callable[[Path], None]:
    """What writes an SAE's files into a folder.

    Raises:
        ValueError: if the layout is not known, or has no place for what the SAE does.
    """
    if layout not in _FILES:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(get_args(Layout))}.")
    config, weights = _WRITERS[layout](sae)
    config_name, weights_name = _FILES[layout]

    def write(folder: Path) -> None:
        (folder / config_name).write_text(json.dumps(config, indent=1), encoding="utf-8")
        whole = {name: weight.contiguous() for name, weight in weights.items()}
        save_file(whole, folder / weights_name, metadata={"format": "pt"})

    return write


def _holds(folder: Path, names: tuple[str, ...]) -> bool:
    return all((folder / name).is_file() for name in names)


def _read_sparsify(
    config: dict, weights: dict[str, Tensor], name: str, hook: str | None
) -> dict[str, Any]:
    if config.get("activation", "topk") != "topk":
        _refuse("activation", config["activation"], "topk")
    if config.get("signed"):  # of early versions
        _refuse("signed", True, "false")
    transcode = config.get("transcode", False)
    hook_in = None if hook else config.get("hook_in")
    hook = hook or config.get("hook_out") or hook_of_module(name)
    return {
        "encoder": weights["encoder.weight"],
        "decoder": weights["W_dec"],
        "encoder_bias": weights["encoder.bias"],
        "decoder_bias": weights["b_dec"],
        "hook_in": hook_in or (_input_of(hook) if transcode else hook),
        "hook_out": hook,
        "k": config["k"],
        "centred": not transcode,
        "skip": weights.get("W_skip"),
        "model_digest": config.get("model_digest"),
    }


def _write_sparsify(sae: "SparseAutoencoder") -> tuple[dict, dict[str, Tensor]]:
    _check(sae, "sparsify", activations=("topk",), scale=False)
    if sae.centred == sae.is_transcoder or sae.d_in != sae.d_out:
        _no_place("sparsify", "a centred transcoder, an SAE that is not, or two widths")
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.n_latents // sae.d_in),
        "normalize_decoder": True,
        "num_latents": sae.n_latents,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": sae.skip is not None,
        "transcode": sae.is_transcoder,
        "d_in": sae.d_in,
        "hook_in": sae.hook_in,
        "hook_out": sae.hook_out,
        "model_digest": sae.model_digest,
    }
    weights = {
        "encoder.weight": sae.encoder,
        "encoder.bias": sae.encoder_bias,
        "W_dec": sae.decoder,
        "b_dec": sae.decoder_bias,
    }
    return config, weights if sae.skip is None else {**weights, "W_skip": sae.skip}


def _read_saelens(
    config: dict, weights: dict[str, Tensor], name: str, hook: str | None
) -> dict[str, Any]:
    metadata = {**config, **config.get("metadata", {})}
    parts = set(config.get("architecture", "standard").split("_")) - {"skip", "transcoder"}
    kind = "_".join(parts) or "standard"
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if kind == "standard":
        kind = {"relu": "relu", "topk": "topk"}.get(activation, activation)
    if kind not in ("relu", "topk", "jumprelu"):
        _refuse("architecture", kind, "standard, topk, jumprelu and their transcoders")
    for option, allowed in (
        ("normalize_activations", ("none", None)),
        ("rescale_acts_by_decoder_norm", (False, None)),
        ("finetuning_scaling_factor", (False, None)),
        ("reshape_activations", ("none", None)),
    ):
        if config.get(option) not in allowed:
            _refuse(option, config[option], str(allowed[0]))
    k = config.get("k", config.get("activation_fn_kwargs", {}).get("k"))
    at = hook or metadata.get("hook_name") or metadata.get("hook_point")
    if at is None:
        raise ValueError("The hook point is not in the files: say hook=, 'blocks.2.mlp.hook_in'.")
    return {
        "encoder": weights["W_enc"].mT,
        "decoder": weights["W_dec"],
        "encoder_bias": weights["b_enc"],
        "decoder_bias": weights["b_dec"],
        "hook_in": at,
        "hook_out": metadata.get("hook_name_out") or at,
        "activation": kind,
        "k": int(k) if kind == "topk" else None,
        "threshold": weights["threshold"] if kind == "jumprelu" else None,
        "centred": config.get("apply_b_dec_to_input", True),
        "skip": weights.get("W_skip"),
        "model_digest": metadata.get("model_digest"),
    }


def _write_saelens(sae: "SparseAutoencoder") -> tuple[dict, dict[str, Tensor]]:
    _check(sae, "saelens", activations=("topk", "relu", "jumprelu"), scale=False)
    architecture = "standard" if sae.activation == "relu" else sae.activation
    if sae.is_transcoder:
        if sae.activation == "topk":
            _no_place("saelens", "a transcoder with top-k")
        parts = ["jumprelu"] * (sae.activation == "jumprelu") + ["skip"] * (sae.skip is not None)
        architecture = "_".join([*parts, "transcoder"])
    elif sae.skip is not None:
        _no_place("saelens", "an SAE with a skip")
    metadata = {"hook_name": sae.hook_in, "model_digest": sae.model_digest}
    if sae.is_transcoder:
        metadata["hook_name_out"] = sae.hook_out
    config = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.centred,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if sae.is_transcoder:
        config["d_out"] = sae.d_out
    if sae.activation == "topk":
        config["k"] = sae.k
    weights = {
        "W_enc": sae.encoder.mT,
        "b_enc": sae.encoder_bias,
        "W_dec": sae.decoder,
        "b_dec": sae.decoder_bias,
        "threshold": sae.threshold,
        "W_skip": sae.skip,
    }
    return config, {name: weight for name, weight in weights.items() if weight is not None}


def _read_authors(
    config: dict, weights: dict[str, Tensor], name: str, hook: str | None
) -> dict[str, Any]:
    for option in ("bilinear_encoder", "token_lookup"):
        if config.get(option):
            _refuse(option, True, "false")
    point, target = config["point"], config.get("target")
    for each in (point, target or ["", 0]):
        if not isinstance(each, list) or len(each) != 2:
            _refuse("point", each, "a name and a layer, ['mlp-out', 4]")
    encoder = weights["w_enc.weight"]
    at = hook or _authors_hook(*point)
    return {
        "encoder": encoder,
        "decoder": weights["w_dec.weight"].mT,
        "encoder_bias": weights.get("w_enc.bias", encoder.new_zeros(len(encoder))),
        "decoder_bias": weights["b_dec"],
        "hook_in": at,
        "hook_out": _authors_hook(*target) if target else at,
        "activation": "signed_topk",
        "k": config["k"],
        "scale": float(config.get("normalize") or 1.0),
        "model_digest": config.get("model_digest"),
    }


def _write_authors(sae: "SparseAutoencoder") -> tuple[dict, dict[str, Tensor]]:
    _check(sae, "authors", activations=("signed_topk",), scale=True)
    if not sae.centred or sae.skip is not None or sae.n_latents % sae.d_in:
        _no_place("authors", "an SAE that is not centred, has a skip, or no whole expansion")
    config = {
        "point": _authors_point(sae.hook_in),
        "target": _authors_point(sae.hook_out) if sae.is_transcoder else None,
        "d_model": sae.d_in,
        "expansion": sae.n_latents // sae.d_in,
        "k": sae.k,
        "normalize": None if sae.scale == 1 else sae.scale,
        "encoder_bias": bool(sae.encoder_bias.any()),
        "bilinear_encoder": False,
        "token_lookup": False,
        "model_digest": sae.model_digest,
    }
    weights = {
        "w_enc.weight": sae.encoder,
        "w_dec.weight": sae.decoder.mT,
        "b_dec": sae.decoder_bias,
    }
    return config, {**weights, "w_enc.bias": sae.encoder_bias} if config[
        "encoder_bias"
    ] else weights


_READERS = {"sparsify": _read_sparsify, "saelens": _read_saelens, "authors": _read_authors}
_WRITERS = {"sparsify": _write_sparsify, "saelens": _write_saelens, "authors": _write_authors}


def hook_of_module(name: str) -> str:
    """TransformerLens's name of what a Hugging Face module gives out; its own names stay.

    Raises:
        ValueError: if it cannot be told.
    """
    if "hook_" in name:
        return name
    *_, last = name.split(".")
    if last in _EMBEDDINGS:
        return "hook_embed"
    match = re.fullmatch(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.?(.*)", name)
    if match is None or match[2] not in _MODULES:
        raise ValueError(
            f"The hook point of {name!r} cannot be told: say hook=, such as 'blocks.2.mlp.hook_in'."
        )
    return f"blocks.{match[1]}.{_MODULES[match[2]]}"


def _input_of(hook: str) -> str:
    """Where what is written at an MLP's output is read."""
    match = re.fullmatch(r"(blocks\.\d+)\.(hook_mlp_out|mlp\.hook_out)", hook)
    if match is None:
        raise ValueError(f"A transcoder to {hook} reads nothing that is known here.")
    return f"{match[1]}.mlp.hook_in"


def _authors_hook(point: str, layer: int) -> str:
    name = point.replace("-", "_")
    if name not in _AUTHORS_POINTS:
        _refuse("point", point, ", ".join(_AUTHORS_POINTS))
    return f"blocks.{layer}.{_AUTHORS_POINTS[name]}"


def _authors_point(hook: str) -> list:
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook.replace(".mlp.hook_out", ".hook_mlp_out"))
    names = {ours: theirs for theirs, ours in _AUTHORS_POINTS.items()}
    if match is None or match[2] not in names:
        _no_place("authors", f"the hook point {hook}")
    return [names[match[2]].replace("_", "-"), int(match[1])]


def _check(
    sae: "SparseAutoencoder", layout: Layout, *, activations: tuple[str, ...], scale: bool
) -> None:
    if sae.activation not in activations:
        _no_place(layout, f"the activation {sae.activation}")
    if not scale and sae.scale != 1:
        _no_place(layout, f"scale={sae.scale}")


def _no_place(layout: Layout, what: str) -> NoReturn:
    raise ValueError(f"The layout of {layout} has no place for {what}: choose another.")


def _refuse(option: str, value: object, supported: str) -> NoReturn:
    raise ValueError(f"This SAE has {option}={value!r}; supported is {supported}.")
