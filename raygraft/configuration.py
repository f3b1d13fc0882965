"""What a person writes about devices and rules: options, mappings, YAML files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from raygraft.graph.errors import ConfigurationError
from raygraft.graph.selectors import Selector
from raygraft.kernels import BACKENDS, DEFAULT_BACKEND, GPU_BACKENDS, check_backend
from raygraft.placement.devices import ENGINE, DeviceSpec
from raygraft.placement.rules import AnyRule, Rule

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"^(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kmg]?i?)b?$", re.IGNORECASE)
_NAME = re.compile(r"^[A-Za-z][\w-]*$")

_KEYS = ("devices", "place", "regions", "override_tensor")

Place = Mapping[str, str] | Sequence[str]
Device = DeviceSpec | Mapping[str, Any] | str


def parse_size(value: object) -> object:
    """Bytes of "2GiB", "500MB" or a plain number; raises ValueError."""
    if not isinstance(value, str):
        return value
    match = _SIZE.match(value.strip())
    if match is None or match["unit"].lower() not in _UNITS:
        raise ValueError(f"{value!r} is no amount of memory; accepted are 2GiB, 500MB or bytes")
    return int(float(match["number"]) * _UNITS[match["unit"].lower()])


def _split_regions(value: object) -> object:
    return value.split("+") if isinstance(value, str) else value


class DeviceConfig(BaseModel):
    """One device, in the form that YAML files and `--device` share."""

    model_config = ConfigDict(extra="forbid")

    name: str
    backend: str = DEFAULT_BACKEND
    threads: int | None = Field(None, ge=1)
    memory: Annotated[int | None, BeforeValidator(parse_size), Field(ge=1)] = None
    regions: Annotated[list[str], BeforeValidator(_split_regions)] = []
    node: str | None = None
    gpu: int | None = Field(None, ge=0)
    actor: str | None = None

    def spec(self) -> DeviceSpec:
        """The device, checked beyond its types. Raises ConfigurationError."""
        _check_name("a device's name", self.name)
        if self.actor is not None:
            _check_name(f"the actor of device {self.name}", self.actor)
        try:
            check_backend(self.backend)
        except ConfigurationError as error:
            raise ConfigurationError(f"device {self.name}: {error}") from None
        if self.gpu is not None and self.backend in BACKENDS.keys() - {*GPU_BACKENDS}:
            raise ConfigurationError(
                f"device {self.name}: gpu={self.gpu}, but backend {self.backend!r} runs on no GPU; "
                f"of ours {', '.join(GPU_BACKENDS)} does"
            )
        for item in self.regions:
            Selector.parse(item)
        return DeviceSpec(**{**dict(self), "regions": tuple(self.regions)})


def _check_name(what: str, name: str) -> None:
    if not _NAME.match(name) or name == ENGINE:
        raise ConfigurationError(
            f"{name!r} cannot be {what}: accepted are letters, digits, - and _, "
            f"beginning with a letter, and not {ENGINE!r}"
        )


@dataclass(frozen=True, slots=True)
class Configuration:
    """Devices and rules of one file."""

    devices: tuple[DeviceSpec, ...]
    rules: tuple[AnyRule, ...]
    regions: Mapping[str, str] = field(default_factory=dict)
    """The user's own regions: name -> selector."""
    override_tensor: tuple[str, ...] = ()
    """As llama.cpp's option; rules come after, and win."""


def parse_device(device: Device, where: str = "") -> DeviceSpec:
    """A device from `NAME:key=value,...`, or from a mapping with the same keys.

    Raises ConfigurationError, which names the key and what would be accepted.
    """
    if isinstance(device, DeviceSpec):
        return device
    data = _device_option(device) if isinstance(device, str) else dict(device)
    try:
        return DeviceConfig.model_validate(data).spec()
    except ValidationError as error:
        name = data.get("name", "without a name")
        raise ConfigurationError(f"{where}device {name}: {_first(error)}") from error


