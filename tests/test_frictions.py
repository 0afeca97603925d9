"""What puzzled people who tried bsc: each is a mistake with one message, or works."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import bsc
from bsc.cache.model.architectures import MLPS, default_hookpoints, list_modules, warn_of_residual
from bsc.cache.model.attention import BY_POSITIONS, forward_inputs
from bsc.cache.model.hookpoints import RowTap
from bsc.cache.model.separation import document_separation
from bsc.cache.store.folder import LocalFolder
from bsc.cache.store.store import ActivationStore
from bsc.cli import main
from bsc.errors import StoreError, UserError
from bsc.eval.interp.sampling import choose
from bsc.records import check_seal, parse_json, read_record, write_record
from bsc.train.config import TrainConfig
from bsc.train.run import Run, claim
from bsc.train.trainer import train_sweep
from tests.cache.captures import config_of
from tests.raw import raw

SMALL: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 128}
MODELS = {
    "layers.*.mlp": transformers.LlamaConfig(
        **SMALL, num_hidden_layers=10, intermediate_size=48, num_key_value_heads=1
    ),
    "h.*.mlp": transformers.GPT2Config(n_embd=32, n_layer=10, n_head=2, vocab_size=128),
    "decoder.layers.*.fc1@decoder.layers.*.fc2": transformers.OPTConfig(
        **SMALL, num_hidden_layers=10, ffn_dim=48, word_embed_proj_dim=32
    ),
    "encoder.layer.*.intermediate@encoder.layer.*.output.dense": transformers.BertConfig(
        **SMALL, num_hidden_layers=10, intermediate_size=48
    ),
    "transformer.layer.*.ffn": transformers.DistilBertConfig(
        dim=32, n_layers=10, n_heads=2, hidden_dim=48, vocab_size=128
    ),
    "blocks.*.ffn.up_proj@blocks.*.ffn.down_proj": transformers.MptConfig(
        d_model=32, n_layers=10, n_heads=2, vocab_size=128
    ),
    "h.*.mlp.dense_h_to_4h@h.*.mlp.dense_4h_to_h": transformers.BloomConfig(
        hidden_size=32, n_layer=10, n_head=2, vocab_size=128
    ),
}


def on_meta(config: Any) -> torch.nn.Module:
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config, dtype=torch.bfloat16)
    base: torch.nn.Module = model.base_model.eval()
    return base


@pytest.mark.parametrize("pattern", MODELS)
def test_every_family_has_default_hookpoints_with_widths(pattern: str) -> None:
    base = on_meta(MODELS[pattern])
    assert pattern in MLPS
    assert default_hookpoints(base) == tuple(pattern.replace("*", str(i)) for i in (0, 3, 6, 9))
    groups = [g for g in list_modules(base) if g.default]
    assert [g.count for g in groups] == [10] * len(groups)
    assert groups[0].d_in == groups[-1].d_out == 32


def test_a_model_without_mlps_gets_a_value_to_paste() -> None:
    base = on_meta(transformers.MambaConfig(hidden_size=32, num_hidden_layers=10, state_size=4))
    with pytest.raises(UserError, match=r"for example --hookpoints 'layers\.\{0,3,6,9\}\.mixer'"):
        default_hookpoints(base)


def test_a_hookpoint_that_takes_the_residual_stream_in_is_warned_of() -> None:
    bloom = on_meta(MODELS["h.*.mlp.dense_h_to_4h@h.*.mlp.dense_4h_to_h"])
    assert "after the residual stream was added" in str(warn_of_residual(bloom, ["h.1.mlp"]))
    base = on_meta(MODELS["encoder.layer.*.intermediate@encoder.layer.*.output.dense"])
    said = warn_of_residual(base, ["encoder.layer.1.intermediate@encoder.layer.1.output"])
    assert (
        said and "--hookpoints 'encoder.layer.1.intermediate@encoder.layer.1.output.dense'" in said
    )
    assert warn_of_residual(base, list(default_hookpoints(base))) is None


def test_modules_are_listed(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["modules", str(tiny_model)])
    assert not done.value.code
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["layers.*.mlp", "(default)", "LlamaMLP", "32", "32", "3"] in lines


def test_experts_round_and_a_leak_is_still_found() -> None:
    """Kept rows of a Mixtral move by rounding; what sees another document moves them a lot more."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SMALL, num_hidden_layers=6, intermediate_size=64, num_key_value_heads=1,
        num_local_experts=8, max_position_embeddings=64,
    )  # fmt: skip
    tap = RowTap(transformers.MixtralModel(config).eval(), ["layers.0.mlp", "layers.5.mlp"])
    options: Any = {"vocabulary": 128, "dtype": torch.float32, "device": torch.device("cpu")}
    assert document_separation(tap.rows, **options) == BY_POSITIONS

    def leaking(inputs: Any) -> Any:
        ids = inputs["input_ids"]
        position = torch.arange(ids.shape[1]).expand(ids.shape)
        return tap.rows(forward_inputs(ids, position, packing="joined"))

    with pytest.raises(UserError, match="lets a token see other documents"):
        document_separation(leaking, **options)


