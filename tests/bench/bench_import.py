"""What `import deimkit` costs, over a Python that imports nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from tests.bench.paired import Row, seconds


def _python(code: str) -> float:
    """The shortest of five runs of a fresh Python; the shortest, because everything else on the machine only adds."""
    return min(seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True)) for _ in range(5))


def rows() -> Iterator[Row]:
    bare = _python("")
    yield Row("import deimkit", _python("import deimkit") - bare, None, "s", None, f"limit 0.3; bare Python {bare:.3f}")
    yield Row("import torch", _python("import torch") - bare, None, "s", None, "what importing lazily saves")
