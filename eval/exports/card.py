"""The model card of a published run: Markdown that the hub shows, written from its records."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import yaml

from bsc.cache.model.hookpoints import modules_of
from bsc.eval.exports.publish import Published
from bsc.formats import interval, percent, printable
from bsc.train.coders.config import CoderConfig
from bsc.train.run_config import FinetunedCoder, PlannedCoder, RunConfig

__all__ = ["Tool", "model_card"]

_SHOWN = 100
"""Coders in the table."""
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_TOOLS = {
    "sparsify": "sparsify",
    "sparsify-binary": "sparsify, branch `binary`",
    "saelens": "SAELens",
    "dictionary-learning": "dictionary_learning",
    "circuit-tracer": "circuit-tracer",
}
_LOADING = {
    "sparsify": (
        "from sparsify import SparseCoder\n\n"
        'coder = SparseCoder.load_from_hub("{repo}", hookpoint="{place}")'
    ),
    "saelens": 'from sae_lens import SAE\n\nsae = SAE.from_pretrained("{repo}", "{place}")',
    "dictionary-learning": (
        "from dictionary_learning.utils import load_dictionary\n"
        "from huggingface_hub import snapshot_download\n\n"
        'folder = snapshot_download("{repo}", allow_patterns="{place}/*")\n'
        'dictionary, config = load_dictionary(f"{{folder}}/{place}", device="cpu")'
    ),
    "circuit-tracer": (
        "from circuit_tracer.utils.hf_utils import load_transcoder_from_hub\n\n"
        'transcoders, config = load_transcoder_from_hub("{repo}/{folder}")'
    ),
}
_LOADING["sparsify-binary"] = _LOADING["sparsify"]


class Tool(NamedTuple):
    """What another tool can do with the coders."""

    format: str
    refusals: Mapping[str, str]
    """Why it cannot hold a coder, by name."""
    folder: str = ""
    """Where they are in its format, if they were written in it."""
    place: str = ""
    """Of the first of them."""
    written: int | None = None
    """How many were written; None: all that it can hold."""


def model_card(
    repo: str,
    published: Published,
    folders: Mapping[str, str],
    licence: str,
    tools: Sequence[Tool],
    text: Mapping[str, str],
) -> str:
    """The card.

    Args:
        repo: owner/name.
        published: the run.
        folders: of the coders in the repository.
        licence: as the hub spells it.
        tools: other tools.
        text: what is known of the text.
    """
    config, names = published.config, published.names
    coders = {c.name: c.coder for c in config.coders}
    trained = [c for c in config.coders if isinstance(c, (PlannedCoder, FinetunedCoder))]
    rates = sorted({c.lr for c in trained})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bsc.eval.exports", "."),
        autoescape=False,  # Markdown: foreign text goes through `text` and `code`
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "text": _text, "code": _code, "interval": interval, "percent": percent,
        "whole": lambda value: f"{value:,}",
    }  # fmt: skip
    first = config.coder(names[0])
    return environment.get_template("card.md.j2").render(
        front_matter=_front_matter(config, licence, text),
        title=repo.rpartition("/")[2],
        repo=repo,
        run=config.name if _ON_HUB.fullmatch(f"a/{config.name}") else "run",
        config=config,
        model=_Model(config.model),
        names=names,
        shown=_SHOWN,
        folder_of=lambda name: folders[name].removeprefix("coders/"),
        hookpoints=config.hookpoints,
        evaluation=published.evaluation,
        reads=_reads(config),
        first=first.coder,
        first_reads=f"the {first.coder.side} of {first.hookpoint}",
        optimisers=sorted({c.optimiser for c in trained}),
        rates=" to ".join(f"{r:.3g}" for r in (rates[:1] + rates[-1:] if rates[1:] else rates)),
        text=text,
        tools=[_tool(one, coders, repo) for one in tools],
    )


class _Model(dict[str, Any]):
    """Identity of a model, of which parts may be missing."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _front_matter(config: RunConfig, licence: str, text: Mapping[str, str]) -> str:
    sites = {c.coder.site for c in config.coders}
    kinds = {
        "sparse-autoencoder" if site == "sae" else site.replace("_", "-") for site in sites
    } | {f"{c.coder.code}-latents" for c in config.coders}
    front: dict[str, Any] = {
        "license": licence,
        "library_name": "bsc",
        "tags": ["interpretability", "sparse-coding", *sorted(kinds)],
    }
    name = str(config.model["name"])
    if config.model.get("revision") and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        front["base_model"] = name
    if _ON_HUB.fullmatch(text.get("dataset", "")):
        front["datasets"] = [text["dataset"]]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"


def _reads(config: RunConfig) -> list[str]:
    """What the coders of each site read and give, in sentences."""
    found: dict[tuple[str, str], CoderConfig] = {}
    for one in config.coders:
        found.setdefault((one.hookpoint, one.coder.site), one.coder)
    lines = [
        f"{_code(hook)}, {site.replace('_', ' ') if site != 'sae' else 'SAE'}s: "
        f"{_what(site, hook)} (width {coder.d_in} to {coder.d_out})."
        for (hook, site), coder in found.items()
    ]
    if config.without_tokens:
        ids = ", ".join(map(str, sorted(config.without_tokens)))
        lines.append(
            f"Rows of the tokens {ids} were left out of training and of every figure. In the model "
            f"such tokens keep what the module gives."
        )
    return lines


def _what(site: str, hookpoint: str) -> str:
    """What coders of a site do, for the place of a verb and its objects."""
    source, target = modules_of(hookpoint)
    if site == "sae":
        return "reconstruct the output of the module" + (
            f" {_code(target)}" if source != target else ""
        )
    what = (
        "give the output of the module from its input, which is what the module itself reads"
        if source == target
        else f"give the output of {_code(target)} from the input of {_code(source)}"
    )
    return what + (", with a linear path beside the latents" if site == "skip_transcoder" else "")


def _tool(tool: Tool, coders: Mapping[str, CoderConfig], repo: str) -> dict[str, Any]:
    words: Callable[..., str] = _LOADING[tool.format].format
    return {
        "format": tool.format,
        "name": _TOOLS[tool.format],
        "held": len(coders) - len(tool.refusals) if tool.written is None else tool.written,
        "folder": tool.folder,
        "reasons": list(dict.fromkeys(tool.refusals.values())),
        "what": f"In {_TOOLS[tool.format]}:",
        "lines": words(repo=repo, place=tool.place, folder=tool.folder) if tool.place else "",
    }


def _text(value: object) -> str:
    """Foreign text in a line of Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", printable(str(value)))


def _code(value: object) -> str:
    """Foreign text as code, also in a table."""
    plain = printable(str(value)).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`" if plain else ""
