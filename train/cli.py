"""Command of stage 2: `bsc train`. It parses, calls and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bsc.counts import parse_count
from bsc.flags import MACHINE, AsJson, Device, flag

__all__ = ["add_commands"]


def _lr(text: str) -> float | str:
    if text == "paper":
        return text
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"a number or 'paper', got {text!r}") from None


def _field(text: str) -> dict[str, Any]:
    """A field of a coders table as TOML: ``anneal = 0.2`` or ``temperature = [1.0, 2.0]``."""
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        name, given, value = text.partition("=")
        try:
            if not given:
                raise tomllib.TOMLDecodeError
            return tomllib.loads(f"{name} = '''{value.strip()}'''")
        except tomllib.TOMLDecodeError:
            raise typer.BadParameter(f"FIELD=VALUE, got {text!r}") from None


_RUN, _CODERS, _TRAINING, _STEERING = (
    "The run", "Coders: every value may be given several times", "Training",
    "Going on, planning, watching",
)  # fmt: skip


def train(
    sweep: Annotated[
        Path | None, typer.Argument(help="TOML file of a sweep; flags go before what it says.")
    ] = None,
    store: Annotated[
        str | None,
        flag("Folder of the activation store, or s3://bucket/path.", _RUN, default="acts"),
    ] = None,
    name: Annotated[
        str | None, flag("Name of the run.", _RUN, default="that of the file, or 'run'")
    ] = None,
    runs: Annotated[Path | None, flag("Folder of runs.", _RUN, default="runs")] = None,
    preset: Annotated[
        str | None,
        flag("'paper': every setting that is not given is the paper's.", _RUN, default="ours"),
    ] = None,
    hookpoint: Annotated[
        list[str] | None, flag("Hookpoints of the store.", _CODERS, default="every one")
    ] = None,
    site: Annotated[
        list[str] | None,
        flag("sae, transcoder, skip_transcoder.", _CODERS, default="skip_transcoder"),
    ] = None,
    code: Annotated[
        list[str] | None,
        flag("binary, continuous, hybrid.", _CODERS, default="binary and continuous"),
    ] = None,
    k: Annotated[list[int] | None, flag("Selected latents.", _CODERS, default="32")] = None,
    n_latents: Annotated[
        list[int] | None, flag("Latents.", _CODERS, default="32 times the output's width")
    ] = None,
    select: Annotated[
        list[str] | None, flag("topk, groupmax, batch_topk.", _CODERS, default="topk")
    ] = None,
    surrogate: Annotated[
        list[str] | None,
        flag("sigmoid, identity, rectangle, re, gumbel.", _CODERS, default="sigmoid"),
    ] = None,
    decoder_norm: Annotated[
        list[str] | None, flag("unit, free.", _CODERS, default="unit for SAEs, else free")
    ] = None,
    threshold: Annotated[
        list[str] | None, flag("learned, fixed, newton.", _CODERS, default="learned")
    ] = None,
    auxk_alpha: Annotated[
        list[float] | None, flag("Weight of the AuxK loss.", _CODERS, default="0")
    ] = None,
    optimiser: Annotated[
        list[str] | None, flag("adam, signum, signum_classic, muon.", _CODERS, default="adam")
    ] = None,
    lr: Annotated[
        list[str] | None,
        flag(
            "Learning rate, or 'paper'.",
            _CODERS,
            default="by optimiser and code",
            parser=_lr,
            metavar="FLOAT",
        ),
    ] = None,
    seed: Annotated[
        list[int] | None, flag("Seed of the initial weights.", _CODERS, default="0")
    ] = None,
    set_: Annotated[
        list[str] | None,
        flag(
            "Any other field of a coders table: --set clip_norm=1.",
            _CODERS,
            "--set",
            parser=_field,
            metavar="FIELD=VALUE",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        flag("Rows to train on.", _TRAINING, default="each once", parser=parse_count),
    ] = None,
    batch_rows: Annotated[
        int | None, flag("Rows in a step.", _TRAINING, default="2048", parser=parse_count)
    ] = None,
    micro_rows: Annotated[
        int | None,
        flag(
            "Rows worked on at a time.",
            _TRAINING,
            default="what memory allows",
            parser=parse_count,
        ),
    ] = None,
    data_seed: Annotated[
        int | None, flag("Seed of the order of the rows.", _TRAINING, default="0")
    ] = None,
    without_special_tokens: Annotated[
        bool | None,
        flag(
            "Leave out rows of special tokens, BOS included.",
            _TRAINING,
            "--without-special-tokens",
        ),
    ] = None,
    without_tokens: Annotated[
        list[int] | None,
        flag("Ids of further tokens whose rows are left out; several times.", _TRAINING),
    ] = None,
    dead_after: Annotated[
        int | None,
        flag(
            "Rows without firing that make a latent dead.",
            _TRAINING,
            default="10M",
            parser=parse_count,
        ),
    ] = None,
    eval_every: Annotated[
        int | None,
        flag("Steps between held-out evaluations, 0: never.", _TRAINING, default="10 in a run"),
    ] = None,
    check: Annotated[
        bool | None,
        flag(
            "Whether shards are compared with the store's manifest when they are first read.",
            _TRAINING,
            "--check/--no-check",
            default="check",
        ),
    ] = None,
    compile_: Annotated[
        bool | None, flag("torch.compile what gains by it.", _TRAINING, "--compile")
    ] = None,
    plan: Annotated[
        bool, flag("Only say what it comes to: memory, rows, hours.", _STEERING, "--plan")
    ] = False,
    resume: Annotated[
        Path | None,
        flag("Run to go on with; --tokens may be more than it had.", _STEERING),
    ] = None,
    add_coders: Annotated[
        bool, flag("With --resume: train these coders too.", _STEERING, "--add-coders")
    ] = False,
    checkpoint_every: Annotated[
        int | None,
        flag("Steps between checkpoints.", _STEERING, default="every ten minutes"),
    ] = None,
    keep_checkpoint: Annotated[
        bool | None,
        flag(
            "Whether the last one is kept when the run has ended.",
            _STEERING,
            "--keep-checkpoint/--no-keep-checkpoint",
            default="keep",
        ),
    ] = None,
    tensorboard: Annotated[
        bool | None,
        flag("Write TensorBoard files too.", _STEERING, "--tensorboard/--no-tensorboard"),
    ] = None,
    wandb: Annotated[str | None, flag("Project at Weights & Biases.", _STEERING)] = None,
    rank: Annotated[
        int | None,
        flag("Number of this process.", MACHINE, default="torchrun's, or 0", min=0),
    ] = None,
    world: Annotated[
        int | None,
        flag("Processes that share the coders.", MACHINE, default="torchrun's, or 1", min=1),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train many coders at once on a store: every combination of the values given is one coder.

    A run that was stopped goes on with --resume RUN.
    """
    from bsc.config import parse_config, read_toml
    from bsc.devices import rank_and_world
    from bsc.errors import ConfigError, UserError
    from bsc.files import canonical_json
    from bsc.train.job import make_job
    from bsc.train.plan import plan_sweep
    from bsc.train.resume import resume as resume_run
    from bsc.train.summary_table import summary_table
    from bsc.train.sweep import TrainConfig
    from bsc.train.trainer import train as train_sweep

    values: dict[str, Any] = read_toml(sweep) if sweep else {}
    if sweep and not values:
        raise ConfigError(f"{sweep}: the file is empty. The README shows a sweep.")
    if sweep and not resume:
        values.setdefault("name", sweep.stem)
    where = str(sweep) if sweep else "bsc train"
    run_flags = {
        "preset": preset, "store": store, "name": name, "runs": runs, "tokens": tokens,
        "batch_rows": batch_rows,
        "micro_rows": micro_rows, "seed": data_seed, "dead_after": dead_after, "device": device,
        "without_special_tokens": without_special_tokens,
        "without_tokens": tuple(without_tokens) if without_tokens else None,
        "eval_every": eval_every,
        "checkpoint_every": checkpoint_every, "keep_checkpoint": keep_checkpoint,
        "check": check, "compile": compile_, "tensorboard": tensorboard,
        "wandb": wandb,
    }  # fmt: skip
    coder_flags = {
        "hookpoint": hookpoint, "site": site, "select": select, "code": code,
        "surrogate": surrogate, "k": k, "n_latents": n_latents, "decoder_norm": decoder_norm,
        "threshold": threshold, "auxk_alpha": auxk_alpha, "optimiser": optimiser, "lr": lr,
        "seed": seed,
    }  # fmt: skip
    values |= {name: value for name, value in run_flags.items() if value is not None}
    given: dict[str, Any] = {name: value for name, value in coder_flags.items() if value}
    fields: Any  # the parser has made a table of the text
    for fields in set_ or ():
        for field, value in fields.items():
            given[field] = [*given.get(field, []), *(value if isinstance(value, list) else [value])]
    if resume is None or given:
        values.setdefault("coders", [{"code": ["binary", "continuous"]}])
    if "coders" in values:
        # Checked as a whole before tables are looked into.
        tables = parse_config(TrainConfig, {"coders": values["coders"]}, where).coders
        values["coders"] = tuple(t | given for t in tables)
    at, of = rank_and_world(rank, world)
    if at >= of:
        raise UserError(f"--rank {at}: ranks of {of} processes go from 0 to {of - 1}.")
    if resume is None and add_coders:
        raise UserError("--add-coders belongs to --resume RUN.")
    if resume is not None:
        if plan:
            raise UserError("--plan is for a new sweep; leave --resume out.")
        run, summaries = resume_run(
            resume, values, where=where, add_coders=add_coders, rank=at, world=of
        )
    else:
        config = parse_config(TrainConfig, values, where)
        if plan:
            made = plan_sweep(make_job(config, where, rank=at, world=of))
            typer.echo(canonical_json(made.to_json()) if as_json else "\n".join(made.lines()))
            return
        run, summaries = train_sweep(config, where, rank=at, world=of)
    if as_json:
        result = {"run": str(run.folder), "coders": [s._asdict() for s in summaries]}
        typer.echo(canonical_json(result), nl=False)
    else:
        summary_table(summaries)
        typer.echo(str(run.folder))
    if summaries and all(s.frozen_at is not None for s in summaries):
        typer.echo(
            "every coder turned non-finite, so there is nothing to evaluate. A smaller --lr keeps "
            "them finite; so does the default.",
            err=True,
        )
        raise typer.Exit(1)


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this stage into the command line."""
    app.command(
        epilog="Example: bsc train --store acts --code binary --code continuous --k 16 --k 32"
    )(train)
