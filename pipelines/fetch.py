"""``fetch`` for scripts: what the stage of that name does."""

from pipelines.stages.fetch import fetch

__all__ = ["fetch"]
