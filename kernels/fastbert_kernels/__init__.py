"""Triton kernels for a BERT encoder on packed tokens, one function per fused op.

`fastbert.ops` looks up its ops here by name and runs eager PyTorch for every name that is missing.
"""
