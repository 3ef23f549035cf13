"""train.py: recipes, methods as options build them, training and evaluation, what it prints."""

import functools
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torchvision
from PIL import Image

import conftest
import frskd
import train
from conftest import TINY, log_of, main, numbers, weights
from experiments import baselines, data, figures

pytestmark = pytest.mark.usefixtures("quick")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


resolved = functools.partial(conftest.resolved, train)


def built(words, num_classes=8):
    return train.build(resolved(f"--arch wrn10_1 --image-size 16 --device cpu {words}"), num_classes)


def class_folders(root, size, per_class=4, classes=3):
    """train/ and val/ of drawn shapes."""
    images, labels, _ = data.draw_shapes(per_class, size, seed=0)
    for split in ("train", "val"):
        for i in range(classes * per_class):
            path = Path(root, split, f"class{labels[i]}", f"{i:03}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i].numpy()).save(path)
    return root


# --------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("dataset, alpha, beta, batch_size, mixup, image_size, stats", [
    ("cifar100", 2, 100, 128, 0.2, 32, ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))),
    ("tinyimagenet", 3, 100, 128, 0.2, 32, ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821))),
    *((name, 1, 200, 32, 0.3, 224, IMAGENET) for name in ("cub200", "mit67", "stanford40", "dogs")),
    ("imagenet", 1, 200, 256, 0.3, 224, IMAGENET),
])  # fmt: skip
def test_recipe_is_that_of_section_4_1_and_the_appendix(dataset, alpha, beta, batch_size, mixup, image_size, stats):
    """SGD, lr 0.1, weight decay 1e-4, 200 epochs, /10 at 100 and 150; ImageNet 90, 30 and 60; K = 4, w = 2."""
    args = resolved(f"--dataset {dataset} --mixup")
    assert (args.alpha, args.beta, args.batch_size, args.mixup) == (alpha, beta, batch_size, mixup)
    assert (args.epochs, args.milestones) == ((90, [30, 60]) if dataset == "imagenet" else (200, [100, 150]))
    assert (args.lr, args.weight_decay, args.momentum) == (0.1, 1e-4, 0.9)
    assert (args.temperature, args.width, args.channels, args.arch) == (4, 2, None, "resnet18")
    assert (args.image_size, data.STATS[args.stats]) == (image_size, stats)
    assert (args.feature_loss, args.sla, args.cutmix) == ("at", False, None)
    assert resolved(f"--dataset {dataset} --cutmix").cutmix == 1.0
    assert resolved(f"--dataset {dataset} --method cskd").alpha == (3 if image_size == 224 else 1)
    betas = [resolved(f"--dataset {dataset} --feature-loss {f}").beta for f in ("at", "fitnet", "od")]
    assert betas == [beta, 1, 0.01]  # Table 5


@pytest.mark.parametrize("size, recipe", [(40, (40, 2, 100, 128)), (80, (224, 1, 200, 32))])
def test_a_folder_takes_the_recipe_of_its_size(size, recipe):
    """CIFAR-100's up to 64 px; above, that of the fine-grained sets at 224 px."""
    args = resolved(f"--dataset folder --data-dir {class_folders('images', size, per_class=1)}")
    assert (args.image_size, args.alpha, args.beta, args.batch_size) == recipe


def test_other_methods_have_the_weights_of_their_constructors():
    own = dict(one=(1, None, 3), ddgsd=(1, 5e-4, 3), byot=(0.1, 1e-6, 3), sad=(None, 0.1, None), cskd=(1, None, 4),
               slasd=(1, None, 1), baseline=(None, None, None))  # fmt: skip
    for method, values in own.items():
        args = resolved(f"--method {method}")
        assert (args.alpha, args.beta, args.temperature) == values
    kd = "--method kd --teacher-checkpoint x --feature-loss"
    assert [resolved(f"{kd} {loss}").beta for loss in ("none", "at", "fitnet", "od")] == [0, 1000, 100, 1]


