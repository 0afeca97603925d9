"""The README that lies in every store: how to open it without bsc."""

from __future__ import annotations

from bsc.cache.store.kinds import Codec

__all__ = ["store_readme"]

_HEAD = """\
# Activation store

Inputs and outputs of modules of a language model, one row per token{stored}. `data.zarr` is a
Zarr v3 group; `provenance.json` says which model, text and settings made it; `manifest` has size,
hashes and channel sums of every shard. Row i of every array of a split is the same token. The
training rows lie at the root of `data.zarr`, shuffled; the rows of held-out documents lie in the
group `held_out`, in order.

Run the snippets in this folder; `{name}` is its first hookpoint.

tensorstore (knows bfloat16):

```python
import os, tensorstore as ts
path = f"file://{{os.getcwd()}}/data.zarr/{name}/input/"
a = ts.open({{"driver": "zarr3", "kvstore": path}}).result()
rows = a[:500].read().result()
```

zarr-python (3.1 and later; the import registers bfloat16):

```python
import zarr, bsc.cache.store.zarr_bfloat16
rows = zarr.open_group("data.zarr", mode="r")["{name}/input"][:500]
```

xarray:

```python
import xarray as xr, bsc.cache.store.zarr_bfloat16
hook = xr.open_zarr("data.zarr", group="{name}", consolidated=False, chunks=None)
rows = hook["input"][:500].values
```
"""

_RAW = """
torch, one shard mapped without a copy (S and d are in the array's zarr.json):

```python
import json, torch
meta = json.load(open("data.zarr/{name}/input/zarr.json"))
S, d = meta["chunk_grid"]["configuration"]["chunk_shape"]
shard = "data.zarr/{name}/input/c/0/0"
rows = torch.from_file(shard, size=S * d, dtype=torch.bfloat16).view(S, d)
```

numpy alone (bfloat16 is the upper half of a float32):

```python
import numpy as np
bits = np.fromfile(shard, "<u2", S * d).reshape(S, d)
rows = (bits.astype("<u4") << 16).view("<f4")
```
"""

_INT8 = """
These are whole numbers. A row is `input[i] * input_row_scale[i] * channel_scale`, and
`channel_scale` stands in the attributes of `input`:

```python
import json, numpy as np, zarr
hook = zarr.open_group("data.zarr", mode="r")["{name}"]
channel_scale = np.array(hook["input"].attrs["channel_scale"], "<f4")
rows = hook["input"][:500] * hook["input_row_scale"][:500][:, None] * channel_scale
```
"""

_STORED = {
    "raw": ", in bfloat16",
    "lz4": ", in bfloat16, compressed without loss",
    "int8": ", in int8 with a scale for each row and each channel",
}


def store_readme(codec: Codec, hookpoint: str) -> str:
    """The text for a store of this codec, with the name of its first hookpoint."""
    tail = {"raw": _RAW, "lz4": "", "int8": _INT8}[codec]
    return (_HEAD + tail).format(name=hookpoint, stored=_STORED[codec])
