"""`python -m mvar_cli` is `mvar`."""

from __future__ import annotations

from mvar_cli.app import main

main()
