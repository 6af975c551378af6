"""What a program would need and how fast it would run, on devices that need not be there: `python -m bitdance_jax.plan CONFIG`.

The real program is compiled by the real compiler for a mesh of the real chips (`programs`, `devices`); its text is read (`hlo`), every
instruction's cost found (`cost`, `flops`, `collectives`), and those added up to a roofline (`estimate`) and searched for waste (`waste`).
"""
