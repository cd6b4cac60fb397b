"""Any causal language model with TransformerLens's hooks, bilinear or not."""

from pathlib import Path

import torch
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_config_from_hf,
    build_bridge_from_module,
)
from transformers import PreTrainedTokenizerBase

from bilinear_lens.models.checkpoints import load_checkpoint
from bilinear_lens.models.components import check_bilinear
from bilinear_lens.models.transformer import HookedBilinearTransformer, disagreement


@torch.no_grad()
def load_bridge(
    name_or_path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    fold: bool = True,
) -> TransformerBridge:
    """A `HookedBilinearTransformer`, or, if the model is not bilinear, a plain TransformerBridge.

    Args:
        name_or_path: a built-in name, a folder or a Hub id.
        fold: fold norm gains into the weights that follow. SAEs that other tools trained on what
            lies behind a norm want the model without. Writing weights stay as they are.

    Raises:
        KeyError: if the name is not known.
        ValueError: if the checkpoint cannot be read, or TransformerLens does not compute what the
            model does (it takes gates' activations that it does not know for SiLU).
    """
    model, loaded = load_checkpoint(name_or_path, tokenizer=tokenizer)
    architecture, name = type(model).__name__, Path(name_or_path).name
    config = build_bridge_config_from_hf(model.config, architecture, name, model.dtype)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
    try:
        check_bilinear(model, adapter)
    except ValueError:  # it is another kind of model
        probe = torch.arange(min(8, model.config.vocab_size))[None]
        expected = model.eval()(input_ids=probe).logits.log_softmax(-1)
        bridge = build_bridge_from_module(
            model, architecture, hf_config=model.config, tokenizer=loaded, model_name=name
        )
        if fold:
            bridge.enable_compatibility_mode(
                disable_warnings=True,
                center_writing_weights=False,
                center_unembed=False,
                fold_value_biases=False,
            )
        if error := disagreement(bridge(probe).log_softmax(-1), expected):
            raise ValueError(
                f"TransformerLens does not compute what {name} does: log-probabilities are off by "
                f"{error:.2g}. If it is the activation of its gates, fold=False may help."
            ) from None
        return bridge
    return HookedBilinearTransformer.from_hf(model, loaded, name=name, fold=fold)
