"""The documentation site builds, with the API reference from the docstrings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs the extra: dlms-engine[docs]")
pytest.importorskip("mkdocstrings", reason="needs the extra: dlms-engine[docs]")
pytest.importorskip("material", reason="needs the extra: dlms-engine[docs]")

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )  # fmt: skip


def plain(page: Path) -> str:
    """Text of a page, without markup."""
    text = re.sub(r"<(script|style).*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", "", text)).split())


@pytest.mark.slow
def test_site_builds_with_its_reference(tmp_path: Path) -> None:
    done = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (ROOT / "docs").rglob("*.md"):
        assert (tmp_path / "site" / page.relative_to(ROOT / "docs").with_suffix(".html")).exists()
    index = plain(tmp_path / "site" / "reference" / "index.html")
    # a signature, a sentence of a docstring, and what an argument means
    assert "dlms_engine.engine.sampler.Sampler" in index
    assert (
        "Wraps network(x, c_noise, **conditions) so that every solver sees the same thing." in index
    )
    assert "start noises to train on; None is the method's own default." in index
    assert "::: " not in index
    pictures = re.findall(r'<img[^>]+src="([^"]+)"', (tmp_path / "site/quality.html").read_text())
    assert pictures and all((tmp_path / "site" / name).exists() for name in pictures)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["::: dlms_engine.engine.sampler.NoSuchName", "[gone](no-such-page.md)"]
)
def test_a_name_or_page_that_is_gone_fails_the_build(fault: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n{fault}\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: {tmp_path / 'docs'}\n")
    done = build(config, tmp_path / "site")
    assert done.returncode != 0
    assert "NoSuchName" in done.stdout + done.stderr or "no-such-page" in done.stdout + done.stderr


def test_public_names_are_in_the_reference() -> None:
    """Every callable the package promises has its entry."""
    import dlms_engine

    asked = "\n".join(page.read_text() for page in REFERENCE.glob("*.md"))
    for name in dlms_engine.__all__:
        held = getattr(dlms_engine, name)
        if not callable(held) or name in ("BackendUnavailable",):
            continue
        where, real = held.__module__, held.__name__
        assert f"{where}.{real}" in asked or f"::: {where}\n" in asked, f"{where}.{real}"
