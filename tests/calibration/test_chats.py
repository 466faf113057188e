"""Conversations in the columns and forms that people store them in."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from quantize.calibration import text_sources
from quantize.calibration.chats import Chat
from quantize.calibration.text_sources import Text
from quantize.errors import DataError


def words() -> str:
    return " ".join(random.choices(("cat", "dog", "fox", "jumps", "eats", "over"), k=9))


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path, field: str | None = None) -> Text:
    return text_sources.load(str(path), "calibration", field, None)


def refusal(path: Path, field: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read(path, field)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


A, B, S = words(), words(), words()
TURNS = [said("user", A), said("assistant", B)]
SHARED = [{"from": "human", "value": A}, {"from": "gpt", "value": B}]


@pytest.mark.parametrize("ending", ["json", "jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        ({"id": "1", "messages": TURNS}, "messages", TURNS),
        ({"id": "1", "conversations": SHARED}, "conversations", TURNS),
        ({"conversation": SHARED, "system": S}, "conversation", [said("system", S), *TURNS]),
        ({"instruction": A, "input": "", "output": B}, "instruction, output", TURNS),
        (
            {"instruction": A, "input": S, "output": B},
            "instruction, output",
            [said("user", f"{A}\n\n{S}"), TURNS[1]],
        ),
        (
            {"instruction": A, "context": S, "response": B, "category": "x"},
            "instruction, response",
            [said("user", f"{A}\n\n{S}"), TURNS[1]],
        ),
        ({"prompt": A, "completion": B}, "prompt, completion", TURNS),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt, completion", TURNS),
        ({"prompt": A, "chosen": TURNS, "rejected": TURNS}, "prompt, chosen", TURNS),
        (
            {"system_prompt": S, "question": A, "response": B},
            "question, response",
            [said("system", S), *TURNS],
        ),
        ({"question": A, "answer": B}, "question, answer", TURNS),
        (
            {
                "messages": [
                    said("user", [{"type": "text", "text": A}, {"type": "text", "text": S}])
                ]
            },
            "messages",
            [said("user", f"{A}\n{S}")],
        ),
    ],
)
def test_columns_are_recognized(
    tmp_path: Path, ending: str, row: dict[str, Any], name: str, messages: list[Any]
):
    text = read(write(tmp_path / f"a.{ending}", [row] * 3))
    assert text.rows == [Chat(messages)] * 3
    assert text.origin["text_field"] == name
    assert (text.packing, text.numbers, text.notes) == ("packed", [1, 2, 3], ())


def test_text_goes_before_chats_and_a_named_column_before_both(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{"messages": TURNS, "text": S, "output": B}])
    assert read(path).rows == [S]
    assert read(path, "messages").rows == [Chat(TURNS)]
    assert read(path, "output").rows == [B]


def test_most_rows_decide(tmp_path: Path):
    rows = [{"text": S}, *[{"messages": TURNS}] * 20, {"other": 3}]
    text = read(write(tmp_path / "a.jsonl", rows))
    assert text.rows == [Chat(TURNS)] * 20
    assert text.numbers == list(range(2, 22))
    assert text.origin["rows"] == 20
    assert text.origin["rows_left_out"] == 2
    ((_, line),) = text.notes
    assert "2 of 22 rows" in line
    assert "line 1, 22" in line
    assert "has no field 'messages'" in line


def test_null_keys_of_structs_are_not_there(tmp_path: Path):
    """A table's structs have all the keys that any of them has."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"y": "2"}}}
    messages = [
        said("user", A),
        said("assistant", None, tool_calls=[call]),
        said("tool", "42", name="f"),
        said("assistant", B, tool_calls=[other]),
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    for ending in ("jsonl", "parquet"):
        path = write(tmp_path / f"a.{ending}", [{"messages": messages, "tools": json.dumps(tools)}])
        assert read(path).rows == [Chat(messages, tools)]
    path = write(tmp_path / "b.jsonl", [{"messages": [said("user", A, name=None)], "tools": "no"}])
    assert read(path).rows == [Chat([said("user", A)])]


def test_null_and_empty_rows_are_left_out_and_counted(tmp_path: Path):
    rows = [{"messages": m} for m in ([], None, [said("user", ""), said("assistant", None)])]
    text = read(write(tmp_path / "a.jsonl", [*rows, {"messages": TURNS}, {"messages": TURNS}]))
    assert text.rows == [Chat(TURNS)] * 2
    assert text.numbers == [4, 5]
    assert [line for _, line in text.notes] == [
        "a.jsonl: 3 of 5 rows are null in messages; left out"
    ]
    pairs = [{"prompt": A, "completion": None}, {"prompt": A, "completion": B}]
    assert read(write(tmp_path / "b.parquet", pairs)).rows == [Chat(TURNS)]
    nulls = [{"text": None}, {"text": A}, {"text": ""}]
    assert read(write(tmp_path / "c.parquet", nulls)).rows == [A, ""]
    assert "every one of its 2 rows is null" in refusal(write(tmp_path / "d.jsonl", nulls[:1] * 2))


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (
            {"messages": [said("user", [{"type": "image_url", "image_url": "a.png"}])]},
            "'image_url'",
        ),
        ({"messages": [said("user", 3)]}, "int instead of text"),
        ({"messages": [said("user", "\ud800")]}, "surrogate"),
        ({"messages": [{"content": A}]}, "with a role each"),
        ({"messages": "a text"}, None),
        ({"messages": 3}, "int instead of text"),
    ],
)
def test_up_to_a_tenth_of_the_rows_may_be_odd(tmp_path: Path, odd: Any, words: str | None):
    rows = [odd, *[{"messages": TURNS}] * 9]
    text = read(write(tmp_path / "a.jsonl", rows))
    if words is None:  # text where chats are is text
        assert text.rows[0] == "a text"
        return
    assert text.rows == [Chat(TURNS)] * 9
    assert text.origin["rows_left_out"] == 1
    assert words in text.notes[0][1]
    error = refusal(write(tmp_path / "b.jsonl", [*rows, odd]))
    assert "b.jsonl line 1" in error
    assert "2 of 11 rows" in error
    assert words in error


