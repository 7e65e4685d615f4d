"""The kernels of a training step: for each concept an eager twin in torch, and the fused one in Triton beside it.

`<concept>.py` runs anywhere; `<concept>_triton.py` holds the same functions with the same signatures and is the only
kind of file that imports triton. Weights are latent-major here, `(d_sae, d_in)` and `(d_sae, d_out)`, so that a latent
is a stretch of memory. The Triton set never waits for the device: shapes do not depend on the data, and what overflows
its capacity is counted there. Some of the twins do wait.
"""
