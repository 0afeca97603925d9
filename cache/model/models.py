"""Finding and loading a language model: the embedded one, a local folder, or the hub.

Weights come from safetensors alone and no code of a model repository is run.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

import bsc.embedded
from bsc.cache.model.kinds import base_of, class_of, longest_context, missing_parameters
from bsc.devices import multiplies_bfloat16, sum_in_float32
from bsc.errors import UserError, nearest
from bsc.hub import hub_address, hub_answers

__all__ = [
    "SHORT_NAMES",
    "LanguageModel",
    "load_architecture",
    "load_model",
    "load_tokenizer",
    "resolve_model",
]

SHORT_NAMES = {
    "SmolLM2-135M": "HuggingFaceTB/SmolLM2-135M",
    "SmolLM2-360M": "HuggingFaceTB/SmolLM2-360M",
    "SmolLM2-1.7B": "HuggingFaceTB/SmolLM2-1.7B",
}
EMBEDDED = "demo"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model with its tokenizer and what identifies it."""

    name: str
    """``"demo"``, the id on the hub, or the path of the folder."""
    revision: str | None
    """Commit on the hub; None for a folder."""
    weights_sha256: str | None
    """SHA-256 of the safetensors files of a local folder, in the order of their names; of random
    weights, of the base model's tensors."""
    model: Any
    """The transformers model, on its device, in evaluation mode."""
    tokenizer: Any
    random_weights: int | None = None
    """Seed of random weights in the place of the trained ones."""

    @property
    def base(self) -> torch.nn.Module:
        """The model without its head; hookpoints are named relative to it."""
        return base_of(self.model)

    @property
    def context(self) -> int:
        """Longest context of the model, in tokens."""
        return longest_context(self.base, self.model.config)

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def identity(self) -> dict[str, Any]:
        """What to record about the model beside anything that was made with it."""
        random = {} if self.random_weights is None else {"random_weights": self.random_weights}
        return random | {
            "name": self.name,
            "revision": self.revision,
            "weights_sha256": self.weights_sha256,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "architecture": type(self.model).__name__,
            "special_token_ids": sorted(self.tokenizer.all_special_ids),
        }


def resolve_model(name: str) -> str:
    """The folder or hub id that a name on the command line stands for.

    Args:
        name: ``"demo"``, a short name such as ``"SmolLM2-135M"``, a folder, or a hub id.

    Raises:
        UserError: it can be none of these.
    """
    if name == EMBEDDED:
        return str(Path(bsc.embedded.__path__[0]) / "model")
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(
                f"--model {name}: this folder has no config.json, so it is not a model that "
                f"transformers saved."
            )
        return str(path.resolve())
    known = [EMBEDDED, *SHORT_NAMES]
    if path.is_file():
        raise UserError(
            f"--model {name}: a file. A model is a folder that save_pretrained wrote, an id on the "
            f"hub (owner/name), or one of {', '.join(known)}."
        )
    if path.is_absolute() or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        raise UserError(
            f"--model {name}: no such folder{nearest(name, known)}. Give a folder, an id on the "
            f"hub (owner/name), or one of {', '.join(known)}."
        )
    return name


def _weights_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _hub_options() -> dict[str, Any]:
    """What makes transformers take what was downloaded before, where the hub cannot be reached."""
    return {} if hub_answers() else {"local_files_only": True}


def _unreachable(name: str, source: str) -> UserError:
    return UserError(
        f"--model {name}: {source} was not downloaded before, and the hub ({hub_address()}) cannot "
        f"be reached. What works offline: --model {EMBEDDED}, a folder that save_pretrained wrote, "
        f"or a model in the local cache."
    )


