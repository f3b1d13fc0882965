"""Rules: which region goes where, as a person says it.

| rule                    | says                                                        |
|-------------------------|-------------------------------------------------------------|
| `blk.[0-15].attn=gpu0`  | on this device; of several such rules the last that matches |
| `kind:ffn=a|b`          | on one of these, the planner chooses                        |
| `head=!board`           | never on this device, whatever other rules say              |
| `embed~head`            | together on one device; lists of equal length pair up       |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from raygraft.graph.errors import ConfigurationError
from raygraft.graph.graph import Graph
from raygraft.graph.selectors import Selector

_NEVER = "!"
_TOGETHER = "~"


@dataclass(frozen=True, slots=True)
class Rule:
    """Regions named by a selector go to one of these devices, or to none of them."""

    selector: Selector
    devices: tuple[str, ...]
    never: bool = False

    @classmethod
    def parse(cls, text: str) -> Rule | Together:
        """Read a rule of any form.

        Raises ConfigurationError or SelectorError.
        """
        selector, separator, devices = text.rpartition("=")
        if separator:
            return cls.of(selector, devices)
        left, separator, right = text.partition(_TOGETHER)
        if separator:
            return Together(Selector.parse(left), Selector.parse(right))
        raise ConfigurationError(
            f"rule {text!r}: expected SELECTOR=DEVICE, such as 'kind:attention=gpu0', "
            "SELECTOR=!DEVICE, or SELECTOR~SELECTOR"
        )

    @classmethod
    def of(cls, selector: str, devices: str) -> Rule | Together:
        """A rule from its two sides; the second begins with `!` or `~` for the other forms."""
        if devices.strip().startswith(_TOGETHER):
            other = devices.strip().removeprefix(_TOGETHER)
            return Together(Selector.parse(selector), Selector.parse(other))
        never = devices.strip().startswith(_NEVER)
        names = tuple(name.strip() for name in devices.strip().removeprefix(_NEVER).split("|"))
        if not all(names):
            raise ConfigurationError(f"rule {selector}={devices}: a device's name is missing")
        return cls(Selector.parse(selector), names, never)

    def __str__(self) -> str:
        return f"{self.selector.text}={_NEVER * self.never}{'|'.join(self.devices)}"


@dataclass(frozen=True, slots=True)
class Together:
    """What `left` names and what `right` names lie on one device."""

    left: Selector
    right: Selector

    def __str__(self) -> str:
        return f"{self.left.text}~{self.right.text}"

    def groups(self, graph: Graph) -> list[frozenset[str]]:
        """Operators that belong together: pair by pair, or all with the one on a side.

        Raises ConfigurationError when the sides cannot be paired.
        """
        left, right = self.left.select(graph), self.right.select(graph)
        if 1 in (len(left), len(right)):
            return [frozenset(name for r in (*left, *right) for name in r.operators)]
        if len(left) != len(right):
            raise ConfigurationError(
                f"rule {self}: {len(left)} regions on the left and {len(right)} on the right "
                "cannot be paired; accepted are equally many, or one on a side"
            )
        pairs = zip(left, right, strict=True)
        return [frozenset((*a.operators, *b.operators)) for a, b in pairs]


AnyRule = Rule | Together


@dataclass(frozen=True, slots=True)
class Applied:
    """A rule with its number from 1, in the order in which they were given."""

    number: int
    rule: AnyRule

    def __str__(self) -> str:
        return f"rule {self.number} ({self.rule})"


@dataclass(frozen=True, slots=True)
class Constraints:
    """What the rules ask of each operator."""

    placed: Mapping[str, Applied]
    """Operator -> the place rule that decides about it."""
    forbidden: Mapping[str, Mapping[str, Applied]]
    """Operator -> device -> the rule that keeps it away."""
    together: tuple[tuple[Applied, frozenset[str]], ...]

    @property
    def rules(self) -> tuple[Applied, ...]:
        """The rules that decide about anything, in their order."""
        found = {
            *self.placed.values(),
            *(applied for kept_away in self.forbidden.values() for applied in kept_away.values()),
            *(applied for applied, _ in self.together),
        }
        return tuple(sorted(found, key=lambda applied: applied.number))

    def obstacle(self, operator: str, device: str) -> Applied | None:
        """The rule that keeps an operator away from a device, if one does."""
        applied = self.placed.get(operator)
        if applied is not None:
            assert isinstance(applied.rule, Rule)
            if device not in applied.rule.devices:
                return applied
        return self.forbidden.get(operator, {}).get(device)

    def only(self, kept: Collection[Applied]) -> Constraints:
        """What these of the rules ask. What another one decided is free, whatever came before."""
        placed = {name: applied for name, applied in self.placed.items() if applied in kept}
        forbidden = {
            name: {device: applied for device, applied in found.items() if applied in kept}
            for name, found in self.forbidden.items()
        }
        together = tuple(pair for pair in self.together if pair[0] in kept)
        return Constraints(placed, forbidden, together)


def apply_rules(
    graph: Graph, rules: Sequence[AnyRule | Applied], devices: Collection[str]
) -> Constraints:
    """What the rules ask, operator by operator.

    Raises SelectorError for a rule that names no region, ConfigurationError for one that names an
    unknown device.
    """
    placed: dict[str, Applied] = {}
    forbidden: dict[str, dict[str, Applied]] = {}
    together: list[tuple[Applied, frozenset[str]]] = []
    for number, given in enumerate(rules, 1):
        applied = given if isinstance(given, Applied) else Applied(number, given)
        rule = applied.rule
        if isinstance(rule, Together):
            together += [(applied, group) for group in rule.groups(graph)]
            continue
        unknown = [name for name in rule.devices if name not in devices]
        if unknown:
            raise ConfigurationError(
                f"{applied}: there is no device {unknown[0]!r}; the devices are "
                f"{', '.join(devices)}"
            )
        for operator in rule.selector.operators(graph):
            if rule.never:
                kept_away = forbidden.setdefault(operator, {})
                kept_away.update(dict.fromkeys(rule.devices, applied))
            else:
                placed[operator] = applied
    return Constraints(placed, forbidden, tuple(together))


def without_devices(rules: Sequence[AnyRule], missing: Collection[str]) -> tuple[AnyRule, ...]:
    """What is left of rules when devices are missing; one that names no other device goes."""
    left: list[AnyRule] = []
    for rule in rules:
        if isinstance(rule, Rule):
            devices = tuple(name for name in rule.devices if name not in missing)
            if devices:
                left.append(replace(rule, devices=devices))
        else:
            left.append(rule)
    return tuple(left)
