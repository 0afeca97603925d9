from __future__ import annotations

from pathlib import Path

import pytest

from bsc.cache.store.store import ActivationStore
from bsc.config import parse_config, read_toml
from bsc.errors import ConfigError, StoreError
from bsc.train.config import SweepPoint, TrainConfig
from bsc.train.run_config import PlannedCoder
from bsc.train.schedule import default_lr, paper_lr
from bsc.train.sweep import expand, plan_coders


def test_a_table_is_a_grid_and_tables_add_up(store: ActivationStore) -> None:
    points = expand(
        [
            {"code": ["binary", "continuous"], "k": [2, 4], "n_latents": 64},
            {"site": "sae", "k": 8, "n_latents": 64, "hookpoint": "layers.0.mlp"},
        ],
        "test",
    )
    planned = plan_coders(points, store)
    assert len(points) == 5 and len(planned) == 4 * 2 + 1  # no hookpoint: every one
    assert len({p.name for p in planned}) == 9
    assert planned[-1].name == "layers.0.mlp/sae-continuous-k8-s0"
    assert planned[-1].coder.decoder_norm == "unit" and planned[0].coder.decoder_norm == "free"


def test_names_say_what_else_differs(store: ActivationStore) -> None:
    points = expand([{"k": 2, "lr": [0.001, 0.01], "hookpoint": "layers.0.mlp"}], "test")
    assert [p.name.split("/")[1] for p in plan_coders(points, store)] == [
        "skip_transcoder-continuous-k2-s0-lr=0.001",
        "skip_transcoder-continuous-k2-s0-lr=0.01",
    ]


def test_defaults_come_from_the_store(store: ActivationStore) -> None:
    (planned,) = plan_coders([SweepPoint(hookpoint="layers.2.mlp")], store)
    assert (planned.coder.d_in, planned.coder.n_latents) == (32, 32 * 32)
    assert planned.lr > 0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kk": 3}, r"unknown key 'kk' .did you mean 'k'"),
        ({"k": 0}, "k: should be at least 1, got 0"),
        (
            {"code": "ternary"},
            "code: should be 'continuous', 'binary' or 'hybrid', got 'tern",
        ),
        ({"k": True}, "k: should be a number, got True"),
        ({"k": "8"}, "k: should be a number, got '8'"),
        ({"multi_topk": 1}, "multi_topk: should be true or false, got 1"),
        ({"lr": "papper"}, "lr: should be 'paper', got 'papper'"),
        ({"lr": 0.0}, "lr: should be above 0, got 0.0"),
        ({"group": "../x"}, "make a name"),
        ({"k": []}, "k is an empty list"),
    ],
)
def test_a_wrong_table_names_the_key_and_what_is_allowed(
    table: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        expand([table], "sweep.toml")


def test_k_beyond_the_latents_and_unknown_hookpoints_are_refused(store: ActivationStore) -> None:
    with pytest.raises(ConfigError, match="k=65 is more than n_latents=64"):
        plan_coders(expand([{"k": 65, "n_latents": 64}], "t"), store)
    with pytest.raises(StoreError, match=r"did you mean 'layers\.2\.mlp'"):
        plan_coders(expand([{"hookpoint": "layers.2.mpl"}], "t"), store)


def test_a_toml_file_is_checked_like_flags(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text('toknes = 5\nname = "../evil"\n')
    with pytest.raises(ConfigError, match=r"unknown key 'toknes' .did you mean 'tokens'") as caught:
        parse_config(TrainConfig, read_toml(path), str(path))
    assert "make a name" in str(caught.value)
    path.write_text("tokens = = 5")
    with pytest.raises(ConfigError, match=r"not a TOML file .*line 1"):
        read_toml(path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"select": "groupmax", "k": 5},
            "select='groupmax' cuts 64 continuous latents into 5 equal",
        ),
        ({"code": "hybrid", "k": 1}, "0 continuous latents"),
        ({"code": "hybrid", "k": 40, "k_binary": 30, "n_binary": 20}, "30 binary latents of 20"),
        ({"code": "binary", "k_binary": 2}, "k_binary and n_binary are for code='hybrid'"),
        ({"code": "binary", "surrogate": "gumbel"}, "needs select='groupmax' and code='binary'"),
        ({"amplitude": "learned"}, "amplitude='learned' needs decoder_norm='unit'"),
        ({"decoder_norm": "unit"}, "decoder_norm='unit' is for SAEs"),
        ({"select": "groupmax", "multi_topk": True}, "multi_topk selects 4 k latents"),
        ({"select": "groupmax", "k_init": 8}, "k_init: with select='groupmax'"),
        ({"k_init": 65}, "k_init=65 is more than n_latents=64"),
        ({"optimiser": "muon", "lr": "paper"}, "the paper has no learning rate for muon"),
        ({"code": "binary", "gumbel_support": "full"}, "gumbel_support='full' is for surrogate="),
        (
            {"code": "binary", "select": "groupmax", "surrogate": "gumbel", "rate_penalty": 0.1},
            "rate_penalty is not for surrogate='gumbel'",
        ),
        (
            {"code": "binary", "threshold": "newton", "select": "batch_topk"},
            "threshold='newton' is for binary and hybrid coders",
        ),
        ({"k": 64}, None),
        ({"k": 1}, None),
    ],
)
def test_coders_that_cannot_be_are_refused(
    store: ActivationStore, table: dict[str, object], message: str | None
) -> None:
    base = {"k": 4, "n_latents": 64, "hookpoint": "layers.0.mlp"}
    if message is None:
        assert len(plan_coders(expand([base | table], "t"), store)) == 1
        return
    with pytest.raises(ConfigError, match=message):
        plan_coders(expand([base | table], "t"), store)


