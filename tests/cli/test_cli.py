"""The `pq` command: what goes to which stream, exit codes, and that it only wraps the functions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import request_for

import quantize
from quantize.cli import common, main
from quantize.conversion import loop as convert_module
from quantize.conversion.loop import Request, convert
from quantize.errors import (
    DataError,
    ModelError,
    OutputError,
    PlanError,
    PqError,
    QualityError,
    RecipeError,
    RoomError,
    StoppedError,
    UsageError,
    VerifyError,
)

Maker = Callable[..., Path]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def convert_args(tiny: Maker, text_file: Path, tmp_path: Path) -> list[object]:
    """Options of a small conversion into tmp_path / "out"."""
    model = ["--model", tiny("llama"), "--output", tmp_path / "out", "--device", "cpu"]
    return ["convert", *model, "--dataset", text_file, "--nsamples", 6, "--seqlen", 32]


# Converting


def test_convert_prints_json_on_stdout_and_nothing_else(
    pq: Call, convert_args: list[object], tmp_path: Path
):
    code, out, err = pq(*convert_args, "--recipe", "gptq", "--set", "bits=3", "--json")
    assert code == 0
    summary = json.loads(out)
    assert summary["bits_per_weight"] == 3.125
    assert summary["output"] == str(tmp_path / "out")
    assert summary["quantized_linears"] == 14
    assert "{" not in err
    assert "Traceback" not in err


def test_convert_speaks_on_stderr_otherwise(pq: Call, convert_args: list[object], tmp_path: Path):
    code, out, err = pq(*convert_args, "--recipe", "rtn")
    assert (code, out) == (0, "")
    assert "14 linears at 4.125 bits" in " ".join(err.split())
    log = (tmp_path / "out.log").read_text()
    assert "model.layers.1.mlp.down_proj" in log
    assert not list((tmp_path / "out").glob("*.log"))


def test_the_command_writes_what_the_function_writes(
    pq: Call, convert_args: list[object], tiny: Maker, text_file: Path, tmp_path: Path
):
    pq(*convert_args, "--recipe", "gptq", "--json")
    expected = tmp_path / "expected"
    asked = request_for(tiny("llama"), "gptq", expected, text_file)
    convert(dataclasses.replace(asked, batch_tokens=Request.batch_tokens))
    for path in expected.glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_set_takes_several_fields_and_a_method(
    pq: Call, convert_args: list[object], tmp_path: Path
):
    changes = ["--set", "rtn.bits=5", "--set", "group_size=32", "--set", "clip=absmax"]
    code, out, _ = pq(*convert_args, "--recipe", "rtn", *changes, "--json")
    assert code == 0
    assert json.loads(out)["bits_per_weight"] == 5.5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"]) == (5, 32)
    resolved = json.loads((tmp_path / "out" / "pq.json").read_text())["recipe"]["resolved"]
    assert "bits: 5" in resolved


@pytest.mark.parametrize(
    "recipe", ["rtn", "gptq"]
)  # one reads no text, and tells which it would have read
def test_where_the_text_lies_is_no_part_of_the_output(
    pq: Call, tiny: Maker, text_file: Path, tmp_path: Path, recipe: str
):
    for place in ("here", "there"):
        folder = tmp_path / place
        (folder / "secluded").mkdir(parents=True)
        text = shutil.copy(text_file, folder / "secluded" / "text.txt")
        own = folder / f"{recipe}.yaml"
        told = f"{{dataset: {text}, nsamples: 6, seqlen: 32}}"
        own.write_text(f"description: d\ncalibration: {told}\nstages: [{{method: {recipe}}}]\n")
        arguments = [
            "--model",
            tiny("llama"),
            "--recipe",
            own,
            "--output",
            folder / "out",
            "--device",
            "cpu",
        ]
        assert pq("convert", *arguments)[0] == 0
        for written in (
            *(folder / "out").iterdir(),
            folder / "out.report.html",
            folder / "out.report.json",
        ):
            assert b"secluded" not in written.read_bytes(), written
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / place / "out").iterdir()}
        for place in ("here", "there")
    )
    assert first == second
    facts = json.loads(first["pq.json"])
    assert "dataset: text.txt" in facts["recipe"]["resolved"]
    if recipe == "gptq":
        assert facts["calibration"]["dataset"] == "text.txt"
        assert (
            facts["calibration"]["text_sha256"]
            == hashlib.sha256(text_file.read_bytes()).hexdigest()
        )


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("bist=3", "did you mean 'bits'?"),
        ("bits", "write FIELD=VALUE"),
        ("bits=99", "rtn.bits"),
        ("bits=3.5", "rtn.bits"),
        ("activations=int8", "rtn.activations"),
        ("gptq.bits=3", "no stage of recipe 'rtn' has the field 'gptq.bits'"),
        ("method=gptq", "no stage"),
        ("activations=fp8", "--set"),
    ],
)
def test_set_refuses_what_no_stage_takes(
    pq: Call, convert_args: list[object], tmp_path: Path, assignment: str, says: str
):
    changes = ["--set", assignment] + (
        ["--set", "bits=3"] if assignment == "activations=fp8" else []
    )
    code, out, err = pq(*convert_args, "--recipe", "rtn", *changes)
    assert (code, out) == (UsageError.exit_code, "")
    assert says in err
    assert err.startswith("pq: error: --set")
    assert not list(tmp_path.iterdir())


# Evaluating


def test_eval_prints_json(pq: Call, converted: Maker, tiny: Maker, text_file: Path):
    args = ["--baseline", tiny("llama"), "--dataset", text_file, "--seqlen", 32, "--max-windows", 3]
    code, out, err = pq("eval", converted("rtn", "llama"), *args, "--json")
    assert code == 0
    assert "Traceback" not in err
    figures = json.loads(out)
    wanted = "protocol tokens perplexity baseline_perplexity kld_mean kld_p99 top1_agreement bits_per_weight"
    assert set(wanted.split()) <= set(figures)
    assert (figures["protocol"], figures["tokens"], figures["bits_per_weight"]) == (
        "strided-32",
        93,
        4.125,
    )


def test_eval_prints_a_table(pq: Call, tiny: Maker, text_file: Path):
    code, out, _ = pq(
        "eval", tiny("llama"), "--dataset", text_file, "--seqlen", 32, "--max-windows", 1
    )
    assert code == 0
    assert "perplexity" in out


# Errors and exit codes


def test_exit_codes_are_the_documented_ones():
    codes = {cls.exit_code: cls for cls in PqError.__subclasses__()}
    documented = (
        UsageError,
        RecipeError,
        ModelError,
        DataError,
        OutputError,
        VerifyError,
        RoomError,
    )
    later = {9: QualityError, 10: PlanError, 75: StoppedError}
    assert codes == dict(enumerate(documented, start=2)) | later


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        (["--recipe", "rnt"], 3, "did you mean 'rtn'?"),
        (["--recipe", "rtn", "--nsamples", "0"], 2, "nsamples: must be an integer >= 1"),
        (["--recipe", "rtn", "--device", "tpu9"], 2, "--device tpu9: not usable here"),
        (["--recipe", "rtn", "--dtype", "int4"], 2, "--dtype int4: choose one of auto, float32"),
        (
            ["--recipe", "rtn", "--model", "./not/there"],
            4,
            "no such folder; give a local model folder or a Hub id",
        ),
        (
            ["--recipe", "rtn", "--set", "group_size=96", "--set", "strict=true"],
            4,
            "no multiple of the group 96",
        ),
        (["--recipe", "gptq", "--dataset", "none.txt"], 5, "none.txt: no such file"),
        (["--recipe", "gptq", "--seqlen", "100000"], 5, "lower"),
    ],
)
def test_each_error_is_one_line_and_a_code(
    pq: Call, convert_args: list[object], tmp_path: Path, changes: list[str], code: int, says: str
):
    got, out, err = pq(*convert_args, *changes)
    assert (got, out) == (code, "")
    lines = err.strip().splitlines()
    assert lines[-1].startswith("pq: error: ")
    assert says in lines[-1]
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_an_output_in_use(pq: Call, convert_args: list[object], tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    code, out, err = pq(*convert_args, "--recipe", "rtn")
    assert (code, out) == (6, "")
    assert "exists and is not an empty folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_is_replaced_only_when_asked(
    pq: Call, convert_args: list[object], tmp_path: Path
):
    assert pq(*convert_args, "--recipe", "rtn")[0] == 0
    before = (tmp_path / "out" / "pq.json").read_bytes()
    other = (*convert_args, "--recipe", "rtn", "--set", "bits=8")
    assert pq(*other)[0] == 6
    assert (tmp_path / "out" / "pq.json").read_bytes() == before
    assert pq(*other, "--overwrite")[0] == 0
    assert json.loads((tmp_path / "out" / "pq.json").read_text())["recipe"] != json.loads(before)
    assert (tmp_path / "out" / "pq.json").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out",
        "out.log",
        "out.report.html",
        "out.report.json",
    ]


def raising(error: BaseException) -> Callable[..., None]:
    def run(*args: object, **kwargs: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (VerifyError("a reads back differently"), 7, "pq: error: a reads back differently"),
        (MemoryError(), 8, "pq: error: out of memory; lower --nsamples"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            8,
            "pq: error: out of memory",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            8,
            "pq: error: out of memory",
        ),
        (KeyboardInterrupt(), 130, "pq: interrupted; no output was written"),
    ],
)
def test_what_may_happen_on_the_way(
    pq: Call,
    convert_args: list[object],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    says: str,
):
    monkeypatch.setattr(convert_module, "convert", raising(error))
    got, out, err = pq(*convert_args, "--recipe", "rtn")
    assert (got, out) == (code, "")
    assert says in err


def test_bugs_are_not_hidden(
    convert_args: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(convert_module, "convert", raising(RuntimeError("a bug")))
    monkeypatch.setattr(sys, "argv", ["pq", *map(str, convert_args), "--recipe", "rtn"])
    with pytest.raises(RuntimeError, match="a bug"):
        main()
    assert "stopped: a bug" in (tmp_path / "out.log").read_text()


def test_usage_mistakes(pq: Call):
    assert pq("convert", "--model", "x")[0] == 2
    assert pq("nonsense")[0] == 2
    assert pq("eval", "x", "--seqlen", "1")[0] == 2
    code, _, err = pq("eval", "x", "--numerics", "fp3")
    assert (code, err) == (2, "pq: error: --numerics fp3: choose kernel or stock\n")


def test_version_and_help(pq: Call):
    assert pq("--version") == (0, f"pq {quantize.__version__}\n", "")
    for command in ([], ["convert"], ["eval"], ["recipe"]):
        code, out, _ = pq(*command, "--help")
        assert code == 0
        assert "Usage" in out


@pytest.mark.parametrize("name", ["./x", "/x/y", "~/x", "a/b/c", "a\\b"])
def test_paths_are_not_taken_for_hub_names(name: str):
    with pytest.raises(ModelError, match="no such folder"):
        common.local_model(name)


def test_the_installed_command(tiny: Maker, tmp_path: Path):
    """Once as a user runs it: another process, another folder, a relative output."""
    args = ["convert", "-m", str(tiny("llama")), "-r", "rtn.yaml", "-o", "out", "--json"]
    code = "from quantize.cli import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == "out"
    assert (tmp_path / "out" / "config.json").exists()
