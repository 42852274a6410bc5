"""What a run takes before it starts: parameters, memory, FLOPs, traffic, the pipeline's idle time, and which layout is
best. Arithmetic on a config; builds no model and needs no GPU.
"""
