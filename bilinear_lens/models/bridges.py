"""Any causal language model with TransformerLens's hooks, bilinear or not."""

from pathlib import Path

from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_config_from_hf,
    build_bridge_from_module,
)
from transformers import PreTrainedTokenizerBase

from bilinear_lens.models.checkpoints import load_checkpoint
from bilinear_lens.models.components import check_bilinear
from bilinear_lens.models.transformer import HookedBilinearTransformer


def load_bridge(
    name_or_path: str | Path, *, tokenizer: PreTrainedTokenizerBase | str | Path | None = None
) -> TransformerBridge:
    """A `HookedBilinearTransformer`, or, if the model is not bilinear, a plain TransformerBridge.

    Both with norm gains folded into the weights that follow, so that an activation that one
    function reads is the one that another was trained on.

    Args:
        name_or_path: a built-in name, a folder or a Hub id.

    Raises:
        KeyError: if the name is not known.
        ValueError: if the checkpoint cannot be read.
    """
    model, loaded = load_checkpoint(name_or_path, tokenizer=tokenizer)
    architecture, name = type(model).__name__, Path(name_or_path).name
    config = build_bridge_config_from_hf(model.config, architecture, name, model.dtype)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
    try:
        check_bilinear(model, adapter)
    except ValueError:
        bridge = build_bridge_from_module(
            model.eval(), architecture, hf_config=model.config, tokenizer=loaded, model_name=name
        )
        bridge.enable_compatibility_mode(
            disable_warnings=True, center_unembed=False, fold_value_biases=False
        )
        return bridge
    return HookedBilinearTransformer.from_hf(model, loaded, name=name)
