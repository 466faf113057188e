"""Chats through the templates that models have, beside transformers' own rendering."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_calib import byte_tokenizer

from quantize.calibration.documents import evaluation_documents
from quantize.calibration.tokens import TokenSet, calibration_tokens, evaluation_tokens
from quantize.errors import DataError

PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + PLAIN
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.content }}]{% endfor %}"
)
PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content if part.type == 'text' %}"
    "{{ part.text }}{% endfor %}{% endfor %}"
)
CALLS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{% for key, value in call.function.arguments.items() %}"
    "<{{ key }}={{ value }}>{% endfor %}{% endfor %}{% endfor %}"
)
JOINED_CALLS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content + '' }}{% for call in m.tool_calls or [] %}"
    "{{ '<' + call.function.arguments + '>' }}{% endfor %}{% endfor %}"
)


def words() -> str:
    return " ".join(random.choices(("cat", "dog", "fox", "jumps", "eats", "over"), k=9))


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


A, B, S = words(), words(), words()
TURNS = [said("user", A), said("assistant", B)]


def tokenizer(template: Any, **more: Any) -> Any:
    made = byte_tokenizer(**more)
    made.chat_template = template
    return made


def write(path: Path, chats: list[Any], column: str = "messages") -> str:
    path.write_text("".join(json.dumps({column: chat}) + "\n" for chat in chats))
    return str(path)


def documents(made: Any, path: str, choice: bool | None = None) -> list[str]:
    found = evaluation_documents(made, dataset=path, chat_template=choice)
    return [document.text for document in found.documents]


def lines(tokens: TokenSet) -> list[str]:
    return [line for _, line in tokens.notes]


def calibrate(made: Any, path: str, choice: bool | None = None, count: int = 1) -> TokenSet:
    return calibration_tokens(
        made, dataset=path, nsamples=count, seqlen=16, seed=0, chat_template=choice, bos="never"
    )


def test_chats_are_rendered_as_transformers_renders_them(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [[*TURNS, said("user", S)], TURNS])
    made = tokenizer(PLAIN)
    expected = [
        made.apply_chat_template(chat, tokenize=False)
        for chat in ([*TURNS, said("user", S)], TURNS)
    ]
    assert documents(made, path) == documents(made, path, True) == expected
    tokens = calibrate(made, path)
    assert lines(tokens) == ["a.jsonl: chats (messages), rendered with the model's chat template"]
    assert tokens.origin["chat_template"] is True
    told = json.dumps(PLAIN).encode()
    assert tokens.origin["chat_template_sha256"] == hashlib.sha256(told).hexdigest()
    assert calibrate(made, path, True).sha256 == tokens.sha256


def test_without_a_template_chats_are_written_plainly(tmp_path: Path):
    call = [{"function": {"name": "f", "arguments": {"x": 1}}}]
    chat = [said("system", S), *TURNS, said("assistant", None, tool_calls=call)]
    path = write(tmp_path / "a.jsonl", [chat])
    plainly = f"system: {S}\n\nuser: {A}\n\nassistant: {B}\n\nassistant: {json.dumps(call)}"
    assert documents(byte_tokenizer(), path) == [plainly]
    assert documents(tokenizer(PLAIN), path, False) == [plainly]
    tokens = calibrate(byte_tokenizer(), path)
    assert tokens.origin["chat_template"] is False
    (line,) = lines(tokens)
    assert "no chat template" in line
    assert "chat_template.jinja" in line
    with pytest.raises(DataError, match="no chat template; turn chat_template off"):
        calibrate(byte_tokenizer(), path, True)


def test_plain_text_stays_plain_unless_asked_for(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [A, B], "text")
    made = tokenizer(PLAIN)
    assert documents(made, path) == documents(made, path, False) == [A, B]
    assert documents(made, path, True) == [f"<|user|>{A}\n", f"<|user|>{B}\n"]
    assert calibrate(made, path).notes == ()
    assert "each row as a user turn" in lines(calibrate(made, path, True))[0]
    (tmp_path / "a.txt").write_text(A)
    with pytest.raises(DataError, match="chat_template off"):
        evaluation_tokens(made, dataset=str(tmp_path / "a.txt"), seqlen=4, chat_template=True)


def test_a_refused_system_turn_goes_into_the_users(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [[said("system", S), *TURNS]] * 3)
    made = tokenizer(NO_SYSTEM)
    expected = made.apply_chat_template([said("user", f"{S}\n\n{A}"), TURNS[1]], tokenize=False)
    assert documents(made, path) == [expected] * 3
    tokens = calibrate(made, path, count=len(expected) // 16 + 2)
    assert tokens.origin["system_turns_folded"] == 2
    assert "in 2 rows its text was put before the first user turn" in lines(tokens)[1]
    # A template that takes system turns gets them.
    assert documents(tokenizer(PLAIN), path)[0].startswith("<|system|>")


def test_refused_rows_are_counted_and_named(tmp_path: Path):
    odd = [*TURNS, said("assistant", S)]
    chats = [odd, *[TURNS] * 9]
    made = tokenizer(STRICT)
    text = evaluation_tokens(made, dataset=write(tmp_path / "a.jsonl", chats), seqlen=16)
    assert text.origin["rows_refused"] == 1
    line = lines(text)[1]
    assert "1 of 10 rows read cannot be rendered" in line
    assert "line 1;" in line
    assert "roles must alternate" in line
    path = write(tmp_path / "b.jsonl", [*chats, odd])
    with pytest.raises(DataError, match=r"line 1: .*roles must alternate \(2 of 11 rows") as caught:
        evaluation_tokens(made, dataset=path, seqlen=16)
    assert "\n" not in str(caught.value)
    path = write(tmp_path / "c.jsonl", [odd])
    with pytest.raises(DataError, match="roles must alternate"):
        calibrate(made, path)


def test_one_odd_row_stops_nothing_wherever_it_stands(tmp_path: Path):
    odd, counts = [said("assistant", S)], []
    for position in range(12):
        chats = [TURNS] * 12
        chats[position] = odd
        path = write(tmp_path / "a.jsonl", chats)
        tokens = calibrate(tokenizer(STRICT), path, count=11 * (len(A) + len(B)) // 16)
        counts.append(tokens.origin.get("rows_refused", 0))
    # Where it comes last in the shuffle enough was read before it.
    assert sorted(counts)[1:] == [1] * 11


@pytest.mark.parametrize("as_text", [False, True])
def test_calls_of_tools_in_the_form_that_the_template_takes(tmp_path: Path, as_text: bool):
    given = {"x": 1, "y": "é"}
    arguments: Any = json.dumps(given, ensure_ascii=False) if as_text else given
    call = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    chat = [said("user", A), said("assistant", None, tool_calls=call), said("tool", "42")]
    path = write(tmp_path / "a.jsonl", [chat])
    (items,) = documents(tokenizer(CALLS), path)
    assert items == f"<|user|>{A}<|assistant|><x=1><y=é><|tool|>42"
    (joined,) = documents(tokenizer(JOINED_CALLS), path)
    assert joined == f'<|user|>{A}<|assistant|><{{"x": 1, "y": "é"}}><|tool|>42'


def test_null_is_never_printed(tmp_path: Path):
    call = [{"function": {"name": "f", "arguments": {}}}]
    path = write(
        tmp_path / "a.jsonl", [[said("user", A), said("assistant", None, tool_calls=call)]]
    )
    for template in (PLAIN, "{% for m in messages %}{{ m['content'] }}{% endfor %}"):
        (text,) = documents(tokenizer(template), path)
        assert A in text
        assert "None" not in text


def test_templates_that_want_parts_get_them(tmp_path: Path):
    parts = [said("user", [{"type": "text", "text": A}]), said("assistant", B)]
    for name, chat in (("a", TURNS), ("b", parts)):
        path = write(tmp_path / f"{name}.jsonl", [chat])
        assert documents(tokenizer(PARTS), path) == [f"<|user|>{A}<|assistant|>{B}"]
        assert documents(tokenizer(PLAIN), path) == [f"<|user|>{A}\n<|assistant|>{B}\n"]


def test_the_text_does_not_depend_on_the_day(tmp_path: Path):
    template = (
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }}"
        "{% endif %}{{ messages[0].content }}"
    )
    path = write(tmp_path / "a.jsonl", [TURNS])
    assert documents(tokenizer(template), path) == [f"26 Jul 2024 2024-07-26{A}"]


def test_tools_reach_the_template(tmp_path: Path):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TURNS, "tools": tools}))
    several = {"default": PLAIN, "tool_use": "{{ tools[0].function.name }}" + PLAIN}
    for template in (several, several["tool_use"]):
        (text,) = documents(tokenizer(template), str(path))
        assert text == f"weather<|user|>{A}\n<|assistant|>{B}\n"
    assert documents(tokenizer(several), write(tmp_path / "b.jsonl", [TURNS]))[0].startswith(
        "<|user"
    )


def split(tokens: list[int], at: int) -> Iterator[list[int]]:
    part: list[int] = []
    for token in tokens:
        part.append(token)
        if token == at:
            yield copy.copy(part)
            part.clear()


@pytest.mark.parametrize("ending", ["", "</s>", "</s>\n"])
def test_one_eos_ends_each_chat(tmp_path: Path, ending: str):
    made = tokenizer("{{ messages[0].content }}" + ending.replace("\n", "{{ '\n' }}"))
    path = write(tmp_path / "a.jsonl", [TURNS] * 3)
    tokens = evaluation_tokens(made, dataset=path, seqlen=1).tokens.flatten().tolist()
    assert tokens.count(made.eos_token_id) == 3
    assert all(len(part) >= len(A) for part in split(tokens, made.eos_token_id))


def test_windows_with_bos_leave_out_the_templates_own(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [TURNS] * 4)
    own, none = tokenizer("<s>" + PLAIN), tokenizer(PLAIN)
    how = {"dataset": path, "seqlen": 8}
    bos = own.bos_token_id
    with_bos = evaluation_tokens(own, **how, bos=bos).tokens
    assert torch.equal(with_bos, evaluation_tokens(none, **how, bos=bos).tokens)
    assert (with_bos == bos).sum() == len(with_bos)
    assert (evaluation_tokens(own, **how).tokens == bos).sum() == 4


def test_first_windows_are_those_of_all_chats(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [[said("user", words())] for _ in range(30)])
    made = tokenizer(PLAIN)
    whole = evaluation_tokens(made, dataset=path, seqlen=16)
    part = evaluation_tokens(made, dataset=path, seqlen=16, max_windows=5)
    assert torch.equal(part.tokens, whole.tokens[:5])
    assert whole.source == "a.jsonl (chat template)"
    assert whole.origin["packing"] == "packed"


def test_without_eos_a_line_says_that_chats_touch(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [TURNS] * 3)
    assert "no EOS token" in lines(calibrate(tokenizer(PLAIN, eos=False), path))[-1]
    assert not any("EOS" in line for line in lines(calibrate(tokenizer(PLAIN), path)))


def test_turns_that_a_template_leaves_out_are_told(tmp_path: Path):
    template = "{% for m in messages if m.role != 'tool' %}<{{ m.content }}>{% endfor %}"
    asked = [said("user", A), said("tool", "nineteen degrees"), said("assistant", B)]
    path = write(tmp_path / "a.jsonl", [asked, TURNS])
    tokens = evaluation_tokens(tokenizer(template), dataset=path, seqlen=4)
    assert tokens.origin["roles_left_out"] == {"tool": 1}
    assert "leaves out turns (tool) in 1 of 2 rows read" in lines(tokens)[1]
    call = [{"function": {"name": "thermometer", "arguments": {}}}]
    called = [said("user", A), said("assistant", None, tool_calls=call)]
    calling = write(tmp_path / "b.jsonl", [called, TURNS])
    tokens = evaluation_tokens(tokenizer(PLAIN), dataset=calling, seqlen=4)
    assert tokens.origin["roles_left_out"] == {"tool_calls": 1}
    upper = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
    whole = evaluation_tokens(tokenizer(upper), dataset=path, seqlen=4)
    assert "roles_left_out" not in whole.origin
