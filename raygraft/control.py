"""A running engine that others may ask: a mailbox on the Ray cluster, under the engine's name.

The mailbox is a small actor: whoever asks leaves a command there and waits, the engine's process
takes it, does it and leaves the reply. It ends with that process.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from raygraft.graph.errors import ClusterError, ConfigurationError, RaygraftError

NAMESPACE = "raygraft"
_TAKE_SECONDS = 10.0

Command = Sequence[str]
"""What to do, and with what: ("move", "blk.0.attn", "a")."""
Commands = dict[str, Callable[..., dict[str, Any]]]
Reply = tuple[str, Any]
"""("done", result), or ("error", message)."""


@ray.remote(num_cpus=0)
class Mailbox:
    """Commands on their way in, replies on their way out."""

    def __init__(self) -> None:
        self._commands: asyncio.Queue[tuple[int, Command]] = asyncio.Queue()
        self._asked: dict[int, asyncio.Future[Reply]] = {}
        self._next = 0

    async def ask(self, command: Command) -> Reply:
        """Leave a command, and wait for its reply."""
        self._next += 1
        number = self._next
        self._asked[number] = asyncio.get_running_loop().create_future()
        await self._commands.put((number, command))
        return await self._asked[number]

    async def take(self, seconds: float) -> tuple[int, Command] | None:
        """The next command, None when there is none for so long."""
        with suppress(asyncio.TimeoutError):
            return await asyncio.wait_for(self._commands.get(), seconds)
        return None

    async def answer(self, number: int, reply: Reply) -> None:
        """Leave the reply to a command."""
        self._asked.pop(number).set_result(reply)


class Doorkeeper:
    """Does in the engine's process what others ask for, one after the other."""

    def __init__(self, name: str, commands: Commands) -> None:
        """Raises ConfigurationError when another engine has this name."""
        self._commands = commands
        self._closed = False
        options = {"name": f"engine {name}", "namespace": NAMESPACE}
        try:
            self._mailbox = Mailbox.options(**options).remote()  # type: ignore[attr-defined]
        except ValueError as error:
            raise ConfigurationError(
                f"there is an engine named {name!r} on this cluster already"
            ) from error
        threading.Thread(target=self._serve, name="raygraft mailbox", daemon=True).start()

    def close(self) -> None:
        """Take no more commands."""
        self._closed = True
        if ray.is_initialized():
            ray.kill(self._mailbox)

    def _serve(self) -> None:
        with suppress(RayError):  # the mailbox is gone: nobody can ask any more
            while not self._closed:
                taken = ray.get(self._mailbox.take.remote(_TAKE_SECONDS))
                if taken is not None:
                    number, command = taken
                    ray.get(self._mailbox.answer.remote(number, self._do(command)))

    def _do(self, command: Command) -> Reply:
        name, *arguments = command
        try:
            return "done", self._commands[name](*arguments)
        except RaygraftError as error:
            return "error", error
        except Exception as error:  # noqa: BLE001  # told to who has asked
            return "error", RuntimeError(f"{name} failed: {type(error).__name__}: {error}")


def ask_engine(name: str, command: Command) -> dict[str, Any]:
    """Have an engine of the connected cluster do something; what came of it.

    Raises ClusterError when there is no such engine, and what the engine raised.
    """
    try:
        mailbox = ray.get_actor(f"engine {name}", namespace=NAMESPACE)
    except ValueError as error:
        raise ClusterError(f"no engine named {name!r} runs on this cluster") from error
    try:
        kind, said = ray.get(mailbox.ask.remote(command))
    except RayError as error:
        raise ClusterError(f"the engine {name!r} ended before it answered") from error
    if kind == "error":
        raise said
    result: dict[str, Any] = said
    return result
