"""Rules: which region goes where, as a person says it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from raygraft.graph.errors import ConfigurationError
from raygraft.graph.graph import Graph
from raygraft.graph.selectors import Selector


@dataclass(frozen=True, slots=True)
class Rule:
    """Regions named by a selector go to one of these devices."""

    selector: Selector
    devices: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read `SELECTOR=DEVICE` or `SELECTOR=DEVICE|DEVICE`.

        Raises ConfigurationError or SelectorError.
        """
        selector, separator, devices = text.rpartition("=")
        if not separator:
            raise ConfigurationError(
                f"rule {text!r}: expected SELECTOR=DEVICE, such as 'kind:attention=gpu0'"
            )
        return cls.of(selector, devices)

    @classmethod
    def of(cls, selector: str, devices: str) -> Rule:
        """A rule from its two sides."""
        names = tuple(name.strip() for name in devices.split("|"))
        if not all(names):
            raise ConfigurationError(f"rule {selector}={devices}: a device's name is missing")
        return cls(Selector.parse(selector), names)

    def __str__(self) -> str:
        return f"{self.selector.text}={'|'.join(self.devices)}"


@dataclass(frozen=True, slots=True)
class Applied:
    """The rule that decides about a region, with its number from 1."""

    number: int
    rule: Rule

    def __str__(self) -> str:
        return f"rule {self.number} ({self.rule})"


def apply_rules(
    graph: Graph, rules: Sequence[Rule], devices: Collection[str]
) -> dict[str, Applied]:
    """Leaf region -> the rule that decides about it; the last that matches wins.

    Raises SelectorError for a rule that names no region, ConfigurationError for one that names an
    unknown device.
    """
    operators: dict[str, Applied] = {}
    for number, rule in enumerate(rules, 1):
        applied = Applied(number, rule)
        unknown = [name for name in rule.devices if name not in devices]
        if unknown:
            raise ConfigurationError(
                f"{applied}: there is no device {unknown[0]!r}; the devices are "
                f"{', '.join(devices)}"
            )
        for region in rule.selector.select(graph):
            operators.update(dict.fromkeys(region.operators, applied))
    return {
        leaf.name: operators[leaf.operators[0]]
        for leaf in graph.leaves
        if leaf.operators[0] in operators
    }
