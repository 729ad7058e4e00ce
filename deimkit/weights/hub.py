"""A detector in a repository of the Hugging Face hub, fetched with the hub's own client and kept in its cache."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

from deimkit.data.fetch import Note, quiet
from deimkit.errors import CheckpointError

FILES = ("config.json", "model.safetensors", "preprocessor_config.json")  # of a Hugging Face folder


@dataclass(frozen=True)
class Repository:
    """A repository that holds a detector as `transformers` keeps it."""

    name: str

    def __str__(self) -> str:
        return f"huggingface.co/{self.name}"

    def fetch(self, note: Note = quiet) -> Path:
        """The folder of the repository's files, downloaded unless they are in the cache, and checked.

        What was begun is resumed. note: told which file is under way. Raises `CheckpointError`.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        expected: tuple[type[Exception], ...] = (HfHubHTTPError, LocalEntryNotFoundError, OSError, *_transport_errors())
        paths = []
        try:
            for name in FILES:
                note(f"{self.name}: {name}")
                paths.append(Path(hf_hub_download(self.name, name)))
        except expected as error:
            raise CheckpointError(
                f"Could not fetch {self.name} from the Hugging Face hub ({_first_line(error)}). What was loaded is "
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
