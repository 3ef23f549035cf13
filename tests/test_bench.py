"""The benchmark: what it counts, and that it runs."""

import re
from contextlib import nullcontext

import pytest
import torch

import train
from experiments import bench, data, runs


def test_kernels_and_bytes_by_hand():
    """Of float32: 6 = 2 read + 1 written of 2 elements, then 3 of 2, one in place; views are neither."""
    a, b = torch.ones(2), torch.ones(2)
    with bench.Count() as count:
        c = a + b
        c.view(2, 1).t().add_(a)
        c[:1].unsqueeze(0).expand(3, 1)
    assert (count.kernels, count.bytes) == (2, 4 * (3 * 2 + 3 * 2))


def test_every_method_of_the_script_is_timed():
    names = [bench.build(options, "wrn10_1", "cpu")[0] for options in bench.METHODS]
    assert {name.partition("-")[0] for name in names} == set(train.METHODS)


@pytest.mark.parametrize("options", bench.METHODS)
def test_a_step_never_waits_for_the_device(options, monkeypatch):
    """On the meta device, which has no values, .item(), a tensor as a condition or a copy to the host raise."""
    monkeypatch.setattr(runs, "autocast", lambda args: nullcontext())  # which does not know that device
    step = bench.training_step(bench.build(options, "wrn10_1", "meta")[1], 4)
    step(), step()


def test_a_step_of_frskd_is_few_kernels():
    step = bench.training_step(bench.build("", "wrn16_2", "cpu")[1], 2)
    step()  # makes the momentum
    with bench.Count() as count:
        step()
    assert 300 < count.kernels < 600


@pytest.mark.parametrize("options, arch", [("", "resnet18"), ("--sla", "wrn10_1")])
def test_frskd_is_compiled_as_one_graph_and_once(options, arch):
    method = bench.build(options, arch, "cpu")[1]
    compiled = torch.compile(method, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            terms, logits = compiled(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    assert logits.shape == (2, 100) and sum(terms.values()).requires_grad


def test_it_prints_times_kernels_and_loading(capsys, monkeypatch, tmp_path):
    """Two columns a precision, the first method's ratio 1.00; nothing is left in the folder."""
    drawn = data.draw_shapes
    monkeypatch.setattr(data, "draw_shapes", lambda n, size, seed: drawn(n, 64, seed))
    words = "--arch wrn10_1 --batch-size 4 --rounds 1 --workers 0 --device cpu"
    assert bench.main(words.split() + ["--only=--method baseline,--method cskd"]) == 0
    out = capsys.readouterr().out
    assert "| method   | float32" in out and "batch 4 at 32 px" in out
    cell = r" +\d+ ms \d+/s x(\d+\.\d\d) +\| (\d+) (\d+\.\d) +\|"
    rows = {name: re.search(rf"\| {name} +\|{cell}{cell}", out).groups() for name in ("baseline", "cskd")}
    assert rows["baseline"][0] == rows["baseline"][3] == "1.00"
    assert int(rows["baseline"][1]) < int(rows["cskd"][1]) and float(rows["baseline"][2]) < float(rows["cskd"][2])
    assert re.search(r"Loading alone: 32 px, on the device, \d+ images/s; JPEGs of 500 px to 224 px", out)
    assert not list(tmp_path.iterdir())
