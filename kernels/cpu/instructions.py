"""Instructions of compiled programs: rows of 64-bit numbers, and what stands where in them.

Every operand is an address. `A_STEP` and `OUT_STEP` are the bytes from one thread's copy of the
operand to the next thread's, where each thread has its own. `BY_UNITS` marks work that is divided
by row and head of keys, so that a thread reads only what it wrote itself. The numbers from `OWN` on
depend on the kind; the last of them is a double.
"""

(
    LOOK_UP,
    NORM,
    MATMUL,
    ROTATE,
    WRITE_CACHE,
    ATTEND,
    ADD,
    GATE,
    COPY_ROWS,
    LOOK_THROUGH,
    JOIN,
) = range(11)

_PLACES = range(0, 8 * 26, 8)
KIND, MEET, LOGIT_SIDE, BY_UNITS, A, B, C, OUT, A_STEP, OUT_STEP = _PLACES[:10]
OWN = _PLACES[10]
OWN_WORDS = 8
NUMBER = OWN + 8 * (OWN_WORDS - 1)
FIRST, SECOND = _PLACES[18], _PLACES[22]
"""Where a product's weights are described; the second is the one that is gated with."""
FIELDS = 26

# Of a weight's description.
WEIGHT, FUNCTIONS, TILE_BYTES, SUMS = (8 * place for place in range(4))
ROUNDED = -1
"""In the place of the columns whose sums of x a weight needs: it needs rows of x as records."""

# Of products.
COLUMNS, WIDTH, TILES = (OWN + 8 * place for place in range(3))

# Where the numbers and addresses that describe a step lie. It may be followed by others, `STEPS` in
# all.
(
    STEP_ROWS,
    POSITIONS,
    SEQUENCE,
    TABLES,
    TABLE_STRIDE,
    LOGIT_ROWS,
    LOGITS,
    TOKENS,
    RUNS,
    RUN_COUNT,
    FEW,
    STEPS,
    SAMPLING,
    PARTS,
    PICKED,
    CHOSEN,
    BEST_IDS,
    BEST,
    BEST_COUNT,
) = (8 * place for place in range(19))
STEP_WORDS = 19

# How a row of logits is sampled, at SAMPLING: numbers, and addresses of lists with their lengths.
# The first six are doubles.
(
    TEMPERATURE,
    TOP_P,
    MIN_P,
    REPEAT_PENALTY,
    PRESENCE_PENALTY,
    FREQUENCY_PENALTY,
    TOP_K,
    LOGPROBS,
    SEED,
    STREAM,
    POSITION,
    BIASED,
    BIAS_IDS,
    BIAS_VALUES,
    SEEN,
    SEEN_IDS,
    SEEN_COUNTS,
) = (8 * place for place in range(17))
SAMPLING_FIELDS = 17

FEW_ROWS = 16
"""Rows up to which the program for few rows runs: threads write whole operands of their own."""
