"""What the report shows of finetuning: coders before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from bsc.eval.compare import Difference
from bsc.eval.finetuned import PROBE, Changed, FinetunedChange, finetuned_changes
from bsc.eval.report.coders import ReportedCoder
from bsc.eval.report.drawing import COLOURS, MARKERS, Drawing, one_legend, panels
from bsc.train.run import Run

__all__ = ["ShownChange", "before_and_after", "read_changes"]

_Figure = Callable[[FinetunedChange], Difference | None]


class ShownChange(NamedTuple):
    """What one run changed in another's coders."""

    name: str
    """Of the drawing."""
    before: str
    """What the runs are called on the page."""
    after: str
    changed: Changed
    rows: dict[str, ReportedCoder]
    """The finetuned coders on the page, by name."""

    def probe(self, change: FinetunedChange) -> Difference | None:
        """Accuracy of the probe that is shown; of several sets of texts the first."""
        found = (p.accuracy for p in change.probes if (p.arm, p.columns) == PROBE)
        return next(found, None)


def read_changes(
    runs: Sequence[Run], labels: Sequence[str], rows: Sequence[ReportedCoder]
) -> list[ShownChange]:
    """What runs changed in the coders of others that are on the page too."""
    found: list[ShownChange] = []
    for i, after in enumerate(runs):
        for j, before in enumerate(runs):
            changed = finetuned_changes(before, after) if i != j else None
            if changed is not None:
                own = {row.name: row for row in rows if row.run == labels[i]}
                name = f"finetuned-{len(found)}"
                found.append(ShownChange(name, labels[j], labels[i], changed, own))
    return found


def before_and_after(shown: ShownChange) -> Drawing:
    """Figures before and after against k: an arrow for each coder."""
    figures: dict[str, _Figure] = {
        "delta CE, nats per token": lambda c: c.delta_ce,
        "KL, nats per token": lambda c: c.kl,
        "FVU (held out)": lambda c: c.fvu,
        "probe on one latent, accuracy": shown.probe,
        "predictability, AUC": lambda c: c.predictability,
    }
    drawn = {
        title: figure
        for title, figure in figures.items()
        if any(figure(change) for change in shown.changed.coders)
    }
    words = []
    with panels(len(drawn), 2.9, len(drawn), share=False) as (drawing, axes):
        for axis, (title, figure) in zip(axes, drawn.items(), strict=True):
            words.append(f"{title}: {_arrows(axis, shown, figure)}.")
            axis.set_title(title)
            axis.set_xscale("log", base=2)
            ks = sorted({row.k for row in shown.rows.values()})
            axis.set_xticks(ks, [f"{k:,}" for k in ks])
            axis.minorticks_off()
            axis.set_xlabel("k")
        one_legend(drawing, axes)
        alt = f"Before and after finetuning, against k. {' '.join(words)}"
        return Drawing(shown.name, alt, drawing)


def _arrows(axis: Axes, shown: ShownChange, figure: _Figure) -> str:
    """Draw an arrow for each coder; the ranges before and after in words, by code."""
    ends: dict[str, list[tuple[float, float]]] = {}
    for change in shown.changed.coders:
        value, row = figure(change), shown.rows[change.coder]
        if value is None:
            continue
        style = _style(row.code)
        # Codes beside each other, and seeds on top of each other.
        x = row.k * (1.06 if row.code == "binary" else 0.94)
        axis.annotate(
            "",
            (x, value.second),
            (x, value.first),
            arrowprops={"arrowstyle": "->", "color": COLOURS[row.code], "alpha": 0.6},
        )
        axis.plot([x], [value.first], **style, mfc="none")
        axis.plot([x], [value.second], **style)
        ends.setdefault(row.code, []).append((value.first, value.second))
    for code in ends:
        style = _style(code)
        axis.plot([], [], **style, mfc="none", label=f"{code}, before")
        axis.plot([], [], **style, label=f"{code}, after")
    return "; ".join(
        f"{code} {min(a for a, _ in pairs):.3g} to {max(a for a, _ in pairs):.3g} before, "
        f"{min(b for _, b in pairs):.3g} to {max(b for _, b in pairs):.3g} after"
        for code, pairs in ends.items()
    )


def _style(code: str) -> dict[str, Any]:
    return {"color": COLOURS[code], "marker": MARKERS[code], "ms": 4.5, "ls": ""}
