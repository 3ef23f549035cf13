"""docs/copy.md: its block names are those of torchvision, a training step each."""
import pathlib
import re

import pytest
import torch
import torchvision

from frskd import FRSKD, Adapter, BiFPN, Timm

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "copy.md").read_text(encoding="utf-8")
TABLE = re.findall(r"^\| ([\w, ]+) \| `([^`]+)` \| ([\d ]+) \|$", PAGE, re.M)
QUICK = ("resnet18, resnet34", "mobilenet_v3_small")
ROWS = [pytest.param(*row, id=row[0], marks=[] if row[0] in QUICK else pytest.mark.slow) for row in TABLE]
SIZES = {"googlenet": 96, "inception_v3": 128, "maxvit_t": 224}  # what 64 px do not suffice for


def train_a_step(student, size):
    method = FRSKD(student, BiFPN(student.channels, 10, dim=16))
    sum(method(torch.randn(2, 3, size, size), torch.tensor([1, 2]))[0].values()).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("names, blocks, channels", ROWS)
def test_a_row_of_the_page(names, blocks, channels):
    torch.manual_seed(0)
    for i, name in enumerate(names.split(", ")):
        size = SIZES.get(name, 64)
        options = dict(aux_logits=False, init_weights=False) if name in ("googlenet", "inception_v3") else {}
        net = torchvision.models.get_model(name, num_classes=10, **options)
        student = Adapter(net, blocks.split(), torch.randn(1, 3, size, size))
        assert i or student.channels == [int(c) for c in channels.split()]  # those of the row's first network
        train_a_step(student, size)


def test_page_has_thirty_networks():
    assert len({name for names, *_ in TABLE for name in names.split(", ")}) >= 30


@pytest.mark.parametrize("name, channels", [
    ("vit_tiny_patch16_224", [192] * 4), ("swin_tiny_patch4_window7_224", [96, 192, 384, 768]),
])  # fmt: skip
def test_networks_of_timm_with_tokens(name, channels):
    net = pytest.importorskip("timm").create_model(name, num_classes=10, img_size=64)
    student = Timm(net, example=torch.randn(1, 3, 64, 64))
    assert student.channels == channels
    train_a_step(student, 64)
