"""What compiled steps read: a step's own fields, and the frame that all steps of a walk share.

Both are arrays of int64, read by address; names here are byte offsets. Field 0 of a step is the
address of its function.
"""

from __future__ import annotations

from numba import types

STEP_FIELDS = 40
STEP_BYTES = 8 * STEP_FIELDS

#: (step, frame, thread) → None, all int64.
STEP_SIGNATURE = types.void(*[types.int64] * 3)

#: The team: how many threads walk; a counter that each raises as it finishes a step; the address of
#: counters, one per step, to share out work by; the address of a function that lets others run.
THREADS, BARRIER, COUNTERS, YIELD = 0, 8, 16, 24
TEAM_FIELDS = 4

#: The pass: how many positions and the first of them; the addresses of their token ids (int64), of
#: the cache (per slot the addresses of keys and values, or of a state) with its capacity, of the
#: rotary tables (per rope the addresses of cosines and sines, f32 [position, pairs]); scratch
#: memory with its bytes per thread.
N, START, TOKENS, KV, CAPACITY, ROPES, SCRATCH, SCRATCH_BYTES = (8 * i for i in range(4, 12))

#: Then the buffers, two fields each: address and bytes per row. Steps name a buffer by the offset
#: of its fields.
BUFFERS = 8 * 16
BUFFER, BUFFER_ROW = 0, 8
BUFFER_FIELDS = 2
