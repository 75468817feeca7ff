"""Every rule, the tree sum and every extrapolation again, in NumPy, to be read beside the papers.

Nothing here is fast and nothing is shared with the library. The arithmetic follows the dtype of its arrays:
Python floats are double until they meet an array, whose type they then take, which is how the engine derives
its scalars. So `precision="float64"` is the standard to be close to, and `precision=None`, the engine's own
working type, is the one to be equal to, bit for bit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
Hyper = dict[str, Any]

WORKING = {"float32": "float32", "float64": "float64", "bfloat16": "float32", "float16": "float32"}


def tree_sum(terms: Sequence[Array]) -> Array:
    """The sum over the workers: neighbours paired bottom-up, the odd one carried."""
    terms = list(terms)
    while len(terms) > 1:
        pairs = [left + right for left, right in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[2 * len(pairs) :]
    return terms[0]


def tree_mean(terms: Sequence[Array], divisor: float = 1.0) -> Array:
    return tree_sum(terms) * (1.0 / (len(terms) * divisor))


def relative_spread(terms: Sequence[Array], mean: Array) -> Array:
    """The mean of ((g_k - g) / g)^2; infinite where the mean g is zero."""
    total = np.zeros_like(mean)
    with np.errstate(all="ignore"):
        for g in terms:
            away = (g - mean) / mean
            total = total + away * away
    return np.where(mean == 0, mean.dtype.type(np.inf), total * mean.dtype.type(1 / len(terms)))


def grad_norm(grads: Sequence[Sequence[Array | None]], divisor: float = 1.0) -> float:
    """The norm of the mean over the workers of all layers together; None counts as zeros."""
    means = [sum(np.float64(g) for g in of_all if g is not None) for of_all in zip(*grads, strict=True)]
    return math.sqrt(sum(float(np.sum(np.square(m))) for m in means)) / (len(grads) * divisor)


def clip_for(norm: float, max_grad_norm: float | None) -> float:
    """torch.nn.utils.clip_grad_norm_'s coefficient."""
    clip = 1.0 if max_grad_norm in (None, math.inf) else max_grad_norm / (norm + 1e-6)
    return 1.0 if clip > 1 else clip