# --------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("words, kind, loss", [
    ("", frskd.FRSKD, type(frskd.attention_transfer)),
    ("--sla", frskd.FRSKDSLA, type(frskd.attention_transfer)),
    ("--feature-loss fitnet", frskd.FRSKD, baselines.FitNet),
    ("--feature-loss od --sla", frskd.FRSKDSLA, baselines.Overhaul),
])  # fmt: skip
def test_frskd_is_built_as_the_options_say(words, kind, loss):
    method = built(f"--alpha 3 --beta 70 --temperature 5 --width 3 {words}")
    assert type(method) is kind and method.teacher.dims == [48, 96, 192]
    assert (method.alpha, method.beta, method.temperature) == (3, 70, 5) and type(method.feature_loss) is loss
    assert built(f"--channels 24 {words}").teacher.dims == [24, 24, 24]
    first, again, other = (built(f"{words} --seed {seed}").student.fc.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("name, kind, keys", [
    ("baseline", baselines.Baseline, ""), ("one", baselines.ONE, "alpha temperature"),
    ("ddgsd", baselines.DDGSD, "alpha beta temperature"), ("byot", baselines.BYOT, "alpha beta temperature"),
    ("sad", baselines.SAD, "beta"), ("cskd", baselines.CSKD, "alpha temperature"),
    ("slasd", baselines.SLASD, "alpha temperature"), ("kd", baselines.Distillation, "alpha beta temperature"),
])  # fmt: skip
def test_methods_are_built_with_the_weights_given(name, kind, keys):
    torch.save(frskd.WideResNet(16, 1, 8).state_dict(), "t.pt")
    words = f"--method {name}" + " --teacher-arch wrn16_1 --teacher-checkpoint t.pt --feature-loss at" * (name == "kd")
    values = {key: value for key, value in dict(alpha=0.25, beta=0.5, temperature=7.0).items() if key in keys.split()}
    method = built(" ".join([words, *(f"--{key} {value}" for key, value in values.items())]))
    assert type(method) is kind and {key: getattr(method, key) for key in values} == values
    if name == "kd":
        losses = [built(f"{words} --feature-loss {loss}").feature_loss for loss in ("none", "at", "fitnet", "od")]
        assert losses[:2] == [None, frskd.attention_transfer]
        assert [type(loss) for loss in losses[2:]] == [baselines.Hint, baselines.Overhaul]


def test_a_teacher_whose_maps_differ_teaches_by_soft_labels_alone(refused):
    torch.save(frskd.resnet18(8, "cifar").state_dict(), "t.pt")
    words = f"{TINY} --method kd --teacher-arch resnet18 --teacher-checkpoint t.pt --epochs 1"
    message = refused(train, words, "--feature-loss at")
    assert "its maps are [(16, 16), (8, 8), (4, 4)], those of --teacher-arch resnet18 [(16, 16)" in message
    assert main(train, words, "--output a") == 0 and {"ce", "kd"} < log_of("a")[0].keys()


def test_a_plain_network_of_timm_trains_at_its_own_maps():
    pytest.importorskip("timm")
    method = train.build(resolved("--arch timm/test_resnet --image-size 64 --device cpu"), 8)
    assert type(method.student) is frskd.Timm and len(method.student.channels) == 4
    terms, logits = method(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
    assert logits.shape == (2, 8) and set(terms) == {"ce", "ce_t", "kd", "feat"}


def test_a_network_of_torchvision_trains_on_large_images_with_a_worker():
    """By its blocks' names; student.pt loads into torchvision's class, and numbers do not depend on workers."""
    words = f"--dataset folder --data-dir {class_folders('images', 80)} --image-size 72 --batch-size 6 --device cpu"
    words += " --arch mobilenet_v3_small --blocks features.3,features.8,features.11 --epochs 1 --attention 9 --output"
    assert main(train, words, "a --workers 1") == main(train, words, "b --workers 0") == 0
    assert numbers("a") == numbers("b")
    net = torchvision.models.mobilenet_v3_small(num_classes=3)
    net.load_state_dict(torch.load("a/student.pt", weights_only=True))


# ------------------------------------------------------------------------------------- training and evaluation


def loader_of(labels, batch_size=3):
    split = data.Split(torch.zeros(len(labels), 8, 8, 3, dtype=torch.uint8), torch.tensor(labels))
    return data.make_loader(split, train=False, batch_size=batch_size, image_size=8)


def test_training_accuracy_by_hand():
    """Soft labels count by their largest entry."""
    logits = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1]])
    assert train.accuracy(logits, torch.tensor([0, 1, 0, 1])) == 75
    assert train.accuracy(logits, torch.tensor([[0.7, 0.3], [0.9, 0.1], [0.8, 0.2], [0.4, 0.6]])) == 50


