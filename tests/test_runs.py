"""A run: it trains, dies, goes on, is evaluated; its options, name, files, processes; what a user gets wrong."""

import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import frskd
import seg
import train
from conftest import ROOT, TINY, log_of, main, numbers, resolved, same, shown, together, weights
from experiments import runs

pytestmark = pytest.mark.usefixtures("quick")
EVAL = "--arch wrn10_1 --image-size 16 --device cpu --eval"


def before_step(n, function, update=runs.Meter.update):
    """Meter.update that calls a function in the n-th step from now on."""
    steps = iter(range(1, 1000))
    return lambda *args: function() if next(steps) == n else update(*args)


def interrupted(step, *words, signum=signal.SIGINT):
    """-> the exit status of train.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Meter, "update", before_step(step, partial(signal.raise_signal, signum)))
        return main(train, *words)


# ------------------------------------------------------------------------------------------- the life of a run

FRSKD = "ce ce_t kd feat"
LIVES = {  # options: the terms that are logged
    "--method baseline": "ce",
    "--method baseline --arch squeezenet1_1 --blocks features.12 --image-size 32": "ce",  # which has dropout
    "": FRSKD,
    "--sla --feature-loss od": "ce ce_t ce_joint ce_joint_t kd kd_joint kd_joint_t feat",
    "--feature-loss fitnet --mixup": FRSKD,
    "--channels 24 --cutmix --beta 0": "ce ce_t kd",
    "--method one": "ce ce_aux ce_e kd",
    "--method ddgsd --cutmix": "ce kd feat",
    "--method byot": "ce ce_aux kd feat",
    "--method sad": "ce feat",
    "--method cskd": "ce kd",
    "--method slasd": "ce ce_joint kd",
    "--method kd --feature-loss fitnet": "ce kd feat",
}


@pytest.mark.parametrize("options", LIVES)
def test_life_of_a_run(options, capsys):
    """Interrupted in the second epoch and resumed it ends as the whole run, bit for bit; its files are evaluated; what
    training added, a pretrained teacher too, is in the checkpoint, not in student.pt."""
    words, teacher = f"{TINY} --epochs 2 {options}", Path("teacher.pt")
    if "kd" in options.split():
        torch.save(frskd.WideResNet(16, 1, 8).state_dict(), teacher)
        words += " --teacher-arch wrn16_1 --teacher-checkpoint teacher.pt"
    assert main(train, words, "--output whole") == 0
    assert interrupted(3, words, "--output cut") == 130
    teacher.unlink(missing_ok=True)
    capsys.readouterr()
    assert len(log_of("cut")) == 1 and main(train, "--resume cut") == 0
    assert same("whole", "cut")
    (_, last), terms = log_of("cut"), {"ce", "kd", "feat"}
    assert {key for key in last if key.partition("_")[0] in terms} == set(LIVES[options].split())
    out, line = capsys.readouterr().out, f"top-1 {last['top1']:.2f} top-5 {last['top5']:.2f}"
    assert f"seed 0: {line} (last epoch; best " in out.splitlines()[-1]
    net = train.network(resolved(train, words).arch, 16, 8)
    net.load_state_dict(torch.load("cut/student.pt", weights_only=True))
    for file in ("last.pt", "student.pt"):
        assert main(train, f"--eval cut/{file}") == 0
        first, *teachers = capsys.readouterr().out.splitlines()
        assert first.endswith(f"seed 0: {line} (on test, cut/{file})")
        assert len(teachers) == ("ce_t" in LIVES[options].split() and file == "last.pt")
        assert all(re.match(r"its self-teacher: top-1 \d+\.\d\d top-5 \d", teacher) for teacher in teachers)


def test_a_run_leaves_its_files_and_says_what_it_was(run):
    assert {path.name for path in run.iterdir()} == {"args.json", "log.jsonl", "last.pt", "student.pt"}
    keys = "epoch lr ce ce_t kd feat train_top1 top1 top5 images_per_s seconds"
    assert [list(entry) for entry in log_of(run)] == [keys.split()] * 2
    args = json.loads((run / "args.json").read_text())
    assert args["command"] == f"python train.py {TINY} --epochs 2 --output {run}"
    assert args["classes"][0] == "cross" and args["torch"] == torch.__version__ and args["processes"] == 1
    assert ("commit" in args) == (ROOT / ".git").exists()
    (group,) = torch.load(run / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (1e-4, 0.9, False)


def test_resume_may_add_epochs_and_move_but_change_nothing_else(run, refused):
    """Evaluated at every other epoch and at the last one, though the run was at each."""
    shutil.copytree(run, "moved")
    assert main(train, "--resume moved --epochs 5 --eval-every 2 --workers 0") == 0
    log = log_of("moved")
    assert numbers("moved")[:2] == numbers(run) and [entry["lr"] for entry in log] == [0.02] + 4 * [0.002]
    assert ["top1" in entry for entry in log] == [True, True, False, True, True]
    for option in ("--seed 1", "--epochs 4", "--amp"):
        assert refused(train, "--resume moved", option).startswith(f"{option.split()[0]} ")
    assert main(train, TINY, "--epochs 5 --resume --output moved") == 0  # the same command again, as torchrun restarts
    assert main(train, TINY, "--epochs 1 --overwrite --output moved") == 0 and len(log_of("moved")) == 1


@pytest.mark.parametrize("n", [1, 5, 6, 8])
def test_killed_between_its_files_a_run_loses_an_epoch_at_most(n, run, child):
    """By SIGKILL, before the n-th file is renamed: args.json, log; log, student.pt, last.pt of an epoch."""
    words = f"{TINY} --epochs 2 --output cut"
    process = child(words, prepare=partial(die_before_rename, n))
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(list(Path("cut").glob("*.partial"))) == 1
    for file in Path("cut").glob("*.pt"):
        torch.load(file, weights_only=True)
    assert main(train, words, "--resume") == 0
    assert same(run, "cut") and not list(Path("cut").glob("*.partial"))
    assert Path("cut/student.pt").read_bytes() == (run / "student.pt").read_bytes()


def die_before_rename(n, rename=os.replace):
    times = iter(range(1, 100))
    os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL) if next(times) == n else rename(*args)


@pytest.mark.parametrize("step, signum, status", [(1, signal.SIGINT, 130), (3, signal.SIGTERM, 143)])
def test_the_printed_command_goes_on(step, signum, status, monkeypatch, capsys):
    """From the last checkpoint, or afresh where there is none yet; also where stderr is closed."""
    monkeypatch.setattr(sys, "argv", ["my code/train.py"])
    assert interrupted(step, TINY, "--epochs 2 --overwrite --output", Path("a b"), signum=signum) == status
    command = shown(capsys.readouterr().err)[-1].removeprefix("train.py: stopped; continue with: python ")
    script, *words = shlex.split(command)
    assert script == "my code/train.py" and "--overwrite" not in words
    monkeypatch.setattr(sys, "stderr", None)
    assert train.main(words) == 0
    assert ("epoch 1/2" in capsys.readouterr().out) == (step == 1) and len(log_of("a b")) == 2


# ------------------------------------------------------------------------------------------- options and names

OTHER = dict(  # values that differ from every recipe's, where a parser cannot tell
    arch="wrn10_1", blocks="a --arch alexnet", milestones="1", device="cuda:1", teacher_arch="wrn10_1", weights="x",
    mixup="0.5", cutmix="0.5", attention="1", predictions="1", dataset="cifar100", channels="24", clip_value="3",
)  # fmt: skip
FREE = """overwrite resume eval table curves cost data_dir download workers device compile output eval_every
attention predictions teacher_checkpoint""".split()  # no part of the experiment


@pytest.mark.parametrize("script", [train, seg], ids=["train", "seg"])
def test_a_run_is_named_by_what_changes_its_numbers(script):
    """Every option of the parser, at a value that is not the recipe's, is in the name, in the folder's, or FREE."""
    other = OTHER if script is train else OTHER | dict(dataset="voc", arch="d1")
    for action in script.parser()._actions:
        key, flag = action.dest, action.option_strings[-1]
        if key in ("method", "help"):
            continue
        takes = [name for name, make in script.METHODS.items() if key in runs.keywords(make)]
        method = "kd" if key == "teacher_arch" else "frskd" if "frskd" in takes or not takes else takes[0]
        context = f"--method {method}" + " --teacher-checkpoint y" * (method == "kd")
        before = resolved(script, context)
        value = getattr(before, key, None)
        if action.nargs == 0:
            word = ""
        elif key in other:
            word = other[key]
        elif action.choices:
            word = next(choice for choice in action.choices if choice not in (value, "none"))
        else:
            word = "x" if action.type in (runs.path, None) else str(action.type(str(value or 1)) + 1)
        after = resolved(script, f"{context} {flag} {word}")
        if key in ("dataset", "arch", "seed"):
            assert after.name == before.name and after.output != before.output, key
        else:
            assert (after.name != before.name) == (key not in FREE) == (key not in runs.FREE), key
            assert (f"-{key.replace('_', '-')}" in after.name) == (key not in FREE), key


def test_names():
    """Values of the recipe are in none."""
    assert resolved(train, "--alpha 2 --beta 100 --epochs 10 --seed 3").output == "runs/shapes-wrn16_2-frskd-s3"
    assert resolved(train, "--sla --beta 0 --milestones 5,10").name == "frskd-beta0-sla-milestones5,10"
    assert resolved(train, "--method baseline --image-size 72 --mixup").name == "baseline-image-size72-mixup0.3"


def test_help_shows_the_values_of_the_recipe(capsys):
    with pytest.raises(SystemExit) as stop:
        main(train, "--dataset cub200 --method kd --feature-loss at --help")
    said = " ".join(capsys.readouterr().out.split())
    assert not stop.value.code and "FRSKD\\F (1000.0)" in said and "resized crops (224)" in said


# ------------------------------------------------------------------------------- every mistake is one line and 2

MISTAKES = [
    ("--epoch 5", "unrecognized arguments: --epoch 5"),
    ("--temperature 0", "argument --temperature: 0 is not above 0"),
    ("--mixup --cutmix", "argument --cutmix: not allowed with argument --mixup"),
    ("--sla --mixup", "mixed labels do not go with --sla"),
    ("--method one --beta 3", "--beta is no option of --method one, which takes --alpha --temperature"),
    ("--method kd", "--method kd needs --teacher-checkpoint FILE"),
    ("--feature-loss none", "--feature-loss none is kd's"),
    ("--arch resnet19", "--arch resnet19: neither"),
    ("--arch densenet121", "--arch densenet121 needs --blocks"),
    ("--arch resnet18 --blocks layer1", "has its own blocks: leave --blocks out"),
    ("--arch wrn17_1", "--arch wrn17_1 at 32 px: "),
    ("--device cuda:99", "--device cuda:99: "),
    ("--curves a.png", "--curves draws the runs of --table DIR: name it"),
    ("--table /nowhere", "no finished run of train.py in or below it"),
    ("--per-class 1", "--batch-size 16 is larger than the training set of 8 images"),
    ("--arch resnet18 --image-size 8 --batch-size 1 --method baseline", "take a larger --batch-size or --image-size"),
    ("--output {run}", "{run} already holds a run: continue it with --resume, replace it with --overwrite, or"),
    ("--resume {run} --beta 3", "--beta 3 differs from the run's 100: leave it out"),
    ("--resume {run}/student.pt", "{run}/student.pt is not the last.pt of a run"),
    ("--eval {run}/student.pt --arch wrn16_1", "--arch wrn16_1 differs from the run's wrn10_1"),
    ("seg --eval {run}/student.pt", "{run}/student.pt is of a run of train.py"),
    ("seg --batch-size 4 --accumulate 3", "--batch-size 4 is no multiple of --accumulate times processes, 3"),
    ("seg --warmup-epochs 14", "--warmup-epochs 14: distillation would never start in 14 epochs"),
]


@pytest.mark.parametrize("words, message", MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_one_line(words, message, run, refused):
    first, _, rest = words.format(run=run).partition(" ")
    line = refused(seg, rest) if first == "seg" else refused(train, first, rest)
    assert message.format(run=run) in line


def test_several_processes_without_torchrun_are_refused(monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "use torchrun" in refused(train, TINY) and not Path("runs").exists()


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("it ran",)


@pytest.mark.parametrize("name", ["hostile", "list", "cut", "missing"])
def test_a_file_that_is_no_checkpoint_is_refused_and_runs_no_code(name, run, refused):
    if name in ("hostile", "list"):
        torch.save(Hostile() if name == "hostile" else [1], f"{name}.pt")
    elif name == "cut":
        Path("cut.pt").write_bytes((run / "last.pt").read_bytes()[:20000])
    for option in ("--resume", EVAL):
        assert f"{name}.pt is no checkpoint or state_dict that can be read" in refused(train, option, f"{name}.pt")
    assert not Path("it ran").exists()


def test_other_classes_are_refused(run, refused):
    content = torch.load(run / "last.pt", weights_only=True)
    content["args"]["classes"].reverse()
    torch.save(content, "last.pt")
    for words in ("--eval last.pt", "--resume last.pt --epochs 3"):
        assert "the data has the classes cross,crescent" in refused(train, words)


@pytest.mark.parametrize("wrapper, prefix", [("state_dict", "module._orig_mod."), ("net", "_orig_mod.module.")])
def test_weights_saved_by_others_load(wrapper, prefix, run, capsys):
    state = torch.load(run / "student.pt", weights_only=True)
    torch.save({wrapper: {prefix + key: value for key, value in state.items()}, "acc": 70.0}, "net.pt")
    assert main(train, EVAL, "net.pt") == 0
    assert "top-1 {top1:.2f} top-5 {top5:.2f} (".format(**log_of(run)[-1]) in capsys.readouterr().out


def test_weights_that_do_not_fit_name_a_key_of_either_side(refused):
    torch.save({"module.stem.weight": torch.zeros(1)}, "net.pt")
    message = refused(train, EVAL, "net.pt")
    assert "net.pt does not fit wrn10_1: it has stem.weight where conv1.weight was looked for" in message
    torch.save(frskd.WideResNet(10, 1, 7).state_dict(), "net.pt")
    assert "size mismatch for fc.weight" in refused(train, EVAL, "net.pt")


# ------------------------------------------------------------------- numbers that are not finite, disks that are full


def test_a_term_that_is_not_finite_ends_the_run_with_status_1(run, capsys):
    """The checkpoint of the epoch before stays."""
    content = torch.load(run / "last.pt", weights_only=True)
    content["optimizer"]["state"][0]["momentum_buffer"].fill_(math.inf)
    torch.save(content, "last.pt")
    before = Path("last.pt").read_bytes()
    assert main(train, "--resume last.pt --epochs 3") == 1
    line = "train.py: error: the term ce is not finite in epoch 3; last.pt, where there is one, is of the epoch before"
    assert shown(capsys.readouterr().err)[-1] == line and Path("last.pt").read_bytes() == before


@pytest.mark.parametrize("words, name", [("--method baseline", "top1"), ("--beta 1e9 --epochs 2 --eval-every 2", "")])
def test_weights_ruined_by_the_last_step_are_not_saved(words, name, capsys):
    """One step an epoch: its terms are finite, what it makes of the weights is not."""
    assert main(train, TINY, "--epochs 1 --batch-size 32 --lr 3e38 --output a", words) == 1
    assert f"{name} is not finite after epoch 1" in shown(capsys.readouterr().err)[-1]
    assert {path.name for path in Path("a").iterdir()} == {"args.json", "log.jsonl"}


def test_a_full_disk_leaves_the_checkpoint_from_before(run, refused):
    """One line, and with room again the run goes on."""
    shutil.copytree(run, "a")
    before, limits = Path("a/last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        line = refused(train, "--resume a --epochs 3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line == "cannot write a/last.pt: File too large"
    assert Path("a/last.pt").read_bytes() == before and not list(Path("a").glob("*.partial"))
    assert main(train, "--resume a --epochs 3") == 0 and [entry["epoch"] for entry in log_of("a")] == [1, 2, 3]


def test_a_closed_pipe_ends_without_a_word(run, monkeypatch, capsys):
    """As by | head."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert main(train, "--table", run) == 141
    assert not capsys.readouterr().err


