"""A recipe is one frozen value that says everything about a training; the diff of two is a paper's list of changes."""

from __future__ import annotations

import ast
import dataclasses
import math
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from deimkit.criterion import Criterion
from deimkit.data.augment import Augment
from deimkit.errors import RecipeError
from deimkit.matching import Hungarian, Matcher
from deimkit.models.detector import Arch, Detector
from deimkit.training.optim import Optim
from deimkit.training.timeline import Timeline

if TYPE_CHECKING:
    from deimkit.data.dataset import CategoryMap, Dataset

LEAST_STEPS, LEAST_BATCH = 25, 4  # of an epoch, where `Recipe.fit_to` chooses the batch


@dataclass(frozen=True)
class Paper:
    """What a paper claims for a recipe on COCO val2017: the row that `evaluate` prints beside its own measurement.

    ap, ap50, ap75, aps, apm, apl are in percent; params_m in millions; gflops at 640 x 640; latency_ms on a T4 (FP16).
    """

    table: str
    ap: float | None = None
    ap50: float | None = None
    ap75: float | None = None
    aps: float | None = None
    apm: float | None = None
    apl: float | None = None
    epochs: int | None = None
    params_m: float | None = None
    gflops: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything a training needs but the data: the parts of the detector, its supervision, and its clock.

    share: box losses follow the union of the layers' matches (GO-LSD). return_to_best: the clean stage starts from the
    best checkpoint (`BestTracker`). batch: images per step, over all devices and micro-batches. size: (height, width),
    multiples of 32. A misspelt field is a `TypeError` where it is typed, and its `repr` is Python from which `parse`
    rebuilds it.
    """

    name: str
    arch: Arch
    losses: tuple[Any, ...]
    timeline: Timeline
    optim: Optim
    augment: Augment = field(default_factory=Augment)
    matcher: Matcher = field(default_factory=Hungarian)
    share: bool = True
    return_to_best: bool = True
    batch: int = 32
    size: tuple[int, int] = (640, 640)
    paper: Paper | None = None

    def __post_init__(self) -> None:
        as_size(self.size)
        if self.batch < 1:
            raise RecipeError(f"Recipe.batch must be at least 1; got {self.batch}.")

    def criterion(self) -> Criterion:
        """The loss of this recipe: call it with a training forward's outputs and the targets."""
        return Criterion(losses=self.losses, matcher=self.matcher, share=self.share)

    def build(self, categories: CategoryMap | int | list[str] = 80) -> Detector:
        """A detector with fresh weights for `categories` (a count, names, or a CategoryMap)."""
        detector = Detector(self.arch, categories)
        detector.size = self.size
        return detector

    def fit_to(
        self,
        dataset: Dataset | int,
        epochs: int | None = None,
        batch: int | None = None,
        size: int | tuple[int, int] | None = None,
        lr: float | None = None,
    ) -> Recipe:
        """This recipe for another dataset: give epochs, batch and size, and every coupled number follows.

        `dataset` is a Dataset or its number of training images. Derived: stages, flat part and clean tail of the
        timeline and its warm-up (never longer than `Timeline.WARMUP_SHARE` of the run), learning rates and EMA for the
        batch, the mosaic tile for the size. A batch that is not given is the recipe's, halved (not below `LEAST_BATCH`)
        until an epoch has `LEAST_STEPS` steps: 205 images are 25 steps of 8, not one of 128. lr: the base rate, which
        the backbone's follows in proportion; by default what `Optim.scaled_to_batch` says. Raises `RecipeError` if the
        result is impossible.
        """
        if not isinstance(dataset, int) and dataset.train is None:
            raise RecipeError(f"{dataset!r} has no train split to learn from.")
        images = dataset if isinstance(dataset, int) else len(dataset.train or ())
        batch = min(self._batch_for(images) if batch is None else batch, images)
        epochs = self.timeline.total if epochs is None else epochs
        if batch < 1 or epochs < 1:
            raise RecipeError(
                f"Expected at least one image, one epoch and a batch of one; got {images} image(s), epochs={epochs}, "
                f"batch={batch}."
            )
        height_width = self.size if size is None else as_size(size)
        if lr is not None and not (0 < lr < math.inf):
            raise RecipeError(f"The learning rate must be above 0; got {lr}. The recipe's is {self.optim.lr:g}.")
        steps = max(images // batch, 1)
        optim = self.optim.scaled_to_batch(self.batch, batch) if lr is None else self.optim.times(lr / self.optim.lr)
        return replace(
            self,
            timeline=self.timeline.scaled_to(epochs, steps),
            optim=optim,
            augment=self.augment.scaled_to_size(self.size, height_width),
            batch=batch,
            size=height_width,
        )

    def _batch_for(self, images: int) -> int:
        """The recipe's batch, or less if so few images would make too few steps of it."""
        batch = self.batch
        while images // batch < LEAST_STEPS and batch // 2 >= LEAST_BATCH:
            batch //= 2
        return batch


def as_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """One side in pixels, or (height, width), as (height, width); `RecipeError` unless both are multiples of 32."""
    height, width = (size, size) if isinstance(size, int) else size
    if height % 32 or width % 32 or min(height, width) < 32:
        raise RecipeError(
            f"A size must be (height, width) in multiples of 32; got {height} x {width}. "
            f"Nearest: ({max(32, round(height / 32) * 32)}, {max(32, round(width / 32) * 32)})."
        )
    return height, width


def diff(a: Recipe, b: Recipe) -> dict[str, tuple[Any, Any]]:
    """What changes from recipe `a` to recipe `b`: dotted field -> (value in a, value in b)."""

    def walk(x: Any, y: Any, path: str) -> dict[str, tuple[Any, Any]]:
        if type(x) is type(y) and dataclasses.is_dataclass(x):
            found: dict[str, tuple[Any, Any]] = {}
            for f in dataclasses.fields(x):
                found |= walk(getattr(x, f.name), getattr(y, f.name), f"{path}.{f.name}".lstrip("."))
            return found
        return {} if x == y else {path: (x, y)}

    return walk(a, b, "")


def parse(text: str, parts: dict[str, type]) -> Recipe:
    """Rebuild a recipe from its `repr` without running code: only calls of the known `parts` with literal arguments.

    Raises `RecipeError` naming the misspelt part or field and its nearest neighbour.
    """

    def build(node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
            case ast.Tuple() | ast.List():
                items = [build(item) for item in node.elts]
                return tuple(items) if isinstance(node, ast.Tuple) else items
            case ast.Name(id="inf"):
                return float("inf")
            case ast.Call(func=ast.Name(id=name)):
                return call(name, node)
        raise RecipeError(
            "A recipe may hold only parts of deimkit and literals; "
            f"got `{ast.unparse(node)[:80]}` at line {node.lineno}. Write the value itself."
        )

    def call(name: str, node: ast.Call) -> Any:
        if name not in parts:
            near = get_close_matches(name, parts, n=1)
            raise RecipeError(f"Unknown part {name!r} in the recipe." + (f" Did you mean {near[0]!r}?" if near else ""))
        known = [f.name for f in dataclasses.fields(parts[name])]
        keywords = {str(k.arg or "**"): build(k.value) for k in node.keywords}
        for key in keywords:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(known)}."
                raise RecipeError(f"{name} has no field {key!r}. {hint}")
        values = [build(value) for value in node.args]
        try:
            return parts[name](*values, **keywords)
        except RecipeError:
            raise
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{name} at line {node.lineno} of the recipe cannot be built: {error}.") from error

    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise RecipeError(
            f"The recipe must be one Python expression, Recipe(...); line {error.lineno}: {error.msg}."
        ) from error
    recipe = build(tree.body)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"Expected a Recipe(...); got {type(recipe).__name__}.")
    return recipe
