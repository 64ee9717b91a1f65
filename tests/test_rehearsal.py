"""The package with its models on a second device: what would fail on a GPU fails here."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from rehearsal import accelerator
from test_book import cells, each_chapter, source
from traitlets.config import Config

from xai_helpers.attention import relevance, rollout
from xai_helpers.attribution import attribute, occlude, rise
from xai_helpers.cam import explain
from xai_helpers.checkpoints import example_scene, load
from xai_helpers.concepts import factorize
from xai_helpers.layers import find_target_layers


@pytest.fixture
def elsewhere():
    with accelerator() as device:
        yield device


def explain_found(model, x):
    layer = find_target_layers(model, x).cam
    return explain(model, x, [0, 1], layer.module, layer.reshape_transform)


METHODS = {
    "balanced": lambda model, x: explain(model, x, [0, 1]),
    "balanced, at the pixels": lambda model, x: attribute(model, x, [0, 1], "balanced"),
    "Grad-CAM": lambda model, x: explain_found(model, x),
    "relevance": lambda model, x: relevance(model, x, [0, 1]),
    "rollout": rollout,
    "gradient": lambda model, x: attribute(model, x, [0, 1]),
    "occlusion": lambda model, x: occlude(model, x, [0, 1]),
    "RISE": lambda model, x: rise(model, x, [0, 1], n_masks=20),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("input_there", [True, False])
def test_maps_are_those_of_the_cpu(elsewhere, method, input_there):
    (here, processor), (there, _) = load("vit", "bundled", "cpu"), load("vit", "bundled", elsewhere)
    x = processor(example_scene("bundled").image, return_tensors="pt")["pixel_values"]
    found = method(there, x.to(elsewhere) if input_there else x)
    assert type(found) is np.ndarray
    np.testing.assert_allclose(found, method(here, x), atol=1e-3)


def test_concepts_are_those_of_the_cpu(elsewhere):
    (here, processor), (there, _) = load("resnet", "bundled", "cpu"), load("resnet", "bundled", elsewhere)
    x = processor(example_scene("bundled").image, return_tensors="pt")["pixel_values"]
    wanted, found = (factorize(m, x, m.resnet.encoder.stages[-1], m.classifier).maps for m in (here, there))
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_load_goes_where_the_environment_says(elsewhere, monkeypatch):
    monkeypatch.setenv("XAI_DEVICE", "rehearsal")
    assert load("resnet", "bundled")[0].device == elsewhere
    assert load("resnet", "bundled", "cpu")[0].device == torch.device("cpu")


def test_it_refuses_what_a_gpu_refuses(elsewhere):
    there, here = torch.ones(3, device=elsewhere), torch.ones(3)
    with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
        there + here
    with pytest.raises(RuntimeError, match="indices should be"):
        here[there.long()]
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\)"):
        there.numpy()
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\)"):
        np.asarray(there)
    with pytest.raises(TypeError, match="single precision"):
        there.double()
    assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2]
    assert there.numpy(force=True).tolist() == [1, 1, 1]
    assert f"{there[0]:.2f}" == "1.00"
    there[[0, 2]] = 5
    assert there[np.array([2, 1])].tolist() == [5, 1]


def test_it_computes_what_the_cpu_computes(elsewhere):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(inplace=True)).eval()
    x = torch.randn(2, 3, 8, 8)
    (wanted,) = torch.autograd.grad(net(x.requires_grad_()).square().sum(), x)
    there = x.detach().to(elsewhere).requires_grad_()
    (found,) = torch.autograd.grad(net.to(elsewhere)(there).square().sum(), there)
    assert found.device == elsewhere
    torch.testing.assert_close(found.cpu(), wanted)


def test_outside_there_is_no_accelerator_but_a_real_one():
    found = torch.accelerator.current_accelerator(check_available=True)
    assert found is None or found.type != "rehearsal"


@pytest.fixture
def shell(elsewhere, monkeypatch, tmp_path):
    """Runs cells as a notebook does, in this process, so that imports are paid once; afterwards all is as before."""
    monkeypatch.setenv("XAI_EXAMPLES", "2")
    monkeypatch.delenv("XAI_DEVICE")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(tmp_path)
    states = torch.get_rng_state(), np.random.get_state()
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    with plt.rc_context({"backend": "agg"}):
        yield shell
    plt.close("all")
    shell.reset()
    InteractiveShell.clear_instance()
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])


# Two scenes do not support the claims. An error inside a backward hook ends the process where PyTorch asks a device
# that is written in Python for its type.
NOT_ELSEWHERE = {"claims", "raises-in-hook"}


@pytest.mark.slow
@each_chapter
def test_chapter_runs_elsewhere(path, shell):
    for cell in cells(path, "code"):
        if not NOT_ELSEWHERE & set(cell["metadata"].get("tags", [])):
            result = shell.run_cell(source(cell))
            assert result.success, source(cell)
