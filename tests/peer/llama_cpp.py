"""llama.cpp in this process, through the `xllamacpp` wheel: what it answers for given token ids."""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import xllamacpp

Distribution = dict[int, float]
"""Token id to natural log probability over the whole vocabulary, the best first."""

CERTAIN = 1e4
"""A logit bias that decides any sampling. Reported log probabilities are those before it."""


class LlamaCpp:
    """One model in llama.cpp: F32 cache, no flash attention, nothing on a GPU.

    Everything is built on one question, the distribution after a prefix. The server keeps the
    cache of the longest prefix, so the next position costs the decoding of one token. The token
    that is sampled is always the same one, forced by a bias, because the server reports no log
    probabilities where it samples a part of a character. So no position is ever missing. Several
    sequences at once share a batch, each in a slot of its own.
    """

    def __init__(
        self, model: Path, *, context: int = 256, threads: int = 2, slots: int = 1, best: int = 10
    ) -> None:
        """Loads `model`; each of the `slots` sequences holds `context` tokens.

        Raises RuntimeError where llama.cpp refuses the file.
        """
        self.best = best
        self.slots = slots
        self._server: Any = xllamacpp.Server(_parameters(model, context * slots, threads, slots))
        self._probe = self._find_probe()

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the server's loop and frees the model; it goes with the last reference."""
        self._server = None

    def after(self, prefix: Sequence[int], *, slot: int = 0) -> Distribution:
        """The best tokens after `prefix`."""
        return self._ask(prefix, self._probe, slot)

    def score(
        self, token_ids: Sequence[int], positions: Iterable[int] | None = None, *, slot: int = 0
    ) -> list[Distribution]:
        """Tokens forced: entry i is the distribution after `token_ids[: positions[i] + 1]`.

        All positions where none are given.
        """
        chosen = range(len(token_ids)) if positions is None else positions
        return [self.after(token_ids[: position + 1], slot=slot) for position in chosen]

    def score_all(self, sequences: Sequence[Sequence[int]]) -> list[list[Distribution]]:
        """`score` of each sequence, as many at once as there are slots."""
        lanes = [range(slot, len(sequences), self.slots) for slot in range(self.slots)]
        answers: dict[int, list[Distribution]] = {}

        def run(slot: int) -> None:
            for index in lanes[slot]:
                answers[index] = self.score(sequences[index], slot=slot)

        with ThreadPoolExecutor(self.slots) as pool:
            list(pool.map(run, range(self.slots)))
        return [answers[index] for index in range(len(sequences))]

    def greedy(
        self, prompt: Sequence[int], count: int, *, stop: Iterable[int] = (), slot: int = 0
    ) -> tuple[list[int], list[Distribution]]:
        """At most `count` best tokens after `prompt`, and the distribution each came from.

        A token of `stop` ends the answer and is its last.
        """
        tokens: list[int] = []
        distributions: list[Distribution] = []
        ends = frozenset(stop)
        while len(tokens) < count and not (tokens and tokens[-1] in ends):
            distributions.append(self.after([*prompt, *tokens], slot=slot))
            tokens.append(next(iter(distributions[-1])))
        return tokens, distributions

    def tokenize(self, text: str) -> list[int]:
        """The ids of `text`, special tokens recognised, none added (asked over local HTTP)."""
        request = Request(
            f"{self._server.listening_address}/tokenize",
            json.dumps({"content": text, "parse_special": True, "add_special": False}).encode(),
            {"Content-Type": "application/json"},
        )
        # Without the environment's proxies: the address is this machine's.
        with build_opener(ProxyHandler({})).open(request, timeout=60) as response:
            tokens: list[int] = json.load(response)["tokens"]
        return tokens

    def _find_probe(self) -> int:
        """The first token id for which llama.cpp reports log probabilities when it samples it."""
        for candidate in range(1000):
            if self._ask([0], candidate, 0):
                return candidate
        raise RuntimeError("llama.cpp reports log probabilities for none of the first 1000 tokens")

    def _ask(self, prefix: Sequence[int], sampled: int, slot: int) -> Distribution:
        answer = self._server.handle_completions(
            {
                "prompt": list(prefix),
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": self.best,
                "logit_bias": [[sampled, CERTAIN]],
                "cache_prompt": True,
                "id_slot": slot,
            }
        )
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp: {answer}")
        content = (answer["choices"][0].get("logprobs") or {}).get("content") or []
        return {
            entry["id"]: entry["logprob"]
            for position in content[:1]
            for entry in position["top_logprobs"]
        }


def _parameters(model: Path, context: int, threads: int, slots: int) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.n_ctx = context
    parameters.n_parallel = slots
    parameters.n_gpu_layers = 0
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    for pool in (parameters.cpuparams, parameters.cpuparams_batch):
        pool.n_threads = threads
        pool.poll = 0  # spinning threads take turns on a shared machine
    parameters.cache_ram_mib = 0  # its store of old prompts; the slots' own caches are enough
    parameters.fit_params = False  # else it may shrink the context to what it finds free
    parameters.warmup = False
    parameters.verbosity = 0
    return parameters
