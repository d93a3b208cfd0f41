"""README and the pages for users run as they stand, Python and ``dlms`` lines, on tiny settings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from marks import slow
from torch import Tensor

from dlms_engine import Denoiser, processes
from dlms_engine.cli.app import app

ROOT = Path(__file__).parent.parent
SHAPE = (3, 8, 8)
BUDGET = "600calls"
PAGES = (
    "README.md", "docs/your_model.md", "docs/models.md", "docs/production.md", "docs/benchmarks.md"
)  # fmt: skip
# What makes a command of the pages quick; the words of the page come first.
QUICK = {
    "recommend": ("--effort", "lean"),
    "distill": ("--budget", BUDGET),
    "sample": ("--batch", "8"),
    "evaluate": ("--samples", "8", "--exact-nfe", "12", "--accurate-nfe", "8", "--folder", "kept"),
}
# Commands that other tests run on tiny settings, or that need what a test has not: only their options
# are looked at, by tests/cli/test_cli.py.
ELSEWHERE = ("bench", "doctor", "compare")
MINE = """
import torch
from dlms_engine import Denoiser, processes
from dlms_engine.cli.app import app

def network(x, sigma):
    s = sigma.reshape(-1, 1, 1, 1) ** 2
    return (0.25 * x + s * torch.tanh(x / (0.25 + s))) / (0.25 + s)

def model():
    return Denoiser(network, processes.EDM(), prediction="data"), (3, 8, 8)
"""


def network(x: Tensor, sigma: Tensor) -> Tensor:
    s = sigma.reshape(-1, 1, 1, 1) ** 2
    return (0.25 * x + s * torch.tanh(x / (0.25 + s))) / (0.25 + s)


def labelled(x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
    return network(x, sigma) * (1 + 0.01 * class_labels.reshape(-1, 1, 1, 1))


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)


def commands(page: str) -> list[list[str]]:
    """``dlms`` lines of a page as words, those with --pipeline left out."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = re.findall(r"^    dlms (.+)$", text, flags=re.M)
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if "--pipeline" not in words]


def small(code: str) -> str:
    """The budgets of a page's Python, cut to a test's."""
    return code.replace('budget="1m"', f'budget="{BUDGET}"')


def test_the_ten_lines_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks("README.md")[0]
    statements = [line for line in code.splitlines() if line.strip()]
    assert len(statements) <= 10 and 'budget="1m"' in code
    names: dict[str, Any] = {}
    exec(compile(small(code), "README.md", "exec"), names)
    assert names["samples"].shape == (4, 3, 8, 8) and names["solver"].nfe == 5
    assert "handcrafted solvers of 5 evaluations" in capsys.readouterr().out
    assert (tmp_path / "five.safetensors").is_file()


@pytest.mark.parametrize(
    "page", [slow("docs/your_model.md"), slow("docs/models.md"), "docs/production.md"]
)
def test_the_python_of_the_pages(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dlms_engine import save
    from dlms_engine.engine.sampler import GRAPHS
    from dlms_engine.solvers.registry import handcrafted_table

    monkeypatch.chdir(tmp_path)
    for name in ("max_bytes", "max_entries", "verify"):  # the page sets them; they are put back
        monkeypatch.setattr(GRAPHS, name, getattr(GRAPHS, name))
    process = processes.EDM()
    save("five.safetensors", handcrafted_table(process, "ipndm", 5))
    names: dict[str, Any] = {
        "denoiser": Denoiser(network, process, prediction="data"),
        "network": lambda x, _noise: 0.1 * x,
        "labelled": labelled,
        "shape": SHAPE,
        "budget": BUDGET,
        "effort": "lean",
    }
    own = names["denoiser"]
    found = blocks(page)
    assert found
    for block in found:
        exec(compile(block, page, "exec"), names)
        if "edm" in block:  # the page's first wrapping is of another network
            names["denoiser"] = own


@pytest.mark.slow
def test_the_commands_of_the_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the pages, in one folder, as a reader would type them."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    done = 0
    for page in PAGES:
        for words in commands(page):
            if words[0] in ELSEWHERE or "--record" in words:
                continue
            status = run(*words, *QUICK.get(words[0], ()))
            assert status == 0, f"{page}: dlms {' '.join(words)}: {capsys.readouterr().err}"
            done += 1
    assert done >= 9
    assert (tmp_path / "mine.safetensors").is_file() and (
        tmp_path / "samples.safetensors"
    ).is_file()


def test_every_command_has_a_part_of_the_page() -> None:
    """``dlms convert`` had none."""
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    named = {c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands}
    assert len(named) >= 10
    assert {name for name in named if f"\n## {name}\n" not in page} == set()


def test_pages_say_nothing_of_what_has_not_been_done() -> None:
    words = re.compile(
        r"not (yet )?(been )?measured|has been at hand|not yet been|to be done|\bTODO\b", re.I
    )
    planted = "No GPU has been at hand yet."
    assert words.search(planted)
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        hit = words.search(path.read_text(encoding="utf-8"))
        assert hit is None, f"{path.name}: {hit}"


def files_that_are_not_there(text: str, known: set[str]) -> list[str]:
    """Source files that ``text`` names in code and that are no end of a path of ``known``."""
    named = re.findall(r"`([\w./-]+\.(?:py|cpp|h|cu|cuh|sh))`", text)
    return [
        name
        for name in named
        if name != "mine.py" and not any(f"/{path}".endswith(f"/{name}") for path in known)
    ]


def test_source_files_named_on_pages_exist() -> None:
    """`learners/adjoint.py` and `tests/test_export.py` had moved, the pages had not."""
    folders = ("python", "tests", "kernels", "csrc", "scripts", "examples", "benchmarks", ".github")
    known = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    assert files_that_are_not_there("`learners/adjoint.py`, `engine/adjoint.py`", known) == [
        "learners/adjoint.py"
    ]
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        gone = files_that_are_not_there(page.read_text(encoding="utf-8"), known)
        assert gone == [], f"{page.name} names {gone}"
