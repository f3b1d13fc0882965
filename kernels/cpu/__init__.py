"""The CPU backend: Numba, sixteen float lanes, weights in tiles of sixteen rows.

| file         | what                                                            |
|--------------|-----------------------------------------------------------------|
| `vector.py`  | the vector type and raw memory, over LLVM                       |
| `formats.py` | how packed weights lie in memory                                |
| `matmul.py`  | products with packed weights, for one row and for many          |
| `layers.py`  | norms, positions, attention, activations                        |
| `program.py` | instructions, and the loop in which all threads run them        |
| `team.py`    | the threads                                                     |
| `runner.py`  | a loaded subgraph: program, buffers, cache                      |
| `backend.py` | what it can run, and loading                                    |
"""
