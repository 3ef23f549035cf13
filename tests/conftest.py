import functools
import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from experiments import data, figures, runs

ROOT = Path(__file__).resolve().parent.parent
TINY = "--arch wrn10_1 --image-size 16 --per-class 4 --batch-size 16 --milestones 1 --device cpu --attention 99"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test reads or leaves anything in the folder in which pytest was started, nor inherits an ignored Ctrl-C."""
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it


def shrink(change=setattr):
    """`shapes` with few images, drawn once, and no curves, which tests/test_figures.py looks at."""
    change(sys, "argv", ["train.py"])
    change(data, "SHAPES_DRAWN", ((8, 1), (4, 2)))
    change(data, "draw_shapes", functools.cache(data.draw_shapes))
    change(figures, "draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick):
    """A finished run of two epochs of two steps, which several tests look at."""
    folder = tmp_path_factory.mktemp("run") / "a"
    assert main(train, TINY, "--epochs 2 --output", folder) == 0
    return folder


def main(script, *words):
    """script.main: strings split at blanks, paths and numbers one word each."""
    split = [word.split() if isinstance(word, str) else [str(word)] for word in words]
    return script.main(sum(split, []))


def resolved(script, words=""):
    """The options that a command line stands for."""
    return runs.resolved(script.parser(), script.recipe, vars(script.parser().parse_args(words.split())))


def shown(err):
    """What a terminal is left with: a progress bar ends in a carriage return, and what follows overwrites it."""
    return [line.rpartition("\r")[2] for line in err.strip().split("\n")]


@pytest.fixture
def refused(capsys):
    """refused(script, words...) -> the one line that a user's mistake gets: status 2, nothing else on stderr."""

    def refused(script, *words):
        capsys.readouterr()
        assert main(script, *words) == 2
        (line,) = shown(capsys.readouterr().err)
        assert line.startswith(f"{script.__name__}.py: error: ")
        return line.partition("error: ")[2]

    return refused


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def numbers(folder):
    """The log without what depends on the clock."""
    return [{k: v for k, v in e.items() if k not in ("seconds", "images_per_s")} for e in log_of(folder)]


def weights(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)["method"]


def same(a, b):
    """Whether two runs have the same log and the same weights, bit for bit."""
    ours, theirs = weights(a), weights(b)
    equal = ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())
    return equal and numbers(a) == numbers(b)


def in_child(words, name, prepare, environment, where):
    os.chdir(where)
    os.environ.update({key: str(value) for key, value in environment.items()})
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    shrink()
    if prepare:
        prepare()
    sys.exit(train.main(words.split()))


@pytest.fixture(scope="session")
def child():
    """child("--epochs 2 ...", name) starts train.py in a process of its own -> the process, its exit status in
    `exitcode`; what it prints is in name.out and name.err. prepare: a function that it calls before."""
    server = multiprocessing.get_context("forkserver")  # which has trained nothing; its children start at once
    server.set_forkserver_preload(["conftest"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        server.Process(target=int).start()

    def start(words, name="child", prepare=None, **environment):
        process = server.Process(target=in_child, args=(words, name, prepare, environment, os.getcwd()))
        process.start()
        return process

    return start


def together(child, words, name, prepare=None, restart=0):
    """Starts train.py in two processes, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(TORCHELASTIC_RUN_ID=1, TORCHELASTIC_RESTART_COUNT=restart, MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                  WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)  # fmt: skip
    return [child(words, f"{name}{r}", prepare, RANK=r, LOCAL_RANK=r, **shared) for r in (0, 1)]


def voc_tree(root, exif=False):
    """A VOCdevkit of 80x72 px, label 1 in the right half; of VOC2012, some are VOC2007's."""
    lists = {"VOC2007/trainval": ["000032", "000039"], "VOC2007/test": ["000121", "000175"]}
    lists["VOC2012/trainval"] = ["2008_000001", "2007_000032", "2007_000121", "000175", "2007_009999"]
    image, mask, turned = Image.new("RGB", (80, 72), (20, 20, 20)), Image.new("P", (80, 72)), Image.Exif()
    for picture, value in ((image, (230, 230, 230)), (mask, 1)):
        picture.paste(value, (40, 0, 80, 72))
    mask.putpalette([0, 0, 0, 128, 0, 0])
    if exif:
        image, turned[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
    for name, ids in lists.items():
        for folder in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
            (root / "VOCdevkit" / name[:7] / folder).mkdir(parents=True, exist_ok=True)
        (root / "VOCdevkit" / name[:7] / f"ImageSets/Segmentation/{name[8:]}.txt").write_text("\n".join(ids))
        for i in ids:
            image.save(root / "VOCdevkit" / name[:7] / f"JPEGImages/{i}.jpg", exif=turned)
            mask.save(root / "VOCdevkit" / name[:7] / f"SegmentationClass/{i}.png")
    return root
