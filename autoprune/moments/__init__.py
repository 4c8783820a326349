"""What layers read, in second moments, and the least squares that follow from them. Nothing here changes a network."""

from autoprune.moments.influence import influences
from autoprune.moments.reading import Picks, Use, Watch
from autoprune.moments.store import LayerMoments, Moments, readers_of

__all__ = ["LayerMoments", "Moments", "Picks", "Use", "Watch", "influences", "readers_of"]
