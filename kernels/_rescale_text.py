"""The bodies of dyadic rescale in ONNX operators, with the bounds that keep every value inside its type."""

# M <= 1, c + w <= 30: x is clipped to the accumulators that the output tells apart, so nothing is left to saturate. half - 1 =
# 2^(c-1) - 1; room above and below zero <= 2^w - 1, so top and bottom < 2^(c+w) <= 2^30. |x| beyond `most` saturates: most * b >
# room 2^c - half, as b <= 2^c, so most rounds to the end itself. product + lift lies in 0 .. 2^(c+w): it is computed modulo 2^32.
_ENDS = """
    one = Constant <value = uint32 {1}> ()
    one_i = Constant <value = int32 {1}> ()
    two_i = Constant <value = int32 {2}> ()
    unit = BitShift <direction = "LEFT"> (one, c)
    unit_i = Cast <to = 6> (unit)
    half = Div (unit_i, two_i)
    below = Sub (half, one_i)
    above_zero = Sub (high_, zero)
    above_units = Mul (above_zero, unit_i)
    top = Add (above_units, below)
    most_sum = Div (top, b)
    under_zero = Sub (zero, low_)
    under_units = Mul (under_zero, unit_i)
    bottom = Add (under_units, below)
    least_size = Div (bottom, b)
    least_sum = Neg (least_size)
    b_u = Cast <to = 12> (b)
    lift_sum = Cast <to = 12> (bottom)
"""
# |most|, |least| < 2^30 and |bias| <= 2^30.
_BIAS = """
    most = Sub (most_sum, bias)
    least = Sub (least_sum, bias)
    bias_u = Cast <to = 12> (bias)
    bias_product = Mul (bias_u, b_u)
    lift = Add (lift_sum, bias_product)
"""
_NO_BIAS = """
    most = Identity (most_sum)
    least = Identity (least_sum)
    lift = Identity (lift_sum)
"""
_PRODUCT = """
    near_least = Max (x, least)
    near = Min (near_least, most)
    near_u = Cast <to = 12> (near)
    product = Mul (near_u, b_u)
    raised = Add (product, lift)
"""
# bit: bit c of `raised`, moved to the highest place (a product is half as expensive as a shift there) and back. At a tie raised =
# (floor + 1) 2^c - 1, anywhere else adding 1 or 0 does not reach bit c. zero - low even: floor is odd where the floor of the
# quotient is, so adding the bit rounds to even; odd: adding what it lacks.
_BIT = """
    highest = Constant <value = uint32 {31}> ()
    to_highest = Sub (highest, c)
    by = BitShift <direction = "LEFT"> (one, to_highest)
    moved = Mul (raised, by)
    bit = BitShift <direction = "RIGHT"> (moved, highest)
"""
_EVEN = f"""{_BIT}
    rounded = Add (raised, bit)
"""
_ODD = f"""{_BIT}
    less = Sub (raised, bit)
    rounded = Add (less, one)
"""
_UNTIED = "rounded = Identity (raised)"
_UNSIGNED = """
    steps = BitShift <direction = "RIGHT"> (rounded, c)
    y = Cast <to : int = @to> (steps)
"""
_SIGNED = """
    steps = BitShift <direction = "RIGHT"> (rounded, c)
    steps_i = Cast <to = 6> (steps)
    placed = Add (steps_i, low_)
    y = Cast <to : int = @to> (placed)
"""
# span = 2^w - 1; end = 2^(c+w) <= 2^30, twice that is `raise` without below = 2^(c-1) - 1. b <= 2^(c+w) and b <= 2^25, so
# |product| < end + b < 2^31 and raised <= 3 * 2^30 + 2^25 + 2^21 < 2^32, computed modulo 2^32 in uint32: exact. Its bit c,
# moved to the highest place and back, is `odd`; signed < 2^(w+2).
STEEP = """
    one = Constant <value = uint32 {1}> ()
    one_i = Constant <value = int32 {1}> ()
    highest_bit = Constant <value = uint32 {31}> ()
    span = Sub (high_, low_)
    reach = Add (span, one_i)
    k = Add (reach, reach)
    unit = BitShift <direction = "LEFT"> (one, c)
    unit_i = Cast <to = 6> (unit)
    end = Mul (unit_i, reach)
    end_b = Add (end, b)
    up = Sub (end_b, one_i)
    limit = Div (up, b)
    floor = Neg (limit)
    end_u = Cast <to = 12> (end)
    lift = Add (end_u, end_u)
    half = BitShift <direction = "RIGHT"> (unit, one)
    below = Sub (half, one)
    raise = Add (lift, below)
    to_highest = Sub (highest_bit, c)
    back = Sub (zero, k)
    near_low = Max (x, floor)
    near = Min (near_low, limit)
    product = Mul (near, b)
    product_u = Cast <to = 12> (product)
    raised = Add (product_u, raise)
    top = BitShift <direction = "LEFT"> (raised, to_highest)
    odd = BitShift <direction = "RIGHT"> (top, highest_bit)
    even = Add (raised, odd)
    shifted = BitShift <direction = "RIGHT"> (even, c)
    signed = Cast <to = 6> (shifted)
    moved = Add (signed, back)
"""
# below = 2^(c-1) - 1; c >= 1 here. x_u: two's complement; (v ^ ones) + minus negates v where minus = 1. size <= 2^31, b < 2^25
# (2b where c was 0).
# p00 < 2^32, p01 <= 2^16 2^9, p10 <= 2^15 2^16, p11 <= 2^15 2^9; middle < 2^16 + 2^25 + 2^31 < 2^32; the left shift drops what
# `top` has. size * b < 2^(c+w) + b, so whole < 2^31 + 2^24 and top << (32-c) loses nothing; rest < 2^c <= 2^31, rest + odd +
# below < 2^31 + 2^30.
WIDE = """
    one = Constant <value = uint32 {1}> ()
    less = Sub (c, one)
    half = BitShift <direction = "LEFT"> (one, less)
    below = Sub (half, one)
    sixteen = Constant <value = uint32 {16}> ()
    thirty_one = Constant <value = uint32 {31}> ()
    thirty_two = Constant <value = uint32 {32}> ()
    low_half = Constant <value = uint32 {65535}> ()
    none = Constant <value = uint32 {0}> ()
    largest = Constant <value = uint32 {2147483647}> ()
    x_u = Cast <to = 12> (x)
    minus = BitShift <direction = "RIGHT"> (x_u, thirty_one)
    ones = Sub (none, minus)
    turned = BitwiseXor (x_u, ones)
    magnitude = Add (turned, minus)
    size = Min (magnitude, limit)
    b1 = BitShift <direction = "RIGHT"> (b, sixteen)
    b0 = BitwiseAnd (b, low_half)
    m1 = BitShift <direction = "RIGHT"> (size, sixteen)
    m0 = BitwiseAnd (size, low_half)
    p00 = Mul (m0, b0)
    p01 = Mul (m0, b1)
    p10 = Mul (m1, b0)
    p11 = Mul (m1, b1)
    carried = BitShift <direction = "RIGHT"> (p00, sixteen)
    cross = Add (p01, p10)
    middle = Add (carried, cross)
    upper = BitShift <direction = "RIGHT"> (middle, sixteen)
    top = Add (p11, upper)
    lower = BitShift <direction = "LEFT"> (middle, sixteen)
    last = BitwiseAnd (p00, low_half)
    bottom = Add (lower, last)
    left = Sub (thirty_two, c)
    from_top = BitShift <direction = "LEFT"> (top, left)
    from_bottom = BitShift <direction = "RIGHT"> (bottom, c)
    whole = Add (from_top, from_bottom)
    unit = BitShift <direction = "LEFT"> (one, c)
    mask = Sub (unit, one)
    rest = BitwiseAnd (bottom, mask)
    odd = BitwiseAnd (whole, one)
    rest_more = Add (rest, below)
    biased = Add (rest_more, odd)
    up = BitShift <direction = "RIGHT"> (biased, c)
    rounded = Add (whole, up)
    most = Add (largest, minus)
    saturated = Min (rounded, most)
    turned_back = BitwiseXor (saturated, ones)
    signed_u = Add (turned_back, minus)
    signed = Cast <to = 6> (signed_u)
    moved = Add (signed, zero)
"""


def lean_body(*, biased: bool, rounding: str, signed: bool) -> str:
    """The lines that make `y` of `x`, b, c, zero (and bias); rounding: "" for an even zero - low, "Odd", "Untied" for no ties."""
    rounded = {"": _EVEN, "Odd": _ODD, "Untied": _UNTIED}[rounding]
    return _ENDS + (_BIAS if biased else _NO_BIAS) + _PRODUCT + rounded + (_SIGNED if signed else _UNSIGNED)
