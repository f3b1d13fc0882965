"""llama.cpp's side of a comparison, through the low-level API of llama-cpp-python.

It does what llama-bench does: a context per test with default parameters (flash attention where it
finds it good, a 16-bit cache, steps of 512 rows), the cache cleared before each run, random tokens;
or, where tokens are drawn, those that its own samplers draw.
A cut is made with its RPC backend: `-ngl 99 -ot "ffn=CPU" --rpc HOST:PORT`, or fewer layers
instead of `-ot` for halves.
"""

from __future__ import annotations

import ctypes
import random
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
from ggml import function
from layers import balanced_split
from sides import Measured, Setup

from raygraft.benchmark import Workload

START_S = 30.0


class _Override(ctypes.Structure):
    """llama_model_tensor_buft_override"""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _complain(level: int, text: bytes, _: object) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        print(text.decode(errors="replace"), end="", file=sys.stderr)


def quieten() -> None:
    """Let llama.cpp print nothing but errors."""
    llama_cpp.llama_log_set(_complain, ctypes.c_void_p(0))


class RpcServer:
    """An RPC server on this machine, in a process of its own."""

    def __init__(self, threads: int) -> None:
        """Start it, and wait until it listens."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.endpoint = f"127.0.0.1:{port}"
        command = [sys.executable, str(Path(__file__).with_name("rpc_server.py"))]
        self._process = subprocess.Popen(
            [*command, self.endpoint, str(threads)],
            stdin=subprocess.PIPE,  # it ends when this end is closed
            stdout=subprocess.DEVNULL,
        )
        end = time.monotonic() + START_S
        while not self._listens(port):
            if time.monotonic() > end or self._process.poll() is not None:
                raise SystemExit("llama.cpp's RPC server does not listen; is it built with RPC?")
            time.sleep(0.1)

    def _listens(self, port: int) -> bool:
        # A connection would be its one client: look whether the port is taken instead.
        with socket.socket() as attempt:
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                attempt.bind(("127.0.0.1", port))
            except OSError:
                return True
        return False

    def device(self) -> int:
        """The address of the ggml device that stands for it."""
        add = function("ggml_backend_rpc_add_server", "ggml-rpc", ctypes.c_void_p, ctypes.c_char_p)
        get = function(
            "ggml_backend_reg_dev_get",
            "ggml-base",
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
        )
        registry = add(self.endpoint.encode())
        if not registry:
            raise SystemExit("llama.cpp's RPC server has no device")
        device: int = get(registry, 0)
        return device

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class LlamaCpp:
    """Several loaded models."""

    def __init__(self, setups: Sequence[Setup]) -> None:
        quieten()
        llama_cpp.llama_backend_init()
        self._setups = {setup.name: setup for setup in setups}
        self._servers: list[RpcServer] = []
        self._kept: list[object] = []
        self._contexts: dict[tuple[str, Workload], Any] = {}
        self._models: dict[str, Any] = {}
        try:
            for setup in setups:
                self._models[setup.name] = self._load(setup)
        except BaseException:
            self.close()
            raise

    def _load(self, setup: Setup) -> Any:
        parameters = llama_cpp.llama_model_default_params()
        devices = [0]
        parameters.n_gpu_layers = 0
        if setup.cut:
            server = RpcServer(setup.threads)
            self._servers.append(server)
            devices = [server.device(), 0]
            parameters.n_gpu_layers = 99
        if setup.cut == "attention":
            cpu = function("ggml_backend_cpu_buffer_type", "ggml-base", ctypes.c_void_p)()
            here = b"ffn|^output|^token_embd"  # all but attention
            overrides = (_Override * 2)(_Override(here, cpu), _Override(None, None))
            parameters.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
            self._kept.append(overrides)
        if setup.cut == "halves":
            first, layers = balanced_split(setup.path)
            parameters.n_gpu_layers = layers - first + 1  # the last ones, and the output
        array = (ctypes.c_void_p * len(devices))(*devices)
        parameters.devices = ctypes.cast(array, ctypes.c_void_p)
        self._kept.append(array)
        model = llama_cpp.llama_model_load_from_file(str(setup.path).encode(), parameters)
        if not model:
            raise SystemExit(f"llama.cpp cannot load {setup.path}")
        return model

    def _context(self, setup: str, workload: Workload) -> Any:
        """A context with room for a workload, made once."""
        key = (setup, workload)
        if key not in self._contexts:
            parameters = llama_cpp.llama_context_default_params()
            parameters.n_ctx = -(-workload.context // 256) * 256 * workload.batch
            parameters.n_batch = 2048
            parameters.n_ubatch = 512
            parameters.n_seq_max = workload.batch
            parameters.n_threads = self._setups[setup].threads
            parameters.n_threads_batch = self._setups[setup].threads
            context = llama_cpp.llama_init_from_model(self._models[setup], parameters)
            if not context:
                raise SystemExit(f"llama.cpp cannot make a context for {workload}")
            self._contexts[key] = context
        return self._contexts[key]

    def warm_up(self, setup: str, workload: Workload) -> None:
        steps = min(1, workload.n_gen)
        self._run(self._context(setup, workload), replace(workload, n_gen=steps))

    def measure(self, setup: str, workload: Workload) -> Measured:
        return Measured(self._run(self._context(setup, workload), workload))

    def _run(self, context: Any, workload: Workload) -> float:
        """Seconds of a run as llama-bench's."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        words = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context))
        )
        rows = workload.n_prompt or workload.batch
        batch = llama_cpp.llama_batch_init(rows, 0, 1)
        batch.n_tokens = rows
        try:
            began = time.perf_counter()
            if workload.n_prompt:
                self._prompts(context, batch, workload, words)
            else:
                self._generate(context, batch, workload, words)
            return time.perf_counter() - began
        finally:
            llama_cpp.llama_batch_free(batch)

    def _prompts(self, context: Any, batch: Any, workload: Workload, words: int) -> None:
        for sequence in range(workload.batch):
            for row in range(workload.n_prompt):
                last = row == workload.n_prompt - 1
                _fill(batch, row, random.randrange(words), row, sequence, last)
            _decode(context, batch)
        llama_cpp.llama_synchronize(context)

    def _generate(self, context: Any, batch: Any, workload: Workload, words: int) -> None:
        chain = _sampler(workload.sampling) if workload.sampling else None
        tokens = [random.randrange(words) for _ in range(workload.batch)]
        for position in range(workload.n_gen):
            for sequence, token in enumerate(tokens):
                _fill(batch, sequence, token, position, sequence, True)
            _decode(context, batch)
            llama_cpp.llama_synchronize(context)
            for sequence in range(workload.batch):
                if chain is None:
                    tokens[sequence] = random.randrange(words)
                else:
                    tokens[sequence] = llama_cpp.llama_sampler_sample(chain, context, sequence)
        if chain is not None:
            llama_cpp.llama_sampler_free(chain)

    def close(self) -> None:
        for context in self._contexts.values():
            llama_cpp.llama_free(context)
        for model in self._models.values():
            llama_cpp.llama_model_free(model)
        for server in self._servers:
            server.close()


def _fill(batch: Any, row: int, token: int, position: int, sequence: int, logits: bool) -> None:
    batch.token[row] = token
    batch.pos[row] = position
    batch.n_seq_id[row] = 1
    batch.seq_id[row][0] = sequence
    batch.logits[row] = logits


def _sampler(sampling: Mapping[str, float]) -> Any:
    """Its own chain of samplers, with the filters that are asked for in its order."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    makers = {
        "top_k": llama_cpp.llama_sampler_init_top_k,
        "top_p": lambda value: llama_cpp.llama_sampler_init_top_p(value, 1),
        "min_p": lambda value: llama_cpp.llama_sampler_init_min_p(value, 1),
        "temperature": llama_cpp.llama_sampler_init_temp,
    }
    for name, make in makers.items():
        if name in sampling:
            llama_cpp.llama_sampler_chain_add(chain, make(sampling[name]))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(1))
    return chain


def _decode(context: Any, batch: Any) -> None:
    if llama_cpp.llama_decode(context, batch) != 0:
        raise SystemExit("llama.cpp failed to decode a batch")
