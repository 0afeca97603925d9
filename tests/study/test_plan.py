"""What a study comes to, against numbers worked out by hand and against what is really asked."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from bsc.cache.capture.capture import capture
from bsc.cache.capture.config import CaptureConfig
from bsc.cache.model.text_source import TextSource
from bsc.errors import ConfigError, UserError
from bsc.eval.interp.config import InterpConfig
from bsc.eval.interp.cost import Estimate, estimate_requests
from bsc.eval.interp.interp import cost_of
from bsc.eval.interp.judges.judge import NamedJudge
from bsc.finetuning.config import BATCH_TOKENS
from bsc.study import plan as plan_module
from bsc.study.amounts import reckon
from bsc.study.config import Hardware
from bsc.study.folder import RECORD_VERSION, StepRecord
from bsc.study.judging import requests_of_a_latent
from bsc.study.plan import EFFICIENCY, START_SECONDS, PlannedStep, StudyPlan
from bsc.study.study import OpenedStudy, open_study
from tests.eval.interp import planted
from tests.hub import hub_environment, serve_hub

STUDY = """
title = "A study"

[hardware]
tflops = 2
{hardware}

[cache.acts]
model = "demo"
hookpoints = ["layers.{layer}.mlp"]
tokens = "200k"
held_out_tokens = 32_768
context = 128

[train.sweep]
store = "acts"
tokens = "100k"
batch_rows = 2_048
coders = [{{ code = {code}, k = 16, n_latents = 512, seed = {seeds} }}]

[choose.step]
runs = "sweep"
field = "lr"

[finetune.tuned]
run = "sweep"
tokens = "100k"

[eval.figures]
run = "sweep"
ce_tokens = 10_000
ablation_tokens = 5_000
ablation_bins = {bins}
ultra_ablations = 0
no_probe = true

[interp.scores]
run = "figures"
latents = 10

[interp.judged]
run = "figures"
judge = "http://127.0.0.1:1/v1"
latents = 10
concurrency = 8
"""
LAYER = 2 * 192 * 192 + 2 * 192 * 64 + 3 * 192 * 512 + 2 * 192
"""Parameters of a layer of the embedded model: attention, MLP, two norms."""
LAYER_FLOP = 2 * LAYER + 4 * 128 * 192  # of a token in a context of 128
HEAD_FLOP = 2 * 192 * 4096
CODER_STEP = 2 * 512 * 192 + 2 * 16 * (3 * 192 + 192) + 6 * 192 * 192
"""FLOP of a row in training: encoder, decoder with its gradients and the encoder's, skip path."""
CODER_FORWARD = 2 * 512 * 192 + 2 * 16 * 192 + 2 * 192 * 192
SMOL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
}  # fmt: skip


def plan_of(study: OpenedStudy) -> StudyPlan:
    return plan_module.plan_study(study, reckon(study))


def opened(folder: Path, **changes: Any) -> OpenedStudy:
    fields: dict[str, Any] = {"hardware": "", "layer": 3, "code": '"continuous"', "bins": 0}
    fields |= {"seeds": [0, 1], **changes}
    path = folder / "study.toml"
    path.write_text(STUDY.format(**fields))
    return open_study(path, out=folder / "out")


def planned(folder: Path, **changes: Any) -> dict[str, PlannedStep]:
    return {step.name: step for step in plan_of(opened(folder, **changes)).steps}


def test_a_training_and_a_capture_are_the_products_that_they_take(tmp_path: Path) -> None:
    steps = planned(tmp_path)
    rows = 100_000 // 2048 * 2048
    assert steps["sweep"].flop == 2 * rows * CODER_STEP
    weights = 512 * 192 + 512 + 512 * 192 + 192 + 192 * 192
    # Weights, and a checkpoint of weights and Adam's two moments.
    assert steps["sweep"].bytes == 2 * 4 * weights * (1 + 1 + 2)
    tokens = int(steps["acts"].what.split(" ")[0].replace(",", ""))
    assert 0.99 * 232_768 <= tokens <= 232_768
    assert steps["acts"].flop == tokens * 4 * LAYER_FLOP  # layers 0 to 3
    # Input and output of the hookpoint in bfloat16; tokens and the end of the last shards on top.
    assert 1 <= steps["acts"].bytes / (tokens * 2 * 192 * 2) < 1.2
    assert (tmp_path / "out").exists() is False