def rounded(x: Array, dtype: str) -> Array:
    """The values of `x` after storing them as `dtype` (to nearest, ties to even), in the type of `x`."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return x.astype(dtype).astype(x.dtype)
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.where(np.isnan(x), x, bits.astype(np.uint32).view(np.float32)).astype(x.dtype)


# --- rules: (w, mean gradient, slots, number of this step of the layer from 1, hyper) -> (w, slots, factor)
#
# The factor is what a gradient is multiplied with to displace weights in units of the rule's steps.


def sgd(w: Array, g: Array, slots: list[Array], t: int, h: Hyper) -> tuple[Array, list[Array]]:
    """torch.optim.SGD: the buffer holds gradients, lr multiplies at the end."""
    if h["decoupled_weight_decay"]:
        w = w * (1 - h["lr"] * h["weight_decay"])
    elif h["weight_decay"]:
        g = g + h["weight_decay"] * w
    if not h["momentum"]:
        return w - h["lr"] * g, slots, 1
    buf = g if t == 1 else h["momentum"] * slots[0] + (1 - h["dampening"]) * g
    d = g + h["momentum"] * buf if h["nesterov"] else buf
    return w - h["lr"] * d, [buf], 1


def adam(w: Array, g: Array, slots: list[Array], t: int, h: Hyper) -> tuple[Array, list[Array]]:
    """Adam (Kingma & Ba, Algorithm 1); AdamW (Loshchilov & Hutter) with decoupled_weight_decay; and AMSGrad.

    AMSGrad (Reddi, Kale & Kumar, 1904.09237, Algorithm 2), as torch.optim has it: with bias correction, and with the
    largest average before it.
    """
    b1, b2 = h["betas"]
    bc1, bc2 = 1 - b1**t, 1 - b2**t
    if h["decoupled_weight_decay"]:
        w = w * (1 - h["lr"] * h["weight_decay"])
    elif h["weight_decay"]:
        g = g + h["weight_decay"] * w
    m = b1 * slots[0] + (1 - b1) * g
    v = b2 * slots[1] + ((1 - b2) * g) * g
    most = np.maximum(slots[2], v) if h.get("amsgrad") else v
    denominator = np.sqrt(most) * (1 / math.sqrt(bc2)) + h["eps"]
    slots = [m, v, most] if h.get("amsgrad") else [m, v]
    return w - (h["lr"] / bc1) * (m / denominator), slots, 1 / denominator


def square_sum(x: Array, begin: int) -> float:
    """The sum of squares of a layer that begins at this flat element, in the engine's order.

    In double, over cells that end at every 1,024th flat element; then cell after cell.
    """
    return cell_sum(np.square(x.ravel().astype(np.float64)), begin)


def cell_sum(terms: Array, begin: int) -> float:
    total = 0.0
    while terms.size:
        length = min(1024 - begin % 1024, terms.size)
        total += lane_sum(terms[:length], begin)
        terms, begin = terms[length:], begin + length
    return total


def lane_sum(terms: Array, begin: int) -> float:
    """In 16 lanes by flat index, added up by halves."""
    rows = np.zeros((begin % 16 + terms.size + 15) // 16 * 16)
    rows[begin % 16 : begin % 16 + terms.size] = terms
    lanes = np.add.reduce(rows.reshape(-1, 16), axis=0)
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    return float(lanes[0])


def norm(x: Array, begin: int) -> float:
    """Of what begins at this flat element, in one piece."""
    return math.sqrt(lane_sum(np.square(x.ravel().astype(np.float64)), begin))


def lars(w: Array, g: Array, slots: list[Array], t: int, h: Hyper) -> tuple[Array, list[Array]]:
    """LARS (1708.03888), equations 6 and 7, and where others put the trust ratio."""
    w_norm, g_norm = math.sqrt(h["square_sum"](w)), math.sqrt(h["square_sum"](g))
    decay, trust = h["weight_decay"], 1.0
    if h["adapt"] and (h["always_adapt"] or decay) and w_norm and g_norm:
        trust = h["trust_coefficient"] * w_norm / (g_norm + decay * w_norm + h["eps"])
    return trusted_momentum(w, g, slots, held(trust, h), h)


def held(trust: float, h: Hyper) -> float:
    """The trust ratio, at most 1 with trust_clip."""
    return min(trust, 1.0) if h["trust_clip"] else trust


def clars(w: Array, g: Array, slots: list[Array], t: int, h: Hyper) -> tuple[Array, list[Array], Any]:
    """CLARS (2002.01576): the denominator is the mean of the norms of the workers' own decayed gradients."""
    decay, trust = h["weight_decay"], 1.0
    owns = [own + decay * w if decay else own for own in h["own"]]
    mean_norm = 0.0
    for own in owns:
        mean_norm += math.sqrt(h["square_sum"](own)) / len(owns)
    w_norm = math.sqrt(h["square_sum"](w))
    if h["adapt"] and (h["always_adapt"] or decay) and w_norm and mean_norm:
        trust = h["trust_coefficient"] * w_norm / (mean_norm + h["eps"])
    return trusted_momentum(w, g, slots, held(trust, h), h)


def trusted_momentum(w, g, slots, trust, h):
    d = g + h["weight_decay"] * w
    if h["trust_outside"]:
        buf = h["momentum"] * slots[0] + d
        return w - (h["lr"] * trust) * buf, [buf], trust
    if h["trust_in_buffer"]:
        buf = h["momentum"] * slots[0] + trust * d
        return w - h["lr"] * buf, [buf], trust
    buf = h["momentum"] * slots[0] + (h["lr"] * trust) * d
    return w - buf, [buf], trust


def lamb(w: Array, g: Array, slots: list[Array], t: int, h: Hyper) -> tuple[Array, list[Array]]:
    """LAMB (1904.00962), Algorithm 2 with phi the identity."""
    b1, b2 = h["betas"]
    if h["coupled_weight_decay"]:
        g = g + h["weight_decay"] * w
    m = b1 * slots[0] + (1 - b1) * g
    v = b2 * slots[1] + ((1 - b2) * g) * g
    denominator = np.sqrt(v) * (1 / math.sqrt(1 - b2**t)) + h["eps"]
    u = (m * (1 / (1 - b1**t))) / denominator
    if not h["coupled_weight_decay"]:
        u = u + h["weight_decay"] * w
    w_norm, u_norm = math.sqrt(h["square_sum"](w)), math.sqrt(h["square_sum"](u))
    adapts = h["adapt"] and (h["always_adapt"] or h["weight_decay"])
    trust = held(w_norm / u_norm if adapts and w_norm and u_norm else 1.0, h)
    return w - (h["lr"] * trust) * u, [m, v], w.dtype.type(trust) / denominator


