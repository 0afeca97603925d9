"""The activation store: its format, and reading it in every way."""
