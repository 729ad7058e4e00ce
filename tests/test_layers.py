"""What every layer says: the asked one says what evaluation does, and the model does not notice that it was asked."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from deimkit.errors import DataError, DeimkitError
from deimkit.explore.layers import all_layers
from deimkit.models.detector import Detector
from deimkit.recipes.archs import rtdetrv2_arch
from deimkit.structures import Targets
from tests.micro import ARCH

IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
DELTAS = replace(rtdetrv2_arch("tiny", "silu"), queries=ARCH.queries)


def shaken(model: Detector) -> Detector:
    """The same detector with no weight, and no batch norm's mean, left at a special value."""
    with torch.no_grad():
        for values in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("running_mean"))):
            values += 0.05 * torch.randn_like(values)
    return model


@pytest.mark.parametrize("arch", [ARCH, DELTAS], ids=["FDR", "deltas"])
def test_the_final_layer_says_what_evaluation_does_and_the_others_something_else(arch) -> None:
    model = shaken(Detector(arch, 3)).eval()
    outputs = {output.name: output for output in all_layers(model, IMAGES)}
    layers = [f"layer{i}" for i in range(arch.decoder.layers - 1)]
    assert list(outputs) == ["proposals", *(["pre"] if arch is ARCH else []), *layers, "final"]
    with torch.no_grad():
        expected = model(IMAGES)
    final = outputs["final"].preds
    torch.testing.assert_close(final.logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(final.boxes, expected.boxes, atol=1e-5, rtol=0)
    for name in layers:
        assert outputs[name].last is final and not outputs[name].preds.boxes.requires_grad
        assert (outputs[name].preds.boxes - final.boxes).abs().max() > 1e-4
    if arch is ARCH:
        torch.testing.assert_close(final.edges, expected.edges, atol=1e-5, rtol=0)
        assert torch.equal(outputs["pre"].preds.boxes, final.anchors), "all edges are measured from the first boxes"


def test_layers_are_those_of_training() -> None:
    """Without batch norms that see the batch, training on images without boxes says the same of every layer."""
    model = shaken(Detector(ARCH, 3)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    nothing = Targets(torch.empty(0).long(), torch.empty(0).long(), torch.empty(0, 4))
    trained = {output.name: output.preds for output in model(IMAGES, nothing) if output.pooled}
    said = {output.name: output.preds for output in all_layers(model, IMAGES)}
    assert said.keys() == trained.keys()
    for name, preds in said.items():
        torch.testing.assert_close(preds.boxes, trained[name].boxes.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(preds.logits, trained[name].logits.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_about_the_model_changes(training: bool) -> None:
    model = shaken(Detector(ARCH, 3)).train(training)
    model.backbone.eval()  # as someone who freezes it would
    before, modes = deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    all_layers(model, IMAGES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(DataError):
        all_layers(model, IMAGES[:, :, :50])
    assert [module.training for module in model.modules()] == modes


def test_what_has_no_layers_left_is_refused() -> None:
    model = Detector(ARCH, 3)
    with pytest.raises(DeimkitError, match="got one that was deployed. Take it as `load` gives it"):
        all_layers(model.deploy(), IMAGES)
    with pytest.raises(DeimkitError, match="got Linear"):
        all_layers(nn.Linear(2, 2), IMAGES)  # type: ignore[arg-type]
