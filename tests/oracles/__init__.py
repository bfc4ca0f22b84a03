"""Independent truth for the tests: nothing in here imports jhessians or converters.

`checkpoints` writes small models, tokenizers and corpora; `bergson` runs the real torch bergson;
`capture` records what every linear saw, in torch; `kfac_numpy` states the formulas in numpy.
"""
