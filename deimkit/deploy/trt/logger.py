"""What TensorRT says, handed on to Python's `logging`, and its errors remembered for messages of our own."""

from __future__ import annotations

import functools
import logging
from collections import deque
from types import ModuleType
from typing import Any

log = logging.getLogger("deimkit.tensorrt")

LEVELS = {
    "INTERNAL_ERROR": logging.CRITICAL,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.INFO,
    "VERBOSE": logging.DEBUG,
}


@functools.cache
def listener(trt: ModuleType) -> Any:
    """The one logger of this process, as TensorRT keeps the first it is given; `errors` are the last it heard.

    Its messages go to the Python logger "deimkit.tensorrt".
    """
    base: Any = trt.ILogger

    class Listener(base):
        def __init__(self) -> None:
            base.__init__(self)  # pybind11 asks for this very call
            self.errors: deque[str] = deque(maxlen=5)

        def log(self, severity: Any, msg: str) -> None:
            level = LEVELS[severity.name]
            log.log(level, msg)
            if level >= logging.ERROR:
                self.errors.append(msg)

    return Listener()


def complaint(trt: ModuleType) -> str:
    """The errors TensorRT reported since this was last asked, as one line for a message."""
    errors = listener(trt).errors
    told = "; ".join(errors) or "it gave no reason"
    errors.clear()
    return told
