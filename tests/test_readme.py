"""What the README and docs/ promise can be done."""
import re
import shlex
from pathlib import Path

import pytest

import seg
import train
from conftest import ROOT, TINY, main
from experiments import reproduce, runs

README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}


def test_every_command_is_understood():
    """Of both scripts, in all pages; DIR, FILE and NAME stand for the reader's own."""
    started = r"(?:python|torchrun --nproc-per-node=\d+)(?: --max-restarts=\d+)? ((?:train|seg)\.py[^#`|\n]*)"
    commands = re.findall(started, "\n".join(PAGES.values()))
    assert len(commands) > 15
    for script, *words in (shlex.split(command.replace("NAME", "cub200")) for command in commands):
        module = {"train.py": train, "seg.py": seg}[script]
        given = vars(module.parser().parse_args([word for word in words if word not in ("...", "…")]))
        if not given.keys() & {"resume", "eval", "table", "cost", "help"} and given.get("dataset") != "folder":
            runs.resolved(module.parser(), module.recipe, given)


def test_every_file_that_is_linked_is_there():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([\w./-]+\.\w+)\)", text):
            assert ((ROOT if page == "README.md" else ROOT / "docs") / link).exists(), (page, link)


def test_the_snippet_to_copy_runs():
    exec(re.search(r"```python\n(import torch, torchvision\n.*?)```", README, re.S)[1], {})
    assert Path("student.pt").exists()


def test_a_method_of_ones_own_trains(quick, refused, capsys):
    snippet = re.search(r"```python\n(import sys, torch.nn.functional.*?)```", README, re.S)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "METHODS", dict(train.METHODS))
        exec(snippet, {"__name__": "mine"})
        assert main(train, TINY, "--method smoothing --alpha 0.2 --epochs 1 --output mine") == 0
    assert "-alpha0.2-" in capsys.readouterr().out
    assert refused(train, "--eval mine/last.pt").startswith("--method smoothing is none of this script's")


@pytest.mark.parametrize("name, lines", re.findall(r"\| `([\w/]+\.py)` \| (\d+) \|", README))
def test_files_are_as_long_as_the_readme_says(name, lines):
    assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= int(lines) // 20


def test_results_of_the_readme_are_what_reproduce_prints(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert reproduce.main(["--measured"]) == 0
    printed = capsys.readouterr().out
    assert printed in README and "(1" in printed
