"""Small plots of one latent as SVG: hundreds of thousands of them, so drawn by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

__all__ = ["bars"]

_WIDTH, _HEIGHT = 256, 56


def bars(heights: Sequence[float], lines: Sequence[float], alt: str) -> Markup:
    """Bars side by side over the whole width.

    Args:
        heights: of the bars; the largest has the height of the plot, any above 0 is seen.
        lines: places of vertical lines, 0 to 1 from left to right.
        alt: what it shows, in words with the numbers in them.
    """
    top, width = max([*heights, 1e-12]), _WIDTH / max(1, len(heights))
    path = []
    for i, height in enumerate(heights):
        if height > 0:
            h = max(2, math.floor(_HEIGHT * height / top))
            path.append(f"M{i * width:.4g} {_HEIGHT}v-{h}h{width - 1:.4g}v{h}z")
    rules = "".join(f"M{_WIDTH * min(1.0, max(0.0, x)):.4g} 0v{_HEIGHT}" for x in lines)
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(alt)}" '
        f'preserveAspectRatio="none"><path class="bar" d="{"".join(path)}"/>'
        f'<path class="rule" d="{rules}"/></svg>'
    )
