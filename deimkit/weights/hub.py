"""Published weights by name: where they lie, fetched only when someone asks for them, and kept."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deimkit.errors import CheckpointError

FILES = ("config.json", "model.safetensors", "preprocessor_config.json")  # of a Hugging Face folder
_DFINE = {"n": "nano", "s": "small", "m": "medium", "l": "large", "x": "xlarge"}
_BY_HAND = "the authors of DEIM give theirs out by hand (see their repository); load such a file with weights=PATH"


@dataclass(frozen=True)
class Source:
    """A set of weights that can be fetched.

    recipe, what: how it is asked for, `load(recipe, weights=what)`. repository: on the Hugging Face hub. licence: as
    the repository states it.
    """

    recipe: str
    what: str
    repository: str
    licence: str = "Apache-2.0"


SOURCES = (
    *(Source(f"dfine_{size}", "coco", f"ustc-community/dfine-{word}-coco") for size, word in _DFINE.items()),
    *(Source(f"dfine_{size}", "obj365", f"ustc-community/dfine-{_DFINE[size]}-obj365") for size in "smlx"),
    *(Source(f"dfine_{size}", "obj2coco", f"ustc-community/dfine-{_DFINE[size]}-obj2coco") for size in "smx"),
    Source("dfine_l", "obj2coco", "ustc-community/dfine-large-obj2coco-e25"),
    *(
        Source(f"rtdetrv2_{size}", "coco", f"PekingU/rtdetr_v2_{size}")
        for size in ("r18vd", "r34vd", "r50vd", "r101vd")
    ),
)
NAMES = tuple(dict.fromkeys(source.what for source in SOURCES))


def find(recipe: str, what: str) -> Source:
    """The weights of that name for a recipe; `CheckpointError` names those there are."""
    for source in SOURCES:
        if (source.recipe, source.what) == (recipe, what):
            return source
    there = [source.what for source in SOURCES if source.recipe == recipe]
    hint = f"There are {', '.join(there)}." if there else f"Published for plain dfine_* and rtdetrv2_*; {_BY_HAND}."
    raise CheckpointError(f"No published weights {what!r} are known for {recipe}. {hint}")


def fetch(source: Source, note: Callable[[str], None] | None = None) -> Path:
    """The folder of these weights, downloaded with the hub's own client unless it is in its cache, and checked.

    What was begun is resumed. note: called with what is fetched, under which licence. Raises `CheckpointError`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if note is not None:
        note(f"{source.recipe}: weights {source.what!r} from {source.repository} ({source.licence})")
    expected: tuple[type[Exception], ...] = (HfHubHTTPError, LocalEntryNotFoundError, OSError, *_transport_errors())
    try:
        paths = [Path(hf_hub_download(source.repository, name)) for name in FILES]
    except expected as error:
        raise CheckpointError(
            f"Could not fetch {source.repository} from the Hugging Face hub ({_first_line(error)}). What was loaded is "
            f"kept: try again. Or bring its {', '.join(FILES)} here by other means and pass weights=FOLDER."
        ) from error
    for path in paths:
        _check(path)
    return paths[0].parent


def _transport_errors() -> tuple[type[Exception], ...]:
    """What breaks off when a connection does, in the library that this version of the hub's client speaks with."""
    known = {"httpx2": "HTTPError", "httpx": "HTTPError", "requests": "RequestException"}
    return tuple(getattr(sys.modules[module], base) for module, base in known.items() if module in sys.modules)


def _check(path: Path) -> None:
    """The hub's cache calls a large file by its SHA-256: a file that is another is deleted, and an error."""
    blob = path.resolve()
    if len(blob.name) != 64:
        return
    with open(blob, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != blob.name:
        blob.unlink()
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path.name} arrived damaged: expected SHA-256 {blob.name}, got {found}. It was deleted; try again."
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
