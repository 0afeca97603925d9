"""The commands `bsc interp` and `bsc export`. They parse, call and print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["add_commands"]


def interp(
    run: Annotated[Path, typer.Argument(help="Folder of an evaluated run.")],
    judge: Annotated[
        str | None,
        typer.Option(
            help="URL up to /v1, vllm, llama.cpp, ollama, openai, openrouter, or a model to run "
            "here.  [default: none, offline scores alone]"
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="Model of the endpoint.  [default: the only one it has]")
    ] = None,
    judge_key_variable: Annotated[
        str | None,
        typer.Option(help="Environment variable of its key.  [default: BSC_JUDGE_KEY]"),
    ] = None,
    coder: Annotated[
        list[str] | None, typer.Option(help="Coders, by (part of) name.  [default: all]")
    ] = None,
    latents: Annotated[int, typer.Option(help="Latents of each sample of a coder.")] = 50,
    latent: Annotated[
        list[int] | None, typer.Option(help="Just these latents; several times.")
    ] = None,
    census_rate: Annotated[
        float, typer.Option(help="Latents that fire this often are all in the weighted sample.")
    ] = 0.1,
    test: Annotated[
        list[str] | None, typer.Option(help="detection, fuzzing, intruder.  [default: all three]")
    ] = None,
    explain_windows: Annotated[int, typer.Option(help="Windows to explain from.")] = 20,
    test_windows: Annotated[int, typer.Option(help="Windows of either kind to test on.")] = 20,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 32,
    min_firings: Annotated[
        int, typer.Option(help="Latents with fewer firings are not drawn; they are counted.")
    ] = 30,
    items: Annotated[int, typer.Option(help="Windows in a request.")] = 5,
    marks: Annotated[str, typer.Option(help="Marked tokens: all that fire, or strong.")] = "all",
    negatives: Annotated[
        str, typer.Option(help="Fuzzing: against silent windows, active ones, or auto.")
    ] = "auto",
    explanations: Annotated[
        str, typer.Option(help="own, shuffled, blank, or a file of coder, latent, explanation.")
    ] = "own",
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at most.")] = 32,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for an answer.")] = 120.0,
    price_in: Annotated[float, typer.Option(help="Price of a million tokens of prompts.")] = 0.0,
    price_out: Annotated[float, typer.Option(help="Price of a million tokens of replies.")] = 0.0,
    price_cached: Annotated[
        float | None, typer.Option(help="Of cached prompt tokens.  [default: as others]")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Stop before more than this is spent on this judge.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build every prompt, say what it costs, ask nothing.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option("--export", help="Write the requests to a JSONL file.")
    ] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", help="Read the replies from a JSONL file.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Folder of the results in RUN/interp.  [default: the judge]")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Where the store is now.  [default: as in training]")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the model is now.  [default: as at the capture]")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Of a judge that runs here.  [default: a GPU if any]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Score how well latents can be explained: by a judge, and without a language model.

    What was answered is kept in RUN/interp/ledger.jsonl; nothing is asked twice.
    """
    from bsc.config import parse_config
    from bsc.errors import UserError
    from bsc.eval.interp.connection import is_endpoint
    from bsc.eval.interp.cost import Prices
    from bsc.eval.interp.interp import cost_of, export_requests, import_replies, interpret
    from bsc.eval.interp.judges import NamedJudge, open_judge
    from bsc.eval.interp.material import InterpConfig, Materials
    from bsc.eval.interp.offline import offline_scores
    from bsc.eval.interp.table import cost_table, interp_table, offline_table
    from bsc.files import canonical_json
    from bsc.train.run import Run

    local = judge is not None and not is_endpoint(judge)
    values: dict[str, Any] = {
        "coders": tuple(coder or ()), "latents": latents, "only": tuple(latent or ()),
        "census_rate": census_rate, "explain_windows": explain_windows,
        # Answers of a local model are read off after the same prompt.
        "test_windows": test_windows, "items": 1 if local else items,
        "marks": marks, "window": window, "min_firings": min_firings,
        "negatives": negatives, "explanations": explanations, "seed": seed,
    }  # fmt: skip
    if test:
        values["tests"] = tuple(dict.fromkeys(test))
    config = parse_config(InterpConfig, values, "bsc interp")
    values = {"price_in": price_in, "price_out": price_out, "price_cached": price_cached,
              "budget": budget}  # fmt: skip
    prices = parse_config(Prices, values, "bsc interp")
    files = [f"--{n}" for n, p in (("export", export), ("import", import_)) if p is not None]
    if len(files) + (judge is not None) > 1:
        raise UserError(
            f"{' and '.join(files)}{' and --judge' if judge else ''}: give one of them."
        )
    if dry_run and files:
        raise UserError(f"--dry-run and {files[0]}: give one of them.")
    if judge is None and not files and not dry_run:
        asked = {"--judge-model": judge_model, "--budget": budget, "--name": name,
                 "--explanations": explanations if explanations != "own" else None}  # fmt: skip
        if given := [option for option, value in asked.items() if value is not None]:
            raise UserError(f"{given[0]}: there is no judge; name one with --judge.")
    if files and not judge_model:
        raise UserError(f"{files[0]}: name the judge with --judge-model; its answers go by it.")
    opened = Run.open(run)
    materials = Materials(opened, config, store=store, model=model)
    by = (
        NamedJudge(judge_model or "any judge")
        if judge is None
        else open_judge(
            judge, judge_model, key_variable=judge_key_variable, concurrency=concurrency,
            timeout=timeout, device=device,
        )
    )  # fmt: skip
    if dry_run:
        cost_table(cost_of(materials, by), prices, as_json=as_json)
        return
    if export is not None:
        n, more = export_requests(materials, by.model, export)
        typer.echo(f"{export}: {n} requests{'; tests follow when they are answered' * more}")
        return
    result: dict[str, Any] = {"offline": offline_scores(materials), "judge": None}
    if import_ is not None:
        result["judge"] = import_replies(materials, by.model, import_, name=name)
    elif judge is not None:
        result["judge"] = interpret(materials, by, prices, name=name)
    if as_json:
        typer.echo(canonical_json(result), nl=False)
        return
    offline_table(result["offline"])
    if result["judge"]:
        interp_table(result["judge"])


