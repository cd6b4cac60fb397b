"""What decides a language model, apart from its text."""

import math
from dataclasses import dataclass

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

GATE_NAMES = {
    "linear": "bilinear",
    "silu": "SwiGLU",
    "relu": "ReGLU",
    "gelu": "GeGLU",
    "sigmoid": "GLU",
}
"""What a gated linear unit is called (arXiv 2002.05202), by its gate's activation."""


def gate_name(activation: str) -> str:
    """The usual name of a gate, or its activation's where it has none."""
    return GATE_NAMES.get(activation, activation)


@dataclass(frozen=True)
class LanguageRecipe:
    """Everything that decides what `train_language` makes, apart from the text.

    Raises:
        ValueError: if an option is out of range.
    """

    n_layers: int = 1
    d_model: int = 256
    d_mlp: int = 1024
    n_heads: int = 8
    n_ctx: int = 256
    vocab_size: int = 4096
    activation: str = "linear"
    """The gate's activation: "linear" is bilinear, "silu" SwiGLU, "relu" ReGLU, "gelu" GeGLU."""
    epochs: float = 10.0
    """Passes over the text, unless `tokens` is given."""
    tokens: int | None = None
    """Train on so many, rounded up to whole steps; a stream, whose end is not known, needs it."""
    batch_size: int = 32
    """Windows of `n_ctx` tokens at once, on each device."""
    gradient_accumulation: int = 1
    """Batches a step."""
    gradient_checkpointing: bool = False
    """Keep the activations between layers alone: less memory, about a third more time."""
    bf16: bool = True
    """Forward passes in bfloat16, of float32 weights, and a model saved in bfloat16."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    latent_noise: float = 0.0
    """Gaussian noise on what attention, MLPs and the unembedding read; see `regularisers`."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises; it then falls as a cosine."""
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("n_layers", "d_model", "d_mlp", "n_heads", "n_ctx", "vocab_size", "batch_size")
        for name in (*sizes, "gradient_accumulation", "epochs", "tokens", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, not {value}.")
        for name in ("weight_decay", "latent_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more, and finite.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} must be a share of the steps.")
        if self.activation not in ACT2FN:
            raise ValueError(
                f"activation={self.activation!r} must be linear, silu, relu, gelu or another that "
                "Transformers knows."
            )
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model={self.d_model} must be a multiple of 2 * n_heads={2 * self.n_heads}: "
                "rotary positions turn each head's dimensions in pairs."
            )
        if self.vocab_size < 257:
            raise ValueError(
                f"vocab_size={self.vocab_size} cannot hold the 256 bytes and the end of text: "
                "give 257 or more."
            )

    def steps(self, n_windows: int | None, *, n_processes: int = 1) -> int:
        """How many steps a run takes.

        Args:
            n_windows: the text's; None for a stream, of which the recipe must say how many tokens.
        """
        a_step = self._windows_a_step(n_processes)
        if self.tokens is not None:
            return math.ceil(self.tokens / (a_step * self.n_ctx))
        if n_windows is None:
            raise ValueError("A stream has no known end: say how many tokens to train on.")
        return math.ceil(self.epochs * math.ceil(n_windows / a_step))

    def tokens_in(self, steps: int, n_windows: int | None, *, n_processes: int = 1) -> int:
        """How many tokens so many steps see; the last step of a pass sees the rest of the text."""
        a_step = self._windows_a_step(n_processes)
        if n_windows is None:
            return steps * a_step * self.n_ctx
        passes, more = divmod(steps, math.ceil(n_windows / a_step))
        return (passes * n_windows + more * a_step) * self.n_ctx

    def _windows_a_step(self, n_processes: int) -> int:
        return self.batch_size * self.gradient_accumulation * n_processes

    def model(self, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
        """A freshly initialised model; the seed must have been set by the caller."""
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.d_model,
            intermediate_size=self.d_mlp,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            max_position_embeddings=self.n_ctx,
            hidden_act=self.activation,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
        # No pad token: Llama would freeze its embedding at zero, and it is the first token, too.
        tokens = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": None}
        for name, token in tokens.items():
            setattr(config, f"{name}_token_id", token)
        model = LlamaForCausalLM(config)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return model
