"""Stage 1, writing: rows of a model into a store, window by window, killed and gone on with."""