def export(
    run: Annotated[Path, typer.Argument(help="Folder of an evaluated run.")],
    coder: Annotated[str, typer.Argument(help="Name of a coder, or a part of it.")],
    out: Annotated[Path, typer.Option(help="New folder to write into.")],
    format_: Annotated[str, typer.Option("--format", help="delphi or neuronpedia.")] = "delphi",
    explanations: Annotated[
        Path | None,
        typer.Option(help="For neuronpedia: RUN/interp/<judge>/latents.jsonl.  [default: none]"),
    ] = None,
    creator: Annotated[str, typer.Option(help="For neuronpedia: who publishes it.")] = "bsc",
    store: Annotated[
        Path | None, typer.Option(help="Where the store is now.  [default: as in training]")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the model is now.  [default: as at the capture]")
    ] = None,
) -> None:
    """Write a coder's firings as delphi's cache or as Neuronpedia's upload format."""
    from bsc.errors import UserError, nearest
    from bsc.eval.exports.delphi import write_delphi_cache
    from bsc.eval.exports.neuronpedia import write_neuronpedia
    from bsc.eval.interp.material import InterpConfig, Materials
    from bsc.train.run import Run

    formats = ("delphi", "neuronpedia")
    if format_ not in formats:
        raise UserError(
            f"--format {format_}: should be {' or '.join(formats)}{nearest(format_, formats)}."
        )
    materials = Materials(Run.open(run), InterpConfig(coders=(coder,)), store=store, model=model)
    material = materials.of(materials.names[0])
    if format_ == "delphi":
        written = write_delphi_cache(materials, material, out)
    else:
        written = write_neuronpedia(
            materials, material, out, creator=creator, explanations=explanations
        )
    typer.echo(str(written))


def add_commands(app: typer.Typer) -> None:
    """Put the commands into the command line."""
    app.command()(interp)
    app.command()(export)