def test_twice_the_coders_are_twice_the_work(tmp_path: Path) -> None:
    two, four = planned(tmp_path), planned(tmp_path, seeds=[0, 1, 2, 3])
    assert four["sweep"].flop == 2 * two["sweep"].flop
    assert four["sweep"].bytes == 2 * two["sweep"].bytes
    assert four["figures"].bytes == 2 * two["figures"].bytes
    assert four["judged"].requests == 2 * two["judged"].requests > 0
    assert four["acts"] == two["acts"]
    # The pass of the model as it is comes once for all.
    assert two["tuned"].flop < four["tuned"].flop < 2 * two["tuned"].flop


def test_an_evaluation_is_its_passes_from_the_hookpoint_on(tmp_path: Path) -> None:
    steps = planned(tmp_path, seeds=[0])
    whole, later = 6 * LAYER_FLOP + 2 * 192, 3 * LAYER_FLOP + 2 * 192  # with the last norm
    spliced = later + HEAD_FLOP + CODER_FORWARD
    # As it is, two ablations, the coder, the coder without values; then calibration and all rows.
    passes = whole + HEAD_FLOP + 2 * (later + HEAD_FLOP) + 2 * spliced
    rows = (32_768 + 65_536) * CODER_FORWARD
    assert steps["figures"].flop == pytest.approx(10_000 * passes + rows)
    assert "5 passes over 10,000 tokens" in steps["figures"].what
    assert steps["figures"].bytes == 32_768 * 16 * 10
    binary = planned(tmp_path, seeds=[0], code='"binary"')["figures"]
    fewer = 10_000 * spliced + 65_536 * CODER_FORWARD
    assert steps["figures"].flop - binary.flop == pytest.approx(fewer)
    # Ten bins, ten of latents at random, the coder and the model as it is, over 5,000 tokens.
    ablated = planned(tmp_path, seeds=[0], bins=10)["figures"]
    more = 5_000 * (whole + HEAD_FLOP + 21 * spliced)
    assert ablated.flop - steps["figures"].flop == pytest.approx(more)


def test_finetuning_runs_forward_and_back_from_the_hookpoint_on(tmp_path: Path) -> None:
    flop, tokens = planned(tmp_path, seeds=[0])["tuned"].flop, 100_000 - 100_000 % BATCH_TOKENS
    clean, later = (n * LAYER_FLOP + 2 * 192 + HEAD_FLOP for n in (6, 3))
    assert flop == pytest.approx(tokens * (clean + 2 * later + CODER_STEP))
    assert planned(tmp_path, seeds=[0], layer=5)["tuned"].flop < flop


def test_time_is_that_of_the_devices_that_are_said_or_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "_measure_product", lambda: pytest.fail("nothing to measure"))
    one = planned(tmp_path)["figures"]
    assert one.seconds == pytest.approx(START_SECONDS + one.flop / 2e12)
    assert one.rate == "tflops"
    four = planned(tmp_path, hardware="devices = 4")["figures"]
    assert four.seconds == pytest.approx(START_SECONDS + four.flop / 8e12)
    slow = planned(tmp_path, hardware="disk_rate = 1e6")
    assert slow["acts"].rate == slow["sweep"].rate == "disk"
    rows = 100_000 // 2048 * 2048
    assert slow["sweep"].seconds == pytest.approx(START_SECONDS + rows * 2 * 2 * 192 / 1e6)
    assert slow["step"].seconds == 0


def test_without_devices_a_product_is_timed_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "_measure_product", lambda: 5e9)
    study = opened(tmp_path)
    bare = study.study.model_copy(update={"hardware": Hardware()})
    plan = plan_of(study._replace(study=bare))
    step = next(s for s in plan.steps if s.name == "sweep")
    assert step.seconds == pytest.approx(START_SECONDS + step.flop / (5e9 * EFFICIENCY["train"]))
    assert step.rate == "a product measured here"
    assert any("0.005 TFLOP/s here, measured" in line for line in plan.lines())


def test_a_product_has_a_rate_that_a_machine_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "_PRODUCT_WIDTH", {"cpu": 256, "cuda": 2048})
    monkeypatch.setattr(plan_module, "_PRODUCT_SECONDS", 0.05)
    assert 1e8 < plan_module._measure_product() < 1e16


