"""Coders as SAELens (sae-lens 6) reads them: `SAE.load_from_disk(folder)`.

    cfg.json                    architecture, widths, what is done to rows, metadata
    sae_weights.safetensors     W_enc [d_in, F], b_enc [F], W_dec [F, d_out], b_dec [d_out],
                                threshold [F] (jumprelu), W_skip [d_out, d_in]

A top-k SAE is its `topk`; batch top-k is its `jumprelu`, `jumprelu_transcoder` or
`jumprelu_skip_transcoder`, whose threshold is compared strictly. It has no top-k transcoder, and no
latent whose value does not grow with its pre-activation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from bsc.errors import StoreError, UserError
from bsc.eval.exports.weights import (
    CoderFormat,
    Found,
    Origin,
    Reference,
    linear_threshold,
    make_coder,
    read_weights,
    stated,
    strict_threshold,
)
from bsc.files import write_json
from bsc.records import parse_object, read_file
from bsc.tensor_file import write_tensors
from bsc.train.coders.coder import SparseCoder
from bsc.train.coders.config import CoderConfig

__all__ = ["SAELENS"]

_LAYOUT = "6.54.12"
"""The release whose layout of cfg.json this is; before 6.0 it was another."""
_JUMPRELU = {
    "sae": "jumprelu",
    "transcoder": "jumprelu_transcoder",
    "skip_transcoder": "jumprelu_skip_transcoder",
}


def refusal(config: CoderConfig) -> str | None:
    """Why SAELens cannot hold such a coder."""
    if config.code != "continuous":
        return (
            f"SAELens has no {config.code} latents: every one of its codes grows with its "
            f"pre-activation; use --format sparsify-binary for binary coders with top-k"
        )
    if config.select == "groupmax":
        return "SAELens has no groupmax; use --format sparsify, or train with select = 'topk'"
    if config.select == "topk" and config.site != "sae":
        return (
            "SAELens has no top-k transcoder; train with select = 'batch_topk', or use "
            "--format sparsify"
        )
    return None


def write(coder: SparseCoder, folder: Path, origin: Origin) -> None:
    """Write the two files."""
    config, t = coder.config, coder.tensors
    arrays = {
        "W_enc": coder.W_enc.T,
        "b_enc": coder.b_enc,
        "W_dec": t["W_dec"],
        "b_dec": t["b_dec"],
    }
    written = {
        "architecture": "topk", "d_in": config.d_in, "d_sae": config.n_latents, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": config.site == "sae",
        "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": _LAYOUT, "model_name": origin.model, "context_size": origin.context,
            # TransformerLens has no hook at the input of an MLP behind the norm's weight: none is
            # named rather than one that is near.
            "hook_name": None, "hf_hook_name": f"{origin.hookpoint}.{config.side}",
            "exclude_special_tokens": list(origin.without_tokens) or False,
        },
    }  # fmt: skip
    if config.select == "batch_topk":
        written["architecture"] = _JUMPRELU[config.site]
        arrays["threshold"] = strict_threshold(coder.thresholds())
    else:
        written |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    if config.site != "sae":
        written["d_out"] = config.d_out
    if "W_skip" in t:
        arrays["W_skip"] = t["W_skip"]
    contiguous = {n: a.float().contiguous() for n, a in arrays.items()}
    write_tensors(folder / "sae_weights.safetensors", contiguous)
    write_json(folder / "cfg.json", written)


def reference(folder: Path) -> Reference:
    """SAELens' formula: relu(pre), where it is among the k largest or pre is above the threshold.

    With the skip path of `forward`, which `decode` alone leaves out.
    """
    cfg = json.loads((folder / "cfg.json").read_text())
    t = {n: a.float() for n, a in load_file(folder / "sae_weights.safetensors").items()}
    norm = t["W_dec"].norm(dim=1).clamp(min=1e-8)

    def run(x_Nd: Tensor) -> tuple[Tensor, Tensor]:
        rows = x_Nd - t["b_dec"] if _subtracts(cfg) else x_Nd
        pre = rows @ t["W_enc"] + t["b_enc"]
        decoder = t["W_dec"]
        if cfg.get("rescale_acts_by_decoder_norm"):
            pre, decoder = pre * norm, decoder / norm.unsqueeze(1)
        code = pre.relu()
        if "threshold" in t:
            code = code * (pre > t["threshold"])
        elif cfg["architecture"] == "topk":
            top = code.topk(cfg["k"], dim=1)
            code = torch.zeros_like(pre).scatter(1, top.indices, top.values)
        y = code @ decoder + t["b_dec"]
        return code, y + x_Nd @ t["W_skip"].T if "W_skip" in t else y

    return run


def read(folder: Path) -> Found:
    """A coder with ReLU, JumpReLU or top-k latents.

    Raises:
        UserError: it is damaged, or does to its rows or latents what ours cannot.
    """
    cfg_path, path = folder / "cfg.json", folder / "sae_weights.safetensors"
    cfg = parse_object(read_file(cfg_path, "config of SAELens"), cfg_path)
    for name in ("normalize_activations", "reshape_activations"):
        if cfg.get(name, "none") not in ("none", None):
            raise UserError(f"{folder}: {name}={cfg[name]!r:.40} has no counterpart here.")
    architecture = cfg.get("architecture")
    if architecture not in (
        "standard",
        "topk",
        "transcoder",
        "skip_transcoder",
        *_JUMPRELU.values(),
    ):
        raise UserError(f"{folder}: architecture {architecture!r:.40} has no counterpart here.")
    named = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu"))
    if architecture != "topk" and named != "relu":  # layouts of before 6.0
        raise UserError(f"{folder}: a {architecture} with activation {named!r:.40} is not known.")
    t = read_weights(path)
    if "scaling_factor" in t and bool((t["scaling_factor"] != 1).any()):
        raise UserError(f"{folder}: a scaling_factor has no counterpart here.")
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        if name not in t:
            raise StoreError(f"{path}: no {name} here; it has {', '.join(sorted(t))}.")
    site = "skip_transcoder" if "W_skip" in t else "sae"
    if site == "sae" and "transcoder" in architecture:
        site = "transcoder"
    weight, bias, decoder = t["W_enc"].T, t["b_enc"], t["W_dec"]
    if site == "sae" and not _subtracts(cfg):
        bias = bias + weight @ t["b_dec"]
    # Without k latents in every row, k is nominal: how many are on is measured.
    fields: dict[str, Any] = {"select": "batch_topk", "k": 1}
    if architecture == "topk":
        fields = {"select": "topk", "k": stated(cfg, "k", int, cfg_path)}
        if cfg.get("rescale_acts_by_decoder_norm"):
            norm = decoder.norm(dim=1, keepdim=True).clamp(min=1e-8)
            weight, bias, decoder = weight * norm, bias * norm.squeeze(1), decoder / norm
    elif "jumprelu" in architecture:
        if "threshold" not in t:
            raise StoreError(f"{path}: no threshold here, which a {architecture} has.")
        threshold = t["threshold"]
        same = bool((threshold == threshold[:1]).all())
        t["select_threshold"] = linear_threshold(threshold[:1] if same else threshold)
    else:
        t["select_threshold"] = torch.tensor([torch.finfo(torch.float32).tiny])
    t |= {"encoder.weight": weight, "encoder.bias": bias, "W_dec": decoder}
    coder = make_coder(path, t, site=site, code="continuous", **fields)
    facts = cfg.get("metadata")
    facts = facts if isinstance(facts, dict) else cfg
    model = facts.get("model_name")
    return Found(
        coder, model if isinstance(model, str) else None, _place(facts, site), path.name,
        _without_tokens(facts, cfg_path),
    )  # fmt: skip


def _without_tokens(
    facts: Mapping[str, Any], path: Path
) -> tuple[int, ...] | Literal["special"] | None:
    """Tokens that it was trained without: a list of ids, or true for all special ones."""
    said = facts.get("exclude_special_tokens")
    if said is None or isinstance(said, bool):
        return None if said is None else "special" if said else ()
    if isinstance(said, list) and all(type(i) is int and 0 <= i < 1 << 32 for i in said):
        return tuple(sorted(said))
    raise StoreError(f"{path}: exclude_special_tokens: should be true, false or ids of tokens.")


def _subtracts(cfg: Mapping[str, Any]) -> bool:
    """Whether b_dec is subtracted from what is encoded."""
    return bool(cfg.get("apply_b_dec_to_input", "transcoder" not in str(cfg.get("architecture"))))


def _place(facts: Mapping[str, Any], site: str) -> str | None:
    """What it says of where it belongs: a module, where the side is that of the site; else a name
    that is no hookpoint, so that the user is asked."""
    named = facts.get("hf_hook_name")
    if isinstance(named, str):
        module, _, side = named.rpartition(".")
        return module if side == ("output" if site == "sae" else "input") else named
    other = facts.get("hook_name", facts.get("hook_point"))
    return other if isinstance(other, str) else None


SAELENS = CoderFormat(refusal, write, reference, read)
