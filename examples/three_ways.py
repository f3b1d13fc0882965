"""A model cut by region across two devices: one script, three ways to run it.

On this machine, which is then a cluster of its own:

    python examples/three_ways.py

On a running Ray cluster, each device on the node with that label (or host name, or address):

    python examples/three_ways.py --address 192.0.2.10:6379 --attention-node host=box-b

As a Ray job, which finds its cluster by itself:

    ray job submit --working-dir . -- python examples/three_ways.py --attention-node host=box-b
"""

import argparse

from raygraft import LLM, SamplingParams

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="a GGUF file; default: the demo model")
parser.add_argument("--prompt", default="The capital of France is")
parser.add_argument("--address", help="a running Ray cluster; default: RAY_ADDRESS, or start one")
parser.add_argument("--attention-node", help="label, host or address; default: this node")
parser.add_argument("--feed-forward-node", help="label, host or address; default: this node")
options = parser.parse_args()

llm = LLM(
    options.model,
    address=options.address,
    devices=[
        {"name": "attention", "threads": 1, "node": options.attention_node},
        {"name": "feed-forward", "threads": 1, "node": options.feed_forward_node},
    ],
    place={"kind:attention": "attention", "kind:ffn": "feed-forward"},
)
with llm:
    (answer,) = llm.generate(options.prompt, SamplingParams(temperature=0, max_tokens=24))
    print(options.prompt + answer.text)
    for use in llm.plan.devices:
        print(f"{use.device}: {use.stages} stages, {use.weights / 2**20:.1f} MiB of weights")
