"""A bound on the time that damaged input takes."""

import gc
import time
from contextlib import contextmanager

SECONDS = 1.0  # of the processor, for one mutant


@contextmanager
def soon(told):
    """Fails with `told` where what is inside takes long; collecting the garbage of earlier tests is none of it."""
    gc.disable()
    began = time.process_time()
    try:
        yield
    finally:  # also of what is refused
        spent = time.process_time() - began
        gc.enable()
        assert spent < SECONDS, told
