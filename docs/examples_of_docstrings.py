"""For the site: examples of docstrings as such, which stand there without a heading."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object


class ExamplesOfDocstrings(Extension):
    """Puts a heading over the first line of an example, which the style of Google asks for."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Change the docstring of a class, a function or a module before it is read."""
        if obj.docstring is None or ">>> " not in obj.docstring.value:
            return
        lines = obj.docstring.value.splitlines()
        first = next((i for i, line in enumerate(lines) if line.startswith(">>> ")), None)
        if first is None:
            return
        after = [i for i in range(first, len(lines)) if lines[i].endswith(":") and i > first]
        end = after[0] if after else len(lines)
        example = [f"    {line}".rstrip() for line in lines[first:end]]
        obj.docstring.value = "\n".join([*lines[:first], "Examples:", *example, *lines[end:]])