def lans(w: Array, g: Array, slots: list[Array], t: int, h: Hyper) -> tuple[Array, list[Array]]:
    """LANS (2006.13484), Algorithm 2."""
    b1, b2 = h["betas"]
    g_norm = math.sqrt(h["square_sum"](g))
    unit = w.dtype.type(1 / (g_norm + h["eps"]) if g_norm else 1.0)
    g = g * unit
    m = b1 * slots[0] + (1 - b1) * g
    v = b2 * slots[1] + ((1 - b2) * g) * g
    d = np.sqrt(v) * (1 / math.sqrt(1 - b2**t)) + h["eps"]
    p = (m * (1 / (1 - b1**t))) / d + h["weight_decay"] * w
    q = g / d + h["weight_decay"] * w
    w_square, p_square, q_square = (h["square_sum"](x) for x in (w, p, q))

    def ratio(square):
        adapts = h["adapt"] and w_square and square
        return math.sqrt(w_square) / math.sqrt(square) if adapts else 1.0

    step = (h["lr"] * b1 * ratio(p_square)) * p + (h["lr"] * (1 - b1) * ratio(q_square)) * q
    return w - step, [m, v], w.dtype.type(float(unit) * ratio(q_square)) / d


def variance_reduced(base, smooth: bool):
    """VRGD (2309.13681): a rule on the gradient times its signal-to-noise ratio; r = 1 / (relative spread)."""

    def update(w, g, slots, t, h):
        r = 1 / (h["spread"] + h["gsnr_eps"])
        last = h["memory"].get("ratio_sum") if h["lagged_mean"] else None
        h["memory"]["ratio_sum"] = cell_sum(r.astype(np.float64).ravel(), h["begin"])
        total = h["memory"]["ratio_sum"] if last is None else last
        most = float(np.finfo(w.dtype).max)
        per_mean = w.dtype.type(min(r.size / total, most) if total > 0 else 1.0)
        ratio = np.clip(r * per_mean, w.dtype.type(h["gsnr_floor"]), 1)
        if not smooth:
            return base(w, ratio * g, slots, t, h)
        *betas, beta3 = h["betas"]
        average = beta3 * slots[0] + (1 - beta3) * ratio
        ratio = average * (1 / (1 - beta3**t))
        w, slots, factor = base(w, ratio * g, slots[1:], t, h | {"betas": betas})
        return w, [average, *slots], factor

    return update


EXP_TAILS = {
    "float32": (0.5, 0.166665763, 0.0416665524, 0.00836323295, 0.00139262504),
    "float64": (
        0.5, 0.16666666666666669, 0.041666666666623824, 0.008333333333330039, 0.0013888888917367081,
        0.00019841269863171557, 2.4801521057868204e-05, 2.7557268276905696e-06, 2.7620201591031547e-07,
        2.5100472505694996e-08,
    ),
}  # fmt: skip
LN2 = {
    "float32": (float.fromhex("0x1.62e4p-1"), float.fromhex("0x1.7f7d1cp-20")),
    "float64": (float.fromhex("0x1.62e42fefa3p-1"), float.fromhex("0x1.3de6af278ece6p-42")),
}


def exp_of(x: Array) -> Array:
    """The library's e^x of moderate numbers."""
    T = x.dtype.type
    k = np.rint(x * T(1.4426950408889634))
    high, low = LN2[x.dtype.name]
    r = (x - k * T(high)) - k * T(low)
    tail = polynomial(r, *EXP_TAILS[x.dtype.name])
    return np.ldexp(1 + (r + r * r * tail), k.astype(int))


def eg(w: Array, g: Array, slots: list[Array], t: int, h: Hyper) -> tuple[Array, list[Array], Any]:
    """Exponentiated gradient (2202.00145) on momentum SGD, with the logarithm of each element's gain."""
    log_gain, mean, step = slots
    g = g + h["weight_decay"] * w
    log_gain = log_gain + np.clip(h["lr_gain"] * (mean * g), -1, 1)
    mean = h["smoothing"] * mean + (1 - h["smoothing"]) * g
    step = h["momentum"] * step + h["lr"] * (exp_of(log_gain) * g)
    scale = w.dtype.type(h["scale"])
    return w - scale * step, [log_gain, mean, step], scale * exp_of(log_gain)


def revised_scale(engine, means) -> float:
    """The scale after this step's agreement of momentum and gradient, over all layers."""
    h, agreement = engine.hyper, 0.0
    for layer, g in enumerate(means):
        if g is not None:
            products = engine.slots[layer][2].astype(np.float64) * (g + h["weight_decay"] * engine.w[layer])
            agreement += cell_sum(products.ravel(), engine.begins[layer])
    return h["scale"] * math.exp(min(max(h["lr_scale"] * agreement, -1.0), 1.0))


