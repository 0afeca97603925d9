"""The tables that `bsc interp` prints."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bsc.eval.interp.config import Prices
from bsc.eval.interp.cost import Estimate
from bsc.eval.interp.scores import Interpretability, Mean, Offline, SampledMeans
from bsc.files import canonical_json
from bsc.formats import percent

__all__ = ["cost_table", "interp_table", "offline_table"]


def _console() -> Console:
    return Console(highlight=False, width=220)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")
    table.add_column(columns[0], no_wrap=True)
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _mean(found: Mean) -> str:
    """A mean with its interval."""
    if found.mean is None:
        return "-"
    interval = found.interval
    span = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    return f"{found.mean:.3f}{span}"


def _coverage(means: SampledMeans) -> list[str]:
    """Unweighted and weighted."""
    return [percent(m.coverage or 0.0) for m in (means.unweighted, means.weighted)]


def offline_table(result: Offline) -> None:
    """Print predictability and overlap of every coder on stdout."""
    table = _table(
        "Without a language model", "coder", "predictability, AUC", "weighted",
        "overlap (chance 0.2)", "weighted", "coverage", "weighted",
    )  # fmt: skip
    for name, found in result.coders.items():
        auc, overlap = found.predictability.auc, found.overlap
        means = (auc.unweighted, auc.weighted, overlap.unweighted, overlap.weighted)
        table.add_row(name, *map(_mean, means), *_coverage(overlap))
    _console().print(table)


def interp_table(result: Interpretability) -> None:
    """Print the scores of a judge on stdout."""
    said = "simulated judge " if result.judge.simulated else "judge "
    table = _table(
        escape(f"By {said}{result.judge.model}"), "coder", "test", "unweighted", "weighted",
        "coverage", "weighted", "needed for 0.02",
    )  # fmt: skip
    for name, found in result.coders.items():
        for kind, test in found.tests.items():
            needed = test.unweighted.needed
            table.add_row(
                name,
                kind,
                _mean(test.unweighted),
                _mean(test.weighted),
                *_coverage(test),
                "-" if needed is None else f"{needed:,}",
            )
    console = _console()
    console.print(table)
    for name, found in result.coders.items():
        for kind, test in found.tests.items():
            if not test.unweighted.latents and not test.weighted.latents:
                reasons = test.why_not or test.states
                why = ", ".join(f"{reason} ({n} latents)" for reason, n in reasons.items())
                said = why or "too few firings (all latents)"
                console.print(f"note: {name}, {kind}: no score: {said}", markup=False)
    for flag in result.flags:
        console.print(f"note: {escape(flag)}")


def cost_table(found: Mapping[str, Estimate], prices: Prices, *, as_json: bool = False) -> None:
    """Print what is still to be asked, and what it would cost."""
    total = Estimate()
    for one in found.values():
        total = total.plus(one)
    cost = prices.cost(total.prompt_tokens, 0, total.completion_tokens)
    cached = prices.cost(total.prompt_tokens, total.shared_tokens, total.completion_tokens)
    if as_json:
        facts = {k: e.model_dump() for k, e in found.items()}
        text = canonical_json({"kinds": facts, "cost": cost, "cost_with_cache": cached})
        Console(highlight=False, soft_wrap=True).print(text, end="", markup=False)
        return
    table = _table("Still to be asked (tokens are estimates)", "kind", "requests", "prompt tokens",
                   "of them shared", "reply tokens")  # fmt: skip
    for kind, one in [*found.items(), ("all", total)]:
        share = one.shared_tokens / one.prompt_tokens if one.prompt_tokens else 0.0
        table.add_row(kind, f"{one.requests:,}", f"{one.prompt_tokens:,.0f}", percent(share),
                      f"{one.completion_tokens:,.0f}")  # fmt: skip
    console = _console()
    console.print(table)
    if prices.price_in or prices.price_out:
        if_cached = "" if prices.price_cached is None else f"; {cached:,.2f} with prefixes cached"
        console.print(f"price: {cost:,.2f}{if_cached}")
    console.print(
        f"hours: requests x seconds per request / concurrency / 3,600; "
        f"{total.requests * 1.0 / 32 / 3_600:.2f} at 1 s and 32 at a time"
    )
