"""A model file, with what is made of it before there are devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from raygraft.demo_model import demo_model_path
from raygraft.graph.architectures import build_graph
from raygraft.graph.capability import Limits
from raygraft.graph.errors import ModelFileError, RequestError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph
from raygraft.text import Tokenizer

Progress = Callable[[str], None]


def _silent(_: str) -> None:
    pass


class Model:
    """A model file with its graph and its tokenizer; no devices yet."""

    def __init__(self, path: str | Path | None = None, progress: Progress = _silent) -> None:
        """Read a GGUF file, or the demo model. Raises ModelFileError, UnknownArchitectureError."""
        path = demo_model_path(progress) if path is None else path
        progress(f"reading {Path(path).name}")
        self.file = ModelFile.open(path)
        self.graph: Graph = build_graph(self.file)
        try:
            self.tokenizer = Tokenizer.from_metadata(self.file.metadata)
        except ModelFileError as error:
            raise ModelFileError(f"{self.file.path}: {error}") from error

    def limits(
        self, *, ctx_size: int | None, max_sequences: int, max_rows: int, cache_type: str
    ) -> Limits:
        """The bounds of a plan. Raises RequestError when they make no sense."""
        trained = self.graph.dimensions.context
        if ctx_size is not None and not 1 <= ctx_size <= trained:
            raise RequestError(
                f"a context of {ctx_size} tokens was asked for; "
                f"the model was trained for 1 to {trained}"
            )
        if max_sequences < 1 or max_rows < max_sequences:
            raise RequestError(
                f"max_rows {max_rows} must hold a row for each of max_sequences {max_sequences}"
            )
        return Limits(max_rows, ctx_size or trained, cache_type, max_sequences)
