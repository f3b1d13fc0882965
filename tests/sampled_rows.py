"""How rows of logits are sampled, as tests write it down."""

from itertools import accumulate
from typing import Any

import numpy as np

from raygraft.graph.step import Sampling

DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "top_k": 0,
    "logprobs": 0,
    "seed": 0,
    "stream": 0,
    "position": 0,
}
TYPES = {"top_k": np.int32, "logprobs": np.int32, "position": np.int32} | {
    "seed": np.int64,
    "stream": np.int64,
}


def sampling_of(rows: list[dict[str, Any]]) -> Sampling:
    """The parameters of each row; `history` is a list of ids, `bias` a dict of id to value."""
    histories = [row.get("history", []) for row in rows]
    biases = [row.get("bias", {}) for row in rows]
    fields = {
        name: np.array([row.get(name, value) for row in rows], TYPES.get(name, np.float32))
        for name, value in DEFAULTS.items()
    }
    return Sampling(
        **fields,
        history_start=np.array([0, *accumulate(map(len, histories))], np.int32),
        history=np.array([token for history in histories for token in history], np.int32),
        bias_start=np.array([0, *accumulate(map(len, biases))], np.int32),
        bias_ids=np.array([token for bias in biases for token in bias], np.int32),
        bias_values=np.array([v for bias in biases for v in bias.values()], np.float32),
    )
