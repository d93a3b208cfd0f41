"""``--model module:function`` of a newcomer: every mistake is one line that says what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import complaint

from dlms_engine.cli.model import load_model
from dlms_engine.cli.own_model import own_model

MODELS = """
import types
import torch
import dlms_engine as dlms

SHAPE = (3, 4, 4)
five = 5

def network(x, c_noise):
    return x * 0.5

def denoiser(network=network, process=None, prediction="data"):
    return dlms.Denoiser(network, process or dlms.processes.EDM(), prediction=prediction)

def needs(a): return a
def raises(): raise KeyError("weights")
def only(): return denoiser()
def four(): return denoiser(), SHAPE, None, 5
def swapped(): return SHAPE, denoiser()
def raw(): return network, SHAPE
def held(): return types.SimpleNamespace(denoiser=denoiser(), shape=SHAPE)
def flat(): return denoiser(), 48
def text(): return denoiser(), "3x4"
def fraction(): return denoiser(), (3, 4.5)
def wrong(): return denoiser(prediction="noize"), SHAPE
def named(): return denoiser(process="EDM"), SHAPE
def divides(): return denoiser(lambda x, c_noise: x / (1 // 0)), SHAPE

def labelled(x, c_noise, class_labels): return x * 0.5
def no_labels(): return denoiser(labelled), SHAPE
def other_labels(): return denoiser(labelled), SHAPE, {"labels": torch.arange(3)}
def empty(): return denoiser(labelled), SHAPE, {"class_labels": torch.arange(0)}
def labels(): return denoiser(labelled), SHAPE, {"class_labels": torch.arange(3)}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_models.py").write_text(MODELS)
    (tmp_path / "own_syntax.py").write_text("def model(:\n")
    (tmp_path / "own_import.py").write_text("import not_there_at_all\n")
    (tmp_path / "own_raise.py").write_text("\nraise RuntimeError('no weights')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("no_such_module:model", "no module 'no_such_module': neither a file no_such_module.py in"),
        ("own_models:absent", "'absent' is no function in"),
        ("own_models:five", "'five' is no function but int in"),
        ("own_models", "name the function that returns the model: own_models:model"),
        ("own_models.py", "name the function that returns the model: own_models:model"),
        ("own_models.py:raw", "try --model own_models:raw"),
        ("./own_models:raw", "try --model own_models:raw"),
        ("sub/own_models.py:raw", "try --model own_models:raw in the folder sub"),
        (":raw", "expected module:function"),
        ("own_syntax:model", "importing own_syntax raised SyntaxError"),
        ("own_import:model", "importing own_import raised ModuleNotFoundError: No module named"),
        ("own_raise:model", "RuntimeError: no weights (own_raise.py, line 2)"),
        ("own_models:needs", "TypeError: needs() missing 1 required"),
        ("own_models:raises", "KeyError: 'weights' (own_models.py, line"),
        ("own_models:only", "returned Denoiser, expected (denoiser, shape)"),
        ("own_models:four", "returned a tuple of 4, expected (denoiser, shape)"),
        ("own_models:swapped", "returned tuple first, expected (denoiser, shape)"),
        ("own_models:raw", "wrap the network, dlms_engine.Denoiser("),
        ("own_models:held", "returned SimpleNamespace, expected (denoiser, shape)"),
        ("own_models:flat", "returned the shape 48, expected that of one sample"),
        ("own_models:text", "returned the shape '3x4', expected that of one sample"),
        ("own_models:fraction", "a size in shape is 4.5, expected an integer"),
        ("own_models:wrong", "prediction is 'noize', expected one of"),
        ("own_models:named", "process is 'EDM', expected one of dlms_engine.processes"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(spec: str, said: str) -> None:
    with pytest.raises(ValueError) as refusal:
        load_model(spec)
    assert said in str(refusal.value)
    assert spec.partition(":")[0] in str(refusal.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("own_models:no_labels", "the network needs class_labels beside x and c_noise"),
        ("own_models:other_labels", "the network needs class_labels beside x and c_noise"),
        ("own_models:empty", "conditions have class_labels [0], expected a row a sample"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "recommend"])
def test_what_the_network_cannot_take_is_found_before_the_work(
    spec: str, said: str, command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = ("--output", tmp_path / "a.safetensors")
    assert said in complaint(capsys, command, "--model", spec, "--nfe", 3, *out)


def test_an_error_in_the_network_names_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = complaint(capsys, "sample", "--model", "own_models:divides", "--seeds", "0")
    line = MODELS.splitlines().index(
        next(text for text in MODELS.splitlines() if text.startswith("def divides"))
    )
    assert said == (
        "dlms: ZeroDivisionError: integer division or modulo by zero "
        f"(own_models.py, line {line + 1}; --debug shows where)\n"
    )


def test_a_model_with_conditions_is_taken() -> None:
    denoiser, shape, conditions = own_model("own_models:labels")
    assert shape == (3, 4, 4) and list(conditions) == ["class_labels"]
    assert callable(denoiser)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("distill", "--output", "a.safetensors", "--plot", "x.foo"),
            "plot is x.foo, expected a name",
        ),
        (("distill", "--output", "a.safetensors", "--plot", "x.png"), "plots need matplotlib"),
        (("demo", "--folder", "out"), "plots need matplotlib"),
        (("sample", "--output", "x.png"), "pictures are written by pillow"),
        (("evaluate", "--record"), "plots need matplotlib"),
    ],
)
def test_what_draws_is_looked_for_before_the_work(
    words: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A demo without matplotlib ended after its minutes of work."""
    if "need" not in said:
        pytest.importorskip("matplotlib")
    if "x.foo" not in words:
        for name in ("matplotlib.backends.backend_agg", "PIL"):
            monkeypatch.setitem(sys.modules, name, None)
    assert said in complaint(capsys, *words, "--model", "own_models:raises")


def test_a_range_of_seeds_that_no_memory_holds(capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, "sample", "--model", "own_models:raw", "--seeds", "0-99999999999")
    assert "seeds is '0-99999999999', expected at most 10,000,000 numbers" in said


def test_a_wrong_value_of_an_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Some versions of typer say what was expected alone."""
    for words, value in ((("--nfe", 0), " 0"), (("--nfe=-1",), " -1"), (("--nfe", "x"), "x")):
        assert value in complaint(capsys, "sample", "--model", "own_models:labels", *words)