@pytest.mark.parametrize(
    ("text", "says"),
    [("[" * 100_000, "too deeply"), ("[1e999]", "not finite"), ("[Infinity]", "not a number"),
     ("[" + "9" * 5000 + "]", "more than 64 bits"), ('["\\ud800"]', "surrogates"),
     ("{", "Expecting"), (b"\xff", "decode")],
)  # fmt: skip
def test_json_of_anybody_is_a_value_or_one_error(text: str | bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_json(text)


def test_a_record_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_record(path, {"version": 3, "fvu": 0.25})
    assert read_record(path, "record", 3) == {"version": 3, "fvu": 0.25}
    path.write_text(path.read_text().replace("0.25", "0.24"))
    with pytest.raises(StoreError, match="changed since it was written"):
        read_record(path, "record", 3, "Make it again.")
    with pytest.raises(
        StoreError, match=r"of format version 3; this bsc reads 4\. Make it again\."
    ):
        read_record(path, "record", 4, "Make it again.")
    with pytest.raises(StoreError):
        check_seal({"version": 3}, path)


def test_a_changed_figure_never_reaches_a_report(run: Run, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "run")))
    record = raw(copy.config_path)
    record["coders"][0]["hookpoint"] = "../../../x"
    write_record(copy.config_path, record)  # of one who knows how
    with pytest.raises(StoreError, match="is no name"):
        bsc.evaluate(str(copy.folder))


def test_python_takes_folders_and_batches_of_sequences(run: Run, store: ActivationStore) -> None:
    assert {"evaluate", "SparseCoder", "Run"} <= set(dir(bsc)) and "TYPE_CHECKING" not in dir(bsc)
    with pytest.raises(StoreError, match="no such run"):
        bsc.evaluate(run="nowhere")
    with pytest.raises(StoreError, match="no such run"):
        bsc.write_report("nowhere")
    coder = run.coder("skip_transcoder-binary-k8-s0")  # without the hookpoint, as on a command line
    with pytest.raises(UserError, match="is not one coder"):
        run.coder("binary-k4")
    x = torch.randn(2, 5, coder.config.d_in)
    y, flat = coder(x), coder(x.reshape(10, -1))
    assert torch.equal(y, flat.reshape(2, 5, -1)) and y.shape == (2, 5, coder.config.d_out)
    assert coder.encode(x).latent.shape == (2, 5, 8)
    with pytest.raises(ValueError, match=r"expected rows \(\.\.\., 32\)"):
        coder(torch.randn(3, 4))
    assert "k 8, 64 latents, 32 -> 32" in repr(coder) and "layers.2.mlp" in repr(coder)
    assert "8 coders at layers.2.mlp; trained" in repr(run)
    assert f"{store.train.rows:,} train rows" in repr(store) and "layers.2.mlp (32" in repr(store)


def sweep(store_path: Path, runs: Path, **fields: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "store": store_path, "runs": runs, "batch_rows": 256, "tokens": 6_000,
        "coders": ({"hookpoint": "layers.2.mlp", "k": 4, "n_latents": 64},),
    }  # fmt: skip
    return TrainConfig(**values | fields)


def test_a_run_whose_folder_goes_away_stops(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bsc.train.metrics import MetricsWriter

    write = MetricsWriter.write
    seen: list[int] = []

    def then_remove(self: MetricsWriter, line: dict[str, Any]) -> None:
        write(self, line)
        seen.append(line["step"])
        shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(MetricsWriter, "write", then_remove)
    config = sweep(store_path, tmp_path, name="run", log_every=2)
    with pytest.raises(StoreError, match="no longer there: the run's folder was removed or moved"):
        train_sweep(config)
    assert seen == [2]


def test_a_file_size_limit_is_one_message(store_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bsc", "train", "--store", str(store_path), "--runs",
               str(tmp_path), "--name", "run", "--tokens", "2560", "--batch-rows", "256",
               "--n-latents", "256", "--k", "4", "--checkpoint-every", "5"]  # fmt: skip
    limit = 60_000

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=small_files, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "cannot be written" in said or "File too large" in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_say_what_is_kept(
    number: signal.Signals, code: int, tiny_model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "bsc", "cache", "--model", str(tiny_model), "--text", "stdlib",
               "--store", str(tmp_path / "acts"), "--tokens", "5M"]  # fmt: skip

    def as_in_a_terminal() -> None:  # where jobs run in the background, SIGINT is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    running = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal
    )
    assert running.stderr is not None
    # While Python imports, a signal may fall into code of an extension, after which Python ends
    # itself by SIGINT whatever it was told to exit with (a shell says 130, too).
    first = running.stderr.readline()
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    said = first + said
    assert running.returncode == code and "Traceback" not in said, said
    how = "interrupted." if number == signal.SIGINT else "stopped by SIGTERM."
    assert f"{how} What is committed is kept; the same command goes on from there." in said


