"""A driver on a cluster of three nodes on this machine: `several_nodes.py MODEL OUT`.

Writes JSON: answers without a cut and in several cuts, each as tokens with log probabilities.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
from ray.cluster_utils import Cluster

from raygraft import LLM, SamplingParams
from raygraft.actors import ray_fleet
from raygraft.llm import Model

PARAMS = SamplingParams(temperature=0, max_tokens=8, logprobs=5)
PROMPTS = ["the cat sat on", "in the other house there are"]
ATTENTION = {"kind:attention": "a", "kind:ffn": "b"}

# Name -> nodes of the devices a and b, and rules.
CUTS: dict[str, tuple[str, str, dict[str, str]]] = {
    "attention elsewhere": ("place=left", "place=head", {**ATTENTION, "sample": "b"}),
    "sampling elsewhere": ("place=head", "right", {**ATTENTION, "sample": "b"}),
    "both on another node": ("place=left", "left", {**ATTENTION, "sample": "a"}),
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


def cut_answers(path: str, name: str, address: str) -> dict[str, Any]:
    left, right, place = CUTS[name]
    place = {part: to for parts, to in place.items() for part in parts.split("|")}
    model = Model(path)
    if name == "model not there":
        # For the workers the file is another one from now on: they get their weights sent.
        os.utime(path)
    devices = [
        {"name": "a", "threads": 1, "node": left},
        {"name": "b", "threads": 1, "node": right},
    ]
    with (
        patch.object(ray_fleet, "raw_tensor", wraps=ray_fleet.raw_tensor) as sent,
        LLM(model, devices=devices, place=place, address=address) as llm,
    ):
        return {
            "answers": answers(llm),
            "tensors_sent": sent.call_count,
            "tensors": len(model.graph.tensors),
            "links": sorted({(t.source, t.target, t.link) for t in llm.plan.transfers}),
            "nodes": len({use.node for use in llm.plan.devices}),
            "asked": llm.plan.asked,
        }


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
    finally:
        ray.shutdown()
        cluster.shutdown()
    Path(sys.argv[2]).write_text(json.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    main()
