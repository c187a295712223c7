"""What a written file says about where it comes from."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import qcompile
from qcompile.context import Settings
from qcompile.load import Loaded


def stamp(loaded: Loaded, settings: Settings) -> None:
    """Metadata: what was done, with which settings (where not the default), from which source; the version is the producer's."""
    whole = asdict(settings)
    chosen = {f.name: whole[f.name] for f in fields(settings) if getattr(settings, f.name) != f.default}
    stamps = {
        "qcompile.source_sha256": loaded.source_sha256,
        "qcompile.settings": json.dumps(chosen, sort_keys=True, separators=(",", ":")),
    }
    shell = loaded.graph.shell
    kept = [p for p in shell.metadata_props if p.key not in stamps]
    del shell.metadata_props[:]
    shell.metadata_props.extend(kept)
    for key, value in stamps.items():
        shell.metadata_props.add(key=key, value=value)
    shell.producer_name, shell.producer_version = "qcompile", qcompile.__version__
