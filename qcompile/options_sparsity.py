"""The options of sparsity and channel pruning, checked before any work."""

from __future__ import annotations

from qcompile.context import ChannelPruning, Settings
from qcompile.criteria import CRITERIA
from qcompile.errors import InputError
from qcompile.sparsity import Pattern, parse_sparsity

PRUNE_CRITERIA = ("l1", "hrank", "hessian", "second-order")
PRUNE_BUDGETS = ("params", "macs", "latency")


def check_sparsity(settings: Settings, has_data: bool) -> None:
    """Raise InputError for a sparsity that cannot be, or a criterion that looks at samples where there are none."""
    _check_pruning(settings.pruning, has_data)
    if settings.sparsity is None:
        if settings.criterion != Settings.criterion:
            raise InputError(f"--criterion {settings.criterion}: says which weights become zero; give --sparsity with it")
        if settings.sparsity_scope != Settings.sparsity_scope:
            raise InputError(f"--sparsity-scope {settings.sparsity_scope}: give --sparsity with it")
        return
    rule = parse_sparsity(settings.sparsity)
    if isinstance(rule, Pattern) and settings.sparsity_scope != "layer":
        raise InputError(
            f"--sparsity {rule} --sparsity-scope {settings.sparsity_scope}: N:M is the same in every layer; leave it out"
        )
    if CRITERIA[settings.criterion].needs_data and not has_data:
        raise InputError(
            f"--sparsity {settings.sparsity} --criterion {settings.criterion}: judges weights by what they multiply; "
            "give --data, or --criterion magnitude"
        )


def pruning_of(
    ratio: float | None,
    criterion: str | None,
    budget: str | None,
    multiple: int | None,
    keep: tuple[str, ...],
    refit: bool | None,
    implant: float | None = None,
) -> ChannelPruning | None:
    """The options of `--prune-channels`, defaults filled in; None without it. Raises InputError where they cannot be."""
    given: dict[str, object] = {"prune-criterion": criterion, "prune-budget": budget, "channel-multiple": multiple}
    given |= {"keep": keep or None, "prune-implant": implant}
    first = next((name for name, value in given.items() if value is not None), None) or ("no-refit" if refit is False else None)
    if ratio is None:
        if first is not None:
            raise InputError(f"--{first} is for channel pruning; give --prune-channels with it")
        return None
    usual = ChannelPruning(ratio)
    if not 0 < ratio < 1:
        raise InputError(f"--prune-channels {ratio:g}: give the share to remove, above 0 and below 1, such as 0.3")
    if criterion is not None and criterion not in PRUNE_CRITERIA:
        raise InputError(f"--prune-criterion {criterion}: choose one of {', '.join(PRUNE_CRITERIA)}")
    if budget is not None and budget not in PRUNE_BUDGETS:
        raise InputError(f"--prune-budget {budget}: choose one of {', '.join(PRUNE_BUDGETS)}")
    if multiple is not None and multiple < 1:
        raise InputError(f"--channel-multiple {multiple}: give a whole number of at least 1")
    if implant is not None and not 0 <= implant <= 1:
        raise InputError(f"--prune-implant {implant:g}: give the share of pruned filters that become 1x1 filters, 0 to 1")
    if implant and refit is False:
        raise InputError(f"--prune-implant {implant:g}: 1x1 filters are fitted; leave --no-refit out")
    return ChannelPruning(
        ratio,
        usual.criterion if criterion is None else criterion,
        usual.budget if budget is None else budget,
        usual.multiple if multiple is None else multiple,
        keep,
        usual.refit if refit is None else refit,
        usual.implant if implant is None else implant,
    )


def _check_pruning(pruning: ChannelPruning | None, has_data: bool) -> None:
    """Raise InputError where channels are judged or refitted by samples and there are none."""
    if pruning is None or has_data or (pruning.criterion == "l1" and not pruning.refit):
        return
    what = "refitting" if pruning.criterion == "l1" else f"--prune-criterion {pruning.criterion}"
    raise InputError(f"--prune-channels: {what} looks at samples; give --data, or --prune-criterion l1 --no-refit")


def check_float(settings: Settings) -> None:
    """Raise InputError for what `--bits 32` does not go with: nothing is quantised."""
    if settings.sparsity is None and settings.pruning is None:
        raise InputError("--bits 32 writes a float model, and there is nothing to do to it; give --sparsity or --prune-channels")
    for name in ("format", "inputs_as", "target"):
        value, usual = getattr(settings, name), getattr(Settings, name)
        if value != usual:
            raise InputError(f"--bits 32 --{name.replace('_', '-')} {value}: nothing is quantised; leave --bits 32 or it out")
