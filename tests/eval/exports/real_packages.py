"""Runs in a process that sees the packages of other tools: loads what `bsc export` wrote with their
own code, saves coders of theirs, and writes down codes and reconstructions of both.

    python real_packages.py FOLDER

In FOLDER are rows.safetensors, cases.json and a folder for each case; into it go a folder for each
coder of theirs, written.json with the format of each, and found-*.safetensors.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ON_HUB, ALONE = "somebody", "else"
"""Owners of repositories: of one with all cases, and of some with nothing but one each."""

Tensors = tuple[torch.Tensor, torch.Tensor]


def sparsify(folder: Path, x: torch.Tensor) -> Tensors:
    """By `load_from_disk` (on the hub `load_from_hub` and `load_many`), `encode` and `forward`."""
    from sparsify import SparseCoder

    if folder.parts[0] == ALONE:
        coder: Any = SparseCoder.load_many(ALONE + "/" + folder.parts[1])[folder.name]
    elif folder.parts[0] == ON_HUB:
        coder = SparseCoder.load_from_hub("/".join(folder.parts[:2]), hookpoint=folder.name)
    else:
        coder = SparseCoder.load_from_disk(folder)
    encoded = coder.encode(x)
    code = torch.zeros(len(x), coder.num_latents)
    code.scatter_(1, encoded.top_indices, encoded.top_acts)
    return code, coder(x).sae_out


def saelens(folder: Path, x: torch.Tensor) -> Tensors:
    """By `SAE.load_from_disk`, on the hub `SAE.from_pretrained`; `encode` and `forward`."""
    from sae_lens import SAE

    if folder.parts[0] == ON_HUB:
        coder: Any = SAE.from_pretrained("/".join(folder.parts[:2]), folder.name)
    else:
        coder = SAE.load_from_disk(str(folder))
    return coder.encode(x), coder(x)


def dictionary_learning(folder: Path, x: torch.Tensor) -> Tensors:
    """By `load_dictionary`, `encode` and `forward`."""
    from dictionary_learning.utils import load_dictionary

    coder: Any = load_dictionary(str(folder), device="cpu")[0]
    return coder.encode(x), coder(x)


def circuit_tracer(folder: Path, x: torch.Tensor) -> Tensors:
    """By the loader of one layer, `encode` and `decode`."""
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    paths = {0: str(folder / "layer_0.safetensors")}
    coder: Any = load_transcoder_set(paths, "bsc", "mlp.hook_in", "mlp.hook_out")[0]
    code = coder.encode(x)
    return code, coder.decode(code, x)


READERS: dict[str, Callable[[Path, torch.Tensor], Tensors]] = {
    "sparsify": sparsify, "saelens": saelens, "dictionary-learning": dictionary_learning,
    "circuit-tracer": circuit_tracer,
}  # fmt: skip


WIDTH, LATENTS, K = 24, 96, 6


def randomised(coder: Any) -> Any:
    """The same coder with random parameters, of which most latents are off at most rows."""
    with torch.no_grad():
        for name, parameter in coder.named_parameters():
            parameter.copy_(torch.randn(parameter.shape))
            if name in ("encoder.bias", "b_enc"):
                parameter.sub_(8.0)
            if "threshold" in name:
                parameter.abs_()
    return coder


def write_sparsify(folder: Path) -> None:
    """By `SparseCoder.save_to_disk`."""
    from sparsify import SparseCoder, SparseCoderConfig

    kinds: dict[str, dict[str, Any]] = {
        "sae": {}, "groupmax": {"activation": "groupmax"}, "transcoder": {"transcode": True},
        "skip": {"transcode": True, "skip_connection": True},
    }  # fmt: skip
    for name, fields in kinds.items():
        config = SparseCoderConfig(num_latents=LATENTS, k=K, **fields)
        randomised(SparseCoder(WIDTH, config)).save_to_disk(folder / f"sparsify-{name}")


def write_saelens(folder: Path) -> None:
    """By `save_model`."""
    from sae_lens.registry import SAE_CLASS_REGISTRY

    kinds: dict[str, dict[str, Any]] = {
        "topk": {"k": K, "rescale_acts_by_decoder_norm": False},
        "topk rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
        "standard": {}, "standard uncentred": {"apply_b_dec_to_input": False}, "jumprelu": {},
        "transcoder": {"d_out": WIDTH}, "skip_transcoder": {"d_out": WIDTH},
        "jumprelu_transcoder": {"d_out": WIDTH}, "jumprelu_skip_transcoder": {"d_out": WIDTH},
    }  # fmt: skip
    for name, fields in kinds.items():
        kind, config = SAE_CLASS_REGISTRY[name.partition(" ")[0]]
        if "transcoder" in name:
            fields["apply_b_dec_to_input"] = False
        coder = kind(config(d_in=WIDTH, d_sae=LATENTS, **fields))
        randomised(coder).save_model(str(folder / f"saelens-{name.replace(' ', '_')}"))


def write_dictionary_learning(folder: Path) -> None:
    """As its trainSAE does: the state dict, and the trainer's config."""
    from dictionary_learning.trainers import StandardTrainer, TopKTrainer
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    fields = {"steps": 9000, "activation_dim": WIDTH, "dict_size": LATENTS, "layer": 3,
              "lm_name": "bsc", "device": "cpu"}  # fmt: skip
    for name, trainer in {
        "topk": TopKTrainer(k=K, **fields), "batch": BatchTopKTrainer(k=K, **fields),
        "relu": StandardTrainer(**fields),
    }.items():  # fmt: skip
        into = folder / f"dictionary-learning-{name}"
        into.mkdir()
        coder = randomised(trainer.ae)
        if name == "batch":
            coder.threshold.fill_(0.5)
        torch.save(coder.state_dict(), into / "ae.pt")
        (into / "config.json").write_text(json.dumps({"trainer": trainer.config, "buffer": {}}))


