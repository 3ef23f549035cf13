"""What the README and docs/ promise can be done."""
import re
import shlex
from pathlib import Path

import pytest

import seg
import train
from experiments import reproduce, runs

ROOT = Path(__file__).parent.parent
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
    links = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([\w./-]+\.\w+)\)", text)]
    assert len(links) > 6
    for page, link in links:
        assert ((ROOT if page == "README.md" else ROOT / "docs") / link).exists(), (page, link)


def test_the_snippet_to_copy_runs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    snippet = re.search(r"```python\n(import torch, torchvision\n.*?)```", README, re.S)[1]
    exec(snippet, {})
    assert Path("student.pt").exists()


def test_a_method_of_ones_own_trains(monkeypatch, capsys):
    snippet = re.search(r"```python\n(import sys, torch.nn.functional.*?)```", README, re.S)[1]
    monkeypatch.setattr(train, "METHODS", dict(train.METHODS))
    exec(snippet, {"__name__": "mine"})
    tiny = "--arch wrn10_1 --image-size 16 --per-class 2 --batch-size 16 --epochs 1 --device cpu"
    assert train.main(f"--method smoothing --alpha 0.2 {tiny}".split()) == 0 and "-alpha0.2-" in capsys.readouterr().out


@pytest.mark.parametrize("row", re.findall(r"\| `([\w/]+\.py)` \| (\d+) \|", README))
def test_files_are_as_long_as_the_readme_says(row):
    name, lines = row
    assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= int(lines) // 20


def test_results_of_the_readme_are_what_reproduce_prints(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert reproduce.main(["--measured"]) == 0
    printed = capsys.readouterr().out
    assert printed in README and "(1" in printed