def test_a_second_training_of_a_run_says_that_it_is_trained(
    store_path: Path, run: Run, tmp_path: Path
) -> None:
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "run")))
    record = raw(copy.config_path)
    del record["completed"]
    write_record(copy.config_path, record)
    with claim(copy.folder), pytest.raises(UserError, match=r"is being trained now .process"):
        train_sweep(sweep(store_path, tmp_path, name="run"))
    with pytest.raises(UserError, match=r"a run that has not ended is here\. Go on with it"):
        train_sweep(sweep(store_path, tmp_path, name="run"))
    assert not (copy.folder / ".lock").exists()


def test_info_on_a_run_that_was_interrupted(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "run")))
    record = raw(copy.config_path)
    del record["completed"]
    write_record(copy.config_path, record)
    with pytest.raises(SystemExit) as done:
        main(["info", str(copy.folder), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert not done.value.code and found["state"] == "interrupted"
    assert found["go_on"] == f"bsc train --resume {copy.folder}" and found["rows"] > 0
    with claim(copy.folder), pytest.raises(SystemExit):
        main(["info", str(copy.folder)])
    assert "being trained by process" in capsys.readouterr().out


def test_a_finished_store_on_a_read_only_disk_is_complete(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(str(tiny_model), tmp_path / "acts")
    first = bsc.capture(config)

    @contextmanager
    def read_only(self: LocalFolder) -> Any:
        if self.root.exists():
            raise OSError(30, "Read-only file system")
        yield

    monkeypatch.setattr(LocalFolder, "locked", read_only)
    again = bsc.capture(config)
    assert again.complete and (again.rows, again.held_out_rows) == (first.rows, first.held_out_rows)


def test_a_sweep_of_which_nothing_is_left_exits_1(
    store_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from bsc.train import loop

    real = loop.Loop._summaries

    def diverged(self: Any, figures: Any) -> Any:
        return [s._replace(frozen_at=3) for s in real(self, figures)]

    monkeypatch.setattr(loop.Loop, "_summaries", diverged)
    with pytest.raises(SystemExit) as done:
        main(["train", "--store", str(store_path), "--runs", str(tmp_path), "--tokens", "2560",
              "--batch-rows", "256", "--n-latents", "64", "--k", "4"])  # fmt: skip
    assert done.value.code == 1 and "every coder turned non-finite" in capsys.readouterr().err


def test_tokens_can_be_left_out_by_their_ids(store_path: Path, tmp_path: Path) -> None:
    store = ActivationStore(store_path)
    ids = store.train.tokens("token_id")
    common = int(torch.bincount(torch.from_numpy(ids.astype("int64"))).argmax())
    runs = [
        train_sweep(sweep(store_path, tmp_path, name=f"without-{len(out)}", without_tokens=out))[0]
        for out in ((), (common,))
    ]
    assert [r.config()["without_tokens"] for r in runs] == [[], [common]]
    a, b = (load_file(next(r.folder.rglob("coder.safetensors")))["W_dec"] for r in runs)
    assert not torch.equal(a, b)


def test_why_so_many_latents_are_explained() -> None:
    counts = torch.arange(1, 201).numpy() * 10
    chosen = choose(counts, 10, census=1_500.0, min_firings=30, seed=0)
    said = chosen.why_so_many(0.1)
    assert said.startswith(f"{len(chosen.latents())} latents: 10 drawn evenly")
    assert "that fire on more than 10 % of the rows (--census-rate)" in said


def test_help_has_groups_examples_and_says_defaults_in_one_way() -> None:
    for command in ("cache", "train", "eval", "interp", "plan"):
        done = subprocess.run(
            [sys.executable, "-m", "bsc", command, "--help"], capture_output=True, text=True,
            env={**os.environ, "COLUMNS": "100"}, check=True,
        )  # fmt: skip
        assert done.stdout.count("╭─") >= 4 and "Example: bsc " in done.stdout, command
        assert "Default:" not in done.stdout and ".  [default" not in done.stdout