def write_circuit_tracer(folder: Path) -> None:
    """By `to_safetensors`, with the config.yaml that its loader reads."""
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder

    for name, skip in (("jumprelu", False), ("jumprelu-skip", True)):
        into = folder / f"circuit-tracer-{name}"
        into.mkdir()
        coder = SingleLayerTranscoder(
            WIDTH, LATENTS, JumpReLU(torch.zeros(LATENTS), 0.1), 0, skip_connection=skip,
            dtype=torch.float32,
        )  # fmt: skip
        randomised(coder).to_safetensors(str(into / "layer_0.safetensors"))
        (into / "config.yaml").write_text(
            "model_kind: transcoder_set\nmodel_name: bsc\nscan: bsc\n"
            "feature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n"
        )


WRITERS = (write_sparsify, write_saelens, write_dictionary_learning, write_circuit_tracer)


def owners(format_: str, case: str) -> tuple[str, ...]:
    """Whose repositories have a case; circuit-tracer 0.5.0 cannot be imported with the hub's client
    of today."""
    if format_ == "sparsify":
        return (ON_HUB, ALONE) if case == "sparsify_sae_top-k" else (ON_HUB,)
    return (ON_HUB,) if format_ == "saelens" else ()


def main(folder: Path) -> None:
    """Every case by its own reader; a failure is written down."""
    wandb = types.ModuleType("wandb")  # which SAELens imports for training
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    sys.modules.setdefault("wandb", wandb)
    torch.manual_seed(0)
    x = load_file(folder / "rows.safetensors")["x"]
    cases, failed = json.loads((folder / "cases.json").read_text()), {}
    for write in WRITERS:
        try:
            write(folder)
        except Exception:
            failed[write.__name__] = traceback.format_exc()[-1500:]
    own = {
        p.name: next(f for f in READERS if p.name.startswith(f))
        for p in sorted(folder.iterdir()) if p.is_dir() and p.name not in cases
    }  # fmt: skip
    (folder / "written.json").write_text(json.dumps(own))
    for case, format_ in (cases | own).items():
        try:
            with torch.no_grad():
                code, y = READERS[format_](folder / case, x)
                for owner in owners(format_, case) if case in cases else ():
                    on_hub = READERS[format_](Path(owner) / "coders" / case, x)
                    assert torch.equal(code, on_hub[0]) and torch.equal(y, on_hub[1])
            save_file({"code": code.contiguous(), "y": y.contiguous()},
                      folder / f"found-{case}.safetensors")  # fmt: skip
        except Exception:
            failed[case] = traceback.format_exc()[-1500:]
    (folder / "failed.json").write_text(json.dumps(failed))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
