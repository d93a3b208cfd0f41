"""``dlms distill --config``, ``--show-config`` and the values of ``--set``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import complaint, run
from safetensors.torch import load_file

from dlms_engine.cli import common
from dlms_engine.learners.dlms.settings import DlmsSettings
from dlms_engine.learners.dlms.teacher import TeacherSettings
from dlms_engine.learners.registry import resolved
from dlms_engine.learners.settings import hints, split_settings
from dlms_engine.learners.training.coerce import coerce
from dlms_engine.learners.training.trainer import TrainerSettings

yaml = pytest.importorskip("yaml")
TINY = ("distill", "--model", "cli_model:tiny")
RUN = """
# a comment, and what YAML 1.1 reads as text: 1e-3
model: cli_model:tiny
method: dlms
nfe: 3
trajectories: 32
seed: 4
settings:
  batch: 16
  lr: 1e-3
  afs: off
  order: null
  ema_kimg: [0.5, 1]
  validation-samples: 4
  validation_steps: 8
  teacher: {interpolation: 1, keep_history: false}
"""


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The resolved configuration, from YAML."""
    capsys.readouterr()
    assert run("distill", *arguments, "--show-config") == 0, capsys.readouterr().err
    found: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return found


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(RUN, encoding="utf-8")
    return path


def test_the_file_says_options_and_settings(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys, "--config", file)
    settings = found["settings"]
    assert (found["nfe"], found["seed"], found["trajectories"]) == (3, 4, 32)
    assert (settings["lr"], settings["afs"], settings["order"]) == (1e-3, False, None)
    assert settings["ema_kimg"] == [0.5, 1.0] and settings["validation_samples"] == 4
    assert settings["teacher"] == {"interpolation": 1, "order": 3, "keep_history": False}


