"""`python -m bsc` is `bsc`."""

from bsc.cli import main

main()
