"""Stage 2: store -> trained coders."""
