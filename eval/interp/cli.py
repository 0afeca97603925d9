"""The command `bsc interp`. It parses, calls and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bsc.flags import AsJson, ModelNow, StoreNow, flag

__all__ = ["add_commands"]


_JUDGE, _WHICH, _TESTS, _COST = "The judge", "Which latents", "Explanations and tests", "Cost"


def interp(
    run: Annotated[Path, typer.Argument(help="Folder of an evaluated run.")],
    judge: Annotated[
        str | None,
        flag(
            "URL up to /v1, vllm, llama.cpp, ollama, openai, openrouter, or a model to run here.",
            _JUDGE,
            default="none, offline scores alone",
        ),
    ] = None,
    judge_model: Annotated[
        str | None, flag("Model of the endpoint.", _JUDGE, default="the only one it has")
    ] = None,
    judge_key_variable: Annotated[
        str | None, flag("Environment variable of its key.", _JUDGE, default="BSC_JUDGE_KEY")
    ] = None,
    concurrency: Annotated[int, flag("Requests under way at most.", _JUDGE, min=1)] = 32,
    timeout: Annotated[float, flag("Seconds for an answer.", _JUDGE, min=0.1)] = 120.0,
    device: Annotated[
        str | None,
        flag("Device of a judge that runs here.", _JUDGE, default="a GPU where there is one"),
    ] = None,
    export: Annotated[Path | None, flag("JSONL file to write the requests to.", _JUDGE)] = None,
    import_: Annotated[
        Path | None, flag("JSONL file to read the replies from.", _JUDGE, "--import")
    ] = None,
    name: Annotated[
        str | None, flag("Folder of the results in RUN/interp.", _JUDGE, default="the judge's name")
    ] = None,
    coder: Annotated[
        list[str] | None,
        flag("Coders, by (part of) name; several times.", _WHICH, default="all"),
    ] = None,
    latents: Annotated[int, flag("Latents of each of a coder's two samples.", _WHICH)] = 50,
    latent: Annotated[list[int] | None, flag("Just these latents; several times.", _WHICH)] = None,
    census_rate: Annotated[
        float, flag("Latents that fire this often are all in the weighted sample.", _WHICH)
    ] = 0.1,
    min_firings: Annotated[
        int, flag("Latents with fewer firings are not drawn; they are counted.", _WHICH)
    ] = 30,
    test: Annotated[
        list[str] | None,
        flag("detection, fuzzing, intruder; several times.", _TESTS, default="all three"),
    ] = None,
    explain_windows: Annotated[int, flag("Windows to explain from.", _TESTS)] = 20,
    test_windows: Annotated[int, flag("Windows of either kind to test on.", _TESTS)] = 20,
    window: Annotated[int, flag("Tokens of a window.", _TESTS)] = 32,
    items: Annotated[int, flag("Windows in a request.", _TESTS)] = 5,
    marks: Annotated[str, flag("Marked tokens: all that fire, or strong.", _TESTS)] = "all",
    negatives: Annotated[
        str, flag("Fuzzing: against silent windows, active ones, or auto.", _TESTS)
    ] = "auto",
    explanations: Annotated[
        str, flag("own, shuffled, blank, or a file of coder, latent, explanation.", _TESTS)
    ] = "own",
    seed: Annotated[int, flag("Seed of every draw.", _TESTS)] = 0,
    dry_run: Annotated[
        bool, flag("Build every prompt, say what it costs, ask nothing.", _COST, "--dry-run")
    ] = False,
    budget: Annotated[
        float | None, flag("What may be spent on this judge; it stops before more.", _COST)
    ] = None,
    price_in: Annotated[float, flag("Price of a million tokens of prompts.", _COST)] = 0.0,
    price_out: Annotated[float, flag("Price of a million tokens of replies.", _COST)] = 0.0,
    price_cached: Annotated[
        float | None,
        flag("Price of a million cached tokens of prompts.", _COST, default="as others"),
    ] = None,
    store: StoreNow = None,
    model: ModelNow = None,
    as_json: AsJson = False,
) -> None:
    """Score how well latents can be explained: by a judge, and without a language model.

    What was answered is kept in RUN/interp/ledger.jsonl; nothing is asked twice.
    """
    from bsc.config import parse_config
    from bsc.errors import UserError
    from bsc.eval.interp.cost import Prices
    from bsc.eval.interp.interp import cost_of, export_requests, import_replies, interpret
    from bsc.eval.interp.judges.connection import is_endpoint
    from bsc.eval.interp.judges.judge import NamedJudge, open_judge
    from bsc.eval.interp.material import InterpConfig, Materials
    from bsc.eval.interp.offline import offline_scores
    from bsc.eval.interp.scores_table import cost_table, interp_table, offline_table
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


def add_commands(app: typer.Typer) -> None:
    """Put the command into the command line."""
    app.command(
        epilog="Example: bsc interp runs/run --judge http://localhost:8000/v1 --coder binary-k32"
    )(interp)