def test_table_averages_seeds_and_says_what_it_left_out(run, capsys):
    """The first run of a seed counts, and only finished ones."""
    for name, seed, top1, epochs in (("a", 0, 50, 2), ("b", 1, 53, 2), ("c", 2, 99, 1), ("d", 1, 99, 2)):
        shutil.copytree(run, f"all/{name}")
        args = json.loads(Path(f"all/{name}/args.json").read_text()) | dict(seed=seed, name="frskd")
        Path(f"all/{name}/args.json").write_text(json.dumps(args))
        entries = [json.dumps(entry | dict(top1=value)) for entry, value in zip(log_of(run), (top1 + 10, top1))]
        Path(f"all/{name}/log.jsonl").write_text("\n".join(entries[:epochs]))
    Path("all/e").mkdir()
    Path("all/e/args.json").write_text("[]")
    assert main(train, "--table all") == 0
    out = capsys.readouterr().out
    assert "| shapes     | wrn10_1   | frskd    | 51.50 ± 2.12 | 61.50 ± 2.12 | 2   |" in out
    assert "- all/c: unfinished, 1 of 2 epochs" in out and "- all/e: not a run that can be read" in out


def test_the_meter_has_means_over_images_also_where_it_was_read_between():
    meter = runs.Meter(loader=None, epoch=0, epochs=1)
    meter.update(dict(ce=torch.tensor(1.0)), images=3)
    assert meter.read() == dict(ce=1)
    meter.update(dict(ce=torch.tensor(5.0)), images=1)
    assert meter.read(of_all=True) == dict(ce=2)


