"""Tables of tokens as HTML: an eigenvector a row, the tokens at both its ends as shaded chips."""

import math
from html import escape

import pandas as pd

from bilinear_lens.views.document import Fragment
from bilinear_lens.views.style import NEGATIVE, POSITIVE, rgba, visible

_EIGENVECTOR_COLUMNS = (
    "eigenvector",
    "value",
    "share",
    "end",
    "token",
    "projection",
    "contribution",
)
_PAIR_COLUMNS = ("token_a", "token_b", "interaction")

# Colours are inherited or half transparent: the page or notebook around decides light or dark.
# The doubled class outweighs JupyterLab's own rules for tables.
_STYLE = """<style>
.lens.lens {
  width: 100%; table-layout: auto; border-collapse: collapse; color: inherit; background: none;
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
.lens.lens :is(th, td) {
  padding: 9px 16px 9px 0; border: 0; border-bottom: 1px solid rgba(127, 133, 141, .25);
  text-align: left; vertical-align: top; background: none; color: inherit;
}
.lens.lens tr { background: none; }
.lens.lens tbody tr:last-child > td { border-bottom: 0; }
.lens.lens th { font-weight: 600; font-size: 12px; opacity: .8; white-space: nowrap; }
.lens.lens .number {
  width: 1%; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
}
.lens.lens .meter { display: block; height: 3px; margin: 3px 0 0 auto; border-radius: 2px; }
.lens.lens .chip {
  display: inline-block; margin: 0 5px 5px 0; padding: 0 7px; border-radius: 6px;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 13px; unicode-bidi: isolate; white-space: pre-wrap; overflow-wrap: anywhere;
}
@media (max-width: 640px) {
  .lens.lens.eigenvectors, .lens.lens.eigenvectors tbody { display: block; }
  .lens.lens.eigenvectors thead { display: none; }
  .lens.lens.eigenvectors tr {
    display: grid; grid-template-columns: repeat(3, 1fr); padding: 9px 0;
  }
  .lens.lens.eigenvectors tr + tr { border-top: 1px solid rgba(127, 133, 141, .25); }
  .lens.lens.eigenvectors td { width: auto; padding: 2px 0; border: 0; text-align: left; }
  .lens.lens.eigenvectors td.end { grid-column: 1 / -1; }
  .lens.lens.eigenvectors td::before {
    content: attr(data-name); display: block; font-size: 11px; opacity: .8;
  }
  .lens.lens.eigenvectors .meter { margin-left: 0; }
}
</style>
"""


def eigenvectors(table: pd.DataFrame) -> Fragment:
    """One row for each eigenvector: its value, its share, and the tokens at both its ends.

    A chip's colour is the sign of what its token adds, its shade the size of the projection;
    hovering it shows projection and contribution.

    Args:
        table: a row for each token, with the columns `eigenvector` (from 0), `value`, `share`
            (signed), `end` ("+" or "-"), `token`, `projection` and `contribution`.

    Raises:
        ValueError: if a column is missing, or an end is neither "+" nor "-".
    """
    _check_columns(table, _EIGENVECTOR_COLUMNS)
    unknown = set(table["end"]) - {"+", "-"}
    if unknown:
        raise ValueError(f'end holds {sorted(unknown)}: it must be "+" or "-".')
    largest_value = _largest(table, "value")
    largest_projection = _largest(table, "projection")
    rows = []
    for number, tokens in table.groupby("eigenvector"):
        chips = {"+": "", "-": ""}
        for row in tokens.to_dict("records"):
            note = f"projection {row['projection']:+.3g}, contribution {row['contribution']:+.3g}"
            shade = math.copysign(row["projection"], row["contribution"])
            chips[row["end"]] += _chip(row["token"], shade, largest_projection, note)
        value, share = tokens["value"].iloc[0], tokens["share"].iloc[0]
        rows.append(
            f'<tr><td class="number" data-name="eigenvector">{number}</td>'
            f'<td class="number" data-name="value">{_meter(value, largest_value)}</td>'
            f'<td class="number" data-name="share">{_minus(f"{share:+.1%}")}</td>'
            f'<td class="end" data-name="+ end">{chips["+"]}</td>'
            f'<td class="end" data-name="&minus; end">{chips["-"]}</td></tr>'
        )
    return _table(
        "eigenvectors",
        '<th class="number">eigenvector</th><th class="number">value</th>'
        '<th class="number">share</th><th>+ end</th><th>&minus; end</th>',
        rows,
    )


def pairs(table: pd.DataFrame) -> Fragment:
    """One row for each pair of tokens, with its interaction.

    Args:
        table: columns `token_a`, `token_b` and `interaction`.

    Raises:
        ValueError: if a column is missing.
    """
    _check_columns(table, _PAIR_COLUMNS)
    largest = _largest(table, "interaction")
    rows = []
    for row in table.to_dict("records"):
        value = row["interaction"]
        note = f"interaction {value:+.3g}"
        first, second = (
            _chip(row[column], value, largest, note) for column in ("token_a", "token_b")
        )
        rows.append(
            f'<tr><td class="number">{_meter(value, largest)}</td><td>{first}{second}</td></tr>'
        )
    return _table("pairs", '<th class="number">interaction</th><th>tokens</th>', rows)


def _table(kind: str, heads: str, rows: list[str]) -> Fragment:
    return Fragment(
        f'{_STYLE}<table class="lens {kind}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _chip(token: str, value: float, largest: float, note: str) -> str:
    shade = rgba(NEGATIVE if value < 0 else POSITIVE, 0.08 + 0.5 * abs(value) / largest)
    return (
        f'<span class="chip" style="background:{shade}" title="{_minus(note)}">'
        f"{escape(visible(token))}</span>"
    )


def _meter(value: float, largest: float) -> str:
    """The number over a bar of its size."""
    colour = rgba(NEGATIVE if value < 0 else POSITIVE)
    width = 100 * abs(value) / largest
    return (
        f'{_minus(f"{value:+#.3g}")}<span class="meter" '
        f'style="width:{width:.0f}%;background:{colour}"></span>'
    )


def _minus(number: str) -> str:
    """A hyphen is too short beside a plus."""
    return number.replace("-", "&minus;")


def _largest(table: pd.DataFrame, column: str) -> float:
    return max(map(abs, table[column]), default=0.0) or 1.0


def _check_columns(table: pd.DataFrame, columns: tuple[str, ...]) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"The table lacks the columns {missing}; it has {list(table.columns)}.")
