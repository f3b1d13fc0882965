"""Actors killed, nodes lost, processes stalled under load: what becomes of answers, and how soon.

    python bench/chaos.py [-m FILE] [--kills 1000] [--minutes 60] [--seed 0] [--json FILE]

A cluster of two nodes on this machine runs three devices: attention and feed-forward of the first
blocks next to each other (rings), the rest of the model on the other node (tcp). Sixteen clients
send a request each, again and again: half greedy, half drawn with seeds and penalties, of unlike
lengths. At random moments an actor is killed (SIGKILL), sometimes another one right after it; the
second node is removed and comes back later; or an actor is stopped (SIGSTOP) for a while.

Every answer is compared with that of the undisturbed run. A sequence that is computed again from
its ids goes through other sums than before, so a near tie may fall otherwise: an answer that
differs is accepted as such only where the distributions at the first differing token agree to
0.002, and is counted. The undisturbed run is repeated as well: its own differences, from requests
that meet in other batches, are the floor. Beside the times from a kill to the next token stand
those that a bare Ray actor takes to start, measured in between.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from clients import GIVE_UP_SECONDS, Clients
from leftovers import counted, devices, processes, settled
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from reporting import circumstances, print_circumstances, print_table, say, write_json

from raygraft import LLM, SamplingParams
from raygraft.actors import cluster as raygraft_cluster
from raygraft.completion import Completion
from raygraft.demo_model import demo_model_path
from raygraft.graph.errors import RaygraftError
from raygraft.model import Model

CLIENTS = 16
AGREES = 2e-3
"""Differences of log probabilities that rounding explains."""
KINDS = {"actor": 0.8, "node": 0.05, "stall": 0.15}
"""What happens, and how often."""


@dataclass
class Tally:
    """What became of the answers, and how long the engine was still."""

    answers: int = 0
    ties: int = 0
    wrong: list[str] = field(default_factory=list)
    injuries: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    floor: list[float] = field(default_factory=list)


class Requests:
    """A request for each client, what became of the answers, and the times of all tokens."""

    def __init__(self, llm: LLM, model: Model, seed: int, most: int) -> None:
        self.llm = llm
        self.tally = Tally()
        self.tokens: list[tuple[float, int]] = []
        """When the latest tokens came, and in which epoch."""
        draw = random.Random(seed)
        vocabulary = model.graph.dimensions.vocabulary
        self.requests = [
            (
                [draw.randrange(3, vocabulary) for _ in range(draw.randint(2, most))],
                SamplingParams(
                    temperature=0 if number % 2 else 1.0,
                    seed=number,
                    presence_penalty=0.0 if number % 4 else 0.5,
                    max_tokens=draw.randint(most // 4, most),
                    ignore_eos=True,
                    logprobs=5,
                ),
            )
            for number in range(CLIENTS)
        ]
        self.expected: list[Completion] = []

    def expect(self) -> int:
        """The undisturbed run, and in how many answers a second one differs."""
        prompts, params = zip(*self.requests, strict=True)
        for number in range(CLIENTS):
            self.expected.append(llm_answer(self.llm, prompts[number], params[number]))
        together = [self.llm.submit(p, q) for p, q in self.requests]
        pairs = zip([answer.wait() for answer in together], self.expected, strict=True)
        return sum(done.token_ids != expected.token_ids for done, expected in pairs)

    def ask(self, number: int, draw: random.Random) -> None:
        """A client's request, after a short rest."""
        prompt, params = self.requests[number]
        time.sleep(0.2 * draw.random())
        handed: list[int] = []
        try:
            answer = self.llm.submit(prompt, params, notify=self._note)
            for chunk in answer:
                handed += chunk.token_ids
            self._judge(number, answer.completion(), handed)
        except RaygraftError as error:
            self.tally.wrong.append(f"request {number}: {type(error).__name__}: {error}")

    def _note(self) -> None:
        self.tokens.append((time.monotonic(), self.llm.engine_thread.engine.epoch))
        del self.tokens[:-10_000]

    def _judge(self, number: int, done: Completion, handed: list[int]) -> None:
        expected = self.expected[number]
        self.tally.answers += 1
        if handed != done.token_ids:
            self.tally.wrong.append(f"request {number}: streamed {handed}, has {done.token_ids}")
        elif len(done.token_ids) != len(expected.token_ids):
            lengths = f"{len(done.token_ids)} tokens, not {len(expected.token_ids)}"
            self.tally.wrong.append(f"request {number}: {lengths}")
        elif done.token_ids != expected.token_ids:
            gap = gap_where_they_part(done, expected)
            if gap <= AGREES:
                self.tally.ties += 1
            else:
                self.tally.wrong.append(f"request {number}: other tokens, apart by {gap:.4f}")


