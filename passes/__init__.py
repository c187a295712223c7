"""Graph passes: one file each; the registry is `qcompile.passes.PASSES`."""
