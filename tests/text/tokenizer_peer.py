"""llama.cpp's tokenizer on a vocabulary of our choice, through the xllamacpp wheel."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import gguf
import numpy as np

WIDTH = 32


class TokenizerPeer:
    """What llama.cpp makes of a text, with the tokenizer that `metadata` describes."""

    def __init__(self, metadata: Mapping[str, object], path: Path) -> None:
        """Write a model of one idle block to `path`, and load it."""
        import xllamacpp

        write_idle_model(metadata, path)
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = 256
        parameters.n_gpu_layers = 0
        parameters.cpuparams.n_threads = 1
        parameters.verbosity = 0
        parameters.warmup = False
        parameters.fit_params = False
        self._server: Any = xllamacpp.Server(parameters)
        self._open = build_opener(ProxyHandler({})).open  # a proxy must not see local requests

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The token ids of `text`."""
        question = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return list(self._ask("tokenize", question)["tokens"])

    def token_bytes(self, text: str) -> list[tuple[int, bytes]]:
        """The token ids of `text`, each with its bytes; control tokens have their names."""
        question = {"content": text, "parse_special": True, "with_pieces": True}
        return [
            (
                token["id"],
                piece.encode() if isinstance(piece := token["piece"], str) else bytes(piece),
            )
            for token in self._ask("tokenize", question)["tokens"]
        ]

    def ends_generation(self, token_id: int) -> bool:
        """Whether an answer that consists of this token ends with it."""
        question = {"prompt": [1], "n_predict": 1, "logit_bias": [[token_id, 100.0]]}
        return bool(self._ask("completion", question)["stop_type"] == "eos")

    def _ask(self, path: str, question: Mapping[str, object]) -> dict[str, Any]:
        request = Request(
            f"{self._server.listening_address}/{path}",
            data=json.dumps(question).encode(),
            headers={"Content-Type": "application/json"},
        )
        with self._open(request, timeout=60) as response:
            return dict(json.load(response))


def write_idle_model(metadata: Mapping[str, object], path: Path) -> None:
    """A GGUF file of architecture `llama` with one block of zeros and the given tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        if key == "general.name" or key.startswith("tokenizer.ggml."):
            writer.add_key_value(key, value, *_value_types(value))
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, Sequence)
    squares = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes: dict[str, tuple[int, ...]] = {f"blk.0.{name}": (WIDTH, WIDTH) for name in squares}
    shapes |= {f"blk.0.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _value_types(value: object) -> tuple[gguf.GGUFValueType, gguf.GGUFValueType | None]:
    """The type of a value, and that of its items where it is an array."""
    if isinstance(value, list):
        return gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.get_type(value[0])
    if isinstance(value, int) and not isinstance(value, bool):
        return gguf.GGUFValueType.UINT32, None  # the type that llama.cpp wants of a token id
    return gguf.GGUFValueType.get_type(value), None
