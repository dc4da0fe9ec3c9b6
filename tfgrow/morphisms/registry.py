"""The morphisms by name, and the candidates of a model. A new morphism is one file and one row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import keras
import numpy as np

from tfgrow._checks import require_whole
from tfgrow.graph.channels import Flow
from tfgrow.graph.cost import CostModel
from tfgrow.graph.nodes import trace
from tfgrow.graph.sites import Site, sites_of
from tfgrow.graph.versions import version_of
from tfgrow.morphisms.add import Add
from tfgrow.morphisms.add_group import AddGroup
from tfgrow.morphisms.base import Candidate, Group, Morphism
from tfgrow.morphisms.deepen import Deepen
from tfgrow.morphisms.double import Double
from tfgrow.morphisms.enlarge_kernel import EnlargeKernel
from tfgrow.morphisms.heads import AddHeads, Heads, PruneHeads
from tfgrow.morphisms.prune import Prune, PruneAlone
from tfgrow.morphisms.retrain import Retrain
from tfgrow.morphisms.skip import Skip
from tfgrow.morphisms.split import Split
from tfgrow.types import Cost

MORPHISMS: dict[str, Morphism] = {
    morphism.name: morphism
    for morphism in (
        Split(),
        Add(),
        AddGroup(),
        Prune(),
        Double(),
        EnlargeKernel(),
        Deepen(),
        Skip(),
        Heads(),
        AddHeads(),
        PruneHeads(),
    )
}

_NO_EDITS: dict[str, Morphism] = {kind.name: kind for kind in (Retrain(), PruneAlone())}
"""Known to the estimator only: what edits are compared with."""


def get(identifier: str | Morphism) -> Morphism:
    """A morphism by name, or the one given."""
    if isinstance(identifier, Morphism):
        return identifier
    if isinstance(identifier, str) and identifier in _NO_EDITS:
        return _NO_EDITS[identifier]
    if not isinstance(identifier, str) or identifier not in MORPHISMS:
        raise ValueError(
            f"Unknown morphism {identifier!r}; expected one of {sorted(MORPHISMS)} or a Morphism."
        )
    return MORPHISMS[identifier]


def several(identifiers: Iterable[str | Morphism] | str | Morphism) -> list[Morphism]:
    """Morphisms by name, or those given; one or more of them."""
    if isinstance(identifiers, (str, Morphism)):
        identifiers = (identifiers,)
    if not isinstance(identifiers, Iterable):
        raise TypeError(f"morphisms are names or Morphisms, found {identifiers!r}.")
    found = [get(identifier) for identifier in identifiers]
    if not found:
        raise ValueError(f"No morphisms given; expected some of {sorted(MORPHISMS)}.")
    return found


def register_morphism(morphism: Morphism) -> None:
    """Makes a morphism of your own known by its name."""
    MORPHISMS[morphism.name] = morphism


def candidates(
    model: keras.Model,
    morphisms: Sequence[str | Morphism] | str | Morphism = ("split", "add"),
    sites: Iterable[Site | str] | Site | str | None = None,
    new_units: int = 4,
    seed: int = 0,
) -> list[Candidate]:
    """Every smallest edit of a model, with theta initialised.

    Args:
      model: a growable model.
      morphisms: kinds of edits, by name.
      sites: sites or their names, or one; all that can grow by default.
      new_units: for `"add"` and `"add_heads"`, single new units or heads per site.
      seed: of the random initial directions.

    Returns:
      One candidate per unit of a site for `"split"` and `"prune"`, `new_units` per site for
      `"add"`, one per convolution for `"enlarge_kernel"`, one per site for `"double"`; per head of
      an attention layer for `"heads"` and `"prune_heads"`, `new_units` per such layer for
      `"add_heads"`.

    Raises:
      ValueError: for an unknown morphism or site, one that is blocked, or one of another model.

    Example:

    >>> import keras, tfgrow
    >>> model = tfgrow.convert(keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, "relu"), keras.layers.Dense(2)]))
    >>> len(tfgrow.candidates(model, morphisms=("split", "add"), new_units=2))
    5
    """
    kinds = several(morphisms)
    require_whole("new_units", new_units, optional=False)
    graph = trace(model)
    every = sites_of(model, graph)
    costs = CostModel(graph, every)
    chosen = _chosen(model, every, kinds, sites)
    return edits_of_sites(chosen, kinds, costs, {site.name: new_units for site in chosen}, seed)


def edits_of_sites(
    sites: Iterable[Site],
    kinds: Sequence[Morphism],
    costs: CostModel,
    new_units: Mapping[str, int],
    seed: int,
) -> list[Candidate]:
    """`candidates` of some sites, with so many new units by site."""
    found = _made(sites, kinds, new_units, seed)
    return [candidate.replace(cost=joint_cost(costs, [candidate])) for candidate in found]


def removals(sites: Sequence[Site]) -> list[Candidate]:
    """Of each unit that can be taken away, alone."""
    kinds = (_NO_EDITS[PruneAlone.name], MORPHISMS[PruneHeads.name])
    return _made(sites, kinds, {site.name: 0 for site in sites}, seed=0)


def _made(
    sites: Iterable[Site], kinds: Sequence[Morphism], new_units: Mapping[str, int], seed: int
) -> list[Candidate]:
    """What each kind makes of each site where it is possible."""
    return [
        candidate
        for site in sites
        for kind in kinds
        if kind.reason(site) is None
        for candidate in kind.candidates(site, new_units=new_units[site.name], seed=seed)
    ]


def at_lengths(candidates: Sequence[Candidate], lengths: Iterable[float]) -> list[Candidate]:
    """Candidates, each scaled; what can only be applied as a whole is left out at less than 1."""
    scaled = [
        get(candidate.morphism).scaled(candidate, float(length))
        for candidate, length in zip(candidates, lengths, strict=True)
    ]
    return [one for one in scaled if one is not None]


def joint_cost(costs: CostModel, chosen: Iterable[Candidate]) -> Cost:
    """What a set of candidates costs together: edits of neighbouring layers multiply."""
    chosen = list(chosen)
    kernels: dict[str, tuple[int, ...]] = {}
    params = flops = 0
    for candidate in chosen:
        demand = get(candidate.morphism).demand(candidate)
        kernels.update(demand.kernels)
        params, flops = params + demand.more.params, flops + demand.more.flops
    wider = costs.extra(extra_units(chosen), kernels)
    return Cost(wider.params + params, wider.flops + flops)


def extra_units(chosen: Iterable[Candidate]) -> dict[str, int]:
    """By how many units some candidates change the widths of their sites together."""
    extra: dict[str, int] = {}
    for candidate in chosen:
        more = get(candidate.morphism).demand(candidate).units
        extra[candidate.site.name] = extra.get(candidate.site.name, 0) + more
    return extra


def new_widths(chosen: Sequence[Candidate]) -> dict[str, tuple[int, int]]:
    """The units of the sites that some candidates widen or narrow, before and after."""
    units = {candidate.site.name: candidate.site.units for candidate in chosen}
    more = extra_units(chosen).items()
    return {name: (units[name], units[name] + count) for name, count in more if count}


def apart(chosen: Sequence[Candidate]) -> np.ndarray:
    """Which candidates can't be applied at once: one needs the channels that another changes.

    Returns:
      Bool `[n, n]`, symmetric.
    """
    demands = [get(candidate.morphism).demand(candidate) for candidate in chosen]
    clashes = np.zeros((len(chosen), len(chosen)), dtype=bool)
    if not any(demand.fixed for demand in demands):
        return clashes
    flow = Flow(chosen[0].site.graph)
    for row, demand in enumerate(demands):
        held = {owner for tensor in demand.fixed for owner in flow.at(tensor)}
        for column, (other, theirs) in enumerate(zip(chosen, demands, strict=True)):
            changes = theirs.units and flow.root(other.site.producers[0].index) in held
            ends = row != column and set(demand.fixed[-1:]) & set(theirs.fixed[-1:])
            if changes or ends:
                clashes[row, column] = clashes[column, row] = True
    return clashes


def open_sites(every: Iterable[Site], kinds: Sequence[Morphism]) -> list[Site]:
    """The sites at which one of some kinds of edits is possible."""
    return [site for site in every if any(kind.reason(site) is None for kind in kinds)]


def why_closed(site: Site, kinds: Sequence[Morphism]) -> str:
    """Why none of some kinds of edits is possible at a site."""
    return ", and ".join(dict.fromkeys(str(kind.reason(site)) for kind in kinds))


def _chosen(model, every: Sequence[Site], kinds: Sequence[Morphism], wanted) -> list[Site]:
    if wanted is None:
        chosen = open_sites(every, kinds)
        if not chosen:
            reasons = "; ".join(f"{site.name}: {why_closed(site, kinds)}" for site in every)
            raise ValueError(f"Nothing in model '{model.name}' can grow. {reasons}")
        return chosen
    chosen = []
    for name, site in named(model, every, wanted).items():
        if not open_sites([site], kinds):
            raise ValueError(f"Site '{name}' can't grow: {why_closed(site, kinds)}.")
        if site not in chosen:
            chosen.append(site)
    return chosen


def named(
    model: keras.Model, every: Sequence[Site], wanted: Iterable[str | Site] | str | Site
) -> dict[str, Site]:
    """Sites by the names that they are wanted by.

    Args:
      model: named in errors.
      every: its sites.
      wanted: names or sites, or one of them.

    Raises:
      ValueError: for a name that none of them has, or a site of another model.
    """
    by_name = {name: site for site in every for name in site.names}
    found = {}
    for item in [wanted] if isinstance(wanted, (str, Site)) else wanted:
        name = item.name if isinstance(item, Site) else item
        if name not in by_name:
            raise ValueError(
                f"Model '{model.name}' has no site named {name!r}; its sites are {list(by_name)}."
            )
        if isinstance(item, Site):
            check_current(model, item)
        found[name] = by_name[name]
    return found


def check_current(model: keras.Model, site: Site) -> None:
    """Refuses a site (and so its candidates) of another model, or of this one before it grew."""
    name = model.name
    if site.model() is not model:
        raise ValueError(
            f"Site '{site.name}' belongs to another model than '{name}'; make candidates of "
            "the model you want to grow with tfgrow.candidates(model)."
        )
    if site.version != version_of(model):
        raise ValueError(
            f"Site '{site.name}' was traced before model '{name}' last grew, so its "
            "candidates no longer fit; make new ones with tfgrow.candidates(model)."
        )


def group_candidates(model: keras.Model, chosen: Sequence[Candidate]) -> tuple[list[Group], list]:
    """Candidates stacked by morphism, site and what was measured of them.

    Returns:
      The groups, and for each the positions of its candidates in `chosen`.
    """
    if isinstance(chosen, Candidate):
        raise TypeError(f"Expected a list of candidates, found a single {chosen!r}.")
    if not chosen:
        raise ValueError("No candidates given; make some with tfgrow.candidates(model).")
    members: dict[tuple, list[int]] = {}
    for position, candidate in enumerate(chosen):
        if not isinstance(candidate, Candidate):
            raise TypeError(f"Expected a Candidate, found {type(candidate).__name__}.")
        check_current(model, candidate.site)
        # Statistics that only some candidates have measured can't be stacked with the others'.
        measured = tuple(sorted(candidate.state))
        like = get(candidate.morphism).group_key(candidate)
        key = (candidate.morphism, candidate.site.name, measured, like)
        members.setdefault(key, []).append(position)
    groups = [
        Group(get(morphism), [chosen[position] for position in positions])
        for (morphism, *_), positions in members.items()
    ]
    return groups, list(members.values())