def _device_option(text: str) -> dict[str, Any]:
    name, _, rest = text.partition(":")
    data: dict[str, Any] = {"name": name}
    for item in filter(None, rest.split(",")):
        key, separator, value = item.partition("=")
        if not separator:
            raise ConfigurationError(
                f"device {text!r}: {item!r} has no value; expected NAME:key=value,key=value"
            )
        data[key.strip()] = value.strip()
    return data


def _first(error: ValidationError) -> str:
    """The first complaint in words, with the keys that would be accepted."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "it"
    if first["type"] == "extra_forbidden":
        accepted = ", ".join(DeviceConfig.model_fields)
        return f"{place!r} is no key of a device; accepted are {accepted}"
    return f"{place}: {first['msg'].removeprefix('Value error, ')}"


def parse_devices(devices: Iterable[Device], where: str = "") -> tuple[DeviceSpec, ...]:
    """Several devices; raises ConfigurationError when two share a name."""
    specs = tuple(parse_device(device, where) for device in devices)
    names = [spec.name for spec in specs]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ConfigurationError(f"{where}two devices are named {repeated[0]!r}")
    return specs


def parse_rules(place: Place | None, where: str = "") -> tuple[AnyRule, ...]:
    """Rules from a mapping selector -> device, or from `SELECTOR=DEVICE` texts.

    Raises ConfigurationError or SelectorError.
    """
    if place is None:
        return ()
    items = list(place.items()) if isinstance(place, Mapping) else [(text,) for text in place]
    for item in items:
        if not all(isinstance(part, str) for part in item):
            said = ": ".join(map(str, item))
            raise ConfigurationError(f"{where}place: {said}: expected a selector and a device")
    return tuple(Rule.of(*item) if len(item) == 2 else Rule.parse(*item) for item in items)


def read_configuration(path: str | Path) -> Configuration:
    """Devices and rules of a YAML file: at its top, or in `metadata.raygraft` of a cluster file.

    Raises ConfigurationError, which names the file and the key.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigurationError(f"{path}: no YAML: {where}{error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: no YAML: {' '.join(str(error).split())}") from error
    own = data
    for key in ("metadata", "raygraft") if isinstance(data, dict) and "metadata" in data else ():
        own = own.get(key) if isinstance(own, dict) else None
    if not isinstance(own, dict) or not isinstance(own.get("devices"), list) or not own["devices"]:
        raise ConfigurationError(
            f"{path}: no devices: expected a list under `devices`, "
            "or under `metadata.raygraft.devices` of a cluster file"
        )
    if unknown := own.keys() - set(_KEYS):
        raise ConfigurationError(
            f"{path}: {min(map(str, unknown))!r} is not known here; accepted are {', '.join(_KEYS)}"
        )
    wrong = [entry for entry in own["devices"] if not isinstance(entry, dict | str)]
    if wrong:
        raise ConfigurationError(f"{path}: devices: {wrong[0]!r} is no device")
    place = own.get("place")
    if not isinstance(place, dict | list | None):
        raise ConfigurationError(f"{path}: place: expected selectors with their devices")
    regions = own.get("regions") or {}
    if not isinstance(regions, dict) or not all(isinstance(v, str) for v in regions.values()):
        raise ConfigurationError(f"{path}: regions: expected names with their selectors")
    overrides = own.get("override_tensor") or []
    if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
        raise ConfigurationError(f"{path}: override_tensor: expected a list of REGEX=DEVICE")
    return Configuration(
        parse_devices(own["devices"], f"{path}: "),
        parse_rules(place, f"{path}: "),
        {str(name): selector for name, selector in regions.items()},
        tuple(overrides),
    )


def parse_regions(texts: Sequence[str]) -> dict[str, str]:
    """The user's own regions from `NAME=SELECTOR` texts. Raises ConfigurationError."""
    regions = {}
    for text in texts:
        name, separator, selector = text.partition("=")
        if not separator:
            raise ConfigurationError(f"region {text!r}: expected NAME=SELECTOR")
        regions[name.strip()] = selector.strip()
    return regions
