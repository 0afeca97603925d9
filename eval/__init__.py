"""Stage 3: coders -> figures -> report."""
