"""The Triton backend: kernels (maths, scalars, rules, kernels), and what feeds them (parameters, plan, launch).

Imported only where Triton is there; fusedreg/backends/triton.py asks.
"""
