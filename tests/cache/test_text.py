from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoTokenizer

from bsc.cache.model.text import parse_text, read_text
from bsc.cache.model.text_source import TextSource
from bsc.cache.model.tokens import context_batches
from bsc.errors import UserError
from tests.conftest import EMBEDDED

TEXTS = [f"document {i}\nwith two lines" for i in range(50)]


def files(folder: Path, kind: str) -> list[str]:
    if kind == "txt":
        for i, text in enumerate(TEXTS):
            (folder / f"{i:02}.txt").write_text(text)
        return [str(folder)]
    path = folder / f"corpus.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in TEXTS))
    else:
        pd.DataFrame({"text": TEXTS}).to_parquet(path)
    return [str(path)]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_local_files_give_every_document_once(tmp_path: Path, kind: str) -> None:
    source = TextSource(**parse_text(files(tmp_path, kind)), seed=1)
    read = list(read_text(source))
    assert sorted(d.text for d in read) == sorted(TEXTS)
    assert [d.number for d in read] == list(range(50))
    assert [d.text for d in read] != TEXTS  # shuffled
    assert read == list(read_text(source))


def test_the_held_out_share_is_a_property_of_the_text_not_of_the_order(tmp_path: Path) -> None:
    paths = parse_text(files(tmp_path, "jsonl"))
    first, second = (
        {d.text for d in read_text(TextSource(**paths, held_out=0.3, seed=s)) if d.held_out}
        for s in (0, 1)
    )
    assert first == second and 5 < len(first) < 25


def test_documents_of_embedded_corpora_come_in_an_order_that_the_seed_decides() -> None:
    def numbers(seed: int) -> list[str]:
        return [d.text for d in read_text(TextSource(corpus="stdlib", seed=seed))]

    assert numbers(0) == numbers(0)
    assert numbers(0) != numbers(1) and sorted(numbers(0)) == sorted(numbers(1))


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    source = TextSource(**parse_text(files(tmp_path, "jsonl")), column="body")
    with pytest.raises(UserError, match=r"--column body: .* it has text, n"):
        list(read_text(source))


def test_rows_without_text_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "words"}\n{"text": ""}\n')
    source = TextSource(**parse_text([str(tmp_path / "a.jsonl")]))
    assert [d.text for d in read_text(source)] == ["words"]


CHAT = [
    {"role": "system", "content": "be brief"}, {"role": "user", "content": "why is the sky blue"},
    {"role": "assistant", "content": "scattering"},
]  # fmt: skip
TEMPLATE = "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}"


def batch_of(path: Path, column: str, template: str | None = TEMPLATE) -> list[list[int]]:
    """Token ids of the documents of a file, by their numbers."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.chat_template = template
    source = TextSource(**parse_text([str(path)]), column=column, held_out=0.0)
    (batch,) = context_batches(
        read_text(source), tokenizer, context=64, batch=8, wanted={"train": 1_000}, packing="none"
    )
    assert batch.real is not None
    return [row[real].tolist() for row, real in zip(batch.token_id, batch.real, strict=True)]


def test_chat_messages_become_text_by_the_model_s_own_template(tmp_path: Path) -> None:
    other = [{"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]),
              "value": m["content"]} for m in CHAT]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"conversations": other}) + "\n")
    expected = AutoTokenizer.from_pretrained(EMBEDDED)(
        "".join(f"<|endoftext|>{m['role']}: {m['content']}\n" for m in CHAT),
        add_special_tokens=False,
    )["input_ids"]
    assert batch_of(path, "messages") == [expected]
    assert batch_of(tmp_path / "b.jsonl", "conversations") == [expected]
    with pytest.raises(UserError, match="has no chat template"):
        batch_of(path, "messages", template=None)
    with pytest.raises(UserError, match="refuses document 0: not like this"):
        batch_of(path, "messages", template="{{ raise_exception('not like this') }}")


def test_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"input_ids": [5, 6, 7, 8]}) + "\n")
    assert batch_of(path, "input_ids") == [[5, 6, 7, 8]]
    path.write_text(json.dumps({"input_ids": [5, 600_000]}) + "\n")
    with pytest.raises(UserError, match="token id 600000, but the model's tokenizer has 4096"):
        batch_of(path, "input_ids")


def test_a_column_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for value in (3.5, {"a": 1}, [{"who": "me"}], ["a", "b"]):
        path.write_text(json.dumps({"text": value}) + "\n")
        with pytest.raises(UserError, match="Expected text, chat messages"):
            batch_of(path, "text")


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match="there is nothing in it"):
        list(read_text(TextSource(**parse_text([str(tmp_path / "a.jsonl")]))))


def test_damaged_files_give_one_message(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is not parquet")
    with pytest.raises(UserError, match="cannot be read"):
        list(read_text(TextSource(**parse_text([str(tmp_path / "a.parquet")]))))


@pytest.mark.parametrize(
    ("names", "message"),
    [(["nothing.jsonl"], "no such file"), (["env", "stdlib"], "corpus stands alone"),
     (["a.csv"], "cannot read .csv"), (["a.txt", "b.jsonl"],
     "different kinds"), (["."], "the folder has no")],
)  # fmt: skip
def test_files_that_cannot_be_text_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in names:
        if name not in ("nothing.jsonl", ".", "env", "stdlib"):
            Path(name).write_text("x")
    with pytest.raises(UserError, match=message):
        parse_text(names)