def test_what_is_done_costs_nothing_and_says_how_fast_the_next_is(
    tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "study.toml"
    table = f'model = "{tiny_model}"\nhookpoints = ["layers.{{0,2}}.mlp"]\ncontext = 32\n'
    path.write_text(
        'title = "t"\n[hardware]\ntflops = 1\n'
        f'[cache.first]\n{table}tokens = 6_000\nheld_out_tokens = 2_000\nheld_out = 0.2\n'
        f'[cache.second]\n{table}tokens = 60_000\n[train.run]\nstore = "first"\n'
    )  # fmt: skip
    study = open_study(path, out=tmp_path / "out")
    before = {s.name: s for s in plan_of(study).steps}
    node = study.nodes["first"]
    study.folder.make()
    capture(
        CaptureConfig(
            model=str(tiny_model),
            store=study.folder.store("first"),
            text=TextSource(corpus="stdlib", held_out=0.2),
            hookpoints=("layers.{0,2}.mlp",),
            tokens=6_000,
            held_out_tokens=2_000,
            context=32,
            batch_tokens=512,
        )
    )
    made = study.folder.made(node)
    assert made is not None
    study.folder.write(
        node,
        StepRecord(
            version=RECORD_VERSION,
            step="first",
            digest=node.digest,
            command="cache",
            made=made,
            needs={},
            seconds=START_SECONDS + 40.0,
            ended_at="",
            versions={},
        ),
    )
    plan = plan_of(study)
    after = {s.name: s for s in plan.steps}
    assert after["first"].done and after["first"].took == START_SECONDS + 40.0
    costs = ("seconds", "flop", "bytes")
    assert [getattr(after["first"], name) for name in costs] == [0.0, 0.0, 0]
    assert all(getattr(before["first"], name) > 0 for name in costs)
    assert plan.total["flop"] == after["second"].flop + after["run"].flop
    # Forty seconds for the FLOP of the first, and so on for the second.
    share = before["second"].flop / before["first"].flop
    assert after["second"].seconds == pytest.approx(START_SECONDS + 40.0 * share)
    assert after["second"].rate == "measured in this study"
    assert after["run"].rate == "tflops"
    # What was planned is what was captured.
    files = [p for p in Path(study.folder.store("first")).rglob("*") if p.is_file()]
    assert before["first"].bytes == pytest.approx(sum(p.stat().st_size for p in files), rel=0.2)


def test_a_judge_is_asked_what_interp_would_ask(tmp_path: Path) -> None:
    """Of latents of one word each, whose words have four or five characters."""
    where = planted.texts(documents=120, tokens=300)
    words = [*range(10, 40, 2)]
    config = InterpConfig(excerpt_tokens=16, latents=len(words), items=4)
    material = planted.material(where, planted.word_masks(where, words), config)
    asked = cost_of(planted.materials(tmp_path, material), NamedJudge("judge"))
    real = reduce(Estimate.plus, asked.values())
    latents = len(material.chosen.latents())
    ours = estimate_requests(requests_of_a_latent(config))
    assert latents > 10
    assert latents * ours.requests == pytest.approx(real.requests, rel=0.2)
    assert latents * ours.prompt_tokens == pytest.approx(real.prompt_tokens, rel=0.2)
    assert latents * ours.completion_tokens == pytest.approx(real.completion_tokens, rel=0.2)


def test_requests_their_price_and_their_time(tmp_path: Path) -> None:
    step = planned(tmp_path, hardware="price_in = 2\nprice_out = 10\njudge_seconds = 4")["judged"]
    # Of each of two coders 2 x 10 latents: one explanation, 40 excerpts by 5 twice, 4 intruders.
    assert step.requests == 2 * 20 * (1 + 8 + 8 + 4)
    assert step.price == pytest.approx((2 * step.prompt_tokens + 10 * step.answer_tokens) / 1e6)
    # An excerpt of 32 tokens is shown in 20 + 40 + 40 + 20 places.
    assert step.prompt_tokens > 2 * 20 * 32 * 120
    scores = 2.3e-7 * 2 * 16 * 32_768
    assert step.seconds == pytest.approx(START_SECONDS + step.requests * 4 / 8 + scores)
    assert planned(tmp_path)["scores"].requests == 0


def test_a_price_of_the_step_counts_before_that_of_the_study(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    text = STUDY.format(hardware="price_in = 2", layer=3, code='"binary"', bins=0, seeds=[0])
    path.write_text(text + "price_in = 1\nprice_cached = 0\n")
    step = plan_of(open_study(path, out=tmp_path / "out")).steps[-1]
    assert 0 < step.price < step.prompt_tokens / 1e6  # some of it is of a prefix that was kept


def plan_in(folder: Path, **changes: Any) -> StudyPlan:
    return plan_of(opened(folder, **changes))


def test_totals_are_sums_and_json_has_all_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_in(tmp_path, hardware="devices = 3\nprice_in = 1")
    plan.show(as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == 3 and found["free_bytes"] > 0
    for name, value in found["total"].items():
        assert value == pytest.approx(sum(step[name] for step in found["steps"])) and value > 0
    assert plan.seconds == {step["name"]: step["seconds"] for step in found["steps"]}
    plan.show(as_json=False)
    shown = capsys.readouterr().out
    for word in ("sweep", "on 3 device(s)", "price 0.", "requests", "assumes", "it fits"):
        assert word in shown


def test_coders_are_found_by_name_as_in_the_commands(tmp_path: Path) -> None:
    study = opened(tmp_path, code='["binary", "continuous"]', seeds=[0])
    text = study.file.read_text()
    some = '[finetune.tuned]\ncoders = ["*binary*"]'
    study.file.write_text(text.replace("[finetune.tuned]", some))
    again = plan_of(open_study(study.file, out=tmp_path / "out"))
    both, one = (next(s for s in p.steps if s.name == "tuned") for p in (plan_of(study), again))
    assert (both.what[0], one.what[0]) == ("2", "1")
    study.file.write_text(text.replace("k = 16,", 'k = 16, hookpoint = "layers.1.mlp",'))
    with pytest.raises(ConfigError, match=r"\[train.sweep\].*layers.1.mlp.*it has layers.3.mlp"):
        plan_of(open_study(study.file, out=tmp_path / "out"))


@pytest.fixture
def smol(tmp_path: Path) -> Path:
    """A folder with the config of SmolLM2-135M, without weights or tokenizer."""
    folder = tmp_path / "smol"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMOL))
    return folder


SMOL_STUDY = """
title = "A study of SmolLM2-135M"
[scales.paper]
tokens = "10B"
[hardware]
devices = 8
tflops = 200
price_in = 0.5
price_out = 1.5
{more}
[cache.acts]
model = "SmolLM2-135M"
hookpoints = ["layers.9.mlp"]
tokens = "$tokens"
[train.main]
store = "acts"
coders = [{{ code = ["binary", "continuous"], k = [32, 64], n_latents = 18_432 }}]
[eval.figures]
run = "main"
[interp.scores]
run = "figures"
judge = "vllm"
"""


def test_the_whole_campaign_is_planned_from_the_config_that_the_hub_has(
    smol: Path, tmp_path: Path
) -> None:
    path = tmp_path / "campaign.toml"
    path.write_text(SMOL_STUDY.format(more=""))
    line = [sys.executable, "-m", "bsc", "study", str(path), "--scale", "paper", "--plan"]
    with serve_hub({"HuggingFaceTB/SmolLM2-135M": smol}) as (endpoint, requests):
        done = subprocess.run(
            [*line, "--json"], capture_output=True, text=True, cwd=tmp_path, timeout=240,
            env=hub_environment(endpoint, tmp_path / "hf"),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert any("config.json" in r for r in requests)
    assert not any("safetensors" in r for r in requests if r.startswith("GET"))
    found = json.loads(done.stdout)
    steps = {s["name"]: s for s in found["steps"]}
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
    per_token = 10 * (2 * layer + 4 * 2048 * 576)
    assert steps["acts"]["flop"] == pytest.approx(1e10 * per_token, rel=0.01)
    assert steps["acts"]["bytes"] == pytest.approx(1e10 * 2 * 576 * 2, rel=0.02)
    assert steps["main"]["flop"] == pytest.approx(
        1e10 * (4 * (2 * 18_432 * 576 + 6 * 576 * 576) + 2 * 2 * (32 + 64) * 4 * 576), rel=0.01
    )
    assert steps["scores"]["requests"] == 4 * 100 * 21 and found["total"]["price"] > 1
    assert found["devices"] == 8 and found["total"]["seconds"] > 3600

    # The same from a folder with the config, where there is no hub.
    path.write_text(SMOL_STUDY.format(more=f'architectures = {{ "SmolLM2-135M" = "{smol}" }}'))
    here = plan_of(open_study(path, "paper", tmp_path / "out")).to_json()
    assert [s["flop"] for s in here["steps"]] == [s["flop"] for s in found["steps"]]
    assert here["total"]["bytes"] == found["total"]["bytes"]


def test_a_model_that_is_out_of_reach_is_named_with_what_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = tmp_path / "campaign.toml"
    path.write_text(SMOL_STUDY.format(more="").replace("SmolLM2-135M", "nobody/nothing"))
    with pytest.raises(UserError, match=r"nobody/nothing.*architectures = "):
        plan_of(open_study(path, "paper", tmp_path / "out"))
