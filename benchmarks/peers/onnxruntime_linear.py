"""ONNX Runtime, CPU provider: fp32 and dynamic int8, inputs and outputs bound beforehand.

With two threads all sessions share the process-wide pool. A pool per session is no alternative
where weights rotate: its workers spin for about 50 ms after a call, and twelve sessions in turn
took ten times as long a call as one. Spinning stays on, since it shortens back-to-back calls; the
timers wait for its end before anyone else's turn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import onnxruntime
from shapes import Product

from peers import Contender, Unavailable, onnx_models

# The pool's size is fixed at its first use in a process, and from then on sessions without it are
# refused: so everything with one thread is measured first (conftest.py).
_POOL_THREADS = 2
onnxruntime.set_default_logger_severity(3)  # each session warns that its own pool size is ignored


@cache
def _create_shared_pool() -> None:
    onnxruntime.set_global_thread_pool_sizes(_POOL_THREADS, 1)


def _session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    if threads == 1:
        if _create_shared_pool.cache_info().currsize:
            raise Unavailable("its process-wide pool of two threads is already in use")
        options.intra_op_num_threads = 1  # the caller alone: no workers
    elif threads == _POOL_THREADS:
        _create_shared_pool()
        options.use_per_session_threads = False
    else:
        raise Unavailable(f"its pool is set up for {_POOL_THREADS} threads, not {threads}")
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _contender(problem: Product, model: bytes) -> Contender:
    x = onnxruntime.OrtValue.ortvalue_from_numpy(problem.data.x.numpy())
    y = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((problem.m, problem.n), np.float32))

    def bound() -> Callable[[], None]:
        session = _session(model, problem.threads)
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", x)
        binding.bind_ortvalue_output("y", y)
        return lambda: session.run_with_iobinding(binding)

    calls = [bound() for _ in range(problem.copies)]

    def result() -> np.ndarray:
        calls[0]()
        return np.array(y.numpy())

    return Contender.of_linear(problem, calls, result)


def build(problem: Product) -> Contender:
    if problem.precision != "fp32":
        raise Unavailable("its CPU provider has no bf16 MatMul on x86")
    return _contender(problem, onnx_models.fp32(problem))


def build_dynamic(problem: Product) -> Contender:
    return _contender(problem, onnx_models.dynamic(problem))
