"""The bodies of i-LayerNorm and RMSNorm in ONNX operators, with the bounds that keep every value inside its type."""


def _divided(row: str, high: str, low: str) -> str:
    """The lines that divide a row and its ends by the least k that brings them to W bits."""
    return f"""
    beyond = Sub (minus_one, {low})
    farthest = Max ({high}, beyond)
    k_less = Div (farthest, room_)
    k = Add (k_less, one)
    u = Div ({row}, k)
    high_u = Div ({high}, k)
    low_u = Div ({low}, k)
"""


# The comments give what is true of each value, for any int32 x in the wide forms and |x| <= 2^(W-1) in the others.
LITERALS = """
    axis = Constant <value_ints = [-1]> ()
    one = Constant <value = int32 {1}> ()
    two = Constant <value = int32 {2}> ()
    minus_one = Constant <value = int32 {-1}> ()
    epsilon_unit = Constant <value_int = 16777216> ()
"""
ENDS = """
    high = ReduceMax <keepdims = 1> (x, axis)
    low = ReduceMin <keepdims = 1> (x, axis)
"""
# Within half a unit of the middle of the row: |u| <= (high - low)/2 + 1/2, and high - low < 2^W.
CENTRE = """
    ends = Add (high, low)
    centre = Div (ends, two)
    u = Sub (x, centre)
    high_u = Sub (high, centre)
    low_u = Sub (low, centre)
"""
# ceil((high + low)/2), or one more: so high - centre <= 2^31 - 1 and low - centre >= -2^31, nothing wraps. reach = max(above,
# -1 - below) >= |off| - 1 and < k 2^(W-1), so |off| <= k 2^(W-1) and |u| <= 2^(W-1). k >= 1.
WIDE_CENTRE = """
    high_long = Cast <to = 7> (high)
    low_long = Cast <to = 7> (low)
    one_wide = Constant <value_int = 1> ()
    two_wide = Constant <value_int = 2> ()
    ends = Add (high_long, low_long)
    ends_up = Add (ends, one_wide)
    centre_wide = Div (ends_up, two_wide)
    centre = Cast <to = 6> (centre_wide)
    off = Sub (x, centre)
    above = Sub (high, centre)
    below = Sub (low, centre)
""" + _divided("off", "above", "below")
SIZE = """
    u = Identity (x)
    high_u = Identity (high)
    low_u = Identity (low)
"""
WIDE_SIZE = _divided("x", "high", "low")
# |total| <= d 2^(W-1). top - total and total - bottom are at most d (high_u - low_u) <= d 2^W <= A, and their sum is d (high_u
# - low_u): so largest >= d (high_u - low_u)/2, and |u| <= (high_u - low_u)/2 + 1 gives |u d f|, |total f| <= (largest + d) f <=
# 2 A < 2^30. d f <= A. start <= 2^29 + R + unit/2 + 2^30. shifted = deviation f + R unit + unit/2 lies in [0, 2^30 + R + unit],
# as R unit > A.
DEVIATION = """
    count_shape = Shape <start = 0, end = 1> (ones)
    d = Cast <to = 6> (count_shape)
    total = MatMul (u, ones)
    top = Mul (high_u, d)
    bottom = Mul (low_u, d)
    above_mean = Sub (top, total)
    below_mean = Sub (total, bottom)
    largest = Max (above_mean, below_mean, d)
"""
SCALED_DEVIATION = """
    by = Mul (f, d)
    mean = Mul (total, f)
    start = Sub (offset_, mean)
    scaled = Mul (u, by)
    shifted = Add (scaled, start)
"""
# |u| <= 2^28, |u f| <= A.
MAGNITUDE = """
    opposite = Neg (low_u)
    largest = Max (high_u, opposite, one)
"""
SCALED_MAGNITUDE = """
    scaled = Mul (u, f)
    shifted = Add (scaled, offset_)
"""
# The factor that brings a row's largest deviation to A, and its steps of e.
FACTOR = """
    room_for = Constant <value = int32 {536870911}> ()
    f_most = Div (room_for, largest)
    f = Min (f_most, cap_)
"""
STEPS = """
    steps = Div (shifted, unit_)
    e = Sub (steps, reach_)
"""
# |e| <= R; d R^2 < 2^31.
SHORT_SQUARES = """
    square = Mul (e, e)
    squares = MatMul (square, ones)
    sum = Cast <to = 7> (squares)
"""
# e^2 <= 2^28, so both limbs are at most 2^14, and their sums at most d 2^14 <= 2^28.
FINE_SQUARES = """
    square = Mul (e, e)
    limb = Constant <value = int32 {16384}> ()
    limb_mask = Constant <value = int32 {16383}> ()
    upper = Div (square, limb)
    lower = BitwiseAnd (square, limb_mask)
    uppers = MatMul (upper, ones)
    lowers = MatMul (lower, ones)
    uppers_wide = Cast <to = 7> (uppers)
    lowers_wide = Cast <to = 7> (lowers)
    limb_wide = Cast <to = 7> (limb)
    raised = Mul (uppers_wide, limb_wide)
    sum = Add (raised, lowers_wide)
"""
WIDE_DIVISOR = """
    k_wide = Cast <to = 7> (k)
    divisor = Mul (k_wide, epsilon_unit)
"""
# P f < 2^30 + 1 (cap), in 24 bits of fraction below 2^55. longer * sum <= 4^j d R^2 <= 2^52, g^2 <= 2^60 + 2^32.
SIGMA = """
    f_wide = Cast <to = 7> (f)
    g_fraction = Mul (f_wide, epsilon_)
    g = Div (g_fraction, divisor)
    g_square = Mul (g, g)
    sum_longer = Mul (sum, longer_)
    v = Add (sum_longer, g_square)
"""
# root < 2^31, ratio <= 2^23: below 2^54, and ratio_unit >= 2^5. s in 1..4 N; a larger one gives |e G / s| < 1/4 either way.
# |e G| <= N; fractions <= s; count s in (N, N + s]; numerator in [0, 2 N + 2 s] and 2 N + 8 N < 2^31.
TAIL = """
    s_fraction = Mul (root, ratio_)
    half_wide = Constant <value_int = 2> ()
    ratio_half = Div (ratio_unit_, half_wide)
    s_raised = Add (s_fraction, ratio_half)
    s_any = Div (s_raised, ratio_unit_)
    s_most = Constant <value_int = 858993456> ()
    s_fits = Less (s_any, s_most)
    s_long = Where (s_fits, s_any, s_most)
    s_or_none = Cast <to = 6> (s_long)
    s = Max (s_or_none, one)
    bound = Constant <value = int32 {214748364}> ()
    count_less = Div (bound, s)
    count = Add (count_less, one)
    lift = Mul (count, s)
    fractions_of = Constant <value = int32 {32}> ()
    part = Div (s, fractions_of)
    normalised = Mul (e, gamma)
    fractions = Mul (part, fraction)
    lifted = Add (fractions, lift)
    numerator = Add (normalised, lifted)
    quotient = Div (numerator, s)
    signed = Sub (quotient, count)
    moved = Add (signed, beta)
    clipped = Clip (moved, low_, high_)
    y = Cast <to : int = @to> (clipped)
"""
