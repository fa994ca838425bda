"""Why a model answers so: where it looked, which words mattered, and which training examples are nearest."""
