"""A plan agrees with the capture that follows it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import LlamaConfig

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.capture.estimate import estimate
from bsc.cache.model.text_source import TextSource
from bsc.cache.store.kinds import CODECS, Codec
from bsc.cli import main
from bsc.errors import UserError
from tests.cache.captures import config_of


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The config of SmolLM2-135M, without weights."""
    folder = tmp_path_factory.mktemp("smollm2")
    LlamaConfig(
        vocab_size=49_152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, intermediate_size=1536, max_position_embeddings=8192,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def bytes_of(root: Path) -> int:
    return sum(p.stat().st_size for p in root.rglob("*") if p.is_file() and "/c/" in str(p))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("world", [1, 2])
def test_a_store_is_as_large_as_its_plan(
    tiny_model: Path, tmp_path: Path, codec: Codec, world: int
) -> None:
    config = config_of(str(tiny_model), tmp_path / "acts", codec=codec, world=world)
    plan = estimate(config).plan
    results = [capture(config.but(rank=rank)) for rank in range(world)]
    size = bytes_of(tmp_path / "acts")
    assert results[-1].complete and results[-1].rows == plan.grids["train"].rows
    assert size == sum(r.bytes for r in results)
    if codec == "lz4":
        assert size < plan.bytes
    else:
        assert size == plan.bytes == sum(plan.bytes_by_array().values())


def test_the_paper_s_setting_is_the_92_terabytes_of_the_docs(smollm2: str) -> None:
    config = CaptureConfig(
        model=smollm2, store="acts", text=TextSource(corpus="stdlib"), tokens=10**10
    )
    made = estimate(config, rate=740_000, free=10**12)
    lines = made.lines()
    page = (Path(__file__).parent.parent.parent / "docs/capture.md").read_text()
    shown = re.search(r"```\n(hookpoint.*?)```", page, flags=re.S)
    assert shown is not None and "\n".join(lines[:12]) == shown[1].rstrip("\n")
    assert [h.name for h in made.plan.hookpoints] == [f"layers.{i}.mlp" for i in (0, 9, 18, 27)]
    assert made.plan.bytes == pytest.approx(92.4e12, rel=1e-3) and not made.fits


def test_every_way_out_that_a_plan_names_fits(smollm2: str) -> None:
    text = TextSource(corpus="stdlib")
    config = CaptureConfig(model=smollm2, store="acts", text=text, tokens=10**10)
    free = int(60e12)
    made = estimate(config, free=free)
    assert not made.fits and len(made.options) == 4
    ways = " ".join(made.options)
    tokens, ring, hooks = (
        int(re.search(pattern, ways)[1])  # type: ignore[index]
        for pattern in (r"--tokens (\d+)", r"--ring (\d+)", r"(\d+) of the 4 --hookpoints")
    )
    assert "--codec int8" in ways
    names = tuple(f"layers.{i}.mlp" for i in range(hooks))
    for other in (
        config.but(tokens=tokens),
        config.but(ring=ring),
        config.but(codec="int8"),
        config.but(hookpoints=names),
    ):
        fitting = estimate(other, free=free)
        assert fitting.fits and fitting.plan.bytes > 0.4 * free, other
    small = estimate(config, free=10**9)
    assert not small.fits and "int8" not in " ".join(small.options)


def test_memory_is_that_of_the_buffers(smollm2: str) -> None:
    """Open shards of 64 x 2 sides x 4 hookpoints hold a quarter of a megabyte each, at most."""
    text = TextSource(corpus="stdlib")
    config = CaptureConfig(model=smollm2, store="acts", text=text, tokens=10**10)
    plan = estimate(config, free=10**15).plan
    buffers = 64 * 8 * 128 * 1152 + 64 * 3 * 4096 * 4 + 64 * 4096 * 8
    blocks = 3 * 8192 * 8 * 1152
    assert plan.memory() == buffers + blocks
    ten = estimate(config.but(tokens=10**11), free=10**16).plan
    assert ten.memory() == plan.memory()


def test_the_command_prints_the_plan_and_writes_nothing(
    smollm2: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["plan", "--model", smollm2, "--tokens", "10B", "--free", "1T", "--rate", "1000000"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert "92.4 TB" in shown and "it does not fit" in shown and "--ring" in shown
    with pytest.raises(SystemExit):
        main(["plan", "--model", smollm2, "--tokens", "10B", "--free", "100T", "--json"])
    value = json.loads(capsys.readouterr().out)
    assert value["fits"] and value["hours"] is None and value["shards"]["train"] == 38_146
    assert list(tmp_path.iterdir()) == []


def test_a_probe_measures_the_rate_of_this_machine(tiny_model: Path, tmp_path: Path) -> None:
    made = estimate(config_of(str(tiny_model), tmp_path / "acts"), probe=True)
    assert made.rate is not None and 100 < made.rate < 10**8
    assert made.model_hours == pytest.approx(
        sum(g.rows for g in made.plan.grids.values()) / made.rate / 3600
    )
    assert made.disk_measured and 10**6 < made.disk_rate < 10**12
    assert made.hours == max(made.model_hours or 0, made.disk_hours)
    assert not (tmp_path / "acts").exists()


def test_a_model_without_a_readable_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    config = CaptureConfig(model=str(tmp_path), store="acts", text=TextSource(corpus="stdlib"))
    with pytest.raises(UserError, match=r"--model .*: the config of .* cannot be read"):
        estimate(config)
