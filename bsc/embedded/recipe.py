"""How the embedded model was made: `python -m bsc.embedded.recipe` (`just demo-model`) makes it again.

Tokenizer (byte-level BPE), model (Llama architecture, SmolLM2's shape scaled down) and the card
with its figures, trained on the `env` corpus less its held-out files (bsc/embedded/held_out.py) and written
to bsc/embedded/model. The figures of the card are measured by this program in the run that made the
weights: held-out loss of the model and of an interpolated 5-gram model on the same tokens.

Loss is in nats per token, every token of the held-out files predicted once, in windows of the
model's context; bits per byte = nats per token * tokens / (bytes * ln 2), comparable across
tokenizers. Needs torch 2.9 or later, for its Muon.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bsc.embedded.corpus import ENV_PACKAGES, Document, documents
from bsc.embedded.held_out import is_held_out
from bsc.embedded.ngram import InterpolatedNgram

Tokens = NDArray[np.uint16]

VOCAB = 4096
CONTEXT = 256
END = "<|endoftext|>"
END_ID = 0
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 512,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": END_ID,
    "eos_token_id": END_ID,
}
BATCH = 32
LR_MUON = 6e-3
LR_ADAM = 3e-3
WARMUP_STEPS = 100


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE with single digits, the scheme of SmolLM2's tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, docs: list[Document]) -> Tokens:
    """All documents as one row of token ids, an end-of-text token before each."""
    pieces = []
    for start in range(0, len(docs), 256):
        encoded = tokenizer.encode_batch([d.text for d in docs[start : start + 256]])
        pieces += [np.array([END_ID, *e.ids], dtype=np.uint16) for e in encoded]
    return np.concatenate(pieces)


def learning_rate_scale(step: int, steps: int) -> float:
    """Linear warm-up, flat, then linear to zero over the last half of training."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, 2 * (steps - step) / steps)


def train(
    tokens: Tokens, steps: int, *, seed: int, log: Path, checkpoint: Path | None = None
) -> tuple[LlamaForCausalLM, float]:
    """Train on random order windows, each token once per pass. Returns the model and seconds."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE))
    torch.nn.Module.to(model, device)  # the method of transformers hides the signature
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=LR_MUON, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LR_ADAM, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    peaks = [LR_MUON, LR_ADAM]
    rng = np.random.default_rng(seed)
    windows = (len(tokens) - 1) // CONTEXT
    order = np.concatenate(
        [rng.permutation(windows) for _ in range(math.ceil(steps * BATCH / windows))]
    )

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1), ids[:, 1:].flatten()
        )

    # The loss is inside the compiled graph: its softmax is fused there (2 cores, torch 2.13:
    # forward and backward 0.86 s against 0.93 to 1.00 with the loss apart).
    compiled_loss = torch.compile(loss_of)
    started = time.perf_counter()
    with log.open("w") as lines:
        for step in range(steps):
            starts = order[step * BATCH : (step + 1) * BATCH] * CONTEXT
            batch = np.stack([tokens[s : s + CONTEXT + 1] for s in starts]).astype(np.int64)
            ids = torch.from_numpy(batch).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = compiled_loss(ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimiser, peak in zip(optimisers, peaks, strict=True):
                for group in optimiser.param_groups:
                    group["lr"] = peak * learning_rate_scale(step, steps)
                optimiser.step()
                optimiser.zero_grad()
            if step % 20 == 0 or step == steps - 1:
                seconds = time.perf_counter() - started
                record = {
                    "step": step,
                    "loss": round(loss.item(), 4),
                    "tokens": (step + 1) * BATCH * CONTEXT,
                    "seconds": round(seconds, 1),
                }
                print(json.dumps(record), file=lines, flush=True)
            if checkpoint is not None and step % 1000 == 999:
                save_model(model, checkpoint)
    return model, time.perf_counter() - started


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Weights as bf16 safetensors and config.json."""
    stored = torch.nn.Module.to(copy.deepcopy(model), "cpu", torch.bfloat16)
    stored.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


@torch.inference_mode()
def held_out_nats(model: LlamaForCausalLM, tokens: Tokens) -> float:
    """Summed loss in nats of every token but the first, in windows that overlap by half.

    Each window predicts its second half with at least half a context before it (the first window
    predicts all of itself), so that the figure is the model's and not the window borders'.
    """
    model.eval()
    half = CONTEXT // 2
    total = 0.0
    starts = list(range(0, max(len(tokens) - half, 1), half))
    for i in range(0, len(starts), 64):
        rows = [tokens[s : s + CONTEXT].astype(np.int64) for s in starts[i : i + 64]]
        for length in sorted({len(r) for r in rows}):
            ids = torch.from_numpy(np.stack([r for r in rows if len(r) == length]))
            ids = ids.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            nats = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), ids[:, 1:], reduction="none"
            )
            total += float(nats[:, half - 1 :].double().sum())
            if i == 0 and length == len(rows[0]):
                total += float(nats[0, : half - 1].double().sum())
    return total


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json as transformers loads them."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# The embedded model of bsc

