"""What a deployed file says of itself, so that a path is all it takes to use it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from deimkit.data.split import CategoryMap
from deimkit.errors import DeployError

PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class Card:
    """A deployed detector in words: it travels inside an ONNX file, and beside an engine.

    recipe: its name, or "" if it is not known. categories: its classes, with the dataset's own ids. size: (height,
    width) of its input in pixels. batch: images at a time, or None for any number. postprocess: whether the graph ends
    in boxes, scores and labels, or in the logits and boxes of all queries. top: how many boxes it then gives.
    precision: of the numbers in the graph, "fp32", "fp16" or "int8". opset, exporter: of the ONNX file. scale: pixels
    of 0 to 255 are multiplied by it, and no mean is subtracted. versions: of what made it.
    """

    recipe: str
    categories: CategoryMap
    size: tuple[int, int]
    batch: int | None
    postprocess: bool = True
    top: int = 300
    precision: str = "fp32"
    opset: int = 0
    exporter: str = ""
    scale: float = 1 / 255
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The card in plain JSON types."""
        return asdict(self) | {"categories": self.categories.to_dict(), "size": list(self.size)}

    @staticmethod
    def from_dict(told: dict[str, Any]) -> Card:
        """The card that `to_dict` told; `DeployError` if something is missing."""
        try:
            categories, size = CategoryMap.from_dict(told["categories"]), (int(told["size"][0]), int(told["size"][1]))
            return Card(**{**told, "categories": categories, "size": size})
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise DeployError(
                f"Expected the description that `deimkit export` writes; got {sorted(told)} ({error}). "
                "Export the detector anew with this version."
            ) from error

    def to_json(self) -> str:
        """The card as one line of JSON."""
        return json.dumps(self.to_dict())

    @staticmethod
    def from_json(text: str) -> Card:
        """The card of such a line; `DeployError` if it is none."""
        try:
            told = json.loads(text)
        except json.JSONDecodeError:
            told = None
        if not isinstance(told, dict):
            raise DeployError(f"Expected the description of a detector, a JSON object; got {text[:80]!r}.")
        return Card.from_dict(told)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what the graph gives."""
        return ("boxes", "scores", "labels") if self.postprocess else ("logits", "boxes")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of what the graph takes."""
        return ("images", "sizes") if self.postprocess else ("images",)
