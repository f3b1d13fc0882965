"""A driver on a cluster of three nodes on this machine: `several_nodes.py MODEL OUT`.

Writes JSON: answers without a cut and in several cuts, each as tokens with log probabilities.
"""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import ray
from ray.cluster_utils import Cluster

from raygraft import LLM, SamplingParams
from raygraft.actors import ray_weights
from raygraft.actors.ends import TcpEnd
from raygraft.actors.wiring import Wiring
from raygraft.graph.errors import RaygraftError
from raygraft.model import Model

PARAMS = SamplingParams(temperature=0, max_tokens=8, logprobs=5)
PROMPTS = ["the cat sat on", "in the other house there are"]
ATTENTION = {"kind:attention": "a", "kind:ffn": "b"}

OPEN = Wiring._open

# Name -> nodes of the devices a and b, and rules.
CUTS: dict[str, tuple[str, str, dict[str, str]]] = {
    "attention elsewhere": ("place=left", "place=head", {**ATTENTION, "sample": "b"}),
    "sampling elsewhere": ("place=head", "right", {**ATTENTION, "sample": "b"}),
    "both on another node": ("place=left", "left", {**ATTENTION, "sample": "a"}),
    "no way but Ray's": ("left", "right", {**ATTENTION, "sample": "b"}),
    "model not there": ("left", "right", {**ATTENTION, "embed|head": "a"}),
}


def answers(llm: LLM) -> list[dict[str, Any]]:
    return [
        {
            "tokens": done.token_ids,
            "logprobs": [sorted(best.items()) for best in done.logprobs or []],
        }
        for done in llm.generate(PROMPTS, PARAMS)
    ]


def unreachable(wiring: Wiring, openings: Any) -> Any:
    """As `Wiring._open`, but nobody listens where the senders are sent."""
    ends = OPEN(wiring, openings)
    return {
        pair: replace(end, address=(end.address[0], 1)) if isinstance(end, TcpEnd) else end
        for pair, end in ends.items()
    }


def cut_answers(path: str, name: str, address: str) -> dict[str, Any]:
    left, right, place = CUTS[name]
    place = {part: to for parts, to in place.items() for part in parts.split("|")}
    model = Model(path)
    if name == "model not there":
        # For the workers the file is another one from now on: they get their weights sent.
        os.utime(path)
    said: list[str] = []
    way = unreachable if name == "no way but Ray's" else OPEN
    devices = [
        {"name": "a", "threads": 1, "node": left},
        {"name": "b", "threads": 1, "node": right},
    ]
    with (
        patch.object(ray_weights, "raw_tensor", wraps=ray_weights.raw_tensor) as sent,
        patch.object(Wiring, "_open", way),
        LLM(model, devices=devices, place=place, address=address, progress=said.append) as llm,
    ):
        return {
            "answers": answers(llm),
            "tensors_sent": sent.call_count,
            "tensors": len(model.graph.tensors),
            "links": sorted({(t.source, t.target, t.link) for t in llm.plan.transfers}),
            "nodes": len({use.node for use in llm.plan.devices}),
            "asked": llm.plan.asked,
            "said": said,
        }


def loss(path: str, address: str, policy: str) -> dict[str, Any]:
    """What happens when a device of another node dies in the middle of an answer, and how soon."""
    devices = ["a:threads=1,node=left", "b:threads=1,node=right"]
    place = {**ATTENTION, "sample": "b"}
    with LLM(path, devices=devices, place=place, address=address, on_loss=policy) as llm:
        params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        undisturbed = llm.generate(PROMPTS[0], params)[0].text
        answer = llm.stream(PROMPTS[0], params)
        text = next(answer).text
        actors = [p for p in psutil.Process().children(recursive=True) if is_device(p)]
        actors[0].kill()
        killed = time.monotonic()
        try:
            text += "".join(chunk.text for chunk in answer)
        except RaygraftError as error:
            said = f"{type(error).__name__}: {error}"
        else:
            said = "the same text" if text == undisturbed else "another text"
        return {"devices": len(actors), "said": said, "seconds": time.monotonic() - killed}


def is_device(process: psutil.Process) -> bool:
    try:
        return "ray::RayDevice" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def main() -> None:
    path = sys.argv[1]
    with LLM(path, runtime="in-process") as llm:
        document: dict[str, Any] = {"uncut": {"answers": answers(llm)}}
    head = {"num_cpus": 1, "labels": {"place": "head"}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for place in ("left", "right"):
            cluster.add_node(num_cpus=1, labels={"place": place})
        for name in CUTS:
            document[name] = cut_answers(path, name, cluster.address)
        document["loss"] = {p: loss(path, cluster.address, p) for p in ("fail", "replace")}
    finally:
        ray.shutdown()
        cluster.shutdown()
    Path(sys.argv[2]).write_text(json.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    main()
