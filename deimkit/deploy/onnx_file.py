"""A detector as an ONNX file that says what it is."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from io import StringIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deimkit.deploy.card import PRECISIONS, Card
from deimkit.deploy.graph import Graph
from deimkit.errors import DeployError
from deimkit.models.detector import Detector

OLDEST, NEW = 17, 18  # opsets: 16 has no LayerNormalization, whose parts overflow in FP16; from 18 on torch.export
EXPORTERS = ("torchscript", "dynamo")
KEY = "deimkit"  # under which a file's metadata have the card
TAIL = 300  # letters of what torch printed that an error repeats
EXAMPLES = 2  # images in the example of a dynamic batch: a single one would be taken for a constant


def write_onnx(
    detector: Detector,
    path: str | Path,
    recipe: str = "",
    size: tuple[int, int] | None = None,
    batch: int | None = 1,
    postprocess: bool = True,
    precision: str = "fp32",
    opset: int | None = None,
    exporter: str | None = None,
    top: int = 300,
) -> Card:
    """Write `detector` to an ONNX file, weights inside, and return the card that it carries.

    size: (height, width) of the input, multiples of 32, by default the detector's. batch: images at a time, or None for
    any number. postprocess: end in boxes, scores and labels; otherwise in the logits and boxes of all queries.
    precision: "fp32", or "fp16" for weights and activations of half precision, boxes and distributions in float32.
    opset: 17 or more, by default 17, and 18 for fp16. exporter: "torchscript" for 17, "dynamo" from 18 on. top: boxes
    per image. The file is checked, and appears only when it is whole. Raises `DeployError`, and `OSError` where it
    cannot be written.
    """
    onnx = needed("onnx")
    size, asked = size or detector.size, opset
    opset, exporter = choice(precision, opset, exporter, batch, size, top)
    graph = Graph(detector, postprocess, top, torch.float16 if precision == "fp16" else torch.float32).cpu()
    fixed = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    images = torch.rand(EXAMPLES if batch is None else batch, 3, *size, generator=fixed)
    inputs = (images, torch.tensor([size] * len(images))) if postprocess else (images,)
    with torch.no_grad():
        shapes = [tuple(x.shape[1:]) for x in graph(*inputs)]
    card = Card(
        recipe=recipe,
        categories=detector.categories,
        size=size,
        batch=batch,
        postprocess=postprocess,
        top=shapes[0][0] if postprocess else min(top, prod(shapes[0])),  # of Q·C (query, class) pairs
        precision=precision,
        opset=opset,
        exporter=exporter,
        versions={name: version(name) for name in ("deimkit", "torch", "onnx")},
    )
    with written_whole(Path(path)) as file:
        _trace(graph, inputs, file, card, _other(card, asked))
        model = onnx.load(str(file))
        _expect_opset(model, card)
        _say_shapes(model, card, shapes)
        _forget_sources(model)
        write_card(model, card)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, str(file))
    return card


def read_card(path: str | Path) -> Card:
    """The card of an ONNX file; `DeployError` if it is not one, or not one of deimkit's."""
    model = _opened(Path(path))
    told = {entry.key: entry.value for entry in model.metadata_props}
    if KEY not in told:
        raise DeployError(
            f"Expected an ONNX file that `deimkit export` wrote; {str(path)!r} does not say its classes or its input. "
            "Export the detector anew with deimkit."
        )
    return Card.from_json(told[KEY])


def write_card(model: Any, card: Card) -> None:
    """Give an ONNX model its card, and the same under plain names for other programs."""
    plain = {
        KEY: card.to_json(),
        "recipe": card.recipe,
        "names": ", ".join(card.categories.names),
        "input_size": f"{card.size[0]} x {card.size[1]} (height x width)",
        "normalisation": "RGB, pixels of 0 to 255 divided by 255, no mean subtracted; stretched to the input size",
    }
    others = {entry.key: entry.value for entry in model.metadata_props if entry.key not in plain}
    del model.metadata_props[:]
    for key, value in {**others, **plain}.items():
        model.metadata_props.add(key=key, value=value)


def needed(name: str) -> Any:
    """The module of that name; `DeployError` that says how to get it."""
    try:
        return __import__(name)
    except ImportError as error:
        raise DeployError(f"{name} is missing: pip install 'deimkit[export]'.") from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file to write to; it takes the place of `path` once all of it is there, and goes away if it never is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        file = Path(folder) / path.name
        yield file
        os.replace(file, path)