def llm_answer(llm: LLM, prompt: list[int], params: SamplingParams) -> Completion:
    return llm.generate([prompt], params)[0]


def gap_where_they_part(done: Completion, expected: Completion) -> float:
    """By how much the log probabilities differ at the first token that differs."""
    pairs = zip(done.token_ids, expected.token_ids, strict=True)
    place = next(index for index, (ours, theirs) in enumerate(pairs) if ours != theirs)
    assert done.logprobs is not None
    assert expected.logprobs is not None
    ours, theirs = done.logprobs[place], expected.logprobs[place]
    both = ours.keys() & theirs.keys()
    return max((abs(ours[t] - theirs[t]) for t in both), default=math.inf)


class Injuries:
    """What happens to the devices."""

    def __init__(self, nodes: Cluster, right: Any, requests: Requests, seed: int) -> None:
        self.draw = random.Random(seed)
        self._nodes = nodes
        self._requests = requests
        self._right = right

    def one(self) -> None:
        """Do harm, and wait for the next token of a later epoch."""
        kind = self.draw.choices([*KINDS], [*KINDS.values()])[0]
        tally = self._requests.tally
        tally.injuries[kind] += 1
        before = self._requests.llm.engine_thread.engine.epoch
        began = time.monotonic()
        if kind == "stall":
            self._stall()
            return
        if kind == "node":
            self._nodes.remove_node(self._right, allow_graceful=False)
        else:
            self._kill()
            while self.draw.random() < 0.1:  # in the middle of the recovery
                time.sleep(1.5 * self.draw.random())
                before = self._requests.llm.engine_thread.engine.epoch
                began = time.monotonic()
                tally.injuries[kind] += self._kill()
        seconds = self._until_token(began, before)
        tally.seconds.setdefault(kind, []).append(seconds)
        if kind == "node":
            self._right = self._nodes.add_node(num_cpus=1, labels={"place": "right"})
            self._requests.llm.add("c:threads=1,node=right")

    def _kill(self) -> bool:
        spares = self._spares()
        found = [process for process in devices() if process.pid not in spares]
        if found:
            self.draw.choice(found).kill()
        return bool(found)

    def _spares(self) -> set[int]:
        """Processes that stand by: nobody would notice their end."""
        fleet: Any = self._requests.llm.engine_thread.engine.fleet
        calls = [actor.pid.remote() for actor in fleet._actors.spares.actors]
        ready, _ = ray.wait(calls, num_returns=max(1, len(calls)), timeout=1)
        return {ray.get(call) for call in ready}

    def _stall(self) -> None:
        stalled = self.draw.choice(devices())
        stalled.send_signal(signal.SIGSTOP)
        time.sleep(self.draw.choice([0.3, 1.0, 3.0]))
        stalled.send_signal(signal.SIGCONT)

    def _until_token(self, began: float, epoch: int) -> float:
        while time.monotonic() - began < GIVE_UP_SECONDS:
            for at, of in self._requests.tokens[-500:]:
                if at > began and of > epoch:
                    return at - began
            time.sleep(0.01)
        self._requests.tally.wrong.append(f"no token for {GIVE_UP_SECONDS:.0f} s")
        return math.inf


