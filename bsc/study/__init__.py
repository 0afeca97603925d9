"""Studies: a file of steps and claims, run as a graph of commands to a page of verdicts."""
