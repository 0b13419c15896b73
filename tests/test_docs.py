"""The documentation's code runs."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

import ssljax
from ssljax.cli import main
from ssljax.listing import methods_markdown
from ssljax.summary import figures

ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def test_add_a_method(tmp_path):
    method, config = blocks("docs/add-a-method.md", "python")
    assert len(method.splitlines()) + len(config.splitlines()) < 120
    (tmp_path / "byol.py").write_text(method)
    (tmp_path / "byol_config.py").write_text(config)
    workdir = tmp_path / "run"
    small = ["steps=40", "batch_size=32", "method.encoder.channels=(8, 8, 16)", "log_every=20"]
    arguments = ["--config", str(tmp_path / "byol_config.py"), "--workdir", str(workdir), "--no-report"]
    assert main(["train", *arguments, *small]) == 0
    (knn,) = [f for f in figures([workdir]) if f.name == "frozen/knn20_top1"]
    assert knn.trained > 0.2  # ten classes
    images = np.zeros((3, 16, 16, 3), np.uint8)
    types = {"BYOL": sys.modules["byol"].BYOL}
    assert ssljax.load(workdir, types=types).features(images).shape == (3, 16)


def test_readme_shell_blocks_come_first_and_are_one_line():
    first, second = blocks("README.md", "(?:sh|bash|shell)")[:2]
    assert first.strip().count("\n") == second.strip().count("\n") == 0
    assert "ssljax train" in first
    assert "pytest" in second


@pytest.mark.parametrize("code", blocks("README.md", "python") if (ROOT / "README.md").exists() else [])
def test_readme_code_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_readme_lists_the_methods():
    assert methods_markdown(ROOT / "configs") in (ROOT / "README.md").read_text()
