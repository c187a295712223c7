"""`qcompile inspect`: what a file holds."""

from __future__ import annotations

from pathlib import Path

import click

from qcompile.cli_common import FILE, FOLDER, TRACEBACK
from qcompile.errors import LimitError
from qcompile.printing import console, print_certificate, print_rescales, print_rows, print_summary
from qcompile.report_file import report_json


@click.command()
@click.argument("model", type=FILE)
@click.option("--dyadic", is_flag=True, help="List b and c of every rescale, b/2^c, derived again from the file.")
@click.option("--nodes", is_flag=True, help="List the nodes' names, as --exclude takes them.")
@click.option("--layers", is_flag=True, help="List multiply-accumulates, weights and quantisation parameters by layer.")
@click.option("--dim", "dims", multiple=True, metavar="NAME=SIZE", help="Size of a symbolic dimension; may be repeated.  [1]")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--require-exact", is_flag=True, help="With --dyadic: exit status 3 unless all are exact.")
@click.option("--require-integer-only", is_flag=True, help="Exit status 3 where a float tensor lies between the ends.")
@click.option("--portable", is_flag=True, help="List what differs on which machine or runtime.")
@click.option("--require-portable", is_flag=True, help="With --portable: exit status 3 unless the list is empty.")
@click.option(
    "--among",
    type=click.Choice(["all", "onnxruntime"]),
    default="all",
    help="With --require-portable: which runtimes count; onnxruntime on all its machines, or others too.  [all]",
)
@click.option(
    "--sparsity",
    is_flag=False,
    flag_value="2:4",
    metavar="[N:M-OR-SHARE]",
    help="List each layer's zeros, whether it is N:M, and if sparse tensor cores can use it.  [2:4]",
)
@click.option(
    "--require-sparsity",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="With --sparsity: exit status 3 where a smaller share of the weights follows it.",
)
@click.option("--export-2:4", "export_24", type=FOLDER, metavar="DIR", help="Write 2:4 layers as GPUs' sparse tensors hold them.")
@TRACEBACK
def inspect(
    model: Path,
    dyadic: bool,
    nodes: bool,
    layers: bool,
    dims: tuple[str, ...],
    as_json: bool,
    require_exact: bool,
    require_integer_only: bool,
    portable: bool,
    require_portable: bool,
    among: str,
    sparsity: str | None,
    require_sparsity: float | None,
    export_24: Path | None,
) -> int:
    """Show what MODEL holds."""
    if require_exact and not dyadic:
        raise click.UsageError("--require-exact goes with --dyadic")
    if as_json and (dyadic or nodes or layers or portable or sparsity is not None or export_24 is not None):
        rest = "--dyadic, --nodes, --layers, --portable, --sparsity and --export-2:4"
        raise click.UsageError(f"--json prints everything; leave {rest} out")
    if require_sparsity is not None and sparsity is None:
        raise click.UsageError("--require-sparsity goes with --sparsity")
    if require_portable and not portable:
        raise click.UsageError("--require-portable goes with --portable")
    if among != "all" and not require_portable:
        raise click.UsageError("--among goes with --require-portable")
    sizes = _sizes(dims)
    if sparsity is not None:
        from qcompile.inspect_sparsity import inspect_sparsity

        inspect_sparsity(model, sparsity, require_sparsity)
    if export_24 is not None:
        from qcompile.inspect_sparsity import inspect_export

        inspect_export(model, export_24)
    listed = bool(dyadic or nodes or sparsity or export_24 or portable)  # parts that were asked for by name
    from qcompile.certificate import certify
    from qcompile.inspection import summary
    from qcompile.model_file import list_nodes

    if nodes:
        print_rows(("name", "operator", "first output"), list_nodes(model), console())
    certificate = certify(model) if require_integer_only or not (listed or layers or as_json) else None
    if as_json or layers or not listed:
        from qcompile.facts import facts
        from qcompile.printing_facts import print_facts, print_layers

        found_facts = facts(model, sizes)
        if as_json:
            click.echo(report_json(found_facts), nl=False)
        elif layers:
            print_layers(found_facts, console())
        else:
            print_facts(found_facts, console())
            print_summary(summary(model), console())
    if certificate is not None and not as_json:
        print_certificate(certificate, console(), every=require_integer_only)
    if certificate is not None and require_integer_only and not certificate.integer_only:
        first = certificate.floats[0]
        raise LimitError(
            f"{model}: not integer-only: {len(certificate.floats)} float tensors between the ends, first '{first.tensor}' "
            f"of node '{first.node}' ({first.op})"
        )
    if dyadic:
        _list_rescales(model, require_exact)
    if portable:
        from qcompile.inspect_portable import inspect_portable

        inspect_portable(model, require_portable, among)
    return 0


def _list_rescales(model: Path, require_exact: bool) -> None:
    """Print b and c of every rescale. Raises LimitError where `require_exact` and one is not exact, or there is none."""
    from qcompile.inspection import rescales

    found = rescales(model)
    print_rescales(found, console())
    inexact = [r for r in found if not r.exact]
    if require_exact and not found:
        raise LimitError(f"{model}: holds no rescale; is it a quantised model?")
    if require_exact and inexact:
        raise LimitError(f"{model}: {len(inexact)} of {len(found)} rescales are not exact, first '{inexact[0].node}'")


def _sizes(dims: tuple[str, ...]) -> dict[str, int]:
    """{name: size} of `--dim NAME=SIZE`."""
    found = {}
    for text in dims:
        name, _, size = text.partition("=")
        if not name or not size.isdecimal() or int(size) < 1:
            raise click.UsageError(f"--dim {text}: give NAME=SIZE, such as batch=8")
        found[name] = int(size)
    return found
