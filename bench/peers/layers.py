"""What a model's layers weigh: for cuts in halves, and for the bytes that a token reads."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from raygraft.graph.gguf_file import ModelFile

OUTPUT = "output.weight"
EMBEDDINGS = "token_embd.weight"


def bytes_per_token(path: Path) -> int:
    """Bytes of all weights that a decode step reads: of the embeddings only when they are tied."""
    tensors = ModelFile.open(path).tensors
    unread = EMBEDDINGS if OUTPUT in tensors else None
    return sum(tensor.nbytes for name, tensor in tensors.items() if name != unread)


def balanced_split(path: Path) -> tuple[int, int]:
    """How many of the first layers read as many bytes as the rest with the output; of how many."""
    tensors = ModelFile.open(path).tensors
    layers: dict[int, int] = defaultdict(int)
    for name, tensor in tensors.items():
        if name.startswith("blk."):
            layers[int(name.split(".")[1])] += tensor.nbytes
    head = tensors[OUTPUT if OUTPUT in tensors else EMBEDDINGS].nbytes
    weights = [layers[number] for number in sorted(layers)]

    def busiest(first: int) -> int:
        return max(sum(weights[:first]), sum(weights[first:]) + head)

    return min(range(1, len(weights)), key=busiest), len(weights)
