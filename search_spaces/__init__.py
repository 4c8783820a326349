"""Search spaces: what an agent's point means as a policy. One file a space, beside the protocol that all follow."""

if not __name__.startswith("autoprune."):
    raise ModuleNotFoundError(
        f"'{__name__}' is not a package of its own: install autoprune and write `import autoprune.search_spaces`",
        name=__name__,
    )

__all__: list[str] = []