def dots(a: Array, b: Array, h: Hyper) -> list[float]:
    """The inner product of every filter with its counterpart, in the engine's order."""
    products = a.astype(np.float64) * b.astype(np.float64)
    return [cell_sum(row.ravel(), h["begin"] + f * row.size) for f, row in enumerate(products)]


def in_order(terms: Sequence[float]) -> float:
    """From left to right, which Python's sum is not always."""
    total = 0.0
    for term in terms:
        total += term
    return total


def turned_view(w: Array, g: Array, h: Hyper) -> str | None:
    """Which view's vectors are all so nearly orthogonal to the gradient that they count as scale-invariant."""
    if w.ndim < 2 or not w.size:
        return None
    ww, gg, wg = dots(w, w, h), dots(g, g, h), dots(w, g, h)
    views = {
        "filter": (ww, gg, wg, w[0].size),
        "layer": ([in_order(ww)], [in_order(gg)], [in_order(wg)], w.size),
    }
    for view, (*products, length) in views.items():
        cosines = [
            abs(xy) / (max(math.sqrt(xx), h["eps"]) * max(math.sqrt(yy), h["eps"])) if xy else 0.0
            for xx, yy, xy in zip(*products, strict=True)
        ]
        if all(cosine < h["delta"] / math.sqrt(length) for cosine in cosines):
            return view
    return None


def projected(w: Array, g: Array, p: Array, h: Hyper) -> tuple[Array, float]:
    """The update without its part along scale-invariant weights, and what they take of the decay."""
    view = turned_view(w, g, h)
    if view is None:
        return p, 1.0
    ww, wp = dots(w, w, h), dots(w, p, h)
    if view == "layer":
        ww, wp = [in_order(ww)] * len(w), [in_order(wp)] * len(w)
    lengths = [math.sqrt(xx) + h["eps"] for xx in ww]
    along = [xy / (x * x) if xx else 0.0 for xx, xy, x in zip(ww, wp, lengths, strict=True)]
    column = np.array(along, w.dtype).reshape(-1, *[1] * (w.ndim - 1))
    return p - column * w, h["wd_ratio"]


def adamp(w: Array, g: Array, slots: list[Array], t: int, h: Hyper) -> tuple[Array, list[Array], Any]:
    """AdamP (2006.08217), Algorithm 2, with the decay and the two views of the authors' code."""
    b1, b2 = h["betas"]
    m = b1 * slots[0] + (1 - b1) * g
    v = b2 * slots[1] + ((1 - b2) * g) * g
    denominator = np.sqrt(v) * (1 / math.sqrt(1 - b2**t)) + h["eps"]
    p = (b1 * m + (1 - b1) * g if h["nesterov"] else m) / denominator
    p, ratio = projected(w, g, p, h)
    w = w * (1 - h["lr"] * h["weight_decay"] * ratio) - (h["lr"] / (1 - b1**t)) * p
    return w, [m, v], 1 / denominator


def sgdp(w: Array, g: Array, slots: list[Array], t: int, h: Hyper) -> tuple[Array, list[Array], Any]:
    """SGDP (2006.08217), Algorithm 1, with the decay and the two views of the authors' code."""
    buf = h["momentum"] * slots[0] + (1 - h["dampening"]) * g
    p, ratio = projected(w, g, g + h["momentum"] * buf if h["nesterov"] else buf, h)
    decay = h["lr"] * h["weight_decay"] * ratio / (1 - h["momentum"])
    return w * (1 - decay) - h["lr"] * p, [buf], 1


@dataclass(frozen=True)
class Rule:
    update: Callable[[Array, Array, list[Array], int, Hyper], tuple[Array, list[Array], Any]]
    slots: int
    defaults: Hyper
    cases: dict[str, Hyper]  # the hyper-parameters under which the tests compare it
    revise: Callable[..., float] | None = None  # a new `scale` from the mean gradients of all layers


SGD_DEFAULTS = {
    "lr": 0.1,
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "decoupled_weight_decay": False,
}
ADAM_DEFAULTS = {
    "lr": 0.1,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decoupled_weight_decay": False,
}
AMSGRAD = {"amsgrad": False}
LARS_DEFAULTS = {
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "trust_coefficient": 1e-3,
    "eps": 1e-8,
    "adapt": True,
    "always_adapt": True,
    "trust_clip": False,
    "trust_in_buffer": False,
    "trust_outside": False,
}
LAMB_DEFAULTS = {
    "lr": 0.1,
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.01,
    "adapt": True,
    "coupled_weight_decay": False,
    "always_adapt": False,
    "trust_clip": False,
}
RATIO = {"gsnr_floor": 0.1, "gsnr_eps": 1e-8, "lagged_mean": False}

