"""Tools for kernel developers: the tuner of launch configurations and the report of what the kernels compile to.

Commands: ``python -m fastbert_kernels.tuning.report`` and ``python -m fastbert_kernels.tuning.tune``.
"""
