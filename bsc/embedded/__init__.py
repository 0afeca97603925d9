"""The embedded model, the texts on every machine, and the recipe that made it from them."""
