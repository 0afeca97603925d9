from __future__ import annotations

from pathlib import Path

import pytest

from bsc.cache.store import ActivationStore
from bsc.config import parse_config, read_toml
from bsc.errors import ConfigError, StoreError
from bsc.train.sweep import SweepPoint, TrainConfig, expand, plan_coders


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
        ({"k": 0}, "k: input should be greater than or equal to 1, got 0"),
        ({"code": "ternary"}, "code: input should be 'continuous' or 'binary', got 'ternary'"),
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
