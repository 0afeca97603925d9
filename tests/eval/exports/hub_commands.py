"""Runs commands that come as lines of JSON, each as `bsc` would; started by test_hub.py."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback

from bsc.cli import main


def run(arguments: list[str]) -> int:
    """The exit code; `load` is no command of bsc, but prints a coder that it loads."""
    try:
        if arguments[0] == "load":
            from bsc.errors import UserError
            from bsc.train.coders.coder import SparseCoder

            try:
                print(SparseCoder.load(arguments[1]))
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            return 0
        main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    return 1


def answer(line: str) -> str:
    asked = json.loads(line)
    os.chdir(asked["folder"])
    os.environ["HF_TOKEN"] = asked["token"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(asked["arguments"])
    return json.dumps([code, out.getvalue(), err.getvalue()])


if __name__ == "__main__":
    for line in sys.stdin:
        print(answer(line), flush=True)
