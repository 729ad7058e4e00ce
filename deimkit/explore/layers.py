"""What every layer of the decoder says about an image, and not the last one alone, as in evaluation."""

from __future__ import annotations

from torch import Tensor, nn

from deimkit.errors import DeimkitError
from deimkit.models.detector import Detector, check_images, training_outputs
from deimkit.models.predict import predicting
from deimkit.structures import Output, Targets


def all_layers(model: Detector, images: Tensor) -> list[Output]:
    """One `Output` for each set of predictions on the way: "proposals", "pre", "layer0", "layer1", ..., "final".

    images: (B, 3, H, W) in [0, 1], on the model's device. Outputs are as in training, but in evaluation's arithmetic,
    without gradients and without denoising, so the layer that evaluation asks (the last one as a rule) says just what
    `model.eval()(images)` does. "pre" is there only for box heads that predict before they refine (FDR). The model and
    the random state stay as they were. Raises `DeimkitError` for what is no Detector, or was cut down by `deploy`.
    """
    if not isinstance(model, Detector) or any(isinstance(head, nn.Identity) for head in model.refine.score):
        what = "one that was deployed" if isinstance(model, Detector) else type(model).__name__
        raise DeimkitError(
            f"Only a whole Detector can be asked layer by layer; got {what}. Take it as `load` gives it."
        )
    check_images(images)
    with predicting(model):
        memory = model.decoder.remember(model.encoder(model.backbone(images)))
        start = model.queries(memory.tokens, memory.shapes)
        model.decoder.training = model.refine.training = True  # of these two alone: they hide what is not asked
        layers, pre = model.decoder(start.content, start.boxes.sigmoid(), memory, None, model.refine)
    outputs = training_outputs(layers, pre, start.proposals, start.content.shape[1], [])
    return sorted(outputs, key=lambda output: _ORDER.get(output.name, 2))


def expect_classes(model: Detector, targets: Targets) -> None:
    """Raise `DeimkitError` for a target of a class that the model does not have."""
    top, count = int(targets.labels.max()) if len(targets) else -1, len(model.categories)
    if top >= count:
        raise DeimkitError(
            f"The detector has the classes 0 to {count - 1}; got a target of class {top}. Give it a dataset in its own "
            "classes: `deimkit.evaluation.measure.in_classes_of(model.categories, split)`."
        )


_ORDER = {"proposals": 0, "pre": 1, "final": 3}  # layers stand between, in the order that they are in already
