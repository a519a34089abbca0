"""The `mvar` command line: parse, call the core, print."""
