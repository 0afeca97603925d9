"""The embedded model, its text, the recipe that made it, and the demo of the whole chain."""