def test_what_a_coder_does_not_read_does_not_make_it_another(store: ActivationStore) -> None:
    table = {"hookpoint": "layers.0.mlp", "n_latents": 64, "k": 4}
    grid = {"code": ["binary", "continuous"], "surrogate": ["sigmoid", "identity"],
            "temperature": [1.0, 2.0]}  # fmt: skip
    planned = plan_coders(expand([table | grid], "t"), store)
    assert [p.coder.code for p in planned] == ["binary"] * 4 + ["continuous"]
    assert len({p.name for p in planned}) == 5
    assert planned[0].name.endswith("binary-k4-s0-surrogate=sigmoid-temperature=1.0")


def test_groups_name_tables_and_two_coders_of_one_name_are_refused(store: ActivationStore) -> None:
    table = {"hookpoint": "layers.0.mlp", "n_latents": 64, "k": 4}
    planned = plan_coders(expand([table | {"group": "a"}, table | {"group": "b"}], "t"), store)
    assert [p.name.split("/")[1] for p in planned] == [
        f"{g}-skip_transcoder-continuous-k4-s0" for g in "ab"
    ]
    # Once is enough of the same coder.
    assert len(plan_coders(expand([table, table], "t"), store)) == 1


def test_a_name_that_no_folder_can_have_is_refused(store: ActivationStore) -> None:
    with pytest.raises(ConfigError, match="too long for a folder"):
        plan_coders(expand([{"group": "g" * 190, "k": 4, "n_latents": 64}], "t"), store)


def test_the_temperature_follows_the_surrogate(store: ActivationStore) -> None:
    base = {"hookpoint": "layers.0.mlp", "n_latents": 64, "k": 4, "code": "binary"}
    (one,) = plan_coders(expand([base], "t"), store)
    (two,) = plan_coders(expand([base | {"surrogate": "gumbel", "select": "groupmax"}], "t"), store)
    assert (one.coder.temperature, two.coder.temperature) == (2.0, 0.5)


def test_binary_latents_of_unit_rows_have_amplitudes_unless_it_is_said_otherwise(
    store: ActivationStore,
) -> None:
    def amplitudes(**fields: object) -> list[str]:
        base: dict[str, object] = {"hookpoint": "layers.0.mlp", "n_latents": 64, "k": 4}
        base["code"] = ["continuous", "binary", "hybrid"]
        return [p.coder.amplitude for p in plan_coders(expand([base | fields], "t"), store)]

    assert amplitudes(site="sae") == ["none", "learned", "learned"]
    assert amplitudes(site="sae", decoder_norm="free") == ["none"] * 3
    assert amplitudes(site="sae", amplitude="none") == ["none"] * 3
    assert amplitudes(site="transcoder") == ["none"] * 3


def test_the_paper_s_settings_by_one_name(store: ActivationStore) -> None:
    values = {"preset": "paper", "coders": ({"site": ["sae", "transcoder"], "k": 4,
              "code": ["binary", "continuous"], "hookpoint": "layers.0.mlp"},)}  # fmt: skip
    config = parse_config(TrainConfig, values, "t")
    assert (config.normalise, config.batch_rows) == ("none", 2**20)
    planned = plan_coders(expand(config.coders, "t", config.preset), store)
    found = [
        (p.coder.site, p.coder.code, p.optimiser, p.coder.decoder_norm, p.coder.amplitude,
         p.coder.n_latents, p.warmup, p.decay)
        for p in planned
    ]  # fmt: skip
    assert found == [
        ("sae", "binary", "signum", "unit", "none", 32 * 32, 0.0, "none"),
        ("sae", "continuous", "adam", "unit", "none", 32 * 32, 0.1, "linear"),
        ("transcoder", "binary", "adam", "free", "none", 64 * 32, 0.1, "linear"),
        ("transcoder", "continuous", "adam", "free", "none", 64 * 32, 0.1, "linear"),
    ]
    assert [p.adam_eps for p in planned] == [None, 1e-8, 1e-8, 1e-8]  # signum has none
    for p in planned:
        assert p.lr == paper_lr(p.optimiser, p.coder.code, "sigmoid", p.coder.n_latents)
    # What is said goes before it, and a saved config reads back as it was.
    said = parse_config(TrainConfig, values | {"batch_rows": 64, "normalise": "rms"}, "t")
    assert (said.normalise, said.batch_rows) == ("rms", 64)
    assert parse_config(TrainConfig, said.model_dump(mode="json"), "t") == said
    (one,) = expand([{"lr": 0.5, "optimiser": "muon"}], "t", "paper")
    assert (one.lr, one.optimiser, one.warmup, one.expansion) == (0.5, "muon", None, 64)
    # Where the paper has no learning rate, ours holds.
    others = [{"code": "hybrid", "k": 4, "n_latents": 64}, {"optimiser": "muon", "n_latents": 64}]
    for p in plan_coders(expand(others, "t", "paper"), store):
        assert p.lr == default_lr(p.optimiser, p.coder.code, 64)
    gumbel = {"code": "binary", "select": "groupmax", "surrogate": "gumbel"}
    (one,) = expand([gumbel], "t", "paper")
    assert (one.optimiser, one.gumbel_support) == ("signum", "full")


def test_a_resolved_config_reads_back_as_it_was(store: ActivationStore) -> None:
    tables = [{"k": 4, "n_latents": 64, "code": ["binary", "hybrid"], "lr": "paper"}]
    tables[0]["optimiser"] = "signum"
    tables[0]["code"] = ["binary", "continuous"]
    for planned in plan_coders(expand(tables, "t"), store):
        assert parse_config(PlannedCoder, planned.model_dump(mode="json"), "t") == planned
