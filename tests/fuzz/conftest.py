"""How long to fuzz: `pytest tests/fuzz` is short and repeats itself; --hypothesis-profile=long."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

_common = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=60, derandomize=True, database=None, **_common)
settings.register_profile("long", max_examples=5000, **_common)
settings.load_profile("short")
