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


@pytest.mark.parametrize("options", ["", "--sla"])
def test_frskd_is_compiled_as_one_graph_and_once(options):
    compiled = torch.compile(bench.build(options, "wrn10_1", "cpu")[1], backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            compiled(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))


def test_it_prints_times_kernels_and_loading(capsys, monkeypatch):
    """Two columns a precision, the first method's ratio 1.00; a step of FRSKD is a few hundred kernels."""
    drawn = data.draw_shapes
    monkeypatch.setattr(data, "draw_shapes", lambda n, size, seed: drawn(n, 64, seed))
    words = "--arch wrn10_1 --batch-size 2 --rounds 1 --workers 0 --device cpu"
    assert bench.main(words.split() + ["--only=--method baseline,"]) == 0
    out = capsys.readouterr().out
    cell = r" +\d+ ms \d+/s x(\d+\.\d\d) +\| (\d+) (\d+\.\d) +\|"
    baseline, frskd = [re.search(rf"\| {name} +\|{cell}{cell}", out).groups() for name in ("baseline", "frskd")]
    assert baseline[0] == baseline[3] == "1.00" != frskd[0] and float(baseline[2]) < float(frskd[2])
    assert int(baseline[1]) < 100 and 400 < int(frskd[1]) < 600
    assert re.search(r"Loading alone: 32 px, on the device, \d+ images/s; JPEGs of 500 px to 224 px", out)
