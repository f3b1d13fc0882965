"""A backend whose process ends or stops where a file says so: for tests of losses."""

MORTAL = '''
import os, signal
from pathlib import Path
from raygraft.kernels.reference.backend import ReferenceBackend

FATE = Path({fate!r})

def meet(place):
    """Die ("kill") or freeze ("stop") here, once, if the file says so."""
    if FATE.exists() and FATE.read_text().split()[0] == place:
        what = FATE.read_text().split()[1]
        FATE.unlink()
        os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)

class Mortal(ReferenceBackend):
    def __init__(self, options):
        super().__init__(options)
        meet("start")
    def supports_op(self, signature, limits):
        meet("question")
        return super().supports_op(signature, limits)
    def load(self, subgraph, weights, limits):
        meet("load")
        runner = super().load(subgraph, weights, limits)
        run = runner.run
        def mortal(step, inputs):
            meet("prompt" if step.rows > 8 else "decode")
            return run(step, inputs)
        runner.run = mortal
        return runner
'''