def _commit(source: str, revision: str | None) -> str | None:
    """The commit on the hub that a revision means now, or in the local cache when offline.

    Everything is then loaded from that one commit, and recorded under it.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    path = cached_file(source, "config.json", revision=revision, **_hub_options())
    return extract_commit_hash(path, None) or revision


_CHECK_THE_HUB = (
    "Check the name and the network, or give a local folder; HF_HUB_OFFLINE=1 uses what was "
    "downloaded before."
)


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    with_head: bool = False,
    random_weights: int | None = None,
) -> LanguageModel:
    """Load a model and its tokenizer.

    Args:
        name: see `resolve_model`.
        revision: branch, tag or commit on the hub.
        dtype: ``"auto"`` (that of the checkpoint, but float32 for bfloat16 on a CPU that has no
            instructions for it), ``"float32"``, ``"bfloat16"``, ``"float16"``.
        device: where to put it.
        with_head: with the language model head (to measure its loss), or the base model alone.
        random_weights: seed of weights drawn as before training, in the place of the trained ones:
            a control for what is said about a trained model.

    Raises:
        UserError: there is no such model, no network, or it cannot be loaded safely.
    """
    import transformers
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    source = resolve_model(name)
    local = Path(source) if Path(source).is_dir() else None
    if random_weights is None and local is not None and not list(local.glob("*.safetensors")):
        raise UserError(
            f"--model {name}: the folder has no *.safetensors weights. bsc loads no pickled "
            f"weights; save the model again with `save_pretrained`, which writes safetensors."
        )
    missing: list[str] = []
    try:
        if local is None:
            revision = _commit(source, revision)
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        options |= {} if local else _hub_options()
        config = transformers.AutoConfig.from_pretrained(source, **options)
        kind = class_of(name, config, with_head=with_head)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        with _quiet_loading():
            if random_weights is None:
                model, missing = _trained(kind, source, config, dtype, device, options)
            else:
                model = _untrained(name, config, dtype, random_weights, device)
    except GatedRepoError:
        raise UserError(
            f"--model {name}: {source} is gated on the hub. Accept its terms there and log in "
            f"with `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"--model {name}: the hub has no model {source}{nearest(name, SHORT_NAMES)}. Give a "
            f"folder, an id on the hub (owner/name), or one of "
            f"{', '.join([EMBEDDED, *SHORT_NAMES])}."
        ) from None
    # What a damaged file, a wrong shape or a missing tokenizer back end raises.
    except (
        OSError, HfHubHTTPError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError,
    ) as error:  # fmt: skip
        if local is None and not hub_answers():
            raise _unreachable(name, source) from error
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        hint = "Check the folder." if local else _CHECK_THE_HUB
        raise UserError(
            f"--model {name}: {source} cannot be loaded: {first_line} {hint}"
        ) from error
    if missing:
        raise UserError(
            f"--model {name}: the weights of {source} lack {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, which transformers "
            f"would fill with random numbers. Take the weights from where they are whole"
            f"{', with the head that predicts tokens' if with_head else ''}."
        )
    # Never to another dtype: what a model keeps in float32, such as the frequencies of rotary
    # positions, would be rounded, and what was rounded when it was made would stay so.
    torch.nn.Module.to(model, device).eval().requires_grad_(False)
    sum_in_float32()
    sha256 = _weights_hash(local) if local else None
    return LanguageModel(
        name=name if name == EMBEDDED else source,
        revision=None if local else revision,
        weights_sha256=sha256 if random_weights is None else _tensors_hash(model.base_model),
        model=model,
        tokenizer=tokenizer,
        random_weights=random_weights,
    )


def _automatic(dtype: torch.dtype, device: str | torch.device) -> torch.dtype:
    """The type that arithmetic is done in where the user leaves it open."""
    slow = dtype == torch.bfloat16 and not multiplies_bfloat16(torch.device(device))
    return torch.float32 if slow else dtype


def _trained(
    kind: Any, source: str, config: Any, dtype: str, device: str | torch.device,
    options: dict[str, Any],
) -> tuple[Any, list[str]]:  # fmt: skip
    """A model with its weights, made in the type that it is to compute in; parameters they lack."""
    wanted: str | torch.dtype = dtype
    if dtype == "auto" and isinstance(config.dtype, torch.dtype):
        wanted = _automatic(config.dtype, device)
    options = options | {"use_safetensors": True, "output_loading_info": True}
    model, loading = kind.from_pretrained(source, dtype=wanted, **options)
    if wanted == "auto" and model.dtype != (of_weights := _automatic(model.dtype, device)):
        model, loading = kind.from_pretrained(source, dtype=of_weights, **options)
    return model, missing_parameters(model, loading["missing_keys"])


def _untrained(name: str, config: Any, dtype: str, seed: int, device: str | torch.device) -> Any:
    """A model of the same config with weights as they are before training.

    Always with its head, so that the same seed gives the same weights with and without it.
    """
    kind = class_of(name, config, with_head=True)
    chosen = _automatic(config.dtype or torch.float32, device)
    if dtype != "auto":
        chosen = getattr(torch, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind.from_config(config, dtype=chosen, trust_remote_code=False)


def _tensors_hash(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a model alone.

    Raises:
        UserError: there is no such model, or its tokenizer cannot be loaded.
    """
    import transformers

    source = resolve_model(name)
    options = {} if Path(source).is_dir() else _hub_options()
    try:
        return transformers.AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "local_files_only" in options:
            raise _unreachable(name, source) from error
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(
            f"--model {name}: the tokenizer of {source} cannot be loaded: {first_line}"
        ) from error


def load_architecture(name: str, *, revision: str | None = None) -> tuple[torch.nn.Module, int]:
    """The base model without weights, for its module names and widths, and its longest context.

    Raises:
        UserError: there is no such model, or its config cannot be read.
    """
    import transformers

    source = resolve_model(name)
    options = {} if Path(source).is_dir() else _hub_options()
    try:
        config = transformers.AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=False, **options
        )
        kind = class_of(name, config, with_head=False)
        with torch.device("meta"):
            # Without weights some modules, such as a mixture of experts, know shapes in it alone.
            model = kind.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "local_files_only" in options:
            raise _unreachable(name, source) from error
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(
            f"--model {name}: the config of {source} cannot be read: {first_line}"
        ) from error
    base = model.base_model.eval()
    return base, longest_context(base, config)


class _quiet_loading:
    """transformers reports weights that the base model leaves out: here that is the LM head."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._before = logging.get_verbosity()
        self._bar = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._before)
        if self._bar:
            logging.enable_progress_bar()
