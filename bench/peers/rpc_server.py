"""llama.cpp's RPC server with the CPU as its device: `rpc_server.py HOST:PORT THREADS`.

It ends when its standard input is closed, so that it never outlives who started it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading

from ggml import function

CPU = 0  # GGML_BACKEND_DEVICE_TYPE_CPU


def _serve(endpoint: str, threads: int) -> None:
    find = function("ggml_backend_dev_by_type", "ggml", ctypes.c_void_p, ctypes.c_int)
    start = function(
        "ggml_backend_rpc_start_server",
        "ggml-rpc",
        None,
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_void_p),
    )
    devices = (ctypes.c_void_p * 1)(find(CPU))
    start(endpoint.encode(), None, threads, 1, devices)
    os._exit(1)  # it only returns when it cannot serve


if __name__ == "__main__":
    threading.Thread(target=_serve, args=(sys.argv[1], int(sys.argv[2])), daemon=True).start()
    sys.stdin.buffer.read()
    os._exit(0)