def choice(
    precision: str, opset: int | None, exporter: str | None, batch: int | None, size: tuple[int, int], top: int
) -> tuple[int, str]:
    """The opset and the exporter that `write_onnx` takes, or `DeployError` for what cannot be exported."""
    if precision not in PRECISIONS[:2]:
        raise DeployError(f"precision is one of {', '.join(PRECISIONS[:2])}; got {precision!r}.")
    if batch is not None and batch < 1:
        raise DeployError(f"batch must be at least 1, or None for any number; got {batch}.")
    if any(side < 32 or side % 32 for side in size):
        raise DeployError(f"The input's height and width must be multiples of 32; got {size[0]} x {size[1]}.")
    if top < 1:
        raise DeployError(f"top must be at least 1 box per image; got {top}.")
    if exporter not in (None, *EXPORTERS):
        raise DeployError(f"exporter is one of {', '.join(EXPORTERS)}; got {exporter!r}.")
    if opset is None:
        opset = NEW if exporter == "dynamo" or precision == "fp16" else OLDEST
    if opset < OLDEST:
        raise DeployError(
            f"opset must be at least {OLDEST}; got {opset}. Before it LayerNormalization is written as its parts, and "
            "an FP16 engine made of them finds nothing."
        )
    exporter = exporter or ("dynamo" if opset >= NEW else "torchscript")
    if exporter == "dynamo" and opset < NEW:
        raise DeployError(
            f"The dynamo exporter writes opset {NEW} and later; got {opset}: torch cannot convert the graph down, and "
            f"would write {NEW} all the same. Ask for opset={NEW}, or exporter='torchscript'."
        )
    if exporter == "torchscript" and precision == "fp16":
        raise DeployError(
            "The torchscript exporter mixes float32 into half precision attention, and no runtime opens the file. "
            "Leave out exporter: fp16 is exported by dynamo."
        )
    return opset, exporter


def _other(card: Card, opset: int | None) -> str | None:
    """The exporter that was not taken, if it can do what was asked: it may manage what the first cannot."""
    other = EXPORTERS[card.exporter == EXPORTERS[0]]
    try:
        choice(card.precision, opset, other, card.batch, card.size, card.top)
    except DeployError:
        return None
    return other


def _trace(graph: Graph, inputs: tuple[Tensor, ...], file: Path, card: Card, other: str | None) -> None:
    """Let torch write the graph; what it says meanwhile is kept for when it fails. other: the exporter to try then."""
    how: dict[str, Any] = {}
    if card.batch is None and card.exporter == "dynamo":
        how["dynamic_shapes"] = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    elif card.batch is None:
        how["dynamic_axes"] = {name: {0: "batch"} for name in (*card.inputs, *card.outputs)}
    if card.exporter == "dynamo":
        how |= {"external_data": False, "verbose": False}
    how |= {"input_names": list(card.inputs), "output_names": list(card.outputs), "opset_version": card.opset}
    said = StringIO()
    with warnings.catch_warnings(), redirect_stdout(said), _quiet(), torch.no_grad():
        warnings.simplefilter("ignore")  # height and width are constants on purpose, and the batch is tried afterwards
        try:
            torch.onnx.export(graph, inputs, str(file), dynamo=card.exporter == "dynamo", **how)
        except OSError:
            raise  # a full disk is no fault of the exporter
        except Exception as error:
            told = (str(error).strip() or "no message").splitlines()[0]
            tail = " ".join(said.getvalue().split())[-TAIL:]
            raise DeployError(
                f"torch {torch.__version__} cannot export this detector by {card.exporter} ({type(error).__name__}: "
                f"{told}). {f'It said last: {tail}. ' if tail else ''}"
                f"Try {f'exporter={other!r}' if other else 'another version of torch'}."
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress that the new exporter logs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _opened(path: Path) -> Any:
    """The ONNX model of a file."""
    onnx = needed("onnx")
    if not path.is_file():
        raise DeployError(f"No ONNX file at {str(path)!r}; `deimkit export` writes one.")
    try:
        return onnx.load(str(path))
    except Exception as error:  # protobuf's own, of a name that changes between its versions
        raise DeployError(f"{str(path)!r} cannot be read as an ONNX file ({error}). Export it anew.") from error


def _expect_opset(model: Any, card: Card) -> None:
    """Raise `DeployError` unless the file has the opset that was asked for: torch may write another."""
    written = {entry.domain: entry.version for entry in model.opset_import}
    if written.get("") != card.opset:
        raise DeployError(
            f"Asked for opset {card.opset}, and torch {torch.__version__} wrote {written.get('')} by {card.exporter}. "
            f"Ask for that one, or for the other exporter."
        )


def _forget_sources(model: Any) -> None:
    """Leave out what torch writes beside every node: the lines of source it is from, with the paths of this machine."""
    for part in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def _say_shapes(model: Any, card: Card, shapes: list[tuple[int, ...]]) -> None:
    """Write the shapes of the outputs into the file; shapes: without the batch."""
    for output, shape in zip(model.graph.output, shapes, strict=True):
        dims = output.type.tensor_type.shape
        del dims.dim[:]
        for side in (card.batch or "batch", *shape):
            dims.dim.add(**{"dim_param" if isinstance(side, str) else "dim_value": side})