class Ranked(nn.Module):
    """Class 0 first, the last class last."""

    def __init__(self, num_classes, value=0.0):
        super().__init__()
        self.logits = value - torch.arange(float(num_classes))

    def forward(self, x):
        assert not self.training
        return self.logits.repeat(len(x), 1)


def test_top_1_and_top_5_by_hand():
    """Four images, the label ranked 1st, 2nd, 5th and 6th of seven classes; of three classes the best of three."""
    args = resolved("--device cpu")
    assert train.evaluate(Ranked(7), loader_of([0, 1, 4, 5]), args) == dict(top1=25, top5=75)
    few = train.evaluate(Ranked(3), loader_of([2, 1, 0, 0, 2, 2, 2]), args)
    assert few == dict(top1=pytest.approx(200 / 7), top5=100)
    assert math.isnan(train.evaluate(Ranked(7, math.inf), loader_of([0]), args)["top1"])


def test_per_class_is_the_first_images_of_each_class():
    images, loader, test_loader = train.loaders(resolved("--image-size 16 --per-class 3 --batch-size 6 --device cpu"))
    assert images.train.labels.bincount().tolist() == [3] * 8 and len(loader) == 4 and len(test_loader.split) == 32
    assert torch.equal(images.train.images[3:6], data.load("shapes", image_size=16).train.images[8:11])


@pytest.mark.parametrize("words, one_hot, entries", [("--mixup", False, 2), ("--cutmix", False, 2), ("", True, 1)])
def test_mixed_labels_are_shares_of_two_classes(words, one_hot, entries):
    _, loader, _ = train.loaders(resolved(f"--image-size 16 --batch-size 16 --device cpu {words}"))
    x, y = next(iter(loader.epoch(0)))
    assert (y.ndim == 1) == one_hot and x.shape == (16, 3, 16, 16)
    if not one_hot:
        assert torch.allclose(y.sum(1), torch.ones(16)) and (y > 0).sum(1).max() == entries
        assert type(loader.mix).__name__.lower() == words[2:] and loader.mix.alpha == (0.2 if words == "--mixup" else 1)


def test_compiled_training_gives_the_same_losses(run):
    assert main(train, TINY, "--epochs 2 --output compiled --compile eager") == 0
    assert numbers("compiled")[0] == pytest.approx(numbers(run)[0], rel=1e-3)


def test_bf16_trains_near_float32(run):
    assert main(train, TINY, "--epochs 2 --amp --output amp") == 0
    for terms, expected in zip(log_of("amp"), log_of(run)):
        assert 0 < abs(terms["ce"] - expected["ce"]) < 0.1
    assert all(value.dtype in (torch.float32, torch.int64) for value in weights("amp").values())


# ---------------------------------------------------------------------------------------------- what it prints


def test_cost_is_that_of_table_6(capsys):
    """WRN-16-2 at 32 px, 100 classes: the self-teacher has x0.59 of the network's parameters."""
    assert main(train, "--cost --dataset cifar100 --arch wrn16_2 --device cpu") == 0
    *_, net, teacher = ([cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines())
    assert net[1:4] == ["wrn16_2", "0.703", "0.102"] and teacher[2] == "0.412" and teacher[4].startswith("x0.59, x0.")


def test_attention_and_curves_are_drawn_at_the_end_and_by_eval(run, monkeypatch):
    """curves.png of every run; attention.png where --attention says nothing else."""
    monkeypatch.setattr(figures, "draw_curves", CURVES)
    assert main(train, TINY.replace("--attention 99", "--attention"), "--epochs 1 --per-class 2 --output a") == 0
    assert main(train, TINY.replace("99", "1 2"), "--epochs 3 --per-class 2 --output b") == 0
    assert {"attention.png", "curves.png"} == {path.name for path in Path("a").glob("*.png")}
    assert {"attention-1.png", "attention-2.png", "curves.png"} == {path.name for path in Path("b").glob("*.png")}
    assert main(train, "--eval a/last.pt --attention --output c") == 0
    assert Path("c/attention.png").read_bytes() == Path("a/attention.png").read_bytes()
    assert main(train, "--table a --curves c.png") == 0 and Image.open("c.png").width > 300
    assert main(train, "--eval", run / "last.pt") == 0 and not list(run.glob("*.png"))  # unasked, though training was


CURVES = figures.draw_curves
