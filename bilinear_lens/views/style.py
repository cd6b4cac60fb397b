"""What all views share: a colour for each sign, and how a token is written."""

POSITIVE = (59, 125, 216)
NEGATIVE = (217, 85, 44)
"""Blue and vermilion: told apart by colour-blind readers, legible on white and on black.

Only CircuitsVis's text view cannot take them: it mixes white with blue (to violet) and with red.
"""

_PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {
    ord(" "): "␣",
    ord("\n"): "⏎",
    ord("\t"): "⇥",
    0xA0: "⍽",
}


def rgba(colour: tuple[int, int, int], opacity: float = 1.0) -> str:
    """The colour as CSS and Plotly read it."""
    return f"rgba({', '.join(map(str, colour))}, {opacity:.3g})"


def visible(token: str) -> str:
    """The token with its spaces, line breaks and control characters drawn: `" girl"` is `␣girl`."""
    return token.translate(_PICTURES)
