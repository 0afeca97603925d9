"""Results of studies that nobody ran, for tests of what is shown of them."""

from __future__ import annotations

from typing import Any

from bsc.study.results import (
    STUDY_VERSION,
    ClaimResult,
    Done,
    PartResult,
    Shown,
    StudyResult,
    VariantResult,
)

HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)>&\"'$x^$\u202e\u2028\x00\u6f22"
VERDICTS = ("holds", "does not hold", "not decided", "shown", "not measured")


def cell(value: float | None = -0.012, half: float | None = 0.004, **changes: Any) -> Shown:
    interval = None if value is None or half is None else [value - half, value + half]
    values: dict[str, Any] = {
        "where": {"k": "8"}, "value": value, "interval": interval, "first": 0.3012,
        "against": 0.3132, "decides": None if half is None else 1.4 * half, "seeds": 3,
        "units": 1280, "error_seeds": 0.0011, "error_units": 0.0008, "pairs": 2, "left_out": 0,
        "coders": [["sweep:binary-k8-s0", "sweep:continuous-k8-s0"]],
    }  # fmt: skip
    return Shown(**(values | changes))


def part(*cells: Shown, **changes: Any) -> PartResult:
    values: dict[str, Any] = {
        "words": "", "figure": "fvu", "weighted": False, "ratio": False,
        "contrast": "fvu: code = binary less code = continuous", "bound": "below 0",
        "units": "documents", "verdict": "holds", "cells": list(cells or [cell()]), "variants": [],
    }  # fmt: skip
    return PartResult(**(values | changes))


def way(words: str, verdict: str, *cells: Shown, **changes: Any) -> VariantResult:
    values: dict[str, Any] = {
        "figure": "fvu", "weighted": False, "ratio": False, "bound": "below 0",
        "contrast": "fvu: code = binary less code = continuous", "cells": list(cells),
    }  # fmt: skip
    return VariantResult(words=words, verdict=verdict, **(values | changes))


def claim(name: str, verdict: str, *parts: PartResult, **changes: Any) -> ClaimResult:
    values: dict[str, Any] = {
        "id": name, "words": f"The claim {name} is true.", "note": "", "why": "",
        "rule": "Holds if every interval lies where the claim says.", "verdict": verdict,
        "parts": list(parts),
    }  # fmt: skip
    return ClaimResult(**(values | changes))


def done(step: str, command: str, state: str = "done", **changes: Any) -> Done:
    values: dict[str, Any] = {"seconds": 95.0, "digest": "0" * 8, "chosen": None}
    return Done(step=step, command=command, state=state, **(values | changes))


CHOSEN = [
    {"code": "binary", "k": 8, "lr": 1e-3, "edge": False,
     "tried": [[3e-4, 0.3333], [1e-3, 0.3111], [3e-3, None]]},
    {"code": "continuous", "k": 8, "lr": 3e-3, "edge": True,
     "tried": [[3e-4, 0.2999], [1e-3, 0.2888], [3e-3, 0.2777]]},
]  # fmt: skip


def result(*claims: ClaimResult, **changes: Any) -> StudyResult:
    values: dict[str, Any] = {
        "version": STUDY_VERSION, "name": "codes", "title": "Are values needed?",
        "question": "Does a code of zeros and ones say as much?", "scale": "demo",
        "file_sha256": "ab" * 32, "claims": list(claims), "versions": {"bsc": "0.1.0"},
        "steps": [
            done("acts", "bsc cache demo --store stores/acts"),
            done("rates", "choose lr", chosen=CHOSEN),
            done("judged", "interp", "waits", seconds=None),
        ],
        "at": "2030-01-02T03:04:05+00:00",
    }  # fmt: skip
    return StudyResult(**(values | changes))


def every_kind() -> StudyResult:
    """A study with a claim of every verdict, and with what can be missing."""
    ways = [
        way("by the loss", "holds", cell(-0.02), figure="delta_ce"),
        way("at equal bits \u6f22", "not decided", cell(-0.001)),
    ]
    ratios = [cell(v, 0.05, where={"k": str(k)}, decides=1.09) for k, v in ((8, 1.21), (16, 1.312))]
    nothing: dict[str, Any] = {"first": None, "against": None, "seeds": 0, "units": 0, "coders": []}
    return result(
        claim("less", "holds", part(variants=ways)),
        claim("more", "does not hold", part(*ratios, ratio=True, bound="within 0.1",
                                            verdict="does not hold")),
        claim("open", "not decided",
              part(cell(0.5, None, where={"k": "8"}),
                   cell(None, None, where={"k": "16"}, left_out=2, pairs=0, **nothing),
                   verdict="not decided"),
              part(cell(None, None, where={}, **nothing), verdict="not decided", words="Nothing")),
        claim("figures", "shown", part(cell(12.0, 1.0, against=None, decides=None), bound=None,
                                       verdict=None, figure="dead_share", units="")),
        claim("later", "not measured", why="tuned: judged is not done", note="A note of it."),
    )  # fmt: skip
