"""What measures and inspects the kernels: the tuner and the report of what they compile to, apart from the operations.

``python -m fastbert_kernels.tuning.report`` and ``python -m fastbert_kernels.tuning.tune`` are its commands.
"""
