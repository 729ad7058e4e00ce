"""How a precision is reached: by flags and pinned layers up to TensorRT 10, by the types in the ONNX file from 11."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from deimkit.deploy.card import Card
from deimkit.deploy.trt.library import version
from deimkit.deploy.trt.plan import Plan
from deimkit.errors import DeployError


@dataclass(frozen=True)
class Route:
    """A way to a precision. name: short, for file names. words: for people; a benchmark must say which way it was.

    network: creation flags. on, off: builder flags. pins: whether sensitive layers are to be kept in FP32.
    """

    name: str
    words: str
    network: tuple[str, ...] = ()
    on: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    pins: bool = False

    def recipe(self, kept: int) -> str:
        """The way in words, with how many layers were kept in FP32."""
        return f"{self.words}, {kept} layers kept in FP32" if self.pins else self.words


EXPLICIT, TYPED = ("EXPLICIT_BATCH",), ("STRONGLY_TYPED",)
OBEY = "OBEY_PRECISION_CONSTRAINTS"

# (major version, asked for, what stands in the ONNX file) -> the way. TF32 has the 11 bits of FP16, and is on unless
# switched off: without that, "fp32" would not mean it. Version 10 ignores EXPLICIT_BATCH, 11 no longer has it.
ROUTES = {
    (8, "fp32", "fp32"): Route("fp32", "FP32", network=EXPLICIT, off=("TF32",)),
    (8, "fp16", "fp32"): Route("fp16-flag", "FP16 flag", network=EXPLICIT, on=("FP16", OBEY), pins=True),
    (8, "fp16", "fp16"): Route("fp16-types", "FP16 flag on typed ONNX", network=EXPLICIT, on=("FP16",)),
    (8, "int8", "int8"): Route("int8-qdq", "Q/DQ, INT8 and FP16 flags", EXPLICIT, ("INT8", "FP16", OBEY), pins=True),
    (10, "fp32", "fp32"): Route("fp32", "FP32", off=("TF32",)),
    (10, "fp16", "fp32"): Route("fp16-flag", "FP16 flag", on=("FP16", OBEY), pins=True),
    (10, "fp16", "fp16"): Route("fp16-typed", "typed ONNX (FP16)", network=TYPED),
    (10, "int8", "int8"): Route("int8-qdq", "Q/DQ, INT8 and FP16 flags", on=("INT8", "FP16", OBEY), pins=True),
    (11, "fp32", "fp32"): Route("fp32", "FP32", off=("TF32",)),
    (11, "fp16", "fp16"): Route("fp16-typed", "typed ONNX (FP16)"),
    (11, "int8", "int8"): Route("int8-typed", "typed ONNX (Q/DQ)"),
}


def route(trt: ModuleType, plan: Plan, card: Card) -> Route:
    """The way to `plan.precision` from this ONNX file in this version of TensorRT; `DeployError` if there is none."""
    major = {8: 8, 9: 8, 10: 10}.get(version(trt)[0], 11)
    found = ROUTES.get((major, plan.precision, card.precision))
    if found is None:
        gone = (
            " It has no FP16 flag any more." if (major, plan.precision, card.precision) == (11, "fp16", "fp32") else ""
        )
        raise DeployError(
            f"TensorRT {trt.__version__} makes no {plan.precision} engine of an ONNX file in {card.precision}.{gone} "
            f"Write the file anew with `deimkit export ... --precision {plan.precision}`."
        )
    return found


def written(trt: ModuleType, precision: str) -> str:
    """The precision that has to stand in the ONNX file for an engine of `precision`: flags do the rest up to 10."""
    return precision if precision == "int8" or version(trt)[0] > 10 else "fp32"


PRODUCTS = {"MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "EINSUM", "GRID_SAMPLE"}

# No precision may be set on these: their type is what they are for (a cast fails the build), or they take that of
# whoever reads them.
GIVEN = {"CAST", "CONSTANT", "DEQUANTIZE", "IDENTITY", "PLUGIN_V2", "PLUGIN_V3", "QUANTIZE", "SHAPE"}


def pin(trt: ModuleType, network: Any, plan: Plan) -> int:
    """Keep the sensitive layers of a network in FP32; returns how many they are."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    tensors = ends(trt, network, layers) if plan.ends else set()
    kept = [
        layer
        for layer in layers
        if computes(trt, layer) and (sensitive(layer, plan.keep) or layer.get_output(0).name in tensors)
    ]
    for layer in kept:
        layer.precision = trt.float32
        for i in range(layer.num_outputs):
            if layer.get_output(i).dtype == trt.float32:  # top-k also gives indices
                layer.set_output_type(i, trt.float32)
    return len(kept)


def sensitive(layer: Any, keep: tuple[str, ...]) -> bool:
    """Whether a layer's type is in `keep`, or a part of its name."""
    return layer.type.name in keep or any(part in layer.name.lower() for part in keep if part.islower())


def ends(trt: ModuleType, network: Any, layers: list[Any]) -> set[str]:
    """The tensors between the last products of matrices and an output, or a place where maps are sampled."""
    maker = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    ahead = [network.get_output(i) for i in range(network.num_outputs)]
    ahead += [layer.get_input(1) for layer in layers if layer.type.name == "GRID_SAMPLE"]
    found: set[str] = set()
    while ahead:
        tensor = ahead.pop()
        if tensor is None or tensor.dtype != trt.float32 or tensor.name in found:  # None: an input that is left out
            continue
        layer = maker.get(tensor.name)  # none makes an input of the network
        if layer is not None and layer.type.name not in PRODUCTS:
            found.add(tensor.name)
            ahead += [layer.get_input(i) for i in range(layer.num_inputs)]
    return found


def computes(trt: ModuleType, layer: Any) -> bool:
    """Whether a layer computes with floating point, so that its precision is ours to choose."""
    first = layer.get_output(0)
    return layer.type.name not in GIVEN and first.dtype == trt.float32 and not first.is_shape_tensor
