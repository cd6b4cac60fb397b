"""What a language model has lost: loss, agreement with another model, and multiple choice."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bilinear_lens.training.text import encode


@dataclass(frozen=True)
class Evaluation:
    """A language model on text that it was not trained on."""

    loss: float
    """Nats per token."""
    kl: float
    """Nats per token of KL divergence from the original's predictions to the model's."""
    agreement: float
    """Share of positions where the most probable next token is the original's."""


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    windows: Int[Tensor, "n n_ctx"],
    original: PreTrainedModel,
    *,
    batch_size: int = 32,
) -> Evaluation:
    """Held-out loss of `model`, and how far its predictions are from those of `original`.

    Args:
        windows: token ids, each row a text of its own.

    Raises:
        ValueError: if there are no windows, or the models' vocabularies differ.
    """
    if not len(windows) or windows.shape[1] < 2:
        raise ValueError(f"Windows of shape {list(windows.shape)} hold no next token to predict.")
    ours, theirs = (each.config.get_text_config().vocab_size for each in (model, original))
    if ours != theirs:
        raise ValueError(
            f"The models have {ours} and {theirs} tokens: their predictions cannot be compared."
        )
    totals = torch.zeros(3, dtype=torch.float64)
    for batch in tqdm(windows.split(batch_size), desc="Evaluating", leave=False):
        ours = _log_probs(model, batch)
        theirs = _log_probs(original, batch).to(ours.device)
        targets = batch[:, 1:, None].to(ours.device)
        totals += torch.stack(
            [
                -ours.gather(-1, targets).sum(),
                (theirs.exp() * (theirs - ours)).sum(),
                (ours.argmax(-1) == theirs.argmax(-1)).sum(),
            ]
        ).cpu()
    return Evaluation(*(totals / windows[:, 1:].numel()).tolist())


@dataclass(frozen=True, eq=False)
class Choices:
    """Questions of multiple choice: the start of a text, and passages one of which goes on."""

    starts: Int[Tensor, "n start"]
    options: Int[Tensor, "n option length"]
    """The first option is the true one."""

    def tensors(self) -> list[Tensor]:
        return [self.starts, self.options]


def continuation_choices(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    start: int = 96,
    length: int = 16,
    n_options: int = 4,
    limit: int = 1000,
) -> Choices:
    """Which passage goes on with a text? The other options stand at the same place in others.

    The options have equal lengths, so that their likelihoods compare as they are.

    Args:
        documents: held-out texts; those shorter than `start + length` tokens are left out.
        start: tokens of the text that are given, the tokenizer's first among them.
        length: tokens of each option.
        limit: how many questions, at most.

    Raises:
        ValueError: if fewer than `n_options` texts are long enough.
    """
    size = start + length
    rows = []
    for document in documents:
        (ids,) = encode([document], tokenizer)
        if len(ids) >= size:
            rows.append(ids[:size])
        if len(rows) == limit:
            break
    if len(rows) < n_options:
        raise ValueError(
            f"Of {len(documents)} texts {len(rows)} have {size} tokens or more; {n_options} are "
            "needed. Give more or longer text, or a smaller start."
        )
    table = torch.tensor(rows)
    passages = table[:, start:]
    others = [passages.roll(-shift, dims=0) for shift in range(n_options)]
    return Choices(table[:, :start], torch.stack(others, dim=1))


@torch.no_grad()
def multiple_choice(
    model: PreTrainedModel, choices: Choices, *, batch_size: int = 16
) -> Float[Tensor, " n"]:
    """For each question, 1 where the model finds the true option likelier than all others."""
    right = []
    n_options, length = choices.options.shape[1:]
    for starts, options in zip(
        choices.starts.split(batch_size), choices.options.split(batch_size), strict=True
    ):
        prompts = starts[:, None].expand(-1, n_options, -1)
        tokens = torch.cat([prompts, options], dim=-1).flatten(0, 1)
        log_probs = _log_probs(model, tokens, last=length)
        targets = tokens[:, -length:, None].to(log_probs.device)
        scores = log_probs.gather(-1, targets).sum(dim=(1, 2)).view(-1, n_options)
        # scores that tie, or are no numbers, tell of no knowledge
        right.append((scores[:, :1] > scores[:, 1:]).all(dim=1).float().cpu())
    return torch.cat(right)


def _log_probs(
    model: PreTrainedModel, tokens: Int[Tensor, "batch seq"], *, last: int = 0
) -> Float[Tensor, "batch predicted vocab"]:
    """Log-probabilities of each next token, or the `last` ones, without dropout, in float32."""
    training = model.training
    logits = model.eval()(input_ids=tokens.to(model.device), use_cache=False).logits[:, :-1]
    model.train(training)
    return logits[:, -last:].float().log_softmax(-1)
