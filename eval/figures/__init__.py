"""Figures from the sums, codes and losses of the passes."""
