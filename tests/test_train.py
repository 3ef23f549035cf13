"""train.py: recipes, methods as options build them, training and evaluation, what it prints."""

import functools
import itertools
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
from conftest import TINY, log_of, main, weights
from experiments import baselines, data, figures, runs

pytestmark = pytest.mark.usefixtures("quick")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CURVES = figures.draw_curves
resolved = functools.partial(conftest.resolved, train)


def built(words, num_classes=8):
    return train.build(resolved(f"--arch wrn10_1 --image-size 16 --device cpu {words}"), num_classes)


def class_folders(root, size, per_class):
    """train/ and val/ of drawn shapes, three classes."""
    images, labels, _ = data.draw_shapes(per_class, size, seed=0)
    for split, (i, label) in itertools.product(("train", "val"), enumerate(labels[: 3 * per_class])):
        folder = Path(root, split, f"class{label}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i].numpy()).save(folder / f"{i}.png")
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
    assert (args.lr, args.weight_decay, args.momentum, args.arch) == (0.1, 1e-4, 0.9, "resnet18")
    assert (args.temperature, args.width, args.channels, args.feature_loss) == (4, 2, None, "at")
    assert (args.image_size, data.STATS[args.stats], args.cutmix) == (image_size, stats, None)


def test_weights_depend_on_method_and_feature_loss():
    assert [resolved(f"--feature-loss {loss}").beta for loss in ("at", "fitnet", "od")] == [100, 1, 0.01]  # Table 5
    kd = "--method kd --teacher-checkpoint x --feature-loss"
    assert [resolved(f"{kd} {loss}").beta for loss in ("none", "at", "fitnet", "od")] == [0, 1000, 100, 1]  # Table 7
    assert [resolved(f"--dataset {name} --method cskd").alpha for name in ("cifar100", "cub200")] == [1, 3]
    byot = resolved("--method byot")
    assert (byot.alpha, byot.beta, byot.temperature) == (0.1, 1e-6, 3)  # its constructor's


@pytest.mark.parametrize("size, recipe", [(64, (64, 2, 100, 128)), (80, (224, 1, 200, 32))])
def test_a_folder_takes_the_recipe_of_its_size(size, recipe):
    """CIFAR-100's up to 64 px; above, that of the fine-grained sets at 224 px."""
    args = resolved(f"--dataset folder --data-dir {class_folders('images', size, per_class=1)}")
    assert (args.image_size, args.alpha, args.beta, args.batch_size) == recipe


# --------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("words, kind, loss", [
    ("", frskd.FRSKD, type(frskd.attention_transfer)), ("--feature-loss fitnet", frskd.FRSKD, baselines.FitNet),
    ("--feature-loss od --sla", frskd.FRSKDSLA, baselines.Overhaul),
])  # fmt: skip
def test_frskd_is_built_as_the_options_say(words, kind, loss):
    method = built(f"--alpha 3 --beta 70 --temperature 5 --width 3 {words}")
    assert type(method) is kind and method.teacher.dims == [48, 96, 192]
    assert (method.alpha, method.beta, method.temperature) == (3, 70, 5) and type(method.feature_loss) is loss
    assert built(f"--channels 24 {words}").teacher.dims == [24, 24, 24]
    first, again, other = (built(f"{words} --seed {seed}").student.fc.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_teacher_is_read_and_one_whose_maps_differ_teaches_by_soft_labels_alone(refused):
    words = "--method kd --teacher-checkpoint t.pt --teacher-arch"
    teacher = frskd.WideResNet(16, 1, 8)
    torch.save(teacher.state_dict(), "t.pt")
    methods = [built(f"{words} wrn16_1 --alpha 3 --feature-loss {loss}") for loss in ("none", "at", "fitnet", "od")]
    assert torch.equal(methods[0].teacher.fc.weight, teacher.fc.weight) and methods[0].alpha == 3
    assert [method.feature_loss for method in methods[:2]] == [None, frskd.attention_transfer]
    assert [type(method.feature_loss) for method in methods[2:]] == [baselines.Hint, baselines.Overhaul]
    torch.save(frskd.resnet18(8, "cifar").state_dict(), "t.pt")
    assert built(f"{words} resnet18").feature_loss is None
    message = refused(train, TINY, words, "resnet18 --feature-loss at")
    assert "its maps are [(16, 16), (8, 8), (4, 4)], those of --teacher-arch resnet18 [(16, 16)" in message


def test_a_plain_network_of_timm_trains_at_its_own_maps():
    pytest.importorskip("timm")
    method = train.build(resolved("--arch timm/test_resnet --image-size 64 --device cpu"), 8)
    assert type(method.student) is frskd.Timm and len(method.student.channels) == 4
    terms, logits = method(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
    assert logits.shape == (2, 8) and set(terms) == {"ce", "ce_t", "kd", "feat"}


def test_a_network_of_torchvision_trains_on_large_images_with_a_worker():
    """By its blocks' names; student.pt loads into torchvision's class."""
    words = f"--dataset folder --data-dir {class_folders('images', 80, per_class=4)} --image-size 72 --batch-size 6"
    words += " --arch mobilenet_v3_small --blocks features.3,features.8,features.11 --epochs 1 --attention 9"
    assert main(train, words, "--device cpu --workers 1 --output a") == 0
    net = torchvision.models.mobilenet_v3_small(num_classes=3)
    net.load_state_dict(torch.load("a/student.pt", weights_only=True))


# ------------------------------------------------------------------------------------- training and evaluation


def loader_of(labels):
    split = data.Split(torch.zeros(len(labels), 8, 8, 3, dtype=torch.uint8), torch.tensor(labels))
    return data.make_loader(split, train=False, batch_size=3, image_size=8)


def test_training_accuracy_by_hand():
    """Soft labels count by their largest entry."""
    logits = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1]])
    assert train.accuracy(logits, torch.tensor([0, 1, 0, 1])) == 75
    assert train.accuracy(logits, torch.tensor([[0.7, 0.3], [0.1, 0.9], [0.8, 0.2], [0.4, 0.6]])) == 75


