"""Steps that are sent ahead: their tokens are still being drawn.

The engine learns a token when its step is back, and only then could send the next one: its own
work, and two hand-overs, would lie between any two steps. Where one actor both draws the tokens and
looks them up, it knows them first. So the next step goes out while the last one is being computed,
and says of such a row which row of the step before draws its token. Devices find it there.

The engine then works while devices compute. Where they have all cores of its machine, it would take
one from them in the middle of a step, and what is won is lost. There it sends several steps in one
header, and waits for all of them: each row goes on with the token that it draws. A round of several
half-batches is as many steps for each. While such a burst lasts nobody joins, and what a sequence
draws after its end is thrown away; so it is short.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from raygraft.actors.part import ActorPart
from raygraft.graph.graph import Graph
from raygraft.graph.step import Ints, Step
from raygraft.kernels.base import Array
from raygraft.placement.plan import Plan

MOST_IN_FLIGHT = 2
"""Steps, with the one that is sent ahead."""
BURST_SECONDS = 0.04
"""How long a burst may last, but for its last step: less than what a reader notices."""


def can_be_sent_ahead(plan: Plan, graph: Graph) -> bool:
    """Whether the actor that looks tokens up is the one that draws them."""
    kinds = {op.name: op.kind for op in graph.operators}
    actors = {
        plan.actor_of[stage.device]
        for stage in plan.stages
        for unit in stage.units
        for name in unit.operators
        if kinds[name] in ("get_rows", "sample")
    }
    return len(actors) == 1


def drawn_value(part: ActorPart) -> str | None:
    """The value that holds the tokens which an actor draws, if it does."""
    units = [unit for units in part.subgraphs.values() for unit in units]
    drawn = [op.outputs[0] for unit in units for op in unit.operators if op.kind == "sample"]
    return drawn[0] if drawn else None


def unknown(row: int) -> int:
    """What stands for a token that this row of the step before draws, counted among its draws."""
    return -1 - row


def is_ahead(step: Step) -> bool:
    """Whether it has tokens that were not known when it was sent."""
    return bool(step.tokens.min() < 0)


def with_drawn(step: Step, drawn: Ints) -> Step:
    """Such a step with all its tokens; `drawn` are those of the step before, `[rows, 1]`."""
    tokens = step.tokens.copy()
    places = np.flatnonzero(tokens < 0)
    tokens[places] = drawn[-1 - tokens[places], 0]
    return replace(step, tokens=tokens)


def step_after(step: Step, drawn: Array | None) -> Step:
    """The step that comes next when each row goes on, with the tokens that were `drawn` here."""
    sampling = replace(step.sampling, position=step.sampling.position + 1)
    tokens = step.tokens if drawn is None else drawn[:, 0]
    return replace(step, tokens=tokens, positions=step.positions + 1, sampling=sampling)
