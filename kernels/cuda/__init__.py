"""The CUDA backend: CuPy, raw kernels, CUDA graphs. `pip install raygraft[cuda]` brings CuPy.

| file         | holds                                                                   |
|--------------|-------------------------------------------------------------------------|
| `source/`    | the kernels, in CUDA C++                                                |
| `sources.py` | what is handed to the compiler: files put together for given formats    |
| `gpu.py`     | one GPU: its stream, compiled kernels, launches, errors                 |
| `formats.py` | how weights lie in memory, and packing them                             |
| `weights.py` | weights on the GPU                                                      |
| `fusion.py`  | which operators of a subgraph run as one                                |
| `memory.py`  | buffers: shared by all subgraphs of a device, reused once read          |
| `step.py`    | a step's positions, tables and tokens on the GPU, in one copy           |
| `buffers.py` | where a step's values lie, and in which form                            |
| `rows.py`, `products.py`, `attention.py` | launches of each kind                       |
| `launches.py`| a whole program as launches                                             |
| `unit.py`    | a loaded subgraph: weights, caches, launches from address to address    |
| `runner.py`  | units that follow each other: graphs captured once, replayed per step   |
| `backend.py` | the backend's class                                                     |
"""