def ranked(num_classes, logit=0.0):
    """A network that says class 0 first, the last class last."""
    net = nn.Identity()
    net.forward = lambda x: (logit - torch.arange(float(num_classes))).repeat(len(x), 1)
    return net


def test_top_1_and_top_5_by_hand():
    """Four images, the label ranked 1st, 2nd, 5th and 6th of seven classes; of three classes the best of three."""
    args, net = resolved("--device cpu"), ranked(7)
    assert train.evaluate(net, loader_of([0, 1, 4, 5]), args) == dict(top1=25, top5=75) and not net.training
    assert train.evaluate(ranked(3), loader_of([2, 1, 0, 0, 2, 2, 2, 2]), args) == dict(top1=25, top5=100)
    assert math.isnan(train.evaluate(ranked(7, math.inf), loader_of([0]), args)["top1"])


def test_another_seed_is_another_order():
    words = "--image-size 16 --batch-size 16 --device cpu --seed"
    first, second = (next(iter(train.loaders(resolved(f"{words} {seed}"))[1].epoch(0)))[1] for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("words, mix, alpha", [("--mixup", "MixUp", 0.2), ("--cutmix", "CutMix", 1)])
def test_mixed_labels_are_shares_of_two_classes(words, mix, alpha):
    _, loader, _ = train.loaders(resolved(f"--image-size 16 --batch-size 16 --device cpu {words}"))
    _, y = next(iter(loader.epoch(0)))
    assert torch.allclose(y.sum(1), torch.ones(16)) and (y > 0).sum(1).max() == 2
    assert type(loader.mix).__name__ == mix and loader.mix.alpha == alpha


def test_compiled_the_losses_are_the_same():
    method, x, y = built("--method baseline"), torch.randn(4, 3, 16, 16), torch.arange(4)
    compiled = runs.parallel(method, resolved("--compile eager --device cpu"))
    torch.testing.assert_close(compiled(x, y), method(x, y))


def test_bf16_trains_near_float32(run):
    assert main(train, TINY, "--epochs 1 --amp --output amp") == 0
    assert 0 < abs(log_of("amp")[0]["ce"] - log_of(run)[0]["ce"]) < 0.1
    assert all(value.dtype in (torch.float32, torch.int64) for value in weights("amp").values())


# ---------------------------------------------------------------------------------------------- what it prints


def test_cost_is_that_of_table_6(capsys):
    """WRN-16-2 at 32 px, 100 classes: the self-teacher has x0.59 of the network's parameters."""
    assert main(train, "--cost --dataset cifar100 --arch wrn16_2 --device cpu") == 0
    *_, net, teacher = ([cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines())
    assert net[1:4] == ["wrn16_2", "0.703", "0.102"] and teacher[2] == "0.412" and teacher[4].startswith("x0.59, x0.")


def test_attention_and_curves_are_drawn_where_asked(run, monkeypatch):
    monkeypatch.setattr(figures, "draw_curves", CURVES)
    assert main(train, TINY.replace("99", "2"), "--epochs 2 --output a") == 0
    assert {"attention-2.png", "curves.png"} == {path.name for path in Path("a").glob("*.png")}
    assert main(train, "--eval a/last.pt --attention --output b") == 0
    assert Path("b/attention.png").read_bytes() == Path("a/attention-2.png").read_bytes()
    assert main(train, "--table a --curves c.png") == 0 and Path("c.png").exists()
    assert main(train, "--eval", run / "last.pt") == 0 and not list(run.glob("*.png"))  # unasked, though training was
