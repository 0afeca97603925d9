"""Judges for tests: one that speaks the real wire format and misbehaves on demand, and the answers
of judges whose scores are known beforehand. None of them is a language model."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from bsc.eval.interp.judges.facts import JudgeFacts
from bsc.eval.interp.judges.judge import Judge
from bsc.eval.interp.judges.prompts import CANARY, SYSTEM, Request
from bsc.eval.interp.judges.reply import Reply

Answer = Callable[[str, list[dict[str, str]]], str]
"""Reply to messages, given what kind of question they are."""


def kind_of(messages: list[dict[str, str]]) -> str:
    """Which of the prompts it is."""
    system = messages[0]["content"]
    return next(k for k, text in SYSTEM.items() if text[-80:] == system[-80:] and
                text.split("OPEN")[0][:150] == system[:150][: len(text.split("OPEN")[0][:150])]
                and ("OPEN" in text) == (" stand between " in system))  # fmt: skip


def excerpts_of(messages: list[dict[str, str]]) -> list[str]:
    """The excerpts of a prompt, as text."""
    lines = messages[1]["content"].split("\n")
    below = lines[lines.index("Excerpts:") + 1 :]
    return [json.loads(re.sub(r"^\d+: ", "", line)) for line in below]


def explanation_of(messages: list[dict[str, str]]) -> str:
    first = messages[1]["content"].split("\n")[0]
    return str(json.loads(first.removeprefix("Explanation: ")))


def marked(excerpt: str) -> list[str]:
    """The words that stand between the marks."""
    return [w for run in re.findall(r"<<(.*?)>>", excerpt, re.S) for w in run.split()]


def uniform(*parts: Any) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") / 2**64


def answer_canary(messages: list[dict[str, str]]) -> str | None:
    same = messages == list(CANARY.messages)
    return json.dumps({"1": 1, "2": 0, "3": 1, "4": 0}) if same else None


def always_yes(kind: str, messages: list[dict[str, str]]) -> str:
    if kind == "explain":
        return json.dumps({"explanation": "everything"})
    if kind == "intruder":
        return json.dumps({"intruder": 1})
    return json.dumps({str(i): 1 for i, _ in enumerate(excerpts_of(messages), 1)})


def rule(kind: str, messages: list[dict[str, str]]) -> str:
    """Explains by the words that are marked most, and answers by whether one of them is there."""
    excerpts = excerpts_of(messages)
    if kind == "explain":
        seen = Counter(w for e in excerpts for w in set(marked(e)))
        best = [w for w, n in seen.most_common(4) if n > len(excerpts) / 8 and w]
        return json.dumps({"explanation": "fires on: " + ", ".join(best)})
    if kind == "intruder":
        common = Counter(w for e in excerpts for w in set(marked(e)))
        shares = [sum(common[w] for w in set(marked(e))) for e in excerpts]
        return json.dumps({"intruder": 1 + shares.index(min(shares))})
    said = explanation_of(messages)
    words = {w for w in said.removeprefix("fires on: ").split(", ") if w} if ":" in said else set()
    answers = {}
    for i, e in enumerate(excerpts, 1):
        found = marked(e) if kind == "fuzzing" else re.findall(r"\w+|\S", e)
        answers[str(i)] = int(any(w in words for w in found))
    return json.dumps(answers)


class Direct:
    """A judge that is called as a function."""

    def __init__(self, answer: Answer, model: str = "simulated-judge") -> None:
        self.answer, self.model = answer, model
        self.facts: JudgeFacts | None = JudgeFacts.of(model)
        self.parameters: dict[str, Any] = {}
        self.asked: list[Request] = []

    def connect(self) -> None: ...

    def ask(self, requests: Iterable[Request], asked: Callable[[Request, Reply], None]) -> None:
        for request in requests:
            self.asked.append(request)
            messages = list(request.messages)
            asked(request, Reply("ok", self.answer(kind_of(messages), messages)))


_: Judge = Direct(always_yes)


class Scripted:
    """What a loopback judge does, and what it was asked."""

    def __init__(self, answer: Answer, model: str = "simulated-loopback") -> None:
        self.answer, self.models = answer, [model]
        self.key: str | None = None
        self.delay = 0.0
        self.logprobs = False
        self.refuses: set[str] = set()
        """Fields of a request that it does not know."""
        self.fault: Callable[[int, list[dict[str, str]]], str | None] = lambda n, m: None
        """What goes wrong at the n-th request, if anything."""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.served: Counter[str] = Counter()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = ""

    def questions(self) -> Counter[str]:
        """How often each prompt was answered, but those of the probe."""
        with self.lock:
            return Counter({p: n for p, n in self.served.items()
                            if p != json.dumps(list(CANARY.messages))})  # fmt: skip


def spoiled(fault: str, text: str) -> str:
    """A reply that went wrong."""
    return {
        "short list": "[1]",
        "prose": "Well, that is hard to say.",
        "empty": "",
        "fences": f"Sure!\n```json\n{text}\n```\nAnything else?",
        "think": f'<think>{{"1": 0}} maybe?</think>{text}',
        "cut off": text[: len(text) // 2],
        "sorry": "I'm sorry, I can't help with that.",
        "huge": "1" * 10_000_000 if fault == "huge" else "",
        "half a character": text.replace("w", "w\ud83d") + " \ud83d",
    }.get(fault, text)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: Scripted

    def log_message(self, *_: object) -> None: ...

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, message: str, **headers: str) -> None:
        self._send(status, json.dumps({"error": {"message": message}}).encode(), **headers)

    def do_GET(self) -> None:
        data = {"object": "list", "data": [{"id": m} for m in self.script.models]}
        self._send(200, json.dumps(data).encode())

    def do_POST(self) -> None:
        script = self.script
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with script.lock:
            script.bodies.append(body)
            script.headers.append(dict(self.headers))
            number = len(script.bodies) - 1
            script.at_once += 1
            script.most_at_once = max(script.most_at_once, script.at_once)
        try:
            self._answer(script, body, number)
        finally:
            with script.lock:
                script.at_once -= 1

    def _answer(self, script: Scripted, body: dict[str, Any], number: int) -> None:
        messages = body["messages"]
        if script.delay:
            time.sleep(script.delay)
        if script.key and self.headers.get("Authorization") != f"Bearer {script.key}":
            sent = self.headers.get("Authorization", "")
            return self._error(401, f"Incorrect API key provided: {sent}")
        if body["model"] not in script.models:
            return self._error(404, f"The model {body['model']} does not exist")
        if unknown := script.refuses & set(body):
            return self._error(400, f"unknown field {sorted(unknown)[0]}")
        fault = script.fault(number, messages)
        if fault in ("429", "503"):
            return self._error(int(fault), "slow down", Retry_After="0.05")
        if fault == "quota":
            return self._error(429, "insufficient_quota: check your plan")
        if fault == "bad retry-after":
            return self._error(429, "wait", Retry_After="Wed, 21 Oct 99999 07:28:00 GMT")
        if fault == "bad gzip":
            return self._send(200, b"no gzip", Content_Encoding="gzip")
        if fault == "500":
            return self._error(500, "internal error")
        if fault == "402":
            return self._error(402, "insufficient credit")
        if fault == "context":
            return self._error(400, "This model's maximum context length is 2048 tokens")
        if fault == "hang":
            time.sleep(3)
            return None
        if fault == "reset":
            self.close_connection = True
            self.connection.close()
            return None
        text = answer_canary(messages) or script.answer(kind_of(messages), messages)
        text = spoiled(fault or "", text)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if fault == "refusal":
            message = {"role": "assistant", "content": None, "refusal": "no"}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "stop"}
        if script.logprobs and body.get("logprobs"):
            choice["logprobs"] = {"content": _tokens(text)}
        value: dict[str, Any] = {"object": "chat.completion", "model": body["model"],
                                 "choices": [choice]}  # fmt: skip
        if fault != "no usage":
            value["usage"] = {"prompt_tokens": sum(len(m["content"]) for m in messages) // 4,
                              "completion_tokens": len(text) // 4}  # fmt: skip
        raw = json.dumps(value).encode()
        if fault == "truncated":
            raw = raw[: len(raw) // 2]
        else:
            with script.lock:
                script.served[json.dumps(messages)] += 1
        self._send(200, raw)
        return None


def _tokens(text: str) -> list[dict[str, Any]]:
    """Every character as a token; the digits are given with probability 0.8."""
    found = []
    for c in text:
        top = [{"token": c, "logprob": -0.2231436}]
        if c in "01":
            top.append({"token": "10"[int(c)], "logprob": -1.6094379})
        found.append({"token": c, "logprob": -0.2231436, "top_logprobs": top})
    return found


@contextmanager
def loopback(script: Scripted) -> Iterator[Scripted]:
    """Serve a script on a free port of this machine."""
    handler = type("Handler", (_Handler,), {"script": script})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
