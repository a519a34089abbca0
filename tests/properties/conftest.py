"""How many examples: few and always the same ones in `make test`, MVAR_EXAMPLES of them in `make properties`."""

import os

from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", derandomize=True, max_examples=12, **COMMON)
settings.register_profile("long", max_examples=int(os.environ.get("MVAR_EXAMPLES", "2000")), print_blob=True, **COMMON)
settings.load_profile("long" if "MVAR_EXAMPLES" in os.environ else "short")