def test_seconds_end_with_the_last_batch():
    """What comes after, evaluation and pictures, is not training."""
    class Loader(list):
        def epoch(self, _):
            return self

    for _ in (meter := runs.Meter(Loader([0, 0]), epoch=0, epochs=1)):
        meter.update(dict(ce=torch.tensor(1.0)), images=1)
    seconds = meter.seconds
    assert meter.read(of_all=True) == dict(ce=1) and meter.seconds == seconds


class NoFloat64(TorchDispatchMode):
    """As a Mac's GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert torch.float64 not in [getattr(t, "dtype", None) for t in torch.utils._pytree.tree_leaves(out)], func
        return out


def test_nothing_on_the_device_is_float64():
    with NoFloat64():
        assert main(train, TINY, "--sla --feature-loss od --epochs 1 --output a") == 0


# ------------------------------------------------------------------------------------------------- many processes


def without_batches(norm, x):
    return x * norm.weight[:, None, None] + norm.bias[:, None, None]


def normalise_without_batches():
    nn.BatchNorm2d.forward = without_batches


@pytest.mark.parametrize("method", ["frskd", "byot --beta 0.01"])
def test_processes_without_batch_norm_train_as_one(method, child, monkeypatch):
    """Their shares of each batch, averaged; every test image counted once."""
    words = f"{TINY} --epochs 2 --batch-size 12 --lr 0.01 --method {method} --output"
    started = together(child, f"{words} many", "p", normalise_without_batches)
    monkeypatch.setattr(nn.BatchNorm2d, "forward", without_batches)
    assert main(train, words, "one") == 0
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0]
    assert "epoch 1/2" in Path("p0.out").read_text() and not Path("p1.out").read_text()
    assert json.loads(Path("many/args.json").read_text())["processes"] == 2
    for ours, theirs in zip(numbers("one"), numbers("many"), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)
    torch.testing.assert_close(weights("many"), weights("one"), rtol=1e-4, atol=1e-6)


def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(run, child, capsys):
    """As torchrun --max-restarts starts them again: the same command, with --resume."""
    words = f"{TINY} --method baseline --epochs 2 --batch-size 4 --lr 0.2 --resume --output a"
    first, second = together(child, words, "p", die_in_the_second)
    first.join(300), second.join()
    assert (first.exitcode, second.exitcode) == (1, -signal.SIGKILL) and len(log_of("a")) == 1
    assert shown(Path("p0.err").read_text())[-1] == "train.py: error: another process is gone"
    started = together(child, words, "again", restart=1)
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0] and len(log_of("a")) == 2
    command = json.loads(Path("a/args.json").read_text())["command"]
    assert command.startswith("torchrun --nproc-per-node=2 train.py --arch wrn10_1")
    assert main(train, "--eval a/last.pt") == 0  # by one process: the first one's running statistics were everyone's
    assert "top-1 {top1:.2f} top-5 {top5:.2f} ".format(**log_of("a")[-1]) in capsys.readouterr().out


def die_in_the_second():
    if os.environ["RANK"] == "1":
        runs.Meter.update = before_step(9, partial(signal.raise_signal, signal.SIGKILL))


@pytest.mark.slow
def test_torchrun_trains_in_several_processes():
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2"
    subprocess.run(f"{launcher} {ROOT}/train.py {TINY} --epochs 1 --output a".split(), check=True)
    assert json.loads(Path("a/args.json").read_text())["processes"] == 2 and len(log_of("a")) == 1
