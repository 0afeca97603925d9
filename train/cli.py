"""Command of stage 2: `bsc train`. It parses, calls and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bsc.counts import parse_count

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


def train(
    sweep: Annotated[
        Path | None, typer.Argument(help="TOML file of a sweep; flags go before what it says.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="Folder of the activation store, or s3://bucket/path.  [default: acts]"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run.  [default: the file's, or 'run']")
    ] = None,
    runs: Annotated[Path | None, typer.Option(help="Folder of runs.  [default: runs]")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="'paper': every setting not given is the paper's.  [default: ours]"),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Rows to train on.  [default: each once]", parser=parse_count),
    ] = None,
    batch_rows: Annotated[
        int | None, typer.Option(help="Rows per step.  [default: 2048]", parser=parse_count)
    ] = None,
    micro_rows: Annotated[
        int | None,
        typer.Option(
            help="Rows worked on at a time.  [default: what memory allows]", parser=parse_count
        ),
    ] = None,
    hookpoint: Annotated[
        list[str] | None, typer.Option(help="Of the store.  [default: every one]")
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(help="sae, transcoder, skip_transcoder.  [default: skip_transcoder]"),
    ] = None,
    select: Annotated[
        list[str] | None, typer.Option(help="topk, groupmax, batch_topk.  [default: topk]")
    ] = None,
    code: Annotated[
        list[str] | None,
        typer.Option(help="binary, continuous, hybrid.  [default: binary and continuous]"),
    ] = None,
    surrogate: Annotated[
        list[str] | None,
        typer.Option(help="sigmoid, identity, rectangle, re, gumbel.  [default: sigmoid]"),
    ] = None,
    k: Annotated[list[int] | None, typer.Option(help="Selected latents.  [default: 32]")] = None,
    n_latents: Annotated[
        list[int] | None, typer.Option(help="Latents.  [default: 32 times the output's width]")
    ] = None,
    decoder_norm: Annotated[
        list[str] | None, typer.Option(help="unit, free.  [default: unit for SAEs, else free]")
    ] = None,
    threshold: Annotated[
        list[str] | None, typer.Option(help="learned, fixed, newton.  [default: learned]")
    ] = None,
    auxk_alpha: Annotated[
        list[float] | None, typer.Option(help="Weight of the AuxK loss.  [default: 0]")
    ] = None,
    optimiser: Annotated[
        list[str] | None,
        typer.Option(help="adam, signum, signum_classic, muon.  [default: adam]"),
    ] = None,
    lr: Annotated[
        list[str] | None,
        typer.Option(
            help="Learning rate, or 'paper'.  [default: by optimiser and code]",
            parser=_lr,
            metavar="FLOAT",
        ),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Of the initial weights.  [default: 0]")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            parser=_field,
            metavar="FIELD=VALUE",
            help="Any other field of a coders table: --set clip_norm=1.",
        ),
    ] = None,
    data_seed: Annotated[
        int | None, typer.Option(help="Of the order of the rows.  [default: 0]")
    ] = None,
    without_special_tokens: Annotated[
        bool | None,
        typer.Option(
            "--without-special-tokens", help="Leave out rows of special tokens, BOS included."
        ),
    ] = None,
    dead_after: Annotated[
        int | None,
        typer.Option(
            help="Rows without firing that make a latent dead.  [default: 10M]",
            parser=parse_count,
        ),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(help="Steps between held-out evaluations, 0: never.  [default: 10 in a run]"),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints.  [default: every ten minutes]"),
    ] = None,
    keep_checkpoint: Annotated[
        bool | None,
        typer.Option(
            "--keep-checkpoint/--no-keep-checkpoint",
            help="Keep the last one when the run has ended.  [default: keep]",
        ),
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Compare shards with the store's manifest when they are first read.  "
            "[default: check]",
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run; --tokens may be more than it had.")
    ] = None,
    add_coders: Annotated[
        bool, typer.Option("--add-coders", help="With --resume: train these coders too.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what it comes to: memory, rows, hours.")
    ] = False,
    compile_: Annotated[
        bool | None, typer.Option("--compile", help="torch.compile what gains by it.")
    ] = None,
    tensorboard: Annotated[
        bool | None,
        typer.Option("--tensorboard/--no-tensorboard", help="Write TensorBoard files too."),
    ] = None,
    wandb: Annotated[str | None, typer.Option(help="Project at Weights & Biases.")] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of this process.  [default: torchrun's, or 0]", min=0)
    ] = None,
    world: Annotated[
        int | None, typer.Option(help="Processes that share the coders.", min=1)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1.  [default: a GPU if any]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train many coders at once on a store: every combination of the values given is one coder.

    Flags marked with several values may be repeated: --code binary --code continuous --k 8 --k 16.
    """
    from bsc.config import parse_config, read_toml
    from bsc.devices import rank_and_world
    from bsc.errors import ConfigError, UserError
    from bsc.files import canonical_json
    from bsc.train.job import make_job
    from bsc.train.plan import plan_sweep
    from bsc.train.resume import resume as resume_run
    from bsc.train.sweep import TrainConfig
    from bsc.train.table import summary_table
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
        "without_special_tokens": without_special_tokens, "eval_every": eval_every,
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


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this stage into the command line."""
    app.command()(train)
