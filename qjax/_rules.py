"""Rules: which recipe each site of a program gets, and what is wrong with a rule."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence

from qjax._patterns import check_pattern
from qjax._recipe import Recipe
from qjax._sites import Site

Rule = Recipe | Mapping[str, Recipe | None] | Callable[[Site], Recipe | None]
_Pairs = tuple[tuple[str, Recipe | None], ...]
Checked = Recipe | _Pairs | Callable[[Site], Recipe | None]


def checked(caller: str, rule: Rule) -> Checked:
    """Returns a rule as a hashable value, or raises what is wrong with it in itself."""
    if isinstance(rule, Mapping):
        for pattern, recipe in rule.items():
            check_pattern(caller, pattern)
            _check_recipe(caller, f"rule[{pattern!r}]", recipe)
        return tuple(rule.items())
    if not isinstance(rule, Recipe) and not callable(rule):
        raise TypeError(
            f"{caller}: rule must be a Recipe, a dict of path patterns to Recipe or None, or a function of a Site, "
            f"got {type(rule).__name__}."
        )
    return rule


def recipes_of(rule: Checked) -> list[Recipe] | None:
    """Returns the recipes that a rule names, None if it is a function, which may return any."""
    if isinstance(rule, Recipe):
        return [rule]
    return [recipe for _, recipe in rule if recipe is not None] if isinstance(rule, tuple) else None


def _check_recipe(caller: str, what: str, recipe) -> None:
    if not isinstance(recipe, Recipe | None):
        raise TypeError(f"{caller}: {what} must be a Recipe, or None for full precision, got {recipe!r}.")


def assigned(
    caller: str, rule: Checked, sites: Sequence[Site], *, strict: bool, whole: bool = True
) -> list[Recipe | None]:
    """Returns the recipe of each site, or raises what a rule misses.

    Args:
      strict: whether a pattern without a site and a site without a pattern are errors.
      whole: whether the sites are all that the rule is about, so that it must match some of them.
    """
    free = [site for site in sites if site.recipe is None]
    if whole and not free:
        raise ValueError(
            f"{caller}: there is no dot product or convolution {'left ' if sites else ''}to quantize; "
            "remove the rule, or trace a function that has one."
        )
    matched: dict[str, bool] = {}
    missed: list[Site] = []
    recipes: list[Recipe | None] = []
    for site in sites:
        recipe = site.recipe
        if recipe is None:
            recipe = _recipe_of(caller, rule, site, matched, missed)
            if recipe is not None and not recipe.is_empty and site.fixed:
                raise ValueError(
                    f"{caller}: {named(site)} cannot be quantized: {site.fixed}. "
                    "To leave it in full precision give its path None, before the patterns that match it."
                )
            if recipe is not None and recipe.history is not None and site.unsteady:
                raise ValueError(
                    f"{caller}: the recipe of {named(site)} has delayed scaling, and it is inside a {site.unsteady}, "
                    "which may run it otherwise than once a step; take a recipe with current scaling for its path."
                )
        recipes.append(recipe)
    paths = sorted({site.path for site in free})
    if isinstance(rule, tuple) and whole:
        unmatched = [pattern for pattern, _ in rule if pattern not in matched]
        if unmatched and (strict or not matched):
            near = difflib.get_close_matches(unmatched[0], paths, n=3, cutoff=0.0)
            raise ValueError(
                f"{caller}: pattern {unmatched[0]!r} matches no site; the nearest paths are "
                f"{', '.join(map(repr, near))}. A pattern must match a whole path that no earlier one matches."
            )
    if strict and missed:
        listed = "\n".join(f"  {named(site)}" for site in missed[:10]) + ("\n  ..." if len(missed) > 10 else "")
        raise ValueError(
            f"{caller}: the rule says nothing of {len(missed)} of {len(free)} sites:\n{listed}\n"
            'Add a pattern with None to leave them in full precision (".*": None at the end), or pass strict=False.'
        )
    return recipes


def _recipe_of(caller: str, rule: Checked, site: Site, matched: dict[str, bool], missed: list[Site]) -> Recipe | None:
    if isinstance(rule, Recipe):
        return rule
    if isinstance(rule, tuple):
        for pattern, recipe in rule:
            if re.fullmatch(pattern, site.path):
                matched[pattern] = True
                return recipe
        missed.append(site)
        return None
    recipe = rule(site)
    _check_recipe(caller, f"what the rule returns for {site.path!r}", recipe)
    return recipe


def named(site: Site) -> str:
    """Returns a site as messages write it."""
    shapes = f"{list(site.lhs.shape)} x {list(site.rhs.shape)}"
    return f"{site.path!r} ({site.operation} {shapes}, {site.source})"
