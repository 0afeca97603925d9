"""Stage 1, the model and the text that it runs over: tokens in, rows of hookpoints out."""