RULES = {
    "sgd": Rule(
        sgd,
        1,
        SGD_DEFAULTS,
        {
            "plain": {},
            "decayed": {"weight_decay": 0.01},
            "momentum": {"momentum": 0.9},
            "dampened": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
            "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
            "decoupled": {
                "momentum": 0.8,
                "nesterov": True,
                "weight_decay": 0.01,
                "decoupled_weight_decay": True,
            },
        },
    ),
    "adam": Rule(
        adam,
        3,
        ADAM_DEFAULTS | AMSGRAD,
        {
            "plain": {},
            "decayed": {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.01},
            "decoupled": {"weight_decay": 0.01, "decoupled_weight_decay": True},
            "amsgrad": {"amsgrad": True, "betas": (0.5, 0.6), "weight_decay": 0.01},
            "amsgrad-decoupled": {"amsgrad": True, "weight_decay": 0.01, "decoupled_weight_decay": True},
        },
    ),
    "lars": Rule(
        lars,
        1,
        LARS_DEFAULTS,
        {
            "paper": {"weight_decay": 0.01, "trust_coefficient": 0.1},
            "inside": {"weight_decay": 0.01, "trust_coefficient": 0.1, "trust_in_buffer": True},
            "outside": {"weight_decay": 0.01, "trust_coefficient": 0.1, "trust_outside": True},
            "excluded": {"adapt": False},
            "undecayed as in timm": {"always_adapt": False},
            "clipped": {"trust_coefficient": 10.0, "trust_clip": True},
        },
    ),
    "clars": Rule(
        clars,
        1,
        LARS_DEFAULTS,
        {
            "outside": {"weight_decay": 0.01, "trust_coefficient": 0.1, "trust_outside": True},
            "undecayed": {"trust_coefficient": 0.1},
            "excluded": {"adapt": False},
            "clipped": {"trust_coefficient": 10.0, "trust_clip": True},
        },
    ),
    "vrsgd": Rule(
        variance_reduced(sgd, smooth=False),
        1,
        SGD_DEFAULTS | RATIO,
        {
            "plain": {},
            "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "gsnr_floor": 0.3},
            "lagged": {"momentum": 0.9, "lagged_mean": True},
        },
    ),
    "vradam": Rule(
        variance_reduced(adam, smooth=True),
        3,
        ADAM_DEFAULTS | RATIO | {"betas": (0.9, 0.999, 0.9)},
        {"plain": {}, "lagged": {"lagged_mean": True, "weight_decay": 0.01, "betas": (0.8, 0.9, 0.5)}},
    ),
    "vrlars": Rule(
        variance_reduced(lars, smooth=False),
        1,
        LARS_DEFAULTS | RATIO,
        {
            "paper": {"weight_decay": 0.01, "trust_coefficient": 0.1},
            "lagged": {"trust_coefficient": 0.1, "lagged_mean": True},
        },
    ),
    "vrlamb": Rule(
        variance_reduced(lamb, smooth=True),
        3,
        LAMB_DEFAULTS | RATIO | {"betas": (0.9, 0.999, 0.9)},
        {"plain": {}, "lagged": {"lagged_mean": True}},
    ),
    "eg": Rule(
        eg,
        3,
        {
            "lr": 0.1,
            "momentum": 0.9,
            "smoothing": 0.9,
            "lr_gain": 1e-3,
            "lr_scale": 1e-3,
            "weight_decay": 0.0,
            "scale": 1.0,
        },
        {"plain": {}, "decayed": {"weight_decay": 0.01, "lr_gain": 0.5, "lr_scale": 0.1}},
        revised_scale,
    ),
    "lamb": Rule(
        lamb,
        2,
        LAMB_DEFAULTS,
        {
            "plain": {},
            "coupled": {"coupled_weight_decay": True},
            "undecayed": {"weight_decay": 0.0},
            "nvlamb": {"weight_decay": 0.0, "always_adapt": True},
            "excluded": {"adapt": False},
            "clipped": {"trust_clip": True},
        },
    ),
    "lans": Rule(
        lans,
        2,
        {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "adapt": True},
        {"plain": {}, "undecayed": {"weight_decay": 0.0, "betas": (0.8, 0.95)}, "excluded": {"adapt": False}},
    ),
    "adamp": Rule(
        adamp,
        2,
        {
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0.0,
            "delta": 0.1,
            "wd_ratio": 0.1,
            "nesterov": False,
        },
        {
            "plain": {},
            "decayed": {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.01},
            "nesterov": {"nesterov": True, "weight_decay": 0.01, "wd_ratio": 0.3},
        },
    ),
    "sgdp": Rule(
        sgdp,
        1,
        {
            "lr": 0.1,
            "momentum": 0.0,
            "dampening": 0.0,
            "weight_decay": 0.0,
            "nesterov": False,
            "eps": 1e-8,
            "delta": 0.1,
            "wd_ratio": 0.1,
        },
        {
            "plain": {},
            "dampened": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
            "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "wd_ratio": 0.3},
        },
    ),
}

