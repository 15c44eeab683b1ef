"""The fallback's bytes, computed with MLX: on Metal, CUDA or the CPU, wherever MLX runs.

``mlxedge.fallback`` defines every encoding; this package holds itself to those bytes. What could
change them, and what stands against it:

* *The order of sums.* Blocks are laid out ``[position, block]`` and summed position by position,
  as C does. No float reduction of MLX is used but minimum and maximum. Integer sums are exact.
* *Contraction of a product and a sum into one rounding.* Operations that are not compiled are
  kernels of their own, which leave nothing to contract. Stages that ``mx.compile`` fuses (the
  K-quant searches, on GPUs) pass each product that meets a sum through a factor that is 1 at run
  time; see ``k_search``. The tests fuse them with a C++ compiler that contracts.
* *Division and square root.* IEEE-exact on CPUs and CUDA. MLX builds its Metal kernels without
  fast math, and fused ones in Metal's safe math mode; both then round correctly.
* *Rounding and conversion.* ``nearest_int``, casts between float types, and small-float codes are
  computed on bit patterns. ``mx.round`` (affine codes) rounds ties to even on all devices.
* *Ties.* Where two weights have the largest magnitude, C takes the first; so does ``mx.argmax``.
* *f32 subnormals.* CPUs and CUDA keep them; a Metal GPU may flush them to zero. The K-quant
  searches multiply up to three weights, so this can reach sub-blocks with no weight above about
  10⁻¹⁰, whose scale is then stored as 0: their codes may differ, what they decode to does not.
  Elsewhere it can reach only groups with no weight above about 10⁻³⁶.

Tested for equal bytes with MLX on x86-64 Linux CPUs, eager and compiled. Not run on Metal or CUDA:
there the above is by design, from MLX's source (0.32) and Metal's specification.

MLX is imported here and nowhere else in mlxedge; its default device is used and never changed.
"""

from __future__ import annotations

from mlxedge.accel.backend import MlxOps

OPS = MlxOps()
