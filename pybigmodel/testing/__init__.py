"""What tests and benchmarks share, public: tolerances, the ISA switch, timers, roofline probe."""

from pybigmodel.testing.isa import available_isas, force_isa
from pybigmodel.testing.roofline import cache_sizes, level_of, peak, probe_bytes, read_bandwidth
from pybigmodel.testing.timers import Timing, interleave, wait_until_idle
from pybigmodel.testing.tolerance import Error, assert_exact, assert_no_worse, measure_error

__all__ = [
    "Error",
    "Timing",
    "assert_exact",
    "assert_no_worse",
    "available_isas",
    "cache_sizes",
    "force_isa",
    "interleave",
    "level_of",
    "measure_error",
    "peak",
    "probe_bytes",
    "read_bandwidth",
    "wait_until_idle",
]
