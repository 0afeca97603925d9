"""Command of stage 2: `bsc train`. It parses, calls and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bsc.counts import parse_count

__all__ = ["add_commands"]


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
    tokens: Annotated[
        int | None,
        typer.Option(help="Rows to train on.  [default: each once]", parser=parse_count),
    ] = None,
    batch_rows: Annotated[
        int | None, typer.Option(help="Rows per step.  [default: 2048]", parser=parse_count)
    ] = None,
    hookpoint: Annotated[
        list[str] | None, typer.Option(help="Of the store.  [default: every one]")
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(help="sae, transcoder, skip_transcoder.  [default: skip_transcoder]"),
    ] = None,
    code: Annotated[
        list[str] | None, typer.Option(help="binary, continuous.  [default: both]")
    ] = None,
    k: Annotated[list[int] | None, typer.Option(help="Selected latents.  [default: 32]")] = None,
    n_latents: Annotated[
        list[int] | None, typer.Option(help="Latents.  [default: 32 times the output's width]")
    ] = None,
    decoder_norm: Annotated[
        list[str] | None, typer.Option(help="unit, free.  [default: unit for SAEs, else free]")
    ] = None,
    threshold: Annotated[
        list[str] | None, typer.Option(help="learned, fixed.  [default: learned]")
    ] = None,
    optimiser: Annotated[
        list[str] | None, typer.Option(help="adam, signum.  [default: adam]")
    ] = None,
    lr: Annotated[
        list[float] | None, typer.Option(help="Learning rate.  [default: by optimiser and code]")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Of the initial weights.  [default: 0]")
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
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1.  [default: a GPU if any]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train many coders at once on a store: every combination of the values given is one coder.

    Flags marked with several values may be repeated: --code binary --code continuous --k 8 --k 16.
    """
    from bsc.config import parse_config, read_toml
    from bsc.errors import ConfigError
    from bsc.files import canonical_json
    from bsc.train.sweep import TrainConfig
    from bsc.train.table import summary_table
    from bsc.train.trainer import train as train_sweep

    values: dict[str, Any] = read_toml(sweep) if sweep else {}
    if sweep and not values:
        raise ConfigError(f"{sweep}: the file is empty. The README shows a sweep.")
    if sweep:
        values.setdefault("name", sweep.stem)
    where = str(sweep) if sweep else "bsc train"
    run_flags = {
        "store": store, "name": name, "runs": runs, "tokens": tokens, "batch_rows": batch_rows,
        "seed": data_seed, "dead_after": dead_after, "device": device,
        "without_special_tokens": without_special_tokens,
    }  # fmt: skip
    coder_flags = {
        "hookpoint": hookpoint, "site": site, "code": code, "k": k, "n_latents": n_latents,
        "decoder_norm": decoder_norm, "threshold": threshold, "optimiser": optimiser, "lr": lr,
        "seed": seed,
    }  # fmt: skip
    values |= {name: value for name, value in run_flags.items() if value is not None}
    given = {name: value for name, value in coder_flags.items() if value}
    values.setdefault("coders", [{"code": ["binary", "continuous"]}])
    config = parse_config(TrainConfig, values, where)
    config = config.model_copy(update={"coders": tuple(t | given for t in config.coders)})
    run, summaries = train_sweep(config, where)
    if as_json:
        result = {"run": str(run.folder), "coders": [s._asdict() for s in summaries]}
        typer.echo(canonical_json(result), nl=False)
    else:
        summary_table(summaries)
        typer.echo(str(run.folder))


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this stage into the command line."""
    app.command()(train)
