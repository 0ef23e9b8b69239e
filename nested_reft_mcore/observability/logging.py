"""Messages on the console: rank 0 tells what happens, the others only what goes wrong."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TextIO, cast

Level = Literal["debug", "info", "warning"]

_PACKAGE = "nested_reft_mcore"

# Said by libraries about choices that are made on purpose or that a user can do nothing about.
# `nested-reft doctor` tells which optional packages are absent and what is used instead.
_NOISE = re.compile(
    r"Apex (is|are) not installed"
    r"|Transformer Engine and Apex are not installed"
    r"|absl\.logging is not installed"
    r"|CPU RNG state changed within GPU RNG context"
    r"|The following imports from `dynamic_context\.py` will be removed"
    r"|custom_layers\.transformer_engine'?\s+module is deprecated"
    r"|`torch\.jit\.script(_method)?` is deprecated"
    r"|full scope is deprecated\. Use empty cuda_graph_scope"
    r"|The \.grad attribute of a Tensor that is not a leaf"
    r"|torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated"
    r"|`load_state_dict` is deprecated and will be removed in future versions"
    r"|we are deprecating ShardedTensor"
    r"|When using async grad allreduce it is recommended to set"
    r"|lr_scheduler\.step\(\)` before `optimizer\.step\(\)"
)


class _NoiseFilter(logging.Filter):
    """Drops the known noise of libraries; never a message of this package, never an error."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether `record` is shown."""
        if record.levelno >= logging.ERROR or record.name.split(".")[0] == _PACKAGE:
            return True
        return _NOISE.search(record.getMessage()) is None


class _ConsoleHandler(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is now, so that a live display can put lines above itself."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Keep following `sys.stderr`: the base class assigns a stream when it is made."""


class _Formatter(logging.Formatter):
    """`12:00:01 text` for information, the level in front of anything worse, the rank if not 0."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(datefmt="%H:%M:%S")
        width = len(str(world_size - 1))
        self._prefix = f"[rank {rank:>{width}}] " if rank else ""

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        # A captured warning ends in the source line that raised it, which helps nobody here.
        message = record.message.strip()
        if record.name == "py.warnings":
            message = message.split("\n")[0]
        return f"{self.formatTime(record, self.datefmt)} {self._prefix}{level}{message}"


class _RankFile(logging.FileHandler):
    """One process's log file: whole dates, rank and host in each line."""

    def __init__(self, path: Path, rank: int, host: str) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._prefix = f"rank {rank} {host}"
        self._has_failed = False

    def format(self, record: logging.LogRecord) -> str:
        """Every line of the message with all of it."""
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        head = f"{moment} {self._prefix} {record.levelname}"
        return "\n".join(f"{head} {line}" for line in record.getMessage().strip().splitlines())

    def handleError(self, record: logging.LogRecord) -> None:
        """A disk that is full is no reason to stop; said once."""
        error = sys.exc_info()[1]
        if not self._has_failed and isinstance(error, OSError):
            text = f"{self.baseFilename}: cannot be written: {error.strerror}; going on without\n"
            sys.stderr.write(text)
        self._has_failed = True


def open_rank_log(directory: Path, rank: int, host: str) -> Callable[[str], None]:
    """Also write this process's messages to `rank_00003.log` in `directory`, after older ones.

    Where that is impossible it is said, and done without.

    Returns:
        Puts lines into that file alone.
    """
    path = directory / f"rank_{rank:05d}.log"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handler = _RankFile(path, rank, host)
    except OSError as error:
        logging.getLogger(__name__).warning("%s: cannot be written: %s", path, error.strerror)
        return lambda text: None
    root, package = logging.getLogger(), logging.getLogger(_PACKAGE)
    for old in [one for one in root.handlers if isinstance(one, _RankFile)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    if rank:
        # The console goes on to show no more than warnings.
        package.setLevel(min(package.level, logging.INFO))

    def note(text: str) -> None:
        handler.handle(logging.LogRecord(_PACKAGE, logging.INFO, "", 0, text, None, None))

    return note


class _Forgiving:
    """A text stream that loses what cannot be written: stderr may be a file on a full disk."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be."""
        with suppress(OSError):
            self._stream.flush()


def forgive_stderr() -> None:
    """Let no message end this process because standard error cannot be written."""
    if not isinstance(sys.stderr, _Forgiving):
        sys.stderr = cast("TextIO", _Forgiving(sys.stderr))


def configure_logging(level: Level = "info", rank: int = 0, world_size: int = 1) -> None:
    """Send this process's log messages and Python warnings to standard error.

    Rank 0 shows messages of this package from `level` on and warnings of everybody else; other
    ranks show warnings and errors only, with their rank in front. Known noise of libraries is
    dropped, except at level `debug`. A second call replaces the first one's settings.

    Raises ValueError where `rank` is not below `world_size` or `level` is unknown.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in [0, {world_size})")
    if level not in ("debug", "info", "warning"):
        raise ValueError(f"unknown level {level!r}; expected debug, info or warning")
    handler = _ConsoleHandler()
    handler.setFormatter(_Formatter(rank, world_size))
    if level != "debug":
        handler.addFilter(_NoiseFilter())
    if rank:
        handler.setLevel(logging.WARNING)
    root = logging.getLogger()
    for old in [one for one in root.handlers if isinstance(one, _ConsoleHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.INFO if level == "debug" else logging.WARNING)
    logging.getLogger(_PACKAGE).setLevel(level.upper() if rank == 0 else logging.WARNING)
    logging.captureWarnings(True)
