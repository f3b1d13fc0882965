"""The CPU backend: Numba, sixteen float lanes, weights in tiles of sixteen rows.

| file                              | what                                                        |
|-----------------------------------|-------------------------------------------------------------|
| `vector.py`                       | the vector type and raw memory, over LLVM                   |
| `lanes.py`, `machine_code.py`     | code generated from Python: its values, its compilation     |
| `formats/`                        | how packed weights lie in memory, and how they are read     |
| `packing.py`, `packed_cache.py`   | packed weights, in memory and on disk                       |
| `rounding.py`                     | rows of x as 16-bit integers                                |
| `products.py`                     | generated inner loops of products                           |
| `matmul.py`                       | products with packed weights, and what is fused to them     |
| `cache.py`, `attention.py`        | the paged cache, and attention over it                      |
| `layers.py`                       | norms, positions, activations, look-ups                     |
| `fusing.py`, `assembly.py`        | from a subgraph to instructions                             |
| `instructions.py`, `program.py`   | instructions, and the loop in which all threads run them    |
| `team.py`                         | the threads                                                 |
| `runner.py`                       | a loaded subgraph: program, buffers, cache                  |
| `backend.py`                      | what it can run, and loading                                |
"""