def bare_actor_seconds() -> float:
    """From the wish for an actor that does nothing to its first answer, on this node.

    Ray would try the removed one as well, as long as it has not noticed that this is gone.
    """

    class Bare:
        def ping(self) -> None:
            pass

    began = time.perf_counter()
    here = NodeAffinitySchedulingStrategy(raygraft_cluster.own_node(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here)(Bare).remote()
    ray.get(actor.ping.remote())
    seconds = time.perf_counter() - began
    ray.kill(actor)
    return seconds


def run(options: argparse.Namespace, model: Model) -> dict[str, Any]:
    """All of it on one cluster."""
    blocks = model.graph.dimensions.blocks
    last = max(0, 2 * blocks // 3 - 1)
    place = {"*": "c", f"blk.[0-{last}].attn": "a", f"blk.[0-{last}].ffn": "b"}
    specs = ["a:threads=1,node=left", "b:threads=1,node=left", "c:threads=1,node=right"]
    head = {"num_cpus": 2, "labels": {"place": "left"}, "include_dashboard": False}
    raygraft_cluster._keep_standard_output_clean()
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        right = nodes.add_node(num_cpus=1, labels={"place": "right"})
        with LLM(
            model,
            devices=specs,
            place=place,
            address=nodes.address,
            max_sequences=CLIENTS,
            spares=options.spares,
            ctx_size=min(model.graph.dimensions.context, 512),
        ) as llm:
            requests = Requests(llm, model, options.seed, options.tokens)
            say("the undisturbed run")
            differing = requests.expect()
            before = counted()
            clients = Clients(CLIENTS, requests.ask, seed=0)
            took = _injure(Injuries(nodes, right, requests, options.seed), requests, options)
            requests.tally.wrong += clients.stop()
            llm.generate([[3, 4]], SamplingParams(max_tokens=2))
            after = settled(counted, before)
            recoveries = llm.engine_thread.recovery.count  # type: ignore[union-attr]
        tally = requests.tally
    finally:
        ray.shutdown()
        nodes.shutdown()
    left = settled(processes, [])
    return {
        "injuries": dict(tally.injuries),
        "injuries_an_hour": 3600 * tally.injuries.total() / took,
        "recoveries": recoveries,
        "answers": tally.answers,
        "near_ties": tally.ties,
        "near_ties_of_undisturbed": differing,
        "wrong": tally.wrong,
        "seconds": tally.seconds,
        "bare_actor_seconds": tally.floor,
        "before": before,
        "after": after,
        "processes_left": left,
    }


def _injure(injuries: Injuries, requests: Requests, options: argparse.Namespace) -> float:
    """Do harm until there was enough of it; how many seconds that took."""
    began, tally = time.monotonic(), requests.tally
    said = began
    while tally.injuries.total() < options.kills:
        if time.monotonic() - began > 60 * options.minutes or len(tally.wrong) > 20:
            break
        time.sleep(options.pause * injuries.draw.random())
        injuries.one()
        if tally.injuries.total() % 20 == 1:
            tally.floor.append(bare_actor_seconds())
        if time.monotonic() - said > 20:
            said = time.monotonic()
            say(f"{dict(tally.injuries)}, {tally.answers} answers, {len(tally.wrong)} wrong")
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", type=Path, help="default: the demo model")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--pause", type=float, default=1.0, help="longest, between two injuries")
    parser.add_argument("--tokens", type=int, default=96, help="most of a prompt or an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spares", type=int, default=0, help="processes that stand by, a node")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    found = circumstances()
    document = run(options, Model(options.model or demo_model_path(say)))
    print_circumstances(found)
    rows = [
        [kind, len(times), *(f"{value:.2f}" for value in (statistics.median(times), max(times)))]
        for kind, times in (
            *document["seconds"].items(),
            ("bare actor", document["bare_actor_seconds"]),
        )
        if times
    ]
    print_table("From a loss to the next token, s", ["", "times", "median", "worst"], rows)
    print()
    for key in ("injuries", "injuries_an_hour", "recoveries", "answers", "near_ties",
                "near_ties_of_undisturbed", "before", "after", "processes_left"):  # fmt: skip
        print(f"{key}: {document[key]}")
    print(f"wrong: {len(document['wrong'])}")
    for line in document["wrong"][:20]:
        print(f"  {line}")
    write_json(options.json, {"circumstances": found, **document})
    leaks = document["after"] != document["before"] or document["processes_left"]
    raise SystemExit(bool(document["wrong"] or leaks))


if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    main()
