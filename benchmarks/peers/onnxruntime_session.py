"""ONNX Runtime, CPU provider: sessions, with inputs and outputs bound beforehand.

With two threads all sessions share the process-wide pool. A pool per session is no alternative
where weights rotate: its workers spin for about 50 ms after a call, and twelve sessions in turn
took ten times as long a call as one. Spinning stays on, since it shortens back-to-back calls; the
timers wait for its end before anyone else's turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import onnxruntime
from onnxruntime import OrtValue

from peers import Unavailable

# The pool's size is fixed at its first use in a process, and from then on sessions without it are
# refused: so everything with one thread is measured first (conftest.py).
_POOL_THREADS = 2
onnxruntime.set_default_logger_severity(3)  # each session warns that its own pool size is ignored


@cache
def _create_shared_pool() -> None:
    onnxruntime.set_global_thread_pool_sizes(_POOL_THREADS, 1)


def session(
    model: bytes, threads: int, optimized: Path | None = None
) -> onnxruntime.InferenceSession:
    """optimized: where to write the model that it makes of this one."""
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
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def bound(
    running: onnxruntime.InferenceSession,
    inputs: Mapping[str, OrtValue],
    outputs: Mapping[str, OrtValue],
) -> Callable[[], None]:
    """A call that reads and writes these values in place, and keeps them: a binding does not."""
    binding = running.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)
    return partial(_run, running, binding, inputs, outputs)


def _run(
    running: onnxruntime.InferenceSession,
    binding: onnxruntime.IOBinding,
    *kept: Mapping[str, OrtValue],
) -> None:
    running.run_with_iobinding(binding)
