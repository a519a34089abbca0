"""`mvar doctor`: what this machine has, what mvar will use, and the command that fixes the rest."""

import mvar_core as mvar
from mvar_cli import console, options


@options.command(example="mvar doctor")
def doctor() -> None:
    """What this machine has and what mvar will use: one line per finding, and the command that fixes it."""
    result = mvar.doctor()
    width = max(len(finding.name) for finding in result.findings)
    for finding in result.findings:
        console.say(f"{'ok  ' if finding.ok else 'note'}  {finding.name:<{width}}  {finding.found}")
        if finding.fix:
            console.say(f"      {'':<{width}}  {finding.fix}")
    console.show(result)
