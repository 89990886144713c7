"""Scenes of real things: photographs and drawings with names, and plates with words, on a ground of 192 x 192 pixels.

`things` reads the pictures and their names, `scene` puts them at places, `questions` asks and tells; a recipe names
them as `kind: scenes` (`aki.data.sources.scenes`).
"""