def test_json_files_of_every_shape(tmp_path: Path):
    shapes = [
        [{"text": A}, {"text": B}],
        [A, B],
        {"version": 1, "data": [{"text": A}, {"text": B}]},
    ]
    for shape in shapes:
        (tmp_path / "a.json").write_text(json.dumps(shape, indent=1))
        assert read(tmp_path / "a.json").rows == [A, B]
    (tmp_path / "a.json").write_text("".join(json.dumps(row) + "\n" for row in shapes[0]))
    assert read(tmp_path / "a.json").rows == [A, B]
    (tmp_path / "a.json").write_text(json.dumps([TURNS, SHARED]))
    assert read(tmp_path / "a.json").rows == [Chat(TURNS)] * 2
    (tmp_path / "a.json").write_text(json.dumps({"messages": TURNS}))
    assert read(tmp_path / "a.json").rows == [Chat(TURNS)]


def test_packed_files_are_known_by_their_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text(A)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(A.encode(), mtime=7))
    plain, packed = read(tmp_path / "a.txt"), read(tmp_path / "a.txt.gz")
    assert packed.rows == plain.rows == [A]
    assert packed.origin["text_sha256"] == hashlib.sha256(A.encode()).hexdigest()
    assert packed.origin["dataset"] == "a.txt.gz"


def test_columns_that_nobody_knows_are_listed(tmp_path: Path):
    rows = [{"label": 3, "title": A}, {"title": A, "more": B}]
    for ending in ("jsonl", "parquet"):
        error = refusal(write(tmp_path / f"a.{ending}", rows))
        assert "has no field 'text'" in error
        assert "instruction and output" in error
        assert "label, title" in error
    assert read(tmp_path / "a.jsonl", "title").rows == [A, A]
