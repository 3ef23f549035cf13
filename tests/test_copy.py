"""docs/copy.md: its block names are those of torchvision, a training step each."""
import pathlib
import re

import pytest
import torch
import torchvision

from frskd import FRSKD, Adapter, BiFPN, Timm, export

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "copy.md").read_text()
TABLE = re.findall(r"^\| ([\w, ]+) \| `([^`]+)` \| ([\d ]+) \|$", PAGE, re.M)
ROWS = [(names.split(", "), blocks.split(), [int(c) for c in channels.split()]) for names, blocks, channels in TABLE]
SIZES = {"googlenet": 96, "inception_v3": 128, "maxvit_t": 224}  # what 64 px do not suffice for


def train_a_step(student, size):
    """All parameters have a finite gradient of FRSKD; the plain network stays what it was."""
    method = FRSKD(student, BiFPN(student.channels, 10, dim=16), alpha=1, beta=200).train()
    terms, logits = method(torch.randn(2, 3, size, size), torch.tensor([1, 2]))
    sum(terms.values()).backward()
    assert set(terms) == {"ce", "ce_t", "kd", "feat"} and logits.shape == (2, 10)
    for name, p in method.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    torch.optim.SGD(method.parameters(), 0.01).step()


def train_network(name, blocks):
    torch.manual_seed(0)
    size = SIZES.get(name, 64)
    options = dict(aux_logits=False, init_weights=False) if name in ("googlenet", "inception_v3") else {}
    net = torchvision.models.get_model(name, num_classes=10, **options)
    names, student = list(net.state_dict()), Adapter(net, blocks, torch.randn(1, 3, size, size))
    train_a_step(student, size)
    assert list(export(student).state_dict()) == names
    return student.channels


def test_two_rows_of_the_page():
    wanted = {"resnet18": None, "mobilenet_v3_small": None}
    for (name, *_), blocks, channels in ROWS:
        if name in wanted:
            assert train_network(name, blocks) == channels
            del wanted[name]
    assert not wanted


def test_page_has_thirty_networks():
    assert len({name for names, _, _ in ROWS for name in names}) >= 30 and len(ROWS) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("names, blocks, channels", ROWS, ids=[names[0] for names, _, _ in ROWS])
def test_every_row_of_the_page(names, blocks, channels):
    assert train_network(names[0], blocks) == channels
    for name in names[1:]:
        train_network(name, blocks)


def test_timm_with_tokens_channels_last_maps_and_three_stages():
    timm = pytest.importorskip("timm")
    for name, indices, channels in (
        ("vit_tiny_patch16_224", 4, [192] * 4),
        ("swin_tiny_patch4_window7_224", 4, [96, 192, 384, 768]),
        ("visformer_tiny", 3, [96, 192, 384]),
    ):
        torch.manual_seed(0)
        net = timm.create_model(name, num_classes=10, img_size=64)
        student = Timm(net, indices, torch.randn(1, 3, 64, 64))
        assert student.channels == channels
        train_a_step(student, 64)
