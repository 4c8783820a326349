"""Agents: what proposes policies. One file an agent, beside the protocol that all follow; names are in the registry."""

if not __name__.startswith("autoprune."):
    raise ModuleNotFoundError(
        f"'{__name__}' is not a package of its own: install autoprune and write `import autoprune.agents`",
        name=__name__,
    )

__all__: list[str] = []
