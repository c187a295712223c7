"""`qcompile inspect`: what a file holds."""

from __future__ import annotations

from pathlib import Path

import click

from qcompile.cli_common import FILE, TRACEBACK
from qcompile.errors import LimitError
from qcompile.printing import console, print_certificate, print_rescales, print_rows, print_summary


@click.command()
@click.argument("model", type=FILE)
@click.option("--dyadic", is_flag=True, help="List b and c of every rescale, b/2^c, derived again from the file.")
@click.option("--nodes", is_flag=True, help="List the nodes' names, as --exclude takes them.")
@click.option("--require-exact", is_flag=True, help="With --dyadic: exit status 3 unless all are exact.")
@click.option("--require-integer-only", is_flag=True, help="Exit status 3 where a float tensor lies between the ends.")
@TRACEBACK
def inspect(model: Path, dyadic: bool, nodes: bool, require_exact: bool, require_integer_only: bool) -> int:
    """Show what MODEL holds."""
    if require_exact and not dyadic:
        raise click.UsageError("--require-exact goes with --dyadic")
    from qcompile.certificate import certify
    from qcompile.inspection import rescales, summary
    from qcompile.model_file import list_nodes

    if nodes:
        print_rows(("name", "operator", "first output"), list_nodes(model), console())
    certificate = certify(model) if require_integer_only or not (dyadic or nodes) else None
    if not dyadic and not nodes:
        print_summary(summary(model), console())
    if certificate is not None:
        print_certificate(certificate, console(), every=require_integer_only)
    if certificate is not None and require_integer_only and not certificate.integer_only:
        first = certificate.floats[0]
        raise LimitError(
            f"{model}: not integer-only: {len(certificate.floats)} float tensors between the ends, first '{first.tensor}' "
            f"of node '{first.node}' ({first.op})"
        )
    if not dyadic:
        return 0
    found = rescales(model)
    print_rescales(found, console())
    inexact = [r for r in found if not r.exact]
    if require_exact and not found:
        raise LimitError(f"{model}: holds no rescale; is it a quantised model?")
    if require_exact and inexact:
        raise LimitError(f"{model}: {len(inexact)} of {len(found)} rescales are not exact, first '{inexact[0].node}'")
    return 0
