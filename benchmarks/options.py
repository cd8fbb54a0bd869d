"""Command lines of benchmarks that run other programs: a few options of their own, and the others' options."""

from collections.abc import Mapping, Sequence

from dsv3_jax.command_line import option_pairs


def own_and_other_options(argv: Sequence[str], defaults: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The options that have a default here, with their values, and all others as they are handed on.

    Raises:
        ArgumentError: a word that belongs to no option.
    """
    own, others = dict(defaults), []
    for name, value in option_pairs(argv):
        if name in own and value:
            own[name] = value
        else:
            others.append(f"--{name}={value}")
    return own, others
