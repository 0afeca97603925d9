"""Cache the outputs of a module with SAELens' own cacher, and time it; run by bench_cachers.py.

Needs its own environment: `pip install torch==2.13.0`, then `pip install sae-lens==6.54.12` with
that torch pinned. `CacheActivationsRunner` with `model_class_name="AutoModelForCausalLM"` is the
way that SAELens' docs give for a model that TransformerLens does not have; nothing is patched.
Imports, model and dataset are loaded first; the seconds are those of `runner.run()`. The buffer is
sized so that the run is a whole number of shards, since SAELens writes whole shards only. The dtype
on disk is float32, because the Arrow format has no bfloat16.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def main() -> None:
    """Run the cacher once and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="jsonl with a column called text")
    parser.add_argument("--hook", required=True, help="layers.3.mlp")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--batch-tokens", type=int, required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    import datasets
    import sae_lens
    import torch
    from transformers import AutoConfig

    width = AutoConfig.from_pretrained(args.model).hidden_size
    lines = Path(args.text).read_text().splitlines()
    documents = datasets.Dataset.from_dict({"text": [json.loads(line)["text"] for line in lines]})
    contexts = args.batch_tokens // args.context
    batch = contexts * args.context
    batches = math.ceil(args.tokens / batch)
    config = sae_lens.CacheActivationsRunnerConfig(
        dataset_path=args.text,  # a label: the dataset itself is handed to the runner
        model_name=args.model,
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": "auto"},
        model_batch_size=contexts,
        hook_name=f"model.{args.hook}",
        d_in=width,
        training_tokens=batches * batch,
        context_size=args.context,
        new_cached_activations_path=args.out,
        shuffle=False,  # what is on disk is in order with either setting
        dtype="float32",
        device="cpu",
        buffer_size_gb=(batches + 0.5) * batch * width * 4 / 1e9,
        prepend_bos=True,
        streaming=False,
    )
    runner = sae_lens.CacheActivationsRunner(config, override_dataset=documents)
    started = time.perf_counter()
    runner.run()
    seconds = time.perf_counter() - started
    stored = datasets.load_from_disk(args.out)
    size = sum(p.stat().st_size for p in Path(args.out).rglob("*") if p.is_file())
    rows = len(stored) * args.context
    facts = {"tool": f"SAELens {sae_lens.__version__}", "rows": rows, "sides": 1, "bytes": size,
             "seconds": seconds, "threads": torch.get_num_threads()}  # fmt: skip
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
