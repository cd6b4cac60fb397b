"""HookedBilinearTransformer: a Hugging Face model with bilinear MLPs, hooked by TransformerLens.

- the whole `TransformerBridge` surface: hooks, caching, generation, stacked weights
- by default norm gains are folded, so that weights read in TransformerLens's coordinates
- `bilinear_tensor(layer)` is exactly what an MLP computes, from its `hook_in` to its `hook_out`
- output directions and token bases are what one contracts that tensor with
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from keyword import iskeyword
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_config_from_hf,
    configure_tokenizer,
)
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bilinear_lens.basis import Basis
from bilinear_lens.models import vocabulary
from bilinear_lens.models.checkpoints import (
    BUILT_IN,
    check_new,
    load_checkpoint,
    name_gate_linear,
    save_checkpoint,
    with_linear_name,
)
from bilinear_lens.models.components import (
    check_bilinear,
    check_finite,
    check_linear_gates,
    use_bilinear_components,
)
from bilinear_lens.models.directions import DirectionsBridge, Output
from bilinear_lens.models.eigenbasis import Eigenbasis


class HookedBilinearTransformer(DirectionsBridge):
    """A causal language model whose MLPs are bilinear, with TransformerLens hooks.

    Make one with `from_pretrained`, `from_hf` or `from_config`.
    """

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | Literal["auto"] = torch.float32,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        fold: bool = True,
    ) -> "HookedBilinearTransformer":
        """Load a model by name.

        Args:
            name_or_path: a model that ships with the package (`tinystories-1l`,
                `tinystories-4l`), a local folder, or a Hugging Face Hub id. A folder holds a stock
                Hugging Face model or the layout of the paper's authors; weights are safetensors.
            revision: branch, tag or commit on the Hub.
            dtype: "auto" is what the weights are saved in.
            tokenizer: replaces the checkpoint's own: an object, a folder or a name.
            fold: as in `from_hf`.

        Raises:
            KeyError: if the name is not known, listing the near ones.
            ValueError: if the checkpoint cannot be read, contradicts its config, or is not a
                bilinear model.
        """
        model, loaded_tokenizer = load_checkpoint(
            name_or_path, revision=revision, dtype=dtype, tokenizer=tokenizer
        )
        hooked = cls.from_hf(
            model.to(device),  # pyright: ignore[reportArgumentType]
            loaded_tokenizer,
            name=Path(name_or_path).name,
            fold=fold,
        )
        if (revision, dtype, tokenizer, fold) == (None, torch.float32, None, True):
            folder = Path(name_or_path)
            built_in = str(name_or_path) in BUILT_IN
            hooked._source = str(folder.resolve() if folder.is_dir() and not built_in else folder)
        return hooked

    @classmethod
    def from_hf(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str | None = None,
        fold: bool = True,
    ) -> "HookedBilinearTransformer":
        """Hook a loaded Hugging Face model, in place: it shares its weights with the result.

        Args:
            fold: fold norm gains into the weights that follow, as `enable_compatibility_mode`
                does. The unembedding is not centred, because `output_direction` does that, and
                value biases stay where they are, so that the result can be saved. With False the
                weights stay raw; token and output directions are then not to be had.

        Raises:
            ValueError: if the model is not bilinear, a weight is not finite, or TransformerLens
                does not compute what the model does.
        """
        probe = torch.arange(min(8, model.config.vocab_size), device=model.device)[None]
        with torch.no_grad():
            expected = model.eval()(input_ids=probe).logits.log_softmax(-1)
        architecture = type(model).__name__
        config = build_bridge_config_from_hf(
            model.config,
            architecture,
            name or Path(model.config.name_or_path or "").name or architecture,
            model.dtype,
        )
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
        check_bilinear(model, adapter)
        check_finite(model)
        use_bilinear_components(adapter)
        adapter.cfg.device = str(model.device)
        adapter.prepare_model(model)
        if tokenizer is not None:
            vocabulary.check_tokenizer(tokenizer, model.config.vocab_size)
            # a copy, because TransformerLens adds tokens that it misses
            tokenizer = configure_tokenizer(copy.deepcopy(tokenizer), adapter.cfg)
        bridge = cls(model, adapter, tokenizer)
        check_linear_gates(bridge)
        with torch.no_grad():
            error = disagreement(bridge(probe).log_softmax(-1), expected)
        if error:
            raise ValueError(
                f"TransformerLens wires {architecture} otherwise than Hugging Face does: "
                f"log-probabilities are off by {error:.2g}, so nothing read here would be true."
            )
        if fold:
            bridge.enable_compatibility_mode(
                disable_warnings=True, center_unembed=False, fold_value_biases=False
            )
        bridge._folded = fold
        return bridge

    @classmethod
    def from_config(
        cls,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        fold: bool = True,
    ) -> "HookedBilinearTransformer":
        """A model with random weights, from a Hugging Face config with a linear gate.

        For example `LlamaConfig(hidden_act="linear", ...)`. Seed it with `torch.manual_seed`.

        Raises:
            ValueError: if the config's MLPs are not bilinear.
        """
        config = with_linear_name(config)
        return cls.from_hf(AutoModelForCausalLM.from_config(config), tokenizer, fold=fold)

    def save_pretrained(self, path: str | Path) -> None:
        """Save as a plain Hugging Face folder: config, safetensors, tokenizer.

        The weights are the current ones, folded if the model is. `AutoModelForCausalLM` loads the
        folder and gives the same log-probabilities. The folder appears whole or not at all.

        Raises:
            ValueError: if `path` exists or cannot be made, or if the folded weights cannot be
                expressed in this architecture (then load with `fold=False` and save that).
        """
        check_new(path)
        save_checkpoint(self._plain_model(), self.tokenizer, path)

    @property
    def source(self) -> str | None:
        """The name or folder from which `from_pretrained` loads this again, if it can."""
        return getattr(self, "_source", None)

    def add_eigenbasis(
        self,
        name: str,
        layer: int,
        directions: Basis | Float[Tensor, "n d_model"] | Sequence[Output],
        k: int,
    ) -> None:
        """Make hook points of the top eigenvectors of some output directions of a layer's MLP.

        `blocks.{layer}.mlp.eigen.{name}.hook_acts`, `[batch, pos, direction, k]`, is what each
        eigenvector adds along its direction: it is cached like any activation, and an edit of it
        changes the forward pass; see `Eigenbasis`. It is made of the weights as they are now.

        Args:
            name: a Python name that this layer's eigenbases do not have yet.
            directions: outputs, as for `output_direction`, or directions in the residual stream.
            k: how many eigenvectors of each.

        Raises:
            ValueError: if the name is bad or taken, the layer, an output or k out of range, or a
                direction is a combination of the others.
        """
        tensor, eigen = self.bilinear_tensor(layer), self.blocks[layer].mlp.eigen
        if not name.isidentifier() or iskeyword(name) or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"name={name!r} must be a Python name, such as 'she', and none that Python or "
                "torch.nn.ModuleDict has."
            )
        if name in eigen:
            raise ValueError(
                f"Layer {layer} has an eigenbasis {name!r} already: give another name, or "
                f"remove_eigenbasis({name!r}, {layer}) first."
            )
        if isinstance(directions, (str, tuple)):  # a tuple is a pair of tokens
            raise ValueError(f"directions={directions!r} must be a list: [{directions!r}].")
        outputs = directions.directions if isinstance(directions, Basis) else directions
        rows = [self.output_direction(each, layer=layer) for each in outputs]
        if not rows:
            raise ValueError("directions are none: give at least one output.")
        eigen[name] = Eigenbasis(tensor, torch.stack(rows), k)
        self._scan_existing_hooks(eigen[name], f"blocks.{layer}.mlp.eigen.{name}")

    def remove_eigenbasis(self, name: str, layer: int) -> None:
        """Take back what `add_eigenbasis` did.

        Raises:
            ValueError: if there is no such layer, or none of that name in it.
        """
        self.bilinear_tensor(layer)
        eigen = self.blocks[layer].mlp.eigen
        if name not in eigen:
            raise ValueError(f"Layer {layer} has no eigenbasis {name!r}; it has {list(eigen)}.")
        del eigen[name], self._hook_registry[f"blocks.{layer}.mlp.eigen.{name}.hook_acts"]

    @contextmanager
    def eigenbasis(
        self,
        name: str,
        layer: int,
        directions: Basis | Float[Tensor, "n d_model"] | Sequence[Output],
        k: int,
    ) -> Iterator[None]:
        """`add_eigenbasis` for a `with` block."""
        self.add_eigenbasis(name, layer, directions, k)
        try:
            yield
        finally:
            self.remove_eigenbasis(name, layer)

    def fingerprint(self) -> str:
        """A SHA-256 of the current weights and token labels: what an analysis was made from."""
        digest = hashlib.sha256(json.dumps(self.token_labels).encode())
        for name, weight in sorted(self.original_model.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
            digest.update(weight.cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
    ) -> Tensor:
        """As TransformerLens's, but a text past the context length is an error unless `truncate`.

        Raises:
            ValueError: if there is no tokenizer, a text is empty, or one is too long.
        """
        if self.tokenizer is None:
            raise ValueError("This model has no tokenizer: give tokens, or load it with tokenizer=")
        texts = [input] if isinstance(input, str) else input
        if not texts or not all(texts):
            raise ValueError("An empty prompt has no tokens: give some text.")
        tokens = super().to_tokens(input, prepend_bos, padding_side, move_to_device, truncate)
        self._check_context(tokens)
        return tokens

    def forward(self, input: str | list[str] | Tensor, *args, **kwargs):
        """As TransformerBridge's.

        Raises:
            ValueError: if the prompt is empty, longer than the context, or of unknown ids.
        """
        if isinstance(input, Tensor) and not input.is_floating_point():
            self._check_context(input)
        return super().forward(input, *args, **kwargs)

    def _check_context(self, tokens: Tensor) -> None:
        n_tokens = tokens.shape[-1]
        if n_tokens == 0:
            raise ValueError("An empty prompt has no tokens: give some text.")
        if n_tokens > self.cfg.n_ctx:
            raise ValueError(
                f"The prompt has {n_tokens} tokens; this model's context is {self.cfg.n_ctx}. "
                "Shorten it, or pass truncate=True to to_tokens."
            )
        largest, smallest = int(tokens.max()), int(tokens.min())
        if smallest < 0 or largest >= self.cfg.d_vocab:
            raise ValueError(
                f"Token ids {smallest} to {largest} must lie between 0 and {self.cfg.d_vocab - 1}: "
                "the tokenizer is not this model's."
            )

    def _plain_model(self) -> PreTrainedModel:
        """A Hugging Face model with the current weights, not wrapped."""
        wrapped = self.original_model
        config: PretrainedConfig = copy.deepcopy(wrapped.config)  # pyright: ignore
        name_gate_linear(config)  # whatever it was: the MLPs are bilinear
        if self._weights_processed:  # the unembedding took the final norm's gain
            config.tie_word_embeddings = False
        plain = AutoModelForCausalLM.from_config(config).to(wrapped.dtype).eval()
        weights = {
            name.replace("._original_component", ""): weight.cpu()
            for name, weight in wrapped.state_dict().items()
        }
        plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
        plain.generation_config = wrapped.generation_config
        probe = torch.arange(min(8, self.cfg.d_vocab))[None]
        with torch.no_grad():
            expected = self(probe.to(self.cfg.device)).log_softmax(-1).cpu()
            actual = plain(input_ids=probe).logits.log_softmax(-1)
        if error := disagreement(actual, expected):
            raise ValueError(
                f"{type(plain).__name__} has no place for its own folded weights: its "
                f"log-probabilities would be off by {error:.2g}. Load the model with fold=False "
                "and save that; if hooks are attached, reset_hooks() first."
            )
        return plain


def disagreement(actual: Tensor, expected: Tensor) -> float:
    """Mean difference of log-probabilities; 0 if rounding explains it."""
    error = (actual - expected).abs().mean().item()
    rounding = 1e-4 if actual.dtype.itemsize >= 4 else 0.1
    return 0.0 if error < rounding else error
