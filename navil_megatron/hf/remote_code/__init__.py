"""Files copied into every exported folder: NaViL in plain torch and transformers, on a single device.

They import only torch, transformers, numpy and Pillow, and each other by relative imports, because transformers
loads them from the folder. They are also the parity reference of the training side.
"""
