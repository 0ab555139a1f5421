"""The typed, documented faces of the native ops, one module per op folder of csrc; no logic of their own.

- ``runtime.ops.norm``: ``rms_norm``, ``prepare_rows``
- ``runtime.ops.activation``: ``gated_activation``
- ``runtime.ops.embedding``: ``embedding``, ``gpu_embedding_table``, ``gather_rows``
- ``runtime.ops.sampling``: ``sample_token``, ``sampling_distribution``, ``philox4x32_10``, ``GpuSampler``, ``score_gpu``,
  ``soft_cap_gpu``

Arrays are anything that speaks DLPack, the buffer protocol or ``__array_interface__`` (NumPy with ml_dtypes' bfloat16,
PyTorch on the CPU); none is copied and outputs are written in place. A wrong type raises TypeError, a wrong shape,
layout or value ValueError; both name the argument, what came and what was wanted.
"""
