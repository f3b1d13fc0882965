"""Groups of options that several commands share: a dataclass each, whose fields are options.

A command of `@grouped` takes such a dataclass as a parameter; on the command line, and in its help,
each field is an option of its own.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from raygraft.actors.request import SamplingParams
from raygraft.cli import options as o
from raygraft.cli.report import progress
from raygraft.graph.operators import DEFAULT_CACHE_TYPE
from raygraft.llm import LLM
from raygraft.model import Model
from raygraft.verification import print_warnings_as_lines

Command = Callable[..., None]


def grouped(command: Command) -> Command:
    """Let Typer see the fields of the dataclasses that a command takes."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if is_dataclass(parameter.annotation)
    }

    @functools.wraps(command)
    def run(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **made)

    own = [
        option
        for name, parameter in signature.parameters.items()
        for option in (_options_of(groups[name]) if name in groups else [parameter])
    ]
    named = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in own]
    run.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return run


def _options_of(group: Any) -> list[inspect.Parameter]:
    types = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=types[field.name],
        )
        for field in fields(group)
    ]


@dataclass(frozen=True)
class Loading:
    """A model, its devices, and the rules that place its regions on them."""

    model: o.ModelOption = None
    ctx_size: o.ContextOption = None
    cache_type: o.CacheTypeOption = DEFAULT_CACHE_TYPE
    device: o.DeviceOption = None
    devices: o.DevicesOption = None
    place: o.PlaceOption = None
    region: o.RegionOption = None
    override_tensor: o.OverrideOption = None
    threads: o.ThreadsOption = None
    address: o.AddressOption = None
    verify: o.VerifyOption = False
    on_loss: o.OnLossOption = "replace"
    spares: o.SparesOption = 0
    name: o.NameOption = None

    @contextmanager
    def loaded(self, check: Callable[[Model], None], *, quiet: bool) -> Iterator[LLM]:
        """The model on its devices. `check` may refuse it before any device is started."""
        settings = o.configuration(
            self.devices, self.device, self.place, self.threads, self.region, self.override_tensor
        )
        with ExitStack() as held:
            with progress(quiet=quiet) as say, warnings.catch_warnings():
                print_warnings_as_lines()
                model = Model(self.model, say)
                check(model)
                llm = LLM(
                    model,
                    devices=settings.devices,
                    place=settings.rules,
                    regions=settings.regions,
                    override_tensor=settings.override_tensor,
                    address=self.address,
                    ctx_size=self.ctx_size,
                    cache_type=self.cache_type,
                    verify=self.verify,
                    on_loss=self.on_loss,
                    spares=self.spares,
                    name=self.name,
                    progress=say,
                )
                held.enter_context(llm)
            yield llm


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temp: o.TemperatureOption = 0.8
    top_k: o.TopKOption = 40
    top_p: o.TopPOption = 0.95
    min_p: o.MinPOption = 0.05
    repeat_penalty: o.RepeatPenaltyOption = 1.0
    seed: o.SeedOption = -1

    def params(self, n_predict: int, **more: Any) -> SamplingParams:
        """As the engine takes them. Raises RequestError."""
        return SamplingParams(
            temperature=self.temp,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repeat_penalty,
            seed=None if self.seed < 0 else self.seed,
            max_tokens=None if n_predict < 0 else n_predict,
            **more,
        )
