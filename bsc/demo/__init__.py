"""The embedded model, its text, the recipe that made it, and the demo that shows the whole chain."""