A language model of {parameters:,} parameters in the Llama architecture, SmolLM2's shape scaled
down: width {hidden_size}, {num_hidden_layers} layers, {num_attention_heads} heads with
{num_key_value_heads} key-value head, MLP {intermediate_size}, byte-level BPE vocabulary
{vocab_size}, context {max_position_embeddings}, tied embeddings, bf16. It exists so that the demo,
the tests and the examples of bsc run on a real trained model without a download. It writes
plausible Python and nothing else.

| | |
|---|---|
| Text | `env` corpus: Python {python} standard library and the sources of {packages} |
| Training tokens seen | {tokens_seen:,} ({passes:.2f} passes over {train_tokens:,}) |
| Held out | {held_out_files:,} whole files (5 % by a hash of the name), {held_out_bytes:,} bytes, {held_out_tokens:,} tokens, never trained on |
| Time and hardware | {minutes:.0f} minutes on {hardware}, torch {torch}, bf16 autocast |
| Optimiser | Muon {lr_muon} for matrices, AdamW {lr_adam} for the rest; warm-up {warmup}, then linear decay from half way; batch {batch} x {max_position_embeddings} |

| held-out text | model: nats per token | model: bits per byte | 5-gram: nats per token | 5-gram: bits per byte |
|---|---|---|---|---|
{rows}

The 5-gram model is interpolated Kneser-Ney (bsc/embedded/ngram.py) with counts from the same training
tokens. The figures are of the stored bf16 weights, run in fp32. `stdlib` is the part of
the held-out files that the `stdlib` corpus has.

`python -m bsc.embedded.recipe` makes it again. Another installation has other versions of the
packages, so another text: expect figures that are near these, not equal.
"""


def main() -> None:
    """Make tokenizer, model and card; keep intermediate files under --work."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--work", type=Path, default=Path("build/demo-model"))
    parser.add_argument("--tokens", type=int, default=41_000_000, help="tokens to train on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    docs = list(documents("env"))
    kept = [d for d in docs if not is_held_out(d.name)]
    held = [d for d in docs if is_held_out(d.name)]
    in_stdlib = {d.name for d in documents("stdlib")}
    splits = {"env": held, "stdlib": [d for d in held if d.name in in_stdlib]}

    tokenizer = train_tokenizer(d.text for d in kept[::4])
    write_tokenizer(tokenizer, args.out)
    train_tokens = encode(tokenizer, kept)
    held_tokens = {name: encode(tokenizer, part) for name, part in splits.items()}
    steps = math.ceil(args.tokens / (BATCH * CONTEXT))
    print(f"{len(train_tokens):,} training tokens, {steps:,} steps", flush=True)

    ngram = InterpolatedNgram(train_tokens, order=5, vocab=VOCAB)
    ngram_nats = {name: ngram.nats(part) for name, part in held_tokens.items()}
    del ngram
    print({k: v / (len(held_tokens[k]) - 1) for k, v in ngram_nats.items()}, flush=True)

    model, seconds = train(
        train_tokens, steps, seed=args.seed, log=args.work / "log.jsonl", checkpoint=args.work
    )
    save_model(model, args.out)
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)

    rows = []
    for name, part in held_tokens.items():
        n_bytes = sum(len(d.text.encode()) for d in splits[name])
        predicted = len(part) - 1
        cells = [f"`{name}`"]
        for nats in (held_out_nats(model, part), ngram_nats[name]):
            cells += [f"{nats / predicted:.3f}", f"{nats / (n_bytes * math.log(2)):.3f}"]
        rows.append(f"| {' | '.join(cells)} |")
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    card = CARD.format(
        **ARCHITECTURE,
        parameters=sum(p.numel() for p in model.parameters()),
        python=platform.python_version(),
        packages=", ".join(ENV_PACKAGES),
        tokens_seen=steps * BATCH * CONTEXT,
        train_tokens=len(train_tokens),
        passes=steps * BATCH * CONTEXT / len(train_tokens),
        held_out_files=len(held),
        held_out_bytes=sum(len(d.text.encode()) for d in held),
        held_out_tokens=len(held_tokens["env"]),
        minutes=seconds / 60,
        hardware=torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} cores of {cpu}",
        torch=torch.__version__,
        lr_muon=LR_MUON,
        lr_adam=LR_ADAM,
        warmup=WARMUP_STEPS,
        batch=BATCH,
        rows="\n".join(rows),
    )
    (args.out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
