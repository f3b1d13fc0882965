"""Where a plan runs: devices with resident loops, links between them, and the engine.

| file            | what                                                                 |
|-----------------|----------------------------------------------------------------------|
| `worker.py`     | a device: answers questions, loads its part of a plan                |
| `host.py`, `loop.py`, `turns.py` | an actor: its devices, and the loop that takes their turns |
| `sharing.py`    | which devices share an actor, a GPU's memory, threads                |
| `part.py`       | what an actor is sent: schedule, subgraphs, links                    |
| `fleet.py`      | the seam between the engine and the devices, wherever they live      |
| `in_process.py` | a fleet of threads, for tests and trials                             |
| `ray_fleet.py`, `ray_actors.py`, `ray_loops.py`, `ray_weights.py` | a fleet of Ray actors |
| `ray_device.py` | the actor                                                            |
| `verification.py` | checking what devices claim, and withdrawing what fails            |
| `cluster.py`    | starting and joining Ray, finding nodes                              |
| `request.py`    | what a caller asks for, and the sequence that grows from it          |
| `batch.py`      | building a step of many sequences                                    |
| `pages.py`      | who owns which page of the cache                                     |
| `engine.py`     | stepping: requests in, tokens out                                    |
| `records.py`, `links/` | how records travel                              |
"""
