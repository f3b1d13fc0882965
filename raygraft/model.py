"""A model file, with what is made of it before there are devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from raygraft.actors.request import check_prompt
from raygraft.demo_model import demo_model_path
from raygraft.graph.architectures import build_graph
from raygraft.graph.capability import Limits
from raygraft.graph.errors import ModelFileError, RequestError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph
from raygraft.graph.operators import CACHE_TYPES
from raygraft.kernels import BACKENDS, GPU_BACKENDS
from raygraft.placement.devices import DeviceSpec
from raygraft.text import ChatTemplate, Tokenizer

Progress = Callable[[str], None]
Message = Mapping[str, str]

ROWS, ROWS_ON_CPUS = 256, 128
"""Most rows of a step. Where all devices are CPUs more of them are not faster, but their values
take memory, and requests that decode wait for them."""
CPU_BACKENDS = BACKENDS.keys() - {*GPU_BACKENDS}


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

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate.for_tokenizer(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """A text as token ids."""
        return self.tokenizer.encode(text)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as token ids, by the model's own chat template."""
        text = self._template.render(messages)
        bos = self.tokenizer.bos_id
        begins = bos is not None and text.startswith(self.tokenizer.token_bytes(bos).decode())
        return self.tokenizer.encode(text, add_special=not begins)

    def check_prompt(self, prompt: Sequence[int], ctx_size: int | None = None) -> None:
        """Refuse, before any device is started, what no plan for this file can serve.

        `ctx_size` is the one that the model will be loaded with. Raises RequestError.
        """
        context = ctx_size or self.graph.dimensions.context
        check_prompt(prompt, context, self.graph.dimensions.vocabulary)

    def limits(
        self,
        devices: Sequence[DeviceSpec],
        *,
        ctx_size: int | None,
        max_sequences: int,
        max_rows: int | None = None,
        cache_type: str,
    ) -> Limits:
        """The bounds of a plan for these devices. Raises RequestError when they make no sense."""
        trained = self.graph.dimensions.context
        if ctx_size is not None and not 1 <= ctx_size <= trained:
            raise RequestError(
                f"a context of {ctx_size} tokens was asked for; "
                f"the model was trained for 1 to {trained}"
            )
        if cache_type not in CACHE_TYPES:
            raise RequestError(
                f"cache_type is {cache_type!r}; accepted are {', '.join(CACHE_TYPES)}"
            )
        if max_rows is None:
            on_cpus = all(spec.backend in CPU_BACKENDS for spec in devices)
            max_rows = max(ROWS_ON_CPUS if on_cpus else ROWS, max_sequences)
        if max_sequences < 1 or max_rows < max_sequences:
            raise RequestError(
                f"max_rows {max_rows} must hold a row for each of max_sequences {max_sequences}"
            )
        return Limits(max_rows, ctx_size or trained, cache_type, max_sequences)
