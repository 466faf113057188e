"""`pq verify` sees every changed byte of every file, of outputs of each format, whatever the byte means."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import resumed
from conftest import ModelMaker
from damage import checks_of, failed

from quantize.conversion.loop import convert
from quantize.verification import run, verify
from quantize.verification.checks import Skipped

RECIPES = ["rtn", "fireq", "sbvr", "ladimo-gptq"]
WRITTEN = {
    "config.json",
    "model.safetensors.index.json",
    "pq.json",
    "pq-statistics.json",
    "README.md",
    "tokenizer.json",
}
WRITTEN |= {"tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"}


@pytest.fixture(scope="module", params=RECIPES)
def output(
    request: pytest.FixtureRequest,
    tiny: ModelMaker,
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A conversion that tests damage and mend again."""
    folder = tmp_path_factory.mktemp(request.param) / "out"
    convert(
        resumed.request(request.param, resumed.model_of(tiny, request.param), text_file, folder)
    )
    assert verify(folder).ok
    return folder


def positions(path: Path, per_file: int = 2) -> list[int]:
    """Random positions in a file; of a shard also its header's length, text and the data's end."""
    size, rng = path.stat().st_size, random.Random(f"{path.parent.parent.name[:4]} {path.name}")
    found = [rng.randrange(size) for _ in range(per_file)]
    if path.suffix == ".safetensors":
        header = int.from_bytes(path.read_bytes()[:8], "little")
        found += [rng.randrange(8), 8, rng.randrange(8, 8 + header), 7 + header, size - 1]
    return found


def seen(folder: Path, path: Path) -> bool:
    """Whether verification fails and names the file; the right check must be the one that does."""
    result = verify(folder)
    if path.name == "pq.json":
        return failed(result)[:1] in (["provenance"], ["files"])
    return not result.ok and path.name in checks_of(result)["files"].detail


@pytest.fixture
def meaning_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks of layout and numbers take most of the time; bytes must be seen without them."""

    def skip(*arguments: object) -> None:
        raise Skipped("left out")

    monkeypatch.setattr(run, "read_layout", skip)


def flips_are_seen(output: Path, per_file: slice) -> None:
    rng = random.Random(1)
    for path, at in [
        (each, at) for each in sorted(output.iterdir()) for at in positions(each)[per_file]
    ]:
        sound = path.read_bytes()
        broken = bytearray(sound)
        broken[at] ^= rng.randrange(1, 256)
        path.write_bytes(broken)
        assert seen(output, path), (path.name, at)
        path.write_bytes(sound)


def test_the_files_are_those_that_were_written(output: Path):
    files = sorted(output.iterdir())
    assert {path.name for path in files if path.suffix != ".safetensors"} == WRITTEN
    assert len(files) == len(WRITTEN) + resumed.BLOCKS + 2


@pytest.mark.usefixtures("meaning_left_out")
def test_every_flipped_byte_is_seen(output: Path):
    flips_are_seen(output, slice(None))


def test_all_checks_end_on_flipped_bytes(output: Path):
    flips_are_seen(output, slice(1))
    assert verify(output).ok


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "a zero more": lambda raw: raw + b"\0",
    "a line feed more": lambda raw: raw + b"\n",
    "the last byte gone": lambda raw: raw[:-1],
    "the first byte gone": lambda raw: raw[1:],
    "cut in half": lambda raw: raw[: len(raw) // 2],
    "emptied": lambda raw: b"",
    "twice": lambda raw: raw + raw,
}


@pytest.mark.usefixtures("meaning_left_out")
def test_every_changed_length_is_seen(output: Path):
    for path in sorted(output.iterdir()):
        sound = path.read_bytes()
        for name in random.Random(path.name).sample(sorted(CHANGES), 2):
            path.write_bytes(CHANGES[name](sound))
            assert seen(output, path), (path.name, name)
        path.write_bytes(sound)
    assert verify(output).ok


@pytest.mark.usefixtures("meaning_left_out")
def test_missing_surplus_renamed_and_exchanged_files_are_seen(output: Path):
    for path in sorted(output.iterdir()):
        sound = path.read_bytes()
        path.unlink()
        # Without pq.json it is a checkpoint that others may have written.
        assert path.name == "pq.json" or seen(output, path), path.name
        path.write_bytes(sound)
    (output / "surplus.json").write_text("{}")
    assert "surplus.json does not belong here" in checks_of(verify(output))["files"].detail
    (output / "surplus.json").unlink()
    first, second = sorted(output.glob("*.safetensors"))[1:3]
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    assert first.name in checks_of(verify(output))["files"].detail
    first.write_bytes(one)
    second.write_bytes(two)
    assert verify(output).ok
