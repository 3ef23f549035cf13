"""The paper's tables: its figures, ours as runs hold them, and the commands of what nobody measured."""

import json
from pathlib import Path

import pytest

import seg
import train
from experiments import figures, reproduce
from experiments.reproduce import TABLES, Table


def made_up(place, options, seed, metrics, epochs=200, of=200, script=train):
    """A run as it lies on the disk, without its training; the metrics are its last epoch's."""
    args = reproduce.resolved(script, tuple(f"{options} --seed {seed}".split()))
    folder = Path(place, f"any-{len(list(Path('.').rglob('args.json')))}")
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(args | dict(epochs=of)))
    log = [dict.fromkeys(metrics, 5.0)] * (epochs - 1) + [metrics]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    return folder


def printed(capsys, *words):
    assert reproduce.main(words) == 0
    return capsys.readouterr().out


def test_every_row_has_a_figure_a_column_and_every_command_parses_to_a_run_of_its_own():
    assert all(len(row) == len(table.columns) for table in TABLES.values() for *_, row in table.rows)
    scripts = {train.__file__: train, seg.__file__: seg}
    commands = [c for c in reproduce.commands(TABLES.values(), {}, []) if c[c.index("--seed") + 1] == "0"]
    folders = [reproduce.resolved(scripts[script], tuple(words))["output"] for script, *words in commands]
    assert len(set(folders)) == len(folders) > 150
    assert "runs/cifar100-wrn16_2-frskd-per-class50-weight-decay0.0005-s0" in folders


@pytest.mark.parametrize("table, label, column, figure", [
    ("1", "FRSKD+SLA", 2, "82.04 ± 0.16"), ("2", "CS-KD", 0, "64.34 ± 0.08"), ("3", "FRSKD", 3, "92.11"),
    ("4", "FRSKD", 1, "83.88"), ("5", "OD+SKD", 3, "54.83 ± 2.63"), ("6", "BiFPNc, 128", 0, "71.70 ± 0.19"),
    ("7", "Overhaul", 5, "47.06 ± 0.26"), ("8", "FRSKD + CutMix", 4, "72.81 ± 0.23"),
    ("figure4", "alpha 1, beta 200", 1, "61.74 ± 0.67"), ("4", "FRSKD, clean (ours)", 0, ""),
])  # fmt: skip
def test_the_papers_figures(table, label, column, figure):
    assert [cell.paper for cell in reproduce.cells(TABLES[table], {})[column] if cell.row == label] == [figure]


def test_ours_are_the_last_epochs_of_finished_runs_each_seed_once_those_by_amp_marked(capsys):
    options = "--dataset cifar100 --arch wrn16_2"
    made_up("runs", options, 0, dict(top1=73.0))
    made_up("results", options, 0, dict(top1=10.0))  # counts once
    made_up("results", f"{options} --amp", 0, dict(top1=20.0))
    made_up("results", f"{options} --amp", 1, dict(top1=74.0))
    made_up("runs", options, 2, dict(top1=99.0), epochs=199)  # unfinished
    made_up("runs", f"{options} --width 3", 2, dict(top1=98.0))  # another experiment
    made_up("results", "--dataset imagenet", 0, dict(top1=70.5, top5=89.5), 90, 90)
    made_up("results", "--dataset voc", 1, dict(miou=61.25), 60, 60, seg)
    out = printed(capsys)
    assert out.count("73.27 ± 0.45 / 73.50 ± 0.71 (2, 1a) ") == 3  # Tables 1 and 6, Figure 4
    assert "70.17 / 70.50 (1)" in out and "89.78 / 89.50 (1)" in out and "| - / 61.25 (1) " in out
    out = printed(capsys, "--measured", "1")  # of results/ alone
    assert "73.27 ± 0.45 / 42.00 ± 45.25 (2, 1a) " in out and "Baseline" not in out
    made_up("results", "--dataset imagenet", 1, dict(top1=70.5, top5=89.5), 90, 90)
    assert printed(capsys, "--measured", "3").count(" --seed 0`, commit ; `--seed 1`, commit ") == 1  # of both metrics


def test_commands_are_of_what_lacks_a_teachers_before_its_students(capsys):
    teacher = "--dataset cifar100 --arch resnet34 --method baseline"
    for seed in reproduce.SEEDS:
        made_up("runs", "--dataset cifar100", seed, dict(top1=77.0))
    folder = made_up("runs", teacher, 0, dict(top1=78.0))  # without weights, as results/ has it
    lines = printed(capsys, "7", "--commands", "--device", "cpu").splitlines()
    assert not any("cifar100 --seed" in line for line in lines)  # FRSKD
    first = lines.index(f"python train.py {teacher} --seed 0 --device cpu")
    weights = "--feature-loss od --teacher-checkpoint runs/cifar100-resnet34-baseline-s0/student.pt --seed 2"
    assert first < lines.index(f"python train.py --dataset cifar100 --method kd {weights} --device cpu")
    (folder / "student.pt").touch()
    out = printed(capsys, "7", "--commands")
    assert f"{teacher} --seed" not in out and f"--teacher-checkpoint {folder}/student.pt --seed 0" in out


def test_options_of_every_command_are_no_other_experiment(capsys):
    command, *_ = printed(capsys, "--commands", "--data-dir", "a b", "--amp", "2", "--workers", "0").splitlines()
    assert command.endswith(" --seed 0 --data-dir 'a b' --workers 0 --amp")
    assert pytest.raises(SystemExit, reproduce.main, ["1", "--commands", "--lr", "1"]).value.code == 2
    assert "unrecognized arguments: --lr" in capsys.readouterr().err


def test_run_continues_what_was_begun_and_ends_at_an_error_with_its_status(monkeypatch, capfd):
    """The first of two runs has a checkpoint, which cannot be read."""
    table = Table("Two runs", ["--dataset shapes --arch wrn10_1"], [("A", "--method baseline", "?"), ("B", "", "?")])
    monkeypatch.setattr(reproduce, "TABLES", {"1": table})
    checkpoint = Path("runs/shapes-wrn10_1-baseline-s0/last.pt")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    assert pytest.raises(SystemExit, reproduce.main, ["--run"]).value.code == 2
    assert f"{checkpoint} is no checkpoint" in capfd.readouterr().err and len(list(Path("runs").iterdir())) == 1


def test_a_table_is_drawn():
    made_up("results", "--dataset mit67 --alpha 3 --beta 50", 0, dict(top1=60.0))
    figure = figures.draw_table("f.png", reproduce.cells(TABLES["figure4"], reproduce.last_epochs(["results"])))
    assert [ax.get_title() for ax in figure.axes] == ["cifar100 wrn16_2", "mit67 resnet18"] and Path("f.png").exists()
    points = [tuple(line.get_xydata()[0]) for line in figure.axes[1].lines if len(line.get_xydata()) == 1]
    assert points == [(61.74, 2 - 0.15), (60.0, 8 + 0.15)]