# --- extrapolations: (rate of the own gradient, of what all share, the two) -> the displacement of x_k


EXTRAPOLATIONS: dict[str, Callable[[float, float, Array, Array], Array] | None] = {
    "none": None,
    "local": lambda own_rate, rate, own, mean: own_rate * own,
    "global": lambda own_rate, rate, own, mean: rate * mean,
    "anisotropic": lambda own_rate, rate, own, mean: own_rate * own - rate * mean,
}
RANDOM = {"gaussian": "gaussian", "uniform": "uniform", "filter": "gaussian"}


def inner_rate(inner_lr: Any, lr: float, K: int) -> float:
    if callable(inner_lr):
        return inner_lr(lr)
    return {"lr": lr, "lr/K": lr / K}[inner_lr] if isinstance(inner_lr, str) else inner_lr


# --- random numbers: Philox4x32-10 (Salmon et al. 2011) and what is made of its words, in float32 throughout


def philox(counter: Sequence[Any], key: Sequence[int]) -> list[Array]:
    """Ten rounds on four words, each an array of uint32 values in uint64."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for turn in range(10):
        k0, k1 = (
            (k + turn * bump) & 0xFFFFFFFF for k, bump in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)
        )
        left, right = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (right >> shift) ^ c1 ^ np.uint64(k0), right & low
        c2, c3 = (left >> shift) ^ c3 ^ np.uint64(k1), left & low
    return [c0, c1, c2, c3]


def polynomial(x: Array, *coefficients: float) -> Array:
    value = x.dtype.type(coefficients[-1])
    for c in coefficients[-2::-1]:
        value = x.dtype.type(c) + x * value
    return value


def log_of(x: Array) -> Array:
    """The library's ln of positive normal float32 numbers: 2^e m, m from sqrt(1/2) to sqrt(2)."""
    bits = x.view(np.int32).astype(np.int64)
    exponent = (bits - 0x3F3504F3) >> 23
    e, f = (
        exponent.astype(np.float32),
        (bits - (exponent << 23)).astype(np.int32).view(np.float32) - np.float32(1),
    )
    s = f / (np.float32(2) + f)
    half_square = np.float32(0.5) * f * f
    tail = s * s * polynomial(s * s, 0.666666865, 0.399887592, 0.295809865)
    high, low = np.float32(0.693145751953125), np.float32(1.42860677e-06)
    return e * high - ((half_square - (s * (half_square + tail) + e * low)) - f)


def sine_cosine_of_turn(u: Array) -> tuple[Array, Array]:
    """The library's sine and cosine of float32 numbers of turns."""
    quarters = np.rint(np.float32(4) * u)
    r = u - np.float32(0.25) * quarters
    s = r * polynomial(r * r, 6.28318531, -41.3416977, 81.5995178, -75.7263031)
    c = polynomial(r * r, 1.0, -19.7392082, 64.9393692, -85.448822, 59.4241066)
    quadrant = quarters.astype(int) % 4
    return np.choose(quadrant, [s, c, -s, -c]), np.choose(quadrant, [c, -s, -c, s])


def uniform_of(words: Sequence[Array]) -> list[Array]:
    """The middles of 2^24 equal parts of [-1, 1)."""
    signed = [word.astype(np.uint32).view(np.int32) for word in words]
    return [((word >> 8) * 2 + 1).astype(np.float32) * np.float32(2**-24) for word in signed]


def gaussian_of(words: Sequence[Array]) -> list[Array]:
    """Box & Muller: each pair of words is a radius and an angle, and gives a cosine and a sine."""
    numbers = []
    for word, turn in (words[:2], words[2:]):
        u = ((word >> np.uint64(8)) + np.uint64(1)).astype(np.float32) * np.float32(2**-24)
        radius = np.sqrt(np.float32(-2) * log_of(u))
        s, c = sine_cosine_of_turn((turn >> np.uint64(8)).astype(np.float32) * np.float32(2**-24))
        numbers += [radius * c, radius * s]
    return numbers


