"""Tokens in colour: how probable each was, or how open the choice was. Switched by CSS alone, without a script."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from html import escape

from vigor.report.runs import TokenRow

_IMPROBABLE = (0.1, 0.5, 0.8, 0.95)
"""1 - p from which a token is one shade darker."""
_OPEN = (0.1, 0.5, 1.0, 2.0)
"""Entropies in nats, the same."""
_NAMES = {"p": "probability", "e": "entropy", "n": "nothing"}
_SHADES = (12, 28, 46, 66)
"""Per cent of the colour in the background."""
STYLE = (
    "".join(
        f"body:has(#by-{kind}:checked) .{kind}{i + 1},.swatch.{kind}{i + 1}"
        f"{{background:color-mix(in srgb,{colour} {shade}%,transparent)}}"
        for kind, colour in (("p", "light-dark(#e8710a,#ff9d45)"), ("e", "light-dark(#1a73e8,#6ea8ff)"))
        for i, shade in enumerate(_SHADES)
    )
    + ".t i{font-style:normal}.swatch{padding:0 .4rem;border:1px solid var(--line)}"
)


@dataclass
class Colouring:
    """Turns tokens into HTML until the step's room for them is used up.

    Args:
        budget: tokens of a step that may be in colour.
        limit: characters of a completion that are shown.
    """

    budget: int
    limit: int
    _left: int = field(default=0, init=False)

    def new_step(self) -> None:
        """The budget starts again."""
        self._left = self.budget

    def html(self, tokens: TokenRow) -> str | None:
        """The completion with a shade a token; None where there is no room left for all of its tokens."""
        self._left -= len(tokens)
        if self._left < 0:
            return None
        made, room = [], self.limit
        for text, logp, entropy in tokens:
            room -= len(text)
            if room < 0:
                made.append(" …")
                break
            kinds = [f"p{shade}"] if (shade := bisect_right(_IMPROBABLE, -math.expm1(logp))) else []
            kinds += [f"e{shade}"] if (shade := bisect_right(_OPEN, entropy)) else []
            said = f"p {math.exp(logp):.2g}, entropy {entropy:.2g}"
            shown = f' class="{" ".join(kinds)}" title="{said}"' if kinds else ""
            made.append(f"<i{shown}>{escape(text)}</i>" if shown else escape(text))
        return f'<span class="t">{"".join(made)}</span>'

    def legend(self) -> str:
        """What the shades mean, and the choice between them."""
        buttons = "".join(
            f'<label><input type="radio" name="by" id="by-{kind}"{" checked" if kind == "p" else ""}>{name}</label>'
            for kind, name in _NAMES.items()
        )
        p = "".join(f'<span class="swatch p{i + 1}">p ≤ {1 - edge:.2g}</span>' for i, edge in enumerate(_IMPROBABLE))
        e = "".join(f'<span class="swatch e{i + 1}">≥ {edge:g} nats</span>' for i, edge in enumerate(_OPEN))
        return (
            f'<fieldset class="legend"><legend>Colour of tokens</legend>{buttons}'
            f'<span class="note">probability {p} entropy {e}</span></fieldset>'
        )
