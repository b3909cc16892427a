"""The table of the README's "Which models"; `python tests/which_models.py` prints it."""

from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache
from tiny_architectures import NOT_TRIED, architectures, tiny_architecture

from runner.engine.layer_kinds import REFUSED


def held() -> list[str]:
    """The architectures that are not refused: the laws are tested for each of them."""
    return [name for name in architectures() if name not in REFUSED]


def keeps_a_state(name: str) -> bool:
    """Whether any layer keeps a recurrent or convolutional state."""
    caches = make_prompt_cache(tiny_architecture(name))
    lists = [cache.caches if isinstance(cache, CacheList) else [cache] for cache in caches]
    return any(isinstance(part, ArraysCache) for parts in lists for part in parts)


def render() -> str:
    """The table as Markdown."""
    recurrent = [name for name in held() if keeps_a_state(name)]
    attention = [name for name in held() if name not in recurrent]
    rows = [
        ("attention: full, sliding or latent", _listed(attention)),
        ("a recurrent or convolutional state, alone or beside attention", _listed(recurrent)),
        ("refused at load", _explained(REFUSED)),
        ("not tried", _explained(NOT_TRIED)),
    ]
    lines = [f"| {what} | {names} |" for what, names in rows]
    return "\n".join(["| what layers keep | mlx-lm's modules |", "|---|---|", *lines])


def _listed(names: list[str]) -> str:
    return ", ".join(sorted(names, key=str.lower))


def _explained(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name} ({reason})" for name, reason in sorted(reasons.items()))


if __name__ == "__main__":
    print(render())
