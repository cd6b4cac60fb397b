"""Tokens by name: a readable label for each id, and the id of exactly one token."""

from difflib import get_close_matches
from operator import index

from transformers import PreTrainedTokenizerBase

Token = str | int


def labels(tokenizer: PreTrainedTokenizerBase | None, size: int) -> list[str]:
    """A readable string for each of `size` ids; `#id` without a tokenizer.

    A token that is a fragment of a character reads as its piece in the vocabulary.
    """
    ids = range(size)
    if tokenizer is None:
        return [f"#{i}" for i in ids]
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    found = []
    for i, piece in zip(ids, pieces, strict=True):
        if piece is None:  # the embedding has more rows than the vocabulary
            found.append(f"#{i}")
        elif "\u2581" in piece:  # SentencePiece's space
            found.append(piece.replace("\u2581", " "))
        else:
            decoded = tokenizer.decode([i])
            found.append(piece if "\ufffd" in decoded or not decoded else decoded)
    return found


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Refuse a tokenizer that gives ids past the model's `size` tokens.

    Raises:
        ValueError: naming both sizes.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= size:
        raise ValueError(
            f"The tokenizer gives ids up to {largest}, but the model has {size} tokens: the "
            "tokenizer is not this model's."
        )


def token_id(token: Token, labels: list[str], tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The id of a token given as a string or an id.

    Raises:
        ValueError: if the id is out of range, or the string is not exactly one token.
    """
    if not isinstance(token, str):
        try:
            token = index(token)  # NumPy's and pandas' whole numbers, too
        except TypeError:
            raise ValueError(f"{token!r} is no token: give a string or an id.") from None
        if not 0 <= token < len(labels):
            raise ValueError(f"Token id {token} must be between 0 and {len(labels) - 1}.")
        return token
    if tokenizer is None:
        raise ValueError(
            f"This model has no tokenizer to find {token!r} with: give an id, or load "
            "the model with a tokenizer (tokenizer=..., --tokenizer)."
        )
    if labels.count(token) == 1:
        return labels.index(token)
    ids = tokenizer.encode(token, add_special_tokens=False)
    pieces = [labels[i] if i < len(labels) else f"#{i}" for i in ids]
    if pieces != [token]:
        near = get_close_matches(token, labels, n=5, cutoff=0.5)
        raise ValueError(
            f"{token!r} is not one token of this model: it reads as {pieces}. Give one token "
            f"(most words begin with a space); near ones: {near}."
        )
    return ids[0]
