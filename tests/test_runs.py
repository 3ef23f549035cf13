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
import threading
import time
from contextlib import suppress
from functools import partial
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import frskd
import seg
import train
from conftest import ROOT, TINY, log_of, main, numbers, resolved, same, shown, together, weights
from experiments import data, runs

pytestmark = pytest.mark.usefixtures("quick")
EVAL = "--arch wrn10_1 --image-size 16 --device cpu --eval"


def before_step(n, function, update=runs.Meter.update):
    """Meter.update that calls a function in the n-th step from now on."""
    steps = iter(range(1, 1000))
    return lambda *args: function() if next(steps) == n else update(*args)


@pytest.fixture
def interrupted(monkeypatch):
    """interrupted(step, words..., signum=SIGINT) -> the exit status of train.py."""

    def interrupted(step, *words, signum=signal.SIGINT):
        with monkeypatch.context() as patch:
            patch.setattr(runs.Meter, "update", before_step(step, partial(signal.raise_signal, signum)))
            return main(train, *words)

    return interrupted


# ------------------------------------------------------------------------------------------- the life of a run

FRSKD = "ce ce_t kd feat"
LIVES = {  # options: the terms that are logged
    "--method baseline": "ce",
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
def test_life_of_a_run(options, tmp_path, interrupted, capsys):
    """Interrupted in the second epoch and resumed it ends as the whole run, bit for bit; its files are evaluated; what
    training added, a pretrained teacher too, is in the checkpoint, not in student.pt."""
    words, teacher = f"{TINY} --epochs 2 {options}", tmp_path / "teacher.pt"
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
    frskd.WideResNet(10, 1, 8).load_state_dict(torch.load("cut/student.pt", weights_only=True))
    for file in ("last.pt", "student.pt"):
        assert main(train, f"--eval cut/{file}") == 0
        first, *teachers = capsys.readouterr().out.splitlines()
        assert first.endswith(f"seed 0: {line} (on test, cut/{file})")
        assert len(teachers) == ("ce_t" in LIVES[options].split() and file == "last.pt")
        assert all(re.match(r"its self-teacher: top-1 \d+\.\d\d top-5 \d", teacher) for teacher in teachers)


def test_dropout_is_drawn_from_seed_and_epoch(interrupted):
    words = "--arch squeezenet1_1 --blocks features.12 --image-size 32 --per-class 2 --batch-size 8 --method baseline"
    words += " --device cpu --attention 9 --epochs 2 --output"
    assert main(train, words, "whole") == 0
    assert interrupted(3, words, "cut") == 130
    assert main(train, "--resume cut") == 0 and same("whole", "cut")


def test_a_run_leaves_its_files_and_says_what_it_was(run):
    assert {path.name for path in run.iterdir()} == {"args.json", "log.jsonl", "last.pt", "student.pt"}
    keys = "epoch lr ce ce_t kd feat train_top1 top1 top5 images_per_s seconds"
    assert [list(entry) for entry in log_of(run)] == [keys.split()] * 2
    args = json.loads((run / "args.json").read_text())
    assert args["command"] == f"python train.py {TINY} --epochs 2 --output {run}"
    assert args["classes"][0] == "cross" and args["torch"] == torch.__version__ and args["processes"] == 1
    assert args["name"] == "frskd-image-size16-per-class4-epochs2-batch-size16"
    assert ("commit" in args) == (ROOT / ".git").exists()
    (group,) = torch.load(run / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (1e-4, 0.9, False)


def test_evaluated_every_other_epoch_the_numbers_are_the_same(run):
    assert main(train, TINY, "--epochs 3 --eval-every 2 --output a") == 0 and main(train, "--table a") == 0
    assert ["top1" in entry for entry in log_of("a")] == [False, True, True] and numbers("a")[1] == numbers(run)[1]


def test_resume_may_add_epochs_and_move_but_change_nothing_else(run, refused):
    shutil.copytree(run, "moved")
    assert main(train, "--resume moved --epochs 3 --workers 0") == 0
    assert numbers("moved")[:2] == numbers(run) and [e["lr"] for e in log_of("moved")] == [0.05, 0.005, 0.005]
    for option in ("--beta 50", "--seed 1", "--arch wrn16_1", "--epochs 1", "--batch-size 8", "--amp"):
        assert refused(train, "--resume moved", option).startswith(f"{option.split()[0]} ")
    assert main(train, TINY, "--epochs 3 --resume --output moved") == 0  # the same command again, as torchrun restarts
    assert main(train, TINY, "--epochs 1 --overwrite --output moved") == 0 and len(log_of("moved")) == 1


@pytest.mark.parametrize("n", [1, 5, 6, 8])
def test_killed_between_its_files_a_run_loses_an_epoch_at_most(n, run, child):
    """By SIGKILL, before the n-th file is renamed: args.json, log; log, student.pt, last.pt of an epoch."""
    words = f"train {TINY} --epochs 2 --output cut"
    process = child(words, prepare=partial(die_before_rename, n))
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(list(Path("cut").glob("*.partial"))) == 1
    for file in Path("cut").glob("*.pt"):
        torch.load(file, weights_only=True)
    assert not Path("cut/log.jsonl").exists() or len(log_of("cut")) == (0 if n < 4 else 1 if n < 7 else 2)
    assert main(train, words.removeprefix("train"), "--resume") == 0
    assert same(run, "cut") and not list(Path("cut").glob("*.partial"))
    assert Path("cut/student.pt").read_bytes() == (run / "student.pt").read_bytes()


def die_before_rename(n, rename=os.replace):
    times = iter(range(1, 100))
    os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL) if next(times) == n else rename(*args)


def test_the_printed_command_goes_on(tmp_path, monkeypatch, interrupted, capsys):
    """Pasted in the same folder, which is not the script's, and with stderr closed; SIGTERM exits with 143."""
    Path("my code").symlink_to(ROOT)
    monkeypatch.setattr(sys, "argv", ["my code/train.py"])
    assert interrupted(3, TINY, "--epochs 2 --output", tmp_path / "a b", signum=signal.SIGTERM) == 143
    line = shown(capsys.readouterr().err)[-1]
    command = line.removeprefix("train.py: stopped; continue with: python ")
    assert shlex.split(command) == ["my code/train.py", *shlex.split(command)[1:-3], "--output", str(tmp_path / "a b"),
                                    "--resume"]  # fmt: skip
    done = subprocess.run(f"{shlex.quote(sys.executable)} {command} 2>&-", shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "epoch 2/2" in done.stdout and "epoch 1/2" not in done.stdout
    assert len(log_of("a b")) == 2


def test_interrupted_before_its_first_checkpoint_a_run_starts_afresh(interrupted, capsys):
    assert interrupted(1, TINY, "--epochs 1 --overwrite --output a") == 130
    command = shown(capsys.readouterr().err)[-1].partition("python train.py ")[2]
    assert "--overwrite" not in command and main(train, command) == 0 and len(log_of("a")) == 1


def test_main_runs_in_a_thread_and_below_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(main(train, TINY, "--epochs 1 --output=~/x")))
    thread.start()
    thread.join()
    assert statuses == [0] and len(log_of("home/x")) == 1


# ------------------------------------------------------------------------------------------- options and names

OTHER = dict(  # values that differ from every recipe's, where a parser cannot tell
    arch="wrn10_1", blocks="a --arch alexnet", milestones="1", device="cuda:1", teacher_arch="wrn10_1", weights="x",
    mixup="0.5", cutmix="0.5", attention="1", predictions="1", dataset="cifar100", channels="24", clip_value="3",
)  # fmt: skip
FREE = """overwrite resume eval table curves cost data_dir download workers device compile output eval_every
attention predictions teacher_checkpoint""".split()  # change no number


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


@pytest.mark.parametrize("words, name", [
    ("--alpha 2 --beta 100 --epochs 8 --seed 3 --compile --workers 1", "frskd"), ("--beta 0", "frskd-beta0"),
    ("--method baseline --cutmix", "baseline-cutmix1"), ("--sla --epochs 20", "frskd-sla-epochs20"),
    ("--mixup --image-size 72", "frskd-image-size72-mixup0.3"), ("--amp", "frskd-amp"),
    ("--epochs 20 --milestones 5,10", "frskd-epochs20-milestones5,10"),
])  # fmt: skip
def test_names(words, name):
    args = resolved(train, words)
    assert args.name == name and args.output == f"runs/shapes-wrn16_2-{name}-s{args.seed}"


@pytest.mark.parametrize("words, beta, size", [
    ("--dataset cub200", 200, 224), ("", 100, 32), ("--method kd --feature-loss at", 1000, 32),
])  # fmt: skip
def test_help_shows_the_recipe_of_the_data_set(words, beta, size, capsys):
    with pytest.raises(SystemExit) as stop:
        main(train, words, "--help")
    said = " ".join(capsys.readouterr().out.split())
    assert not stop.value.code and f"FRSKD\\F ({beta}.0)" in said and f"resized crops ({size})" in said


# ------------------------------------------------------------------------------- every mistake is one line and 2

MISTAKES = [
    ("--epoch 5", "unrecognized arguments: --epoch 5"),
    ("--temperature 0", "argument --temperature: 0 is not above 0"),
    ("--lr nan", "argument --lr: nan is not above 0"),
    ("--milestones 5,x", "argument --milestones: invalid"),
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
    ("--table /nowhere", "no finished run of train.py in or below it"),
    ("--dataset folder --data-dir /nowhere", "/nowhere needs train/<class>/*"),
    ("--per-class 2", "--batch-size 32 is larger than the training set of 16 images"),
    ("--output /proc/nowhere --image-size 8", "/proc/nowhere"),
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
    assert "use torchrun" in refused(train, TINY) and "use torchrun" in refused(seg)
    assert not Path("runs").exists()


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("it ran",)


@pytest.mark.parametrize("name", ["hostile", "whole", "cut", "empty", "list", "missing"])
def test_a_file_that_is_no_checkpoint_is_refused_and_runs_no_code(name, run, refused):
    content = dict(hostile=Hostile(), whole=frskd.WideResNet(10, 1, 8), list=[1])  # whole: a pickled module
    if name in content:
        torch.save(content[name], f"{name}.pt")
    elif name != "missing":
        Path(f"{name}.pt").write_bytes((run / "last.pt").read_bytes()[: 20000 * (name == "cut")])
    for option in ("--resume", EVAL):
        assert f"{name}.pt is no checkpoint or state_dict that can be read" in refused(train, option, f"{name}.pt")
    assert not Path("it ran").exists()


def test_other_classes_are_refused(run, refused):
    """Of a file to evaluate, a student.pt beside its args.json, and of a run to resume."""
    content = torch.load(run / "last.pt", weights_only=True)
    content["args"]["classes"].reverse()
    torch.save(content, "last.pt")
    shutil.copy(run / "student.pt", ".")
    Path("args.json").write_text(json.dumps(content["args"]))
    for words in ("--eval last.pt", "--eval student.pt", "--resume last.pt --epochs 3"):
        assert "the data has the classes cross,crescent" in refused(train, words)


WRAPPED = {
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "both": lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}, "epoch": 3},
    "net": lambda s: {"net": {f"module.{k}": v for k, v in s.items()}, "acc": 70.0},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_saved_by_others_load(name, run, capsys):
    state = torch.load(run / "student.pt", weights_only=True)
    torch.save(WRAPPED[name](state), "net.pt")
    assert main(train, EVAL, "net.pt") == 0
    assert "top-1 {top1:.2f} top-5 {top5:.2f} (".format(**log_of(run)[-1]) in capsys.readouterr().out
    if name == "both":
        teacher = "--method kd --teacher-arch wrn10_1 --teacher-checkpoint net.pt"
        assert main(train, TINY, teacher, "--epochs 1 --output kd") == 0
        learnt = weights("kd")
        assert all(torch.equal(learnt[f"teacher.{key}"], value) for key, value in state.items())


def test_weights_that_do_not_fit_name_a_key_of_either_side(refused):
    torch.save({"module.stem.weight": torch.zeros(1)}, "net.pt")
    keys = "it has stem.weight where conv1.weight was looked for"
    assert f"net.pt does not fit wrn10_1: {keys}" in refused(train, EVAL, "net.pt")
    teacher = "--method kd --teacher-arch wrn10_1 --teacher-checkpoint net.pt"
    assert f"net.pt does not fit: {keys}" in refused(train, TINY, teacher)
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


@pytest.mark.parametrize("words, name", [("--method baseline", "top1"), ("--alpha 0 --beta 0", "")])
def test_weights_ruined_by_the_last_step_are_not_saved(words, name, capsys):
    """One step an epoch: its terms are finite, what it makes of the weights is not."""
    assert main(train, TINY, words, "--epochs 1 --batch-size 32 --lr 3e38 --output a") == 1
    assert f"{name} is not finite after epoch 1" in shown(capsys.readouterr().err)[-1]
    assert {path.name for path in Path("a").iterdir()} == {"args.json", "log.jsonl"}


@pytest.mark.parametrize("room, file", [(0.01, "student.pt"), (0.5, "last.pt")])
def test_a_full_disk_leaves_the_checkpoint_from_before(room, file, run, refused):
    """One line, and with room again the run goes on."""
    shutil.copytree(run, "a")
    before, limits = Path("a/last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room * len(before)), limits[1]))
    try:
        line = refused(train, "--resume a --epochs 4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line == f"cannot write a/{file}: File too large"
    assert Path("a/last.pt").read_bytes() == before and not list(Path("a").glob("*.partial"))
    assert main(train, "--resume a --epochs 4") == 0 and [e["epoch"] for e in log_of("a")] == [1, 2, 3, 4]


@pytest.mark.parametrize("full", [True, False])
def test_what_nobody_reads_ends_in_one_line_or_none(full, run, monkeypatch, capsys):
    """Standard output on a full disk, and a pipe that is closed, as by | head."""
    reading, writing = os.pipe()
    os.close(reading)
    stream = open("/dev/full" if full else writing, "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert main(train, "--table", run) == (2 if full else 141)
    err = capsys.readouterr().err
    assert ("No space left on device" in err) == full == err.count("\n")
    with suppress(OSError):
        stream.close()


def test_table_averages_seeds_and_says_what_it_left_out(run, monkeypatch):
    """The first run of a seed counts; on an ASCII terminal too, which has no plus-minus sign."""
    for name, seed, top1, epochs in (("a", 0, 50, 2), ("b", 1, 53, 2), ("c", 2, 99, 1), ("d", 1, 99, 2)):
        shutil.copytree(run, f"all/{name}")
        args = json.loads(Path(f"all/{name}/args.json").read_text()) | dict(seed=seed, name="frskd")
        Path(f"all/{name}/args.json").write_text(json.dumps(args))
        entries = [json.dumps(entry | dict(top1=value)) for entry, value in zip(log_of(run), (top1 + 10, top1))]
        Path(f"all/{name}/log.jsonl").write_text("\n".join(entries[:epochs]))
    Path("all/e").mkdir()
    Path("all/e/args.json").write_text("[]")
    for encoding, sign in (("utf-8", "±"), ("ascii", "?")):
        stream = TextIOWrapper(BytesIO(), encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert main(train, "--table all") == 0
        out = stream.buffer.getvalue().decode(encoding)
        assert f"| shapes     | wrn10_1   | frskd    | 51.50 {sign} 2.12 | 61.50 {sign} 2.12 | 2   |" in out
    assert "- all/c: unfinished, 1 of 2 epochs" in out and "- all/e: not a run that can be read" in out


def test_the_meter_has_means_over_images_and_reads_them_every_50_steps(monkeypatch):
    """Batches of 3 and of 1 image with terms 1 and 5: 2, not 3."""
    reads, read = [], runs.Meter.read
    monkeypatch.setattr(runs.Meter, "read", lambda self, **kwargs: reads.append(self.images) or read(self, **kwargs))
    loader = data.make_loader(data.Split(torch.zeros(101, 8, 8, 3, dtype=torch.uint8), torch.zeros(101).long()),
                              train=False, batch_size=1, image_size=8)  # fmt: skip
    for step, _ in enumerate(meter := runs.Meter(loader, epoch=0, epochs=1)):
        meter.update(dict(ce=torch.tensor(5.0 if step % 2 else 1.0)), 1 if step % 2 else 3)
    assert reads == [100, 200] and meter.read(of_all=True) == dict(ce=pytest.approx((51 * 3 + 50 * 5) / 203))


class Single(TorchDispatchMode):
    """Refuses float64, as a Mac's GPU does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)]
        assert torch.float64 not in [t.dtype for t in made], func
        return out


@pytest.mark.parametrize("script, words", [
    (train, f"{TINY} --sla --feature-loss od"), (train, f"{TINY} --method byot --cutmix"),
    (seg, "--warmup-epochs 0 --predictions 9"),
])  # fmt: skip
def test_nothing_on_the_device_is_float64(script, words, monkeypatch):
    on_the_host = seg.intersection_over_union

    def intersection_over_union(confusion):
        with _disable_current_modes():
            return on_the_host(confusion).float()

    monkeypatch.setattr(seg, "intersection_over_union", intersection_over_union)
    if script is seg:
        monkeypatch.setattr(data, "SHAPES_DRAWN", ((2, 1), (1, 2)))
    with Single():
        assert main(script, words, "--epochs 1 --output a --device cpu") == 0


# ------------------------------------------------------------------------------------------------- many processes


def without_batch_norm(module):
    for name, part in module.named_children():
        setattr(module, name, nn.Identity() if isinstance(part, nn.BatchNorm2d) else without_batch_norm(part))
    return module


def plain(build=train.build):
    train.build = lambda *args, **kwargs: without_batch_norm(build(*args, **kwargs))


PLAIN = f"{TINY} --epochs 2 --batch-size 12 --lr 0.01 --output"


@pytest.mark.parametrize("method, processes", [("baseline", 3), ("frskd", 2), ("byot", 2)])
def test_processes_without_batch_norm_train_as_one(method, processes, child, monkeypatch):
    """Their shares of each batch, averaged; every test image counted once."""
    words = f"{PLAIN} many --method {method}" + " --beta 0.01" * (method == "byot")
    started = together(child, f"train {words}", "p", plain, processes)
    monkeypatch.setattr(train, "build", train.build)
    plain()
    assert main(train, words.replace("many", "one")) == 0
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * processes
    assert "epoch 1/2" in Path("p0.out").read_text() and not Path("p1.out").read_text()
    assert json.loads(Path("many/args.json").read_text())["processes"] == processes
    for ours, theirs in zip(numbers("one"), numbers("many"), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)
    for key, value in weights("one").items():
        torch.testing.assert_close(weights("many")[key], value, rtol=1e-4, atol=1e-6)


def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(run, child, capsys):
    """As torchrun --max-restarts starts them again: the same command, with --resume."""
    words = f"train {TINY} --method baseline --epochs 3 --resume --output a"
    first, second = together(child, words, "p", die_in_the_second)
    first.join(60), second.join()
    assert (first.exitcode, second.exitcode) == (1, -signal.SIGKILL) and len(log_of("a")) == 1
    assert shown(Path("p0.err").read_text())[-1] == "train.py: error: another process is gone"
    started = together(child, words, "again", restart=1)
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0] and [e["epoch"] for e in log_of("a")] == [1, 2, 3]
    command = json.loads(Path("a/args.json").read_text())["command"]
    assert command.startswith("torchrun --nproc-per-node=2 train.py --arch wrn10_1")
    assert main(train, "--eval a/last.pt") == 0  # the first one's running statistics were everyone's
    assert f"top-1 {log_of('a')[-1]['top1']:.2f} " in capsys.readouterr().out
    assert main(train, "--resume a --epochs 4") == 0  # one process goes on


def die_in_the_second():
    if os.environ["RANK"] == "1":
        runs.Meter.update = before_step(3, partial(signal.raise_signal, signal.SIGKILL))


@pytest.mark.slow
def test_torchrun_restarts_a_run_of_which_a_process_was_killed():
    command = "-m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts=2".split()
    words = [str(ROOT / "train.py"), *TINY.split(), *"--per-class 20 --epochs 25 --output a --resume".split()]
    with open("err", "w") as err:
        process = subprocess.Popen([sys.executable, *command, *words], stdout=subprocess.DEVNULL, stderr=err)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not Path("a/last.pt").exists():
        assert process.poll() is None, Path("err").read_text()
        time.sleep(0.1)
    os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    assert process.wait() == 0, Path("err").read_text()
    assert [entry["epoch"] for entry in log_of("a")] == list(range(1, 26))
