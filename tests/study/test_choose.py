"""Choosing a step size by what training saw, and what of it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bsc.cache.store.store import ActivationStore
from bsc.errors import ConfigError, UserError
from bsc.study.choose import choose, chosen_value
from bsc.study.steps import with_choices
from bsc.study.subjects import Subject, subjects_of
from bsc.train.config import TrainConfig
from bsc.train.run import Run
from bsc.train.sweep import expand, plan_coders
from bsc.train.trainer import train_sweep

LRS = [1e-5, 1e-2, 10.0]


def trained(store_path: Path, runs: Path, tokens: int = 5_000) -> list[Subject]:
    run, _ = train_sweep(
        TrainConfig(
            store=store_path, runs=runs, name=f"tuning-{tokens}", tokens=tokens, batch_rows=256,
            log_every=1, eval_every=0,
            coders=({"hookpoint": "layers.2.mlp", "code": ["binary", "continuous"], "k": 4,
                     "n_latents": 64, "lr": LRS, "seed": [0, 1]},),
        )
    )  # fmt: skip
    return subjects_of("tuning", run)


@pytest.fixture(scope="module")
def subjects(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    return trained(store_path, tmp_path_factory.mktemp("tuning"))


def last(run: Run, name: str) -> float:
    values = [line["fvu"] for line in run.metrics() if line["coder"] == name]
    tail = values[-max(1, len(values) // 10) :]
    return float(sum(tail) / len(tail))


def test_the_least_mean_of_the_last_tenth_is_taken_for_each_arm(subjects: list[Subject]) -> None:
    chosen = choose(subjects, "lr", ["code"], "fvu", "[choose.lr]")
    assert [c["code"] for c in chosen] == ["binary", "continuous"]
    for arm in chosen:
        own = [s for s in subjects if s.fields["code"] == arm["code"]]
        means = {
            lr: sum(last(s.run, s.name) for s in own if s.fields["lr"] == lr) / 2 for lr in LRS
        }
        assert arm["lr"] == min(means, key=lambda lr: means[lr]) == 1e-2
        assert arm["tried"] == [[lr, pytest.approx(means[lr])] for lr in LRS]
        assert arm["edge"] is False
    assert chosen_value(chosen, "lr", {"code": "binary", "k": 9}) == 1e-2
    assert chosen_value(chosen, "lr", {"code": "hybrid"}) is None


def test_every_hookpoint_has_the_value_that_was_chosen_for_it(store_path: Path) -> None:
    store = ActivationStore(store_path)
    names = [h.name for h in store.hookpoints]
    assert len(names) > 1
    rates = dict(zip(names, (0.01, 0.03, 0.1), strict=False))
    arms = [{"hookpoint": name, "lr": lr, "tried": [], "edge": False} for name, lr in rates.items()]

    def lrs(tables: list[dict[str, Any]], arms: list[dict[str, Any]]) -> list[Any]:
        points = expand(tables, "w")
        made = with_choices(points, [("lr", arms)], store, "w")
        return [(c.hookpoint, c.lr) for c in plan_coders(expand(made, "w"), store)]

    assert lrs([{"k": 4}], arms) == list(rates.items())
    assert lrs([{"k": 4, "hookpoint": names[1]}], arms) == [(names[1], rates[names[1]])]
    assert lrs([{"k": 4, "lr": 0.5}], arms) == [(name, 0.5) for name in names]
    same = [{"lr": 0.2, "tried": [], "edge": False}]
    assert with_choices(expand([{"k": 4}], "w"), [("lr", same)], store, "w") == [
        {"k": 4, "lr": 0.2}
    ]
    with pytest.raises(ConfigError, match="no lr was chosen for a coder like"):
        lrs([{"k": 4}], arms[:1])


def test_the_best_at_the_edge_is_said_to_be_there(subjects: list[Subject]) -> None:
    some = [s for s in subjects if s.fields["lr"] != 10.0]
    assert all(arm["edge"] for arm in choose(some, "lr", ["code"], "fvu", "w"))


def test_values_that_were_not_tried_on_the_same_coders_are_refused(subjects: list[Subject]) -> None:
    with pytest.raises(ConfigError, match="were not tried on the same coders"):
        choose(subjects[1:], "lr", ["code"], "fvu", "w")
    twice = [*subjects, *subjects]
    with pytest.raises(ConfigError, match="two coders have lr = "):
        choose(twice, "lr", ["code"], "fvu", "w")
    with pytest.raises(ConfigError, match="no field 'lrr'"):
        choose(subjects, "lrr", ["code"], "fvu", "w")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl has no figure 'fvuu'"):
        choose(subjects, "lr", ["code"], "fvuu", "w")


def test_a_run_of_several_passes_is_refused(store_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Choose by a run of one pass at most"):
        choose(trained(store_path, tmp_path, 12_000), "lr", ["code"], "fvu", "w")
