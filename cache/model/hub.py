"""Whether the Hugging Face hub can be reached, found out in seconds.

Its clients try again for half a minute and more, and print each attempt; without a network one
question beforehand saves that.
"""

from __future__ import annotations

import threading
from functools import cache

__all__ = ["hub_address", "hub_answers"]

_SECONDS = 6.0
"""For one request, and for finding the address of the host, which has no timeout of its own."""


def hub_address() -> str:
    """Where the hub is: HF_ENDPOINT, or huggingface.co."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


@cache
def hub_answers() -> bool:
    """Whether there is any answer from the hub; no, where HF_HUB_OFFLINE says not to ask."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answers = []

    def ask() -> None:
        try:
            httpx.head(hub_address(), timeout=_SECONDS)
            answers.append(True)
        except (httpx.HTTPError, httpx.InvalidURL, OSError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SECONDS + 1)
    return bool(answers)
