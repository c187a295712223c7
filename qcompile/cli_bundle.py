"""`qcompile bundle`: a folder for a device."""

from __future__ import annotations

from pathlib import Path

import click

from qcompile.cli_common import FILE, FOLDER, PREPROCESS, QUIET, TRACEBACK
from qcompile.printing import console, print_rows


@click.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FOLDER, required=True, metavar="DIR", help="New or empty folder to write.")
@click.option("--data", metavar="SPEC", help="Where the sample comes from: its first one.  [made up]")
@PREPROCESS
@click.option("--page", is_flag=True, help="Also a static page that runs the model in a browser, offline.")
@click.option("--web", type=FOLDER, metavar="DIR", help="With --page: the folder of onnxruntime-web.  [npm's]")
@click.option("--labels", type=FILE, metavar="FILE.txt", help="Names of the classes, one a line.")
@QUIET
@TRACEBACK
def bundle(
    model: Path,
    output: Path,
    data: str | None,
    preprocess: str | None,
    page: bool,
    web: Path | None,
    labels: Path | None,
    quiet: bool,
) -> int:
    """Write MODEL, its .ort form, a sample with expected outputs, and loaders that check themselves, into a folder."""
    if web is not None and not page:
        raise click.UsageError("--web goes with --page")
    if preprocess is not None and data is None and not page:
        raise click.UsageError("--preprocess is for images; give them with --data, or a page that takes them with --page")
    from qcompile.bundle import bundle_model

    manifest = bundle_model(model, output, data=data, preprocess=preprocess, page=page, web=web, labels=labels)
    if not quiet:
        out = console()
        ends = [("input", r) for r in manifest["inputs"]] + [("output", r) for r in manifest["outputs"]]
        print_rows(("end", "name", "type", "shape"), [(end, r["name"], r["type"], r["dims"]) for end, r in ends], out)
        said = "the same bits on every machine" if manifest["promise"] == "bits" else "close results: the file holds findings"
        out.print(f"promised: {said}")
        needs = ", ".join(f"{name} {version or 'none yet'}" for name, version in manifest["needs"].items())
        out.print(f"least versions: {needs}")
        out.print(f"wrote {output}")
    return 0
