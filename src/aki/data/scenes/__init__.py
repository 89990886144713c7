"""Scenes of real things: photographs and drawings with names, and plates with words, on a ground of 192 x 192 pixels.

`things` reads the pictures and their names, `scene` puts them at places, `questions` asks, `captions` tells, and
`source` is what a recipe names as `kind: scenes`.
"""

from aki.data.scenes.source import Scenes

__all__ = ["Scenes"]
