"""Stage 1: text -> model -> activations -> store."""
