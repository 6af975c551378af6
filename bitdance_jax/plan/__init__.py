"""The cost of a training or sampling program, on devices that need not be there.

`programs` has the real programs, which `analysis` compiles with the real compiler for a mesh of
`devices`. `hlo` parses the compiled text; `cost`, `hlo_flops` and `collectives` give the cost of
every instruction; `estimate` sums the costs into a roofline; `findings` lists what takes longest
and what may be wasted.
"""
