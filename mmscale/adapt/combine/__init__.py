"""Making the most of several models: averaged weights, ensembles of scores, distillation, and 8-bit weights."""