def test_a_byte_order_mark_is_no_part_of_the_file(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Editors on Windows begin UTF-8 files with one: the first key was unknown."""
    want = shown(capsys, "--config", file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().lstrip())
    assert shown(capsys, "--config", file) == want
    held = file.with_suffix(".json")
    held.write_bytes(b"\xef\xbb\xbf" + json.dumps(want).encode())
    assert shown(capsys, "--config", held) == want


def test_a_file_in_another_encoding_is_named(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_bytes("# für\nnfe: 3\n".encode("latin-1"))
    said = complaint(capsys, "distill", "--config", file)
    assert file.name in said and "no text in UTF-8" in said


def test_the_command_line_wins(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--nfe", 4, "--set", "lr=2e-3", "--set", "teacher.order=2")
    for arguments in (("--config", file, *more), (*more, "--config", file)):
        found = shown(capsys, *arguments)
        assert (found["nfe"], found["seed"]) == (4, 4)
        assert found["settings"]["lr"] == 2e-3 and found["settings"]["batch"] == 16
        teacher = {"interpolation": 1, "order": 2, "keep_history": False}
        assert found["settings"]["teacher"] == teacher


def test_a_budget_among_the_settings_of_the_command_line_wins(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file's won over ``--set budget``."""
    file.write_text("method: auto\nbudget: 2h\n", encoding="utf-8")
    assert shown(capsys, "--config", file)["settings"]["budget"] == "2h"
    said = ("--config", file, "--set", "budget=5m")
    assert shown(capsys, *said)["settings"]["budget"] == "5m"
    assert shown(capsys, *said, "--budget", "9m")["settings"]["budget"] == "9m"


@pytest.mark.parametrize("call", ["[height=512]", "height=512", "{height: 512}"])
def test_options_that_may_be_repeated_take_one_value_too(
    call: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One value was "Value must be an iterable"."""
    file.write_text(f"method: auto\npipeline: here\ncall: {call}\n", encoding="utf-8")
    assert shown(capsys, "--config", file)["call"] == ["height=512"]
    file.write_text(f"method: auto\nnfe: {call}\n", encoding="utf-8")  # planted: takes one number
    assert "nfe" in complaint(capsys, "distill", "--config", file)


def test_a_preset_gives_way_to_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys, "--config", file, "--preset", "dlms-lsun-bedroom256")
    assert found["settings"]["order"] is None and found["settings"]["grid"] == "time_uniform"
    assert found["settings"]["teacher"]["order"] == 2 and found["trajectories"] == 32
    assert "for method 'ld3', not 'dlms'" in complaint(
        capsys, "distill", "--config", file, "--preset", "ld3-cifar10"
    )


def test_what_was_resolved_does_the_same_again(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("distill", "--config", file, "--output", "a.safetensors", "--json") == 0
    written = json.loads(Path("a.config.json").read_text())
    assert "output" not in written and written["model"] == "cli_model:tiny"
    assert written == shown(capsys, "--config", file)
    Path("again.yaml").write_text(yaml.safe_dump(written))
    for number, config in enumerate(("a.config.json", "again.yaml")):
        output = f"{number}.safetensors"
        assert run("distill", "--config", config, "--output", output, "--json") == 0
        first, again = load_file("a.safetensors"), load_file(output)
        assert first.keys() == again.keys()
        assert all((first[key] == again[key]).all() for key in first)
    # planted: another seed is seen
    other = ("--seed", 5, "--output", "c.safetensors", "--json")
    assert run("distill", "--config", "a.config.json", *other) == 0
    assert any((first[k] != v).any() for k, v in load_file("c.safetensors").items())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nefs: 3", "unknown key 'nefs'; known keys: budget, cache, call"),
        ("config: x.yaml", "unknown key 'config'"),
        ("nfe: many", "Invalid value for '--nfe'"),
        ("nfe: 4.5", "Invalid value for '--nfe'"),
        ("- nfe", "holds list"),
        ("nfe: [", "cannot be understood"),
        ("nfe: !!python/object/apply:os.getcwd []", "cannot be understood"),
        ("settings: [lr]", "expected names with values"),
        ("settings: {colour: 1}", "unknown setting 'colour'; known settings:"),
        ("method: dlms\nsettings: {lr: fast}", "lr is 'fast', expected a number"),
        ("settings: {nfe: 3}", "use --nfe"),
        ("method: dlms\nsettings: {teacher: {ordr: 3}}", "unknown setting 'teacher_ordr'"),
        (
            "method: dlms\nsettings: {teacher: {order: 3}, teacher_order: 2}",
            "teacher_order is given twice",
        ),
        ("method: dlms\nsettings: {prediction: dta}", "prediction is 'dta'"),
    ],
)
def test_mistakes_in_the_file_are_named(
    text: str, words: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(text)
    assert words in complaint(capsys, "distill", "--config", file, "--output", "s.safetensors")
    assert [path.name for path in file.parent.iterdir()] == ["run.yaml"]
    assert "cannot be read" in complaint(capsys, "distill", "--config", "absent.yaml")


def test_without_pyyaml_json_works_and_yaml_says_how(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "yaml", None)
    assert "pip install 'dlms_engine[yaml]'" in complaint(capsys, "distill", "--config", file)
    Path("run.json").write_text(json.dumps({"nfe": 3, "model": "cli_model:tiny"}))
    assert run("distill", "--config", "run.json", "--show-config", "--json") == 0
    assert json.loads(capsys.readouterr().out)["nfe"] == 3


@pytest.mark.parametrize(
    ("pair", "name", "value"),
    [
        ("lr=1e-3", "lr", 1e-3),
        ("lr=.5", "lr", 0.5),
        ("lr=1", "lr", 1.0),
        ("batch=16", "batch", 16),
        ("batch=1.6e1", "batch", 16),
        ("afs=False", "afs", False),
        ("afs=off", "afs", False),
        ("order=None", "order", None),
        ("order=null", "order", None),
        ("order=none", "order", None),
        ("order=3", "order", 3),
        ("ema_kimg=[1,2]", "ema_kimg", (1.0, 2.0)),
        ("ema_kimg=0.5,1", "ema_kimg", (0.5, 1.0)),
        ("ema-kimg=(0.5, 1)", "ema_kimg", (0.5, 1.0)),
        ("ema_kimg=2", "ema_kimg", (2.0,)),
        ("ema_kimg=[]", "ema_kimg", ()),
        ("grid=[80, 2, 0.002]", "grid", [80, 2, 0.002]),
        ("grid=logsnr", "grid", "logsnr"),
        ("teacher.order=2", "teacher", TeacherSettings(order=2)),
        ("teacher_keep_history=false", "teacher", TeacherSettings(keep_history=False)),
        ('teacher={"order": 1}', "teacher", TeacherSettings(order=1)),
    ],
)
def test_set_understands(pair: str, name: str, value: Any) -> None:
    own, shared = split_settings(
        common.parse_settings([pair]), DlmsSettings, TrainerSettings,
        nested={"teacher": TeacherSettings},
    )  # fmt: skip
    found = {**own, **shared}
    assert found == {name: value} and type(found[name]) is type(value)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("lr=fast", "lr is 'fast', expected a number"),
        ("lr=true", "lr is True, expected a number"),
        ("batch=1.5", "batch is 1.5, expected a whole number"),
        ("afs=maybe", "afs is 'maybe', expected true or false"),
        ("order=two", "order is 'two', expected a whole number or None"),
        ("ema_kimg=a,b", "ema_kimg is 'a,b', expected a list of: a number"),
        ("teacher=3", "teacher is 3, expected"),
        ("init=euler", "init is 'euler', expected one of"),
        ("last_step=lpips", "last_step is 'lpips', expected one of"),
        ("score=fid", "score is 'fid', expected one of"),
    ],
)
def test_set_refuses(pair: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolved("dlms", 4, common.parse_settings([pair]))
    assert words in str(caught.value)


def test_every_field_of_every_method_has_a_type_that_can_be_read() -> None:
    """The default of each setting, as text, comes back as itself."""
    from dlms_engine.learners import LEARNERS

    checked = 0
    for method in LEARNERS:
        for kind in LEARNERS[method].kinds:
            default = kind()
            for name, hint in hints(kind).items():
                value = getattr(default, name)
                if isinstance(value, TeacherSettings):
                    continue
                plain = list(value) if isinstance(value, tuple) else value
                text = plain if isinstance(plain, str) else json.dumps(plain)
                read = common.parse_settings([f"{name}={text}"])[name]
                assert coerce(name, read, hint) == value, (method, name)
                checked += 1
    assert checked > 100
