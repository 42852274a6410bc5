"""How close is equal: the one table of tolerances. No test loosens or repeats an entry; a new need is a new entry."""

GOLDEN = {"atol": 2e-4, "rtol": 1e-4}
"""Activations, logits and losses against the golden files (fp32, another implementation's order of sums)."""

GOLDEN_GRADIENT = {"atol": 5e-5, "rtol": 2e-3}
"""Gradients against the golden files."""

RANKS = {"rtol": 1e-5, "atol": 1e-6}
"""Any layout against one rank (fp32): only the order of sums differs."""

RANKS_ON_GPUS = {"rtol": 1e-4, "atol": 1e-5}
"""The same on GPUs (fp32 without TF32), where split products also run by other kernels. Chosen without data."""

EXPORT = {"rtol": 0.0, "atol": 1e-4}
"""Mean held-out loss of the exported folder under transformers against the engine's (fp32, the same weights)."""

RESTORED = {"rtol": 1e-6, "atol": 1e-6}
"""Losses and weights after a restore at another layout against going straight on (fp32)."""

LLM_PEER = {"rtol": 0.0, "atol": 1e-4}
"""Text-only logits against transformers' own model of the LLM that a start came from (fp32, weights of std 0.2)."""

DALI_PIXELS = 2
"""Steps of 255 between a patch decoded and resized by DALI and torch and the reference's: each rounds on its own."""

BF16_LOGITS = 0.05
"""Relative L2 distance of the bf16 logits of a tiny random model from its fp32 logits: each value is rounded to 2^-9
some hundred times on its way, and roundings add up as their square root."""

BF16_CHUNKS = 2**-7
"""Relative L2 distance of a bf16 gradient summed in chunks from the same in one GEMM: parts, which may be larger than
their sum, the sum and the GEMM's own result are rounded once, to 2^-9 each."""

BF16_ONCE = {"rtol": 2**-7, "atol": 1e-6}
"""A number that is rounded to bf16 once, or cut off, which is up to twice as far."""

ONE_CHUNK = 1.05
"""Peak memory of the chunked loss, grown with the vocabulary, as a multiple of what one chunk's logits grew by."""

LINEAR_MEMORY = 0.01
"""Relative deviation of the activation bytes from a multiple of the tokens: ends of index lists."""

BF16_KERNELS = 0.05
"""Relative L2 distance of one kernel library's outputs and gradients from another's in bf16, and of a loss: as
``BF16_LOGITS``, since each side rounds on its own way."""

BF16_ROUTED = 0.15
"""The same of gradients where rounding may send a token to another expert."""

FP8_ROUNDING = 0.06
"""Relative L2 distance of an FP8 product from FP32's: each factor is rounded to 2^-4 of itself (E4M3; 2^-3 in E5M2's
gradients), evenly, so to about 2^-5.8 (2^-4.8) on average."""

FUSED_ADAM = {"rtol": 1e-5, "atol": 1e-7}
"""Transformer Engine's AdamW against ours (fp32): the same formula in another order."""

FP8_GRADIENTS = 0.25
"""Relative L2 distance of a step's gradients in FP8 from BF16's: every product adds ``FP8_ROUNDING``, and those of all
layers there and back add up as their square root."""

FP8_LOSS = 0.01
"""Mean loss of some steps in FP8 against BF16's, relative."""

ACTIVATION_BYTES = 0.10
"""Relative distance of the planned activation memory from the bytes that autograd holds at tiny sizes."""

ACTIVATION_BYTES_ON_GPU = 0.05
"""The same against what a GPU allocates."""

PLANNED_PEAK = 0.05
"""Relative distance of a rank's planned peak memory from what the tensors of a whole step hold."""

PLANNED_FLOPS = 0.02
"""The same of FLOPs: where visual tokens pass one matrix more, tensor-parallel ranks share them unevenly."""

CAPTION_SCORE = 1e-6
"""Relative distance of BLEU by two libraries: one adds 1e-9 and 1e-15 to its counts to keep from dividing by zero."""
