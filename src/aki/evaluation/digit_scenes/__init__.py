"""DigitScenes as an lmms-eval task."""
