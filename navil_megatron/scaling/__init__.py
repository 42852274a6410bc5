"""The study of encoder sizes: loss laws, the paper's 1% rule, recommended encoders, sweeps to buy, and pictures.

Arithmetic on the results of runs; trains nothing and needs no GPU.
"""
