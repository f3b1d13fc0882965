"""Holding a backend to its word: what it claims and supports, against the NumPy reference.

| file         | holds                                                             |
|--------------|-------------------------------------------------------------------|
| `checks.py`  | what is to be checked, and what came out                          |
| `steps.py`   | the random steps: prompts, single rows, filled caches, used pages |
| `compare.py` | the error of outputs, and how much of it is allowed               |
| `trial.py`   | a check with its inputs and right answers, and running it         |
"""
