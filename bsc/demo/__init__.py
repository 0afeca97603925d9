"""The demo: the whole chain on the embedded model."""
