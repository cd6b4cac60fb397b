"""What a model is, in a screenful: its shape, and how concentrated the spectra of its layers are.

- `describe` takes any language model, or a classifier, and says what its MLPs are
- `output_ranks` reads the whole spectra of some outputs, `overview` averages them for each layer
"""

from collections import Counter

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import GatedMLPBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bilinear_lens.analysis.interactions import random_spectrum
from bilinear_lens.models.classifier import HookedBilinearClassifier
from bilinear_lens.models.components import LINEAR_ACTIVATIONS
from bilinear_lens.models.transformer import HookedBilinearTransformer
from bilinear_lens.spectrum import effective_ranks
from bilinear_lens.tensor import BilinearTensor

TOPS = (1, 8)
"""Of how many eigenvectors the share is told."""

RANDOM_DRAWS = 3
"""As in `interactions`."""

BILINEAR = "bilinear: gated, without an activation"


def overview(
    model: HookedBilinearTransformer | HookedBilinearClassifier,
    *,
    n_tokens: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    """How concentrated the spectra of each layer are, over sampled output tokens or all classes.

    Args:
        model: a folded transformer, or a classifier.
        n_tokens: how many tokens to sample, or all where there are fewer. Of a classifier all
            classes are read.
        seed: of the sample.

    Returns:
        A row for each layer:

        - `layer`; `rank`, the hidden width of its MLP; `norm`, the Frobenius norm of its tensor
        - `outputs`: how many were read
        - `effective_rank`: their mean, of whole spectra; `effective_rank_low` and
          `effective_rank_high` are the 95 % interval of the mean over the vocabulary, which is the
          mean itself where all were read
        - `top_1`, `top_8`: the share of `||Q||_F^2` that the top eigenvectors hold, the mean
        - `random_effective_rank`, `random_top_1`, `random_top_8`: the same for Gaussian weights of
          the same shape

        Tensors are those from a layer's `mlp.hook_in` to its `mlp.hook_out`. What outputs have to
        do with a layer is NaN where it writes nothing, or nothing that outputs read: the inner
        layers of a classifier without residual connections.

    Raises:
        ValueError: if `n_tokens` is less than 2, or the model is not folded.
    """
    ranks = output_ranks(model, n_tokens=n_tokens, seed=seed)
    n_all = len(_outputs(model))
    controls: dict[tuple[int, ...], dict[str, float]] = {}
    rows = []
    for layer in range(model.cfg.n_layers):
        tensor = _tensor(model, layer)
        shape = (*tensor.left.shape, tensor.affine)
        if shape not in controls:
            draws = [random_spectrum(tensor, seed=draw).values for draw in range(RANDOM_DRAWS)]
            means = _concentration(torch.stack(draws)).mean()
            controls[shape] = {f"random_{name}": value for name, value in means.items()}
        read = ranks[ranks["layer"] == layer]
        mean, n = read["effective_rank"].mean(), len(read)
        # of a sample without replacement: nothing is left to chance once all were drawn
        error = (read["effective_rank"].var() / n * (1 - n / n_all)) ** 0.5 if n < n_all else 0.0
        rows.append(
            {
                "layer": layer,
                "rank": _width(model, layer),
                "norm": tensor.norm().item(),
                "outputs": n,
                "effective_rank": mean,
                "effective_rank_low": mean - 1.96 * error,
                "effective_rank_high": mean + 1.96 * error,
                **read[[f"top_{k}" for k in TOPS]].mean(),
                **controls[shape],
            }
        )
    return pd.DataFrame(rows)


def output_ranks(
    model: HookedBilinearTransformer | HookedBilinearClassifier,
    *,
    n_tokens: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    """The rows that `overview` averages.

    Returns:
        `layer`, `output` (a token or class by name, against the mean of all), `effective_rank`,
        `top_1`, `top_8`.

    Raises:
        ValueError: as `overview`.
    """
    if n_tokens < 2:
        raise ValueError(f"n_tokens={n_tokens} must be 2 or more: an interval needs two.")
    labels, parts = _outputs(model), []
    ids = list(range(len(labels)))
    if isinstance(model, HookedBilinearTransformer):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randperm(len(labels), generator=generator)[:n_tokens].tolist()
    for layer in range(model.cfg.n_layers):
        named = pd.DataFrame({"layer": layer, "output": [labels[i] for i in ids]})
        values = torch.full((len(ids), 1), torch.nan)
        if isinstance(model, HookedBilinearTransformer):
            values = _all_values(_tensor(model, layer), model.output_directions(ids, layer=layer))
        elif model.cfg.residual or layer == model.cfg.n_layers - 1:
            contrast = "mean" if len(ids) > 1 else None
            directions = torch.stack([model.output_direction(i, contrast) for i in ids])
            values = _all_values(_tensor(model, layer), directions)
        parts.append(named.join(_concentration(values)))
    return pd.concat(parts, ignore_index=True)


def describe(
    model: PreTrainedModel | HookedBilinearClassifier,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, str]:
    """What a model is, a line for each fact: a language model as it was loaded, or a classifier.

    `MLPs` is `BILINEAR` or says what the model has instead, which is no error here.

    Raises:
        ValueError: if TransformerLens does not know the architecture.
    """
    total = sum(weight.numel() for weight in model.parameters())
    dtypes = Counter(str(w.dtype).removeprefix("torch.") for w in model.parameters())
    if isinstance(model, HookedBilinearClassifier):
        cfg = model.cfg
        mlps, in_mlps = BILINEAR, sum(w.numel() for w in model.blocks.parameters())
        shape = {
            "input": " x ".join(map(str, cfg.input_shape)),
            "layers": f"{cfg.n_layers}{', residual' if cfg.residual else ''}",
            "width": f"{cfg.d_model}, MLPs {_width(model, 0)}",
            "classes": f"{cfg.n_classes}: {', '.join(cfg.labels)}",
        }
        norms, architecture = "none", type(model).__name__
    else:
        architecture = type(model).__name__
        adapter = _adapter(model, architecture)
        cfg, mlps = adapter.cfg, _mlps(model, adapter)
        in_mlps = sum(w.numel() for name, w in model.named_parameters() if _in_mlp(name, adapter))
        grouped = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        shape = {
            "layers": f"{cfg.n_layers}",
            "width": f"{cfg.d_model}, MLPs {cfg.d_mlp}",
            "heads": f"{cfg.n_heads} of width {cfg.d_head}"
            + (f", {grouped} of keys and values" if grouped != cfg.n_heads else ""),
            "context": f"{cfg.n_ctx:,} tokens",
            "vocabulary": f"{cfg.d_vocab:,} tokens",
            "tokenizer": "none" if tokenizer is None else f"of {len(tokenizer):,} tokens",
        }
        norms = _norms(model, adapter)
    return {
        "MLPs": mlps,
        "architecture": architecture,
        **shape,
        "parameters": f"{total:,}, of which {in_mlps:,} in MLPs",
        "weights": ", ".join(dtypes),
        "norms": norms,
    }


def _adapter(model: PreTrainedModel, architecture: str) -> ArchitectureAdapter:
    config = build_bridge_config_from_hf(model.config, architecture, architecture, model.dtype)
    return ArchitectureAdapterFactory.select_architecture_adapter(config)


def _mlps(model: PreTrainedModel, adapter: ArchitectureAdapter) -> str:
    """`BILINEAR`, or what the MLPs of a language model are instead."""
    component = adapter.components["blocks"].submodules.get("mlp")
    if component is None:
        return "none that TransformerLens knows: no tensors"
    if not isinstance(component, GatedMLPBridge):
        kind = "mixtures of experts" if "MoE" in type(component).__name__ else "plain"
        return f"{kind}: not bilinear, no tensors"
    activations = {
        type(module).__name__.removesuffix("Activation")
        for name, module in model.named_modules()
        if _in_mlp(name, adapter)
        and "act" in name.rpartition(".")[2]
        and not isinstance(module, LINEAR_ACTIVATIONS)
    }
    if not activations:
        return BILINEAR
    return (
        f"gated through {', '.join(sorted(activations))}: not bilinear, no tensors. "
        "`bilinear-lens bilinearize` makes them bilinear by finetuning"
    )


def _in_mlp(name: str, adapter: ArchitectureAdapter) -> bool:
    """Whether a parameter or module is of a block's MLP."""
    blocks = adapter.components["blocks"]
    mlp = blocks.submodules.get("mlp")
    return mlp is not None and name.startswith(f"{blocks.name}.") and f".{mlp.name}." in name


def _norms(model: PreTrainedModel, adapter: ArchitectureAdapter) -> str:
    """Whether there are gains that loading folds into the weights."""
    gains = [
        gain
        for module in model.modules()
        if "Norm" in type(module).__name__
        for name, gain in module.named_parameters()
        if name == "weight"
    ]
    if not gains:
        return "none with gains"
    if all((gain == gain[0]).all() for gain in gains):  # 1, or 0 where it is added to 1
        return "folded: all gains are the same"
    after = "ln2_post" in adapter.components["blocks"].submodules
    stay = "; those after an MLP stay, and enter its output directions" if after else ""
    return f"foldable: loading folds their gains into the weights{stay}"


def _outputs(model: HookedBilinearTransformer | HookedBilinearClassifier) -> list[str]:
    """All that the model can write, by name."""
    if isinstance(model, HookedBilinearTransformer):
        return model.token_labels
    return list(model.cfg.labels)


def _width(model: nn.Module, layer: int) -> int:
    """The hidden width of an MLP; its tensor's rank is one more where it writes with a bias."""
    weight = model.get_submodule(f"blocks.{layer}.mlp").W_out
    assert isinstance(weight, Tensor)
    return len(weight)


def _tensor(
    model: HookedBilinearTransformer | HookedBilinearClassifier, layer: int
) -> BilinearTensor:
    if isinstance(model, HookedBilinearTransformer):
        return model.bilinear_tensor(layer)
    return model.bilinear_tensor(layer, inputs="hidden")


def _all_values(
    tensor: BilinearTensor, directions: Float[Tensor, "n d_out"]
) -> Float[Tensor, "n all"]:
    """Eigenvalues without eigenvectors, in no order."""
    k = min(2 * tensor.rank, tensor.left.shape[1])
    return tensor.eigensolver(k, n=len(directions)).all_values(directions)


def _concentration(values: Float[Tensor, "n k"]) -> pd.DataFrame:
    """A row for each spectrum: its effective rank, and the shares of its top eigenvectors."""
    values = values.double()  # pandas shows all digits of float32, rounded or not
    squares = values.square().sort(dim=1, descending=True).values
    shares = {f"top_{k}": squares[:, :k].sum(1) / squares.sum(1) for k in TOPS}
    return pd.DataFrame({"effective_rank": effective_ranks(values), **shares})
