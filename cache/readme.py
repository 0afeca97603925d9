"""The README that lies in every store: how to open it without bsc."""

__all__ = ["STORE_README"]

STORE_README = """\
# Activation store

Inputs and outputs of modules of a language model, one row per token, in bfloat16. `data.zarr` is a
Zarr v3 group; `provenance.json` says which model, text and settings made it; `manifest.jsonl` has
size, hashes and channel sums of every shard. Row i of every array of a split is the same token.
The training rows lie at the root of `data.zarr`, shuffled; the rows of held-out documents lie in
the group `held_out`, in order.

Run the snippets in this folder, with the name of one of your arrays.

tensorstore (knows bfloat16):

```python
import os, tensorstore as ts
path = f"file://{os.getcwd()}/data.zarr/layers.3.mlp/input/"
a = ts.open({"driver": "zarr3", "kvstore": path}).result()
rows = a[:1000].read().result()
```

zarr-python (3.1 and later; the import registers bfloat16):

```python
import zarr, bsc.cache.zarr_bfloat16
rows = zarr.open_group("data.zarr", mode="r")["layers.3.mlp/input"][:1000]
```

torch, one shard mapped without a copy (S and d are in the array's zarr.json):

```python
import json, torch
meta = json.load(open("data.zarr/layers.3.mlp/input/zarr.json"))
S, d = meta["chunk_grid"]["configuration"]["chunk_shape"]
shard = "data.zarr/layers.3.mlp/input/c/0/0"
rows = torch.from_file(shard, size=S * d, dtype=torch.bfloat16).view(S, d)
```

numpy alone (bfloat16 is the upper half of a float32):

```python
import numpy as np
bits = np.fromfile(shard, "<u2", S * d).reshape(S, d)
rows = (bits.astype("<u4") << 16).view("<f4")
```
"""