NOISES = {"gaussian": gaussian_of, "uniform": uniform_of}


def noise(kind: str, seed: int, step: int, worker: int, first: int, count: int) -> Array:
    """The random numbers of the flat elements from `first` on: four to a block of words."""
    blocks = np.arange(first // 4, (first + count + 3) // 4, dtype=np.uint64)
    counter = [blocks & np.uint64(0xFFFFFFFF), blocks >> np.uint64(32), worker, step]
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return np.stack(NOISES[kind](words), axis=1).ravel()[first % 4 :][:count]


class ReferenceEngine:
    """K workers' steps on a list of layers: mean, rule, publish.

    weights: one array per layer.
    dtype: the type of all parameters, or a list of one for each; what is published is rounded to it.
    precision: the type computed in (None: the engine's working type for that dtype).
    groups: one dict per layer with hyper-parameters of its own.
    """

    def __init__(self, weights, K, rule="sgd", extrapolation="none", inner_lr="lr/K", dtype="float64",
                 precision=None, groups=None, displacement="preconditioned", inner_clip=True,
                 noise=1.0, seed=0, **hyper):  # fmt: skip
        self.K, self.rule, self.extrapolation, self.inner_lr = K, RULES[rule], extrapolation, inner_lr
        self.dtypes = [dtype] * len(weights) if isinstance(dtype, str) else dtype
        self.T = np.dtype(precision or WORKING[self.dtypes[0]])
        self.w = [rounded(np.array(w, self.T), own) for w, own in zip(weights, self.dtypes, strict=True)]
        self.x = [list(self.w) for _ in range(K)]
        self.slots = [[np.zeros_like(w)] * self.rule.slots for w in self.w]
        self.t = [0] * len(self.w)
        self.memory = [{} for _ in self.w]  # what a rule keeps of a layer beside its slots
        self.displacement, self.inner_clip = displacement, inner_clip
        self.noise, self.seed = noise, seed
        self.hyper = {"maximize": False} | self.rule.defaults | hyper
        self.groups = groups or [{}] * len(self.w)
        padded = [(w.size + 31) // 32 * 32 for w in self.w]
        self.begins = [sum(padded[:i]) for i in range(len(padded))]

    def step(self, grads, divisor=1.0, clip=1.0, **hyper):
        """grads[k][l]: worker k's gradient of layer l, None where absent."""
        self.hyper |= hyper
        self.divisor, self.clip = divisor, clip
        of_layers = [self.filled(layer, [own[layer] for own in grads]) for layer in range(len(self.w))]
        if self.rule.revise:
            means = [own and self.clipped(tree_mean(own, divisor)) for own in of_layers]
            self.hyper["scale"] = self.rule.revise(self, means)
        for layer, local in enumerate(of_layers):
            if local:
                self.step_layer(layer, local, self.hyper | self.groups[layer])

    def filled(self, layer, local):
        """The gradients of all workers, zeros where one has none; None if nobody has one. Maximizing negates each."""
        if all(g is None for g in local):
            return None
        sign = self.T.type(-1 if (self.hyper | self.groups[layer])["maximize"] else 1)
        filled = [np.zeros_like(self.w[layer]) if g is None else np.asarray(g).astype(self.T) for g in local]
        return [sign * g for g in filled]

    def clipped(self, gradient):
        return gradient * self.T.type(self.clip) if self.clip != 1 else gradient

    def step_layer(self, layer, local, h):
        begin, own_scale = self.begins[layer], self.T.type(1 / self.divisor)
        mean = tree_mean(local, self.divisor)
        h = h | {
            "begin": begin,
            "square_sum": lambda x: square_sum(x, begin),
            "own": [g * (own_scale * self.T.type(self.clip)) for g in local],
            "spread": relative_spread([g * own_scale for g in local], mean),
            "memory": self.memory[layer],
        }
        mean = self.clipped(mean)
        self.t[layer] += 1
        w, slots, factor = self.rule.update(self.w[layer], mean, self.slots[layer], self.t[layer], h)
        self.w[layer], self.slots[layer] = w, slots
        factor = factor if self.displacement == "preconditioned" else 1
        for k in range(self.K):
            if self.extrapolation in RANDOM:
                x = self.displaced_at_random(k, layer, w, h["lr"])
            else:
                x = self.displaced(w, local[k], mean, factor, h["lr"])
            self.x[k][layer] = rounded(x, self.dtypes[layer])

    def displaced_at_random(self, k, layer, w, lr):
        rate = self.T.type(inner_rate(self.inner_lr, lr, self.K) * self.noise)
        key = (RANDOM[self.extrapolation], self.seed, self.t[layer], k)
        n = noise(*key, self.begins[layer], w.size).astype(self.T).reshape(w.shape)
        if self.extrapolation == "filter":
            begin = self.begins[layer]
            for f in range(len(w)):
                at = begin + f * w[f].size
                n[f] = n[f] * self.T.type(norm(w[f], at) / norm(n[f], at))
        return w - rate * n

    def displaced(self, w, local, mean, factor, lr):
        rate = inner_rate(self.inner_lr, lr, self.K)
        if self.extrapolation == "none" or rate == 0:
            return w
        own, shared = self.T.type(rate / self.divisor), self.T.type(rate)
        if self.inner_clip:
            own = self.T.type(float(own) * self.clip)
        else:
            shared = self.T.type(float(shared) / self.clip)
        d = EXTRAPOLATIONS[self.extrapolation](own, shared, local, mean)
        return w - d * factor


class LocalReference:
    """Local SGD (Lin et al. 2018, arXiv:1808.07217) of the workers of a ReferenceEngine, from where it stands.

    Every worker has weights, slots and counts of its own; average() brings their means into the engine, and the
    weights back to the workers.
    """

    def __init__(self, shared):
        self.shared = shared
        self.w = [list(shared.w) for _ in range(shared.K)]
        self.slots = [list(shared.slots) for _ in range(shared.K)]
        self.t = [list(shared.t) for _ in range(shared.K)]
        self.begin_round()

    def begin_round(self):
        self.touched, self.steps = set(), 0

    def step(self, grads, divisor=1.0):
        """grads[k][l]: worker k's gradient of layer l, None where absent: that worker keeps the layer as it is."""
        self.steps += 1
        for k, of_worker in enumerate(grads):
            for layer, g in enumerate(of_worker):
                if g is not None:
                    self.step_layer(k, layer, tree_mean([g.astype(self.shared.T)], divisor))

    def step_layer(self, k, layer, g):
        h = self.shared.hyper | self.shared.groups[layer]
        g = -g if h["maximize"] else g
        self.t[k][layer] += 1
        self.w[k][layer], self.slots[k][layer], _ = self.shared.rule.update(
            self.w[k][layer], g, self.slots[k][layer], self.t[k][layer], h
        )
        self.touched.add(layer)

    def average(self):
        for layer in self.touched:
            mean = tree_mean([w[layer] for w in self.w])
            self.shared.t[layer] += self.steps
            self.shared.w[layer] = mean
            self.shared.slots[layer] = [
                tree_mean(of_all) for of_all in zip(*(slots[layer] for slots in self.slots), strict=True)
            ]
            for w in self.w:
                w[layer] = mean
        self.begin_round()


def assert_same_bits(got, wanted, what="array"):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), what
    differ = np.flatnonzero(bits(got) != bits(wanted))
    assert not len(differ), (
        f"{what}: {len(differ)} of {got.size} elements differ, first at {differ[0]}: "
        f"{got.ravel()[differ[0]]!r} instead of {wanted.ravel()[differ[0]]!r}"
    )


def bits(array):
    flat = np.ascontiguousarray(array).ravel()
    return flat.view(f"u{flat.dtype.itemsize}")


# --- AdaScale: gradients are n flat arrays each, in float64


def baseline_sample(grads: Sequence[Array], scale: float) -> tuple[float, float]:
    """The variance of a batch of n / scale gradients and the squared norm of the true gradient, unbiased, clipped.

    From the definition of the sample covariance, not from sums of squares.
    """
    n, mean = len(grads), sum(grads) / len(grads)
    of_one = sum(float(np.sum((g - mean) ** 2)) for g in grads) / (n - 1)
    var = of_one / (n / scale)
    return max(var, 1e-6), max(float(mean @ mean) - of_one / n, 0.0)


def averaged(samples: Sequence[float], smoothing: Sequence[float], averaging: str) -> float:
    """The average after the last sample; each sample came with its own smoothing."""
    if averaging == "debiased":
        weights = [(1 - s) * math.prod(smoothing[i + 1 :]) for i, s in enumerate(smoothing)]
        return sum(w * x for w, x in zip(weights, samples, strict=True)) / sum(weights)
    average = samples[0]
    for t, (x, s) in enumerate(zip(samples, smoothing, strict=True), 1):
        average = sum(samples[:t]) / t if t < 1 / (1 - s) else s * average + (1 - s) * x
    return average


def gain_ratio(var: float, sqr: float, scale: float) -> float:
    return (var + sqr) / (var / scale + sqr)
